"""Files that others made: opened only if they are files, and read as JSON only if it has one meaning.

A directory, a FIFO or a device in a file's place is named and never opened: reading it could wait for ever. JSON is
refused that Python's reader takes and others do not, or not alike: a key twice, NaN and Infinity, numbers beyond
float64, nesting of more than 200 levels, lone surrogates.
"""

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from requant.errors import RequantError, brief, plain

JSON_LIMIT = 100_000_000  # bytes; the largest index known has 17 million
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
NAME_LIMIT = 512  # characters of a tensor's name


def open_file(path: str | Path, expected: str = "a file") -> BinaryIO:
    """`path` opened to read bytes. RequantError, with what was `expected`, if it is no file or can't be read."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind in KINDS:
            raise RequantError(f"{path}: {KINDS[kind]} found; expected {expected}")
        return open(path, "rb")
    except FileNotFoundError:
        raise RequantError(f"{path}: not there; expected {expected}") from None
    except OSError as error:
        raise RequantError(f"{path}: can't be read ({error.strerror}); expected {expected}") from None


def read_json_object(path: str | Path, expected: str = "a JSON file") -> dict[str, Any]:
    """Keys and values of the JSON object in `path`. RequantError naming the file if it is none, as `json_object`."""
    with open_file(path, expected) as file:
        size = os.fstat(file.fileno()).st_size
        if size > JSON_LIMIT:
            raise RequantError(f"{path}: {size} bytes found; expected {expected} of {JSON_LIMIT} bytes or less")
        return json_object(file.read(), path, expected)


def json_object(data: bytes, where: str | Path, expected: str = "keys and values") -> dict[str, Any]:
    """Keys and values of `data`, UTF-8 JSON with an object at its top.

    RequantError, beginning with `where` and ending with what was `expected`, if it is anything else.
    """
    if data.startswith(codecs.BOM_UTF8):
        raise RequantError(f"{where}: no JSON: it begins with a byte order mark; expected {expected}")
    try:
        from_json(data, allow_inf_nan=False)  # first: it bounds the nesting, and knows no lone surrogates
        found = json.loads(data, object_pairs_hook=_each_key_once, parse_float=_finite)
    except ValueError as error:
        raise RequantError(f"{where}: no JSON: {plain(error, 120)}; expected {expected}") from None
    if not isinstance(found, dict):
        raise RequantError(f"{where}: a {type(found).__name__} found; expected {expected}")
    return found


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {brief(key)} stands there twice")
        found[key] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {brief(text, 40)} is too large")
    return value


def is_file_name(name: object) -> bool:
    """Whether `name` is that of a file in a directory: no path, no `..`, printable, 255 bytes or less."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and "/" not in name
        and len(name.encode()) <= 255
    )


def is_tensor_name(name: object) -> bool:
    """Whether `name` can be that of a tensor: printable, not empty, NAME_LIMIT characters or less."""
    return isinstance(name, str) and 0 < len(name) <= NAME_LIMIT and name.isprintable()
