"""How far damage takes log-probabilities beside the limit of the smoke test: benchmarks/results/smoke_test.json.

    python benchmarks/smoke_test.py

The embedded model, quantized by plain rounding, 2048 held-out tokens. The engine is transformers in this process, as
`transformers serve` runs it, on decoded weights that one damage at a time is done to. `labels`: compared as with
that engine, by log-probability ratios of 26 tokens; `echo`: as with vLLM and sglang, by the log-probabilities of the
text's own tokens and the 20 largest.
- a global scale doubled, of every Linear: an expert's gate_proj and down_proj (up_proj does what down_proj does);
- two experts exchanged, ten pairs in every MoE block;
- two tokens of the vocabulary exchanged, twenty pairs.
"""

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests/unit")]

import demo_release  # noqa: E402

from requant import decisions, vocabulary  # noqa: E402
from requant.config import Deploy  # noqa: E402
from requant.distances import Reading, Row, View, distances, farthest, reading  # noqa: E402
from requant.engine_client import echo_rows, next_tokens  # noqa: E402
from requant.environment import machine  # noqa: E402
from requant.packed import PackedCheckpoint, write_decoded  # noqa: E402
from requant.reference_text import first_rows  # noqa: E402
from requant.roundings import passed  # noqa: E402
from requant.streamed import StreamedModel  # noqa: E402

PAIRS_OF_EXPERTS, PAIRS_OF_TOKENS = 10, 20


@contextmanager
def halved(*weights: torch.Tensor) -> Iterator[None]:
    """A weight is code x scale / global scale: with the global scale doubled it has half its value, in BF16 exactly."""
    for weight in weights:
        weight.mul_(0.5)
    yield
    for weight in weights:
        weight.mul_(2)


@contextmanager
def exchanged(weights: list[torch.Tensor], a: int, b: int) -> Iterator[None]:
    for weight in weights:
        weight[[a, b]] = weight[[b, a]]
    yield
    for weight in weights:
        weight[[a, b]] = weight[[b, a]]


class Engine:
    """transformers on the decoded weights, in memory. inputs: of each layer, of the undamaged model."""

    def __init__(self, folder: Path, rows: list[Row]):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False).eval()
        self.layers, self.rows = self.model.model.layers, rows
        self.inputs: list[tuple] = []
        handles = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in self.layers]
        self.logits(padded(rows))
        for handle in handles:
            handle.remove()

    def _keep(self, layer: torch.nn.Module, given: tuple, named: dict) -> None:
        self.inputs.append((given[0], named))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits

    def logits_from(self, layer: int) -> torch.Tensor:
        """Of the rows, where no layer before `layer` is damaged."""
        hidden = self.inputs[layer][0]
        for index in range(layer, len(self.layers)):
            hidden = self.layers[index](hidden, **self.inputs[index][1])
        return self.model.lm_head(self.model.model.norm(hidden))


class Compared:
    """One of the ways in which an engine's log-probabilities are compared with the chain's, which is run here."""

    def __init__(self, packed: PackedCheckpoint, rows: list[Row], view: View, factor: float):
        self.rows, self.view, self.factor = rows, view, factor
        self.read = read(packed, rows, view)

    def ratio(self, logits: torch.Tensor) -> float:
        views = [self.view(part[: len(row.ids)], row) for part, row in zip(logits, self.rows, strict=True)]
        return farthest(distances(views, self.read.own), self.read).times / self.factor


def read(packed: PackedCheckpoint, rows: list[Row], view: View) -> Reading:
    """The chain's own views, and those of other roundings."""
    model = StreamedModel(packed)
    return reading(passed(model, [row.ids for row in rows]), model.head(), rows, view)


def padded(rows: list[Row]) -> torch.Tensor:
    longest = max(len(row.ids) for row in rows)
    return torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])


