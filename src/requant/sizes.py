"""Bytes of a release from the shapes of its tensors alone: packed tensors by scheme, shards with their headers.

Nothing here opens a file or imports torch. Sizes are those that `encoding.encode` and `safetensors_io.save` write.
"""

from typing import NamedTuple

from requant.safetensors_io import DIGEST_LENGTH, DIGESTS, DTYPE_BYTES
from requant.schemes import Scheme

# safetensors 0.8 stores a file's tensors by dtype, in this order, and then by name.
DTYPE_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
# Headers are filled up with blanks to a multiple of this.
HEADER_MULTIPLE = 8


class Shaped(NamedTuple):
    """A tensor without its values. dtype: its safetensors name."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


def packed_tensors(linear: str, shape: tuple[int, ...], scheme: Scheme) -> dict[str, Shaped]:
    """The tensors that stand for the weight [out, in] of the Linear `linear` in a release of that scheme."""
    rows, columns = shape
    groups = columns // scheme.group_size
    if scheme.is_nvfp4:
        return {
            f"{linear}.weight_packed": Shaped("U8", (rows, columns // 2)),
            f"{linear}.weight_scale": Shaped("F8_E4M3", (rows, groups)),
            f"{linear}.weight_global_scale": Shaped("F32", (1,)),
            f"{linear}.input_global_scale": Shaped("F32", (1,)),
        }
    return {
        f"{linear}.weight_packed": Shaped("I32", (rows, -(-columns * scheme.weight_bits // 32))),
        f"{linear}.weight_scale": Shaped("BF16", (rows, groups)),
        f"{linear}.weight_shape": Shaped("I64", (2,)),
    }


def released(tensors: dict[str, Shaped], linears: list[str], scheme: Scheme) -> dict[str, Shaped]:
    """`tensors` as a release stores them: the weights of `linears` packed, FP8 ones decoded to BF16, others as is.

    What else becomes of a dtype depends on the others of its block: `dtypes.released_dtype` comes before.
    """
    weights = {f"{linear}.weight": linear for linear in linears}
    stored = {}
    for name, tensor in tensors.items():
        if name in weights:
            stored |= packed_tensors(weights[name], tensor.shape, scheme)
        else:
            stored[name] = Shaped("BF16", tensor.shape) if tensor.dtype.startswith("F8") else tensor
    return stored


def tensor_bytes(tensors: dict[str, Shaped]) -> int:
    """Bytes of the tensors' values."""
    return sum(tensor.bytes for tensor in tensors.values())


def file_bytes(tensors: dict[str, Shaped]) -> int:
    """Bytes of the safetensors file that `safetensors_io.save` makes of `tensors`: length, header and values."""
    metadata = len('{"__metadata__":{"format":"pt","":""}}') + len(DIGESTS) + DIGEST_LENGTH * (len(tensors) + 1)
    header, start = metadata, 0
    for name in sorted(tensors, key=lambda name: (DTYPE_ORDER.index(tensors[name].dtype), name)):
        dtype, shape = tensors[name]
        end = start + tensors[name].bytes
        extents = ",".join(map(str, shape))
        header += len(f',"{name}":{{"dtype":"{dtype}","shape":[{extents}],"data_offsets":[{start},{end}]}}')
        start = end
    return 8 + -(-header // HEADER_MULTIPLE) * HEADER_MULTIPLE + start
