"""What an engine's log says went wrong: its first real error, not the noise of processes that end because of it.

An engine is several processes that write to one log, each line behind a stamp of its own; when one of them fails, the
others fail for want of it, and the last lines are theirs. So tracebacks are taken apart by process, the cause is read
before what followed from it, and messages that only point to another one count last.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from requant.errors import plain

COMPUTES = False  # words for a failure

LAST_LINES = 5  # of a log without an error
SHOWN = 300  # characters of an error
LONGEST = 200  # lines of a traceback without indentation
TRACEBACK = "Traceback (most recent call last):"

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_LEVEL = r"(?P<level>DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL|FATAL)"
# What stands before a message, one after another: who writes, when, how grave it is, and from where.
_STAMPS = [
    re.compile(pattern)
    for pattern in (
        r"\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:?\d\d) ",  # Docker's, and Kubernetes'
        r"(?P<source>[\w.-]+) +\| ",  # Docker Compose
        r"(?P<source>\([A-Za-z]\w*(?:,? \w+=[\w.:]+)+\)) ?",  # (EngineCore_DP0 pid=1): vLLM, Ray
        r"(?P<source>\[rank\d+\]):(?: |$)",  # torch
        rf"{_LEVEL} \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[[^\]]+:\d+\] ?",  # vLLM
        r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d+)?(?P<source>(?: [A-Z]+\d+)*)\] ?",  # sglang: time and rank
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d+)? *(?:- )?(?:\[?{_LEVEL}\]?)?[ :-]*",  # logging's own
        rf"\[{_LEVEL}(?:\|[^\]]*)?\] ?",
        rf"{_LEVEL}:(?:[\w.]+:| +)",  # logging.basicConfig, uvicorn
        r"[EFWI]\d{4} [\d:.]+ +\d+ [^\]]*\] ",  # glog
        r"(?:    )?(?: {2}\| | {2}\+ | {4}\| )",  # the margin of an exception group
    )
]
_HARMLESS = ("DEBUG", "INFO", "WARN", "WARNING")
# The last line of a traceback: the exception's name with its modules, and what it says.
_RAISED = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:\(\w+\))?(?:: ?.*)?$")
_EXCEPTION = re.compile(
    r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|OutOfResources|Timeout|NotFound)(?:\(\w+\))?(?:: ?.*)?$"
)
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_BODY = re.compile(r"""\s|File "|[~^]+$|\[Previous line repeated|$""")
# Exceptions whose first line says nothing without the next.
_GOES_ON = re.compile(r":$|\d+ validation errors? for [\w.]+$")
# Errors of no Python code, or of Python before it has a traceback.
_BARE = re.compile(
    r"""(?x)
    [\w./ -]{1,60}:\ error:\ .                            # argparse
    | Error:\ .                                           # click
    | .*:\ (?:command\ )?not\ found$                      # a shell
    | .*:\ (?:No\ such\ file\ or\ directory|Permission\ denied)$
    | .*:\ No\ module\ named\ . | .*:\ can't\ open\ file\ .   # python -m
    | .*\ error\ while\ loading\ shared\ libraries:\ .
    | (?:\S+:\ )?exec:?\ .*:\ .
    | docker:\ .+ | Error\ response\ from\ daemon:\ . | OCI\ runtime\ .*failed
    | nvidia-container-cli:\ .
    | Fatal\ Python\ error:\ . | Segmentation\ fault | Bus\ error | Illegal\ instruction | Floating\ point\ exception
    | Aborted | Killed$ | .*\bOut\ of\ memory:\ Killed
    | what\(\):\ . | .*\bterminated\ by\ signal
    | (?:nvcc\ )?fatal\ *:\ . | ninja:\ (?:error|fatal):\ .
    | .*\bCUDA\ out\ of\ memory
    | .*\bwatchdog\ timeout\b                            # sglang: one step took longer than it waits
    """
)
# What only points to another error, or follows from one: of no use while there is any other.
_FOLLOWS = re.compile(
    r"""(?x)
    See\ (?:root\ cause|stack\ trace|the\ stack\ trace) | see\ the\ error\ messages?\ above
    | check\ the\ stack\ trace\ above | check\ if\ there\ are\ relevant\ logs
    | Engine\ ?(?:core|process|Core\w*)\b.*(?:failed|fatal\ error|encountered\ an\ issue|died)
    | WorkerProc\ (?:failed|initialization\ failed|hit\ an\ exception)
    | \b(?:EngineDeadError|EngineGenerateError|BrokenPipeError|ConnectionResetError|ConnectionRefusedError|EOFError)\b
    | \b(?:CancelledError|KeyboardInterrupt|SystemExit|ExceptionGroup|ProcessRaisedException|ProcessExitedException)\b
    | \bChildFailedError\b
    | sub-?process(?:es)?\ (?:exited|died|failed) | child\ proces+\b | scheduler\ is\ dead
    | Application\ startup\ failed
    | remote\ process\ exited | \bserver\ launch\ failed | ^Aborted | terminated\ by\ signal
    | Pyspy\ failed | pyspy\ dump                         # sglang looks where a process stands
    | Connection\ (?:closed|reset)\ by\ peer | hit\ an\ exception:?$
    """
)


