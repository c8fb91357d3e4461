"""SIGKILL: of the whole process group, as a power cut ends it, and of Snakemake alone; at random, and amid writes."""

import os
import random
import signal
import subprocess
import time

from building import Build

from .scene import Outcome, digests, half_written, run, same_bytes

PARTIAL = "**/.*.partial"
LONGEST = 600.0  # seconds until a build writes something


def kill_once(build: Build, target: str, wait: float, passed_over: int | None, group: bool) -> str | None:
    """Starts a build and kills it; what was going on then, or None if the build had ended before.

    That is after `wait` seconds, or while a file is written, some others `passed_over`.
    """
    process = build.start(
        target,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    start = time.monotonic()
    waited = _await_time(process, wait) if passed_over is None else _await_write(build, process, passed_over)
    if process.poll() is not None:
        return None
    (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    who = "all its processes" if group else "Snakemake alone"
    return f"SIGKILL of {who} after {time.monotonic() - start:.1f} s{waited}"


def _await_time(process: subprocess.Popen, wait: float) -> str:
    end = time.monotonic() + wait
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    return ""


def _await_write(build: Build, process: subprocess.Popen, passed_over: int) -> str:
    """Returns as soon as a file is being written, after some others that are `passed_over`."""
    seen = set((build.directory / "results").glob(PARTIAL))  # left by earlier kills
    passed_over += len(seen)
    end = time.monotonic() + LONGEST
    while process.poll() is None and time.monotonic() < end:
        for path in (build.directory / "results").glob(PARTIAL):
            if path not in seen and len(seen) == passed_over:
                return f", amid the writing of {path.relative_to(build.directory)}"
            seen.add(path)
    return ""


def killed(
    build: Build, target: str, wanted: dict[str, str], kills: int, longest: float, seed: int = 0
) -> list[Outcome]:
    """Kills the build `kills` times, within `longest` seconds of each start, and lets it end then.

    Every second one amid a write, every third one of Snakemake alone. A build that ends in between starts anew.
    """
    draw, outcomes = random.Random(seed), []
    while len(outcomes) < kills:
        number = len(outcomes)
        passed_over = draw.randrange(3) if number % 2 else None
        what = kill_once(build, target, draw.uniform(0.5, longest), passed_over, group=number % 3 != 2)
        if what is None:
            _start_anew(build)
            continue
        wrong = half_written(build)
        outcomes.append(Outcome(what, "resumed", "; ".join(wrong), not wrong, 0.0))
    done, seconds = run(build, target)
    alike = done.returncode == 0 and same_bytes(build, wanted) and not leftovers(build)
    line = "" if done.returncode == 0 else (done.stdout + done.stderr)[-500:]
    return [*outcomes, Outcome(f"the same command after {kills} kills", "resumed", line, alike, seconds)]


def _start_anew(build: Build) -> None:
    for path in digests(build):
        (build.directory / path).unlink()
    for pattern in ("results/*/pack.json", "results/*/blocks/*", "results/reference/**/*.safetensors"):
        for path in build.directory.glob(pattern):
            path.unlink()


def leftovers(build: Build) -> list[str]:
    """Temporary files beside those of the release."""
    return [path.name for path in build.directory.glob("results/*/model/.*")]
