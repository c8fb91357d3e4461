"""W<bits>A16: symmetric integers in groups, packed as compressed-tensors `pack-quantized` does.

A weight is `code * scale` with a code from -2^(bits-1) to 2^(bits-1)-1; scales may be negative (the range is not
symmetric, so the sign is chosen that spends the extra step on the larger tail). The codes, offset to unsigned,
are one little-endian bit stream a row, in int32 words.
"""

import torch


def round_to_codes(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """weight [out, in], scales [out, in / group] -> int8 codes [out, in]: those that the values of a
    tuned or rounded weight stand for."""
    step = scales.float().repeat_interleave(weight.shape[-1] // scales.shape[-1], dim=-1)
    limit = 2 ** (bits - 1)
    return torch.round(weight.float() / step).clamp(-limit, limit - 1).to(torch.int8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes [out, in] -> int32 [out, ceil(bits * in / 32)]."""
    unsigned = codes.to(torch.int32) + 2 ** (bits - 1)
    stream = (unsigned[..., None] >> torch.arange(bits, dtype=torch.int32, device=codes.device)) & 1
    stream = stream.flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (stream.to(torch.int64) << torch.arange(32, device=codes.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: int32 [out, words] -> int8 codes [out, columns]."""
    stream = (packed[..., None] >> torch.arange(32, dtype=torch.int32, device=packed.device)) & 1
    digits = stream.flatten(1)[:, : bits * columns].unflatten(1, (columns, bits))
    codes = (digits << torch.arange(bits, dtype=torch.int32, device=packed.device)).sum(-1) - 2 ** (bits - 1)
    return codes.to(torch.int8)


def values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [out, in]: what codes [out, in] and scales [out, in / group] stand for."""
    return codes.float() * scales.float().repeat_interleave(codes.shape[-1] // scales.shape[-1], dim=-1)
