"""What a release was made from and by: the facts that its bytes depend on, and the hashes to check them by.

provenance.json is an in-toto Statement (v1) about the files of a release, its predicate SLSA's build provenance (v1).
Nothing that a clock measured stands here: a rebuild of the same release gives the same file.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, WithJsonSchema, model_validator

from requant import __version__
from requant.config import Config, Seed, parse
from requant.environment import Machine
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.records import (
    BlockRecord,
    CalibrationRecord,
    CopiedBlock,
    FileEntry,
    KeepList,
    PackRecord,
    Record,
    SourceRecord,
    read_json,
    write_text,
)
from requant.schemes import SCHEMES

SCHEMA = Path(__file__).parent / "schemas" / "provenance.schema.json"  # written by requant.provenance_schema
BUILD_TYPE = "urn:requant:snakemake:v1"
CONFIG = ["predicate", "buildDefinition", "externalParameters", "config"]

# What the schema says of texts, beyond their type.
SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
COMMIT = {"type": "string", "pattern": "^[0-9a-f]{40}([0-9a-f]{24})?$"}
NAME = {"type": "string", "pattern": "^[^/\\u0000-\\u001f][^\\u0000-\\u001f]*$", "description": "no absolute path"}
INSIDE = {"properties": {"name": {"not": {"pattern": r"(^|/)\.\.?(/|$)"}}, "digest": {"required": ["sha256"]}}}
OF_A_BLOCK = {"properties": {"name": {"pattern": r"^blocks/[0-9]+\.safetensors$"}}}
IS_REQUANT = {"properties": {"name": {"const": "requant"}}, "required": ["name"]}
DISTRIBUTION = {"pattern": "^[a-z0-9]+(-[a-z0-9]+)*$"}

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, WithJsonSchema(SHA256)]


def _each(*said: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Adds to the schema of a list what is `said` of each of its items."""

    def add(schema: dict[str, Any]) -> None:
        schema["items"] = {"allOf": [schema["items"], *said]}

    return add


class SourceProvenance(Record):
    model: Text
    base_model: str | None = Field(description="hub name of the model; null if the config gives none")
    revision: Text
    files: dict[str, FileEntry] = Field(min_length=1, json_schema_extra={"propertyNames": NAME})


class CalibrationProvenance(Record):
    name: Text
    tokenizer_sha256: Sha256
    seqlen: Annotated[int, Field(ge=2)]
    pack: Literal["concat", "pad"]
    seed: Seed
    calibration_sha256: Sha256 = Field(description="of the int32 token tensor that blocks were tuned on")
    heldout_sha256: Sha256 = Field(description="of the int32 token tensor that quality was measured on")
    calibration_texts: dict[str, Sha256] = Field(min_length=1, description="of each text file, by the text's name")
    heldout_texts: dict[str, Sha256] = Field(min_length=1)


class PruningProvenance(Record):
    keep: KeepList
    calibration_sha256: Sha256 = Field(description="of the int32 token tensor that experts were observed on")


class TuningRun(Record):
    """What made some of the blocks. A build that was resumed elsewhere or after an update has several."""

    blocks: list[Number]
    engine: Text
    engine_version: Text
    settings: dict[str, Any] = Field(description="every tuning setting, defaults spelled out")
    libraries: dict[str, Text] = Field(min_length=1)
    threads: Count
    device: Text


class Provenance(Record):
    """What the build chose and found by itself: the internalParameters of provenance.json."""

    release: Text
    scheme: Text
    requant_version: Text
    requant_commit: str | None = Field(
        description="git commit of requant, marked where a file was changed since; null outside a git checkout"
    )
    source: SourceProvenance
    calibration: CalibrationProvenance
    pruning: PruningProvenance | None = Field(None, description="null for a model that is not pruned")
    tuning: list[TuningRun]
    seeds: list[Seed] = Field(description="seed of each block")
    files: dict[str, FileEntry] = Field(
        min_length=1,
        description="of the packed checkpoint: those of pack.json",
        json_schema_extra={"propertyNames": NAME},
    )
    machine: Machine


class Resource(Record):
    """in-toto's ResourceDescriptor: something by its name and hashes."""

    name: Annotated[str, WithJsonSchema(NAME)]
    digest: dict[str, str] = Field(
        min_length=1,
        description="by algorithm",
        json_schema_extra={"properties": {"sha256": SHA256, "gitCommit": COMMIT}, "additionalProperties": False},
    )


