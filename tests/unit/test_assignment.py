"""Which GPU a job works on: one of its own, by locks that end with the process."""

import os
import subprocess
import sys

import pytest

from requant import assignment
from requant.errors import RequantError

JOB = """
import sys
from requant.assignment import take, taken
take(int(sys.argv[1]))
print(*taken(), flush=True)
input()
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a job that takes GPUs and holds them until its input ends: (process, what it took)."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-c3")
    running = []

    def started(count: int) -> tuple[subprocess.Popen, list[str]]:
        process = subprocess.Popen(
            [sys.executable, "-c", JOB, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process, process.stdout.readline().split()

    yield started
    for process in running:
        process.kill()
        process.communicate()


def test_jobs_side_by_side_have_a_gpu_each_and_a_killed_one_leaves_its_own(start):
    first, one = start(1)
    _, two = start(1)
    _, three = start(1)
    assert (one, two, three) == (["0"], ["1"], ["GPU-c3"])
    first.kill()
    first.wait()
    assert start(1)[1] == ["0"]


@pytest.mark.parametrize(("chosen", "order"), [(None, "PCI_BUS_ID"), ("0", None)])
def test_numbers_that_others_chose_keep_the_order_that_they_were_chosen_in(chosen, order, tmp_path, monkeypatch):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    environment |= {"CUDA_VISIBLE_DEVICES": chosen} if chosen else {}
    monkeypatch.setattr(assignment.os, "environ", environment)
    monkeypatch.setattr(assignment.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(assignment, "DEVICES", tmp_path)
    monkeypatch.setattr(assignment, "_held", {})
    (tmp_path / "nvidia0").touch()
    assignment.take(1)
    assert environment["CUDA_VISIBLE_DEVICES"] == "0" and environment.get("CUDA_DEVICE_ORDER") == order


def test_more_jobs_than_gpus_share_them_evenly_and_the_log_says_so(start):
    taken = [start(1) for _ in range(7)]
    assert [names for _, names in taken] == [["0"], ["1"], ["GPU-c3"]] * 2 + [["0"]]
    assert taken[0][0].stderr.readline() == "on GPU 0 of 0, 1, GPU-c3\n"
    assert taken[6][0].stderr.readline() == "on GPU 0 of 0, 1, GPU-c3, beside 2 other jobs\n"


def test_an_engine_on_several_gpus_leaves_the_others_free(start):
    assert start(2)[1] == ["0", "1"]
    assert start(1)[1] == ["GPU-c3"]


def test_too_few_gpus_are_one_line(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(RequantError, match=r"^1 of 4 GPUs are here \(CUDA_VISIBLE_DEVICES: 3\)$"):
        assignment.take(4)


def test_gpus_of_a_machine_are_counted_by_their_files(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(assignment, "DEVICES", tmp_path)
    assert assignment.visible() == []
    (tmp_path / "dxg").touch()
    assert assignment.visible() == ["0"]
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert assignment.visible() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 5, MIG-8 ")
    assert assignment.visible() == ["5", "MIG-8"]


def test_a_job_on_the_cpu_or_on_a_gpu_that_the_config_names_takes_none(monkeypatch):
    assert [assignment.gpus_of(device) for device in ("cpu", "cuda", "cuda:1", "xpu")] == [0, 1, 0, 0]
    monkeypatch.setattr(assignment, "visible", lambda: pytest.fail("looked for GPUs"))
    assignment.take(0)
    assert assignment.taken() == []


def _link(folder, other):
    other.mkdir(mode=0o700)
    folder.symlink_to(other)


def _dangling(folder, other):
    folder.symlink_to(other)


def _open_to_all(folder, _):
    folder.mkdir()
    folder.chmod(0o777)


def _anothers(folder, _):
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (_link, "no folder that can be read"),
        (_dangling, "no folder that can be read"),
        (lambda folder, _: folder.touch(mode=0o700), "no folder that can be read"),
        (_open_to_all, f"of user {os.getuid()}, mode 777"),
        (_anothers, "of user 65534, mode 700"),
    ],
    ids=["a link", "a dangling link", "a file", "open to all", "another user's"],
)
def test_a_lock_folder_that_another_user_may_have_made_is_refused(made, said, tmp_path, monkeypatch):
    """Anyone can make a file of that name before the first job does; nothing is written through it."""
    if made is _anothers and os.getuid() != 0:
        pytest.skip("only root can make a folder of another user's")
    monkeypatch.setattr(assignment.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(assignment, "_held", {})
    folder = tmp_path / f"requant-gpus-{os.getuid()}"
    made(folder, tmp_path / "other")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequantError) as error:
        assignment.take(1)
    assert str(error.value).startswith(f"{folder}: {said}; expected a folder of yours") and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_the_lock_folder_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(assignment.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(assignment, "_held", {})
    folder = tmp_path / f"requant-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700)
    (folder / "0.0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        assignment.take(1)
    assert not (tmp_path / "elsewhere").exists()
