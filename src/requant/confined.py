"""What runs first inside a sandbox: process 1 of it, which starts the untrusted program, limits it and tells its end.

`requant.sandbox` hands this file to the sandbox's Python as text; nothing of requant is there, only the standard
library of Python 3.9 or later. It reads a request on standard input (a line with its length, then JSON) and writes
`STARTED`, and at the end a report, one line of JSON, to standard output. The program has neither of the two: its own
output goes into pipes that are read here. As process 1 this one can't be killed or stopped from inside, and it is not
dumpable, so that the program, which has the same user id, can't trace it or read its memory and its open files. When
it ends, the kernel ends all that is left in the sandbox.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import selectors
import signal
import struct
import sys
import tempfile
import time

NOBODY = 65534
STARTED = "started"
WATCH_SECONDS = 0.05
OPEN_FILES = 64
MOST_FILES = 4096  # in /tmp and /dev/shm together: an empty file has no size, and yet takes memory
TEMPORARY = ("/tmp", "/dev/shm")
NICENESS = 5
# Hash order must not differ between runs; PATH is empty, since there are no programs but Python.
ENVIRONMENT = {"HOME": "/tmp", "LANG": "C.UTF-8", "PATH": "", "PYTHONHASHSEED": "0"}

# The program's process: it becomes the program, and says on descriptor 3 that the program's last line was reached.
RUN = """\
import os, sys, types

def run():
    with os.fdopen(0, "rb") as request:
        proof = request.readline()
        text = request.read()
    os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(3, False)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(text, "program.py", "exec", dont_inherit=True), module.__dict__)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            pass
    os.write(3, proof)
    os._exit(0)

run()
"""

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
CLONE_NEWUSER = 0x10000000
NEW_NAMESPACES = 0x7E020000  # the flags of clone that make one
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, AUDIT_ARCH
CLONE, CLONE3 = (56, 220), (435, 435)
# System calls that the program has no use for, by number on x86_64 and on aarch64.
DENIED = {
    "socket": (41, 198),  # some kinds of socket, as AF_VSOCK, know no network namespace
    # namespaces and mounts: with them the program would be root of a place of its own
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # parts of the kernel that were the way out of many a sandbox
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # memory that is no process's: neither RLIMIT_AS nor a sum over processes would see it
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    """Raises OSError if a call of the C library failed."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def prctl(option: int, *values: int) -> None:
    """prctl(2), or OSError."""
    check(libc.prctl(option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4])))


def become_nobody() -> None:
    """Leaves root for good, for user 65534 in a user namespace of its own.

    The kernel doesn't limit the processes of root (RLIMIT_NPROC), nor of anyone whom a user namespace of root's maps;
    and those of 65534 it counts together, all over the machine, unless they are in a namespace of their own.
    """
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    prctl(PR_SET_DUMPABLE, 1)  # the files below are root's in a process that is not
    check(libc.unshare(CLONE_NEWUSER))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {NOBODY} 1"), ("gid_map", f"{NOBODY} {NOBODY} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def deny_system_calls() -> None:
    """Makes DENIED fail with EPERM from now on, in this process and in what it becomes and starts."""
    column, architecture = MACHINES[os.uname().machine]
    load, equal, at_least, bits, end = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, not_permitted, not_there = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026
    number, machine, first_argument = 0, 4, 16
    code = [(load, 0, 0, machine), (equal, 1, 0, architecture), (end, 0, 0, kill)]
    code += [(load, 0, 0, number)]
    code += [(at_least, 0, 1, 0x40000000), (end, 0, 0, not_permitted)]  # the numbers of x32
    for numbers in DENIED.values():
        code += [(equal, 0, 1, numbers[column]), (end, 0, 0, not_permitted)]
    code += [(equal, 0, 1, CLONE3[column]), (end, 0, 0, not_there)]  # its flags are in memory: libc falls back to clone
    code += [(equal, 0, 3, CLONE[column]), (load, 0, 0, first_argument)]
    code += [(bits, 0, 1, NEW_NAMESPACES), (end, 0, 0, not_permitted), (end, 0, 0, allow)]
    text = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(text, len(text))
    program = struct.pack("@HP", len(code), ctypes.addressof(buffer))
    header = ctypes.create_string_buffer(program, len(program))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


