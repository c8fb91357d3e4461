"""One block of a release: tuned, encoded, checked for shared scales, and run on to feed the next block."""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from requant import __version__, autoround, fused, nvfp4
from requant.architecture import NEVER_TUNED, expert_counts, fused_groups
from requant.blocks import empty_block, fill
from requant.chain import finite, load_masks
from requant.checkpoint import Checkpoint
from requant.config import Tuning
from requant.encoding import QuantizedWeight, encode, plain_rounding
from requant.errors import RequantError
from requant.grouped import ungroup
from requant.hashing import file_entry
from requant.jobs import peak_memory_bytes, progress
from requant.linears import choose
from requant.naming import released_name
from requant.packed import PARTS, decoded_on, round_inputs
from requant.records import BlockRecord, KeepList, write_json
from requant.routing import Observation, observe
from requant.safetensors_io import load, save
from requant.schemes import SCHEMES, Scheme
from requant.signround import SMALLEST_INTEGER_SCALE
from requant.streamed import StreamedModel
from requant.tuned import NotFinite, check_finite, settings

# The largest input of a Linear of which nothing is known, for zeros alone have reached it: of tensor scale 1.
UNKNOWN_PEAK = nvfp4.E4M3_MAX * nvfp4.E2M1_MAX
# Libraries that a block's bytes can depend on, by engine.
LIBRARIES = {
    "fused": ("numba", "numpy", "safetensors", "torch", "transformers"),
    "auto_round": ("auto-round", "numpy", "safetensors", "torch", "transformers"),
}


@dataclass(frozen=True)
class BlockJob:
    """What one block's result depends on. hidden: the inputs it is tuned on; targets: the reference chain's output.

    keep: patterns of Linears that stay in BF16; kept_experts: those that a pruned model has of the source.
    """

    source: Path
    release: str
    model: str
    block: int
    scheme: str
    tuning: Tuning
    keep: list[str]
    tokens: Path
    hidden: Path
    targets: Path
    kept_experts: KeepList | None = None


def block_seed(seed: int, release: str, block: int) -> int:
    """The seed of a block: from the release's seed and name and the block's number, 32 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{release}/{block}".encode()).digest()[:4], "big")


def choose_linears(block: nn.Module, prefix: str, scheme: Scheme, keep: list[str]) -> tuple[list[str], dict[str, str]]:
    """What `linears.choose` says of the Linears of `block`, names as `naming` has them; `prefix` stands before those in
    the block."""
    modules = {prefix + name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return choose({name: module.in_features for name, module in modules.items()}, scheme, keep)


def share_global_scales(block: nn.Module, prefix: str, linears: list[str]) -> dict[str, torch.Tensor]:
    """The tensor scale of each weight (NVFP4): 2688 over the largest magnitude in it and its fused group.

    A weight of zeros has that of the others; a group of such weights has 1. Raises RequantError for a weight that is
    too small beside the others for any group scale: it would be zeros.
    """
    weights = {name: block.get_submodule(name.removeprefix(prefix)).weight for name in linears}
    peaks = {name: weight.abs().amax().float().cpu() for name, weight in weights.items()}
    shared = dict(peaks)
    for group in fused_groups(linears):
        shared |= dict.fromkeys(group, torch.stack([peaks[name] for name in group]).amax())
    scales = {name: nvfp4.global_scale(peak) for name, peak in shared.items()}
    for name, peak in peaks.items():
        if peak >= nvfp4.NEGLIGIBLE and scales[name] * peak / nvfp4.E2M1_MAX < nvfp4.E4M3_SMALLEST:
            raise RequantError(
                f"{name}.weight: largest value {float(peak):.3g}, beside {float(shared[name]):.3g} of a weight that it "
                "shares its tensor scale with: it would be zeros in NVFP4; leave both in BF16 (`keep`)"
            )
    return scales


def input_peaks(linears: list[str], prefix: str, seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The largest input of each Linear, float32 [1], at least nvfp4.SMALLEST_PEAK.

    An expert's Linear that no token reached, or zeros alone, gets the largest of its peers, the other experts'. Without
    such a peer a Linear that zeros alone reached gets UNKNOWN_PEAK: whatever its scale is, it has given zeros.
    Raises RequantError for one that no token reached, nor any peer, and for an input that is no number.
    """
    found = {name: seen[name.removeprefix(prefix)] for name in linears if name.removeprefix(prefix) in seen}
    peaks = {}
    for name in linears:
        alike = [name]
        if (name not in found or found[name] == 0) and ".experts." in name:
            leaf = name.rpartition(".")[2]
            alike += [peer for peer in linears if ".experts." in peer and peer.rpartition(".")[2] == leaf]
        reached = [found[peer] for peer in alike if peer in found]
        if not reached:
            raise RequantError(f"{name}: no calibration token reached it or any of its peers; calibrate on more text")
        peak = torch.stack(reached).amax(0)
        if not peak.isfinite():
            raise RequantError(f"{name}: its largest input is {float(peak)}; expected a finite number")
        peaks[name] = torch.where(peak > 0, peak.clamp(min=nvfp4.SMALLEST_PEAK), UNKNOWN_PEAK)
    return peaks


