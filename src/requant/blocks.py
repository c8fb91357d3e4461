"""Decoder blocks as modules: built empty on the meta device, experts as Linears of their own, filled by name."""

from typing import Any

import torch
from torch import nn

from requant.architecture import family
from requant.config_json import DROPPED
from requant.dtypes import CORRECTION_BIAS
from requant.errors import RequantError
from requant.key_types import as_classes_take_it


def model_config(config: dict[str, Any]):
    """The transformers config object of a config.json, without its quantization_config."""
    from transformers import CONFIG_MAPPING

    model_type = family(config)
    plain = {key: value for key, value in config.items() if key not in DROPPED}
    return CONFIG_MAPPING[model_type].from_dict(as_classes_take_it(plain) | {"model_type": model_type})


def empty_model(config: dict[str, Any]) -> nn.Module:
    """The whole transformers model on the meta device: structure without a byte of weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            model_config(config), dtype=torch.bfloat16, attn_implementation="sdpa", trust_remote_code=False
        ).eval()


class Expert(nn.Module):
    """One routed expert: a gated MLP."""

    def __init__(self, hidden: int, intermediate: int, act_fn: nn.Module):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The routed experts of a block, each with Linears that are named as checkpoints name them.

    Stands where transformers has one module of stacked 3-D parameters, with the same call. grouped: what runs all of
    them at once, if something does (`grouped.Grouped`).
    """

    grouped = None

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """hidden [tokens, width], chosen and gates [tokens, k] -> [tokens, width]: the gated sum of the experts."""
        if self.grouped is not None:
            return self.grouped.run(self, hidden, chosen, gates)
        output = torch.zeros_like(hidden)
        for expert in torch.unique(chosen).tolist():
            token, position = torch.where(chosen == expert)
            part = self[expert](hidden[token]) * gates[token, position, None]
            output.index_add_(0, token, part.to(output.dtype))
        return output


def split_experts(block: nn.Module) -> None:
    """Puts `Experts` where transformers stacks the experts' weights."""
    for parent in list(block.modules()):
        stacked = getattr(parent, "experts", None)
        if getattr(stacked, "gate_up_proj", None) is not None:
            count, double, hidden = stacked.gate_up_proj.shape
            with torch.device("meta"):
                experts = Experts(Expert(hidden, double // 2, stacked.act_fn) for _ in range(count))
            parent.experts = experts.to(torch.bfloat16)


def empty_block(layer: type[nn.Module], config: Any, index: int) -> nn.Module:
    """Block `index` of class `layer` on the meta device, experts split. Called without a mask, it is causal."""
    with torch.device("meta"):
        block = layer(config, index).to(torch.bfloat16)
    split_experts(block)
    if hasattr(config, "index_topk"):
        block.register_forward_pre_hook(_spell_out_mask, with_kwargs=True)
    return block


def _spell_out_mask(block: nn.Module, inputs: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Gives a block that chooses keys by an indexer the mask that others imply: [1, 1, T, T], True where seen."""
    if kwargs.get("attention_mask") is None:
        hidden = inputs[0] if inputs else kwargs["hidden_states"]
        length = hidden.shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden.device).tril()
        kwargs = kwargs | {"attention_mask": mask}
    return inputs, kwargs


def fill(module: nn.Module, tensors: dict[str, torch.Tensor], what: str) -> nn.Module:
    """Gives a meta-device module its tensors to compute with: BF16, but for a router's correction bias, in float32.

    Raises RequantError naming the first tensor that is missing, unknown or of another shape.
    """
    expected = module.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise RequantError(f"{what}: {len(missing)} tensors missing from the checkpoint, first {missing[0]!r}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise RequantError(f"{what}: {len(unknown)} tensors that its architecture does not have, first {unknown[0]!r}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise RequantError(
                f"{what}: {name}: shape {list(tensor.shape)} found; config.json gives {list(expected[name].shape)}"
            )
    module.load_state_dict({name: tensor.to(_dtype(name)) for name, tensor in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False)


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name.endswith(CORRECTION_BIAS) else torch.bfloat16
