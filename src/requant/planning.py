"""What the config names has to be there before anything runs: texts, pinned sources, the model to lock.

Snakemake asks for a missing file only where something has yet to be made of it; finished outputs would hide it.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from requant.checkpoint import Checkpoint
from requant.documents import check_text
from requant.errors import RequantError, brief, plain
from requant.hub import COMMIT
from requant.naming import LEFT_OUT
from requant.records import Lock
from requant.shards import INDEX
from requant.untrusted import read_json_object


def check_storage(provider: str | None, shared: bool) -> None:
    """Raises RequantError if results would be anywhere but in files that all jobs see.

    Snakemake stores a rule's declared outputs alone: the shards of a release, which pack.json lists, would be lost.
    """
    instead = "build in a directory that all jobs see; `requant store` takes the results to a bucket (docs/storage.md)"
    if provider is not None:
        raise RequantError(f"--default-storage-provider: {provider!r} found; expected none: {instead}")
    if not shared:
        raise RequantError(f"--shared-fs-usage: no 'input-output' found; expected it: {instead}")


# What Snakemake replaces in a path that a rule is given: wildcards, with a constraint or without, and path variables.
# There is no way to write one that is meant as it stands.
REPLACED = re.compile(r"\{\s*\w+\s*(,.*)?\}|<[a-z][a-z0-9_]*>", re.DOTALL)
LONGEST = 200  # bytes of a source file's name: its record and log, and what they are called while written, add to it


def check_path(path: str | Path, key: str) -> None:
    """Raises RequantError if Snakemake would take a part of `path` for something else; `key` says what names it."""
    if found := REPLACED.search(str(path)):
        raise RequantError(
            f"{path}: {found[0]!r} in it is a wildcard to Snakemake ({key}); expected a path without {{NAME}} and "
            "<name>: rename it, or name a link to it"
        )
    if not str(path).isprintable():
        raise RequantError(f"{brief(str(path))}: a line break or the like in it ({key}); expected printable characters")


def check_source_names(model: str, directory: str, names: Iterable[str]) -> None:
    """`check_path` of a model's files, whose names become those of records and logs too."""
    for name in names:
        check_path(f"{directory}/{name}", f"models.{model}")
        if len(name.encode()) > LONGEST:
            raise RequantError(
                f"{directory}/{name}: a name of {len(name.encode())} bytes (models.{model}); expected {LONGEST} or less"
            )


def check_persistence(backend: str) -> None:
    """Raises RequantError if Snakemake keeps its records anywhere but in files under .snakemake.

    What is under way, and when a job left its outputs, is read there (`requant store`, files changed by hand).
    """
    if backend != "file":
        raise RequantError(
            f"--persistence-backend: {backend!r} found; expected file: what was made, and when, is read from files "
            "under .snakemake"
        )


def made_here(path: str | Path) -> bool:
    """Whether `path` is among what the graph makes: it may be absent before a build."""
    return Path(path).parts[:1] == ("results",)


def text_files(calibration: str, settings: dict) -> list[str]:
    """The text files that a calibration's `settings` name, held-out ones included.

    Raises RequantError with the key of the first that is not there, is nothing that `documents` reads, or that
    Snakemake can't be given.
    """
    found = []
    for section, sources in (("sources", settings["sources"]), ("heldout.sources", settings["heldout"]["sources"])):
        for number, source in enumerate(sources or []):
            path = source["path"]
            found.append(path)
            if made_here(path):
                continue
            key = f"calibrations.{calibration}.{section}[{number}].path"
            if not Path(path).is_file():
                wrong = "no file; expected one" if Path(path).exists() else "not there"
                raise RequantError(f"{path}: {wrong} ({key})")
            check_path(path, key)
            try:
                check_text(path, source["field"])
            except RequantError as error:
                raise RequantError(f"{error} ({key})") from None
    return found


def check_chat_template(key: str, model: str, directory: str, names: Iterable[str]) -> None:
    """Raises RequantError, beginning with the config's `key`, if `model`, which is asked through a chat template, has
    none, or none that Jinja reads. names: of its files, of which some may not have come to `directory` yet."""
    found = [name for name in ("chat_template.jinja", "chat_template.json") if name in names]
    folder = Path(directory)
    if found and not (folder / found[0]).exists():
        return
    template: Any = None
    if found and found[0].endswith(".jinja"):
        template = (folder / found[0]).read_text(encoding="utf-8", errors="replace")
    elif found:
        template = read_json_object(folder / found[0]).get("chat_template")
    elif "tokenizer_config.json" in names:
        if not (folder / "tokenizer_config.json").exists():
            return
        template = read_json_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str):
        raise RequantError(
            f"{key}: model {model!r} has no chat template, in chat_template.jinja or tokenizer_config.json, which the "
            "benchmark is asked through; expected one, or `chat: false`"
        )
    if (wrong := _wrong_in_template(template)) is not None:
        raise RequantError(f"{key}: the chat template of model {model!r}: {wrong}; expected one that Jinja reads")