class _Line(NamedTuple):
    """source: the process that wrote it; level: as it says itself; at: its number in the log; stamped: whether anything
    stood before its text."""

    source: str
    level: str
    text: str
    at: int
    stamped: bool


def read(log: Path) -> str:
    """What an engine wrote; nothing if it has not begun to."""
    return log.read_bytes().decode(errors="replace") if log.exists() else ""


def told(log: Path, ended: str = "") -> str:
    """The first real error in the file `log`, else its last lines, in one line.

    ended: how the engine ended, of which SIGKILL may say why where the log doesn't. An engine that fails sends it to
    its own processes too.
    """
    text = read(log)
    hint = "; the system ends a process so where memory runs out" if "SIGKILL" in ended else ""
    return first_error(text) or last_lines(text) + hint


def last_lines(text: str, count: int = LAST_LINES) -> str:
    """The last lines that say something, on one line."""
    lines = [plain(line) for line in _plain_lines(text) if line.strip()]
    return " | ".join(lines[-count:]) if lines else "it wrote nothing"


def first_error(text: str) -> str | None:
    """The first real error in the text of a log, in one line; None if there is none.

    That is the innermost exception of the first traceback; with what was raised because of it behind it, where that
    says more. Else the first line that is an error by its form (a shell's, a command line's, the kernel's), or that an
    engine calls one. What engines call information or warnings doesn't count, and what only points to another error
    counts last.
    """
    lines = _lines(text)
    tracebacks, warned = _tracebacks(lines)
    boxed = _boxed(lines)
    grave = [line for line in lines if line.level not in _HARMLESS]
    bare = [line.text.strip() for line in grave if _BARE.match(line.text.strip())]
    raised = [line.text.strip() for line in grave if _EXCEPTION.match(line.text)]
    called = [line.text.strip() for line in grave if line.level and line.text.strip() and TRACEBACK not in line.text]
    for found in (tracebacks, [*boxed, *bare], raised, called, warned):
        if real := [error for error in found if not _FOLLOWS.search(error)]:
            return plain(real[0], SHOWN)
    left = [*tracebacks, *bare, *raised, *called]
    return plain(left[0], SHOWN) if left else None


def _plain_lines(text: str) -> list[str]:
    """Lines without colours; of a line that was written over (a progress bar), what it said last."""
    lines = _ESCAPE.sub("", text).replace("\r\n", "\n").split("\n")
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in lines]