class Request(Record):
    """externalParameters: what was asked for."""

    release: Text
    config: dict[str, Any] = Field(description="a whole config that builds this release alone, defaults spelled out")


class BuildDefinition(Record):
    buildType: Literal["urn:requant:snakemake:v1"]
    externalParameters: Request
    internalParameters: Provenance
    resolvedDependencies: list[Resource] = Field(
        min_length=1,
        description="files of the source, texts, tasks, requant, its locks and the inputs of its flake",
        json_schema_extra={"contains": IS_REQUANT, "minContains": 1, "maxContains": 1},
    )


class Builder(Record):
    id: Literal["urn:requant:builder"]
    version: dict[str, Text] = Field(
        description="of Python, requant and everything installed, by canonical name",
        json_schema_extra={"required": ["python", "requant"], "propertyNames": DISTRIBUTION},
    )


class RunDetails(Record):
    builder: Builder
    metadata: dict[str, str] = Field(
        description="empty: what SLSA has there differs from run to run", json_schema_extra={"maxProperties": 0}
    )
    byproducts: list[Resource] = Field(
        min_length=1,
        description="the file of each block, before it was packed",
        json_schema_extra=_each(INSIDE, OF_A_BLOCK),
    )


class Predicate(Record):
    """https://slsa.dev/provenance/v1"""

    buildDefinition: BuildDefinition
    runDetails: RunDetails


class Statement(Record):
    """results/{release}/model/provenance.json"""

    kind: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[Resource] = Field(
        min_length=1, description="the files of the packed checkpoint", json_schema_extra=_each(INSIDE)
    )
    predicateType: Literal["https://slsa.dev/provenance/v1"]
    predicate: Predicate

    @property
    def request(self) -> Request:
        """The release that was asked for, and the config that builds it."""
        return self.predicate.buildDefinition.externalParameters

    @property
    def provenance(self) -> Provenance:
        return self.predicate.buildDefinition.internalParameters

    @property
    def dependencies(self) -> dict[str, dict[str, str]]:
        """The hashes of what the release was made from, by its name."""
        return {found.name: found.digest for found in self.predicate.buildDefinition.resolvedDependencies}

    @model_validator(mode="after")
    def _agrees_with_itself(self):
        files = {name: entry.sha256 for name, entry in self.provenance.files.items()}
        if {found.name: found.digest.get("sha256") for found in self.subject} != files:
            raise ValueError("subject: other files or hashes than in internalParameters.files; expected the same")
        if not self.request.release == self.provenance.release == self.request.config["build"][0]:
            raise ValueError("externalParameters: of another release than internalParameters; expected the same")
        return self


def tuning_runs(blocks: Sequence[BlockRecord]) -> list[TuningRun]:
    """The blocks grouped by what made them, in the order of each group's first block."""
    runs: list[TuningRun] = []
    for block in blocks:
        run = TuningRun(
            blocks=[],
            engine=block.engine,
            engine_version=block.engine_version,
            settings=block.settings,
            libraries=block.libraries,
            threads=block.threads,
            device=block.device,
        )
        known = next((other for other in runs if other.model_copy(update={"blocks": []}) == run), None)
        if known is None:
            runs.append(run)
            known = run
        known.blocks.append(block.block)
    return runs


def read_blocks(paths: Sequence[str | Path], scheme: str) -> list[BlockRecord] | list[CopiedBlock]:
    """The records of a release's blocks: copied ones, if its `scheme` quantizes nothing."""
    kind = BlockRecord if SCHEMES[scheme].quantizes else CopiedBlock
    return [read_json(path, kind) for path in paths]


