"""The error a user sees: one line that names the file or key, what was found, what was expected and what to do."""


class RequantError(Exception):
    """A failure that the user can mend. Its message is one complete line; the traceback goes to the log only."""
