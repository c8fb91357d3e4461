"""Files appear whole, and what is removed is a dead writer's own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from requant import whole
from requant.packing import remove_strangers
from requant.whole import remove_leftovers, written_whole

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(whole.__file__).parents[1])}
WRITER = """
import sys, time
from requant.whole import written_whole
with written_whole(sys.argv[1]) as partial:
    partial.write_text("half")
    print(partial, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer():
    """Starts processes that are amid writing a file: (process, its temporary file)."""
    running = []

    def started(path: Path) -> tuple[subprocess.Popen, Path]:
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes)
        running.append(process)
        return process, Path(process.stdout.readline().removesuffix("\n"))

    yield started
    for process in running:
        process.kill()
        process.communicate()


def killed(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize("name", ["a.json", "[a]*?.json", "{x}.safetensors", "a b.json", ".hidden"])
def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path, writer, name):
    """The second writer has its bytes in the end, whoever began first."""
    path = tmp_path / name
    dead, left = writer(path)
    killed(dead)
    living, under_way = writer(path)
    assert not left.exists() and under_way.exists()
    with written_whole(path) as partial:
        partial.write_text("whole")
    assert path.read_text() == "whole" and under_way.exists()
    living.communicate("")
    assert path.read_text() == "half" and list(tmp_path.iterdir()) == [path]


def test_files_whose_names_hold_each_other_are_let_alone(tmp_path, writer):
    left = {}
    for name in ("a", "a.json", "a.json.7", "b.a", "[ab]"):
        process, left[name] = writer(tmp_path / name)
        killed(process)
    for name in ("a.json", "[ab]"):
        with written_whole(tmp_path / name) as partial:
            partial.write_text("x")
        left.pop(name)
    found = {path for path in tmp_path.iterdir() if path.suffix == ".partial"}
    assert found == set(left.values())
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["[ab]", "a.json"]


def test_what_another_machine_writes_is_let_alone(tmp_path, writer, monkeypatch):
    """The process may live there, whether or not one of that number lives here."""
    process, left = writer(tmp_path / "a.json")
    killed(process)
    whole._place.cache_clear()
    monkeypatch.setattr(whole.socket, "gethostname", lambda: "node2")
    with written_whole(tmp_path / "a.json") as partial:
        partial.write_text("x")
    remove_leftovers(tmp_path)
    whole._place.cache_clear()
    assert left.exists() and (tmp_path / "a.json").read_text() == "x"


def test_packing_removes_no_file_that_is_being_written(tmp_path, writer):
    _, under_way = writer(tmp_path / "saliency.png")
    dead, left = writer(tmp_path / "README.md")
    killed(dead)
    (tmp_path / "model-00009-of-00009.safetensors").touch()
    remove_strangers(tmp_path, ["config.json"])
    assert list(tmp_path.iterdir()) == [under_way] and not left.exists()
