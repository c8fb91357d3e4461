"""Rebuilding a published release from its provenance.json, in a directory of its own, and comparing the two.

A provenance is somebody else's file: it is held against its schema, no path of it leads out of the new directory, and
nothing it names is run. What it was made from is looked for on this machine and checked by hash before the build
starts.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import Field

import requant
from requant.config import Config, Reproduce, source_name
from requant.differences import Comparison, Published, compare, digests_of, files_of
from requant.environment import installed, machine
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.locks import load_lock
from requant.planning import made_here
from requant.provenance import Statement, code_digests, parsed, read_provenance
from requant.records import Record, write_text

CONFIGFILE = "reproduce.yaml"
PROVENANCE = "provenance.json"


class BuildFailed(Exception):
    """The rebuild ended with an error; Snakemake and its jobs have said which."""


class VersionDifference(Record):
    name: str
    published: str | None = Field(description="null: not there when the release was made")
    here: str | None = Field(description="null: not here")


class Reproduction(Record):
    """reproduce.json: what came of a rebuild."""

    release: str
    provenance_sha256: str
    versions: list[VersionDifference] = Field(
        description="of requant, Python, libraries, locks and the kind of machine: what is not as it was"
    )
    comparison: Comparison


@dataclass(frozen=True)
class Input:
    """Something that a release was made from, as its provenance names it: files by their hashes.

    place: where the config looks for it, a folder if `folder`; key: the config's key for that place.
    """

    name: str
    key: tuple[str | int, ...]
    place: str
    files: Mapping[str, str]
    folder: bool

    def path(self, root: Path, file: str) -> Path:
        """Where one of its files is, if the whole is at `root`."""
        return root / file if self.folder else root


def published_at(path: Path) -> tuple[Path, Statement]:
    """The provenance.json named by `path`, a file or the folder of a release, and what it says."""
    path = path / PROVENANCE if path.is_dir() else path
    return path, read_provenance(path)


def published_files(provenance: Path, statement: Statement, weights_only: bool) -> Published:
    """The release beside its provenance; where none of its files are, what the provenance says of them.

    Raises RequantError if a file beside it is not the one that the provenance names.
    """
    folder = provenance.parent
    said = {subject.name: subject.digest["sha256"] for subject in statement.subject}
    if not any((folder / name).is_file() for name in said):
        return Published(str(provenance), said, None, frozenset(said))
    beside = {name: digest for name, digest in digests_of(folder).items() if name in said or not weights_only}
    for name, digest in said.items():
        if beside.get(name, digest) != digest:
            raise RequantError(f"{folder / name}: sha256 {beside[name]} found; {provenance} says {digest}")
    return Published(str(folder), said | beside, folder, frozenset(said))


def reproduce(
    provenance: Path,
    into: Path,
    given: Mapping[str, Path],
    cores: str,
    strict: bool,
    weights_only: bool,
    tolerance: Mapping[str, float],
    say: Callable[[str], None],
) -> Reproduction:
    """Rebuilds the release that `provenance` describes in the directory `into`, and compares it.

    given: where inputs are on this machine, by their names in the provenance or the last part of those; cores: for
    Snakemake; strict: no version may differ; weights_only: the checkpoint alone, without its card and what that takes;
    say: called with each line for the user. Raises RequantError before anything is run if something is not as it has to
    be, BuildFailed if the build fails.
    """
    path, statement = published_at(provenance)
    config, root = _parsed(path, statement), checkout()
    limits = config.releases[statement.request.release].reproduce.model_copy(update=dict(tolerance))
    published = published_files(path, statement, weights_only)
    versions = version_differences(statement, root)
    for found in versions:
        say(f"warning: {found.name}: {found.here or 'not'} here; the release was made with {found.published or 'none'}")
    if strict and versions:
        raise RequantError(
            f"{path}: {len(versions)} versions differ, the first is {versions[0].name}; --strict expects none"
        )
    wanted = inputs_of(statement, config)
    at = located(wanted, given, root)
    for needed in wanted:
        check_input(needed, at[needed.name])
    _lay_out(statement, wanted, at, into, root)
    for model in hub_models(config):
        _lock(model, statement, config, into, root, say)
    whole = published.folder is not None and "README.md" in published.digests and not weights_only
    release = statement.request.release
    say(f"building {release} in {into}")
    _snakemake(into, root, cores, f"results/{release}/{'model/SHA256SUMS' if whole else 'pack.json'}")
    if not whole:
        published = replace(
            published, digests={name: digest for name, digest in published.digests.items() if name in _said(statement)}
        )
    rebuilt = into / "results" / release / "model"
    return Reproduction(
        release=release,
        provenance_sha256=file_entry(path).sha256,
        versions=versions,
        comparison=compare(published, rebuilt, limits),
    )


def _said(statement: Statement) -> set[str]:
    return {subject.name for subject in statement.subject}


def _parsed(path: Path, statement: Statement) -> Config:
    config = parsed(path, statement.request.config)
    if statement.request.release not in config.releases:
        raise RequantError(f"{path}: config: no release {statement.request.release}; expected the one it is of")
    return config


def checkout() -> Path:
    """The directory of the Snakefile that this library belongs to. RequantError if it came without one."""
    root = Path(requant.__file__).resolve().parents[2]
    if not (root / "Snakefile").is_file():
        raise RequantError(
            f"{root / 'Snakefile'}: not there; expected requant in its checkout, as `make environment` does"
        )
    return root


def version_differences(statement: Statement, root: Path) -> list[VersionDifference]:
    """What is not as it was when the release was made: code, locks, kind of machine, Python, every library of then."""
    code, past = code_digests(root), statement.dependencies
    named = [name for name in dict.fromkeys([*past, *code]) if name in code or not _is_input(name)]
    pairs = {name: (_digest(past.get(name)), _digest(code.get(name))) for name in named if name != "requant"}
    pairs["requant's code"] = _same_kind(past.get("requant", {}), code["requant"])
    then, now = statement.provenance.machine.model_dump(), machine().model_dump()
    pairs |= {f"machine.{key}": (_text(then[key]), _text(now[key])) for key in then}
    before, here = statement.predicate.runDetails.builder.version, installed()
    pairs |= {name: (version, here.get(name)) for name, version in sorted(before.items())}
    return [VersionDifference(name=name, published=a, here=b) for name, (a, b) in pairs.items() if a != b]


def _is_input(name: str) -> bool:
    """Whether a dependency is one of those that `inputs_of` looks for."""
    return name.split("/")[0] in ("source", "text", "heldout", "task", "served", "data")


def _digest(found: Mapping[str, str] | None) -> str | None:
    return None if found is None else found.get("gitCommit") or found.get("sha256")


def _same_kind(past: Mapping[str, str], now: Mapping[str, str]) -> tuple[str | None, str | None]:
    """requant then and now: equal code is equal whatever the commits; else commits where both are known."""
    if past.get("sha256") == now.get("sha256"):
        return past.get("sha256"), past.get("sha256")
    kind = "gitCommit" if {"gitCommit"} <= past.keys() & now.keys() else "sha256"
    return past.get(kind), now.get(kind)


def _text(value: Any) -> str | None:
    return ", ".join(value) or None if isinstance(value, list) else value


# What the release was made from


def inputs_of(statement: Statement, config: Config) -> list[Input]:
    """What has to be on this machine: models, texts and tasks that the graph neither makes nor downloads."""
    past = {name: digest["sha256"] for name, digest in statement.dependencies.items() if "sha256" in digest}
    found = []
    for name, model in config.models.items():
        if model.path is not None:
            found.append(_folder(f"source/{name}", ("models", name, "path"), model.path, past))
    for name, calibration in config.calibrations.items():
        held = calibration.heldout.sources or []
        texts = [(f"text/{name}", ("sources",), calibration.sources), (f"heldout/{name}", ("heldout", "sources"), held)]
        for prefix, keys, sources in texts:
            for number, text in enumerate(sources):
                key = ("calibrations", name, *keys, number, "path")
                found.append(_file(f"{prefix}/{source_name(text)}", key, text.path, past))
    for name, tasks in config.benchmarks.items():
        if tasks.include_path is not None:
            found.append(_folder(f"task/{name}", ("benchmarks", name, "include_path"), tasks.include_path, past))
        for task, served in tasks.served.items():
            if served.data is not None:
                key = ("benchmarks", name, "served", task, "data")
                found.append(_folder(f"served/{name}/{task}", key, served.data, past))
        data = [dependency for dependency in past if dependency.startswith(f"data/{name}/")]
        found += [_file(each, (), each.removeprefix(f"data/{name}/"), past) for each in data]
    return [each for each in found if each.files and (_leads_out(each.place) or not made_here(each.place))]


def _folder(name: str, key: tuple[str | int, ...], place: str, past: Mapping[str, str]) -> Input:
    files = {full.removeprefix(f"{name}/"): digest for full, digest in past.items() if full.startswith(f"{name}/")}
    for file in files:
        if _leads_out(file):
            raise RequantError(f"resolvedDependencies: {name}/{file}: expected a path inside {name}")
    return Input(name, key, place, files, True)


def _file(name: str, key: tuple[str | int, ...], place: str, past: Mapping[str, str]) -> Input:
    return Input(name, key, place, {PurePosixPath(place).name: past[name]} if name in past else {}, False)


def _leads_out(path: str) -> bool:
    return PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or path.startswith("~")


def located(wanted: Sequence[Input], given: Mapping[str, Path], root: Path) -> dict[str, Path]:
    """Where each input is: as given, else where the config says, from here or from requant's checkout.

    Raises RequantError if one is nowhere, or a given name is that of none or of several inputs.
    """
    chosen: dict[str, Path] = {}
    for name, path in given.items():
        meant = [each.name for each in wanted if name in (each.name, each.name.rpartition("/")[2])]
        if len(meant) != 1:
            known = ", ".join(each.name for each in wanted) or "none"
            raise RequantError(f"--inputs {name}: found {len(meant)} inputs of that name; expected one of {known}")
        chosen[meant[0]] = path.expanduser().absolute()
    for each in wanted:
        if each.name not in chosen:
            places = [] if _leads_out(each.place) else [Path(each.place).absolute(), root / each.place]
            there = next((place for place in places if place.exists()), None)
            if there is None:
                raise RequantError(f"{each.place}: not there; expected --inputs {each.name}=PATH")
            chosen[each.name] = there
    return chosen


def check_input(wanted: Input, path: Path) -> None:
    """Raises RequantError naming the first file of an input that is absent or has another hash."""
    for name, digest in wanted.files.items():
        file = wanted.path(path, name)
        if not file.is_file():
            raise RequantError(f"{file}: not there; {wanted.name} was made with it, sha256 {digest}")
        found = file_entry(file).sha256
        if found != digest:
            raise RequantError(f"{file}: sha256 {found} found; the release was made with {digest}")


# The build


def _lay_out(statement: Statement, wanted: list[Input], at: Mapping[str, Path], into: Path, root: Path) -> None:
    """Gives `into` links to the files of the inputs, where the config looks for them, and the config itself.

    What is in the checkout at the config's own path is left to it. A place that leads out of `into`, or that another
    input has taken, becomes one under inputs/. Raises RequantError if `into` holds anything but an earlier attempt.
    """
    data, taken, links = statement.request.config, {}, {}
    for each in wanted:
        if not _leads_out(each.place) and at[each.name] == root / each.place:
            continue
        clash = taken.get(each.place, each.files) != each.files
        place = f"inputs/{each.name}" if _leads_out(each.place) or clash else each.place
        taken[place] = each.files
        if place != each.place and each.key:
            data = _with(data, each.key, place)
        links |= {each.path(into / place, file): each.path(at[each.name], file).resolve() for file in each.files}
    text, config = yaml.safe_dump(data, sort_keys=False), into / CONFIGFILE
    earlier = config.is_file() and config.read_text(encoding="utf-8") == text
    if into.exists() and not earlier and (not into.is_dir() or any(into.iterdir())):
        raise RequantError(f"{into}: there already; expected a new or empty directory, or a rebuild of this release")
    write_text(config, text)
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target)


def _with(data: Any, key: Sequence[str | int], value: str) -> Any:
    """A copy of nested `data` with `value` at `key`."""
    if not key:
        return value
    copy = list(data) if isinstance(data, list) else dict(data)
    copy[key[0]] = _with(data[key[0]], key[1:], value)
    return copy


def hub_models(config: Config) -> list[str]:
    """The models that come from the hub."""
    return [name for name, model in config.models.items() if model.hub is not None]


def _lock(model: str, statement: Statement, config: Config, into: Path, root: Path, say: Callable[[str], None]) -> None:
    """Puts the lock of a hub model into `into`, from here, the checkout or the hub, and checks it against the
    provenance."""
    target = into / "locks" / f"{model}.json"
    target.parent.mkdir(exist_ok=True)
    known = next((path for path in (Path("locks") / target.name, root / "locks" / target.name) if path.is_file()), None)
    if known is not None:
        shutil.copyfile(known, target)
    else:
        say(f"no locks/{model}.json here: asking the hub for {config.models[model].hub}")
        _snakemake(into, root, "1", "lock", "--config", f"model={model}")
    files = load_lock(target).files
    for name, digest in statement.dependencies.items():
        file = name.removeprefix(f"source/{model}/")
        if file != name and (file not in files or files[file].sha256 != digest["sha256"]):
            found = files[file].sha256 if file in files else "no such file"
            raise RequantError(
                f"{known or target}: {file}: {found} found; the release was made with {digest['sha256']}"
            )


def _snakemake(into: Path, root: Path, cores: str, target: str, *options: str) -> None:
    """Runs Snakemake in `into`, with the provenance's config alone. BuildFailed if it fails."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile"), "--cores", cores, target]
    command += [*options, "--replace-workflow-config", "--configfile", CONFIGFILE]
    if subprocess.run(command, cwd=into).returncode != 0:
        raise BuildFailed(f"{into}: the build failed; its lines above say where. The same command goes on")


def compared(published: Path, rebuilt: Path, tolerance: Mapping[str, float]) -> Comparison:
    """Compares two folders of a release, or a provenance.json and a folder. The limits are those of the published
    provenance, where there is one, else the defaults; `tolerance` has others."""
    path = published / PROVENANCE if published.is_dir() else published
    if not path.is_file():
        files_of(published)
        found = Published(str(published), digests_of(published), published)
        return compare(found, rebuilt, Reproduce(**tolerance))
    path, statement = published_at(path)
    limits = _parsed(path, statement).releases[statement.request.release].reproduce
    return compare(published_files(path, statement, False), rebuilt, limits.model_copy(update=dict(tolerance)))
