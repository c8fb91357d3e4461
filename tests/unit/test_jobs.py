"""Around a job: one-line errors, an end with the parent, left-over locks, imported modules."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from requant import buildlock

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src")}


def run_python(code, **options):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, **options)


def test_an_expected_error_is_one_line_and_its_traceback_in_the_log(tmp_path):
    done = run_python(
        """
        from requant.errors import RequantError
        from requant.jobs import job
        with job("logs/x.log"):
            print("library talk")
            raise RequantError("shard-3: 5 bytes found; expected 7")
        """,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().split("\n")) == 1
    assert done.stderr.strip().endswith("error: shard-3: 5 bytes found; expected 7 (see logs/x.log)")
    assert done.stdout == ""
    log = (tmp_path / "logs/x.log").read_text()
    assert "library talk" in log and "Traceback" in log


def test_an_unexpected_error_names_the_log(tmp_path):
    done = run_python(
        """
        from requant.jobs import job
        with job("logs/x.log"):
            {}["key"]
        """,
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "error: KeyError: 'key' (see logs/x.log)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_that_a_library_meets_is_named_with_what_to_do(tmp_path):
    """A line of the log names no file, and is written by whoever prints it."""
    done = run_python(
        """
        import errno, os
        from requant.jobs import job
        with job("logs/x.log"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        """,
        cwd=tmp_path,
    )
    line = "error: a file of this job: not written: No space left on device; make room, then run the same command again"
    assert done.returncode == 1 and f"{line} (see logs/x.log)" in done.stderr


def test_a_file_that_may_not_be_read_is_no_full_disk(tmp_path):
    done = run_python(
        """
        import errno, os
        from requant.jobs import job
        with job("logs/x.log"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), "secret")
        """,
        cwd=tmp_path,
    )
    assert "error: PermissionError: [Errno 13] Permission denied: 'secret'" in done.stderr


def test_a_job_ends_with_its_parent(tmp_path):
    """SIGKILL of the build must not leave a job that goes on writing."""
    job = 'import time; from requant.jobs import job\nwith job("x.log"):\n open("started", "w").close(); time.sleep(60)'
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {job!r}])"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    _wait(lambda: (tmp_path / "started").exists())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _wait(lambda: not _members(parent.pid))


def _members(group):
    """Processes of a group that are alive."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _wait(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


TAKE_LOCK = "from requant.buildlock import drop_stale_locks; print(drop_stale_locks('.'), flush=True)"


def living_build(directory):
    """A process that holds the build lock of `directory`, and what it printed: the locks that it dropped."""
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_LOCK + "; input()"],
        cwd=directory,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def kill(process):
    process.kill()
    process.wait()


def test_a_dead_builds_lock_is_dropped_and_a_living_ones_kept(tmp_path):
    locks = tmp_path / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    first, dropped = living_build(tmp_path)
    assert dropped == "[]"
    (locks / "0.input.lock").write_text("a\n")
    second, dropped = living_build(tmp_path)
    assert dropped == "[]", "a build is alive: its lock stays"
    kill(first)
    assert run_python(TAKE_LOCK, cwd=tmp_path).stdout.strip() == "[]", "the second build is alive still"
    assert (locks / "0.input.lock").exists()
    kill(second)
    assert run_python(TAKE_LOCK, cwd=tmp_path).stdout.strip() == "['0.input.lock']"
    assert not list(locks.iterdir())


def test_a_second_build_is_told_which_process_is_in_its_way(tmp_path):
    look = "from requant.buildlock import *; drop_stale_locks('.', builds=False); print(other_build('.'))"

    def told():
        return run_python(look, cwd=tmp_path).stdout.strip()

    locks = tmp_path / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    first, _ = living_build(tmp_path)
    assert told() == "None", "it holds none of Snakemake's locks yet"
    (locks / "0.input.lock").write_text("a\n")
    assert told() == f"process {first.pid}"
    second, _ = living_build(tmp_path)
    assert told() == f"process {first.pid}", "the second did not take the first one's place"
    kill(first)
    third, _ = living_build(tmp_path)
    assert told() == f"process {third.pid}", "the first is dead"
    kill(third)
    assert told() == "None"
    kill(second)
    assert told() == "None" and not list(locks.iterdir())


@pytest.mark.parametrize(
    ("fstype", "options", "dropped"),
    [
        ("ext4", "rw", True),
        ("nfs4", "rw,vers=4.2,local_lock=none", True),
        ("nfs", "rw,vers=3,local_lock=flock", False),
        ("lustre", "rw,flock", True),
        ("lustre", "rw,localflock", False),
        ("fuse.shared", "rw", False),
    ],
)
def test_what_another_machines_build_left_is_dropped_where_all_machines_see_a_lock(
    tmp_path, monkeypatch, fstype, options, dropped
):
    """The build that took the lock is on node1; this one, on node2, gets the lock too: as after a crash of node1, or
    because the mount keeps locks to itself. (A stand-in: this machine's mounts are told otherwise.)"""
    disk = SimpleNamespace(device="server:/x", mountpoint=str(tmp_path), fstype=fstype, opts=options)
    root = SimpleNamespace(device="/dev/x", mountpoint="/", fstype="ext4", opts="rw")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [root, disk])
    locks = tmp_path / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    assert buildlock.drop_stale_locks(tmp_path) == []
    os.close(buildlock._held.pop())
    (locks / "0.input.lock").write_text("a\n")
    monkeypatch.setattr(socket, "gethostname", lambda: "node2")
    assert buildlock.drop_stale_locks(tmp_path) == (["0.input.lock"] if dropped else [])
    os.close(buildlock._held.pop())
    assert buildlock.other_build(tmp_path) == (None if dropped else f"process {os.getpid()} of node1")
    (locks / "0.input.lock").unlink(missing_ok=True)  # as --unlock does
    assert buildlock.drop_stale_locks(tmp_path) == [] and buildlock.other_build(tmp_path) is None
    os.close(buildlock._held.pop())


def test_planning_needs_no_torch():
    """`snakemake -n` and the cards must not pay seconds for imports they do not use."""
    done = run_python(
        """
        import sys
        import requant.architecture, requant.benchmark, requant.buildlock, requant.calibration, requant.card
        import requant.config, requant.imports, requant.locks, requant.provenance, requant.records
        print([name for name in ("torch", "transformers", "lm_eval") if name in sys.modules])
        """
    )
    assert done.stdout.strip() == "[]", done.stderr
