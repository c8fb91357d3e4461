"""A clock that was set back, and a second Snakemake beside a living one."""

import os
import shlex
import subprocess
import time
from pathlib import Path

from building import Build

from .scene import PACKED, RELEASE, Outcome, error_line, half_written, run, same_bytes

DAY = 86_400
BUSY = "another build is running here"
AHEAD = "ahead of this machine's clock"


def _shift(folder: Path, seconds: float) -> None:
    """Moves the times of all files of `folder` by so much."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            times = path.stat()
            os.utime(path, (times.st_atime + seconds, times.st_mtime + seconds))


# By name: the folder whose files have times that no running clock gives, and by how much they are wrong.
CLOCKS = {
    "results of tomorrow": ("results", DAY),
    "results of thirty years ago": ("results", -30 * 365 * DAY),
    "a source of tomorrow": ("models", DAY),
}


def clock_set(build: Build, name: str, wanted: dict[str, str]) -> Outcome:
    """A build that lacks a block, with times as a clock that was set leaves them: it ends in the same bytes.

    One that is refused for times ahead of the clock goes on after the command that its line names.
    """
    folder, seconds = CLOCKS[name]
    _shift(build.directory / folder, seconds)
    for missing in (f"results/{RELEASE}/blocks/1.safetensors", PACKED):
        (build.directory / missing).unlink()
    done, took = run(build, PACKED)
    how, line = "resumed", ""
    if AHEAD in error_line(done):
        how, line = "found", error_line(done)
        subprocess.run(shlex.split(line.rpartition(": ")[2]), cwd=build.directory, check=True)
        done, more = run(build, PACKED)
        took += more
    wrong = half_written(build)
    if done.returncode or wrong:
        line = "; ".join(wrong) or (done.stdout + done.stderr)[-500:]
    return Outcome(name, how, line, done.returncode == 0 and not wrong and same_bytes(build, wanted), took)


def second_build(build: Build, wanted: dict[str, str]) -> Outcome:
    """The same command while it runs already: refused with a line, and the first one ends as if it had been alone."""
    for missing in (f"results/{RELEASE}/blocks/1.safetensors", PACKED):
        (build.directory / missing).unlink()
    start, log = time.monotonic(), build.directory / f"logs/quantize/{RELEASE}/1.log"
    log.unlink(missing_ok=True)
    first = build.start(
        PACKED,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not log.exists() and first.poll() is None:
        time.sleep(0.01)
    second, _ = run(build, PACKED)
    ended = first.wait()
    line = next((line for line in second.stderr.splitlines() if BUSY in line), "")
    how = "found" if second.returncode != 0 and line else "NOT FOUND"
    alike = ended == 0 and not half_written(build) and same_bytes(build, wanted)
    return Outcome("a second Snakemake", how, line, alike, time.monotonic() - start)
