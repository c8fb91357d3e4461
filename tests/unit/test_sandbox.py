"""The sandbox for programs that models write: what tries to get out, or to stay, fails; an honest program passes.

Each attack runs in each sandbox that there is: bubblewrap as the user who runs the tests, bubblewrap as user nobody
where that is root, and a container of a real Docker engine with this machine's Python.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import uuid
from functools import partial
from io import BytesIO
from pathlib import Path

import psutil
import pytest

from requant import confined, sandbox
from requant.config import Sandbox
from requant.errors import RequantError
from requant.sandbox import Backend, Limits, SandboxResult, humaneval_program, run_all, run_untrusted, which_sandbox

ROOT = Path(__file__).parents[2]
LIMITS = Limits(memory_mb=256, seconds=10, processes=6)
SHORT = Limits(memory_mb=256, seconds=1.5, processes=6)
SANDBOXES = ("bubblewrap", "bubblewrap as nobody", "docker")
SYSTEM_PYTHON = Path("/usr/bin/python3")

# Helpers of the programs below: each attempt prints one line, `NAME: ` and what came of it.
ATTEMPT = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, function, *values):
    try:
        found = function(*values)
    except OSError as error:
        found = type(error).__name__ if error.errno is None else os.strerror(error.errno)
    print(f"{name}: {found}")
def call(function, *values):
    if function(*values) == -1:
        raise OSError(ctypes.get_errno(), "")
    return "escaped"
"""


@pytest.fixture(scope="module")
def bubblewrap() -> Backend:
    if shutil.which("bwrap") is None:
        pytest.skip("needs bwrap (Debian: bubblewrap)")
    return which_sandbox(Sandbox(backend="bubblewrap"))


@pytest.fixture(params=SANDBOXES)
def run(request, monkeypatch):
    """run_untrusted(program, limits) in one of the sandboxes; `run.backend` is which."""
    if request.param == "docker":
        monkeypatch.setenv("DOCKER_HOST", request.getfixturevalue("docker_engine").url)
        backend = which_sandbox(Sandbox(backend="docker"))
    else:
        backend = request.getfixturevalue("bubblewrap")
    user = as_nobody if request.param == "bubblewrap as nobody" and os.geteuid() == 0 else lambda function: function()

    def run(program: str, limits: Limits = LIMITS) -> SandboxResult:
        return user(lambda: run_untrusted(textwrap.dedent(program), limits, backend))

    run.backend = backend
    return run


def as_nobody(function):
    """What `function` returns in a child of user nobody, with a Python that nobody may read."""
    if not SYSTEM_PYTHON.exists():
        pytest.skip(f"needs {SYSTEM_PYTHON} (Debian: python3)")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            os.setgroups([])
            os.setresgid(confined.NOBODY, confined.NOBODY, confined.NOBODY)
            os.setresuid(confined.NOBODY, confined.NOBODY, confined.NOBODY)
            sys._base_executable, sys.base_prefix = str(SYSTEM_PYTHON), "/usr"
            os.environ["HOME"] = "/nonexistent"
            os.chdir("/")
            sandbox._host_python.cache_clear()
            try:
                answer = function()
            except Exception as error:
                answer = error
            with os.fdopen(writing, "wb") as file:
                pickle.dump(answer, file)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        data = file.read()
    os.waitpid(child, 0)
    answer = pickle.loads(data)
    if isinstance(answer, Exception):
        raise answer
    return answer


def attempts(result: SandboxResult) -> dict[str, str]:
    """{name: what came of it} of a program of attempts, which has run to its end."""
    assert result.passed, result
    return dict(line.split(": ", 1) for line in result.stdout.splitlines())


def test_honest_program_passes(run):
    prompt = 'def double(x: int) -> int:\n    """Twice x."""\n'
    tests = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n"
    right = run(humaneval_program(prompt, "    return 2 * x\n", tests, "double"))
    assert (right.outcome, right.status, right.stderr) == ("passed", 0, "")
    assert 0 < right.seconds < LIMITS.seconds
    wrong = run(humaneval_program(prompt, "    return x * x\n", tests, "double"))
    assert (wrong.outcome, wrong.status) == ("failed", 1)
    assert "AssertionError" in wrong.stderr