def _lines(text: str) -> list[_Line]:
    """All lines, each without its stamps. One that has none is of the process that wrote the line before it."""
    found: list[_Line] = []
    for at, raw in enumerate(_plain_lines(text)):
        line = _unstamped(raw, at)
        found.append(line if line.stamped or not found else line._replace(source=found[-1].source))
    return found


def _unstamped(line: str, at: int) -> _Line:
    source, level, stamped, more = "", "", False, True
    while more:
        more = False
        for stamp in _STAMPS:
            if (match := stamp.match(line)) and match.end():
                named = match.groupdict()
                source += (named.get("source") or "").strip()
                level = named.get("level") or level
                line, stamped, more = line[match.end() :], True, True
    return _Line(source, level, line, at, stamped)


def _tracebacks(lines: list[_Line]) -> tuple[list[str], list[str]]:
    """What tracebacks end in, causes first, in the order in which they begin; apart those right behind a warning,
    which may be a part of it."""
    by_source: dict[str, list[_Line]] = defaultdict(list)
    for line in lines:
        by_source[line.source].append(line)
    found = sorted((begun for own in by_source.values() for begun in _chains(own)), key=lambda begun: begun[0])
    real, apart = ([_joined(chain) for _, warned, chain in found if warned == which] for which in (False, True))
    return real, apart


def _chains(own: list[_Line]) -> list[tuple[int, bool, list[str]]]:
    """(line of the log, whether it may be a warning's, exceptions) of each traceback among one process's lines."""
    found: list[tuple[int, bool, list[str]]] = []
    at = 0
    while at < len(own):
        if TRACEBACK not in own[at].text:
            at += 1
            continue
        start = at
        error, at = _raised(own, start + 1)
        before = own[start - 1] if start else own[start]
        if error is None or own[start].level in _HARMLESS or before.text.startswith("Exception ignored in"):
            continue
        if found and _is_chained(own, start):
            found[-1][2].append(error)
        else:
            warned = not own[start].stamped and before.level in ("WARN", "WARNING")
            found.append((own[start].at, warned, [error]))
    return found


def _raised(own: list[_Line], at: int) -> tuple[str | None, int]:
    """(what the traceback whose first line is before `at` ends in, the index behind it). Of one process's lines.

    An exception that says nothing has the line of code that raised it behind it.
    """
    code, last = False, ""  # whether the line before names a file: a line of code may follow it, indented or not
    while at < len(own):
        text = own[at].text
        if TRACEBACK in text:
            return None, at
        if _EXCEPTION.match(text) or (_RAISED.match(text) and not code):
            error, at = text.strip(), at + 1
            if _GOES_ON.search(error):
                error = " ".join([error, *(line.text.strip() for line in own[at : at + 1])]).strip()
            return f"{error} ({last})" if last and not error.partition(":")[2].strip() else error, at
        # Some stamps take the indentation away: then code may look like anything, and only its end is told.
        ends = bool(_BODY.match(text)) or code or any(_EXCEPTION.match(line.text) for line in own[at : at + LONGEST])
        if not ends:
            return None, at
        last = text.strip() if code else last
        code = text.lstrip().startswith('File "')
        at += 1
    return None, at


def _is_chained(own: list[_Line], start: int) -> bool:
    """Whether the traceback that begins at `start` was raised because of the one before."""
    return any(line.text.strip().startswith(_CHAINED) for line in own[max(0, start - 3) : start])


def _joined(chain: list[str]) -> str:
    """A cause, and what was raised because of it as far as that says something else."""
    real = [error for error in chain if not _FOLLOWS.search(error)] or chain[:1]
    first, last = real[0], real[-1]
    return first if len(real) == 1 or last == first else f"{plain(first)}; then {plain(last)}"


def _boxed(lines: list[_Line]) -> list[str]:
    """What stands in boxes that are headed Error, as command lines of typer have them."""
    found = []
    for line, following in zip(lines, lines[1:], strict=False):
        if re.match(r"[╭┌].*\bError\b", line.text):
            found.append(following.text.strip("│| "))
    return found
