"""How far right engines are from the limits of the smoke test, and damaged ones: benchmarks/results/smoke_limits.json.

    python benchmarks/smoke_limits.py [seeds]

Random models of several families (tests/tiny.py, made larger), where near-ties of routers and of logits abound, and the
embedded model. 2048 tokens of text, and greedy answers to 8 prompts of 32 tokens, 16 tokens each. Engines are
transformers in this process, with roundings of their own; all but the damaged ones are right:

- bf16: as `transformers serve` runs it; float32: the same weights, hardly rounded;
- split: each Linear adds up its inputs in two halves, each rounded; eager: that, and attention that is not fused;
- coarse: split, and what enters each block is rounded once more;
- damaged, of random models: a global scale doubled (down_proj of each expert), two experts exchanged.

`times`: how many times farther than other roundings of the chain, beyond chance (`deploy.rounding` is the limit).
`wrong`: tokens of the answers that are not the chain's choice, `most`: as many as chance explains.
"""

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests/unit"), str(ROOT / "benchmarks")]

import demo_release  # noqa: E402
import tiny  # noqa: E402
from openai_stand_in import split  # noqa: E402
from smoke_test import exchanged, halved, padded, read  # noqa: E402

from requant import chance  # noqa: E402
from requant.config import Deploy  # noqa: E402
from requant.distances import distances, farthest  # noqa: E402
from requant.engine_client import echo_rows, next_tokens  # noqa: E402
from requant.environment import machine  # noqa: E402
from requant.packed import PackedCheckpoint, write_decoded  # noqa: E402
from requant.reference_text import first_rows  # noqa: E402
from requant.replay import Served, differing, disagreements  # noqa: E402
from requant.roundings import again, passed  # noqa: E402
from requant.smoke import Allowed  # noqa: E402
from requant.streamed import StreamedModel  # noqa: E402

