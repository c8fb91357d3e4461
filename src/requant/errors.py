"""The error a user sees: one line that names the file or key, what was found, what was expected and what to do."""

COMPUTES = False  # the error itself


class RequantError(Exception):
    """A failure that the user can mend. Its message is one complete line; the traceback goes to the log only."""


def brief(found: object, limit: int = 80) -> str:
    """`found` as an error shows it: its repr on one line of printable characters, the middle cut out of a long one."""
    text = repr(found)
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 4 :]}"


def plain(text: object, limit: int = 200) -> str:
    """What a library says, for an error: on one line of printable characters, cut after `limit`."""
    line = "".join(part if part.isprintable() else "?" for part in " ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[:limit]}…"