def limit(request: dict) -> None:
    """Sets the limits of one process, for good."""
    megabyte = 2**20
    seconds = int(request["seconds"]) + 1
    limits = {
        resource.RLIMIT_AS: request["memory_mb"] * megabyte,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: request["temporary_mb"] * megabyte,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if request["count_processes"]:
        limits[resource.RLIMIT_NPROC] = request["processes"] + 1  # and this one, process 1
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def become_program(request: dict, proof: bytes, output: int, errors: int, report: int, refusal: int) -> None:
    """Turns this process, a child, into the program. It never returns; what kept it from that goes to `refusal`."""
    try:
        with tempfile.TemporaryFile(dir="/tmp") as given:
            given.write(proof + b"\n" + request["program"].encode("utf-8", "surrogatepass"))
            given.flush()
            given.seek(0)
            wanted = (given.fileno(), output, errors, report, refusal)
            *moved, refusal = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 10) for one in wanted]
        for number, one in enumerate(moved):
            os.dup2(one, number)
        os.closerange(len(moved), 10)
        os.nice(NICENESS)
        prctl(PR_SET_DUMPABLE, 1)  # else this process's own file below is root's; nobody is there to trace it yet
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
        limit(request)
        deny_system_calls()
        os.chdir("/tmp")
        os.execve(sys.executable, [sys.executable, "-s", "-S", "-B", "-c", RUN], ENVIRONMENT)
    except BaseException as error:
        os.write(refusal, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(126)


def resident_bytes() -> int:
    """Memory of all processes in the sandbox but this one; pages that they share count for each."""
    pages = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            with contextlib.suppress(OSError), open(f"/proc/{name}/statm", encoding="ascii") as file:
                pages += int(file.read().split()[1])
    return pages * resource.getpagesize()


def files_in_memory() -> int:
    """Number of files that there are in the temporary folders."""
    found = [os.statvfs(folder) for folder in TEMPORARY]
    return sum(one.f_files - one.f_ffree for one in found)


def killed_for_memory() -> bool:
    """Whether the kernel ended a process of this container for its limit of memory (control groups, both versions)."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
            return any(line.split() > ["oom_kill", "0"] for line in file if line.startswith("oom_kill "))
    return False


def reap(program: int):
    """Buries who has died. The wait status of `program` if it is among them, else None."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while True:
            process, found = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                break
            if process == program:
                status = found
    return status


def supervise(request: dict) -> dict:
    """Runs the program to its end, or to that of its limits, and says what came of it.

    Keys: `status` (exit status, negative for a signal, None if stopped), `stopped` (by which limit, or None),
    `finished` (whether the program's last line was reached), `seconds`, `stdout`, `stderr`; or `error`.
    """
    proof = os.urandom(16).hex().encode()
    pipes = [os.pipe() for _ in ("output", "errors", "report", "refusal")]
    wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup[1])
    signal.signal(signal.SIGCHLD, lambda *_: None)
    started = time.monotonic()
    program = os.fork()
    if program == 0:
        become_program(request, proof, *(writing for _, writing in pipes))
    got = {}
    selector = selectors.DefaultSelector()
    selector.register(wakeup[0], selectors.EVENT_READ)
    for reading, writing in pipes:
        os.close(writing)
        os.set_blocking(reading, False)
        selector.register(reading, selectors.EVENT_READ)
        got[reading] = b""
    most_files = files_in_memory() + MOST_FILES
    status = stopped = None
    while status is None and stopped is None:
        remaining = started + request["seconds"] - time.monotonic()
        ready = selector.select(max(0.0, min(WATCH_SECONDS, remaining)))
        status = reap(program)
        for key, _ in ready:
            if key.fd == wakeup[0]:
                with contextlib.suppress(BlockingIOError):
                    os.read(key.fd, 4096)
            elif not take(key.fd, got):
                selector.unregister(key.fd)
        if status is not None:
            break
        if max(map(len, got.values())) > request["output_bytes"]:
            stopped = "output limit"
        elif remaining <= 0:
            stopped = "timeout"
        elif resident_bytes() > request["memory_mb"] * 2**20 or files_in_memory() > most_files:
            stopped = "memory"
    seconds = time.monotonic() - started
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # of process 1: all others of the sandbox
    for reading in got:
        while len(got[reading]) <= request["output_bytes"] and take(reading, got):
            pass
    output, errors, report, refusal = got.values()
    if refusal:
        return {"error": refusal.decode(errors="replace")}
    if max(map(len, got.values())) > request["output_bytes"]:
        stopped = stopped or "output limit"
    elif status is not None and os.WIFSIGNALED(status) and killed_for_memory():
        stopped = "memory"
    return {
        "status": os.waitstatus_to_exitcode(status) if status is not None else None,
        "stopped": stopped,
        "finished": report.startswith(proof),  # a fork of the program may reach its end too
        "seconds": seconds,
        "stdout": output[: request["output_bytes"]].decode(errors="replace"),
        "stderr": errors[: request["output_bytes"]].decode(errors="replace"),
    }


def take(reading: int, got: dict) -> bool:
    """Adds what a pipe has to `got`; whether it had something."""
    try:
        part = os.read(reading, 65536)
    except BlockingIOError:
        return False
    got[reading] += part
    return bool(part)


def main() -> None:
    """Reads the request, confines this process, runs the program and writes the report."""
    size = int(sys.stdin.buffer.readline())
    request = json.loads(sys.stdin.buffer.read(size))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if os.getuid() == 0:
        become_nobody()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user has undone the one that bubblewrap set
    prctl(PR_SET_DUMPABLE, 0)
    print(STARTED, flush=True)
    print(json.dumps(supervise(request)), flush=True)


if __name__ == "__main__":
    main()
