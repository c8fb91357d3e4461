"""FP8 sources: decoded as the format says while they are read, counted once, and refused where they don't fit."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from requant import fp8
from requant.architecture import is_drafting
from requant.benchmark import _whole_model
from requant.checkpoint import INDEX, Checkpoint
from requant.errors import RequantError
from requant.locks import check_file, check_stored, elements, make_lock, source_record, tensors_of
from requant.records import TensorEntry

DATA = Path(__file__).parents[3] / "shared" / "data"
RAGGED = {"hidden_size": 192, "moe_intermediate_size": 192, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny checkpoint in FP8, and the same model in BF16."""
    folder = tmp_path_factory.mktemp("fp8")
    source = tiny.write_checkpoint(folder / "random", "deepseek_v3", **RAGGED)
    return tiny.write_fp8(source, folder / "fp8", folder / "bf16"), folder / "bf16"


@pytest.fixture
def broken(pair, tmp_path):
    """A copy of the FP8 checkpoint to be broken, and the name of one of its weights."""
    tensors_of.cache_clear()
    return shutil.copytree(pair[0], tmp_path / "fp8"), "model.layers.1.self_attn.o_proj.weight"


def random_weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows * columns)
    return tiny.round_to_fp8(torch.randn(rows, columns, generator=draw) * 10 ** torch.randn(rows, 1, generator=draw))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (192, 320), (576, 130), (5, 7), (129, 1)])
def test_decoding_is_the_value_times_the_factor_of_its_block(shape):
    weight, scales = random_weight(*shape)
    decoded = fp8.decode(weight, scales, (128, 128))
    assert decoded.dtype == torch.bfloat16
    assert torch.equal(decoded, tiny.plain_decoding(weight, scales))


@pytest.mark.parametrize("size", [(64, 32), (1, 128), (128, 128)])
def test_blocks_may_have_other_sizes_than_128(size):
    """Against the same factors spread over every element by a Kronecker product."""
    weight, _ = random_weight(192, 128)
    scales = torch.rand(-(-192 // size[0]), 128 // size[1]) + 0.5
    spread = torch.kron(scales, torch.ones(size))[:192, :128]
    assert torch.equal(fp8.decode(weight, scales, size), (weight.float() * spread).bfloat16())


def test_transformers_decodes_the_same_values():
    """Where the blocks have no ragged edge: transformers 5 refuses others, as DeepSeek-V3's kv_a_proj_with_mqa."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scales = random_weight(384, 256)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    assert torch.equal(fp8.decode(weight, scales, (128, 128)), theirs)


def test_factors_that_do_not_fit_are_not_spread():
    weight, scales = random_weight(192, 128)
    with pytest.raises(RequantError, match=r"factors \[1, 1\] found; expected \[2, 1\] for blocks of \[128, 128\]"):
        fp8.decode(weight, scales[:1], (128, 128))


def test_the_checkpoint_reads_as_the_same_model_in_bf16(pair):
    source, plain = map(Checkpoint, pair)
    assert source.index == plain.index
    weight = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert source.stored[weight] != source.stored[f"{weight}_scale_inv"], "in different shards"
    assert read_raw(source, weight).dtype == torch.float8_e4m3fn
    names = sorted(plain.index)
    ours, theirs = source.read(names), plain.read(names)
    assert ours.keys() == theirs.keys()
    for name in names:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_may_be_in_other_types_and_are_exact(broken, dtype):
    """BF16 as Qwen3's: planned, counted and decoded by the value that is stored."""
    folder, weight = broken
    stored = Checkpoint(folder).stored
    for name in [name for name in stored if name.endswith("_scale_inv")]:
        change_tensor(folder, name, lambda scales: (scales * 1.003).to(dtype))
    check_stored(folder, Checkpoint(folder).config, tensors_of(str(folder)))
    source = Checkpoint(folder)
    for name in (weight, "model.layers.1.mlp.experts.3.down_proj.weight"):
        scales = load_file(folder / source.stored[f"{name}_scale_inv"])[f"{name}_scale_inv"]
        assert scales.dtype == dtype
        assert torch.equal(source.read([name])[name], tiny.plain_decoding(read_raw(source, name), scales.float()))
    record = source_record("tiny", folder, None, {})
    assert sum(record.dtypes.values()) == record.parameters and "F16" not in record.dtypes


def test_a_quantization_under_its_earlier_name_is_refused_too(broken):
    folder = broken[0]
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config") | {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "compression_config.quant_method: 'compressed-tensors'; expected 'fp8'" in refusal(folder)


def read_raw(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return load_file(checkpoint.directory / checkpoint.stored[name])[name]


def test_it_is_scored_as_the_same_model_in_bf16_and_the_record_says_what_was_decoded(pair):
    tokens = torch.arange(3, 40)[None]
    (source, arithmetic), (plain, _) = (_whole_model(Checkpoint(path), "cpu") for path in pair)
    assert arithmetic == "FP8 weights decoded to BF16, BF16 activations"
    with torch.no_grad():
        assert torch.equal(source(tokens).logits, plain(tokens).logits)


def test_factors_are_no_parameters(pair):
    tensors_of.cache_clear()
    source, plain = (source_record("tiny", path, None, {}) for path in pair)
    assert (source.parameters, source.tensors) == (plain.parameters, plain.tensors)
    assert sum(source.dtypes.values()) == source.parameters
    stored = tensors_of(str(pair[0])).values()
    in_fp8 = sum(torch.Size(entry.shape).numel() for entry in stored if entry.dtype == "F8_E4M3")
    assert source.dtypes["F8_E4M3"] == in_fp8 > 0.5 * source.parameters
    assert source.dtypes.keys() == {"BF16", "F8_E4M3", "F32"} and source.dtypes["F32"] == plain.dtypes["F32"] == 8


def test_a_lock_has_weights_and_factors(pair):
    tensors_of.cache_clear()
    lock = make_lock("tiny", pair[0])
    assert {entry.dtype for name, entry in lock.tensors.items() if name.endswith("_scale_inv")} == {"F32"}
    for name in lock.files:
        assert check_file(pair[0], name, lock) == lock.files[name]
    assert source_record("tiny", pair[0], lock, {}).dtypes == source_record("tiny", pair[0], None, {}).dtypes


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def change_tensor(folder, name, change):
    """Puts change(tensor), or nothing where that is None, in the place of a tensor."""
    index = json.loads((folder / INDEX).read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    changed = change(tensors.pop(name))
    if changed is None:
        del index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))
    else:
        tensors[name] = changed
    save_file(tensors, shard, metadata={"format": "pt"})


def refusal(folder) -> str:
    """The line of the source's job, which has to be the planning's too."""
    with pytest.raises(RequantError) as raised:
        source_record("tiny", folder, None, {})
    with pytest.raises(RequantError) as planned:
        check_stored(folder, Checkpoint(folder).config, tensors_of(str(folder)))
    assert str(raised.value) == str(planned.value)
    return str(raised.value)


@pytest.mark.parametrize("method", ["compressed-tensors", "awq", "gptq", "modelopt"])
def test_a_source_that_is_quantized_otherwise_is_refused_by_name(broken, method):
    change_config(broken[0], quant_method=method)
    assert f"quantization_config.quant_method: '{method}'; expected 'fp8'" in refusal(broken[0])


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("fmt", "e5m2", "config.json: quantization_config.fmt: 'e5m2'; expected 'e4m3'"),
        ("weight_block_size", None, "quantization_config.weight_block_size: None; expected [rows, columns]"),
        ("weight_block_size", [64, 128], "F32 [2, 2] found; expected F32, BF16 or F16 [3, 2] for a weight [192, 256]"),
    ],
)
def test_an_fp8_config_that_does_not_fit_is_refused(broken, key, value, line):
    change_config(broken[0], **{key: value})
    assert line in refusal(broken[0])


