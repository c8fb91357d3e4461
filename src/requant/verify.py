"""Verification: every tensor of a packed release decoded from its bytes and held against the source.

The decoder (decode.py) shares nothing with the encoder. Codes are then re-derived from the decoded weights and the
stored scales and must come out bit for bit; compressed-tensors decodes a sample to the same values. What is not
quantized, in a release in BF16 everything, must have the bits of the source.
"""

import math
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from requant import int_pack, nvfp4, signround
from requant.architecture import block_count, block_of, fused_groups, is_drafting
from requant.checkpoint import Checkpoint
from requant.dtypes import main_dtype, released_dtypes, torch_dtype
from requant.encoding import quantization_config
from requant.errors import RequantError
from requant.jobs import progress
from requant.linears import check_closed
from requant.packed import PackedCheckpoint, decoded_rows, decoded_shape, input_scale
from requant.records import KeepList, TensorCheck, VerifyRecord, packed_as, write_json
from requant.rows import row_parts
from requant.schemes import Scheme

UNCHANGED_MEANS = (
    "the same bits and dtype as in the source: BF16, F16 and F32 as stored there; an FP8 weight decoded, each e4m3 "
    "value times the factor of its block, in float32, and rounded once to BF16; of a block that is in F16 or F32 for "
    "the most part, and of what is in no block if most of all blocks is, everything rounded once to BF16; a router's "
    "correction bias may be stored wider, in F32"
)


def compare(source: np.ndarray, decoded: np.ndarray) -> tuple[float, float, float | None]:
    """(cosine, relative MAE, SQNR in dB) of two float arrays of one shape, sums in float64.

    A source of zeros decoded to zeros counts as exact: cosine 1. SQNR is None where it is infinite.
    """
    w, d = source.ravel(), decoded.ravel()
    return _figures(sum((_sums(w[part], d[part]) for part in row_parts(w.size, 1)), np.zeros(6)))


