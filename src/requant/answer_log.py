"""The answers of an engine as they come, a line each: a job that was killed goes on with those it has.

A line is written in one piece and handed to the system at once, so that a kill loses the answer on its way at most; a
last line that was cut is left out when the file is read. The first line says what the answers depend on: those of
another checkpoint, engine or setting are not taken.
"""

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from requant.jobs import progress
from requant.whole import written_whole


class AnswerLog:
    """Answers by request and repeat, and a digest of the requests of the first repeat."""

    def __init__(self, path: Path, depends_on: dict[str, Any], subject: str):
        self.path, self.subject = path, subject
        self.repeat = 0
        self.kept = 0  # answers of an earlier run that were used
        self.requests = 0  # of the first repeat
        self._digest = hashlib.sha256()
        self._known = _read(path, depends_on)
        self._done, self._total, self._shown = 0, 0, 0
        lines = [depends_on, *([key, found] for key, answers in self._known.items() for found in answers)]
        with written_whole(path) as partial:
            partial.write_text("".join(map(_line, lines)), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Ends writing; the file stays."""
        self._file.close()

    def drop(self) -> None:
        """Ends writing and removes the file: its answers are in a record by now."""
        self.close()
        self.path.unlink(missing_ok=True)

    @property
    def prompts_sha256(self) -> str:
        """Over the requests of the first repeat, in order."""
        return self._digest.hexdigest()

    def through(self, kind: str, requests: Sequence[Any], ask: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
        """The answers to lm-eval's `requests`, in order: those that are known, the others from `ask`.

        `ask` has to call `add` with each answer as it comes.
        """
        self._count(kind, requests)
        found = [self._take(self._key(kind, request.args)) for request in requests]
        missing = [place for place, answer in enumerate(found) if answer is None]
        self._done, self._total, self._shown = len(found) - len(missing), len(found), 0
        self.kept += self._done
        if self._done:
            progress(f"{self.subject}: {self._done} of {self._total} answers are there from before")
        for place, answer in zip(missing, ask([requests[place] for place in missing]) if missing else [], strict=True):
            found[place] = answer
        return found

    def add(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """Notes the answer to a request."""
        self._file.write(_line([self._key(kind, arguments), answer]))
        self._file.flush()
        self._done += 1
        if (tenth := 10 * self._done // max(1, self._total)) > self._shown:
            self._shown = tenth
            progress(f"{self.subject}: {self._done} of {self._total} answers")

    def _count(self, kind: str, requests: Sequence[Any]) -> None:
        if self.repeat:
            return
        self.requests += len(requests)
        for request in requests:
            texts = request.args if kind == "loglikelihood" else request.args[:1]  # without settings of generation
            self._digest.update(json.dumps([kind, *texts]).encode())

    def _key(self, kind: str, arguments: Sequence[Any]) -> str:
        return hashlib.sha256(json.dumps([self.repeat, kind, *arguments], sort_keys=True).encode()).hexdigest()

    def _take(self, key: str) -> Any:
        """The next known answer to that request, or None: the same request may be asked more than once."""
        return self._known[key].popleft() if self._known.get(key) else None


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True) + "\n"


def _read(path: Path, depends_on: dict[str, Any]) -> dict[str, deque]:
    """{key: answers} of the file; of none if it is not there, or of something else."""
    known: dict[str, deque] = defaultdict(deque)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if not whole or whole[0] != _line(depends_on):
        return known
    for line in whole[1:]:
        key, answer = json.loads(line)
        known[key].append(tuple(answer) if isinstance(answer, list) else answer)
    return known