def test_missing_factors_are_named(broken):
    folder, weight = broken
    change_tensor(folder, f"{weight}_scale_inv", lambda scales: None)
    wanted = f"{weight} is stored in F8_E4M3; expected {weight}_scale_inv beside it, found none"
    assert refusal(folder) == f"{folder}: {wanted}"
    with pytest.raises(RequantError, match=r"o_proj.weight is stored in F8_E4M3; expected .*_scale_inv beside it"):
        Checkpoint(folder).read([weight])


@pytest.mark.parametrize(
    ("change", "found"),
    [(lambda scales: scales[:1].clone(), r"F32 [1, 1]"), (lambda scales: scales.double(), r"F64 [2, 1]")],
)
def test_factors_of_another_shape_or_type_are_refused(broken, change, found):
    folder, weight = broken
    change_tensor(folder, f"{weight}_scale_inv", change)
    wanted = f"{found} found; expected F32, BF16 or F16 [2, 1] for a weight [192, 128] in blocks of [128, 128]"
    assert refusal(folder).startswith(f"{folder}: {weight}_scale_inv: {wanted}")


def test_factors_of_a_weight_that_is_not_in_fp8_are_refused(broken):
    folder, weight = broken
    change_tensor(folder, weight, lambda tensor: tensor.bfloat16())
    assert refusal(folder) == f"{folder}: {weight}_scale_inv: found; its weight is stored in BF16, not F8_E4M3"


def test_other_types_are_refused(broken):
    folder, weight = broken
    change_tensor(folder, "model.norm.weight", lambda tensor: tensor.short())
    assert refusal(folder).startswith(f"{folder}: model.norm.weight is stored in I16; expected BF16, F16, F32, or")


def test_config_and_tensors_have_to_agree_that_it_is_fp8(broken, pair, tmp_path):
    folder = broken[0]
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    assert "is stored in F8_E4M3; config.json has no quantization_config" in refusal(folder)
    plain = shutil.copytree(pair[1], tmp_path / "bf16")
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    assert "quantization_config.quant_method: 'fp8'; no tensor is stored in F8_E4M3" in refusal(plain)


def test_the_true_layout_of_deepseek_v3_fits_its_config():
    layout, config = DATA / "deepseek-v3-layout/shards.jsonl.gz", DATA / "model-configs/deepseek-ai--DeepSeek-V3"
    if not layout.exists():
        pytest.skip(f"needs {layout}")
    tensors = {}
    with gzip.open(layout, "rt") as lines:
        for shard in map(json.loads, lines):
            for name, dtype, shape in shard["tensors"]:
                tensors[name] = TensorEntry(dtype=dtype, shape=shape, shard=shard["file"], offset=0)
    check_stored("DeepSeek-V3", json.loads((config / "config.json").read_text()), tensors)
    assert sum(map(elements, tensors.values())) == 684_531_386_000 and len(tensors) == 91_991
    weights = fp8.without_scales(tensors)
    scales = {fp8.weight_of(name) for name in tensors.keys() - weights.keys()}
    assert scales == {name for name, entry in tensors.items() if entry.dtype == "F8_E4M3"}
    main = sum(elements(entry) for name, entry in weights.items() if not is_drafting(name, 61))
    assert round(main / 1e9) == 671, "the published size, multi-token prediction left out"
