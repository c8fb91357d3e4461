"""What of a stranger's release a rebuild takes, and what it refuses: nothing that he chose is run.

A provenance.json names where to serve (an image, mounts, arguments, ...), where code of a model runs, folders to read
and to write, and lm-eval tasks, which can hold code. Where to serve and to run code is taken from one's own config; of
the rest, data alone.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import yaml

from requant.benchmark import LOCAL_DATA
from requant.config import Sandbox, Target
from requant.errors import RequantError, brief, plain

TOLD = {"description", "limits", "tested"}  # of a target, to people
MOST_SHOWN = 12  # differences of a target
LIMITS = ("memory_mb", "seconds", "processes")  # of the sandbox: they decide scores, and run nothing
NO_TARGET = ("cpu-transformers", Target())  # where nothing is served

# Names in a build's directory that programs read by themselves, or that the build makes.
READ_BY_OTHERS = ("default", "profiles", "workflow", "locks", "logs", "results", "inputs", "model_card.md")
READ_BY_OTHERS += ("reproduce.yaml", "reproduce.json", "reproduce.md")
# Suffixes of files that nobody imports, runs or takes for settings; none: LICENSE, merges and the like.
OF_DATA = (".txt", ".text", ".json", ".jsonl", ".csv", ".tsv", ".md", ".parquet", ".arrow", ".gz", ".zst")
OF_DATA += (".safetensors", ".model", ".jinja", ".tiktoken", "")
OF_TASKS = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".parquet", ".arrow", "")
# Keys of an lm-eval task that take code, or files from elsewhere.
CODE_KEYS = ("class", "custom_dataset", "unsafe_code", "use_prompt", "process_docs", "process_results", "hf_evaluate")
OF_DATASETS = ("data_files", "field", "sep", "delimiter", "encoding")  # keys of `dataset_kwargs` that are taken


def leads_out(path: str) -> bool:
    """Whether a path may lead out of the directory that it is relative to."""
    return PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or path.startswith("~")


def is_plain(path: str) -> bool:
    """Whether a path leads to a file or folder below its directory, through no hidden folder."""
    parts = PurePosixPath(path).parts
    return (
        bool(parts) and path.isprintable() and not leads_out(path) and not any(part.startswith(".") for part in parts)
    )


class Placed(Protocol):
    """Files that a config looks for at `place`: below it, by their names, if it is a `folder`, else it alone."""

    name: str
    place: str
    files: Mapping[str, str]
    folder: bool


def is_safe_place(placed: Placed) -> bool:
    """Whether these files may lie at their place in the directory of a build: no program takes them for its own."""
    parts = PurePosixPath(placed.place).parts
    if not is_plain(placed.place) or parts[0] in READ_BY_OTHERS or not all(map(is_plain, placed.files)):
        return False
    suffixes = {PurePosixPath(file).suffix.lower() for file in placed.files}
    alone = not placed.folder and len(parts) == 1
    return suffixes <= {*(OF_TASKS if placed.name.startswith("task/") else OF_DATA)} - ({""} if alone else set())


def taken(config: Mapping[str, Any], release: str, target: tuple[str, Target], sandbox: Sandbox) -> dict[str, Any]:
    """The config of a rebuild of `release`: what of the published `config` is data and used, with one's own target, as
    (name, target), and one's own sandbox.

    What is of another type than it should be stays, for `config.parse` to refuse.
    """
    name, own = target
    settings = _at(config, "releases", release)
    if isinstance(settings, Mapping):
        deploy = settings.get("deploy") or {}
        settings = dict(settings) | {"deploy": deploy | {"target": name} if isinstance(deploy, Mapping) else deploy}
    model = _at(settings, "model")
    models = [model, _at(config, "models", model, "from")]
    pruned = _at(config, "models", model, "prune", "calibration")
    used = {
        "models": models,
        "calibrations": [_at(settings, "calibration"), pruned, "default"],
        "benchmarks": [_at(settings, "benchmark"), "default"],
    }
    limits = config.get("sandbox")
    limits = {key: limits[key] for key in LIMITS if key in limits} if isinstance(limits, Mapping) else {}
    return {
        **{key: _only(config[key], names) for key, names in used.items() if key in config},
        **({"device": config["device"]} if "device" in config else {}),
        "targets": {name: own.model_dump(mode="json")},
        "releases": {release: settings},
        "build": [release],
        "sandbox": sandbox.model_dump(mode="json") | limits,
    }


def _at(data: Any, *keys: Any) -> Any:
    """What stands at the keys of nested data; None where it has none."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) and isinstance(key, str) else None
    return data


def _only(section: Any, names: Iterable[Any]) -> Any:
    """The entries of a section that are used; what is no section stays, for `config.parse` to refuse."""
    if not isinstance(section, Mapping):
        return section
    return {name: entry for name, entry in section.items() if name in names}


def published_target(config: Mapping[str, Any], release: str) -> tuple[str, Any]:
    """(name, target as it is written) that a published config serves its release at."""
    found = _at(config, "releases", release, "deploy", "target")
    name = found if isinstance(found, str) else NO_TARGET[0]
    return name, _at(config, "targets", name) or {}


def own_target(published: Any, own: Mapping[str, Target]) -> str | None:
    """The name of one's own target that is the published one in all that is executed; None if none is."""
    try:
        wanted = Target.model_validate(published).model_dump(exclude=TOLD)
    except ValueError:
        return None
    return next((name for name, target in own.items() if target.model_dump(exclude=TOLD) == wanted), None)


