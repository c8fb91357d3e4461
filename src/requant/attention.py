"""Attention over whole samples, causal, where it can be made faster than transformers makes it.

Its interface is transformers' (`AttentionInterface`): [batch, heads, T, width] in and [batch, T, heads, width] out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Tokens of the longest samples whose scores a CPU holds whole.
LONGEST_SHORT = 512


class _Attention(torch.autograd.Function):
    """Causal attention of [n, T, width] queries, keys and values; scores in float32, shares in BF16."""

    @staticmethod
    def forward(ctx, query, key, value, scale):
        query, key, value = (tensor.detach().contiguous() for tensor in (query, key, value))
        from requant.kernels_cpu import attend

        shares = attend(torch.bmm(query.float(), key.float().transpose(1, 2)), scale)
        ctx.save_for_backward(query, key, value, shares)
        ctx.scale = scale
        return torch.bmm(shares, value)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, shares = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_value = torch.bmm(shares.transpose(1, 2), gradient)
        of_shares = torch.bmm(gradient, value.transpose(1, 2))
        from requant.kernels_cpu import attend_backward

        of_scores = attend_backward(of_shares, shares, ctx.scale)
        return torch.bmm(of_scores, key), torch.bmm(of_scores.transpose(1, 2), query), of_value, None


def short_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention in transformers' form, [batch, heads, T, width] in and [batch, T, heads, width] out."""
    from transformers.integrations.sdpa_attention import repeat_kv

    heads = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = (tensor.flatten(0, 1) for tensor in (query, repeat_kv(key, heads), repeat_kv(value, heads)))
    output = _Attention.apply(*parts, scale)
    return output.unflatten(0, query.shape[:2]).transpose(1, 2).contiguous(), None


def causal_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The same by torch, without a mask to read.

    Where the same bytes are asked for, values are filled up to the width of keys: of torch's kernels that repeat
    exactly, the fast one takes a single width.
    """
    from transformers.integrations.sdpa_attention import repeat_kv

    heads, width = query.shape[1] // key.shape[1], value.shape[-1]
    key, value = repeat_kv(key, heads), repeat_kv(value, heads)
    if torch.are_deterministic_algorithms_enabled():
        value = nn.functional.pad(value, (0, key.shape[-1] - width))
    output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output[..., :width].transpose(1, 2).contiguous(), None


@contextmanager
def attention_chosen(block: nn.Module, device: torch.device, length: int) -> Iterator[None]:
    """Lets the attention of `block` over `length` tokens run as one of the above, if it sees all of its keys.

    On a CPU only short samples do, whose scores are few. An indexer would then choose every key: it only passes its
    inputs to its Linears, for those who watch them.
    """
    from transformers import AttentionInterface

    configs = {id(module.config): module.config for module in block.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    chosen = _attention_for(configs.values(), device, length)
    indexers = [module for name, module in block.named_modules() if name.endswith(".indexer")] if chosen else []
    if chosen is not None:
        AttentionInterface.register(f"requant_{chosen.__name__}", chosen)
        for config in configs.values():
            config._attn_implementation = f"requant_{chosen.__name__}"
    for indexer in indexers:
        indexer.forward = _every_key(indexer)
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        for indexer in indexers:
            del indexer.forward


def _attention_for(configs, device: torch.device, length: int) -> Callable | None:
    if any(length > getattr(config, "index_topk", length) for config in configs):
        return None
    if device.type == "cpu":
        return short_attention if length <= LONGEST_SHORT else None
    return causal_attention


def _every_key(indexer: nn.Module) -> Callable:
    @torch.no_grad()
    def forward(hidden: torch.Tensor, queries: torch.Tensor, *args, **kwargs) -> None:
        indexer.wq_b(queries)
        indexer.wk(hidden)
        indexer.weights_proj(hidden)

    return forward
