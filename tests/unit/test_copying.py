"""A release in BF16 is the source's tensors, bit for bit, as a checkpoint of its own."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_view import GROUPED, keep_of, prune_by_hand
from transformers import AutoModelForCausalLM

from requant.checkpoint import Checkpoint
from requant.copying import copy_block
from requant.encoding import encode, plain_rounding
from requant.errors import RequantError
from requant.packed import PackedCheckpoint, write_decoded
from requant.packing import pack
from requant.plan import source_of
from requant.records import CopiedBlock, KeepList, PackRecord, read_json
from requant.safetensors_io import save
from requant.schemes import SCHEMES
from requant.streamed import StreamedModel
from requant.verify import UNCHANGED_MEANS, verify

# Name: model_type, and how it is stored.
SOURCES = {
    "deepseek_v3": ("deepseek_v3", {}),
    "fp8": ("deepseek_v3", {"hidden_size": 192}),
    "mixtral": ("mixtral", {}),
    "stacked": ("glm4_moe", {"stacked": True}),
    "tied": ("llama", {}),
    "kimi": ("kimi_k2", {"mtp": True}),
}
ROUTER = "model.layers.1.mlp.gate.weight"


def make_source(folder: Path, name: str) -> tuple[Path, Path]:
    """(a tiny source, the same in BF16)."""
    model_type, changes = SOURCES[name]
    plain = tiny.write_checkpoint(folder / "plain", model_type, num_hidden_layers=2, **changes)
    if name != "fp8":
        return plain, plain
    return tiny.write_fp8(plain, folder / "fp8", folder / "bf16"), folder / "bf16"


def make_release(folder: Path, source: Path, mtp: str = "keep", keep: KeepList | None = None) -> PackRecord:
    """The release of `source` in BF16, in `folder`."""
    for block in range(2):
        shard, record = folder / f"blocks/{block}.safetensors", folder / f"blocks/{block}.json"
        copy_block(source, "r", block, "BF16", shard, record, keep)
    return pack(source, "r", "m", "BF16", folder / "blocks", folder / "model", folder / "pack.json", mtp, keep)


def check(source: Path, folder: Path):
    return verify(source, folder / "model", "r", None, 8, folder / "verify.json")


@pytest.fixture(scope="module", params=SOURCES)
def made(request, tmp_path_factory):
    """(name, source, the same in BF16, the folder of its release)."""
    folder = tmp_path_factory.mktemp(request.param)
    source, plain = make_source(folder, request.param)
    make_release(folder, source)
    return request.param, source, plain, folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A source and its release."""
    folder = tmp_path_factory.mktemp("moe")
    source, _ = make_source(folder, "deepseek_v3")
    make_release(folder, source)
    return source, folder


def edit(folder: Path, name: str, change) -> None:
    """Changes one stored tensor of the release."""
    shard = folder / "model" / PackedCheckpoint(folder / "model").stored[name]
    tensors = load_file(shard)
    tensors[name] = change(tensors[name].clone())
    save(shard, tensors)


def test_every_tensor_is_the_sources_and_nothing_is_called_quantized(made):
    _, source, plain, folder = made
    record, packed = check(source, folder), PackedCheckpoint(folder / "model")
    names = sorted(Checkpoint(plain).index)
    ours, theirs = packed.read(names), Checkpoint(plain).read(names)
    assert sorted(packed.index) == names
    assert all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in names)
    assert (record.unchanged, record.source_tensors, record.tensors) == (len(names), len(names), {})
    assert record.unchanged_means == UNCHANGED_MEANS and record.limits == {}
    assert record.lowest_cosine is record.mean_cosine is record.public_decoder is None
    assert "quantization_config" not in packed.config and packed.scheme.name == "BF16"
    made_of = read_json(folder / "pack.json", PackRecord)
    assert made_of.quantized_parameters == 0 and made_of.bits_per_quantized_weight is None
    assert made_of.parameters == sum(tensor.numel() for tensor in theirs.values())
    copied = [read_json(folder / f"blocks/{block}.json", CopiedBlock) for block in range(2)]
    assert [record.tensors for record in copied] == [
        sum(name.startswith(f"model.layers.{block}.") for name in names) for block in range(2)
    ]


def test_transformers_loads_it_as_the_source_with_the_logits_of_the_streamed_pass(made):
    """Every parameter and buffer, experts included, and what comes out of them."""
    name, _, plain, folder = made
    paths = [folder / "model", *([plain] if name != "kimi" else [])]  # transformers has no code of kimi's model_type
    loaded = [AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in paths]
    tokens = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = [model(tokens).logits.float() for model in loaded]
    streamed = StreamedModel(PackedCheckpoint(folder / "model")).logits_of(tokens)
    assert (logits[0] - streamed).abs().max() < 0.02 * streamed.abs().max()
    assert torch.equal(streamed, StreamedModel(Checkpoint(plain)).logits_of(tokens))
    for other in loaded[1:]:
        ours, theirs = loaded[0].state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key].float(), theirs[key].float()) for key in ours)
    assert all(torch.equal(logits[0], found) for found in logits)


def test_the_plan_knows_its_size_to_the_byte(made):
    _, source, _, folder = made
    size = source_of(str(source), None).structure.release_size(SCHEMES["BF16"], ["o_proj"])
    shards = sorted((folder / "model").glob("*.safetensors"))
    assert [*size.blocks, size.rest] == [shard.stat().st_size for shard in shards]
    assert size.quantized == size.packed == 0 and set(size.kept.values()) == {"scheme BF16 quantizes nothing"}