def test_program_that_uses_the_standard_library_passes(run):
    result = run("""
        import asyncio, concurrent.futures, decimal, hashlib, re, subprocess, sys, tempfile, threading
        with tempfile.TemporaryFile() as file:
            file.write(b"x" * 1000)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            assert list(pool.map(abs, [-1, -2])) == [1, 2]
        assert asyncio.run(asyncio.sleep(0, 7)) == 7
        assert subprocess.run([sys.executable, "-S", "-c", "print(5)"], capture_output=True).stdout == b"5\\n"
        print(hashlib.sha256(b"").hexdigest()[:8], __name__, file=sys.stdout)
        sys.stdout.close()
        """)
    assert (result.outcome, result.stdout) == ("passed", "e3b0c442 __main__\n"), result


@pytest.mark.parametrize("leaving", ["import sys; sys.exit(0)", "import os; os._exit(0)"])
def test_program_that_leaves_before_its_tests_has_not_passed(run, leaving):
    result = run(f"{leaving}\nassert False\n")
    assert (result.outcome, result.status) == ("unfinished", 0)


@pytest.mark.parametrize(
    "leaving",
    [
        "raise SystemExit",
        "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])",
        "import os; os.write(3, b'0' * 32 + b'\\n'); os._exit(0)",
        "import os; os.closerange(0, 64); os._exit(0)",
        "print('started', flush=True); print('{\"finished\": true, \"status\": 0}', flush=True); raise SystemExit",
        "import threading, os; threading.Thread(target=os._exit, args=(0,)).start(); \nwhile True: pass",
    ],
    ids=["raises", "becomes", "reports", "closes", "prints", "in a thread"],
)
def test_program_that_pretends_has_not_passed(bubblewrap, leaving):
    result = run_untrusted(f"{leaving}\nassert False\n", LIMITS, bubblewrap)
    assert (result.outcome, result.status) == ("unfinished", 0)


@pytest.mark.parametrize(
    ("program", "status", "word"),
    [
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("def f(): f()\nf()", 1, "RecursionError"),
        ("import sys; sys.exit(3)", 3, ""),
        ("x = (", 1, "SyntaxError"),
        ("x = '\0'", 1, "null bytes"),
        ("x = '\ud800'", 1, "Error"),
    ],
    ids=["segfault", "abort", "kill", "recursion", "exit", "syntax", "nul", "surrogate"],
)
def test_program_that_breaks_has_failed(bubblewrap, program, status, word):
    result = run_untrusted(program, LIMITS, bubblewrap)
    assert (result.outcome, result.status) == ("failed", status)
    assert word in result.stderr


def test_crash_is_told_as_what_it_was(run):
    result = run("import ctypes; ctypes.string_at(0)")
    assert (result.outcome, result.status) == ("failed", -signal.SIGSEGV)


