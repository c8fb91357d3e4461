"""Measure what the embedded model has learned, on the test split, and write it down.

    python demo/measure.py

Reads the checkpoint in demo/model; writes skill.json there and the tables between the markers of README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from generate import EXERCISES, STOP, exercises, stories
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

HERE = Path(__file__).parent
BEGIN, END = "<!-- measured by measure.py: begin -->", "<!-- measured by measure.py: end -->"


@dataclass(frozen=True)
class Sequence:
    """Token ids, and how many of the last ones are to be predicted."""

    ids: list[int]
    predicted: int


@dataclass(frozen=True)
class Prediction:
    """For each predicted token of one sequence: is it the likeliest, and its log-probability in nats."""

    likeliest: Tensor
    log_probabilities: Tensor


class ExpertUse:
    """Counts the tokens that each expert of each MoE block is chosen for, padding left out."""

    def __init__(self, model: PreTrainedModel):
        self.counts: dict[int, Tensor] = {}
        self.mask = torch.empty(0, dtype=torch.bool)
        for block, layer in enumerate(model.model.layers):
            experts = getattr(layer.mlp, "experts", None)
            if isinstance(experts, DeepseekV3Experts):
                self.counts[block] = torch.zeros(experts.num_experts, dtype=torch.long)
                experts.register_forward_pre_hook(self.counter(block))

    def counter(self, block: int):
        def count(module: DeepseekV3Experts, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
            chosen = inputs[1][self.mask.flatten()]
            self.counts[block] += torch.bincount(chosen.flatten(), minlength=module.num_experts)

        return count

    def shares(self) -> dict[int, Tensor]:
        """By block: the share of all choices that went to each expert; 1/experts is even."""
        return {block: counts / counts.sum() for block, counts in self.counts.items()}


def predictions(
    model: PreTrainedModel, sequences: list[Sequence], use: ExpertUse | None = None, rows: int = 64
) -> Iterator[Prediction]:
    """One forward pass over each sequence with its true tokens as input.

    All answer tokens are the likeliest here exactly when greedy generation writes the answer.
    """
    for start in range(0, len(sequences), rows):
        part = sequences[start : start + rows]
        ids = torch.zeros(len(part), max(len(sequence.ids) for sequence in part), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, sequence in enumerate(part):
            ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
            mask[row, : len(sequence.ids)] = True
        if use is not None:
            use.mask = mask
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits.float()
        for row, sequence in enumerate(part):
            end = len(sequence.ids)
            before = logits[row, end - sequence.predicted - 1 : end - 1]
            targets = ids[row, end - sequence.predicted : end]
            chosen = before.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
            yield Prediction(before.argmax(-1) == targets, chosen)


def skill_on_exercises(model, tokenizer: PreTrainedTokenizerBase, use: ExpertUse, per_kind: int, seed: int) -> dict:
    """Exact match by kind and over all kinds together, with the binomial standard error."""
    asked = list(islice(exercises("test", seed), per_kind * len(EXERCISES)))
    sequences = []
    for exercise in asked:
        answer = tokenizer(f" {exercise.answer}{STOP}", add_special_tokens=False).input_ids
        sequences.append(Sequence(tokenizer(exercise.question).input_ids + answer, len(answer)))
    right = dict.fromkeys(EXERCISES, 0)
    for exercise, prediction in zip(asked, predictions(model, sequences, use), strict=True):
        right[exercise.kind] += bool(prediction.likeliest.all())
    accuracy = sum(right.values()) / len(asked)
    return {
        "documents": len(asked),
        "accuracy": round(accuracy, 4),
        "standard_error": round(math.sqrt(accuracy * (1 - accuracy) / len(asked)), 4),
        "by_kind": {kind: round(count / per_kind, 4) for kind, count in right.items()},
    }


def skill_on_stories(model, tokenizer: PreTrainedTokenizerBase, use: ExpertUse, count: int, seed: int) -> dict:
    """Perplexity by token and bits by byte of the text, each story on its own after the start token."""
    texts = list(islice(stories("test", seed), count))
    encoded = [tokenizer(text).input_ids for text in texts]
    sequences = [Sequence(ids, len(ids) - 1) for ids in encoded]
    nats = -sum(prediction.log_probabilities.sum().item() for prediction in predictions(model, sequences, use))
    tokens = sum(sequence.predicted for sequence in sequences)
    size = sum(len(text.encode()) for text in texts)
    return {
        "documents": count,
        "tokens": tokens,
        "perplexity": round(math.exp(nats / tokens), 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


def measure(folder: Path, per_kind: int, story_count: int, seed: int) -> dict:
    """The content of skill.json for the checkpoint in `folder`, in the dtype that it is stored in."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    use = ExpertUse(model)
    on_exercises = skill_on_exercises(model, tokenizer, use, per_kind, seed)
    on_stories = skill_on_stories(model, tokenizer, use, story_count, seed)
    shares = use.shares().items()
    return {
        "seed": seed,
        "exercises": on_exercises,
        "stories": on_stories,
        "expert_share_by_block": {
            str(block): {"least": round(share.min().item(), 4), "most": round(share.max().item(), 4)}
            for block, share in shares
        },
    }


def tables(skill: dict, training: dict) -> str:
    """The measured part of the README, in Markdown."""
    on_exercises, on_stories = skill["exercises"], skill["stories"]
    lines = [
        f"Trained for {training['seconds'] / 60:.0f} minutes on {training['recipe']['threads']} CPU threads: "
        f"{training['tokens'] / 1e6:.1f} M tokens in {training['steps']} steps, "
        f"seed {training['recipe']['seed']}, "
        f"{training['parameters'] / 1e6:.2f} M parameters.",
        "",
        f"| {on_exercises['documents']} held-out exercises | exact match |",
        "| --- | ---: |",
        *(f"| {kind} | {share:.1%} |" for kind, share in on_exercises["by_kind"].items()),
        f"| **all kinds** | **{on_exercises['accuracy']:.1%}** ± {on_exercises['standard_error']:.1%} |",
        "",
        f"| {on_stories['documents']} held-out stories | |",
        "| --- | ---: |",
        f"| perplexity by token | {on_stories['perplexity']:.3f} |",
        f"| bits by byte | {on_stories['bits_per_byte']:.3f} |",
        "",
        "| block | least used expert | most used expert |",
        "| ---: | ---: | ---: |",
        *(
            f"| {block} | {share['least']:.1%} | {share['most']:.1%} |"
            for block, share in skill["expert_share_by_block"].items()
        ),
    ]
    return "\n".join(lines)


def between_markers(document: str, content: str) -> str:
    before, found, rest = document.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"README.md: expected the lines {BEGIN!r} and {END!r}, to write the table between them")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "model", help="folder of the checkpoint")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="document with the two markers")
    parser.add_argument("--per-kind", type=int, default=200, help="exercises of each kind")
    parser.add_argument("--stories", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(2)
    skill = measure(given.model, given.per_kind, given.stories, given.seed)
    (given.model / "skill.json").write_text(json.dumps(skill, indent=2) + "\n", encoding="utf-8")
    training = json.loads((given.model / "training.json").read_text(encoding="utf-8"))
    document = given.readme.read_text(encoding="utf-8")
    given.readme.write_text(between_markers(document, tables(skill, training)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
