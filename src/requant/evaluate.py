"""Evaluation: KL divergence, top-1 agreement and perplexity on held-out tokens, through chains of blocks.

Three models see the same tokens: the source (its hidden states are those of the reference chain), the release as
shipped (weights decoded from the packed files, activations rounded where the scheme does), and plain rounding of
the source, iteration 0, which shows what tuning bought; a release in BF16 has no such third. Memory stays one block
and a batch of logits.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from requant import paired
from requant.chain import finite, load_masks
from requant.checkpoint import Checkpoint
from requant.encoding import plain_rounding
from requant.errors import RequantError
from requant.grouped import ungroup
from requant.jobs import peak_memory_bytes, progress
from requant.packed import PackedCheckpoint, input_scale, round_inputs
from requant.quantize import mean_squared_error
from requant.records import (
    CalibrationRecord,
    EvaluateRecord,
    KeepList,
    KlChange,
    ModelQuality,
    PruneEvaluateRecord,
    ReferenceText,
    packed_as,
    read_json,
    write_json,
)
from requant.reference_text import RECORDED, first_rows, log_probabilities
from requant.routing import observe
from requant.safetensors_io import load
from requant.streamed import StreamedModel

# What a terminal calls the models that are held against the source.
LABELS = {"rounded": "rounded", "quantized": "as released"}


@dataclass
class Tally:
    """Running sums over predicted tokens of one model, float64. kl: of each sample, (sum, tokens)."""

    tokens: int = 0
    loss: float = 0.0
    agreeing: int = 0
    kl: list[tuple[float, float]] = field(default_factory=list)

    def add(self, logits: torch.Tensor, source: torch.Tensor, labels: torch.Tensor) -> None:
        """One sample. logits, source: float32 [tokens, vocabulary]; labels: [tokens], the tokens that came next."""
        ours, theirs = logits.double().log_softmax(-1), source.double().log_softmax(-1)
        self.tokens += len(labels)
        self.loss -= float(ours.gather(-1, labels[:, None]).sum())
        self.agreeing += int((logits.argmax(-1) == source.argmax(-1)).sum())
        self.kl.append((float((theirs.exp() * (theirs - ours)).sum()), len(labels)))

    def quality(self) -> ModelQuality:
        """Tokens of one sample are not independent: the standard error of their mean is that of a ratio of sums over
        samples, `paired.standard_error`."""
        return ModelQuality(
            perplexity=math.exp(self.loss / self.tokens),
            kl_divergence=max(paired.score(self.kl), 0.0),
            kl_divergence_stderr=paired.standard_error(self.kl),
            top1_agreement=self.agreeing / self.tokens,
        )


def kl_change(before: Tally, after: Tally) -> KlChange:
    """What became of the KL divergence between two models on the same samples, as differences of their sums."""
    rows = [(new - old, tokens) for (old, tokens), (new, _) in zip(before.kl, after.kl, strict=True)]
    return KlChange(difference=paired.score(rows), stderr=paired.standard_error(rows))


@dataclass
class Chain:
    """Hidden states of one of the models, by its name, on their way through the blocks."""

    name: str
    hidden: torch.Tensor
    errors: list[float] = field(default_factory=list)

    def advance(self, model: StreamedModel, block: nn.Module, target: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Runs `block` and notes the mean squared error against the reference chain.

        Raises RequantError at hidden states that are no numbers.
        """
        self.hidden = observe(model, block, self.hidden, mask).output
        if not finite(self.hidden):
            raise RequantError(
                f"{self.name}: block {len(self.errors)}: its output has NaN or infinite values over the held-out "
                "tokens; expected finite ones"
            )
        self.errors.append(mean_squared_error(self.hidden, target, mask))


def rounded_block(model: StreamedModel, packed: PackedCheckpoint, index: int) -> nn.Module:
    """Block `index` of the source with the release's quantized Linears rounded plainly: what iteration 0 would ship.

    Tensor scales follow from the source; the static scales of inputs are the release's.
    """
    prefix = f"model.layers.{index}."
    block = model.block(index)
    ungroup(block)
    for weight in packed.quantized:
        if weight.startswith(prefix):
            linear = block.get_submodule(weight.removeprefix(prefix).removesuffix(".weight"))
            parts = packed.parts(weight)
            rounded = plain_rounding(linear.weight, parts.get("weight_global_scale"), packed.scheme)
            linear.weight = nn.Parameter(rounded.weight, requires_grad=False)
            if packed.scheme.quantizes_activations:
                round_inputs(linear, input_scale(parts))
    return model.placed(block)


