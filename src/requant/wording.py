"""Numbers and lists as a card writes them; between a number and its unit stands a non-breaking space."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def number(value: int) -> str:
    """1,234,567"""
    return f"{value:,}"


def short(value: int) -> str:
    """Counts as a card gives them: 4.70 M, 508 B."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if value >= size:
            return f"{_three_digits(value / size)}\N{NO-BREAK SPACE}{unit}"
    return str(value)


def size(value: int) -> str:
    """Bytes in decimal units: 2.87 MB, 289 GB."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= scale:
            return f"{_three_digits(value / scale)}\N{NO-BREAK SPACE}{unit}"
    return f"{value} bytes"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def figure(value: float) -> str:
    """Four significant digits: 12,345, 4.210, 0.01913, 1.310e-04."""
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:#.4g}"


def decibels(value: float | None) -> str:
    """20.43; `exact` where there is no noise to hold a signal against."""
    return "exact" if value is None else figure(value)


def scientific(value: float) -> str:
    """1.31e-04: for columns of numbers that span many powers of ten."""
    return f"{value:.2e}"


def with_error(value: float, stderr: float | None) -> str:
    """0.01913 ± 0.00053: both to the second digit of the standard error; the value alone if there is none."""
    if not stderr:
        return figure(value)
    places = min(max(1 - math.floor(math.log10(stderr)), 0), 9)
    return f"{value:,.{places}f} ± {stderr:,.{places}f}"


def decimals(value: float) -> str:
    """Five decimals: for similarities near 1, where the digits after the nines are the news."""
    return f"{value:.5f}"


def percent(value: float, digits: int = 1) -> str:
    """0.981 -> 98.1%"""
    return f"{100 * value:.{digits}f}%"


def duration(seconds: float) -> str:
    """41.2 s, 12 min 03 s, 19 h 38 min"""
    if seconds < 59.95:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    whole, minutes = round(seconds), round(seconds / 60)
    text = f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{minutes // 60} h {minutes % 60:02d} min"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def setting(value: Any) -> str:
    """A setting as the config writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(setting(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys, sorted."""
    result: dict[str, Any] = {}
    for key, value in sorted(settings.items()):
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> 0–2, 5"""
    runs: list[list[int]] = []
    for value in sorted(numbers):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def files(paths: Sequence[str]) -> str:
    """The paths of numbered records in short: results/r/blocks/0.json … 5.json"""
    if len(paths) == 1:
        return paths[0]
    return f"{paths[0]} … {paths[-1].rsplit('/', 1)[-1]}"


def origin(paths: Iterable[str]) -> str:
    """Records by directory, each once: `results/r/{pack,verify}.json`, `results/s/pack.json`"""
    folders: dict[tuple[str, str], list[str]] = {}
    for path in dict.fromkeys(paths):
        folder, suffix = path.split(" … ")[0].rsplit("/", 1)[0], Path(path).suffix
        folders.setdefault((folder, suffix), []).append(path.removeprefix(f"{folder}/").removesuffix(suffix))
    texts = []
    for (folder, suffix), names in folders.items():
        texts.append(f"`{folder}/{names[0] if len(names) == 1 else '{' + ','.join(names) + '}'}{suffix}`")
    return ", ".join(texts)


def listing(items: Iterable[Any]) -> str:
    """a, b and c"""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def cell(text: Any) -> str:
    """Text that stays in its table cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def fence(text: str) -> str:
    """A fenced block of `text`, with a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}text\n{text}\n{marks}"


def plural(count: int, noun: str) -> str:
    """1 block, 2 blocks"""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def gb(count: int) -> str:
    """Bytes for a terminal: GB of 10^9, or MB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