def test_files_of_this_machine_are_not_there(run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("token", encoding="utf-8")
    secret.chmod(0o644)
    hidden = [secret, ROOT / "Snakefile", Path.home() / ".bashrc", "/etc/passwd", "/etc/shadow", "/etc/hostname.bak"]
    program = (
        ATTEMPT
        + f"""
for path in {[str(path) for path in hidden]}:
    attempt(path, open, path)
for name in ("environ", "mem", "maps", "root", "cwd", "fd"):
    attempt(name, os.listdir if name in ("root", "cwd", "fd") else open, f"/proc/1/{{name}}")
"""
    )
    found = attempts(run(program))
    assert {found.pop(str(path)) for path in hidden} == {"No such file or directory"}
    assert set(found.values()) == {"Permission denied"} and len(found) == 6


def test_nothing_but_python_is_in_sight(run):
    result = run("""
        import os
        for folder, folders, names in os.walk("/"):
            folders[:] = [name for name in folders if os.path.join(folder, name) not in ("/proc", "/sys", "/dev")]
            if not folder.startswith(("/usr/lib", "/usr/share/zoneinfo", "/lib")):
                print(*(os.path.join(folder, name) for name in names), sep="\\n")
            if folder.count("/") > 2:
                folders.clear()
        print(os.listdir("/tmp"), os.listdir("/dev"), sep="\\n")
        """)
    *files, temporary, devices = result.stdout.split("\n")[:-1]
    python = {str(path) for path in sandbox._host_python().files}
    docker = {"/.dockerenv", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab"}
    near = set(filter(None, files))
    assert near <= python | docker | {"/usr/bin/python3.11"}, near
    assert temporary == "[]"
    assert not {"sda", "vda", "mem", "kmsg", "kvm", "fuse"} & set(eval(devices))


def test_environment_is_empty(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_tell")
    result = run("""
        import contextlib, glob, os
        print(dict(os.environ))
        for path in glob.glob("/proc/[0-9]*/environ"):
            with contextlib.suppress(OSError):
                print(open(path, "rb").read())
        """)
    assert result.passed
    assert eval(result.stdout.splitlines()[0]) == confined.ENVIRONMENT
    assert "hf_do_not_tell" not in result.stdout


def test_program_is_nobody_and_can_become_nothing_else(run):
    result = run("print(open('/proc/self/status').read())")
    status = dict(line.split(":\t", 1) for line in result.stdout.splitlines() if ":\t" in line)
    assert status["Uid"].split() == status["Gid"].split() == ["65534"] * 4
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapAmb"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    program = (
        ATTEMPT
        + """
attempt("setuid", os.setuid, 0)
attempt("setgid", os.setgid, 0)
attempt("unshare", call, libc.unshare, 0x10000000)
attempt("clone", call, libc.syscall, {"x86_64": 56, "aarch64": 220}[os.uname().machine], 0x10000011, 0, 0, 0, 0)
attempt("chroot", os.chroot, "/tmp")
attempt("mount", call, libc.mount, b"none", b"/tmp", b"tmpfs", 0, None)
attempt("remount", call, libc.mount, None, b"/", None, 32, None)
attempt("umount", call, libc.umount2, b"/proc", 2)
"""
    )
    assert set(attempts(run(program)).values()) <= {"Operation not permitted", "Invalid argument"}


def test_no_socket_leads_out(run, tmp_path):
    """Neither to a listener on the loopback, nor to one in the file system or in the abstract names, nor to a name."""
    path = f"/tmp/requant-{uuid.uuid4().hex}"
    with contextlib.ExitStack() as stack:
        listeners = []
        for family, address in (
            (socket.AF_INET, ("127.0.0.1", 0)),
            (socket.AF_UNIX, path),
            (socket.AF_UNIX, "\0" + path),
        ):
            listener = stack.enter_context(socket.socket(family))
            listener.bind(address)
            listener.listen()
            listener.settimeout(0)
            listeners.append(listener)
        stack.callback(os.unlink, path)
        os.chmod(path, 0o777)
        port = listeners[0].getsockname()[1]
        program = (
            ATTEMPT
            + f"""
def connect(family, address):
    socket.socket(family).connect(address)
    return "escaped"
attempt("tcp", connect, socket.AF_INET, ("127.0.0.1", {port}))
attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port})))
attempt("unix", connect, socket.AF_UNIX, {path!r})
attempt("abstract", connect, socket.AF_UNIX, chr(0) + {path!r})
attempt("vsock", connect, socket.AF_VSOCK, (2, 1024))
attempt("raw", connect, socket.AF_PACKET, ("lo", 0))
attempt("name", socket.getaddrinfo, "localhost.localdomain.invalid", 80)
for place in ("/var/run/docker.sock", {path!r}, {os.environ.get("DOCKER_HOST", "unix:///run/docker.sock")[7:]!r}):
    attempt("there " + place, os.stat, place)
print("interfaces:", [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line])
print("listeners:", len(open("/proc/net/tcp").readlines()) - 1, len(open("/proc/net/unix").readlines()) - 1)
"""
        )
        found = attempts(run(program))
        assert found.pop("interfaces") == "['lo']"
        assert found.pop("listeners") == "0 0"
        assert {name: said for name, said in found.items() if not said.startswith(("Operation not", "No such"))} == {
            "name": found["name"]
        }
        assert found["name"] in ("gaierror", "Unknown error -3", "Unknown error -2"), found["name"]
        for listener in listeners:
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_nothing_can_be_written_but_temporary_files(run):
    library = os.path.dirname(os.__file__)
    program = (
        ATTEMPT
        + """
library = os.path.dirname(os.__file__)
for folder in ("/", "/usr", "/usr/lib", "/etc", "/root", "/dev", "/proc", "/lib", library):
    attempt(folder, open, os.path.join(folder, "requant-was-here"), "w")
attempt("change", open, os.__file__, "a")
attempt("remove", os.remove, os.__file__)
attempt("mode", os.chmod, os.__file__, 0o777)
attempt("kernel", open, "/proc/sys/kernel/core_pattern", "w")
attempt("trigger", open, "/proc/sysrq-trigger", "w")
"""
    )
    found = attempts(run(program))
    refusals = {"Read-only file system", "Permission denied", "Operation not permitted", "No such file or directory"}
    assert set(found.values()) <= refusals
    assert not os.path.exists(f"{library}/requant-was-here")


def test_forks_without_end_stop_at_the_limit(run):
    result = run(
        """
        import os, time
        while True:
            try:
                child = os.fork()
            except OSError:
                break
            if child == 0:
                os.write(1, b".")
        time.sleep(60)
        """,
        SHORT,
    )
    assert (result.outcome, result.stdout) == ("timeout", "." * (SHORT.processes - 1))
    threads = run("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()", SHORT)
    assert threads.outcome in ("failed", "timeout")
    assert "can't start new thread" in threads.stderr


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10**10)",
        "import os\nos.fork(); os.fork()\nx = []\nwhile True: x.append(b'1' * 10**6)",
        "i = 0\nwhile True:\n    open(f'/tmp/{i}', 'w').close()\n    i += 1",
        "import mmap\nx = [mmap.mmap(-1, 10**8) for _ in range(100)]\n",
    ],
    ids=["at once", "in children", "in names", "shared"],
)
def test_memory_stops_at_the_limit(run, program):
    result = run(program)
    assert result.outcome == "memory" or "Cannot allocate memory" in result.stderr, result