def evaluate(
    source: Path,
    packed_dir: Path,
    tokens_path: Path,
    calibration_record: Path,
    hidden: list[Path],
    release: str,
    model_name: str,
    threads: int,
    out_record: Path,
    keep: KeepList | None = None,
    original_hidden: Path | None = None,
    device: str = "cpu",
) -> EvaluateRecord:
    """Evaluates the release in `packed_dir`. `hidden`: the reference chain's files of held-out tokens, the
    embeddings first.

    keep: the experts that a pruned model has of the source; original_hidden: the end of the chain of the model that it
    is pruned from.
    """
    start = time.monotonic()
    torch.set_num_threads(threads)
    original, packed = StreamedModel(Checkpoint(source, keep), device), PackedCheckpoint(packed_dir)
    shipped = StreamedModel(packed, device)
    tokens_file = load(tokens_path)
    tokens, mask = tokens_file["heldout"], load_masks(tokens_file)["heldout"]
    reference = load(hidden[0], "heldout")["heldout"]
    names = ("rounded", "quantized") if packed.scheme.quantizes else ("quantized",)
    chains = {name: Chain(f"{release} {LABELS[name]}", reference) for name in names}
    text = first_rows(tokens, mask, RECORDED)
    # Activations in BF16, of that text alone: an engine that is given decoded weights has them so.
    alone = reference[: len(text), : max(map(len, text))] if packed.scheme.quantizes_activations else None
    for index in range(original.blocks):
        reference = load(hidden[index + 1], "heldout")["heldout"]
        chains["quantized"].advance(original, shipped.block(index, quantize_activations=True), reference, mask)
        if "rounded" in chains:
            chains["rounded"].advance(original, rounded_block(original, packed, index), reference, mask)
        if alone is not None:
            alone = shipped.run(shipped.block(index), alone)
        errors = ", ".join(f"{chain.errors[-1]:.3e} {LABELS[name]}" for name, chain in chains.items())
        progress(f"{release}: block {index} (of {original.blocks}) evaluated, hidden-state MSE {errors}")
    tallies = tally(original, reference, {name: chain.hidden for name, chain in chains.items()}, tokens, mask)
    quantizes = packed.scheme.quantizes_activations
    head = original.head()
    record = EvaluateRecord(
        release=release,
        packed=packed_as(packed_dir),
        model=model_name,
        tokens=tallies["source"].tokens,
        samples=len(tokens),
        seqlen=tokens.shape[1],
        heldout_sha256=read_json(calibration_record, CalibrationRecord).heldout_set.sha256,
        activations=f"rounded to {packed.scheme.name}, static tensor scale, dynamic group scales"
        if quantizes
        else "BF16",
        **{"rounded": None} | {name: found.quality() for name, found in tallies.items()},
        kl_change=kl_change(tallies["rounded"], tallies["quantized"]) if "rounded" in tallies else None,
        **against_original(original, original_hidden, chains["quantized"].hidden, tokens, mask),
        block_mse=[{name: chain.errors[index] for name, chain in chains.items()} for index in range(original.blocks)],
        reference_text=ReferenceText(
            tokens=text,
            log_probabilities=log_probabilities(head, chains["quantized"].hidden, text),
            weights_alone=None if alone is None else log_probabilities(head, alone, text),
        ),
        seconds=time.monotonic() - start,
        peak_memory_bytes=peak_memory_bytes(),
        device=device,
    )
    write_json(out_record, record)
    return record


def against_original(
    model: StreamedModel, end: Path | None, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None
) -> dict[str, ModelQuality]:
    """A release, whose last hidden states are `hidden`, against the model that its source is pruned from: pruning and
    quantization together. Nothing without the `end` of that model's chain."""
    if end is None:
        return {}
    found = tally(model, load(end, "heldout")["heldout"], {"quantized": hidden}, tokens, mask)
    return {"original": found["source"].quality(), "against_original": found["quantized"].quality()}


def evaluate_pruned(
    source: Path,
    keep: KeepList,
    tokens_path: Path,
    calibration_record: Path,
    hidden: list[Path],
    threads: int,
    out_record: Path,
    device: str = "cpu",
) -> PruneEvaluateRecord:
    """Evaluates the model that `keep` leaves of the one in `source`. `hidden`: as for `evaluate`, of the original."""
    start = time.monotonic()
    torch.set_num_threads(threads)
    original, pruned = (StreamedModel(Checkpoint(source, kept), device) for kept in (None, keep))
    tokens_file = load(tokens_path)
    tokens, mask = tokens_file["heldout"], load_masks(tokens_file)["heldout"]
    reference = load(hidden[0], "heldout")["heldout"]
    chain = Chain(keep.model, reference)
    for index in range(original.blocks):
        reference = load(hidden[index + 1], "heldout")["heldout"]
        chain.advance(pruned, pruned.block(index), reference, mask)
        progress(f"{keep.model}: block {index} (of {original.blocks}), hidden-state MSE {chain.errors[-1]:.3e}")
    tallies = tally(original, reference, {"pruned": chain.hidden}, tokens, mask)
    record = PruneEvaluateRecord(
        model=keep.model,
        source=keep.source,
        tokens=tallies["source"].tokens,
        samples=len(tokens),
        seqlen=tokens.shape[1],
        heldout_sha256=read_json(calibration_record, CalibrationRecord).heldout_set.sha256,
        original=tallies["source"].quality(),
        pruned=tallies["pruned"].quality(),
        block_mse=chain.errors,
        seconds=time.monotonic() - start,
        peak_memory_bytes=peak_memory_bytes(),
    )
    write_json(out_record, record)
    return record


def tally(
    model: StreamedModel,
    reference: torch.Tensor,
    others: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
) -> dict[str, Tally]:
    """Sums over all predicted tokens: `reference` and `others` are last hidden states [n, T, width].

    Norm and head of a release are the source's, so one head serves all; logits exist for one sample at a time.
    """
    head = model.head()
    tallies = {name: Tally() for name in ("source", *others)}
    for row in range(len(tokens)):
        length = tokens.shape[1] if mask is None else int(mask[row].sum())
        labels = tokens[row, 1:length].long().to(model.device)
        if not len(labels):
            continue
        source = head(reference[row, : length - 1])
        tallies["source"].add(source, source, labels)
        for name, hidden in others.items():
            tallies[name].add(head(hidden[row, : length - 1]), source, labels)
    return tallies
