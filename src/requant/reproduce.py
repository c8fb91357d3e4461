"""Rebuilding a published release from its provenance.json, in a directory of its own, and comparing the two.

A provenance is somebody else's file: it is held against its schema, no path of it leads out of the new directory, and
nothing that it chose is run (`requant.foreign`). What it was made from is looked for on this machine and checked by
hash before the build starts.
"""

import os
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
from requant.config import Config, Reproduce, Sandbox, Target, source_name
from requant.differences import Comparison, Published, compare, digests_of, files_of
from requant.environment import installed, machine
from requant.errors import RequantError, plain
from requant.foreign import (
    NO_TARGET,
    asked_for,
    check_task_files,
    is_plain,
    is_safe_place,
    leads_out,
    own_target,
    published_target,
    taken,
)
from requant.hashing import file_entry
from requant.locks import load_lock
from requant.planning import made_here
from requant.provenance import Statement, code_digests, parsed, read_provenance
from requant.records import Record, write_text
from requant.target_files import FOLDER, own_sandbox, own_targets

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
    target: str | None = Field(None, description="one's own, where the rebuild was served; null if it was not")
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
    for name in (subject.name for subject in statement.subject):
        if not is_plain(name):
            raise RequantError(f"{provenance}: subject: {plain(name)}: expected a path in the folder of the release")
    said = {subject.name: subject.digest["sha256"] for subject in statement.subject}
    if not any((folder / name).is_file() for name in said):
        return Published(str(provenance), said, None, frozenset(said))
    beside = {name: digest for name, digest in digests_of(folder).items() if name in said or not weights_only}
    for name, digest in said.items():
        if beside.get(name, digest) != digest:
            raise RequantError(f"{folder / name}: sha256 {beside[name]} found; {provenance} says {digest}")
    return Published(str(folder), said | beside, folder, frozenset(said))


@dataclass(frozen=True)
class Own:
    """What a rebuild takes from oneself: where to serve, of all of one's targets or the one that is `named`, and where
    code of a model runs."""

    targets: Mapping[str, Target]
    named: str | None = None
    sandbox: Sandbox = Sandbox()

    @classmethod
    def of(cls, root: Path, configfile: Path | None, named: str | None) -> "Own":
        """That of a config, with the targets of the checkout `root`. RequantError if there is none that is `named`."""
        return cls(own_targets(configfile, root / FOLDER, named), named, own_sandbox(configfile))


def reproduce(
    provenance: Path,
    into: Path,
    given: Mapping[str, Path],
    cores: str,
    strict: bool,
    weights_only: bool,
    tolerance: Mapping[str, float],
    say: Callable[[str], None],
    target: str | None = None,
    configfile: Path | None = None,
) -> Reproduction:
    """Rebuilds the release that `provenance` describes in the directory `into`, and compares it.

    given: where inputs are on this machine, by their names in the provenance or the last part of those; cores: for
    Snakemake; strict: no version may differ; weights_only: the checkpoint alone, without its card and what that takes;
    say: called with each line for the user; target: where to serve, of one's own in `configfile` or the checkout.
    Raises RequantError before anything is run if something is not as it has to be, or if the provenance would have
    something run that is not one's own; BuildFailed if the build fails.
    """
    path, statement = published_at(provenance)
    root, release = checkout(), statement.request.release
    own = Own.of(root, configfile, target)
    config = _parsed(path, statement)
    published = published_files(path, statement, weights_only)
    whole = published.folder is not None and "README.md" in published.digests and not weights_only
    served = _served_at(path, statement, own) if whole else NO_TARGET
    data = taken(statement.request.config, release, served, own.sandbox)
    limits = config.releases[release].reproduce.model_copy(update=dict(tolerance))
    versions = version_differences(statement, root)
    for found in versions:
        now, then = found.here or "not", found.published or "none"
        say(plain(f"warning: {found.name}: {now} here; the release was made with {then}", 600))
    if strict and versions:
        raise RequantError(
            f"{path}: {len(versions)} versions differ, the first is {plain(versions[0].name)}; --strict expects none"
        )
    wanted = inputs_of(statement, config)
    at = located(wanted, given, root)
    for needed in wanted:
        check_input(needed, at[needed.name])
    if whole:
        _check_code(statement, config.releases[release].benchmark, wanted, at, root)
    _lay_out(data, wanted, at, into, root)
    for model in hub_models(config):
        settings = config.models[model]
        say(f"{model}: its files come from the hub: {settings.hub} at {plain(settings.revision or 'no commit', 60)}")
        _lock(model, statement, config, into, root, say)
    say(f"building {release} in {into}" + (f", served at {served[0]}" if whole else ""))
    _snakemake(into, root, cores, f"results/{release}/{'model/SHA256SUMS' if whole else 'pack.json'}")
    if not whole:
        published = replace(
            published, digests={name: digest for name, digest in published.digests.items() if name in _said(statement)}
        )
    rebuilt = into / "results" / release / "model"
    return Reproduction(
        release=release,
        provenance_sha256=file_entry(path).sha256,
        target=served[0] if whole else None,
        versions=versions,
        comparison=compare(published, rebuilt, limits),
    )


