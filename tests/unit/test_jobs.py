"""Around a job: one-line errors, an end with its build, one build at a time, imported modules."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from requant import buildlock
from requant.errors import RequantError

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


BUILD = """
from requant.buildlock import alone
with alone('.') as dropped:
    print(dropped, flush=True)
    input()
"""


def living_build(directory):
    """A process that has `directory` to itself, and what it printed: the locks that it dropped."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD],
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


@pytest.fixture
def lock(tmp_path) -> Path:
    """A lock file of Snakemake's, as a build has one from its start to its end."""
    path = tmp_path / ".snakemake/locks/0.input.lock"
    path.parent.mkdir(parents=True)
    path.write_text("a\n")
    return path


def test_a_dead_builds_lock_is_dropped_and_a_living_one_has_the_directory_to_itself(lock, tmp_path, monkeypatch):
    monkeypatch.setattr(buildlock, "PATIENCE", 0.2)
    first, dropped = living_build(tmp_path)
    assert dropped == "['0.input.lock']", "of a build that nobody knows"
    lock.write_text("a\n")
    with pytest.raises(RequantError) as error, buildlock.alone(tmp_path):
        pass
    line = f"another build is running here (process {first.pid}): wait for it or end it"
    assert str(error.value) == line and lock.exists()
    with pytest.raises(RequantError, match="another build"), buildlock.alone(tmp_path, True):
        pass
    kill(first)
    with buildlock.alone(tmp_path) as dropped:
        assert dropped == ["0.input.lock"] and not lock.exists()
    second, dropped = living_build(tmp_path)
    assert dropped == "[]", "the one before has ended well"
    kill(second)


def test_who_only_looks_is_told_of_a_build_and_drops_the_lock_of_a_dead_one(lock, tmp_path):
    assert buildlock.drop_stale_locks(tmp_path) is None and lock.exists(), "nothing is known here, nothing is made"
    assert not (tmp_path / ".snakemake/requant.lock").exists()
    first, _ = living_build(tmp_path)
    lock.write_text("a\n")
    assert buildlock.drop_stale_locks(tmp_path) == f"process {first.pid}" and lock.exists()
    kill(first)
    assert buildlock.drop_stale_locks(tmp_path) is None and not lock.exists()


def test_a_build_waits_for_one_that_only_looks(tmp_path):
    with buildlock.alone(tmp_path):
        pass
    handle = os.open(tmp_path / ".snakemake/requant.lock", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    threading.Timer(0.3, os.close, [handle]).start()
    with buildlock.alone(tmp_path) as dropped:
        assert dropped == []


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
    lock, tmp_path, monkeypatch, fstype, options, dropped
):
    """The build that took the lock is on node1; this one, on node2, gets the lock too: as after a crash of node1, or
    because the mount keeps locks to itself. (A stand-in: this machine's mounts are told otherwise.)"""
    disk = SimpleNamespace(device="server:/x", mountpoint=str(tmp_path), fstype=fstype, opts=options)
    root = SimpleNamespace(device="/dev/x", mountpoint="/", fstype="ext4", opts="rw")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [root, disk])
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    with buildlock.alone(tmp_path):
        lock.write_text("a\n")
    monkeypatch.setattr(socket, "gethostname", lambda: "node2")
    if dropped:
        assert buildlock.drop_stale_locks(tmp_path) is None and not lock.exists()
        return
    assert buildlock.drop_stale_locks(tmp_path) == f"process {os.getpid()} of node1"
    with pytest.raises(RequantError) as error, buildlock.alone(tmp_path):
        pass
    assert str(error.value).startswith(f"another build is running here (process {os.getpid()} of node1), or has been")
    assert lock.exists()
    with buildlock.alone(tmp_path, even_beside_other_machines=True) as removed:  # as --unlock does
        assert removed == ["0.input.lock"]
    with buildlock.alone(tmp_path) as removed:
        assert removed == []


def test_without_locks_of_the_file_system_the_process_is_asked_for(lock, tmp_path, monkeypatch):
    """(A stand-in: this machine's files can't be locked.)"""

    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    first, _ = living_build(tmp_path)
    lock.write_text("a\n")
    monkeypatch.setattr(buildlock.fcntl, "flock", refused)
    with pytest.raises(RequantError, match=rf"^another build is running here \(process {first.pid}\)"):
        buildlock.alone(tmp_path).__enter__()
    assert buildlock.drop_stale_locks(tmp_path) is None and lock.exists()
    kill(first)
    with buildlock.alone(tmp_path) as dropped:
        assert dropped == ["0.input.lock"]


def test_a_job_whose_build_died_before_it_began_does_nothing(tmp_path):
    """Its imports took long: by the time it looks, whoever was its parent is gone, and its new one lives on."""
    job = "import sys; from requant.jobs import job\nwith job('x.log'):\n open('written', 'w').close()"
    start = (
        "import subprocess, sys, time; from requant.jobs import announce_build; announce_build()\n"
        f"late = 'import time; time.sleep(1.5)\\n' + {job!r}\n"
        "print(subprocess.Popen([sys.executable, '-c', late]).pid, flush=True); time.sleep(60)"
    )
    build = subprocess.Popen(
        [sys.executable, "-c", start], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    started = psutil.Process(int(build.stdout.readline()))
    kill(build)
    _wait(lambda: not started.is_running() or started.status() == psutil.STATUS_ZOMBIE)
    assert list(tmp_path.iterdir()) == [], "neither a log nor an output"


def test_a_job_of_a_living_build_is_not_its_starters(tmp_path):
    """A build that is announced counts, not the process between: that may end first."""
    done = run_python(
        """
        import os, subprocess, sys
        from requant.jobs import announce_build
        announce_build()
        job = "from requant.jobs import job\\nwith job('x.log'):\\n open('written', 'w').close()"
        between = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
        subprocess.run([sys.executable, "-c", between, job])
        import time
        end = time.monotonic() + 20
        while not os.path.exists("written") and time.monotonic() < end: time.sleep(0.05)
        print(os.path.exists("written"))
        """,
        cwd=tmp_path,
    )
    assert done.stdout == "True\n", done.stderr


def test_what_asks_for_input_in_a_job_gets_none(tmp_path):
    """As of a terminal where nobody is: the pipe stays open, and nothing comes."""
    asked, never_answered = os.pipe()
    done = run_python(
        """
        from requant.jobs import job
        with job("x.log"):
            input("Do you wish to run the custom code? [y/N] ")
        """,
        cwd=tmp_path,
        stdin=asked,
    )
    os.close(asked)
    os.close(never_answered)
    assert done.returncode == 1 and "error: EOFError" in done.stderr


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