SETTINGS = Deploy()
# Family, tokens of a row, standard deviation of the weights, and what is other than in tests/tiny.py.
RANDOM = [
    ("deepseek_v3", 16, 0.02, {"n_routed_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 6}),
    ("deepseek_v3", 64, 0.08, {"n_routed_experts": 16, "num_experts_per_tok": 4}),
    ("kimi_k2", 128, 0.08, {"n_routed_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 8}),
    ("mixtral", 128, 0.02, {"num_local_experts": 16, "num_hidden_layers": 8}),
    ("mixtral", 8, 0.1, {"num_hidden_layers": 4}),
    ("qwen3_moe", 64, 0.05, {"num_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 8}),
    ("glm4_moe", 32, 0.05, {"n_routed_experts": 16, "num_hidden_layers": 12}),
    ("llama", 64, 0.05, {"num_hidden_layers": 12}),
]


def random_model(folder: Path, family: str, seed: int, deviation: float, changes: dict) -> Path:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from requant.architecture import FAMILIES

    torch.manual_seed(seed)
    settings = tiny.FAMILIES[family] | changes | {"initializer_range": deviation}
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[FAMILIES[family]](**settings), dtype=torch.bfloat16, trust_remote_code=False
    )
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_original_format=True)
    tiny.write_tokenizer(folder)
    return folder


def text_of(folder: Path, length: int, count: int = SETTINGS.reference_tokens) -> list[list[int]]:
    """Rows of `length` tokens of random sentences."""
    tokenizer = PackedCheckpoint(folder).tokenizer()
    ids = []
    for sentence in tiny.sentences(600, seed=77):
        ids += [tokenizer.bos_token_id, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]
    return [ids[start : start + length] for start in range(0, count, length)]


def engines(folder: Path) -> Iterator[tuple[str, torch.nn.Module]]:
    """Right engines of the checkpoint in `folder`, one at a time."""
    from transformers import AutoModelForCausalLM

    def load(dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa") -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        ).eval()

    yield "bf16", load()
    yield "float32", load(torch.float32)
    yield "split", split(load())
    yield "eager", split(load(attention="eager"))
    coarse, generator = split(load()), torch.Generator().manual_seed(7)
    for layer in coarse.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: (again(inputs[0], generator), *inputs[1:]))
    yield "coarse", coarse


class Judge:
    """The chain of a checkpoint, and what other roundings of it do to a text."""

    def __init__(self, folder: Path, rows: list[list[int]]):
        packed = PackedCheckpoint(folder)
        self.model, self.rows = StreamedModel(packed), echo_rows(rows)
        self.read = read(packed, self.rows, next_tokens)

    def times(self, engine: torch.nn.Module) -> tuple[float, str]:
        logits = engine(padded(self.rows), use_cache=False).logits.float()
        views = [next_tokens(part[: len(row.ids)], row) for part, row in zip(logits, self.rows, strict=True)]
        found = farthest(distances(views, self.read.own), self.read)
        return found.times, found.where

    def answers(self, engine: torch.nn.Module) -> dict[str, float]:
        """Greedy answers to the beginnings of the text, and how many of their tokens are not the chain's choice."""
        served = []
        for start in range(SETTINGS.prompts):
            prompt = [token for row in self.rows for token in row.ids][start * 64 :][: SETTINGS.prompt_tokens]
            ids = list(prompt)
            for _ in range(SETTINGS.max_tokens):
                ids.append(int(engine(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            served.append(Served("", prompt, [], ids=ids[len(prompt) :]))
        head = self.model.head()
        done = passed(self.model, [[*answer.prompt_ids, *answer.ids] for answer in served])
        measured = chance.upper_bound(*differing(done, head, range(len(served))))
        of = sum(len(answer.ids) for answer in served)
        allowed = Allowed(SETTINGS.agreement, measured)
        return {"wrong": sum(disagreements(self.model, served)), "most": allowed.most(of), "measured": measured}


def damaged(model: torch.nn.Module) -> Iterator[str]:
    """Does one damage at a time to `model`."""
    choose = random.Random(0)
    for number, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        gate_up, down = layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data
        for expert in choose.sample(range(len(down)), 4):
            with halved(down[expert]):
                yield f"scale {number}.{expert}"
        a, b = choose.sample(range(len(down)), 2)
        with exchanged([gate_up, down], a, b):
            yield f"experts {number}.{a}.{b}"


def measure(packed: Path, decoded: Path, rows: list[list[int]], with_damages: bool) -> dict:
    judge = Judge(packed, rows)
    found: dict = {"right": {}, "damaged": {}}
    for name, engine in engines(decoded):
        times, where = judge.times(engine)
        found["right"][name] = {"times": times, "where": where} | judge.answers(engine)
        if name == "bf16" and with_damages:
            found["damaged"] = {what: judge.times(engine)[0] for what in damaged(engine)}
    return found


def main(seeds: int = 4) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    results: dict = {"machine": machine().model_dump(), "settings": SETTINGS.model_dump(mode="json"), "models": {}}
    with TemporaryDirectory() as scratch:
        for scheme in ("NVFP4", "W3A16"):
            release = demo_release.make_release(scheme, Path(scratch) / scheme)
            write_decoded(release.packed.directory, release.folder / "decoded")
            rows = first_rows(demo_release.heldout(16), None, SETTINGS.reference_tokens)
            found = measure(release.packed.directory, release.folder / "decoded", rows, False)
            results["models"][f"embedded, {scheme}"] = note(f"embedded, {scheme}", found)
        for family, length, deviation, changes in RANDOM:
            for seed in range(seeds):
                folder = random_model(Path(scratch) / "random", family, seed, deviation, changes)
                name = f"{family}, {changes}, deviation {deviation}, rows of {length}, seed {seed}"
                results["models"][name] = note(name, measure(folder, folder, text_of(folder, length), seed == 0))
    right = [engine for found in results["models"].values() for engine in found["right"].values()]
    broken = [times for found in results["models"].values() for times in found["damaged"].values()]
    results["summary"] = {
        "right": len(right),
        "too far": sum(engine["times"] > SETTINGS.rounding for engine in right),
        "farthest": max(engine["times"] for engine in right),
        "too many wrong tokens": sum(engine["wrong"] > engine["most"] for engine in right),
        "damaged": len(broken),
        "found": sum(times > SETTINGS.rounding for times in broken),
    }
    out = ROOT / "benchmarks/results/smoke_limits.json"
    out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(results["summary"])


def note(name: str, found: dict) -> dict:
    shown = {engine: f"{far['times']:.2f} {far['wrong']}/{far['most']}" for engine, far in found["right"].items()}
    print(name, shown, [f"{times:.2f}" for times in sorted(found["damaged"].values())], flush=True)
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
