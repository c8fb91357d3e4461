"""In which dtype a release stores what it does not quantize: in the file's own, byte for byte, but for three kinds.

FP8 weights are decoded to BF16. What is in F16 or F32 for the most part is rounded to BF16 once, as it is read. And a
router's correction bias is in F32, which transformers and engines keep it in: it is added to scores that BF16 is too
coarse for. Blocks compute in BF16 and that bias in F32 either way (`blocks.fill`).
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

READ = ("BF16", "F16", "F32", "F8_E4M3")  # the dtypes that a model's tensors may have
WIDER = ("F16", "F32")
CORRECTION_BIAS = "e_score_correction_bias"


class Sized(Protocol):
    """A tensor without its values. dtype: its safetensors name."""

    dtype: str
    shape: Iterable[int]


def main_dtype(tensors: Iterable[Sized]) -> str:
    """The dtype of most elements: BF16, F16 or F32. FP8 counts as BF16, which it is decoded to; so does a tie."""
    counts = dict.fromkeys(("BF16", *WIDER), 0)
    for tensor in tensors:
        dtype = tensor.dtype if tensor.dtype in WIDER else "BF16"
        count = 1
        for extent in tensor.shape:
            count *= extent
        counts[dtype] += count
    return max(counts, key=counts.__getitem__)


def released_dtype(name: str, dtype: str, main: str) -> str:
    """The dtype in a release of a tensor that is not quantized, stored in `dtype` by a source whose main one is `main`.

    What is in no block follows the main dtype of all blocks, what is in one that of its block: a block is made without
    a look at the others.
    """
    if name.endswith(CORRECTION_BIAS):
        return "F32"
    if dtype.startswith("F8") or (main in WIDER and dtype in WIDER):
        return "BF16"
    return dtype


def released_dtypes(tensors: Mapping[str, Sized], main: str) -> dict[str, str]:
    """`released_dtype` of each tensor, by its name."""
    return {name: released_dtype(name, tensor.dtype, main) for name, tensor in tensors.items()}


def torch_dtype(dtype: str) -> "torch.dtype":
    """PyTorch's name of a dtype that a release stores unquantized tensors in."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
