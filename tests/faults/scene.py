"""A small build to do harm to: laid out, built undisturbed, copied, and compared with what it was."""

import hashlib
import json
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from building import Build
from test_pruned import lay_out

from requant.errors import RequantError
from requant.safetensors_io import kept_digests, load
from requant.saliency import read_table

RELEASE, MODEL, SOURCE, CALIBRATION = "ds-50-nvfp4", "ds-50", "ds", "small"
CARD, PACKED = "model_card.md", f"results/{RELEASE}/pack.json"
LINE = re.compile(r"(?:^|\d\d:\d\d:\d\d )error: (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """One fault: what was done, how the build took it, in its own words, and whether the last bytes are the same.

    how: `found` (a line of ours, and an exit status other than 0), `resumed` (the same command ended well), `harmless`
    (nothing of it came into a result). seconds: of the build that met the fault and of the one after it.
    """

    fault: str
    how: str
    line: str
    same_bytes: bool
    seconds: float


def undisturbed(directory: Path, target: str = CARD) -> Build:
    """A locked pruned MoE model of two blocks and its NVFP4 release, built to `target`."""
    build = lay_out(directory, compare=[])
    build.run("lock", "--config", "model=ds")
    build.run(target)
    return build


def copied(build: Build, to: Path) -> Build:
    """The build in another place, with its times and hard links."""
    shutil.rmtree(to, ignore_errors=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", str(build.directory), str(to)], check=True)
    return Build(to)


def emptied(build: Build, to: Path) -> Build:
    """The build's inputs alone, in another place."""
    found = copied(build, to)
    for name in ("results", "logs", ".snakemake"):
        shutil.rmtree(to / name, ignore_errors=True)
    (to / CARD).unlink(missing_ok=True)
    return found


def digests(build: Build) -> dict[str, str]:
    """sha256 of every file of results/*/model."""
    files = sorted(build.directory.glob("results/*/model/*"))
    return {str(path.relative_to(build.directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def same_bytes(build: Build, wanted: dict[str, str]) -> bool:
    """Whether what the build has of the release is, file for file, that of the undisturbed build."""
    found = digests(build)
    return bool(found) and found == {name: wanted.get(name) for name in found}


def half_written(build: Build) -> list[str]:
    """The files under results that have their final name and are not whole, with what is wrong with each."""
    wrong = []
    for path in sorted((build.directory / "results").rglob("*")):
        if path.is_file() and not path.name.endswith(".partial") and (problem := _problem(path)):
            wrong.append(f"{path.relative_to(build.directory)}: {problem}")
    return wrong


def _problem(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            if not kept_digests(path):
                return "no digests"
            load(path)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".csv":
            read_table(path)
        elif path.suffix == ".png" and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
            return "no end"
    except FileNotFoundError:
        return None  # it went while this looked
    except (RequantError, ValueError) as error:
        return str(error)
    return None


def run(build: Build, target: str, *arguments: str) -> tuple[subprocess.CompletedProcess, float]:
    """The one command of a build, and its seconds."""
    start = time.monotonic()
    return build.run(target, *arguments, check=False), time.monotonic() - start


def error_line(done: subprocess.CompletedProcess) -> str:
    """The first of our own lines that says what is wrong; empty if there is none."""
    found = LINE.search(done.stdout + done.stderr)
    return found.group(1) if found else ""
