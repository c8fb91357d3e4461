"""SignRound (arXiv 2309.05516) over a stack of weight rows: what is tuned, what it rounds to, how it moves.

A weight w of a group with scale s rounds to `s * round(w / s + v)`. Tuned are the offset v of every weight, from 0,
and the shrink of every group's range, a factor m from 1 in [0, 1]. A step moves each by its learning rate against the
sign of its gradient, rounding taken as the identity (straight through). With rates that fall linearly from r to 0 over
n iterations, v is always a multiple of r / n: offsets and shrinks are kept as integers, and iteration i moves them by
n - i units.

This module is the definition, in plain PyTorch and any float type; `kernels_cpu` and `kernels_cuda` compute the same
in one pass over memory. Arithmetic and its order are AutoRound's 0.16.1 (`nv_fp4`, `int_sym`), so that iteration 0
has its codes and scales bit for bit.
"""

from dataclasses import dataclass

import torch

from requant.nvfp4 import E2M1_MAX, E4M3_MAX, GROUP

SMALLEST_INTEGER_SCALE = 1e-5


@dataclass(frozen=True)
class Rounded:
    """codes: [rows, width], e2m1 values or integers. scales: [rows, groups]. values: [rows, width], what they mean."""

    codes: torch.Tensor
    scales: torch.Tensor
    values: torch.Tensor


def inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 for 0, where its gradient is 0 too."""
    return torch.where(x == 0, torch.zeros_like(x), 1.0 / torch.where(x == 0, torch.ones_like(x), x))


def straight_through(rounded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The values of `rounded`, the gradient of `x`."""
    return x + (rounded - x).detach()


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """x from -6 to 6, rounded to the nearest e2m1 number, ties to even codes. Its gradient is 1, and 0 where x is 0."""
    magnitude = x.detach().abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(x.dtype)
    return straight_through(torch.round(x / step) * step, x) * (magnitude != 0)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """x rounded to e4m3, straight through."""
    return straight_through(x.to(torch.float8_e4m3fn).to(x.dtype), x)


def round_nvfp4(
    weight: torch.Tensor, offset: torch.Tensor | float, factor: torch.Tensor | float, tensor_scale: torch.Tensor
) -> Rounded:
    """weight, offset [rows, width], factor [rows, width / 16] (or numbers), tensor_scale [rows] -> NVFP4.

    Differentiable in all but tensor_scale.
    """
    groups = weight.unflatten(-1, (-1, GROUP))
    tensor_scale = tensor_scale[:, None]
    peak = groups.abs().max(-1).values * factor
    scales = e4m3((tensor_scale * (peak * (1.0 / E2M1_MAX))).clamp(-E4M3_MAX, E4M3_MAX))
    scaling = inverse(scales * inverse(tensor_scale))[..., None]
    shifted = groups * scaling + _grouped(offset, GROUP)
    codes = e2m1(shifted.clamp(-E2M1_MAX, E2M1_MAX))
    return Rounded(codes.flatten(-2), scales, (codes * inverse(scaling)).flatten(-2))


def round_inputs_nvfp4(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """x [rows, width] rounded to NVFP4 with tensor scales [rows] and the scale of every 16 values from themselves."""
    return round_nvfp4(x, 0.0, 1.0, tensor_scale).values


def round_integers(
    weight: torch.Tensor,
    offset: torch.Tensor | float,
    low_factor: torch.Tensor | float,
    high_factor: torch.Tensor | float,
    bits: int,
    group_size: int,
) -> Rounded:
    """weight, offset [rows, width], factors [rows, groups] (or numbers) -> integers with scales of either sign.

    The factors shrink the negative and the positive end of a group's range. Scales and the quotient weight / scale
    are BF16, as AutoRound has them, if the weight is.
    """
    limit = 2 ** (bits - 1)
    groups = weight.unflatten(-1, (-1, group_size))
    low = -(groups.detach().amin(-1).clamp(max=0) * low_factor)
    high = groups.detach().amax(-1).clamp(min=0) * high_factor
    peak = torch.where(high < low, 1, -1) * torch.maximum(high, low)
    scales = (peak / limit).to(weight.dtype)
    scales = torch.where(
        scales < 0, scales.clamp(max=-SMALLEST_INTEGER_SCALE), scales.clamp(min=SMALLEST_INTEGER_SCALE)
    )
    quotient = groups / scales[..., None]
    shifted = quotient + _grouped(offset, group_size)
    codes = straight_through(torch.round(shifted), shifted).clamp(-limit, limit - 1)
    return Rounded(codes.flatten(-2), scales, (codes * scales[..., None]).flatten(-2))


def _grouped(offset: torch.Tensor | float, size: int) -> torch.Tensor | float:
    return offset.unflatten(-1, (-1, size)) if isinstance(offset, torch.Tensor) else offset
