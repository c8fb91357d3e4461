"""From a weight and its tuned scales to the tensors of a packed checkpoint, by scheme.

A packed Linear `x` has, for NVFP4, x.weight_packed, x.weight_scale, x.weight_global_scale and x.input_global_scale;
for W<bits>A16, x.weight_packed, x.weight_scale and x.weight_shape.
"""

from dataclasses import dataclass

import torch

from requant import int_pack, nvfp4, signround
from requant.rows import by_rows, row_parts
from requant.schemes import Scheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid.

    weight: [out, in], values that the codes stand for up to BF16 rounding. scales: [out, in / group], e4m3 for
    NVFP4, else BF16. tensor_scale: float32 [1], NVFP4 only.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor | None = None


def codes(quantized: QuantizedWeight, scheme: Scheme) -> torch.Tensor:
    """Codes [out, in]: a function of weight and scales alone."""

    def work(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        if scheme.is_nvfp4:
            return nvfp4.round_to_codes(weight, scales, quantized.tensor_scale)
        return int_pack.round_to_codes(weight, scales, scheme.weight_bits)

    return by_rows(work, quantized.weight, quantized.scales)


def plain_rounding(weight: torch.Tensor, tensor_scale: torch.Tensor | None, scheme: Scheme) -> QuantizedWeight:
    """`weight` [out, in] rounded to nearest with the scales of its largest magnitudes: iteration 0 of tuning."""
    tensor_scale = tensor_scale if tensor_scale is None else tensor_scale.to(weight.device)
    rounded = [_rounded(weight[part], tensor_scale, scheme) for part in row_parts(*weight.shape, weight.device)]
    grid, scales = map(torch.cat, zip(*rounded, strict=True))
    return QuantizedWeight(grid, scales, tensor_scale)


def _rounded(weight: torch.Tensor, tensor_scale: torch.Tensor | None, scheme: Scheme) -> tuple:
    """(BF16 values, scales) of some rows."""
    if not scheme.is_nvfp4:
        rounded = signround.round_integers(weight, 0.0, 1.0, 1.0, scheme.weight_bits, scheme.group_size)
        return rounded.values.to(torch.bfloat16), rounded.scales
    rounded = signround.round_nvfp4(weight.float(), 0.0, 1.0, tensor_scale.expand(len(weight)))
    steps = (rounded.scales / tensor_scale).repeat_interleave(scheme.group_size, dim=-1)  # as a decoder has them
    return (rounded.codes * steps).to(torch.bfloat16), rounded.scales.to(torch.float8_e4m3fn)


def encode(
    name: str, quantized: QuantizedWeight, input_scale: torch.Tensor | None, scheme: Scheme
) -> dict[str, torch.Tensor]:
    """The packed tensors of Linear `name`. `input_scale`: float32 [1], the static scale of its input (NVFP4)."""
    found = codes(quantized, scheme)
    if scheme.is_nvfp4:
        return {
            f"{name}.weight_packed": nvfp4.pack(found),
            f"{name}.weight_scale": quantized.scales.to(torch.float8_e4m3fn),
            f"{name}.weight_global_scale": quantized.tensor_scale.float().reshape(1).clone(),
            f"{name}.input_global_scale": input_scale.float().reshape(1).clone(),
        }
    return {
        f"{name}.weight_packed": int_pack.pack(found, scheme.weight_bits),
        f"{name}.weight_scale": quantized.scales.to(torch.bfloat16),
        f"{name}.weight_shape": torch.tensor(quantized.weight.shape, dtype=torch.int64),
    }


def quantization_config(scheme: Scheme, kept: list[str]) -> dict:
    """The `quantization_config` of config.json (compressed-tensors 0.20); `kept` Linears are its `ignore` list."""
    weights = {"num_bits": scheme.weight_bits, "group_size": scheme.group_size, "symmetric": True, "dynamic": False}
    weights |= (
        {"type": "float", "strategy": "tensor_group"} if scheme.is_nvfp4 else {"type": "int", "strategy": "group"}
    )
    inputs = None
    if scheme.is_nvfp4:
        weights["scale_dtype"] = "torch.float8_e4m3fn"
        inputs = weights | {"dynamic": "local"}
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "format": scheme.format,
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
            }
        },
        "ignore": kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
