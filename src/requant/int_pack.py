"""W<bits>A16: symmetric integers in groups, packed as compressed-tensors `pack-quantized` does.

A weight is `code * scale` with a code from -2^(bits-1) to 2^(bits-1)-1; scales may be negative (the range is not
symmetric, so the sign is chosen that spends the extra step on the larger tail). The codes, offset to unsigned,
are one little-endian bit stream a row, in int32 words.
"""

from math import gcd

import torch


def round_to_codes(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """weight [out, in], scales [out, in / group] -> int8 codes [out, in]: those that the values of a
    tuned or rounded weight stand for."""
    step = scales.float().repeat_interleave(weight.shape[-1] // scales.shape[-1], dim=-1)
    limit = 2 ** (bits - 1)
    return torch.round(weight.float() / step).clamp(-limit, limit - 1).to(torch.int8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes [out, in] -> int32 [out, ceil(bits * in / 32)]."""
    columns, offset = codes.shape[1], 2 ** (bits - 1)
    places, length = _layout(bits)
    if missing := -columns % len(places):
        codes = torch.nn.functional.pad(codes, (0, missing), value=-offset)
    codes = codes.unflatten(1, (-1, len(places)))
    words = torch.zeros(*codes.shape[:2], length, dtype=torch.int32, device=codes.device)
    for place, (word, shift) in enumerate(places):
        code = codes[..., place].to(torch.int32) + offset
        words[..., word] |= code << shift
        if shift + bits > 32:
            words[..., word + 1] |= code >> (32 - shift)
    return words.flatten(1)[:, : -(-bits * columns // 32)].contiguous()


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: int32 [out, words] -> int8 codes [out, columns]."""
    places, length = _layout(bits)
    if missing := -packed.shape[1] % length:
        packed = torch.nn.functional.pad(packed, (0, missing))
    words = packed.unflatten(1, (-1, length))
    codes = torch.empty(*words.shape[:2], len(places), dtype=torch.int8, device=packed.device)
    for place, (word, shift) in enumerate(places):
        code = words[..., word] >> shift
        if shift + bits > 32:
            code = code & 2 ** (32 - shift) - 1 | words[..., word + 1] << (32 - shift)
        codes[..., place] = (code & 2**bits - 1) - 2 ** (bits - 1)
    return codes.flatten(1)[:, :columns].contiguous()


def _layout(bits: int) -> tuple[list[tuple[int, int]], int]:
    """(the word and the bit in it where each code begins, the words) of the shortest stretch of codes that fills words:
    8 codes of 4 bits are one, 32 of 3 bits three."""
    length = bits // gcd(bits, 32)
    return [divmod(bits * place, 32) for place in range(32 * length // bits)], length


def values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [out, in]: what codes [out, in] and scales [out, in / group] stand for."""
    return codes.float() * scales.float().repeat_interleave(codes.shape[-1] // scales.shape[-1], dim=-1)
