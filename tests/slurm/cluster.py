"""A real Slurm of one node for tests: its daemons listen on the loopback device, and all it has is in a folder.

It is of no use but to try jobs, and it stops with the session. A Slurm that runs on this machine already is left alone:
this one has a munge key, sockets, ports, state and a configuration of its own, and nothing outside of its folder. What
is started with its `environment` finds it by SLURM_CONF. The plugin takes that variable from the processes it starts
inside of a job, so a program called srun, first on their PATH, gives it back.
"""

import contextlib
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
START_SECONDS = 60.0
STOP_SECONDS = 30.0
CPUS, MEMORY_MB, GPUS = 4, 12000, 2  # what the node says it has, whatever this machine does

CONFIG = """\
ClusterName=requant
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
MinJobAge=300
KillWait=2
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=UNLIMITED State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A Slurm that runs. environment: with which programs find it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """What a program of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self, *states: str) -> dict[str, str]:
        """{id: rule and wildcards} of the jobs in these states."""
        shown = self.run("squeue", "--noheader", "--states", ",".join(states), "--format", "%i %k")
        return dict(line.split(maxsplit=1) for line in shown.splitlines())

    def ended(self) -> list[dict[str, str]]:
        """What Slurm wrote of each job that ended, in that order."""
        path = self.folder / "jobs.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [dict(field.partition("=")[::2] for field in line.split() if "=" in field) for line in lines]


@contextlib.contextmanager
def started() -> Iterator[Cluster]:
    """A Slurm of this session's own, with everything of it gone in the end; skips where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("needs root to start a Slurm")
    for program, package in PROGRAMS.items():
        if shutil.which(program, path=_path()) is None:
            pytest.skip(f"needs a Slurm: no {program} on this machine (Debian: {package})")
    folder = Path(tempfile.mkdtemp(prefix="requant-slurm-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        _configure(folder)
        environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin:{_path()}"}
        cluster = Cluster(folder, environment)
        munge = folder / "munge"
        places = {name: f"{munge}/{name}" for name in ("socket", "pid-file", "log-file", "seed-file", "key-file")}
        options = [f"--{name}={place}" for name, place in places.items()]
        stack.enter_context(_daemon(cluster, "munged", "--foreground", "--force", *options))
        _wait_for(lambda: (munge / "socket").exists(), folder)
        stack.enter_context(_daemon(cluster, "slurmctld", "-D"))
        stack.enter_context(_daemon(cluster, "slurmd", "-D", "-N", "node1"))
        stack.callback(_cancel_all, cluster)
        _wait_for(lambda: "idle" in _asked(cluster, "sinfo", "--noheader", "--format", "%t"), folder)
        yield cluster


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"


def _configure(folder: Path) -> None:
    """Key, configuration, files that pass for GPUs, and the program that gives jobs their configuration back."""
    for name in ("munge", "state", "spool", "bin"):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge/key-file"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    config = CONFIG.format(
        folder=folder, ports=_free_ports(2), host=socket.gethostname(), cpus=CPUS, memory=MEMORY_MB, gpus=GPUS
    )
    (folder / "slurm.conf").write_text(config)
    for number in range(GPUS):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"NodeName=node1 Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    srun = folder / "bin/srun"
    program = shutil.which("srun", path=_path())
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {program} "$@"\n')
    srun.chmod(0o755)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]


@contextlib.contextmanager
def _daemon(cluster: Cluster, *command: str) -> Iterator[None]:
    """A daemon of the cluster, which ends with this process, even if that is killed."""
    log = cluster.folder / f"{command[0]}.out"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _cancel_all(cluster: Cluster) -> None:
    """Ends the jobs that a failed test left, so that none outlives its node."""
    subprocess.run(["scancel", "--user=root"], env=cluster.environment, check=False, timeout=60)
    active = "PENDING,RUNNING,COMPLETING"
    _wait_for(lambda: not _asked(cluster, "squeue", "--noheader", "--format", "%i", "--states", active), cluster.folder)


def _asked(cluster: Cluster, *command: str) -> str:
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=60).stdout


def _wait_for(condition, folder: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > end:
            said = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log")))
            raise TimeoutError(f"{folder}: Slurm did not get there in {START_SECONDS:g} s\n{said}")
        time.sleep(0.1)
