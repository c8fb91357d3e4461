"""The first blocks of a model as a checkpoint: its config, its tensors, and that transformers computes the same."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_verify import make_release
from transformers import AutoModelForCausalLM

from requant.checkpoint import INDEX, Checkpoint
from requant.copying import copy_block
from requant.cut import blocks_to_load, check_load_test, cut_config
from requant.errors import RequantError
from requant.locks import tensors_of
from requant.packed import PackedCheckpoint, write_decoded
from requant.packing import pack_first
from requant.records import KeepList
from requant.schemes import SCHEMES
from requant.streamed import StreamedModel
from requant.structure import from_config, from_tensors

TOKENS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))
BLOCKS = {"deepseek_v3": 2, "deepseek_v32": 2, "kimi_k2": 2, "glm4_moe": 2}  # one of them dense; of others the first


@pytest.mark.parametrize(
    ("asked", "blocks", "moe", "count"),
    [
        (None, 61, range(3, 61), 4),
        (None, 6, range(1, 6), 2),
        (None, 94, range(94), 1),
        (None, 28, [], 1),
        (6, 61, range(3, 61), 6),
        (1, 61, range(3, 61), 1),
        (0, 61, range(3, 61), 0),
        (None, 2, [1], 0),
        (None, 1, [], 0),
        (61, 61, range(3, 61), 0),
        (100, 61, range(3, 61), 0),
    ],
)
def test_as_many_blocks_as_have_one_with_experts_and_never_all(asked, blocks, moe, count):
    assert blocks_to_load(asked, blocks, moe) == count


def test_a_load_test_that_there_is_not_is_one_line():
    check_load_test("r", 1)
    with pytest.raises(RequantError, match=r"releases\.r\.deploy\.load_test_blocks: no load test: .*r/deploy\.json"):
        check_load_test("r", 0)


def test_lists_with_an_entry_a_block_are_cut_and_others_are_not():
    config = {
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "mlp_only_layers": [0, 2],
        "eos_token_id": [1, 2, 3],
        "first_k_dense_replace": 1,
    }
    assert cut_config(config, 2) == {
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 0,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "mlp_only_layers": [0],
        "eos_token_id": [1, 2, 3],
        "first_k_dense_replace": 1,
    }
    assert "num_nextn_predict_layers" not in cut_config({"num_hidden_layers": 3}, 2)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def cut(request, tmp_path_factory) -> tuple[Path, Path, int]:
    """(source of 3 blocks, a checkpoint of the first of its release in BF16, how many)."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    source = tiny.write_checkpoint(folder / "source", family, mtp=family == "deepseek_v3")
    blocks = BLOCKS.get(family, 1)
    for block in range(blocks):
        copy_block(source, "r", block, "BF16", folder / f"b/{block}.safetensors", folder / f"b/{block}.json")
    pack_first(source, "BF16", folder / "b", blocks, folder / "cut")
    return source, folder / "cut", blocks


def test_a_cut_has_its_blocks_and_what_is_outside_of_blocks(cut):
    source, folder, blocks = cut
    whole, found = Checkpoint(source), Checkpoint(folder)
    later = tuple(f"model.layers.{block}." for block in range(blocks, 4))  # the last is multi-token prediction
    names = sorted(name for name in whole.index if not name.startswith(later))
    assert sorted(found.index) == names
    ours, theirs = found.read(names), whole.read(names)
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
    assert found.config["num_hidden_layers"] == blocks and not found.config.get("num_nextn_predict_layers")
    lists = {key: value for key, value in found.config.items() if "layer" in key and isinstance(value, list)}
    assert all(len(value) == blocks for key, value in lists.items() if key != "mlp_only_layers")
    shard = folder / f"model-00001-of-{blocks + 1:05d}.safetensors"
    assert shard.samefile(folder.parent / "b/0.safetensors"), "a hard link"
    assert {"tokenizer.json", "tokenizer_config.json", INDEX} <= {path.name for path in folder.iterdir()}


