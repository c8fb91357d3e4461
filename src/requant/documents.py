"""Documents out of text files: plain text, or JSON lines.

A file's suffix says what it should be, and its beginning what it is: JSON read as plain text would be calibrated on as
it stands, brackets and keys. What is neither is refused by its first megabyte, which a build looks at when it is
planned; what is behind is met by the job that reads it all, one of the first.
"""

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from requant.config import TextSource, source_name
from requant.errors import RequantError, brief
from requant.untrusted import json_object, open_file

# Suffixes, in any case. `.json` has to hold JSON lines too.
OF_LINES = (".jsonl", ".ndjson", ".json", ".jsonlines", ".jl", ".ldjson")
OF_TEXT = (".txt", ".text", ".md", "")
READ = f"UTF-8 text: JSON lines ({', '.join(OF_LINES)}) or plain text ({', '.join(filter(None, OF_TEXT))}, no suffix)"
SIGNATURES = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"%PDF-": "PDF",
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, which begins alike
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
BEGINNING = 2**20  # bytes that are looked at when a build is planned
JSON_VALUE = re.compile(r'\s*(\[\s*["{]|\{\s*")')  # how a JSON array or object begins
BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
# Prose is letters and blanks for the most part. Writing systems without blanks have letters beyond ASCII.
LEAST_PROSE, FEWEST_BLANKS, LOOKED_AT = 0.5, 0.02, 1_000_000


def read_documents(source: TextSource) -> list[str]:
    """The documents of a text source, in file order: JSON lines by `field`, or plain text parted by blank lines.

    Blank ones don't count. Raises RequantError naming the file, and the line where one is not as expected.
    """
    path = Path(source.path)
    with open_file(path, f"the text of calibration source {source_name(source)!r}") as file:
        data = file.read()
    kind = _kind(path, data[:BEGINNING], len(data) <= BEGINNING)
    text = _decoded(path, data)
    if kind == "lines":
        documents = [document for _, document in _from_lines(path, text.split("\n"), source.field)]
    else:
        documents = [part.strip() for part in BLANK_LINE.split(text)]
    return [document for document in documents if document.strip()]


def check_text(path: str | Path, field: str) -> None:
    """Raises RequantError naming the file, and the line, if the beginning of a text is nothing that is read."""
    with open_file(path, READ) as file:
        data = file.read(BEGINNING + 1)
    whole = len(data) <= BEGINNING
    if _kind(Path(path), data[:BEGINNING], whole) == "lines":
        lines = _decoded(Path(path), data[:BEGINNING], whole).split("\n")
        documents = [document for _, document in _from_lines(Path(path), lines if whole else lines[:-1], field)]
        found = any(document.strip() for document in documents)
    else:
        found = bool(_decoded(Path(path), data[:BEGINNING], whole).strip())
    if whole and not found:
        raise RequantError(f"{path}: no text in it; expected documents")


def remarks(documents: list[str]) -> list[str]:
    """What somebody who calibrates on the documents of one file should know: a sentence each."""
    found = []
    if len(documents) == 1:
        found.append(
            f"one document of {len(documents[0]):,} characters: documents of plain text are parted by blank lines, of "
            "JSON lines there is one a line"
        )
    seen = "".join(itertools.islice(itertools.chain.from_iterable(documents), LOOKED_AT))
    letters, blanks = sum(map(str.isalpha, seen)), sum(map(str.isspace, seen))
    latin = sum(letter.isalpha() and letter.isascii() for letter in seen)
    if seen and (letters + blanks) / len(seen) < LEAST_PROSE:
        found.append(f"hardly any prose: {(letters + blanks) / len(seen):.0%} of its characters are letters or blanks")
    elif seen and blanks / len(seen) < FEWEST_BLANKS and latin > letters / 2:
        found.append(f"hardly any prose: {blanks / len(seen):.1%} of its characters are blanks")
    return found


def _kind(path: Path, beginning: bytes, whole: bool) -> Literal["lines", "text"]:
    """What a file holds. `whole`: whether `beginning` is all of it. RequantError if it is none of what is read."""
    for signature, name in SIGNATURES.items():
        if beginning.startswith(signature):
            raise RequantError(f"{path}: {name} found; expected {READ}")
    if path.suffix.lower() not in OF_LINES + OF_TEXT:
        raise RequantError(f"{path}: suffix {path.suffix!r} found; expected {READ}")
    if b"\0" in beginning:
        raise RequantError(f"{path}: binary data found; expected {READ}")
    text = _decoded(path, beginning, whole)
    if path.suffix.lower() in OF_LINES and path.suffix.lower() != ".json":
        return "lines"
    lines = [line for line in text.split("\n")[: None if whole else -1] if line.strip()]
    if lines and all(map(_is_object, lines)) or (not lines and text.lstrip().startswith("{")):
        return "lines"
    if path.suffix.lower() == ".json" or JSON_VALUE.match(text):
        raise RequantError(
            f"{path}: JSON that is no JSON lines found; expected an object a line, or plain text: "
            "`jq -c '.[]' FILE > FILE.jsonl` makes lines of an array"
        )
    return "text"


def _is_object(line: str) -> bool:
    try:
        return line.lstrip().startswith("{") and bool(json_object(line.encode(), ""))
    except RequantError:
        return False


def _decoded(path: Path, data: bytes, whole: bool = True) -> str:
    """The text of UTF-8 `data` without its mark, line ends as \\n; up to its last whole character if it was cut."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        raise RequantError(f"{path}: not UTF-8 at byte {error.start}; expected {READ}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _from_lines(path: Path, lines: Iterable[str], field: str) -> Iterator[tuple[int, str]]:
    """(number, text) of each JSON line; splitlines() would part a text at U+2028."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, expected = f"{path}: line {number}", f"a JSON object with the key {field!r}"
        found = json_object(line.encode(), where, expected)
        if field not in found:
            raise RequantError(f"{where}: {brief(list(found))} found; expected {expected}")
        if not isinstance(found[field], str):
            raise RequantError(f"{where}: {field!r} is no text, but {brief(found[field])}; expected {expected}")
        yield number, found[field]