def _wrong_in_template(template: str) -> str | None:
    """What Jinja says of a template; None if it reads it. `generation` is a tag of transformers'."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.parse(re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template))
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {plain(error.message or '')}"
    return None


def check_locked_source(model: str, directory: str, lock: str, names: Iterable[str]) -> None:
    """Raises RequantError if `directory`, or a file in it that the model's `lock` names, is not there."""
    if not Path(directory).is_dir():
        raise RequantError(f"{directory}: not there (models.{model}.path); expected the checkpoint that {lock} pins")
    for name in names:
        path = Path(directory) / name
        if not path.is_file():
            wrong = "no file" if path.exists() else "not there"
            raise RequantError(f"{path}: {wrong}; {lock} names it: make the lock anew if the source has changed")


def check_locked_shards(checkpoint: Checkpoint, used: Iterable[str]) -> None:
    """Raises RequantError if a model's directory has a shard of it that is not among the files `used`, by its lock."""
    if missing := sorted(set(checkpoint.shards) - set(used)):
        raise RequantError(
            f"{checkpoint.directory / missing[0]}: holds tensors of the model, and its lock does not name it: make the "
            "lock anew"
        )


def remarks_on(checkpoint: Checkpoint) -> list[str]:
    """A line on what of a directory's weights is not read, or read otherwise than its config.json says."""
    lines = [
        f"{checkpoint.directory / name}: not read: {INDEX} does not name it, and it is no layer for multi-token "
        "prediction that config.json counts"
        for name in checkpoint.unnamed
    ]
    if checkpoint.config.get("tie_word_embeddings") and "lm_head.weight" in checkpoint.stored:
        lines.append(
            f"{checkpoint.directory}: config.json ties the head to the embedding, and a head is stored: that one is "
            "used, and a release's config.json ties nothing"
        )
    strange = [name for name, reason in checkpoint.left_out.items() if reason == LEFT_OUT["no module"]]
    if strange:
        lines.append(
            f"{checkpoint.directory}: {len(strange)} tensors that no module of the model has are left out, the first "
            f"is {strange[0]}"
        )
    return lines


def check_hub_model(model: str, revision: str | None, lock: Lock | None) -> None:
    """Raises RequantError unless the `revision` of a hub model is a commit, and its `lock` is of that commit."""
    command = f"run `snakemake --cores 1 lock --config model={model}`, with the --configfile of this build"
    if revision is None or not COMMIT.fullmatch(revision):
        raise RequantError(
            f"models.{model}.revision: {revision!r} may move; expected a commit, 40 hex digits: for the one it is now, "
            + command
        )
    if lock is None:
        raise RequantError(f"locks/{model}.json: not there; a model from the hub is planned from its lock: {command}")
    if lock.revision != revision:
        raise RequantError(
            f"locks/{model}.json: revision {lock.revision} found; models.{model}.revision is {revision}: {command}"
        )


def check_bucket_model(model: str, lock: Lock | None) -> None:
    """Raises RequantError if a model in a bucket has no `lock`."""
    if lock is None:
        raise RequantError(
            f"locks/{model}.json: not there; a model in a bucket is planned from its lock: run "
            f"`snakemake --cores 1 lock --config model={model}`, with the --configfile of this build"
        )


def model_to_lock(asked: object, models: Iterable[str]) -> str:
    """The model that `--config model=` names. Raises RequantError if there is none, or none of that name."""
    known = ", ".join(sorted(models))
    if asked is None:
        raise RequantError(f"lock: no model is named; expected --config model=NAME, one of {known}")
    if str(asked) not in models:
        raise RequantError(f"--config model={asked}: not in `models`, or pruned from one; expected one of {known}")
    return str(asked)


def file_rates(asked: dict[str, object]) -> dict[str, float]:
    """Bytes a second from `--config disk=, shared=, hub=` in GB; those that are not asked for do not count.

    Raises RequantError naming the first that is no number above 0.
    """
    found = {}
    for name in ("disk", "shared", "hub"):
        value = asked.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise RequantError(f"--config {name}={value}: expected GB a second, a number above 0")
        found[name] = value * 1e9
    return found
