"""Which process is meant, and whether it has ended: a number alone may be another process's by now."""

import os
import socket
from dataclasses import dataclass

COMPUTES = False  # who runs, not what is computed
SAME_SECONDS = 60.0  # how far a process's start may seem to move when the clock is set


@dataclass(frozen=True)
class Process:
    """A process of the machine `host`: its number, and when it was started, in seconds since 1970."""

    host: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> "Process":
        import psutil

        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    @classmethod
    def read(cls, text: str) -> "Process | None":
        """The process that `str` gave the text of; None for any other text."""
        pid, _, rest = text.partition(" ")
        started, _, host = rest.partition(" ")
        try:
            return cls(host, int(pid), float(started)) if host else None
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"{self.pid} {self.started} {self.host}"

    @property
    def is_elsewhere(self) -> bool:
        return self.host != socket.gethostname()

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended: of another machine's process nothing is."""
        import psutil

        if self.is_elsewhere:
            return False
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.started) < SAME_SECONDS
            return not same or found.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
