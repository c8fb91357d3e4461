"""A packed release, read back: under the source's tensor names, weights decoded to BF16."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from requant import decode, int_pack, nvfp4
from requant.architecture import EXPERT_TENSOR
from requant.checkpoint import Checkpoint
from requant.errors import RequantError
from requant.rows import row_parts
from requant.schemes import Scheme, scheme_of

PARTS = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", "weight_shape")


class PackedCheckpoint(Checkpoint):
    """Looks like the source checkpoint: the same tensor names, quantized weights as the BF16 values they stand for."""

    def __init__(self, directory: str | Path):
        super().__init__(directory)
        self.scheme = scheme_of(self.config, str(self.directory / "config.json"))

    @cached_property
    def quantized(self) -> list[str]:
        """Source names of the quantized weights, sorted."""
        packed = (name for name in self.places if name.endswith(".weight_packed"))
        return sorted(name.removesuffix("_packed") for name in packed)

    @cached_property
    def index(self) -> dict[str, str]:
        """The shard of each tensor by its source name."""
        shards = {name: self.stored[place.stored] for name, place in self.places.items()}
        if not self.scheme.quantizes:
            return shards
        plain = {name: shard for name, shard in shards.items() if name.rpartition(".")[2] not in PARTS}
        return plain | {name: shards[f"{name}_packed"] for name in self.quantized}

    def parts(self, weight: str) -> dict[str, torch.Tensor]:
        """The stored tensors of a quantized weight, by the last part of their names."""
        from requant.safetensors_io import read_tensors

        module = weight.removesuffix(".weight")
        stored = {part: self.places[f"{module}.{part}"].stored for part in PARTS if f"{module}.{part}" in self.places}
        tensors = read_tensors(self.directory, self.stored, list(stored.values()))
        return {part: tensors[name] for part, name in stored.items()}

    def decoded(self, weight: str) -> np.ndarray:
        """float32 [out, in]: a quantized weight, decoded. RequantError naming it if its parts don't fit."""
        try:
            return decode_parts(self.parts(weight), self.scheme)
        except RequantError as error:
            raise RequantError(f"{self.directory}: {weight}: {error}") from None

    def read(self, names: list[str], device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """The tensors `names` (source names): quantized ones decoded to BF16 on `device`, the others as stored."""
        quantized = set(self.quantized)
        tensors = super().read([name for name in names if name not in quantized])
        for name in names:
            if name in quantized:
                try:
                    tensors[name] = decoded_on(device, self.parts(name), self.scheme)
                except RequantError as error:
                    raise RequantError(f"{self.directory}: {name}: {error}") from None
        return tensors

    def round_activations(self, block: nn.Module, prefix: str, which: bool | str = True) -> None:
        """Makes the quantized Linears of `block` (tensors under `prefix`) round their inputs as the scheme says.

        which: all of them, or "experts" for those of routed experts, "others" for all but those.
        """
        if not self.scheme.quantizes_activations:
            return
        for weight in self.quantized:
            wanted = which is True or bool(EXPERT_TENSOR.fullmatch(weight)) == (which == "experts")
            if weight.startswith(prefix) and wanted:
                linear = block.get_submodule(weight.removeprefix(prefix).removesuffix(".weight"))
                try:
                    round_inputs(linear, input_scale(self.parts(weight)))
                except RequantError as error:
                    raise RequantError(f"{self.directory}: {weight}: {error}") from None


def input_scale(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 [1]: the static scale of a Linear's input, of its stored tensors. RequantError if it is none."""
    scale = parts.get("input_global_scale", torch.zeros(0))
    if scale.numel() != 1 or not bool((scale > 0) & scale.isfinite()):
        raise RequantError(f"input_global_scale {scale.tolist()}; expected a finite number above 0")
    return scale


def round_inputs(linear: nn.Linear, scale: torch.Tensor) -> None:
    """Lets `linear` round its input to NVFP4 with the static tensor scale `scale`, float32 [1]."""
    linear.input_scale = scale
    linear.register_forward_pre_hook(_round_input)


def _round_input(linear: nn.Linear, inputs: tuple) -> tuple:
    x, scale = inputs[0], linear.input_scale.to(inputs[0].device)
    if not x.is_cuda:
        return nvfp4.round_activations(x, scale), *inputs[1:]
    from requant import kernels_cuda  # the same numbers in one pass

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return kernels_cuda.round_inputs(rows, scale.float().expand(len(rows)).contiguous()).view_as(x), *inputs[1:]


def decoded_on(device: str | torch.device, parts: dict[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """BF16 [out, in] from the stored tensors of one weight; on a GPU the numbers of `decode_parts`, made by torch."""
    if torch.device(device).type == "cpu":
        out = torch.empty(decoded_shape(parts, scheme), dtype=torch.bfloat16)
        for rows, _, values in decoded_rows(parts, scheme):
            out[rows] = torch.from_numpy(values)
        return out
    check_parts(parts, scheme)
    there = {part: tensor.to(device) for part, tensor in parts.items()}
    return decoded_by_torch(there, scheme).to(torch.bfloat16)


def check_parts(parts: dict[str, torch.Tensor], scheme: Scheme) -> None:
    """Raises RequantError naming the first stored tensor that a weight lacks."""
    wanted = ("weight_packed", "weight_scale", "weight_global_scale" if scheme.is_nvfp4 else "weight_shape")
    if missing := [part for part in wanted if part not in parts]:
        raise RequantError(f"{missing[0]} is missing; expected {', '.join(wanted)}")


def decoded_by_torch(parts: dict[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """As `decode_parts`, float32 on the device that the parts are on."""
    if scheme.is_nvfp4:
        codes = nvfp4.unpack(parts["weight_packed"])
        return nvfp4.values(codes, parts["weight_scale"], parts["weight_global_scale"])
    columns = int(parts["weight_shape"][1])
    codes = int_pack.unpack(parts["weight_packed"], scheme.weight_bits, columns)
    return int_pack.values(codes, parts["weight_scale"])


def decode_parts(parts: dict[str, torch.Tensor], scheme: Scheme) -> np.ndarray:
    """float32 [out, in] from the stored tensors of one weight."""
    check_parts(parts, scheme)
    packed = parts["weight_packed"].numpy()
    if scheme.is_nvfp4:
        scales = parts["weight_scale"].view(torch.uint8).numpy()
        return decode.nvfp4(packed, scales, float(parts["weight_global_scale"]))
    rows, columns = parts["weight_shape"].tolist()
    return decode.integers(packed, parts["weight_scale"].float().numpy(), scheme.weight_bits, (rows, columns))


def decoded_shape(parts: dict[str, torch.Tensor], scheme: Scheme) -> list[int]:
    """[out, in] of one weight, as its stored tensors say. RequantError naming the first of them that is missing."""
    check_parts(parts, scheme)
    if scheme.is_nvfp4:
        rows, half = parts["weight_packed"].shape
        return [rows, 2 * half]
    return parts["weight_shape"].tolist()


def decoded_rows(
    parts: dict[str, torch.Tensor], scheme: Scheme
) -> Iterator[tuple[slice, dict[str, torch.Tensor], np.ndarray]]:
    """(rows, their stored tensors, float32 [rows, in] as `decode_parts` has them) of one weight, part by part.

    Raises what `decode_parts` does.
    """
    rows, columns = decoded_shape(parts, scheme)
    split = {part: parts[part] for part in ("weight_packed", "weight_scale")}
    if any(len(tensor) != rows for tensor in split.values()):
        decode_parts(parts, scheme)  # says what does not fit
    for found in row_parts(rows, columns):
        piece = parts | {part: tensor[found] for part, tensor in split.items()}
        if not scheme.is_nvfp4:
            piece["weight_shape"] = torch.tensor([found.stop - found.start, columns])
        yield found, piece, decode_parts(piece, scheme)


def write_decoded(packed_dir: str | Path, out_dir: str | Path) -> None:
    """Writes the release in `packed_dir` as a plain BF16 checkpoint that any loader reads, one shard for one.

    Tensors that were never quantized are copied as they are; config.json loses its quantization_config.
    """
    import json
    import shutil

    from requant.checkpoint import INDEX
    from requant.naming import released_name
    from requant.records import write_text
    from requant.safetensors_io import save

    packed, out = PackedCheckpoint(packed_dir), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    sizes = 0
    for shard in packed.shards:
        tensors = packed.read(sorted(name for name, file in packed.index.items() if file == shard))
        sizes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save(out / shard, {released_name(name, packed.config): tensor for name, tensor in tensors.items()})
    weight_map = {released_name(name, packed.config): shard for name, shard in sorted(packed.index.items())}
    config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
    write_text(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    index = {"metadata": {"total_size": sizes}, "weight_map": weight_map}
    write_text(out / INDEX, json.dumps(index, indent=2) + "\n")
    for name in packed.carried_files:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(packed.directory / name, out / name)
