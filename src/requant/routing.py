"""What a block's tokens do inside it: which experts they reach and how large its Linears' inputs get."""

from dataclasses import dataclass

import torch
from torch import nn

from requant.blocks import Experts
from requant.reap import Watch
from requant.streamed import StreamedModel


@dataclass(frozen=True)
class Observation:
    """One pass of a block. Padding is left out of both figures.

    output: [n, T, width]. tokens_per_expert: routed tokens, empty for a dense block. input_amax: by Linear name,
    the largest magnitude of its input; Linears of experts that no token reached are missing.
    """

    output: torch.Tensor
    tokens_per_expert: list[int]
    input_amax: dict[str, torch.Tensor]


@torch.no_grad()
def observe(
    model: StreamedModel,
    block: nn.Module,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    batch_size: int = 8,
    watch: Watch | None = None,
) -> Observation:
    """Runs `block` over hidden states [n, T, width]; `mask` [n, T] is 1 for tokens that count.

    `watch` sees what the block's experts do.
    """
    hits: dict[int, int] = {}
    amax: dict[str, torch.Tensor] = {}

    def see_routing(module, inputs):
        for expert, count in zip(*(found.tolist() for found in inputs[1].unique(return_counts=True)), strict=True):
            hits[expert] = hits.get(expert, 0) + count

    def see_input(name):
        def hook(module, inputs):
            if inputs[0].numel():
                peak = inputs[0].abs().amax().float().reshape(1)
                amax[name] = torch.maximum(amax[name], peak) if name in amax else peak

        return hook

    experts = [module for module in block.modules() if isinstance(module, Experts)]
    handles = [module.register_forward_pre_hook(see_routing) for module in experts]
    if watch is not None:
        handles += [handle for module in experts for handle in watch.hooks(module)]
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(see_input(name)))
    output = torch.empty_like(hidden)
    step = batch_size if mask is None else 1
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        length = hidden.shape[1]
        if mask is not None:  # padding stands on the right and attention is causal: it can be left out altogether
            length = int(mask[start].sum())
            output[rows] = 0
        output[rows, :length] = model.run(block, hidden[rows, :length], step)
    for handle in handles:
        handle.remove()
    total = len(experts[0]) if experts else 0
    return Observation(output, [hits.get(expert, 0) for expert in range(total)], amax)