@dataclass(frozen=True)
class Prepared:
    """A block ready to be tuned, its Linears with `weight_global_scale` and `act_max` where the scheme has them.

    linears: to quantize, names as `naming` has them; kept: left in BF16, with the reason. tensor_scales and peaks:
    those two values, by Linear. seen: the block's pass over its inputs.
    """

    block: nn.Module
    linears: list[str]
    kept: dict[str, str]
    tensor_scales: dict[str, torch.Tensor]
    peaks: dict[str, torch.Tensor]
    seen: Observation


def prepare(
    model: StreamedModel, index: int, scheme: Scheme, keep: list[str], hidden: torch.Tensor, mask: torch.Tensor | None
) -> Prepared:
    """Block `index` of `model` with what has to be known before it is tuned on hidden states [n, T, width]."""
    block, prefix = model.block(index), f"model.layers.{index}."
    linears, kept = choose_linears(block, prefix, scheme, keep)
    seen = observe(model, block, hidden, mask)
    tensor_scales = share_global_scales(block, prefix, linears) if scheme.is_nvfp4 else {}
    peaks = input_peaks(linears, prefix, seen.input_amax) if scheme.quantizes_activations else {}
    for name in linears:
        module = block.get_submodule(name.removeprefix(prefix))
        if name in tensor_scales:
            module.weight_global_scale = tensor_scales[name]
        if name in peaks:
            module.act_max = peaks[name]
    return Prepared(block, linears, kept, tensor_scales, peaks, seen)


@dataclass(frozen=True)
class Made:
    """A block's result, in the CPU's memory.

    tensors: what is packed, names as `naming` has them. losses: by iteration; kept: the one whose parameters are
    shipped; judged: losses over all samples, where it was chosen by them. output: BF16 [n, T, width], what the block
    gives as shipped, if that was asked for.
    """

    tensors: dict[str, torch.Tensor]
    losses: list[float]
    kept: int
    judged: dict[int, float]
    output: torch.Tensor | None


def make_block(
    model: StreamedModel,
    job: BlockJob,
    prepared: Prepared,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    report: Callable[[int, float], None],
    run_on: bool = True,
) -> Made:
    """Tunes and packs a prepared block, which is taken apart for it, and, to `run_on`, runs what was packed over
    `hidden`. Raises RequantError at the first loss that is no number."""
    scheme, prefix = SCHEMES[job.scheme], f"model.layers.{job.block}."
    block, linears, scales = prepared.block, prepared.linears, prepared.tensor_scales
    source = {prefix + name: tensor for name, tensor in block.state_dict().items()}
    computed = {name: tensor.cpu() for name, tensor in source.items() if _linear_of(name) not in linears}
    kept_as_they_are = model.as_released(job.block, computed, computed)
    weights = {
        name: plain_rounding(source[f"{name}.weight"], scales.get(name), scheme)
        for name in linears
        if NEVER_TUNED.search(name) or not job.tuning.iters
    }
    zeros = {name: zero_groups(source[f"{name}.weight"], scheme) for name in linears if name not in weights}
    del source  # a GPU has no room for it beside the tuner
    losses, kept, judged = [], 0, {}
    named = [name.removeprefix(prefix) for name in linears if name not in weights]
    if job.tuning.iters and named:
        seed = block_seed(job.tuning.seed, job.release, job.block)
        what = (hidden, targets, mask, model.positions(hidden.shape[1]), scheme, job.tuning, seed, report)
        try:
            if job.tuning.engine == "fused":
                tuned = fused.tune(block, named, *what)
            else:
                ungroup(block)
                tuned = autoround.tune(block, model.config, str(job.source), named, *what)
        except NotFinite as error:
            raise _stopped(job, error, prepared.seen, hidden) from None
        losses, kept, judged = tuned.losses, tuned.kept, tuned.judged
        weights |= {prefix + name: weight for name, weight in tuned.weights.items()}
    for name, groups in zeros.items():
        if groups is not None:
            weights[name].weight.unflatten(-1, (-1, scheme.group_size))[groups.to(weights[name].weight.device)] = 0
    tensors = packed_tensors(kept_as_they_are, weights, prepared.peaks, scheme)
    del weights
    if losses and not run_on:
        return Made(tensors, losses, kept, judged, None)
    shipped = shipped_block(model, job.block, tensors, linears, scheme)
    output = observe(model, shipped, hidden, mask).output
    try:
        if not finite(output):
            raise NotFinite("what it gives as shipped has NaN or infinite values; expected finite ones")
        if not losses:
            losses = [mean_squared_error(output, targets, mask)]
            check_finite(losses[0], 0)
            judged = {0: losses[0]}
    except NotFinite as error:
        raise _stopped(job, error, prepared.seen, hidden) from None
    return Made(tensors, losses, kept, judged, output)


