"""One build at a time in a directory: what Snakemake is asked for beside a living build does it no harm."""

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from building import Build, lay_out

from requant.gate import FAILURE

SOURCE = "results/source/ll/source.json"
GATE = f"results/ll-nvfp4/{FAILURE}"
LOOKS = (
    ("--list",),
    ("--lint",),
    ("--summary",),
    ("--report", "report.html"),
    ("-n", SOURCE),
    ("plan",),
)
BUILDS = (
    ("results/demo/test/stories.jsonl",),  # of other files: Snakemake's own locks would let it go on
    ("--nolock", SOURCE),
    ("--unlock",),
    ("--delete-all-output",),
)


@pytest.fixture
def living(tmp_path):
    """A build that was stopped amid its jobs, with a failed load test: (build, its process, what it has of its own)."""
    build = lay_out(tmp_path, ("ll",))
    process = build.start(
        SOURCE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    locks, end = build.directory / ".snakemake/locks", time.monotonic() + 60
    while not list(locks.glob("*.output.lock")) and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGSTOP)
    (build.directory / GATE).parent.mkdir(parents=True)
    (build.directory / GATE).write_text("the load test failed\n")
    own = {path: path.read_bytes() for path in [*locks.iterdir(), build.directory / GATE]}
    assert len(own) >= 2
    yield build, process, own
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def told(build: Build, arguments: tuple[str, ...]) -> subprocess.CompletedProcess:
    """The answer to a command whose first word may be an option."""
    return build.run("--", *arguments, check=False) if arguments[0][0] != "-" else build.run(*arguments, check=False)


def kept(own: dict[Path, bytes]) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in own if path.exists()}


def test_one_build_at_a_time(living):
    """All of these beside one living build, which ends well afterwards."""
    build, process, own = living
    line = f"another build is running here (process {process.pid})"
    with ThreadPoolExecutor(2) as pool:
        looked = dict(zip(LOOKS, pool.map(lambda words: told(build, words), LOOKS), strict=True))
        assert kept(own) == own
        refused = dict(zip(BUILDS, pool.map(lambda words: told(build, words), BUILDS), strict=True))
    assert kept(own) == own
    failed = {words for words, done in looked.items() if done.returncode != 0}
    assert failed <= {("--report", "report.html")}, "it needs finished outputs"
    assert [words for words, done in looked.items() if f"error: {line}" in done.stderr] == []
    for words, done in refused.items():
        assert done.returncode != 0, words
        assert done.stderr.count(f"error: {line}: wait for it or end it") == 1, (words, done.stderr)
    os.killpg(process.pid, signal.SIGCONT)
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()[-3000:]
    assert (build.directory / SOURCE).exists() and (build.directory / GATE).exists(), "its own gate was opened before"
    assert build.run(SOURCE).returncode == 0 and not (build.directory / GATE).exists()


def test_records_of_snakemake_in_a_database_are_refused(tmp_path):
    build = lay_out(tmp_path, ("ll",))
    done = build.run(SOURCE, "--persistence-backend", "db", check=False)
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode != 0 and len(lines) == 1
    assert lines[0].startswith("error: --persistence-backend: 'db' found; expected file: ")
    assert not (tmp_path / ".snakemake/metadata.db").exists() and not (tmp_path / "results").exists()
