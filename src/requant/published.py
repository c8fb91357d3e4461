"""Benchmarks in the files that their authors published, as rows under the names that lm-eval's tasks have for columns.

MMLU        dev/{subject}_dev.csv, test/{subject}_test.csv: five columns and the answer, with a header
            (question,choice0,choice1,choice2,choice3,answer; answer 0-3) or without (answer A-D)
GSM8K       train.jsonl, test.jsonl: {question, answer}
HumanEval   HumanEval.jsonl.gz or HumanEval.jsonl: {task_id, prompt, canonical_solution, test, entry_point}
IFEval      input_data.jsonl: {key, prompt, instruction_id_list, kwargs}
MATH        train/{subject}/*.json, test/{subject}/*.json: {problem, level, type, solution}
"""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from requant.errors import RequantError, brief, plain

Row = dict[str, Any]
Splits = dict[str, list[Row]]

LETTERS = "ABCD"
HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
COLUMNS = {
    "gsm8k": ("question", "answer"),
    "humaneval": ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    "ifeval": ("key", "prompt", "instruction_id_list", "kwargs"),
    "math": ("problem", "level", "type", "solution"),
}


def files(name: str, folder: Path) -> list[Path]:
    """The files of benchmark `name` in `folder`, sorted. RequantError if there are none."""
    patterns = {
        "mmlu": ("dev/*_dev.csv", "test/*_test.csv"),
        "gsm8k": ("train.jsonl", "test.jsonl"),
        "humaneval": ("HumanEval.jsonl.gz", "HumanEval.jsonl"),
        "ifeval": ("input_data.jsonl",),
        "math": ("train/*/*.json", "test/*/*.json"),
    }[name]
    if not folder.is_dir():
        raise RequantError(f"{folder}: not there; expected the directory of {name}'s published files")
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if not found:
        raise RequantError(f"{folder}: nothing of {name} is there; expected {' and '.join(patterns)}")
    return found


def rows(name: str, part: str | None, folder: Path) -> Splits:
    """{split: rows} of `part` of a benchmark, as lm-eval's task calls it: MMLU's and MATH's subjects.

    Raises RequantError naming the file, and the line, that is missing or of another form.
    """
    readers: dict[str, Callable[[Path, str | None], Splits]] = {
        "mmlu": _mmlu,
        "gsm8k": _gsm8k,
        "humaneval": _humaneval,
        "ifeval": _ifeval,
        "math": _math,
    }
    return readers[name](folder, part)


def _mmlu(folder: Path, subject: str | None) -> Splits:
    return {
        split: [{"subject": subject, **row} for row in _questions(folder / split / f"{subject}_{split}.csv")]
        for split in ("dev", "test")
    }


def _questions(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        for number, columns in enumerate(csv.reader(file), 1):
            if number == 1 and columns == HEADER:
                continue
            if len(columns) != len(HEADER):
                raise RequantError(f"{path}: line {number}: {len(columns)} columns; expected {', '.join(HEADER)}")
            question, *choices, answer = columns
            if answer not in LETTERS and answer not in ("0", "1", "2", "3") or not answer:
                raise RequantError(f"{path}: line {number}: answer {brief(answer)}; expected A-D, or 0-3")
            place = LETTERS.index(answer) if answer in LETTERS else int(answer)
            yield {"question": question, "choices": choices, "answer": place}


def _gsm8k(folder: Path, _: str | None) -> Splits:
    return {split: _lines("gsm8k", folder / f"{split}.jsonl") for split in ("train", "test")}


def _humaneval(folder: Path, _: str | None) -> Splits:
    packed = folder / "HumanEval.jsonl.gz"
    return {"test": _lines("humaneval", packed if packed.exists() else folder / "HumanEval.jsonl")}


def _ifeval(folder: Path, _: str | None) -> Splits:
    """Each instruction's arguments get all keys, None where absent: a table has columns."""
    found = _lines("ifeval", folder / "input_data.jsonl")
    keys = sorted({key for row in found for arguments in row["kwargs"] for key in arguments})
    for row in found:
        row["kwargs"] = [dict.fromkeys(keys) | arguments for arguments in row["kwargs"]]
    return {"train": found}  # the name that the split has on the hub


def _math(folder: Path, subject: str | None) -> Splits:
    found = {}
    for split in ("train", "test"):
        paths = sorted((folder / split / str(subject)).glob("*.json"), key=_by_number)
        found[split] = [_checked("math", path, None, json.loads(_text(path))) for path in paths]
    if not found["test"]:
        raise RequantError(f"{folder}/test/{subject}: no *.json; expected MATH's problems of that subject")
    return {split: problems for split, problems in found.items() if problems}


def _by_number(path: Path) -> tuple[int, str]:
    """Problems are numbered files: 2.json before 10.json."""
    number = re.match(r"\d+", path.name)
    return (int(number[0]) if number else 0, path.name)


def _lines(name: str, path: Path) -> list[Row]:
    found = []
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                found.append(_checked(name, path, number, _parsed(path, number, line)))
    if not found:
        raise RequantError(f"{path}: empty; expected the rows of {name}")
    return found


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise RequantError(f"{path}: line {number}: no JSON: {plain(error)}; expected an object") from None


def _checked(name: str, path: Path, number: int | None, row: Any) -> Row:
    """The row's columns, and no others. RequantError if one is missing."""
    where = f"{path}: line {number}" if number else str(path)
    if not isinstance(row, dict) or (missing := [key for key in COLUMNS[name] if key not in row]):
        found = f"no {missing[0]!r}" if isinstance(row, dict) else brief(row)
        raise RequantError(f"{where}: {found}; expected an object with {', '.join(COLUMNS[name])}")
    return {key: row[key] for key in COLUMNS[name]}


def _text(path: Path) -> str:
    with _opened(path) as file:
        return file.read()


def _opened(path: Path):
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8")
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise RequantError(f"{path}: {error.strerror}; expected a file as published") from None
