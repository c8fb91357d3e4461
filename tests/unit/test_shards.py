"""Which files and tensors are the model: what the index forgot is read, what is no part of it is left out and named."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from bad_input import refused
from safetensors.torch import load_file, save_file

from requant.checkpoint import INDEX, Checkpoint
from requant.copying import copy_block
from requant.errors import RequantError
from requant.locks import load_lock, make_lock, source_record, tensors_of
from requant.naming import left_out
from requant.packing import pack
from requant.plan import source_of
from requant.planning import check_locked_shards, remarks_on
from requant.preflight import check_model
from requant.records import PackRecord, VerifyRecord, write_json
from requant.safetensors_io import save
from requant.shards import only_shard, with_drafting
from requant.verify import verify

MTP = "mtp.safetensors"


@pytest.fixture(scope="module")
def glm(tmp_path_factory) -> Path:
    """Two blocks and an extra layer in a file of its own, which the index does not name."""
    folder = tiny.write_checkpoint(
        tmp_path_factory.mktemp("glm") / "m", "glm4_moe", num_hidden_layers=2, mtp=True, shard_size="1MB"
    )
    tiny.forget_mtp(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """One file, without an index."""
    return tiny.write_checkpoint(
        tmp_path_factory.mktemp("dense") / "m",
        "llama",
        num_hidden_layers=2,
        shard_size="1GB",
        tie_word_embeddings=False,
    )


@pytest.fixture
def source(glm, tmp_path) -> Path:
    tensors_of.cache_clear()
    return shutil.copytree(glm, tmp_path / "glm")


@pytest.fixture
def single(dense, tmp_path) -> Path:
    tensors_of.cache_clear()
    return shutil.copytree(dense, tmp_path / "dense")


def plan(source: Path) -> None:
    tensors_of.cache_clear()
    check_model(str(source), Checkpoint(source).config, tensors_of(str(source)))


def released(source: Path, folder: Path, **options) -> tuple[PackRecord, VerifyRecord]:
    tensors_of.cache_clear()
    for block in range(2):
        copy_block(source, "r", block, "BF16", folder / f"blocks/{block}.safetensors", folder / f"blocks/{block}.json")
    packed = pack(source, "r", "m", "BF16", folder / "blocks", folder / "model", folder / "pack.json", **options)
    return packed, verify(source, folder / "model", "r", None, 4, folder / "verify.json")


def add(source: Path, shard: str, tensors: dict) -> None:
    """Adds tensors to a shard, and to the index where there is one."""
    save_file(load_file(source / shard) | tensors, source / shard, metadata={"format": "pt"})
    if (source / INDEX).exists():
        index = json.loads((source / INDEX).read_text())
        index["weight_map"] |= dict.fromkeys(tensors, shard)
        (source / INDEX).write_text(json.dumps(index))


def first_shard(source: Path) -> str:
    return min(path.name for path in source.glob("model*.safetensors"))


# Files


def test_a_layer_that_the_index_forgot_is_read_locked_released_and_counted(source, tmp_path):
    plan(source)
    checkpoint, layer = Checkpoint(source), set(load_file(source / MTP))
    assert layer <= checkpoint.index.keys() and checkpoint.unnamed == [] and remarks_on(checkpoint) == []
    lock = make_lock("m", source)
    assert MTP in lock.files and layer <= lock.tensors.keys()
    known = source_of(str(source), None).structure
    packed, checked = released(source, tmp_path)
    assert packed.multi_token_prediction == "kept" and checked.unchanged == checked.source_tensors
    assert known.drafting > 0 and known.parameters == packed.parameters
    released_layer = load_file(max((tmp_path / "model").glob("*.safetensors")))
    for name, tensor in load_file(source / MTP).items():
        wanted = tensor.float() if name.endswith("correction_bias") else tensor
        assert torch.equal(released_layer[name], wanted) and released_layer[name].dtype == wanted.dtype


def test_a_file_of_any_name_will_do_and_several_with_parts_of_a_layer(source):
    tensors = load_file(source / MTP)
    (source / MTP).unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, source / f"nextn-{number}.safetensors")
    assert set(tensors) <= Checkpoint(source).index.keys()
    save_file({names[0]: tensors[names[0]]}, source / "copy.safetensors")
    with pytest.raises(RequantError, match="nextn-0.safetensors: model.layers.2.* found in copy.safetensors too"):
        Checkpoint(source).index  # noqa: B018


def test_files_with_anything_else_are_reported_and_not_read(source, tmp_path):
    tensors = load_file(source / MTP)
    save_file(tensors | {"model.layers.0.mlp.gate_proj.weight": torch.zeros(3)}, source / MTP)
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, source / "consolidated.safetensors")
    checkpoint = Checkpoint(source)
    assert checkpoint.unnamed == ["consolidated.safetensors", MTP] and not set(tensors) & checkpoint.index.keys()
    warnings = remarks_on(checkpoint)
    assert [line.split(": ")[0] for line in warnings] == [f"{source}/consolidated.safetensors", f"{source}/{MTP}"]
    record = source_record("m", source, make_lock("m", source), {})
    assert record.files_left_behind == ["consolidated.safetensors", MTP]
    packed, _ = released(source, tmp_path)
    assert packed.multi_token_prediction == "none"
    assert json.loads((tmp_path / "model/config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_layer_that_config_json_does_not_count_is_not_read(source):
    tiny.edit_config(source, num_nextn_predict_layers=0)
    assert Checkpoint(source).unnamed == [MTP]


def test_a_lock_without_the_layer_is_to_be_made_anew(source, tmp_path):
    lock = make_lock("m", source)
    write_json(tmp_path / "m.json", lock)
    check_locked_shards(Checkpoint(source), load_lock(tmp_path / "m.json").files)
    with refused(tmp_path, f"{source}/{MTP}: holds tensors of the model, and its lock does not name it"):
        check_locked_shards(Checkpoint(source), [name for name in lock.files if name != MTP])


def test_model_safetensors_is_taken_beside_others_without_an_index(single, tmp_path):
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model-q4.safetensors"):
        save_file({"x": torch.zeros(2)}, single / name)
    checkpoint = Checkpoint(single)
    assert checkpoint.shards == ["model.safetensors"]
    assert checkpoint.unnamed == ["adapter_model.safetensors", "consolidated.safetensors", "model-q4.safetensors"]
    plan(single)
    _, checked = released(single, tmp_path)
    assert checked.unchanged == len(load_file(single / "model.safetensors"))


def test_several_files_without_an_index_or_that_name_are_refused():
    assert only_shard("m", ["a.safetensors", "b/c.safetensors", "README.md"]) == "a.safetensors"
    for names in (["a.safetensors", "b.safetensors"], []):
        with pytest.raises(
            RequantError, match=f"^m: {len(names)} safetensors files and no .*index.json; expected an in"
        ):
            only_shard("m", names)


def test_nothing_is_asked_of_shards_where_nothing_is_missing():
    def never(shard):
        raise AssertionError(shard)

    config = {"model_type": "deepseek_v3", "num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    whole = {"model.layers.0.a.weight": "a.safetensors", "model.layers.1.a.weight": "a.safetensors"}
    for changes in ({}, {"num_nextn_predict_layers": 0}, {"model_type": "llama"}, {"num_hidden_layers": None}):
        assert with_drafting(config | changes, whole, ["a.safetensors", "b.safetensors"], never) == whole


# Blocks behind


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "qwen3_moe"])
def test_a_block_too_many_is_an_error_where_a_family_has_no_extra_layers(tmp_path, family):
    source = tiny.write_checkpoint(tmp_path / "m", family, num_hidden_layers=3, tie_word_embeddings=False)
    for counted in ({}, {"num_nextn_predict_layers": 1}):
        tiny.edit_config(source, num_hidden_layers=2, layer_types=None, **counted)
        with pytest.raises(
            RequantError, match=rf"^{source}: model.layers.2.\* is stored; config.json counts 2 blocks$"
        ):
            plan(source)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe"])
def test_extra_layers_are_as_many_as_config_json_counts(tmp_path, family):
    source = tiny.write_checkpoint(tmp_path / "m", family, num_hidden_layers=2, mtp=True)
    plan(source)
    tiny.edit_config(source, num_nextn_predict_layers=2)
    plan(source)
    for counted in (0, None):
        tiny.edit_config(source, num_nextn_predict_layers=counted)
        with pytest.raises(
            RequantError, match=r"model.layers.2.\* is stored; config.json counts 2 blocks .* and 0 lay"
        ):
            plan(source)
    tiny.edit_config(source, num_hidden_layers=1, layer_types=None, mlp_layer_types=None, num_nextn_predict_layers=1)
    with pytest.raises(RequantError, match=r"model.layers.2.\* is stored; config.json counts 1 blocks .* and 1 lay"):
        plan(source)


def test_a_layer_behind_a_gap_is_no_extra_layer(source):
    index = json.loads((source / INDEX).read_text())
    shard = first_shard(source)
    tiny.edit_config(source, num_nextn_predict_layers=2)
    (source / MTP).unlink()
    add(source, shard, {"model.layers.3.enorm.weight": torch.zeros(128, dtype=torch.bfloat16)})
    assert "model.layers.2.enorm.weight" not in index["weight_map"]
    with pytest.raises(RequantError, match=r"model.layers.3.\* is stored"):
        plan(source)


# Tensors that are no part of the model


STRANGE = {
    "vision_tower.layers.0.weight": torch.zeros(4, 4, dtype=torch.bfloat16),
    "vision_tower.position_ids": torch.arange(3),
    "score.weight": torch.zeros(2, 128),
    "lm_head.bias": torch.zeros(320),
    "model.rotary_emb.inv_freq": torch.ones(16),
}
BUFFERS = {
    f"model.layers.{block}.self_attn.rotary_emb.{name}": torch.ones(16, dtype=dtype)
    for block in (0, 1)
    for name, dtype in (("inv_freq", torch.float32), ("cos_cached", torch.bfloat16), ("sin_cached", torch.float16))
}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_tensors_of_no_module_and_buffers_are_named_not_counted_and_not_released(single, source, tmp_path, kind):
    folder = single if kind == "dense" else source
    before = source_record("m", folder, None, {})
    parameters = source_of(str(folder), None).structure.parameters
    add(folder, "model.safetensors" if kind == "dense" else first_shard(folder), STRANGE | BUFFERS)
    plan(folder)
    record = source_record("m", folder, None, {})
    names = sorted(STRANGE | BUFFERS)
    assert sorted(record.tensors_left_out) == names and before.tensors_left_out == {}
    told = {"files", "tensors_left_out", "revision", "seconds"}
    assert record.model_dump(exclude=told) == before.model_dump(exclude=told)
    assert source_of(str(folder), None).structure.parameters == parameters == record.parameters
    packed, checked = released(folder, tmp_path)
    assert sorted(packed.tensors_left_out) == names and checked.source_tensors == record.tensors
    assert packed.parameters == record.parameters
    stored = json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"]
    assert not set(names) & stored.keys()
    (line,) = [line for line in remarks_on(Checkpoint(folder)) if "no module" in line]
    assert "4 tensors that no module of the model has" in line and "lm_head.bias" in line


def test_each_has_its_reason():
    found = left_out([*STRANGE, *BUFFERS, "model.norm.weight", "model.layers.7.unknown", "lm_head.weight"])
    buffers = {name for name, reason in found.items() if reason.startswith("a buffer")}
    assert buffers == {*BUFFERS, "model.rotary_emb.inv_freq"} and found.keys() - buffers == STRANGE.keys() - buffers


def test_an_unknown_tensor_in_a_block_is_an_error_as_before(single):
    add(single, "model.safetensors", {"model.layers.1.self_attn.mystery": torch.zeros(2, dtype=torch.bfloat16)})
    with pytest.raises(RequantError, match="model.layers.1.self_attn.mystery: no such tensor|mystery"):
        source_of(str(single), None)


def test_a_release_with_a_tensor_of_no_module_is_found_by_verify(single, tmp_path):
    released(single, tmp_path)
    shard = max((tmp_path / "model").glob("*.safetensors"))
    save(shard, load_file(shard) | {"vision_tower.x": torch.zeros(3)})
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    index["weight_map"]["vision_tower.x"] = shard.name
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    with pytest.raises(RequantError, match="vision_tower.x is there; the source has no such tensor"):
        verify(single, tmp_path / "model", "r", None, 4, tmp_path / "verify.json")


def test_a_head_beside_a_tied_embedding_is_told_of(single):
    tiny.edit_config(single, tie_word_embeddings=True)
    assert "config.json ties the head" in remarks_on(Checkpoint(single))[0]
    plan(single)