def test_multi_token_prediction_can_be_left_out(tmp_path):
    source, _ = make_source(tmp_path, "kimi")
    record = make_release(tmp_path, source, "drop")
    found = check(source, tmp_path)
    layer = load_file(source / "mtp.safetensors")
    assert record.multi_token_prediction == "dropped" and found.source_tensors - found.unchanged == len(layer)
    assert json.loads((tmp_path / "model/config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_pruned_model_in_bf16_is_the_one_pruned_by_hand(tmp_path):
    """Byte for byte: what reads the view reads a checkpoint, and transformers gives the logits of the view."""
    groups = {"n_group": 2, "topk_group": 1}
    whole = tiny.write_checkpoint(tmp_path / "whole", "deepseek_v3", num_hidden_layers=2, **groups)
    kept = keep_of({1: GROUPED[1]}, groups=2)
    by_hand = prune_by_hand(whole, tmp_path / "by_hand", "deepseek_v3", kept.blocks)
    for folder, source, keep in ((tmp_path / "view", whole, kept), (tmp_path / "hand", by_hand, None)):
        make_release(folder, source, keep=keep)
        record = verify(source, folder / "model", "r", None, 8, folder / "verify.json", keep)
        assert record.unchanged == record.source_tensors
    for shard in (tmp_path / "hand/model").glob("*.safetensors"):
        assert (tmp_path / "view/model" / shard.name).read_bytes() == shard.read_bytes()
    tokens = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(3))
    viewed = StreamedModel(Checkpoint(whole, kept)).logits_of(tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "view/model", dtype="auto").eval()
    with torch.no_grad():
        logits = loaded(tokens).logits.float()
    assert loaded.config.n_routed_experts == 4
    assert (logits - viewed).abs().max() < 0.02 * viewed.abs().max()
    assert torch.equal(StreamedModel(PackedCheckpoint(tmp_path / "view/model")).logits_of(tokens), viewed)


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int16)[0, 0] ^= 1
    return tensor


def other_zero(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int16)[0, 0] ^= -0x8000
    return tensor


@pytest.mark.parametrize("name", [ROUTER, "model.layers.1.mlp.experts.5.up_proj.weight", "lm_head.weight"])
def test_one_bit_that_differs_is_found(moe, tmp_path, name):
    source, folder = moe[0], Path(shutil.copytree(moe[1], tmp_path / "r"))
    edit(folder, name, one_bit)
    with pytest.raises(RequantError, match=f"^{name}: differs from the source; expected the same bytes"):
        check(source, folder)


def test_the_sign_of_a_zero_is_a_bit_too(moe, tmp_path):
    source, folder = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (moe[0], moe[1]))
    shard = source / Checkpoint(source).stored[ROUTER]
    tensors = load_file(shard)
    tensors[ROUTER][0, 0] = 0.0
    save(shard, tensors)
    make_release(folder, source)
    check(source, folder)
    edit(folder, ROUTER, other_zero)
    with pytest.raises(RequantError, match=f"^{ROUTER}: differs from the source"):
        check(source, folder)


def test_a_correction_bias_may_not_lose_digits(moe, tmp_path):
    source, folder = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (moe[0], moe[1]))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    shard = source / Checkpoint(source).stored[name]
    tensors = load_file(shard)
    tensors[name] = torch.linspace(0.1, 0.2, len(tensors[name]))
    save(shard, tensors)
    make_release(folder, source)
    check(source, folder)
    edit(folder, name, lambda tensor: tensor.to(torch.bfloat16))
    with pytest.raises(RequantError, match=f"^{name}: differs from the source"):
        check(source, folder)


def test_a_tensor_of_another_shape_is_named(moe, tmp_path):
    source, folder = moe[0], Path(shutil.copytree(moe[1], tmp_path / "r"))
    edit(folder, ROUTER, lambda tensor: tensor[:-1])
    with pytest.raises(RequantError, match=rf"^{ROUTER}: shape \[7, 128\] found; the source has \[8, 128\]"):
        check(source, folder)


def test_quantized_weights_without_a_quantization_config_are_found(moe, tmp_path):
    """A reader would take the release for one in BF16."""
    source, folder = moe[0], Path(shutil.copytree(moe[1], tmp_path / "r"))
    name = "model.layers.1.mlp.experts.5.up_proj"
    packed = PackedCheckpoint(folder / "model")
    shard, scheme = folder / "model" / packed.stored[f"{name}.weight"], SCHEMES["W4A16"]
    tensors = load_file(shard)
    tensors |= encode(name, plain_rounding(tensors.pop(f"{name}.weight"), None, scheme), None, scheme)
    save(shard, tensors)
    index = folder / "model/model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"][f"{name}.weight"]
    parts = ("weight_packed", "weight_scale", "weight_shape")
    data["weight_map"] |= {f"{name}.{part}": shard.name for part in parts}
    index.write_text(json.dumps(data))
    with pytest.raises(RequantError, match=rf"{name}.weight is quantized; expected a quantization_config in config"):
        check(source, folder)


def test_a_stray_scale_is_no_part_of_a_weight_there(moe, tmp_path):
    source, folder = moe[0], Path(shutil.copytree(moe[1], tmp_path / "r"))
    index = folder / "model/model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.layers.1.mlp.gate.weight_scale"] = data["weight_map"][ROUTER]
    index.write_text(json.dumps(data))
    with pytest.raises(RequantError, match=r"mlp.gate.weight_scale is there; the source has no such tensor"):
        check(source, folder)


def test_a_copy_of_the_release_is_the_release(moe, tmp_path):
    """`write_decoded`, asked for where nothing has to be decoded, changes no tensor."""
    write_decoded(moe[1] / "model", tmp_path)
    for shard in (moe[1] / "model").glob("*.safetensors"):
        assert (tmp_path / shard.name).read_bytes() == shard.read_bytes()