def test_transformers_loads_a_cut_whole_and_computes_what_the_chain_of_its_blocks_does(cut):
    source, folder, blocks = cut
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        theirs = model.eval()(TOKENS).logits.float()
    ours = StreamedModel(Checkpoint(folder)).logits_of(TOKENS)
    torch.testing.assert_close(ours, theirs, atol=0.06, rtol=0.02)
    chain = StreamedModel(Checkpoint(source))
    hidden = chain.embed(TOKENS)
    for block in range(blocks):
        hidden = chain.run(chain.block(block), hidden)
    assert torch.equal(ours, chain.head()(hidden)), "the first blocks of the source, then its head"


def test_a_cut_is_planned_to_the_byte(cut):
    source, folder, blocks = cut
    config = json.loads((source / "config.json").read_text())
    for whole in (from_config(config), from_tensors(config, tensors_of(str(source)), 0, "headers")):
        size = whole.first(blocks).release_size(SCHEMES["BF16"], [])
        shards = sorted(folder.glob("*.safetensors"))
        assert [*size.blocks, size.rest] == [path.stat().st_size for path in shards]


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_a_quantized_cut_ignores_what_its_own_blocks_keep_and_decodes_to_the_same_logits(tmp_path, family, scheme):
    source = tiny.write_checkpoint(tmp_path / "source", family, num_hidden_layers=2, first_k_dense_replace=0)
    make_release(tmp_path, source, scheme)
    pack_first(source, scheme, tmp_path / "blocks", 1, tmp_path / "cut")
    cut, whole = PackedCheckpoint(tmp_path / "cut"), PackedCheckpoint(tmp_path / "model")
    of_whole = whole.config["quantization_config"]
    ignored = [name for name in of_whole["ignore"] if ".layers.1." not in name]
    assert cut.config["quantization_config"] == of_whole | {"ignore": ignored}
    assert "lm_head" in ignored and len(ignored) < len(of_whole["ignore"])
    assert cut.quantized == [name for name in whole.quantized if name.startswith("model.layers.0.")]
    write_decoded(tmp_path / "cut", tmp_path / "decoded")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded", dtype=torch.bfloat16)
        theirs = model.eval()(TOKENS).logits.float()
    torch.testing.assert_close(StreamedModel(cut).logits_of(TOKENS), theirs, atol=0.06, rtol=0.02)


def test_a_cut_of_a_pruned_model_needs_no_more_than_the_list_of_its_last_block(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", "deepseek_v3", n_group=1, topk_group=1, mtp=True)
    kept = {"model": "p", "source": "m", "method": "reap", "observe": "sequential", "calibration": "c", "seed": 0}
    of_last = KeepList(**kept, experts_before=8, experts=4, groups=1, blocks={1: [0, 2, 5, 7]}, never_reached={})
    for block in range(2):
        shard, record = tmp_path / f"b/{block}.safetensors", tmp_path / f"b/{block}.json"
        copy_block(source, "r", block, "BF16", shard, record, of_last)
    pack_first(source, "BF16", tmp_path / "b", 2, tmp_path / "cut", of_last)
    assert Checkpoint(tmp_path / "cut").config["n_routed_experts"] == 4
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        theirs = model.eval()(TOKENS).logits.float()
    ours = StreamedModel(Checkpoint(tmp_path / "cut")).logits_of(TOKENS)
    torch.testing.assert_close(ours, theirs, atol=0.06, rtol=0.02)


def test_a_block_file_with_a_flipped_bit_is_named(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", "qwen3", num_hidden_layers=2)
    path = tmp_path / "b/0.safetensors"
    copy_block(source, "r", 0, "BF16", path, tmp_path / "b/0.json")
    assert load_file(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RequantError, match=r"b/0\.safetensors"):
        pack_first(source, "BF16", tmp_path / "b", 1, tmp_path / "cut")
