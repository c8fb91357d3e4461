"""Benchmarks in the files that their authors published, a few rows of each, from the workplace's copies; MATH's own
problems are nobody's to pass on, so these are ours."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared/data"
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def lay_out(name: str, folder: Path, rows: int = 3, headerless: bool = False) -> Path:
    """The directory `folder` as a user has it, with the first `rows` test rows; returns it. Skips without copies."""
    if name != "math" and not (SHARED / name).is_dir():
        pytest.skip(f"needs the files of {name} in {SHARED}")
    {"mmlu": _mmlu, "gsm8k": _gsm8k, "humaneval": _humaneval, "ifeval": _ifeval, "math": _math}[name](
        folder, rows, headerless
    )
    return folder


def _mmlu(folder: Path, rows: int, headerless: bool) -> None:
    for path in sorted((SHARED / "mmlu").glob("*/*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            found = list(csv.reader(file))
        kept = found if path.parent.name == "dev" else found[: rows + 1]
        if headerless:
            kept = [[*columns[:-1], "ABCD"[int(columns[-1])]] for columns in kept[1:]]
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        with (folder / path.parent.name / path.name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(kept)


def _gsm8k(folder: Path, rows: int, _: bool) -> None:
    folder.mkdir(parents=True)
    shutil.copyfile(SHARED / "gsm8k/train.jsonl", folder / "train.jsonl")
    _first(SHARED / "gsm8k/test.jsonl", folder / "test.jsonl", rows)


def _humaneval(folder: Path, rows: int, _: bool) -> None:
    folder.mkdir(parents=True)
    with gzip.open(SHARED / "humaneval/HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = file.readlines()[:rows]
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(lines)


def _ifeval(folder: Path, rows: int, _: bool) -> None:
    folder.mkdir(parents=True)
    _first(SHARED / "ifeval/input_data.jsonl", folder / "input_data.jsonl", rows)


def _math(folder: Path, rows: int, _: bool) -> None:
    for subject in SUBJECTS:
        place = folder / "test" / subject
        place.mkdir(parents=True)
        for number in range(rows):
            problem = {
                "problem": f"What is ${number}+1$?",
                "level": "Level 1",
                "type": subject.replace("_", " ").title(),
                "solution": f"One more than ${number}$ is $\\boxed{{{number + 1}}}$.",
            }
            (place / f"{9 + number}.json").write_text(json.dumps(problem), encoding="utf-8")


def _first(source: Path, out: Path, rows: int) -> None:
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(lines[:rows]), encoding="utf-8")