def test_memory_that_no_process_has_is_refused(run):
    program = (
        ATTEMPT
        + """
attempt("memfd", os.memfd_create, "x")
attempt("shm", call, libc.shmget, 0, 10**8, 0o1600)
attempt("msg", call, libc.msgget, 0, 0o1600)
"""
    )
    assert set(attempts(run(program)).values()) == {"Operation not permitted"}


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
def test_temporary_files_stop_at_their_limit(run, folder):
    program = (
        ATTEMPT
        + f"""
written = 0
def fill():
    global written
    for number in range(20):
        with open(f"{folder}/{{number}}", "wb", 0) as file:
            for _ in range(8):
                written += file.write(bytes(2**20))
attempt("fill", fill)
print("written:", written)
"""
    )
    found = attempts(run(program))
    assert found["fill"] == "No space left on device"
    most = LIMITS.temporary_mb if folder == "/tmp" else sandbox.SHARED_MB
    assert 0 < int(found["written"]) <= most * 2**20


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_stops_at_its_limit(run, stream):
    result = run(f"import sys\nwhile True: sys.{stream}.write('x' * 1000)")
    assert (result.outcome, getattr(result, stream)) == ("output limit", "x" * LIMITS.output_bytes)
    assert result.seconds < LIMITS.seconds


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import signal, time\nfor n in {*range(1, 32)} - {9, 17, 19}: signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)",
    ],
    ids=["works", "stops", "deaf"],
)
def test_time_stops_at_the_limit(run, program):
    result = run(program, SHORT)
    assert (result.outcome, result.status) == ("timeout", None)
    assert SHORT.seconds <= result.seconds < SHORT.seconds + 1


def test_nothing_outlives_the_program(run):
    """A daemon (two forks, a session and output of its own) ends with the sandbox; it was there before."""
    mark = uuid.uuid4().hex
    seen: set[int] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.update(marked(mark))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run(f"""
            import os, sys, time
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.closerange(0, 64)
                    os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(600)", "{mark}"])
                os._exit(0)
            time.sleep(1)
            """)
        left = marked(mark)
    finally:
        over.set()
        watcher.join()
    assert result.passed
    assert len(seen) == 1
    assert left == []


def marked(mark: str) -> list[int]:
    """Processes of this machine with `mark` in their command."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark in process.cmdline():
                found.append(process.pid)
    return found


def test_its_supervisor_can_not_be_ended_stopped_or_read(run):
    program = (
        ATTEMPT
        + """
import signal
attempt("kill", os.kill, 1, signal.SIGKILL)
attempt("stop", os.kill, 1, signal.SIGSTOP)
attempt("terminate", os.kill, os.getppid(), signal.SIGTERM)
attempt("all", os.kill, -1, signal.SIGKILL)
attempt("trace", call, libc.ptrace, 16, 1, 0, 0)
attempt("memory", open, "/proc/1/mem", "r+b")
attempt("output", open, "/proc/1/fd/1", "w")
"""
    )
    found = attempts(run(program))
    # The kernel drops signals to process 1 from its own namespace; that of `all` has nobody else to go to.
    assert [found[name] for name in ("kill", "stop", "terminate")] == ["None"] * 3
    assert found["all"] in ("None", "No such process")
    assert found["trace"] == "Operation not permitted"
    assert {found["memory"], found["output"]} == {"Permission denied"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["bubblewrap", "docker"])
def test_killed_build_leaves_no_sandbox(kind, number, request, monkeypatch):
    if kind == "docker":
        engine = request.getfixturevalue("docker_engine")
        monkeypatch.setenv("DOCKER_HOST", engine.url)
    else:
        request.getfixturevalue("bubblewrap")
    mark = uuid.uuid4().hex
    sleeper = f"[sys.executable, '-S', '-c', 'import time; time.sleep(600)', '{mark}']"
    program = f"import os, sys; os.execv(sys.executable, {sleeper})"
    build = f"""
