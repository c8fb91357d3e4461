"""What a failed load test stops: further blocks of its release, also in a build that goes on after errors.

Blocks do not wait for the test, and its record is no input of theirs: what is tuned must not be stale because an engine
is another one now. A failed test leaves its line in a file; block jobs that start afterwards end with it. The next
build begins without that file.
"""

from pathlib import Path

from requant.errors import RequantError
from requant.records import write_text

COMPUTES = False  # it lets a job go on or not

FAILURE = "load_test.failed"


def close(release: Path, line: str) -> None:
    """Notes why the load test of the release in the directory `release` failed."""
    write_text(release / FAILURE, line + "\n")


def open_again(results: Path) -> None:
    """Forgets failed load tests of all releases under `results`."""
    for path in results.glob(f"*/{FAILURE}"):
        path.unlink(missing_ok=True)


def check_open(release: Path) -> None:
    """Raises RequantError with the line of a load test of this release that failed since the build began."""
    path = release / FAILURE
    if path.exists():
        raise RequantError(f"{release.name}: no further blocks: {path.read_text(encoding='utf-8').strip()}")
