"""Builds of models too large to be here are planned from their locks, in little memory."""

import json
import subprocess
import sys

import pytest
from building import ROOT, environment


@pytest.mark.parametrize(("blocks", "experts"), [(61, 256), (200, 2)])
def test_a_large_model_is_planned_from_its_lock(blocks, experts, tmp_path):
    """DeepSeek-V3's size, and more blocks in a row than Python's recursion and Snakemake's defaults allow."""
    out = tmp_path / "planning.json"
    command = [sys.executable, str(ROOT / "benchmarks/planning.py"), "--runs", "1", "--out", str(out)]
    command += ["--blocks", str(blocks), "--experts", str(experts)]
    subprocess.run(command, env=environment(), check=True, timeout=1500)
    (found,) = json.loads(out.read_text())
    assert experts != 256 or found["tensors"] == 91_991, "as many as DeepSeek-V3 has"
    jobs = found["jobs"]
    assert (jobs["reference"], jobs["quantize"]) == (blocks, 2 * blocks)
    assert jobs["download"] == found["shards"] + 4
    per_release = ("load_test", "pack", "verify", "evaluate", "deploy", "benchmark", "provenance", "release_card")
    assert {jobs[rule] for rule in (*per_release, "checksums")} == {2}
    assert found["peak_bytes"] < 1e9