def _served_at(path: Path, statement: Statement, own: Own) -> tuple[str, Target]:
    """One's own target that a whole rebuild serves at: the named one, or the published one, if one's own is the same.

    Raises RequantError with what the published one asks for if it is neither.
    """
    if own.named is not None:
        return own.named, own.targets[own.named]
    name, published = published_target(statement.request.config, statement.request.release)
    if (same := own_target(published, own.targets)) is not None:
        return same, own.targets[same]
    raise RequantError(
        f"{path}: its target {plain(name, 80)} is none of yours, and nothing of it is run: {asked_for(published)}; "
        f"expected --target NAME, one of {', '.join(own.targets)} or of your --configfile, or --weights-only, which "
        "serves nothing"
    )


def _check_code(
    statement: Statement, benchmark: str, wanted: Sequence["Input"], at: Mapping[str, Path], root: Path
) -> None:
    """Raises RequantError if tasks of the release could run code that is not the checkout's own."""
    start = f"data/{benchmark}/"
    data = [name.removeprefix(start) for name in statement.dependencies if name.startswith(start)]
    for each in wanted:
        if each.name == f"task/{benchmark}" and not _is_of_checkout(each, root):
            check_task_files(at[each.name], each.files, [*data, *(f"{each.place}/{file}" for file in each.files)])


def _is_of_checkout(each: "Input", root: Path) -> bool:
    """Whether the checkout has the same files at the same place."""
    if leads_out(each.place):
        return False
    files = {each.path(root / each.place, name): digest for name, digest in each.files.items()}
    return all(path.is_file() and file_entry(path).sha256 == digest for path, digest in files.items())


def _said(statement: Statement) -> set[str]:
    return {subject.name for subject in statement.subject}


def _parsed(path: Path, statement: Statement) -> Config:
    """The published config, as far as a rebuild takes it, served nowhere."""
    published, release = statement.request.config, statement.request.release
    if release not in (published.get("releases") or {}):
        raise RequantError(f"{path}: config: no release {plain(release)}; expected the one it is of")
    return parsed(path, taken(published, release, NO_TARGET, Sandbox()))


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
    """What has to be on this machine: models, texts and tasks that the graph neither makes nor downloads.

    Raises RequantError for a path that the provenance has no hash of: nobody could tell what it leads to.
    """
    past = {name: digest["sha256"] for name, digest in statement.dependencies.items() if "sha256" in digest}
    found = []
    for name, model in config.models.items():
        if model.bucket is not None:
            raise RequantError(f"models.{name}.bucket: {plain(model.bucket)}; expected `path`, as a provenance has it")
        if model.directory is not None and not is_plain(model.directory):
            raise RequantError(f"models.{name}.directory: {plain(model.directory)}; expected one in the new directory")
        if model.path is not None:
            found.append(_folder(f"source/{name}", ("models", name, "path"), model.path, past))
    for name, calibration in config.calibrations.items():
        held = calibration.heldout.sources or []
        texts = [(f"text/{name}", ("sources",), calibration.sources), (f"heldout/{name}", ("heldout", "sources"), held)]
        for prefix, keys, sources in texts:
            for number, text in enumerate(sources):
                key = ("calibrations", name, *keys, number, "path")
                found.append(_file(f"{prefix}/{source_name(text)}", key, text.path, past))
    for name in dict.fromkeys(release.benchmark for release in config.releases.values()):
        tasks = config.benchmarks[name]
        if tasks.include_path is not None:
            found.append(_folder(f"task/{name}", ("benchmarks", name, "include_path"), tasks.include_path, past))
        for task, served in tasks.served.items():
            if served.data is not None:
                key = ("benchmarks", name, "served", task, "data")
                found.append(_folder(f"served/{name}/{task}", key, served.data, past))
        data = [dependency for dependency in past if dependency.startswith(f"data/{name}/")]
        found += [_file(each, (), each.removeprefix(f"data/{name}/"), past) for each in data]
    for each in found:
        _check_named(each)
    return [each for each in found if each.files and (leads_out(each.place) or not made_here(each.place))]


