"""Locks: a wrong byte, size, name or shape is found, and the error names the shard."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from requant.errors import RequantError
from requant.hashing import file_entry
from requant.locks import check_file, make_lock, source_record, tensors_of
from requant.safetensors_io import read_header, save


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("locks") / "moe", "deepseek_v3")


@pytest.fixture
def source(original, tmp_path):
    tensors_of.cache_clear()
    return shutil.copytree(original, tmp_path / "moe")


def shards(source):
    return sorted(path.name for path in source.glob("*.safetensors"))


def test_a_checkpoint_fits_its_own_lock(source):
    lock = make_lock("moe", source)
    for name in lock.files:
        assert check_file(source, name, lock) == lock.files[name]
    assert len(lock.tensors) == len(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"])


def test_headers_are_read_as_safetensors_reads_them(source):
    for shard in shards(source):
        tensors = load_file(source / shard)
        header = read_header(source / shard)
        assert {name: entry.shape for name, entry in header.items()} == {n: list(t.shape) for n, t in tensors.items()}
        raw = (source / shard).read_bytes()
        name, tensor = next(iter(tensors.items()))
        begin = header[name].offset
        assert (
            raw[begin : begin + 2] == tensor.flatten()[:1].view(dtype=__import__("torch").uint8).numpy().tobytes()[:2]
        )


def test_one_flipped_byte_is_found_and_its_shard_named(source):
    lock = make_lock("moe", source)
    shard = source / shards(source)[3]
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(RequantError, match=rf"{shard}: sha256 [0-9a-f]+ found; the lock of moe expects"):
        check_file(source, shard.name, lock)


def test_a_cut_shard_is_found_with_and_without_a_lock(source):
    lock = make_lock("moe", source)
    shard = source / shards(source)[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(RequantError, match=r"bytes found; the lock of moe expects"):
        check_file(source, shard.name, lock)
    with pytest.raises(RequantError, match=r"cut short or padded"):
        check_file(source, shard.name, None)


def test_other_tensors_under_the_same_hash_are_found(source):
    """A lock that was edited, or made of another file: names and shapes are compared too."""
    lock = make_lock("moe", source)
    name = next(tensor for tensor, entry in lock.tensors.items() if entry.shard == shards(source)[0])
    lock.tensors[name].shape = [1, 2, 3]
    with pytest.raises(RequantError, match=rf"{name}: .* found; the lock expects"):
        check_file(source, shards(source)[0], lock)


def test_a_missing_shard_and_a_disagreeing_index_are_named(source):
    (source / shards(source)[2]).rename(source / "elsewhere")
    with pytest.raises(RequantError, match=rf"{shards(source)[0][:5]}.*not there; .*index.json names it"):
        tensors_of(str(source))
    tensors_of.cache_clear()
    (source / "elsewhere").rename(source / "model-00003-of-00010.safetensors")
    index = source / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = shards(source)[0]
    index.write_text(json.dumps(data))
    with pytest.raises(RequantError, match=r"model.norm.weight: found in .*index.json says"):
        tensors_of(str(source))


def test_shard_names_can_not_leave_the_directory(source):
    index = source / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(RequantError, match="expected a file name without a path"):
        tensors_of(str(source))


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0not json", b"\xff" * 40])
def test_no_safetensors_file_is_said_so(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(RequantError, match=r"x\.safetensors: not a"):
        read_header(tmp_path / "x.safetensors")


def test_counts_come_from_tensors(source):
    lock = make_lock("moe", source)
    record = source_record("moe", source, lock, {})
    assert (record.blocks, record.dense_blocks, record.moe_blocks) == (3, 1, 2)
    assert (record.routed_experts, record.shared_experts, record.experts_per_token) == (8, 1, 2)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if "correction_bias" in name)
    assert record.parameters == sum(p.numel() for p in model.parameters()) + biases


def test_other_types_and_unknown_families_are_refused(source):
    lock = make_lock("moe", source)
    name = min(lock.tensors)
    lock.tensors[name].dtype = "I16"
    with pytest.raises(RequantError, match=rf"{name} is stored in I16; expected BF16, F16, F32, or F8_E4M3"):
        source_record("moe", source, lock, {})
    config = json.loads((source / "config.json").read_text()) | {"model_type": "gpt_oss"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        RequantError, match=r"model_type: 'gpt_oss' .* is unknown; known families: deepseek_v3, .*llama"
    ):
        source_record("moe", source, None, {})


def test_saved_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    save(tmp_path / "a.safetensors", {"a": torch.zeros(3)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_saved_files_are_the_same_every_time(source, tmp_path):
    tensors = load_file(source / shards(source)[0])
    hashes = set()
    for turn in range(4):
        save(tmp_path / f"{turn}.safetensors", dict(sorted(tensors.items(), reverse=bool(turn % 2))))
        hashes.add(file_entry(tmp_path / f"{turn}.safetensors").sha256)
    assert len(hashes) == 1
    assert not list(tmp_path.glob(".*partial"))
    save_file(tensors, tmp_path / "plain.safetensors")
    assert read_header(tmp_path / "plain.safetensors").keys() == read_header(tmp_path / "0.safetensors").keys()
