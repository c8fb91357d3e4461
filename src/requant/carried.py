"""Which files beside the weights a release takes along from its source, unchanged; decided by their names.

Tokenizer and templates, what describes the inputs of a model that sees or hears, sampling settings, and licences. Never
code: a `.py` would run where a release is loaded. Never the source's README: a release has its own. What stays behind
is named in the source's record.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from requant.errors import RequantError
from requant.untrusted import is_file_name, read_json_object

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")  # one of them is enough
# What text becomes tokens by. Hashes over several of them are taken in this order.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "tiktoken.model",
    "vocab.txt",
    "chat_template.json",
)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "video_processor_config.json",
    "feature_extractor_config.json",
)
TEMPLATES = "additional_chat_templates"  # the one folder: {name}.jinja in it are chat templates too
LICENCE = re.compile(
    r"(?:.*[-_ .])?(?:licen[cs]e|copying|copyright|notice|patent|use[-_ ]policy|acceptable[-_ ]use)s?(?:[-_ .].*)?",
    re.IGNORECASE,
)
TEXTS = ("", ".txt", ".md", ".rst", ".html", ".pdf")  # what a licence ends in, or in capitals and digits: .MIT, .0
JSON_LIMIT = 10_000_000  # bytes of a JSON file that is looked into when a build is planned; a tokenizer has more


def is_source_name(name: object) -> bool:
    """Whether `name` can be that of a file of a source: of one in its folder, or of a template in TEMPLATES."""
    if not isinstance(name, str):
        return False
    folder, slash, leaf = name.rpartition("/")
    return is_file_name(leaf) and (not slash or (folder == TEMPLATES and leaf.endswith(".jinja")))


def is_carried(name: str) -> bool:
    """Whether a release takes along a source's file of this name; it has `/` in it for a file of TEMPLATES alone."""
    if "/" in name:
        return is_source_name(name)
    return name in TOKENIZER_FILES or name in PROCESSOR_FILES or _is_licence(name)


def is_read(name: str) -> bool:
    """Whether engines and tokenizers read a carried file of this name: all but licences."""
    return is_carried(name) and ("/" in name or name in (*TOKENIZER_FILES, *PROCESSOR_FILES))


def _is_licence(name: str) -> bool:
    suffix = PurePosixPath(name).suffix
    return LICENCE.fullmatch(name) is not None and (
        suffix.lower() in TEXTS or (suffix == suffix.upper() and suffix != ".PY")
    )


def carried(names: Iterable[str]) -> list[str]:
    """Those of `names` that a release takes along: tokenizer files in their order, then the others sorted."""
    names = set(names)
    first = [name for name in TOKENIZER_FILES if name in names]
    return [*first, *sorted(name for name in names - set(first) if is_carried(name))]


def left_behind(names: Iterable[str], used: Iterable[str]) -> list[str]:
    """What of a source stays behind, sorted: all `names` but those `used` and hidden ones; a folder ends in `/`."""
    return sorted(name for name in set(names) - set(used) if not name.startswith("."))


def names_in(directory: str | Path) -> list[str]:
    """The names of what is in a source's directory, sorted: files, folders with a `/` behind them, templates by their
    path. Links count as what they lead to.

    Raises RequantError if TEMPLATES is a link: what it leads to is not of the source.
    """
    found = []
    for path in Path(directory).iterdir():
        if path.name != TEMPLATES or not path.is_dir():
            found.append(f"{path.name}/" if path.is_dir() else path.name)
            continue
        if path.is_symlink():
            raise RequantError(f"{path}: a link found; expected a folder of chat templates, or none")
        inside = (f"{TEMPLATES}/{template.name}" for template in path.iterdir() if not template.is_dir())
        found += inside
    return sorted(found)


def as_listed(names: Iterable[str]) -> list[str]:
    """The paths `names` of a repository as `names_in` has those of a directory: of a folder its name alone."""
    return sorted({name if "/" not in name or is_carried(name) else f"{name.split('/')[0]}/" for name in names})


def carried_in(directory: str | Path) -> list[str]:
    """The files of a source's directory that a release takes along, as `carried` orders them."""
    return [name for name in carried(names_in(directory)) if (Path(directory) / name).exists()]


def check_carried(directory: str | Path, names: Iterable[str]) -> None:
    """Raises RequantError naming a file that a release takes along and that is no file, or no JSON and called so.

    A large one, a tokenizer, is left to the job that loads it.
    """
    for name in names:
        path = Path(directory) / name
        if path.suffix == ".json" and (not path.is_file() or path.stat().st_size <= JSON_LIMIT):
            read_json_object(path, "a JSON file with keys and values")
        elif not path.is_file():
            raise RequantError(f"{path}: no file; expected one, or nothing of that name")


def name_of_record(record: str | Path, folder: str | Path) -> str:
    """The file that a record in `folder` (results/source/{model}/files) is of."""
    return Path(record).relative_to(folder).as_posix().removesuffix(".json")


def folder_of(path: str | Path, name: str) -> Path:
    """The directory of a source whose file `name` is at `path`."""
    return Path(path).parents[name.count("/")]
