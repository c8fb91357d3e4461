"""Spaces, brackets, braces and stars in the names of directories, models, texts and shards."""

import json
from pathlib import Path

import pytest
import tiny
import yaml
from building import Build

from requant.records import CalibrationRecord, PackRecord, read_json

TARGETS = ("results/r/pack.json", "results/calibration/m/c/tokens.safetensors")


def lay_out(directory: Path, model: str, text: str, shard: str) -> Build:
    """A model of one shard and a text under these names, and a release in BF16: it takes no tuning."""
    folder = tiny.write_checkpoint(directory / model, "llama", shard_size="1GB", num_hidden_layers=2)
    (folder / "model.safetensors").rename(folder / shard)
    names = tiny_tensors(folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    tiny.write_text(directory / text, 300, 1)
    sources = [{"path": text, "name": "a"}]
    calibration = {"sources": sources, "nsamples": 8, "seqlen": 48, "heldout": {"nsamples": 4}}
    data = {
        "models": {"m": {"path": model}},
        "calibrations": {"c": calibration},
        "releases": {"r": {"model": "m", "scheme": "BF16", "calibration": "c"}},
        "build": ["r"],
    }
    (directory / "mine.yaml").write_text(yaml.safe_dump(data))
    return Build(directory)


def tiny_tensors(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def test_a_build_goes_by_names_as_they_stand(tmp_path):
    """Neither patterns nor formats, and done when it is done."""
    directory = tmp_path / "w {x} [b] <y> * $é"
    directory.mkdir()
    build = lay_out(directory, "models/m {} [b]*?", "text/a [1] {a-b} %s 'é\".txt", "x [1]{}*.safetensors")
    build.run(*TARGETS)
    assert build.planned(*TARGETS) == {}
    packed = read_json(directory / TARGETS[0], PackRecord)
    assert packed.blocks == 2 and (directory / "results/source/m/files/x [1]{}*.safetensors.json").exists()
    made = read_json(directory / "results/calibration/m/c/calibration.json", CalibrationRecord)
    assert made.calibration_set.sources[0].path == "text/a [1] {a-b} %s 'é\".txt"


@pytest.mark.parametrize(
    ("model", "text", "shard", "line"),
    [
        (
            "models/m{x}",
            "a.txt",
            "x.safetensors",
            "models/m{x}: '{x}' in it is a wildcard to Snakemake (models.m.path)",
        ),
        ("models/m", "a<logs>.txt", "x.safetensors", "a<logs>.txt: '<logs>' in it is a wildcard to Snakemake (calibr"),
        ("models/m", "a.txt", "{file}.safetensors", "models/m/{file}.safetensors: '{file}' in it is a wildcard"),
    ],
)
def test_a_name_that_snakemake_would_replace_is_one_line_before_the_first_job(tmp_path, model, text, shard, line):
    build = lay_out(tmp_path, model, text, shard)
    done = build.run(*TARGETS, check=False)
    errors = [found for found in (done.stdout + done.stderr).splitlines() if "rror" in found]
    assert done.returncode != 0 and len(errors) == 1 and errors[0].startswith(f"error: {line}"), errors
    assert not (tmp_path / "results").exists()
