"""Two copies of a release: what differs is found, named and measured, and the tolerance decides."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from requant.config import Reproduce
from requant.differences import Comparison, Published, compare, digests_of, files_of
from requant.differences_table import report
from requant.encoding import encode, plain_rounding, quantization_config
from requant.errors import RequantError
from requant.main import main
from requant.nvfp4 import global_scale
from requant.records import read_json
from requant.safetensors_io import save
from requant.schemes import SCHEMES

FIRST = "model.layers.0.mlp.up_proj"
SHARD = "model-00001-of-00003.safetensors"
OUTER = "model-00003-of-00003.safetensors"
DEFAULTS = Reproduce()
EXACT = Reproduce(min_cosine=1, max_code_fraction=0, max_relative_error=0)


def write_release(folder, scheme_name: str):
    """A release of two blocks with two Linears each, and an embedding."""
    scheme, generator, index = SCHEMES[scheme_name], torch.Generator().manual_seed(1), {}
    for block in range(2):
        tensors = {f"model.layers.{block}.input_layernorm.weight": torch.ones(256, dtype=torch.bfloat16)}
        for name in ("up_proj", "down_proj"):
            weight = torch.randn(256, 256, generator=generator).bfloat16()
            range_of_all = global_scale(weight.abs().max()) if scheme.is_nvfp4 else None
            rounded = plain_rounding(weight, range_of_all, scheme)
            tensors |= encode(f"model.layers.{block}.mlp.{name}", rounded, torch.ones(1), scheme)
        shard = f"model-0000{block + 1}-of-00003.safetensors"
        save(folder / shard, tensors)
        index |= dict.fromkeys(tensors, shard)
    save(folder / OUTER, {"model.embed_tokens.weight": torch.randn(16, 256, generator=generator).bfloat16()})
    index["model.embed_tokens.weight"] = OUTER
    config = {"model_type": "llama", "num_hidden_layers": 2, "quantization_config": quantization_config(scheme, [])}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "README.md").write_text("a card\n")
    return folder


@pytest.fixture(params=["NVFP4", "W3A16"])
def pair(request, tmp_path):
    """The published release and an equal copy."""
    (tmp_path / "published").mkdir()
    published = write_release(tmp_path / "published", request.param)
    shutil.copytree(published, tmp_path / "rebuilt")
    return published, tmp_path / "rebuilt"


def held(pair, tolerance: Reproduce = DEFAULTS) -> Comparison:
    published, rebuilt = pair
    return compare(Published(str(published), digests_of(published), published), rebuilt, tolerance)


def edit(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save(path, tensors)


def put(name: str, index: tuple, value):
    """A change that sets one value of a tensor, computed from the old one."""

    def change(tensors):
        tensors[name][index] = value(tensors[name][index])

    return change


def test_equal_copies_are_identical_and_no_shard_is_opened(pair):
    found = held(pair, EXACT)
    assert (found.outcome, found.status, found.files, found.tensors_compared) == ("identical", 0, [], 0)
    assert report(found) == "Identical: 6 of 6 files have the same bytes.\n"


def test_a_flipped_code_is_counted_and_within_the_tolerance(pair):
    edit(pair[1] / SHARD, put(f"{FIRST}.weight_packed", (3, 2), lambda old: old ^ 1))
    found = held(pair)
    (tensor,) = found.tensors
    assert (tensor.block, tensor.name, tensor.parts) == (0, f"{FIRST}.weight", ["weight_packed"])
    assert (tensor.differing, tensor.elements) == (1, 256 * 256)
    assert 0.999 < tensor.cosine < 1 and 0 < tensor.relative_error < 0.05
    assert tensor.relative_error == pytest.approx(math.sqrt(2 * (1 - tensor.cosine)), rel=0.2)
    assert (found.outcome, found.status, tensor.within) == ("within tolerance", 3, True)
    assert [(file.name, file.found, file.part) for file in found.files] == [(SHARD, "differs", "checkpoint")]
    assert found.tensors_compared == 3, "two Linears and a norm: other shards are not opened"
    assert held(pair, EXACT).status == 4


@pytest.mark.parametrize("key", list(Reproduce.model_fields))
def test_each_limit_is_held(pair, key):
    edit(pair[1] / SHARD, put(f"{FIRST}.weight_packed", (3, 2), lambda old: old ^ 1))
    strict = {"min_cosine": 1.0, "max_code_fraction": 0.0, "max_relative_error": 0.0}
    assert held(pair, Reproduce(**{key: strict[key]})).status == 4


def test_a_changed_scale_differs_in_no_code(pair):
    edit(pair[1] / SHARD, put(f"{FIRST}.weight_scale", (5, 0), lambda old: (old.float() * 2).to(old.dtype)))
    (tensor,) = held(pair).tensors
    assert (tensor.differing, tensor.parts) == (0, ["weight_scale"]) and tensor.relative_error > 0


def test_a_weight_twice_as_large_has_the_same_cosine_and_is_outside(pair):
    def double(tensors):
        key = "weight_global_scale" if f"{FIRST}.weight_global_scale" in tensors else "weight_scale"
        tensors[f"{FIRST}.{key}"] = (tensors[f"{FIRST}.{key}"].float() * 2).to(tensors[f"{FIRST}.{key}"].dtype)

    edit(pair[1] / SHARD, double)
    (tensor,) = held(pair).tensors
    assert tensor.cosine == pytest.approx(1) and tensor.relative_error in (pytest.approx(0.5), pytest.approx(1))
    assert not tensor.within


def test_a_changed_range_of_inputs_is_held_too(tmp_path):
    (tmp_path / "published").mkdir()
    published = write_release(tmp_path / "published", "NVFP4")
    pair = published, shutil.copytree(published, tmp_path / "rebuilt")
    edit(pair[1] / SHARD, put(f"{FIRST}.input_global_scale", (0,), lambda old: old * 1.5))
    (tensor,) = held(pair).tensors
    assert tensor.parts == ["input_global_scale"] and tensor.relative_error == 0 and not tensor.within


def test_a_tensor_that_was_never_quantized_may_not_differ(pair):
    edit(pair[1] / OUTER, put("model.embed_tokens.weight", (0, 0), lambda old: old * 1.01 + 0.01))
    found = held(pair)
    (tensor,) = found.tensors
    assert (tensor.block, tensor.name, tensor.differing, tensor.elements) == (
        None,
        "model.embed_tokens.weight",
        1,
        4096,
    )
    assert tensor.cosine > 0.999 and found.status == 4


def recast(tensors):
    tensors["model.layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"].float()


def reshape(tensors):
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(255, dtype=torch.bfloat16)


def drop_norm(tensors):
    del tensors["model.layers.0.input_layernorm.weight"]


def drop_part(tensors):
    del tensors[f"{FIRST}.weight_scale"]


def add(tensors):
    tensors["model.layers.0.mlp.extra.weight"] = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (recast, "dtype: BF16, rebuilt F32"),
        (reshape, "shape: [256], rebuilt [255]"),
        (drop_norm, "missing"),
        (drop_part, "parts: weight_scale is in one of the two"),
        (add, "extra"),
    ],
)
def test_what_is_no_pair_is_named_and_outside(pair, change, what):
    edit(pair[1] / SHARD, change)
    found = held(pair)
    (tensor,) = found.tensors
    assert (tensor.found, tensor.block, tensor.differing, tensor.within) == (what, 0, None, False)
    assert found.status == 4 and what in report(found)


def test_the_first_block_comes_first(pair):
    edit(pair[1] / OUTER, put("model.embed_tokens.weight", (0, 0), lambda old: old + 1))
    for block, shard in ((1, "model-00002-of-00003.safetensors"), (0, SHARD)):
        for name in ("up_proj", "down_proj"):
            edit(
                pair[1] / shard,
                put(f"model.layers.{block}.mlp.{name}.weight_packed", (0, 0), lambda old: old ^ 1),
            )
    found = held(pair)
    assert [tensor.block for tensor in found.tensors] == [0, 0, 1, 1, None]
    assert "The first is model.layers.0.mlp.down_proj.weight, in block 0." in report(found)


def test_other_files_are_named_and_documents_do_not_decide(pair):
    published, rebuilt = pair
    (rebuilt / "README.md").write_text("another card\n")
    (published / "LICENSE").write_text("a licence\n")
    (rebuilt / ".eval_results").mkdir()
    (rebuilt / ".eval_results/scores.yaml").write_text("a: 1\n")
    (published / "model.sig").write_text("a signature\n")
    found = held(pair)
    named = [(".eval_results/scores.yaml", "extra"), ("LICENSE", "missing"), ("README.md", "differs")]
    assert [(file.name, file.found) for file in found.files] == named
    assert {file.part for file in found.files} == {"document"} and found.status == 0
    assert report(found).startswith("Identical checkpoint: 5 of 8 files")
    (rebuilt / "config.json").write_text(json.dumps(json.loads((rebuilt / "config.json").read_text()) | {"a": 1}))
    assert held(pair).status == 4


def test_a_missing_shard_is_outside(pair):
    (pair[1] / OUTER).unlink()
    found = held(pair)
    assert [(file.name, file.found) for file in found.files] == [(OUTER, "missing")] and found.status == 4
    assert [(tensor.name, tensor.found) for tensor in found.tensors] == [("model.embed_tokens.weight", "missing")]


def test_of_hashes_alone_a_shard_that_differs_is_not_opened(pair):
    edit(pair[1] / SHARD, put(f"{FIRST}.weight_packed", (3, 2), lambda old: old ^ 1))
    digests = {name: digest for name, digest in digests_of(pair[0]).items() if name != "README.md"}
    found = compare(Published("provenance.json", digests, None, frozenset(digests)), pair[1], Reproduce())
    assert (found.not_opened, found.tensors, found.status) == ([SHARD], [], 4)
    assert found.files_compared == 5, "the card has no hash there, and is not called extra"


def test_what_a_download_leaves_is_no_file_of_the_release(tmp_path):
    for name in (".cache/huggingface/x.lock", ".gitattributes", "model.sig", "config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert files_of(tmp_path) == ["config.json"]


def test_the_command_compares_writes_a_record_and_ends_with_the_status(pair, tmp_path, capsys):
    published, rebuilt = map(str, pair)
    assert main(["compare", published, rebuilt]) == 0
    edit(pair[1] / SHARD, put(f"{FIRST}.weight_packed", (3, 2), lambda old: old ^ 1))
    assert main(["compare", published, rebuilt, "--record", str(tmp_path / "found.json")]) == 3
    assert "| weight_packed | 1 " in capsys.readouterr().out
    assert read_json(tmp_path / "found.json", Comparison).tensors[0].differing == 1
    assert main(["compare", published, rebuilt, "--tolerance", "max_code_fraction=0"]) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "nowhere", "{rebuilt}"], "nowhere: not there; expected the folder of a release"),
        (["compare", "{rebuilt}", "nowhere"], "nowhere: not there; expected the folder of a release"),
        (["compare", "{rebuilt}/config.json", "{rebuilt}"], "config.json: "),
        (["reproduce", "{rebuilt}", "--into", "x"], "provenance.json: not there; expected the provenance.json"),
    ],
)
def test_a_wrong_argument_is_one_line(pair, words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([word.format(rebuilt=pair[1]) for word in words]) == 2
    lines = capsys.readouterr().err
    assert message in lines and len(lines.strip().splitlines()) == 1 and not (tmp_path / "x").exists()


@pytest.mark.parametrize("limit", ["min_cosine=2", "cosine=1", "min_cosine", "max_code_fraction=x"])
def test_a_wrong_limit_is_one_line(limit):
    command = [sys.executable, "-m", "requant", "compare", "a", "b", "--tolerance", limit]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"'{limit}'; expected one of min_cosine, max_code_fraction, max_relative_error" in done.stderr


def test_a_shard_that_is_cut_short_is_one_line(pair):
    (pair[1] / SHARD).write_bytes((pair[1] / SHARD).read_bytes()[:-1])
    with pytest.raises(RequantError, match=f"{SHARD}: .* bytes found"):
        held(pair)
