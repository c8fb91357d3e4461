"""The load test in a build: as soon as its blocks are made, and before the others; a failed one ends the release."""

import os
from pathlib import Path

import pytest
from building import Build, lay_out

from requant.gate import FAILURE
from requant.records import LoadTestRecord, read_json

RELEASE = "ll-nvfp4"
OWN, LAST = f"results/{RELEASE}", f"results/{RELEASE}/blocks/2.safetensors"
TARGETS = (f"{OWN}/load_test.json", LAST)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return lay_out(tmp_path_factory.mktemp("load_test"), ("ll",)).directory


class OneCore(Build):
    """A build that runs one job at a time, in the order that Snakemake gives them."""

    def command(self, *arguments: str) -> list[str]:
        """The command of a build with --cores 1; the profile's `keep-going` stays."""
        return super().command("--cores", "1", *arguments)

    def lines(self) -> list[str]:
        """The lines on errors of a build that fails."""
        done = self.run(*TARGETS, check=False)
        assert done.returncode != 0 and "Traceback" not in done.stderr
        return [line.partition(" error: ")[2] for line in done.stderr.splitlines() if " error: " in line]


@pytest.fixture
def build(directory) -> OneCore:
    return OneCore(directory)


def test_an_engine_that_does_not_start_ends_the_release_with_its_first_block(build, tmp_path, monkeypatch):
    """Though the profile lets jobs go on that do not need the failed one."""
    (tmp_path / "uvicorn.py").write_text('raise ImportError("libengine.so: cannot open shared object file")\n')
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        failed, stopped = build.lines()
    assert failed.startswith(f"{RELEASE}: load test of block 0: logs/load_test/{RELEASE}.engine.log: the engine ended")
    assert "ImportError: libengine.so: cannot open shared object file; " in failed
    assert "the blocks made so far stay: mend that, or choose another deploy.target" in failed
    assert stopped.startswith(f"{RELEASE}: no further blocks: load test of block 0: ")
    blocks = {path.name for path in (build.directory / OWN / "blocks").iterdir()}
    assert blocks == {"0.safetensors", "0.json"}
    assert not (build.directory / OWN / "load_test").exists() and not (build.directory / TARGETS[0]).exists()


def test_the_same_command_goes_on_and_the_test_runs_before_the_next_block(build):
    first = (build.directory / OWN / "blocks/0.safetensors").stat().st_mtime_ns
    build.run(*TARGETS)
    record = read_json(build.directory / TARGETS[0], LoadTestRecord)
    assert (record.blocks, record.moe_blocks, record.verdict) == (1, 0, "passed")
    assert record.agreement >= record.agreement_limit
    folder = build.directory / OWN
    times = [path.stat().st_mtime_ns for path in (folder / "blocks/0.json", folder / "load_test.json")]
    assert times == sorted(times) and first == (folder / "blocks/0.safetensors").stat().st_mtime_ns
    assert times[-1] < (folder / "blocks/1.safetensors").stat().st_mtime_ns
    assert not (folder / FAILURE).exists() and not (folder / "load_test").exists()
    assert (build.directory / f"results/benchmarks/load_test/{RELEASE}.tsv").exists()


def test_a_damaged_block_is_named_before_the_last_one_is_made(build):
    folder = build.directory / OWN
    for path in ("load_test.json", "blocks/1.safetensors", "blocks/2.safetensors", "chain/1.safetensors"):
        (folder / path).unlink()
    block = folder / "blocks/0.safetensors"
    raw = bytearray(block.read_bytes())
    raw[-1] ^= 1
    block.write_bytes(raw)
    failed, stopped = build.lines()
    assert failed.startswith(f"{RELEASE}: load test of block 0: {OWN}/blocks/0.safetensors: ")
    assert stopped.startswith(f"{RELEASE}: no further blocks: ")
    assert not (folder / "blocks/1.safetensors").exists()


def test_it_is_switched_off_by_a_number_and_where_it_would_have_all_blocks(build):
    def asked(blocks: int) -> dict[str, int]:
        build.configure(lambda data: data["releases"][RELEASE]["deploy"].update(load_test_blocks=blocks))
        return build.planned("model_card.md")

    assert asked(2)["load_test"] == 1
    assert "load_test" not in asked(0) and "load_test" not in asked(3)
    done = build.run(TARGETS[0], "-n", check=False)
    assert f"error: releases.{RELEASE}.deploy.load_test_blocks: no load test: " in done.stdout + done.stderr