def _sums(source: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """float64 [6], over all elements: source^2, decoded^2, source * decoded, error^2, |error|, |source|."""
    w, d = source.astype(np.float64).ravel(), decoded.astype(np.float64).ravel()
    error = w - d
    return np.array([w @ w, d @ d, w @ d, error @ error, np.abs(error).sum(), np.abs(w).sum()])


def _figures(sums: np.ndarray) -> tuple[float, float, float | None]:
    power, decoded_power, both, noise, error, magnitude = map(float, sums)
    norm = math.sqrt(power * decoded_power)
    cosine = both / norm if norm else float(noise == 0)
    relative = error / magnitude if magnitude else float(noise > 0)
    return min(cosine, 1.0), relative, 10 * math.log10(power / noise) if noise and power else None


def negligible(scheme: Scheme) -> float:
    """A weight that is smaller throughout counts as one of zeros. Integers don't reach below half of their smallest
    scale."""
    return nvfp4.NEGLIGIBLE if scheme.is_nvfp4 else signround.SMALLEST_INTEGER_SCALE / 2


def rederived(parts: dict[str, torch.Tensor], decoded: np.ndarray, scheme: Scheme) -> bool:
    """Whether the encoder finds the stored codes again in the decoded weights, given the stored scales."""
    weight = torch.from_numpy(decoded).to(torch.bfloat16)
    packed = parts["weight_packed"]
    if scheme.is_nvfp4:
        found = nvfp4.pack(nvfp4.round_to_codes(weight, parts["weight_scale"], parts["weight_global_scale"]))
        return torch.equal(found, packed)
    codes = int_pack.round_to_codes(weight, parts["weight_scale"], scheme.weight_bits)
    return torch.equal(int_pack.pack(codes, scheme.weight_bits), packed)


def public_decoding(parts: dict[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """[out, in]: the weight as compressed-tensors' own decompressor gives it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = quantization_config(scheme, [])
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.load_from_registry(scheme.format)
    return compressor.decompress(dict(parts), group)["weight"]


def verify(
    source: Path,
    packed_dir: Path,
    release: str,
    limits: tuple[float, float] | None,
    samples: int,
    out_record: Path,
    keep: KeepList | None = None,
) -> VerifyRecord:
    """Checks the release in `packed_dir` against `source`. `limits`: lowest cosine, highest relative MAE; None: BF16.

    keep: the experts that a pruned model has of the source; the release is checked against those.

    Raises RequantError naming the first tensor that fails a check, with what was found and what was expected.
    """
    start = time.monotonic()
    original, packed = Checkpoint(source, keep), PackedCheckpoint(packed_dir)
    scheme, blocks = packed.scheme, block_count(original.config)
    dropped = account(original, packed, blocks)
    quantized = set(packed.quantized)
    linears = {name: name.removesuffix(".weight") for name in original.index if block_of(name, blocks) is not None}
    check_closed((linears[name] for name in quantized), linears.values())
    checks: dict[str, TensorCheck] = {}
    unchanged = 0
    scales: dict[str, float] = {}
    chosen = set(sorted(quantized)[:: max(1, len(quantized) // samples)][:samples])
    for block in [*range(blocks), None]:
        names = sorted(name for name in original.index.keys() - dropped if block_of(name, blocks) == block)
        dtypes = wanted_dtypes(original, names, blocks)
        for name in names:
            tensor = original.read([name])[name]
            if name in quantized:
                parts = packed.parts(name)
                checks[name] = check_weight(name, tensor, parts, scheme, block, limits)
                if scheme.is_nvfp4:
                    scales[name] = float(parts["weight_global_scale"])
                if name in chosen:
                    check_public(name, parts, scheme)
            else:
                check_unchanged(name, tensor.to(torch_dtype(dtypes[name])), packed)
                unchanged += 1
        if block is not None:
            so_far = f"{len(checks)} quantized tensors" if scheme.quantizes else f"{unchanged} tensors"
            progress(f"{release}: block {block} (of {blocks}) verified, {so_far} so far")
    groups = check_groups(sorted(quantized), scales, blocks) if scheme.is_nvfp4 else 0
    record = VerifyRecord(
        release=release,
        packed=packed_as(packed_dir),
        scheme=scheme.name,
        limits={"cosine": limits[0], "relative_mae": limits[1]} if scheme.quantizes else {},
        tensors=checks,
        unchanged=unchanged,
        unchanged_means=UNCHANGED_MEANS,
        source_tensors=len(original.index),
        **summary(checks),
        codes_rederived=len(checks),
        scale_groups=groups,
        public_decoder=f"compressed-tensors {version('compressed-tensors')}" if scheme.quantizes else None,
        public_decoder_tensors=len(chosen),
        seconds=time.monotonic() - start,
    )
    write_json(out_record, record)
    return record


def summary(checks: dict[str, TensorCheck]) -> dict[str, float | str | None]:
    """The figures of a VerifyRecord over all quantized weights; None each if there are none.

    Exact weights have no SQNR, and no part in its mean.
    """
    figures = ("lowest_cosine", "lowest_cosine_tensor", "highest_relative_mae")
    means = {"mean_cosine": "cosine", "mean_relative_mae": "relative_mae", "mean_sqnr_db": "sqnr_db"}
    if not checks:
        return dict.fromkeys((*figures, *means))
    worst = min(checks, key=lambda name: checks[name].cosine)
    highest = max(check.relative_mae for check in checks.values())
    found = {mean: [getattr(check, figure) for check in checks.values()] for mean, figure in means.items()}
    numbers = {mean: [value for value in values if value is not None] for mean, values in found.items()}
    return dict(zip(figures, (checks[worst].cosine, worst, highest), strict=True)) | {
        mean: sum(values) / len(values) if values else None for mean, values in numbers.items()
    }


def account(original: Checkpoint, packed: PackedCheckpoint, blocks: int) -> set[str]:
    """Raises RequantError unless every tensor of the source stands once in the release, and nothing else does.

    Tensors of multi-token prediction may all be left out, if config.json says so: they are returned.
    """
    if packed.scheme.quantizes and not packed.quantized:
        raise RequantError(f"{packed.directory}: no quantized tensor; expected Linears in {packed.scheme.name}")
    if packed.quantized and not packed.scheme.quantizes:
        raise RequantError(
            f"{packed.directory}: {packed.quantized[0]} is quantized; expected a quantization_config in config.json"
        )
    both = [name for name in packed.quantized if name in packed.places]
    if both:
        raise RequantError(f"{packed.directory}: {both[0]} stands there twice, quantized and as it is; expected once")
    drafting = {name for name in original.index if is_drafting(name, blocks)}
    left_out = packed.config.get("num_nextn_predict_layers") == 0 and drafting.isdisjoint(packed.index)
    dropped = drafting if left_out else set()
    if missing := sorted(original.index.keys() - packed.index.keys() - dropped):
        raise RequantError(f"{packed.directory}: {missing[0]} is missing; the source has it")
    if extra := sorted([*packed.left_out, *(packed.index.keys() - original.index.keys())]):
        raise RequantError(f"{packed.directory}: {extra[0]} is there; the source has no such tensor")
    return dropped


def check_weight(
    name: str,
    source: torch.Tensor,
    parts: dict[str, torch.Tensor],
    scheme: Scheme,
    block: int,
    limits: tuple[float, float],
) -> TensorCheck:
    """One quantized weight: shape, finite, codes, cosine and relative MAE. Raises RequantError naming it.

    Some rows at a time: of a weight there is no more in memory than its source and its stored tensors.
    """
    sums, largest = np.zeros(6), 0.0
    try:
        if scheme.quantizes_activations:
            input_scale(parts)
        if (shape := decoded_shape(parts, scheme)) != list(source.shape):
            raise RequantError(f"shape {shape} decoded; the source has {list(source.shape)}")
        for rows, piece, decoded in decoded_rows(parts, scheme):
            if not np.isfinite(decoded).all():
                raise RequantError("NaN or infinite values decoded; expected finite weights")
            if not rederived(piece, decoded, scheme):
                raise RequantError("codes re-derived from decoded weights and scales differ from the stored ones")
            values = source[rows].float().numpy()
            sums += _sums(values, decoded)
            largest = max(largest, float(np.abs(values).max()), float(np.abs(decoded).max()))
    except RequantError as error:
        raise RequantError(f"{name}: {error}") from None
    cosine, relative_mae, sqnr = _figures(sums if largest >= negligible(scheme) else np.zeros(6))
    if cosine < limits[0]:
        raise RequantError(
            f"{name}: cosine {cosine:.5f} against the source; expected {limits[0]} or more (verify.cosine)"
        )
    if relative_mae > limits[1]:
        raise RequantError(
            f"{name}: relative MAE {relative_mae:.5f} against the source; "
            f"expected {limits[1]} or less (verify.relative_mae)"
        )
    return TensorCheck(block=block, cosine=cosine, relative_mae=relative_mae, sqnr_db=sqnr)


def check_public(name: str, parts: dict[str, torch.Tensor], scheme: Scheme) -> None:
    """Raises RequantError unless compressed-tensors decodes `parts` to requant's values, up to BF16 rounding."""
    furthest, largest = 0.0, 1e-30
    for _, piece, decoded in decoded_rows(parts, scheme):
        ours, public = torch.from_numpy(decoded), public_decoding(piece, scheme).float()
        furthest, largest = max(furthest, float((public - ours).abs().max())), max(largest, float(ours.abs().max()))
    difference = furthest / largest
    if difference > 2**-7:
        raise RequantError(
            f"{name}: compressed-tensors decodes values that differ by {difference:.2%} of the largest weight"
        )


def wanted_dtypes(original: Checkpoint, names: list[str], blocks: int) -> dict[str, str]:
    """The dtype of each of `names`, all of one block or all of none, in a release that quantizes none of them."""
    own = names if names and block_of(names[0], blocks) is not None else original.in_blocks(0, blocks)
    return released_dtypes(original.described(names), main_dtype(original.described(own).values()))


def check_unchanged(name: str, wanted: torch.Tensor, packed: PackedCheckpoint) -> None:
    """Raises RequantError unless a tensor that was not quantized has the bits of `wanted` (UNCHANGED_MEANS)."""
    stored = packed.read([name])[name]
    if stored.shape != wanted.shape:
        raise RequantError(f"{name}: shape {list(stored.shape)} found; the source has {list(wanted.shape)}")
    if stored.dtype != wanted.dtype:
        found, expected = (str(tensor.dtype).removeprefix("torch.") for tensor in (stored, wanted))
        raise RequantError(f"{name}: differs from the source: {found} found; expected {expected}, it is not quantized")
    if not same_bits(stored, wanted):
        raise RequantError(f"{name}: differs from the source; expected the same bytes, it is not quantized")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bytes."""
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def check_groups(quantized: list[str], scales: dict[str, float], blocks: int) -> int:
    """Number of fused groups. Raises RequantError if the global scales within one are not equal."""
    by_block: dict[int | None, list[str]] = {}
    for name in quantized:
        by_block.setdefault(block_of(name, blocks), []).append(name)
    groups = [group for names in by_block.values() for group in fused_groups(names)]
    for group in groups:
        if len({scales[name] for name in group}) > 1:
            found = ", ".join(f"{name.rpartition('.')[0].rpartition('.')[2]} {scales[name]:g}" for name in group)
            raise RequantError(
                f"{group[0]}: weight_global_scale differs within a fused group ({found}); expected one value"
            )
    return len(groups)