from requant.config import Sandbox
from requant.sandbox import Limits, run_all, which_sandbox
backend = which_sandbox(Sandbox(backend={kind!r}))
for result in run_all([{program!r}] * 3, Limits(seconds=60), backend, jobs=2):
    print(result)
"""
    process = subprocess.Popen([sys.executable, "-c", build], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(marked(mark)) == 2, 30)
        process.send_signal(number)
        output = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode != 0 and output == b""
    # Outright killed, it can't end them: they end because their input does, and containers remove themselves.
    wait_until(lambda: marked(mark) == [], 3)
    if kind == "docker":
        left = partial(engine.client.containers.list, all=True, filters={"label": sandbox.LABEL}, ignore_removed=True)
        wait_until(lambda: left() == [], 5)


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.05)


def test_many_programs_keep_their_order(bubblewrap):
    programs = [f"import time; time.sleep({0.5 if number == 0 else 0}); print({number})" for number in range(6)]
    results = list(run_all(programs, LIMITS, bubblewrap, jobs=2))
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(6)]


def test_long_program_is_passed_whole(run):
    text = "x = '" + "é" * 500_000 + "'\nassert len(x) == 500_000\nprint(len(x))"
    assert run(text).stdout == "500000\n"


def test_hash_order_is_the_same_each_time(run):
    assert len({run("print(hash('requant'))").stdout for _ in range(2)}) == 1


def test_docker_before_bubblewrap_and_each_by_name(docker_host, bubblewrap):
    assert which_sandbox().kind == "docker"
    assert which_sandbox(Sandbox(backend="bubblewrap")) == bubblewrap
    assert json.loads(json.dumps(bubblewrap.record()))["kind"] == "bubblewrap"


def test_bubblewrap_where_no_engine_answers(bubblewrap, monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    assert which_sandbox() == bubblewrap
    with pytest.raises(RequantError, match=r"^docker: "):
        which_sandbox(Sandbox(backend="docker"))


def test_without_either_it_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequantError) as caught:
        which_sandbox()
    line = str(caught.value)
    assert "docker.io" in line and "(Debian: bubblewrap)" in line and "\n" not in line
    assert "runs only in a sandbox" in line


def test_bubblewrap_that_can_not_start_is_no_sandbox(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequantError, match=r"neither Docker .*No permissions to create new namespace"):
        which_sandbox()


def test_python_that_holds_the_home_directory_is_not_mounted(monkeypatch):
    with pytest.raises(RequantError, match=r"holds .*; expected it elsewhere"):
        sandbox._check_private([Path.home()])


def test_image_with_a_python_of_its_own(docker_host):
    name = f"requant-test-{uuid.uuid4().hex[:12]}"
    docker_host.client.api.import_image_from_data(python_archive(), repository=name, tag="1")
    try:
        backend = which_sandbox(Sandbox(backend="docker", image=f"{name}:1"))
        result = run_untrusted("import os, sys; print(sys.prefix, os.path.exists('/own'))", LIMITS, backend)
        assert (result.outcome, result.stdout) == ("passed", "/usr True\n"), result
    finally:
        docker_host.client.images.remove(f"{name}:1", force=True)


def python_archive() -> bytes:
    """A tar of an image that has this Python, without a package, below /usr, and a folder /own."""
    program = Path(os.path.realpath(sys._base_executable))
    library = Path(os.__file__).resolve().parent
    modules = list((library / "lib-dynload").glob("*.so"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if left_out & {*entry.name.split("/")} or "/config-" in entry.name else entry

    needed = subprocess.run(["ldd", program, *modules], capture_output=True, text=True, check=True).stdout
    data = BytesIO()
    with tarfile.open(fileobj=data, mode="w", dereference=True) as archive:
        archive.add(program, "usr/bin/python3")
        archive.add(library, f"usr/lib/{library.name}", filter=wanted)
        for path in sorted(set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", needed, re.MULTILINE))):
            archive.add(path, path.lstrip("/"))
        for folder, mode in (("tmp", 0o1777), ("own", 0o755)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            archive.addfile(entry)
    return data.getvalue()


def test_image_that_is_nowhere_is_one_line(docker_host):
    backend = which_sandbox(Sandbox(backend="docker", image="127.0.0.1:9/nowhere:1"))
    with pytest.raises(RequantError, match=r"^docker: [^\n]*127\.0\.0\.1:9[^\n]*$"):
        run_untrusted("", LIMITS, backend)