def _stopped(job: BlockJob, error: NotFinite, seen: Observation, hidden: torch.Tensor) -> RequantError:
    """The line on a block that gives no finite numbers, with the largest input in it: the first that is none itself.

    hidden: the block's own input; seen: its pass over that, with the source's weights.
    """
    peaks = {"the block itself": float(torch.stack([sample.abs().amax() for sample in hidden]).amax())}
    peaks |= {name: float(peak) for name, peak in seen.input_amax.items()}
    name = max(peaks, key=lambda name: peaks[name] if math.isfinite(peaks[name]) else math.inf)
    return RequantError(
        f"{job.release} block {job.block}: {error}; its largest input is {peaks[name]:.3g}, of {name}: leave what "
        "overflows in BF16 (`keep`), or lower tuning.lr"
    )


def zero_groups(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor | None:
    """bool [out, groups]: the groups of `weight` [out, in] that are zero throughout; None if there are none.

    They stay zero. A tuner may move them: integers have a smallest scale, 1e-5, and an offset rounds to one step of it.
    So do groups of integers that are below half of it throughout, which plain rounding makes zero.
    """
    most = 0.0 if scheme.is_nvfp4 else SMALLEST_INTEGER_SCALE / 2
    found = weight.unflatten(-1, (-1, scheme.group_size)).abs().amax(-1).float() <= most
    return found if bool(found.any()) else None


def quantize_block(job: BlockJob, out_block: Path, out_record: Path, out_hidden: Path | None) -> BlockRecord:
    """Quantizes one block and writes its packed tensors, its record and the inputs of the next block.

    `out_hidden` gets BF16 `calibration` [n, seqlen, width]: what the block gives as shipped, decoded from the packed
    tensors, activations rounded as the scheme says; None where the next block is tuned on other inputs.
    """
    start = time.monotonic()
    torch.set_num_threads(job.tuning.threads)
    scheme, prefix = SCHEMES[job.scheme], f"model.layers.{job.block}."
    model = StreamedModel(Checkpoint(job.source, job.kept_experts), job.tuning.device)
    hidden = load(job.hidden, "calibration")["calibration"]
    targets = load(job.targets, "calibration")["calibration"]
    mask = load_masks(load(job.tokens))["calibration"]
    prepared = prepare(model, job.block, scheme, job.keep, hidden, mask)
    linears, counts = prepared.linears, prepared.seen.tokens_per_expert
    shapes = {
        f"{name}.weight": list(prepared.block.get_submodule(name.removeprefix(prefix)).weight.shape) for name in linears
    }
    progress(
        f"{job.release} block {job.block} (of {model.blocks}): {len(linears)} Linears, {job.tuning.iters} iterations"
    )
    made = make_block(model, job, prepared, hidden, targets, mask, _reporter(job, model.blocks), out_hidden is not None)
    save(out_block, {released_name(name, model.checkpoint.config): tensor for name, tensor in made.tensors.items()})
    if out_hidden is not None:
        save(out_hidden, {"calibration": made.output})
    losses, best = made.losses, made.kept
    seen = prepared.seen.input_amax
    zeros = [name for name in linears if name in prepared.peaks and seen.get(name.removeprefix(prefix)) == 0]
    record = BlockRecord(
        release=job.release,
        block=job.block,
        kind="moe" if job.block in expert_counts(model.checkpoint.index, model.blocks) else "dense",
        scheme=scheme.name,
        engine=job.tuning.engine if job.tuning.iters else "plain rounding",
        engine_version=autoround.engine_version() if job.tuning.engine == "auto_round" else __version__,
        libraries={name: version(name) for name in LIBRARIES[job.tuning.engine]},
        settings=settings(scheme, job.tuning) | {"seed": job.tuning.seed},
        seed=block_seed(job.tuning.seed, job.release, job.block),
        loss_initial=losses[0],
        loss_best=losses[best],
        best_iteration=best,
        iterations=job.tuning.iters if any(not NEVER_TUNED.search(name) for name in linears) else 0,
        losses=losses,
        judged=made.judged,
        quantized=shapes,
        kept=prepared.kept,
        never_tuned=[f"{name}.weight" for name in linears if NEVER_TUNED.search(name)],
        shared_global_scale=fused_groups([f"{name}.weight" for name in linears]) if scheme.is_nvfp4 else [],
        tokens_per_expert=counts,
        zero_inputs=zeros,
        never_reached=[expert for expert, count in enumerate(counts) if count == 0],
        tokens=hidden.shape[:2].numel() if mask is None else int(mask.sum()),
        seconds=time.monotonic() - start,
        peak_memory_bytes=peak_memory_bytes(),
        threads=job.tuning.threads,
        device=job.tuning.device,
        sha256=file_entry(out_block).sha256,
    )
    write_json(out_record, record)
    rounded, kept = record.compared
    progress(
        f"{job.release} block {job.block} (of {model.blocks}): loss {rounded:.3e} -> {kept:.3e} "
        f"{'over all samples' if made.judged else 'of minibatches'}, of iteration {best}, {record.seconds:.0f} s"
    )
    return record


def packed_tensors(
    source: dict[str, torch.Tensor],
    weights: dict[str, QuantizedWeight],
    peaks: dict[str, torch.Tensor],
    scheme: Scheme,
) -> dict[str, torch.Tensor]:
    """All tensors of a packed block, in the CPU's memory: quantized Linears in their parts, the rest as in `source`."""
    tensors = {name: tensor for name, tensor in source.items() if _linear_of(name) not in weights}
    for name, quantized in weights.items():
        input_scale = nvfp4.global_scale(peaks[name]) if name in peaks else None
        encoded = encode(name, quantized, input_scale, scheme)
        tensors |= {part: tensor.cpu() for part, tensor in encoded.items()}
    return tensors


def _linear_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def shipped_block(
    model: StreamedModel, block: int, tensors: dict[str, torch.Tensor], linears: list[str], scheme: Scheme
) -> nn.Module:
    """The block as a reader of its packed tensors gets it: weights decoded, inputs rounded as the scheme says."""
    prefix = f"model.layers.{block}."
    parts = {
        name: {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors} for name in linears
    }
    packed = {f"{name}.{part}" for name, found in parts.items() for part in found}
    plain = {name: tensor for name, tensor in tensors.items() if name not in packed}
    for name, found in parts.items():
        plain[f"{name}.weight"] = decoded_on(model.device, found, scheme)
    module = fill(
        empty_block(type(model.empty.model.layers[block]), model.config, block),
        {name.removeprefix(prefix): tensor for name, tensor in plain.items()},
        f"block {block}",
    )
    if scheme.quantizes_activations:
        for name in linears:
            linear = module.get_submodule(name.removeprefix(prefix))
            round_inputs(linear, tensors[f"{name}.input_global_scale"])
    return model.placed(module)


def mean_squared_error(output: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None) -> float:
    """Mean squared difference of two [n, T, width] tensors over the tokens of `mask`."""
    error = (output.float() - targets.float()).square().mean(-1)
    return float(error.double().mean() if mask is None else (error * mask).double().sum() / mask.sum())


def _reporter(job: BlockJob, blocks: int) -> Callable[[int, float], None]:
    """Reports an iteration every ten seconds; the time left is counted from the first, which includes the set-up."""
    reported: list[float] = []

    def report(iteration: int, loss: float) -> None:
        now = time.monotonic()
        if reported and now - reported[-1] < 10:
            return
        reported.append(now)
        left = ""
        if iteration:
            seconds = (now - reported[0]) / iteration * (job.tuning.iters - 1 - iteration)
            left = f", {seconds:.0f} s left in this block"
        progress(
            f"{job.release} block {job.block} (of {blocks}): iteration {iteration + 1} of {job.tuning.iters}, "
            f"loss {loss:.3e}{left}"
        )

    return report
