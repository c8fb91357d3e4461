"""The config in provenance.json builds its release alone, and names nothing of the machine it was written on."""

import pytest
import yaml

from requant.config import parse
from requant.standalone import public_path, standalone

CONFIG = {
    "models": {
        "big": {"path": "/data/hidden/big", "license": "mit"},
        "big-25": {"from": "big", "prune": {"ratio": 0.25, "calibration": "seen", "compare": ["random"]}},
        "far": {"hub": "some-org/far", "revision": "0" * 40, "directory": "/data/hidden/far"},
        "stored": {"bucket": "s3://hidden/models/stored", "directory": "/data/hidden/stored", "license": "mit"},
        "unused": {"path": "unused"},
    },
    "calibrations": {
        "seen": {"sources": [{"path": "~/hidden/prose.txt"}], "heldout": {"sources": [{"path": "./text/held.txt"}]}},
        "own": {"sources": [{"path": "text/code.jsonl", "name": "code"}], "seqlen": 64},
        "unused": {},
    },
    "benchmarks": {
        "none": {"tasks": ["gsm8k"], "include_path": None},
        "mine": {
            "include_path": "/data/hidden/tasks",
            "served": {"mmlu": {"data": "/data/hidden/mmlu", "expected": [0.7, 0.8]}, "gsm8k": {"source": None}},
        },
    },
    "releases": {
        "pruned": {"model": "big-25", "scheme": "NVFP4", "calibration": "own", "benchmark": "none", "keep": ["kv_b"]},
        "hub": {"model": "far", "scheme": "W4A16", "benchmark": "mine", "tuning": {"iters": 7}},
        "bucket": {"model": "stored", "scheme": "NVFP4", "calibration": "own", "benchmark": "none"},
    },
    "build": ["pruned", "hub", "bucket"],
    "device": "cuda",
    "publish": {"signing_key": "/data/hidden/key.pem"},
}


@pytest.mark.parametrize("release", ["pruned", "hub", "bucket"])
def test_it_is_a_config_that_gives_the_same_release(release):
    config = parse(CONFIG)
    alone = parse(yaml.safe_load(yaml.safe_dump(standalone(config, release))))
    assert alone.releases[release].model_dump(exclude={"mtp"}) == config.releases[release].model_dump(exclude={"mtp"})
    assert alone.build == [release] and alone.device == "cuda"
    assert standalone(alone, release) == standalone(config, release), "taken from itself, it is the same"


def test_it_has_what_the_release_needs_and_nothing_else():
    alone = standalone(parse(CONFIG), "pruned")
    assert list(alone["models"]) == ["big-25", "big"] and list(alone["calibrations"]) == ["own", "seen"]
    assert alone["benchmarks"]["none"]["include_path"] is None, "not the default folder"
    assert alone["releases"]["pruned"]["tuning"]["iters"] == 200 and alone["releases"]["pruned"]["keep"] == ["kv_b"]
    assert list(standalone(parse(CONFIG), "hub")["models"]) == ["far"]
    served = standalone(parse(CONFIG), "hub")["benchmarks"]["mine"]["served"]
    assert (served["mmlu"]["data"], served["mmlu"]["expected"], served["gsm8k"]["source"]) == ("mmlu", [0.7, 0.8], None)


def test_a_model_in_a_bucket_is_told_as_a_directory_of_its_name():
    assert standalone(parse(CONFIG), "bucket")["models"] == {"stored": {"path": "stored", "license": "mit"}}


def test_the_limits_of_a_sandbox_are_a_part_of_it_where_code_is_run():
    data = CONFIG | {"sandbox": {"seconds": 3.5}}
    assert "sandbox" not in standalone(parse(data), "hub")
    mine = data["benchmarks"]["mine"] | {"served": {"humaneval": {}}}
    alone = standalone(parse(data | {"benchmarks": data["benchmarks"] | {"mine": mine}}), "hub")
    assert alone["sandbox"]["seconds"] == 3.5


@pytest.mark.parametrize("release", ["pruned", "hub", "bucket"])
def test_it_names_no_folder_of_the_machine(release):
    text = yaml.safe_dump(standalone(parse(CONFIG), release))
    assert "hidden" not in text and "key.pem" not in text


def test_a_text_keeps_its_name_wherever_it_lies():
    alone = standalone(parse(CONFIG), "pruned")
    assert alone["calibrations"]["seen"]["sources"][0] == {
        "path": "prose.txt", "name": "prose", "share": 1.0, "field": "text"
    }  # fmt: skip
    assert alone["calibrations"]["seen"]["heldout"]["sources"][0]["path"] == "text/held.txt"


@pytest.mark.parametrize(
    ("path", "public"),
    [("/a/b/c", "c"), ("/a/b/", "b"), ("~/a", "a"), ("./a/b", "a/b"), ("a/b", "a/b"), ("../a", "../a")],
)
def test_absolute_paths_are_cut(path, public):
    assert public_path(path) == public
