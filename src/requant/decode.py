"""Decoding packed weights from their bytes, in NumPy and from the formats' definitions alone.

It shares no code with the encoders (nvfp4.py, int_pack.py), so that an error in one of them can't hide in both.
Formats: compressed-tensors `nvfp4-pack-quantized` and `pack-quantized`; OCP FP8 (e4m3fn: 4 exponent bits with
bias 7, 3 mantissa bits, no infinity, 0x7f and 0xff are NaN) and OCP MX FP4 (e2m1).
"""

import numpy as np

from requant.errors import RequantError

E2M1 = np.array([s * v for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], dtype=np.float32)


def _e4m3_table() -> np.ndarray:
    table = np.empty(256, dtype=np.float32)
    for byte in range(256):
        sign = -1.0 if byte >= 128 else 1.0
        exponent, mantissa = byte >> 3 & 15, byte & 7
        if byte & 127 == 127:
            table[byte] = np.nan
        elif exponent == 0:
            table[byte] = sign * mantissa * 2.0**-9
        else:
            table[byte] = sign * (8 + mantissa) * 2.0 ** (exponent - 10)
    return table


E4M3 = _e4m3_table()


def nvfp4_codes(packed: np.ndarray) -> np.ndarray:
    """uint8 [out, in / 2] -> uint8 codes [out, in]."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.uint8)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return codes


def nvfp4(packed: np.ndarray, scale_bytes: np.ndarray, tensor_scale: float) -> np.ndarray:
    """float32 [out, in] from uint8 [out, in / 2], e4m3 bytes [out, in / 16] and the tensor's scale.

    Raises RequantError if shapes don't fit or a scale is no finite positive number.
    """
    rows, half = packed.shape
    if scale_bytes.shape != (rows, half // 8) or half % 8:
        raise RequantError(f"weight_scale: shape {list(scale_bytes.shape)}; expected {[rows, half // 8]}")
    if not (np.isfinite(tensor_scale) and tensor_scale > 0):
        raise RequantError(f"weight_global_scale: {tensor_scale}; expected a finite number above 0")
    scales = E4M3[scale_bytes]
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise RequantError("weight_scale: NaN or negative values; expected finite e4m3 numbers of 0 or more")
    weights = E2M1[nvfp4_codes(packed)].reshape(rows, -1, 16)
    weights *= (scales / np.float32(tensor_scale))[..., None]
    return weights.reshape(rows, -1)


def int_codes(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """int32 words [out, ceil(bits * in / 32)] -> signed codes int8 [out, in]: bytes by bytes, eight codes in `bits`."""
    if 32 * packed.shape[1] < bits * columns:
        raise RequantError(f"weight_packed: {packed.shape[1]} words a row; expected {-(-bits * columns // 32)}")
    rows, eights = packed.shape[0], -(-columns // 8)
    stream = packed.astype("<i4", copy=False).view(np.uint8)[:, : bits * eights]
    stream = np.pad(stream, ((0, 0), (0, bits * eights - stream.shape[1]))).reshape(rows, eights, bits)
    codes = np.empty((rows, eights, 8), dtype=np.int8)
    for place in range(8):
        first, shift = bits * place // 8, bits * place % 8
        pair = stream[..., first].astype(np.uint16)
        if shift + bits > 8:
            pair |= stream[..., first + 1].astype(np.uint16) << 8
        codes[..., place] = (pair >> shift & ((1 << bits) - 1)).astype(np.int16) - (1 << (bits - 1))
    return codes.reshape(rows, -1)[:, :columns]


def integers(packed: np.ndarray, scales: np.ndarray, bits: int, shape: tuple[int, int]) -> np.ndarray:
    """float32 [out, in] from int32 words and float32 scales [out, in / group].

    Raises RequantError if shapes don't fit or a scale is not finite.
    """
    rows, columns = shape
    if packed.shape[0] != rows or scales.shape[0] != rows or columns % scales.shape[1]:
        raise RequantError(
            f"weight_packed {list(packed.shape)} and weight_scale {list(scales.shape)} do not fit {list(shape)}"
        )
    if not np.isfinite(scales).all():
        raise RequantError("weight_scale: NaN or infinite values; expected finite numbers")
    group = columns // scales.shape[1]
    weights = int_codes(packed, bits, columns).astype(np.float32).reshape(rows, -1, group)
    weights *= scales[..., None]
    return weights.reshape(rows, columns)