def git_commit(directory: str | Path) -> str | None:
    """The git commit of the checkout `directory`, marked -dirty if files were changed since.

    Outside of a checkout the one that REQUANT_REVISION names, as the flake sets it; else None.
    """
    if not (Path(directory) / ".git").exists():  # else an outer repository would answer
        return os.environ.get("REQUANT_REVISION") or None
    of_another_user = ["-c", f"safe.directory={Path(directory).resolve()}"]
    command = [
        "git",
        *of_another_user,
        "-C",
        str(directory),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def collect(
    source: SourceRecord,
    calibration: CalibrationRecord,
    blocks: Sequence[BlockRecord | CopiedBlock],
    pack: PackRecord,
    base_model: str | None,
    commit: str | None,
    machine: Machine,
    keep: KeepList | None = None,
    observed: CalibrationRecord | None = None,
) -> Provenance:
    """The provenance of the release that these records describe; of a pruned model with its `keep` list and the tokens
    that this was made from."""
    quantized = [block for block in blocks if isinstance(block, BlockRecord)]
    return Provenance(
        release=pack.release,
        scheme=pack.scheme,
        requant_version=__version__,
        requant_commit=commit,
        source=SourceProvenance(
            model=source.model, base_model=base_model, revision=source.revision, files=source.files
        ),
        calibration=CalibrationProvenance(
            name=calibration.calibration,
            tokenizer_sha256=calibration.tokenizer_sha256,
            seqlen=calibration.seqlen,
            pack=calibration.pack,
            seed=calibration.seed,
            calibration_sha256=calibration.calibration_set.sha256,
            heldout_sha256=calibration.heldout_set.sha256,
            calibration_texts={text.name: text.sha256 for text in calibration.calibration_set.sources},
            heldout_texts={text.name: text.sha256 for text in calibration.heldout_set.sources},
        ),
        pruning=keep and PruningProvenance(keep=keep, calibration_sha256=observed.calibration_set.sha256),
        tuning=tuning_runs(quantized),
        seeds=[block.seed for block in quantized],
        files=pack.files,
        machine=machine,
    )


def dependencies(
    source: SourceRecord,
    calibrations: Sequence[CalibrationRecord],
    config: Mapping[str, Any],
    others: Mapping[str, Mapping[str, str]],
) -> list[Resource]:
    """What a release was made from: the files of the source, the texts, and `others` as given; a name comes once.

    Texts of a calibration are text/{calibration}/{name}; held-out texts are named where `config`, the release's own,
    has texts of their own for them: heldout/{calibration}/{name}.
    """
    found = {f"source/{source.model}/{name}": {"sha256": entry.sha256} for name, entry in source.files.items()}
    for record in calibrations:
        name = record.calibration
        found |= {f"text/{name}/{text.name}": {"sha256": text.sha256} for text in record.calibration_set.sources}
        if config["calibrations"][name]["heldout"]["sources"] is not None:
            held = record.heldout_set.sources
            found |= {f"heldout/{name}/{text.name}": {"sha256": text.sha256} for text in held}
    return _resources(found | others)


def task_digests(benchmark: str, folder: str, paths: Iterable[str]) -> dict[str, dict[str, str]]:
    """The files that scores depend on, by name: task/{benchmark}/{path in `folder`}, and data/{benchmark}/{path} for
    those outside of it, of an absolute path its last component."""
    digests = {}
    for path in map(Path, paths):
        inside = bool(folder) and path.is_relative_to(folder)
        shown = path.relative_to(folder) if inside else Path(path.name) if path.is_absolute() else path
        digests[f"{'task' if inside else 'data'}/{benchmark}/{shown}"] = {"sha256": file_entry(path).sha256}
    return digests


def published_digests(benchmark: str, folders: Mapping[str, str], paths: Iterable[str]) -> dict[str, dict[str, str]]:
    """The published files of benchmarks of the served model, as served/{benchmark}/{task}/{path in its folder}.

    folders: by task.
    """
    digests = {}
    for path in map(Path, paths):
        for task, folder in folders.items():
            if path.is_relative_to(folder):
                digests[f"served/{benchmark}/{task}/{path.relative_to(folder)}"] = {"sha256": file_entry(path).sha256}
    return digests


def code_digests(root: Path) -> dict[str, dict[str, str]]:
    """requant itself and its locks, in the checkout `root`: the hash of its code, its commit where every file is as
    committed, the locks of its environment, and the revisions that flake.lock pins."""
    commit = git_commit(root)
    own = {"sha256": code_sha256(root)} | ({} if commit is None or "-" in commit else {"gitCommit": commit})
    locks = sorted(path for path in [*root.glob("envs/*.lock"), root / "flake.lock"] if path.exists())
    digests = {"requant": own}
    digests |= {str(path.relative_to(root)): {"sha256": file_entry(path).sha256} for path in locks}
    return digests | flake_inputs(root / "flake.lock")


KINDS = ("py", "csv", "j[2s]*")  # of the library's files


def code_sha256(root: Path) -> str:
    """sha256 over the hashes and names of the files that a build runs, as `sha256sum` prints them."""
    patterns = ("Snakefile", "rules/*.smk", "scripts/*.py", *(f"src/requant/**/*.{kind}" for kind in KINDS))
    paths = sorted(path for pattern in patterns for path in root.glob(pattern))
    lines = "".join(f"{file_entry(path).sha256}  {path.relative_to(root)}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()


def flake_inputs(lock: Path) -> dict[str, dict[str, str]]:
    """The commits of the inputs that flake.lock pins, as flake/{input}; none where there is no such file."""
    if not lock.exists():
        return {}
    nodes = json.loads(lock.read_text(encoding="utf-8"))["nodes"]
    locked = {name: node.get("locked", {}) for name, node in nodes.items()}
    return {f"flake/{name}": {"gitCommit": pin["rev"]} for name, pin in sorted(locked.items()) if "rev" in pin}


def statement(
    provenance: Provenance,
    config: dict[str, Any],
    resolved: list[Resource],
    blocks: Sequence[BlockRecord | CopiedBlock],
    versions: dict[str, str],
) -> Statement:
    """provenance.json: of the release that `provenance` describes and `config` builds alone, made from `resolved`."""
    definition = BuildDefinition(
        buildType=BUILD_TYPE,
        externalParameters=Request(release=provenance.release, config=config),
        internalParameters=provenance,
        resolvedDependencies=resolved,
    )
    made = {f"blocks/{block.block}.safetensors": {"sha256": block.sha256} for block in blocks}
    run = RunDetails(
        builder=Builder(id="urn:requant:builder", version=versions), metadata={}, byproducts=_resources(made)
    )
    return Statement(
        _type="https://in-toto.io/Statement/v1",
        subject=_resources({name: {"sha256": entry.sha256} for name, entry in provenance.files.items()}),
        predicateType="https://slsa.dev/provenance/v1",
        predicate=Predicate(buildDefinition=definition, runDetails=run),
    )


def write_provenance(path: str | Path, made: Statement) -> None:
    """Writes provenance.json, whole, once the shipped schema has accepted it."""
    data = made.model_dump(mode="json", by_alias=True)
    _check(path, data)
    write_text(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def read_provenance(path: str | Path) -> Statement:
    """The statement in `path`. RequantError with one line if it is absent, no JSON, or not as the schema has it."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequantError(f"{path}: not there; expected the provenance.json of a release") from None
    except OSError as error:
        raise RequantError(f"{path}: {error.strerror}; expected the provenance.json of a release") from None
    except (ValueError, RecursionError) as error:
        raise RequantError(f"{path}: no JSON ({error}); expected the provenance.json of a release") from None
    _check(path, data)
    try:
        return Statement.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise RequantError(f"{path}: {key}: {first['msg']}; expected the provenance.json of a release") from None


def _check(path: str | Path, data: Any) -> None:
    """Holds `data` against the shipped schema; RequantError names the first key that is wrong."""
    problem = min(_validator().iter_errors(data), key=lambda error: list(map(str, error.absolute_path)), default=None)
    if problem is None:
        return
    where = list(problem.absolute_path)
    if where[: len(CONFIG)] == CONFIG and isinstance(config := reduce(getitem, CONFIG, data), dict):
        parsed(path, config)  # it says better what is wrong in a config
    key = ".".join(map(str, where)) or "the file"
    raise RequantError(f"{path}: {key}: {problem.message[:200]}; expected as in {SCHEMA.name}")


def parsed(path: str | Path, config: dict[str, Any]) -> Config:
    """The config of the provenance in `path`. RequantError, each line with the path, if it is none."""
    try:
        return parse(config)
    except RequantError as error:
        raise RequantError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def check_config(release: str, config: dict[str, Any]) -> None:
    """Raises RequantError if the shipped schema does not take `config`, which builds `release` alone: its provenance
    could not be written when all else is done."""
    problem = next(_validator("#/$defs/Config").iter_errors(config), None)
    if problem is not None:
        key = ".".join(map(str, problem.absolute_path)) or "the whole"
        raise RequantError(
            f"releases.{release}: its provenance.json would hold {key}: {problem.message[:200]}; "
            f"expected as in {SCHEMA.name}: write it anew by `python -m requant.provenance_schema`"
        )


@cache
def _validator(part: str = "#"):
    """What holds data against the shipped schema, or against the `part` of it that this JSON pointer names."""
    import jsonschema

    whole = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(whole if part == "#" else {"$ref": part, "$defs": whole["$defs"]})


def _resources(digests: Mapping[str, Mapping[str, str]]) -> list[Resource]:
    return [Resource(name=name, digest=dict(digest)) for name, digest in digests.items()]
