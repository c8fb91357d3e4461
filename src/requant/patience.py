"""Failures that may pass are waited out: an action is tried again, more patiently each time, and not for ever."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from requant.errors import RequantError
from requant.jobs import progress

COMPUTES = False  # when something is asked for, not what comes
WAITS = (1, 4, 15, 60)  # seconds before each further attempt

Result = TypeVar("Result")


@dataclass(frozen=True)
class Server:
    """Who is asked, and how its failures are told: what went wrong (None if it is none of the server's failures), and
    whether the same may succeed later."""

    name: str
    describe: Callable[[Exception], str | None]
    may_pass: Callable[[Exception], bool]


def tried(
    server: Server, action: Callable[[], Result], what: str, kept: Callable[[], int], waits: Sequence[float]
) -> Result:
    """The result of `action`, which is tried again after a failure that may pass, as often as there are `waits`.

    `kept` counts the bytes that attempts leave behind: one that brought any starts the count of attempts anew.
    Raises RequantError with one line that begins with `what`; what the server's library raised is not chained to it.
    """
    failures, before = 0, kept()
    while True:
        try:
            return action()
        except Exception as error:
            reason = server.describe(error)
            if reason is None:
                raise
            if not server.may_pass(error):
                raise RequantError(f"{what}: {reason}") from None
        now = kept()
        failures, before = (1 if now > before else failures + 1), now
        if failures > len(waits):
            raise RequantError(
                f"{what}: {reason}, {failures} times in a row; run the same command again when {server.name} answers"
            )
        progress(f"{what}: {reason}; next attempt in {waits[failures - 1]} s")
        time.sleep(waits[failures - 1])
