"""NVFP4: e2m1 codes, FP8 e4m3 scales for groups of 16, one FP32 scale a tensor.

Layout and names are those of compressed-tensors `nvfp4-pack-quantized`. With G the tensor's global scale and s the
stored group scale, a weight is `e2m1(code) * s / G`; G = 448 * 6 / amax, so that the largest s is e4m3's largest.
"""

import torch

from requant.rows import by_rows

GROUP = 16
E2M1_MAX = 6.0
E4M3_MAX, E4M3_SMALLEST = 448.0, 2.0**-9
# The largest magnitude whose tensor scale, 2^117, still leaves the step of the smallest group scale, 2^-9 / 2^117, and
# what divides by it normal float32 numbers.
SMALLEST_PEAK = E4M3_MAX * E2M1_MAX * 2.0**-117
# A weight that is smaller throughout counts as one of zeros.
NEGLIGIBLE = 2.0**-100
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def check_width(width: int) -> None:
    """Raises ValueError unless rows of `width` are whole groups: such rows have no NVFP4, and stay in BF16."""
    if width % GROUP:
        raise ValueError(f"NVFP4 of rows of {width}; expected a multiple of {GROUP}")


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """float32 [1]: 2688 / amax, at most 2688 / SMALLEST_PEAK; 1 where the tensor is zero throughout."""
    amax = amax.float().reshape(1)
    scale = E4M3_MAX * E2M1_MAX * (1.0 / amax.clamp(min=SMALLEST_PEAK))
    return torch.where(amax > 0, scale, torch.ones_like(amax))


def group_scales(weight: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """weight [out, in] -> e4m3 [out, in / 16]: the scales of plain rounding, from each group's largest magnitude."""
    amax = weight.float().unflatten(-1, (-1, GROUP)).abs().amax(-1)
    return (tensor_scale * (amax * (1.0 / E2M1_MAX))).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)


def round_to_codes(weight: torch.Tensor, scales: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """weight [out, in], e4m3 scales [out, in / 16] -> uint8 codes [out, in]: nearest, ties to even, no minus zero."""
    step = scales.float() * (1.0 / tensor_scale)
    inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step)).repeat_interleave(GROUP, dim=-1)
    scaled = (weight.float() * inverse).clamp(-E2M1_MAX, E2M1_MAX)
    magnitude = scaled.abs()
    halves = torch.round(magnitude * 2)
    ones = torch.round(magnitude) + 2
    twos = torch.round(magnitude / 2) + 4
    code = torch.where(magnitude < 2, halves, torch.where(magnitude < 4, ones, twos)).to(torch.uint8)
    return code | ((scaled < 0) & (code > 0)).to(torch.uint8) << 3


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [out, in] -> uint8 [out, in / 2], the even index in the low nibble."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def values(codes: torch.Tensor, scales: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """float32 [out, in]: what codes [out, in] with their scales stand for."""
    sign = 1.0 - 2.0 * (codes >> 3).float()
    step = (scales.float() / tensor_scale).repeat_interleave(GROUP, dim=-1)
    return sign * E2M1.to(codes.device)[(codes & 7).long()] * step


def round_activations(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """x [..., in], in its dtype: rounded to NVFP4, `tensor_scale` static and the scale of every 16 values dynamic."""

    def work(rows: torch.Tensor) -> torch.Tensor:
        scales = group_scales(rows, tensor_scale)
        return values(round_to_codes(rows, scales, tensor_scale), scales, tensor_scale).to(x.dtype)

    return by_rows(work, x.reshape(-1, x.shape[-1])).view_as(x)
