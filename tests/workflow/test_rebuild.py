"""A release is rebuilt elsewhere, by somebody else and otherwise, from its provenance: the same bytes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from building import ROOT, environment

from requant.differences import digests_of
from requant.records import read_json
from requant.reproduce import Reproduction

NOBODY = 65534
OTHERWISE = {
    "TZ": "Asia/Kathmandu",
    "LC_ALL": "C",
    "PYTHONHASHSEED": "4242",
    "OMP_NUM_THREADS": "3",
    "MKL_NUM_THREADS": "3",
    "OPENBLAS_NUM_THREADS": "3",
    "SOURCE_DATE_EPOCH": "1000000000",
}


def somebody_else(directory: Path) -> list[str]:
    """What runs a command as another user, who may read what this one reads and owns `directory`; nothing if that is
    not allowed here."""
    capability = "+dac_read_search"
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command += [f"--inh-caps={capability}", f"--ambient-caps={capability}"]
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return []
    if subprocess.run([*command, sys.executable, "-c", ""], capture_output=True).returncode != 0:
        return []
    os.chown(directory, NOBODY, NOBODY)
    return command


def requant(directory: Path, *arguments: str, user: list[str]) -> subprocess.Popen:
    """The command in `directory`, with other settings of the environment than the first build."""
    home = {"HOME": str(directory), "TMPDIR": str(directory), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        [*user, sys.executable, "-m", "requant", *arguments],
        cwd=directory,
        env=environment() | OTHERWISE | home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        umask=0o077,
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=1500)
    return process.returncode, out, err


def inputs(built) -> list[str]:
    folder = built.directory
    named = {"source/ds": "models/ds", "text/small/a": "text/a.txt", "b": "text/b.txt", "tiny": "tasks"}
    return ["--inputs", *(f"{name}={folder / path}" for name, path in named.items())]


def kill_build_at(path: Path, process: subprocess.Popen) -> None:
    """SIGKILL of the Snakemake that `process` runs, once `path` is there."""
    end = time.monotonic() + 900
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, f"the rebuild never came to {path}"
        time.sleep(0.05)
    builds = [child for child in psutil.Process(process.pid).children(recursive=True) if "--cores" in child.cmdline()]
    os.kill(builds[0].pid, signal.SIGKILL)


def test_a_stranger_rebuilds_a_release_with_the_same_bytes(built, tmp_path):
    """Another directory, user, time zone, locale, hash seed, umask, date, number of cores and threads, order of jobs;
    killed on the way, and gone on with by the same command."""
    published = built.directory / "results/ds-nvfp4/model"
    user = somebody_else(tmp_path)
    command = ["reproduce", str(published), "--into", "elsewhere", "--cores", "1", *inputs(built)]
    killed = requant(tmp_path, *command, user=user)
    kill_build_at(tmp_path / "elsewhere/results/ds-nvfp4/blocks/0.safetensors", killed)
    status, _, lines = finished(killed)
    assert status == 1 and "the build failed" in lines

    status, shown, lines = finished(requant(tmp_path, *command, user=user))
    assert status == 0, shown + lines[-3000:]
    assert shown.startswith("Identical: ") and "warning" not in lines
    rebuilt = tmp_path / "elsewhere/results/ds-nvfp4/model"
    if user:
        assert rebuilt.stat().st_uid == NOBODY != built.directory.stat().st_uid
    assert digests_of(rebuilt) == digests_of(published) and len(digests_of(rebuilt)) > 10
    record = read_json(tmp_path / "elsewhere/reproduce.json", Reproduction)
    assert (record.comparison.outcome, record.comparison.files, record.versions) == ("identical", [], [])
    assert record.comparison.files_compared == len(digests_of(published))
    assert (tmp_path / "elsewhere/reproduce.md").read_text() == shown


def test_a_provenance_alone_is_enough_and_tells_where_another_build_differs(built, tmp_path):
    """Hashes are all that is known of the published files; a rebuild with other tuning is told from it."""
    source = built.directory / "results/ds-w3a16/model/provenance.json"
    shutil.copy2(source, tmp_path / "provenance.json")
    command = ["reproduce", "provenance.json", "--into", "again", "--weights-only", *inputs(built)]
    status, shown, lines = finished(requant(tmp_path, *command, user=[]))
    assert status == 0, shown + lines[-3000:]
    assert not (tmp_path / "again/results/ds-w3a16/evaluate.json").exists(), "what the checkpoint does not need"

    config = tmp_path / "again/reproduce.yaml"
    data = yaml.safe_load(config.read_text())
    data["releases"]["ds-w3a16"]["tuning"]["iters"] = 9
    config.write_text(yaml.safe_dump(data))
    options = ["--snakefile", str(ROOT / "Snakefile"), "--cores", "2", "--replace-workflow-config"]
    words = [*options, "results/ds-w3a16/pack.json", "--configfile", "reproduce.yaml"]
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-m", "snakemake", *words], cwd=again, env=environment(), check=True)
    published = built.directory / "results/ds-w3a16/model"
    other = again / "results/ds-w3a16/model"
    status, shown, lines = finished(requant(tmp_path, "compare", str(published), str(other), user=[]))
    assert status in (3, 4), shown + lines
    first = int(re.search(r"The first is model\.layers\.(\d+)\..*, in block \1\.", shown)[1])
    same, differs = (f"model-{number + 1:05d}-of-00004.safetensors" for number in (first - 1, first))
    assert same not in shown and differs in shown
    closed = requant(tmp_path, "compare", "provenance.json", str(other), user=[])
    status, shown, lines = finished(closed)
    assert status == 4 and f"Not opened, for want of the published file: {differs}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inputs", "ds=models", "a=a.txt", "b=b.txt", "tiny=tasks"], ": not there; source/ds was made with it"),
        (["--inputs", "nothing=here"], "--inputs nothing: found 0 inputs of that name; expected one of source/ds"),
        ([], "models/ds: not there; expected --inputs source/ds=PATH"),
    ],
)
def test_an_input_that_is_not_there_is_one_line_and_nothing_is_built(built, tmp_path, arguments, message):
    published = built.directory / "results/ds-nvfp4/model"
    command = requant(tmp_path, "reproduce", str(published), "--into", "new", *arguments, user=[])
    status, shown, lines = finished(command)
    assert status == 2 and message in lines and len(lines.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_another_text_is_refused_by_its_hash(built, tmp_path):
    (tmp_path / "a.txt").write_text("something else\n")
    published = built.directory / "results/ds-nvfp4/model"
    given = [*inputs(built), f"text/small/a={tmp_path / 'a.txt'}"]
    status, _, lines = finished(requant(tmp_path, "reproduce", str(published), "--into", "new", *given, user=[]))
    assert status == 2 and "a.txt: sha256 " in lines and "the release was made with " in lines
    assert not (tmp_path / "new").exists()
