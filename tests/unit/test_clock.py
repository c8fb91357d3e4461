"""Files whose times are ahead of the clock are named before anything is built on them."""

import os
import re
import shlex
import subprocess
import time

import pytest

from requant.clock import SKEW, check_times
from requant.errors import RequantError

HOUR = 3600


@pytest.fixture
def files(tmp_path):
    """A folder of results and a text: what a build reads."""
    for name in ("results/a/1.json", "results/a/2.json", "text.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def put(path, ahead: float) -> None:
    os.utime(path, (time.time(), time.time() + ahead))


def check(files) -> None:
    check_times([files / "results", files / "text.txt", files / "nowhere"])


def test_a_file_below_two_roots_is_counted_once(files):
    put(files / "results/a/2.json", HOUR)
    with pytest.raises(RequantError, match=r"ahead of this machine's clock; Snakemake"):
        check_times([files / "results", files / "results", files / "results/a/2.json"])


def test_what_is_past_or_little_ahead_is_taken(files):
    put(files / "text.txt", SKEW / 2)
    put(files / "results/a/1.json", -10_000 * HOUR)
    (files / "results/gone").symlink_to("nowhere")
    check(files)


@pytest.mark.parametrize(("name", "root"), [("text.txt", "text.txt"), ("results/a/1.json", "results")])
def test_the_furthest_is_named_with_the_command_that_mends_it(files, name, root):
    put(files / "results/a/2.json", HOUR)
    put(files / name, 24 * HOUR)
    with pytest.raises(RequantError) as raised:
        check(files)
    said = str(raised.value)
    assert said.startswith(f"{files / name}: its time, ") and "\n" not in said
    assert re.search(r"is (24\sh\s00|23\sh\s59)\smin ahead of this machine's clock", said)
    assert "1 more file is ahead too; Snakemake takes no result that is older than an input" in said
    command = said.rpartition(": ")[2]
    assert str(files / root) in shlex.split(command)
    subprocess.run(shlex.split(command), check=True)
    check(files)
    assert (files / name).stat().st_mtime <= time.time()
