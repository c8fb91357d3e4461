"""FP8 sources: e4m3 weights with one factor a block of rows and columns, as DeepSeek-V3 publishes them.

Beside an F8_E4M3 weight `x` [out, in] stands `x_scale_inv` [ceil(out / rows), ceil(in / columns)], where config.json
gives rows and columns as `quantization_config.weight_block_size`. A weight stands for its e4m3 value times the factor
of its block; blocks at the right and lower edge may be smaller. (DeepSeek-V3, README_WEIGHTS.md.) Factors are in F32,
Qwen3's in BF16, others' in F16: each is exact in F32.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from requant.errors import RequantError, brief
from requant.records import TensorEntry
from requant.safetensors_io import read_tensors

if TYPE_CHECKING:
    import torch

DTYPE, SCALE_SUFFIX = "F8_E4M3", "_scale_inv"
SCALE_DTYPES = ("F32", "BF16", "F16")  # the first is what is taken where config.json alone is known
# Keys of config.json under which engines look for a quantization: compressed-tensors wrote the second one once.
QUANTIZED_BY = ("quantization_config", "compression_config")

T = TypeVar("T")


def block_size(config: dict[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) of the blocks that share a factor; None for a checkpoint that is not quantized.

    Raises RequantError if config.json tells of another quantization than FP8 in blocks.
    """
    found = next((key for key in QUANTIZED_BY if config.get(key) is not None), None)
    if found is None:
        return None
    quantization = config[found]
    if not isinstance(quantization, dict):
        raise RequantError(f"config.json: {found}: {brief(quantization)}; expected keys and values, or no such key")
    expected = {"quant_method": ["fp8"], "fmt": ["e4m3", None]}
    for key, values in expected.items():
        if quantization.get(key) not in values:
            raise RequantError(
                f"config.json: {found}.{key}: {brief(quantization.get(key))}; expected {values[0]!r}, or a "
                "checkpoint that is not quantized"
            )
    size = quantization.get("weight_block_size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 2**31 for n in size)):
        raise RequantError(
            f"config.json: quantization_config.weight_block_size: {brief(size)}; expected [rows, columns], [128, 128]"
        )
    return size[0], size[1]


def without_scales(tensors: dict[str, T]) -> dict[str, T]:
    """`tensors`, by stored name, without the factors of those among them that are weights."""
    return {name: value for name, value in tensors.items() if weight_of(name) not in tensors}


def weight_of(name: str) -> str | None:
    """The weight whose factors a tensor of this name would be; None if it is named as none."""
    return name.removesuffix(SCALE_SUFFIX) if name.endswith(SCALE_SUFFIX) else None


def scale_shape(weight: list[int], size: tuple[int, int]) -> list[int]:
    """The shape of the factors of a weight [out, in] in blocks of `size`."""
    return [-(-extent // block) for extent, block in zip(weight, size, strict=True)]


def check_scales(tensors: dict[str, TensorEntry], size: tuple[int, int] | None) -> None:
    """Raises RequantError naming an FP8 weight without fitting factors, or factors of a weight that is not in FP8.

    `size` is what `block_size` says of the config.json, which has to tell of FP8 if, and only if, a weight is in FP8.
    """
    found = False
    for name, entry in tensors.items():
        if entry.dtype == DTYPE:
            found = True
            _check_scale(name, entry, tensors.get(name + SCALE_SUFFIX), size)
        elif (weight := tensors.get(weight_of(name))) is not None and weight.dtype != DTYPE:
            raise RequantError(f"{name}: found; its weight is stored in {weight.dtype}, not {DTYPE}")
    if size and not found:
        raise RequantError(
            f"config.json: quantization_config.quant_method: 'fp8'; no tensor is stored in {DTYPE}: "
            "remove the key if the checkpoint was decoded"
        )


def _check_scale(name: str, weight: TensorEntry, scale: TensorEntry | None, size: tuple[int, int] | None) -> None:
    if size is None:
        raise RequantError(
            f"{name} is stored in {DTYPE}; config.json has no quantization_config, expected one of quant_method fp8"
        )
    if len(weight.shape) != 2:
        raise RequantError(f"{name}: shape {weight.shape} in {DTYPE}; expected a matrix [out, in]")
    if scale is None:
        raise RequantError(f"{name} is stored in {DTYPE}; expected {name}{SCALE_SUFFIX} beside it, found none")
    wanted = scale_shape(weight.shape, size)
    if scale.dtype not in SCALE_DTYPES or scale.shape != wanted:
        raise RequantError(
            f"{name}{SCALE_SUFFIX}: {scale.dtype} {scale.shape} found; expected {', '.join(SCALE_DTYPES[:-1])} or "
            f"{SCALE_DTYPES[-1]} {wanted} for a weight {weight.shape} in blocks of {list(size)} (config.json: "
            "quantization_config.weight_block_size)"
        )


def decode(weight: "torch.Tensor", scales: "torch.Tensor", size: tuple[int, int]) -> "torch.Tensor":
    """BF16 [out, in] from float8_e4m3fn [out, in] and the factors of its blocks of `size`.

    Products are float32 and rounded once. RequantError if the shapes don't fit.
    """
    import torch

    (rows, columns), wanted = size, scale_shape(list(weight.shape), size)
    if list(scales.shape) != wanted:
        raise RequantError(f"factors {list(scales.shape)} found; expected {wanted} for blocks of {list(size)}")
    decoded = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    for part, values, factors in zip(decoded.split(rows), weight.split(rows), scales, strict=True):
        part.copy_(values.float() * factors.float().repeat_interleave(columns)[: weight.shape[1]])
    return decoded


def read(
    directory: str | Path,
    shard_of: dict[str, str],
    names: list[str],
    config: dict[str, Any],
    device: "str | torch.device" = "cpu",
) -> dict[str, "torch.Tensor"]:
    """The tensors `names`, by stored name: FP8 weights decoded to BF16 on `device`, others as they are stored.

    A weight and its factors may lie in different shards. Raises RequantError naming a weight whose factors are missing
    or don't fit.
    """
    import torch

    scales = [name + SCALE_SUFFIX for name in names if name + SCALE_SUFFIX in shard_of]
    tensors = read_tensors(directory, shard_of, [*names, *scales])
    for name in names:
        if tensors[name].dtype == torch.float8_e4m3fn:
            size = block_size(config)
            if size is None or name + SCALE_SUFFIX not in tensors:
                raise RequantError(
                    f"{directory}: {name} is stored in {DTYPE}; expected {name}{SCALE_SUFFIX} beside it "
                    "and quant_method fp8 in config.json"
                )
            try:
                factors = tensors.pop(name + SCALE_SUFFIX).to(device)
                tensors[name] = decode(tensors[name].to(device), factors, size)
            except RequantError as error:
                raise RequantError(f"{directory}: {name}: {error}") from None
    return tensors