def asked_for(published: Any) -> str:
    """What a published target asks for, on a line: all that is not the default, what it would be given first."""
    if not isinstance(published, Mapping):
        return brief(published)
    usual = Target().model_dump(mode="json", exclude=TOLD)
    first = ("image", "container", "arguments", "environment")
    keys = [key for key in first if key in published] + [key for key in published if key not in (*first, *TOLD)]
    found = [line for key in keys for line in _differences(published[key], usual.get(key), str(key))]
    shown = [plain(line, 90) for line in found[:MOST_SHOWN]]
    more = [f"{len(found) - MOST_SHOWN} more"] if len(found) > MOST_SHOWN else []
    return ", ".join([*shown, *more]) or "another"


def _differences(found: Any, usual: Any, key: str) -> list[str]:
    if isinstance(found, Mapping):
        inner = usual if isinstance(usual, Mapping) else {}
        return [line for name in found for line in _differences(found[name], inner.get(name), f"{key}.{name}")]
    return [] if found == usual else [f"{key}: {_written(found)}"]


def _written(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_written, value)) or "none"
    return ":".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)


# Tasks


class _Tagged(Exception):
    """A tag of YAML's, which lm-eval imports a function by."""


class _Plain(yaml.SafeLoader):
    """Reads YAML of plain values alone."""


def _refuse(_: yaml.Loader, suffix: str, __: yaml.Node) -> None:
    raise _Tagged(suffix)


_Plain.add_multi_constructor("!", _refuse)


def check_task_files(folder: Path, files: Iterable[str], data: Iterable[str]) -> None:
    """Raises RequantError naming the first of the task `files` in `folder` that could run code, or read what is not
    among them and the `data`.

    Templates run in a sandbox (`benchmark.prepare_harness`).
    """
    known = set(data)
    for name in sorted(files):
        path = folder / name
        if not is_plain(name) or path.suffix.lower() not in OF_TASKS:
            raise RequantError(_not_run(path, "code, or no data"))
        if path.suffix.lower() in OF_TASKS[:2]:
            _check_task(path, name, set(files), known)


def _check_task(path: Path, name: str, files: set[str], data: set[str]) -> None:
    beside = PurePosixPath(name).parent
    included = {file for file in files if file.endswith(OF_TASKS[:2])}
    try:
        task = yaml.load(path.read_text(encoding="utf-8"), _Plain)
        for key, value in _entries(task, set()):
            if (why := _why_code(key, value, data, included, beside)) is not None:
                raise RequantError(_not_run(path, why))
    except _Tagged as tag:
        raise RequantError(_not_run(path, f"!{plain(tag, 40)} names a function")) from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise RequantError(f"{path}: no YAML: {plain(error)}; expected an lm-eval task file") from None


def _why_code(key: str, value: Any, data: set[str], included: set[str], beside: PurePosixPath) -> str | None:
    """What code, or what file from elsewhere, a key of a task would take; None if it takes neither."""
    if key in CODE_KEYS and value not in (None, False):
        return f"`{key}` takes code"
    if key == "dataset_path" and value not in LOCAL_DATA:
        return f"dataset_path: {brief(value)}: not of {', '.join(LOCAL_DATA)}"
    if key == "dataset_kwargs":
        other = [name for name in value if name not in OF_DATASETS] if isinstance(value, Mapping) else [value]
        return f"dataset_kwargs: {brief(other[0])}: not of {', '.join(OF_DATASETS)}" if other else None
    if key == "data_files":
        other = [name for name in _listed(value) if not _is_place(name) or name not in data]
        return f"data_files: {brief(other[0])}: not in resolvedDependencies" if other else None
    if key == "include":
        other = [name for name in _listed(value) if str(beside / str(name)) not in included]
        return f"include: {brief(other[0])}: not among the tasks" if other else None
    if key == "metric" and (not isinstance(value, str) or value not in _metrics()):
        return f"metric: {brief(value)}: not one of lm-eval's own"
    return None


def _is_place(name: Any) -> bool:
    """Whether a name is that of one file below a folder: no address, and no pattern of names."""
    return isinstance(name, str) and str(PurePosixPath(name)) == name and not re.search(r"://|:/|[*?\[{]", name)


def _listed(value: Any) -> list[Any]:
    """The names in a name, a list of names, or names and lists of them by split; what is neither as it is."""
    by_split = list(value.values()) if isinstance(value, Mapping) else [value]
    return [name for found in by_split for name in (found if isinstance(found, list) else [found])]


def _entries(value: Any, seen: set[int]) -> Iterable[tuple[str, Any]]:
    """Every key and value of nested data, each part once however often it is named."""
    if not isinstance(value, Mapping | list) or id(value) in seen:
        return
    seen.add(id(value))
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        if isinstance(value, Mapping):
            yield str(key), inner
        yield from _entries(inner, seen)


def _metrics() -> set[str]:
    """Metrics that lm-eval computes itself: another's code it looks for by name, in the working directory too."""
    import lm_eval.api.metrics  # noqa: F401 (fills the registry)
    from lm_eval.api.registry import metric_registry

    return set(metric_registry.keys())


def _not_run(path: Path, why: str) -> str:
    return (
        f"{path}: {why}: a published task could run it here; expected tasks of data and templates alone, or those of "
        "requant's checkout: read it, and put its folder there, at the same path; or --weights-only"
    )
