"""provenance.json holds what a rebuild must reproduce, and nothing that a clock measured."""

import json
import subprocess

import pytest
from card_records import NVFP4, PRUNED, change, load, make_pruned_release, make_records, provenance_of, put, sha

from requant.provenance import Provenance, git_commit
from requant.records import KeepList, read_json, write_json


@pytest.fixture
def root(tmp_path):
    make_records(tmp_path)
    return tmp_path


def keys(data) -> set[str]:
    if isinstance(data, dict):
        return set(data).union(*(keys(value) for value in data.values()))
    return set().union(*(keys(value) for value in data)) if isinstance(data, list) else set()


def test_provenance_says_what_the_records_say(root):
    found = provenance_of(load(root))
    assert (found.release, found.scheme, found.requant_commit) == (NVFP4, "NVFP4", "0123abc")
    assert found.source.revision == sha(("alpha", "revision")) and found.source.base_model == "some-org/alpha"
    assert found.source.files["model-00002-of-00003.safetensors"].sha256 == sha(("alpha", 2))
    assert found.calibration.calibration_sha256 == sha("calibration")
    assert found.calibration.heldout_sha256 == sha("heldout")
    assert found.calibration.calibration_texts == {"stories": sha("stories"), "exercises": sha("exercises")}
    assert found.calibration.heldout_texts == {"stories": sha("stories")}
    assert found.seeds == [1_000_003 + block for block in range(6)]
    assert found.files["model-00001-of-00001.safetensors"].sha256 == sha(NVFP4)
    (run,) = found.tuning
    assert run.blocks == [0, 1, 2, 3, 4, 5] and run.settings["iters"] == 200
    assert run.libraries == {"torch": "2.13.0", "transformers": "5.23.0"}


def test_a_pruned_models_provenance_has_its_experts_and_what_they_were_chosen_on(root):
    assert provenance_of(load(root)).pruning is None
    make_pruned_release(root)
    found = provenance_of(load(root, "alpha-25-nvfp4", **PRUNED))
    assert found.source.model == "alpha" and found.pruning.calibration_sha256 == sha("calibration")
    assert found.pruning.keep == read_json(root / "results/alpha-25/prune/keep.json", KeepList)
    assert found.pruning.keep.experts == 12


def test_slower_jobs_leave_the_provenance_as_it_is(root):
    before = provenance_of(load(root)).model_dump_json()
    for path in ("source/alpha/source", *(f"{NVFP4}/blocks/{block}" for block in range(6)), f"{NVFP4}/pack"):
        change(root, f"results/{path}.json", put("seconds", 12_345.6))
    for block in range(6):
        change(root, f"results/{NVFP4}/blocks/{block}.json", put("peak_memory_bytes", 1))
    assert provenance_of(load(root)).model_dump_json() == before


def test_no_clock_no_memory_no_local_path(root):
    path = root / "provenance.json"
    write_json(path, provenance_of(load(root)))
    data = json.loads(path.read_text())
    assert not {"seconds", "peak_memory_bytes", "path", "date", "time"} & keys(data)
    assert "/private/" not in path.read_text()
    assert read_json(path, Provenance) == provenance_of(load(root))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("libraries", {"torch": "2.14.0"}),
        ("engine_version", "0.17.0"),
        ("threads", 2),
        ("device", "cuda:1"),
        ("settings", {"iters": 100}),
    ],
)
def test_blocks_made_differently_are_separate_runs(root, field, value):
    for block in (1, 2):
        change(root, f"results/{NVFP4}/blocks/{block}.json", put(field, value))
    runs = provenance_of(load(root)).tuning
    assert [run.blocks for run in runs] == [[0, 3, 4, 5], [1, 2]]
    assert getattr(runs[1], field) == value


def test_the_commit_is_that_of_the_checkout_and_changes_are_told(tmp_path):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{commit}-dirty"
