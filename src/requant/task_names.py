"""Whether lm-eval has the tasks that a config names, asked when a build is planned.

lm-eval's own index reads 14,000 files as YAML, which takes seconds. Here they are only searched for the lines that name
a task or a group; lm-eval is asked about names that no line has.
"""

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from requant.errors import RequantError

COMPUTES = False  # it lets a build begin or not

NAMED = re.compile(r"^(?:task|group|tag):[ \t]*[\"']?([^\s\"'#\[{|>]+)", re.MULTILINE)
INCLUDED = re.compile(r"^include:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)
DEEPEST = 8  # files that include one another
UNSAFE = re.compile(r"^unsafe_code:[ \t]*[\"']?(?:true|yes|on)\b", re.MULTILINE | re.IGNORECASE)


def check_tasks(key: str, tasks: Iterable[str], folder: Path | None) -> None:
    """Raises RequantError, beginning with the config's `key`, naming a task that neither lm-eval has nor a file under
    `folder`, or one that runs code which a model wrote."""
    unknown = []
    for task in tasks:
        path = next((found[task] for found in _indexes(folder) if task in found), None)
        if path is None:
            unknown.append(task)
        elif (unsafe := _unsafe(path)) is not None:
            raise RequantError(
                f"{key}: {task!r} runs code that the model wrote (`unsafe_code` in {unsafe.name}); expected other "
                "tasks: humaneval is measured in a sandbox, as one of `served`"
            )
    if unknown:
        from requant.benchmark import task_manager

        try:
            task_manager(unknown, folder)
        except RequantError as error:
            raise RequantError(f"{key}: {error}") from None


def _unsafe(path: Path, depth: int = 0) -> Path | None:
    """The file, this one or one that it includes, that says that a task runs code; None if none does."""
    if not path.is_file() or depth > DEEPEST:
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if UNSAFE.search(text):
        return path
    included = (_unsafe(path.parent / name, depth + 1) for name in INCLUDED.findall(text))
    return next((found for found in included if found is not None), None)


def _indexes(folder: Path | None) -> Iterator[dict[str, Path]]:
    """Files by the names of their tasks: under `folder`, then lm-eval's own."""
    if folder is not None and folder.is_dir():
        yield _index(folder)
    found = importlib.util.find_spec("lm_eval")
    if found is not None and found.submodule_search_locations:
        yield _index(Path(found.submodule_search_locations[0]) / "tasks")


@cache
def _index(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".yaml", ".yml")):
                path = Path(place, name)
                for task in NAMED.findall(path.read_text(encoding="utf-8", errors="replace")):
                    found.setdefault(task, path)
    return found
