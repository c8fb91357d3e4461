"""What a build runs in: the kind of machine, and the versions of everything installed."""

import platform
import re
import subprocess
from importlib.metadata import distributions
from pathlib import Path

from pydantic import Field

from requant import __version__
from requant.records import Record


class Machine(Record):
    """A kind of machine, not one of its kind: no host name, no serial number."""

    system: str = Field(description="Linux, ...")
    architecture: str = Field(description="x86_64, aarch64, ...")
    cpu: str | None = Field(description="model name of the processor; null where the system does not tell")
    gpus: list[str] = Field(description="names of the GPUs that the NVIDIA driver shows, used or not")


def machine() -> Machine:
    """The kind of machine that this process runs on."""
    return Machine(system=platform.system(), architecture=platform.machine(), cpu=_cpu(), gpus=_gpus())


def _cpu() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    return named.group(1) if named else platform.processor() or None


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in shown.stdout.splitlines() if line.strip()]


def canonical(name: str) -> str:
    """A distribution's name as the packaging standard compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Versions of Python, of requant and of every installed distribution, by name, sorted."""
    found = {canonical(each.metadata["Name"]): each.version for each in reversed(list(distributions()))}
    return dict(sorted((found | {"python": platform.python_version(), "requant": __version__}).items()))
