"""Disks that take nothing: one that is full while a rule's job runs, and one that is read-only."""

import contextlib
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from building import Build, environment

from .bits import CHAIN, CHECKS, OWN, README, TOKENS
from .scene import MODEL, PACKED, Outcome, error_line, half_written, run, same_bytes

# What a rule's job is run for: a result of it, which is deleted before.
RESULTS = {
    "source_file": f"{CHECKS}/files/config.json.json",
    "source": f"{CHECKS}/source.json",
    "calibrate": TOKENS,
    "embed": f"{CHAIN}/embedded.safetensors",
    "reference": f"{CHAIN}/hidden_1.safetensors",
    "keep": f"results/{MODEL}/prune/keep.json",
    "prune_evaluate": f"results/{MODEL}/prune/evaluate.json",
    "quantize": f"{OWN}/blocks/1.safetensors",
    "pack": PACKED,
    "verify": f"{OWN}/verify.json",
    "evaluate": f"{OWN}/evaluate.json",
    "benchmark_source": f"results/reference/{MODEL}/benchmark/tiny.json",
    "benchmark": f"{OWN}/benchmark.json",
    "deploy": f"{OWN}/deploy.json",
    "plot_release": f"{OWN}/model/loss.png",
    "plot_saliency": f"{OWN}/model/saliency.png",
    "provenance": f"{OWN}/model/provenance.json",
    "sbom": f"{OWN}/model/sbom.cdx.json",
    "release_card": README,
    "checksums": f"{OWN}/model/SHA256SUMS",
    "plot_build": "results/card/loss.png",
    "plot_experts": "results/card/experts.png",
    "card": "model_card.md",
}
LIMIT = 64 << 10  # bytes of a file, where nothing can be mounted; Snakemake copies rules of half that size

ATTEMPTS = 5


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Puts `folder` on a tmpfs with a few megabytes to spare; False where this user may not mount one."""
    aside = folder.rename(folder.with_name(f"{folder.name}.aside"))
    folder.mkdir()
    size = sum(path.stat().st_size for path in aside.rglob("*")) * 2 + (16 << 20)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        folder.rmdir()
        aside.rename(folder)
        yield False
        return
    subprocess.run(["cp", "-a", f"{aside}/.", str(folder)], check=True)
    shutil.rmtree(aside)
    try:
        yield True
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(build: Build, rule: str, wanted: dict[str, str]) -> Outcome:
    """Fills the disk of the build when the job of `rule` has begun, and makes room for the same command again."""
    target, filler, seconds = RESULTS[rule], build.directory / "results/filler", 0.0
    for _ in range(ATTEMPTS):
        (build.directory / target).unlink()
        with _filling(build.directory / "logs" / rule, filler):
            done, took = run(build, target)
        seconds += took
        filler.unlink(missing_ok=True)
        if done.returncode:
            break  # else the job had ended before the disk was full
    return _after(f"disk full in {rule}", build, target, wanted, done, seconds)


def limited_files(build: Build, rule: str, wanted: dict[str, str]) -> Outcome:
    """As `full_disk`, by a limit on the size of a file: for a rule with a result larger than LIMIT."""
    target, start = RESULTS[rule], time.monotonic()
    (build.directory / target).unlink()
    done = subprocess.run(
        build.command(target),
        cwd=build.directory,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT)),
    )
    seconds = time.monotonic() - start
    return _after(f"files of {LIMIT} bytes at most in {rule}", build, target, wanted, done, seconds)


def _after(
    fault: str,
    build: Build,
    target: str,
    wanted: dict[str, str],
    done: subprocess.CompletedProcess,
    seconds: float,
) -> Outcome:
    line, wrong = error_line(done), half_written(build)
    found = done.returncode != 0 and "not written" in line and not (build.directory / target).exists()
    again, more = run(build, target)
    alike = again.returncode == 0 and not wrong and same_bytes(build, wanted)
    return Outcome(fault, "found" if found else "NOT FOUND", line, alike, seconds + more)


@contextlib.contextmanager
def _filling(logs: Path, filler: Path) -> Iterator[None]:
    """Fills the disk of `filler` as soon as a job of the rule of `logs` has opened its log."""
    stop = threading.Event()
    watcher = threading.Thread(target=_fill_when_begun, args=(logs, filler, stop))
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _fill_when_begun(logs: Path, filler: Path, stop: threading.Event) -> None:
    begun = time.time_ns()
    while not stop.is_set():
        found = [logs.with_suffix(".log"), *(logs.rglob("*.log") if logs.is_dir() else [])]
        if any(path.is_file() and path.stat().st_mtime_ns > begun for path in found):
            _fill(filler)
            return
        time.sleep(0.001)


def _fill(filler: Path) -> None:
    with filler.open("wb") as file:
        for _ in range(ATTEMPTS):
            with contextlib.suppress(OSError):  # somebody else wrote meanwhile
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(filler.parent).free)
                return


def read_only(build: Build, wanted: dict[str, str]) -> Outcome:
    """A build whose results, a disk of their own, can't be written; then the same command when they can."""
    results, target = build.directory / "results", RESULTS["verify"]
    (build.directory / target).unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(results)], check=True)
    done, seconds = run(build, target)
    subprocess.run(["mount", "-o", "remount,rw", str(results)], check=True)
    line, wrong = error_line(done), half_written(build)
    again, more = run(build, target)
    alike = again.returncode == 0 and not wrong and same_bytes(build, wanted)
    how = "found" if done.returncode != 0 and str(results) in line else "NOT FOUND"
    return Outcome("results on a read-only disk", how, line, alike, seconds + more)