def figures(ratios: dict[str, float]) -> dict:
    """Of what each damage takes the figure to, as a multiple of the limit."""
    ordered = sorted(ratios.items(), key=lambda item: item[1])
    values = [ratio for _, ratio in ordered]
    return {
        "cases": len(values),
        "found": sum(ratio > 1 for ratio in values),
        "lowest": values[0],
        "median": values[len(values) // 2],
        "highest": values[-1],
        "not_found": {name: ratio for name, ratio in ordered if ratio <= 1},
    }


def measure(scheme: str, folder: Path) -> dict:
    release, settings = demo_release.make_release(scheme, folder), Deploy()
    packed, tokenizer = release.packed, release.packed.tokenizer()
    write_decoded(packed.directory, folder / "decoded")
    text = first_rows(demo_release.heldout(16), None, settings.reference_tokens)
    labels = decisions.choose_labels(tokenizer, text)
    rows = decisions.rows_of(tokenizer, text)

    def of_labels(logits: torch.Tensor, row: Row) -> torch.Tensor:
        return decisions.own(logits, row, labels)

    ways = {
        "labels": Compared(packed, rows, of_labels, settings.rounding),
        "echo": Compared(packed, echo_rows(text), next_tokens, settings.rounding),
    }
    engine = Engine(folder / "decoded", rows)
    kinds = {kind: {way: {} for way in ways} for kind in ("scale of an expert", "scale of another Linear", "experts")}

    same: dict[str, list[float]] = {kind: [] for kind in kinds}
    healthy = engine.logits(padded(rows))

    def note(kind: str, name: str, layer: int) -> None:
        logits = engine.logits_from(layer)
        same[kind].append(float((logits.argmax(-1) == healthy.argmax(-1)).double().mean()))
        for way, compared in ways.items():
            kinds[kind][way][name] = compared.ratio(logits)

    choose = random.Random(0)
    for number, layer in enumerate(engine.layers):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                with halved(module.weight.data):
                    note("scale of another Linear", f"{number}.{name}", number)
        if not hasattr(layer.mlp, "experts"):
            continue
        gate_up, down = layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data
        inner = gate_up.shape[1] // 2
        for expert in range(len(down)):
            for leaf, weight in (("gate_proj", gate_up[expert, :inner]), ("down_proj", down[expert])):
                with halved(weight):
                    note("scale of an expert", f"{number}.{expert}.{leaf}", number)
        for a, b in choose.sample(list(combinations(range(len(down)), 2)), PAIRS_OF_EXPERTS):
            with exchanged([gate_up, down], a, b):
                note("experts", f"{number}: {a}, {b}", number)
        print(scheme, number, flush=True)
    found = {
        way: {
            "healthy": compared.ratio(healthy),
            **{kind: figures(ratios[way]) for kind, ratios in kinds.items()},
        }
        for way, compared in ways.items()
    }
    found["same_choice"] = {kind: {"lowest": min(parts), "median": median(parts)} for kind, parts in same.items()}
    return found | tokens_exchanged(folder / "decoded", release, of_labels, settings)


def tokens_exchanged(folder: Path, release: demo_release.DemoRelease, view: View, settings: Deploy) -> dict:
    packed, tokenizer = release.packed, release.packed.tokenizer()
    shown = vocabulary.sample(tokenizer, settings.vocabulary_tokens)
    rows = decisions.rows_of(tokenizer, vocabulary.contexts(tokenizer, shown))
    ours = read(packed, rows, view)
    limits = vocabulary.limits_of(ours, settings.rounding)
    engine = Engine(folder, rows)

    def ratio(tokens: torch.Tensor) -> float:
        logits = engine.logits(tokens)
        views = [view(part[: len(row.ids)], row) for part, row in zip(logits, rows, strict=True)]
        found = vocabulary.nearest(rows, distances(views, ours.own))
        return max(found[token] / limits[token] for token in found)

    right, ratios, choose = padded(rows), {}, random.Random(0)
    for _ in range(PAIRS_OF_TOKENS):
        a, b = choose.sample(shown, 2)
        tokens = right.clone()
        tokens[right == a], tokens[right == b] = b, a
        ratios[f"{tokenizer.decode([a])!r}, {tokenizer.decode([b])!r}"] = ratio(tokens)
    return {
        "tokens": {
            "shown": len(shown),
            "limit": min(limits.values()),
            "healthy": ratio(right),
            "exchanged": figures(ratios),
        }
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    results = {"machine": machine().model_dump(), "reference_tokens": Deploy().reference_tokens}
    for scheme in ("NVFP4", "W3A16"):
        with TemporaryDirectory() as folder:
            results[scheme] = measure(scheme, Path(folder))
    out = ROOT / "benchmarks/results/smoke_test.json"
    out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