def _check_named(each: Input) -> None:
    """Raises RequantError for an input whose name can't be one, or that has no hash and is not made by the graph."""
    if not is_plain(each.name):
        raise RequantError(f"resolvedDependencies: {plain(each.name)}: expected a name that leads nowhere else")
    inside = not leads_out(each.place)
    if not each.files and not (inside and made_here(each.place)):
        key = ".".join(map(str, each.key))
        raise RequantError(f"{key}: {plain(each.place)}: resolvedDependencies has no hash of it; expected one")


def _folder(name: str, key: tuple[str | int, ...], place: str, past: Mapping[str, str]) -> Input:
    files = {full.removeprefix(f"{name}/"): digest for full, digest in past.items() if full.startswith(f"{name}/")}
    for file in files:
        if leads_out(file):
            raise RequantError(f"resolvedDependencies: {name}/{plain(file)}: expected a path inside {name}")
    return Input(name, key, place, files, True)


def _file(name: str, key: tuple[str | int, ...], place: str, past: Mapping[str, str]) -> Input:
    return Input(name, key, place, {PurePosixPath(place).name: past[name]} if name in past else {}, False)


def located(wanted: Sequence[Input], given: Mapping[str, Path], root: Path) -> dict[str, Path]:
    """Where each input is: in requant's checkout, if it has the same; as given; else where the config says, from here.

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
        if _is_of_checkout(each, root):
            chosen[each.name] = root / each.place
        elif each.name not in chosen:
            places = [] if leads_out(each.place) else [Path(each.place).absolute(), root / each.place]
            there = next((place for place in places if place.exists()), None)
            if there is None:
                raise RequantError(f"{plain(each.place)}: not there; expected --inputs {each.name}=PATH")
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


def _lay_out(data: dict[str, Any], wanted: list[Input], at: Mapping[str, Path], into: Path, root: Path) -> None:
    """Gives `into` links to the files of the inputs, where the config looks for them, and the config `data` itself.

    What is in the checkout at the config's own path is left to it. A place that leads out of `into`, that another
    input has taken, or that a program could take for its own, becomes one under inputs/. Raises RequantError if that
    can't be, or if `into` holds anything but an earlier attempt.
    """
    laid = {each.name: each for each in wanted if leads_out(each.place) or at[each.name] != root / each.place}
    links = {}
    for each in laid.values():
        others = [other for other in wanted if other.name != each.name]
        if is_safe_place(each) and not any(_overlap(each, other) for other in others):
            place = each.place
        elif each.key:
            place = f"inputs/{each.name}"
            data = _with(data, each.key, place)
        else:
            raise RequantError(
                f"resolvedDependencies: {each.name}: expected a file of data that no program could take for its own"
            )
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


def _overlap(one: Input, other: Input) -> bool:
    """Whether one of the two would lie where the other is looked for; two names of the same files do not."""
    first, second = PurePosixPath(one.place), PurePosixPath(other.place)
    if leads_out(other.place) or (first == second and one.files == other.files):
        return False
    return first.is_relative_to(second) or second.is_relative_to(first)


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
    """Runs Snakemake in `into`, with the provenance's config alone. BuildFailed if it fails.

    Neither Python modules nor a profile are looked for there: its files are somebody else's.
    """
    command = [sys.executable, "-P", "-m", "snakemake", "--snakefile", str(root / "Snakefile"), "--cores", cores]
    command += [target, *options, "--workflow-profile", str(root / "profiles/default"), "--replace-workflow-config"]
    command += ["--configfile", CONFIGFILE]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    if subprocess.run(command, cwd=into, env=environment, stdin=subprocess.DEVNULL).returncode != 0:
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
