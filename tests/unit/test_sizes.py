"""Predicted bytes are the bytes that are written."""

import pytest
import torch

from requant.encoding import encode, plain_rounding
from requant.nvfp4 import global_scale
from requant.safetensors_io import save
from requant.schemes import SCHEMES
from requant.sizes import Shaped, file_bytes, packed_tensors, released, tensor_bytes

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def shaped(tensors: dict[str, torch.Tensor]) -> dict[str, Shaped]:
    return {name: Shaped(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "scheme", [scheme for scheme in SCHEMES.values() if scheme.quantizes], ids=lambda scheme: scheme.name
)
@pytest.mark.parametrize("shape", [(24, 128), (7, 384)])
def test_packed_tensors_are_those_that_are_written(tmp_path, scheme, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    scale = global_scale(weight.abs().amax())
    rounded = plain_rounding(weight, scale if scheme.is_nvfp4 else None, scheme)
    tensors = encode("model.layers.10.x_proj", rounded, torch.tensor([64.0]), scheme)
    tensors["model.layers.10.norm.weight"] = torch.zeros(7, dtype=torch.bfloat16)
    predicted = packed_tensors("model.layers.10.x_proj", shape, scheme)
    predicted["model.layers.10.norm.weight"] = Shaped("BF16", (7,))
    assert predicted == shaped(tensors)
    save(tmp_path / "block", tensors)
    assert file_bytes(predicted) == (tmp_path / "block").stat().st_size


@pytest.mark.parametrize("count", range(1, 10))
def test_headers_are_counted_to_the_byte(tmp_path, count):
    """Every dtype, names that sort across dtypes, scalars and tensors without elements."""
    tensors = {}
    for number, dtype in enumerate(DTYPES.values()):
        for index in range(count):
            shape = [(), (0, 3), (index + 1,), (17, index * 9 + 1)][(number + index) % 4]
            tensors[f"{'zyx'[index % 3]}.{number}" + "n" * index] = torch.zeros(shape, dtype=dtype)
    save(tmp_path / "file", tensors)
    assert file_bytes(shaped(tensors)) == (tmp_path / "file").stat().st_size


def test_what_is_not_packed_stays_as_it_is_but_for_fp8():
    tensors = {"a.weight": Shaped("BF16", (4, 32)), "b.weight": Shaped("F8_E4M3", (4, 32)), "c": Shaped("F32", (3,))}
    stored = released(tensors, ["a"], SCHEMES["NVFP4"])
    assert stored["b.weight"] == Shaped("BF16", (4, 32)) and stored["c"] == Shaped("F32", (3,))
    assert tensor_bytes(stored) == 4 * 16 + 4 * 2 + 4 + 4 + 256 + 12
