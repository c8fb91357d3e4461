"""Remake the locks of this folder from the .in files: `make lock`.

    build.lock          pip and setuptools
    requirements.lock   what every machine installs, but for torch
    torch-cpu.lock      torch, the build without CUDA
    torch-cuda.lock     torch, the build with CUDA, and the CUDA packages that it needs
    cluster.lock        what builds on a cluster need besides
    test.lock           what `make test` needs besides
    requant.yaml        the same versions for `snakemake --sdm conda`

What no .in file pins keeps the version that it has in the lock, unless --upgrade is given (`make lock UPGRADE=1`). A
lock names a version and the SHA-256 of each of its files, and no host: pip looks where its settings say.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ENVS = Path(__file__).parent

# The CPU build is a version of its own ("+cpu") that the default registry does not carry, so that pip-compile
# cannot see it: these are the files for Linux on x86_64. A lock with both builds would not do: pip prefers a
# file whose hash an index states to one in a folder, and so takes CUDA where the CPU build lies at hand.
TORCH_CPU = {"2.13.0": {"cp311": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"}}

# What is required and not installed. rfc3987-syntax: jsonschema, whose extra names it, imports it if it is there, for
# the format of IRIs, which nothing here has; its grammars take 1.6 s of each start of Snakemake.
LEFT_OUT = ("rfc3987-syntax",)

CUDA_BUILD = re.compile(r"(torch|triton)==|(nvidia|cuda)-")

CONDA = """\
# Made by `make lock`: do not edit. The versions of requirements.lock, for `snakemake --sdm conda`. pip
# fetches all of them, so that a job gets the same files here as in .venv; conda brings the interpreter.
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python =3.11
  - pip
  - pip:
"""


def compile_pins(sources: list[str], kept: list[str]) -> dict[str, str]:
    """The pinned closure of files of this folder: {name==version: the whole entry, with its hashes}.

    Of what no source pins, the versions of the locks `kept` stay as long as the sources allow them.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "lock"
        output.write_text("".join(map(present, kept)), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "piptools",
            "compile",
            "--quiet",
            "--generate-hashes",
            "--allow-unsafe",
        ]
        command += [
            "--strip-extras",
            "--no-header",
            "--no-annotate",
            "--no-emit-options",
            "--no-emit-index-url",
        ]
        command += ["--no-emit-find-links", "--no-emit-trusted-host", "--output-file", str(output)]
        # Settings files are left out: wheels in a folder named there would replace the public builds.
        environment = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
        paths = [str(ENVS / source) for source in sources]
        subprocess.run([*command, *paths], check=True, env=environment)
        entries = re.split(r"^(?=\S)", output.read_text(encoding="utf-8"), flags=re.MULTILINE)
    pinned = {entry.split()[0]: f"{entry.rstrip()}\n" for entry in entries if re.match(r"[\w.-]+==", entry)}
    return {pin: entry for pin, entry in pinned.items() if pin.partition("==")[0] not in LEFT_OUT}


def present(name: str) -> str:
    """The text of a lock as it is; empty if it is not there yet."""
    return (ENVS / name).read_text(encoding="utf-8") if (ENVS / name).exists() else ""


def torch_cpu(torch: str) -> list[str]:
    """The entry of the CPU build of `torch` ("torch==version")."""
    version = torch.removeprefix("torch==")
    if version not in TORCH_CPU:
        raise SystemExit(f"envs/lock.py: TORCH_CPU lacks torch {version}+cpu: add its hash (pip hash FILE)")
    hashes = sorted(f" \\\n    --hash=sha256:{value}" for value in TORCH_CPU[version].values())
    return [f"{torch}+cpu{''.join(hashes)}\n"]


def write(name: str, text: str) -> None:
    """Write one file of this folder, whole."""
    temporary = ENVS / f".{name}.new"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(ENVS / name)


def write_lock(name: str, source: str, about: str, entries: list[str]) -> None:
    """Write one lock, with a first line that says what it is."""
    write(name, f"# Made by `make lock` from {source}: do not edit. {about}\n{''.join(entries)}")
    print(f"envs/{name}: {len(entries)} packages")


def main() -> None:
    """Resolve the .in files, then write all that depends on them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="newest versions of all that no .in file pins")
    keep = not parser.parse_args().upgrade
    whole = ["requirements.lock", "torch-cuda.lock"]
    build = compile_pins(["build.in"], ["build.lock"] if keep else [])
    base = compile_pins(["requirements.in"], whole if keep else [])
    extra = {}
    for name in ("cluster", "test"):
        found = compile_pins(["requirements.in", f"{name}.in"], [*whole, f"{name}.lock"] if keep else [])
        changed = sorted(base.keys() - found.keys())
        if changed:
            raise SystemExit(f"envs/lock.py: {name}.in changes {', '.join(changed)}: loosen or move its pins")
        extra[name] = [entry for pin, entry in found.items() if pin not in base]
    torch = next(pin for pin in base if pin.startswith("torch=="))
    common = {pin: entry for pin, entry in base.items() if not CUDA_BUILD.match(pin)}
    cuda = [entry for pin, entry in base.items() if CUDA_BUILD.match(pin)]

    write_lock("build.lock", "build.in", "The installers.", list(build.values()))
    write_lock("requirements.lock", "requirements.in", "Everything but torch.", list(common.values()))
    write_lock("torch-cpu.lock", "requirements.in", "torch without CUDA.", torch_cpu(torch))
    write_lock("torch-cuda.lock", "requirements.in", "torch with CUDA, and what only it needs.", cuda)
    write_lock("cluster.lock", "cluster.in", "For builds on a cluster, besides the others.", extra["cluster"])
    write_lock("test.lock", "test.in", "For `make test`, besides the others.", extra["test"])
    write("requant.yaml", CONDA + "".join(f"      - {pin}\n" for pin in sorted([*common, torch])))


if __name__ == "__main__":
    main()
