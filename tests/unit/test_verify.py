"""Verification finds what is wrong with a packed release, and names the tensor."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from requant import rows
from requant.checkpoint import INDEX, Checkpoint
from requant.config import VERIFY_DEFAULTS, Tuning
from requant.errors import RequantError
from requant.packed import PackedCheckpoint, write_decoded
from requant.packing import link_or_copy, pack
from requant.quantize import BlockJob, quantize_block
from requant.records import KeepList, PackRecord, TensorCheck, read_json
from requant.safetensors_io import save
from requant.schemes import SCHEMES
from requant.streamed import StreamedModel
from requant.verify import check_weight, compare, summary, verify


def make_release(folder: Path, source: Path, scheme: str, mtp: str = "keep", experts: KeepList | None = None) -> Path:
    """A packed release of plainly rounded blocks: no calibration chain is needed to check verification."""
    tokens = torch.randint(3, 320, (4, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ones = torch.ones(4, 16, dtype=torch.uint8)
    save(
        folder / "t.safetensors",
        {"calibration": tokens, "heldout": tokens.clone(), "calibration_mask": ones, "heldout_mask": ones.clone()},
    )
    model = StreamedModel(Checkpoint(source, experts))
    hidden = model.embed(tokens)
    save(folder / "-1.safetensors", {"calibration": hidden})
    for block in range(model.blocks):
        hidden = model.run(model.block(block), hidden)
        save(folder / f"{block}.safetensors", {"calibration": hidden})
        job = BlockJob(
            source=source,
            release="r",
            model="m",
            block=block,
            scheme=scheme,
            tuning=Tuning(iters=0),
            keep=["kv_b"],
            tokens=folder / "t.safetensors",
            hidden=folder / f"{block - 1}.safetensors",
            targets=folder / f"{block}.safetensors",
            kept_experts=experts,
        )
        quantize_block(
            job, folder / f"blocks/{block}.safetensors", folder / f"blocks/{block}.json", folder / "next.safetensors"
        )
    pack(source, "r", "m", scheme, folder / "blocks", folder / "model", folder / "pack.json", mtp, experts)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("verify") / "moe", "deepseek_v3", num_hidden_layers=2)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A release in each scheme."""
    return {scheme: make_release(tmp_path_factory.mktemp(scheme), source, scheme) for scheme in ("NVFP4", "W3A16")}


@pytest.fixture(params=["NVFP4", "W3A16"])
def release(request, made, tmp_path):
    """A release to be damaged, and its scheme."""
    return request.param, Path(shutil.copytree(made[request.param], tmp_path / "release"))


@pytest.fixture
def nvfp4_release(made, tmp_path):
    return "NVFP4", Path(shutil.copytree(made["NVFP4"], tmp_path / "nvfp4"))


def check(source, release, limits=None):
    scheme, folder = release
    return verify(source, folder / "model", "r", limits or VERIFY_DEFAULTS[scheme], 8, folder / "verify.json")


def edit(folder: Path, name: str, change) -> None:
    """Changes one stored tensor of the release."""
    packed = PackedCheckpoint(folder / "model")
    shard = folder / "model" / packed.stored[name]
    tensors = load_file(shard)
    tensors[name] = change(tensors[name].clone())
    save(shard, tensors)


def test_a_good_release_passes_and_the_record_counts_everything(source, release):
    record = check(source, release)
    tensors = Checkpoint(source).index
    assert len(record.tensors) + record.unchanged == record.source_tensors == len(tensors)
    assert record.codes_rederived == len(record.tensors) and record.public_decoder_tensors == 8
    assert record.tensors[record.lowest_cosine_tensor].cosine == record.lowest_cosine
    name = record.lowest_cosine_tensor
    weight = Checkpoint(source).read([name])[name].double()
    decoded = torch.from_numpy(PackedCheckpoint(release[1] / "model").decoded(name)).double()
    assert record.lowest_cosine == pytest.approx(float(torch.cosine_similarity(weight.flatten(), decoded.flatten(), 0)))
    assert record.tensors[name].relative_mae == pytest.approx(
        float((weight - decoded).abs().mean() / weight.abs().mean())
    )


def test_blocks_are_counted_from_0_as_their_files_are(source, made, tmp_path, capsys):
    verify(source, made["W3A16"] / "model", "r", VERIFY_DEFAULTS["W3A16"], 8, tmp_path / "verify.json")
    lines = [line for line in capsys.readouterr().err.splitlines() if " verified" in line]
    assert len(lines) == 2 and "r: block 0 (of 2) " in lines[0] and "r: block 1 (of 2) " in lines[1]


def test_a_code_of_the_wrong_size_of_error_fails_the_limits(source, release):
    with pytest.raises(RequantError, match=r"weight: cosine 0\.\d+ against the source; expected 0.9999 or more"):
        check(source, release, (0.9999, 1.0))
    with pytest.raises(RequantError, match=r"weight: relative MAE 0\.\d+ against the source; expected 0.001 or less"):
        check(source, release, (0.5, 0.001))


NAME = "model.layers.1.mlp.experts.5.up_proj"


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_damaged_parts_are_found(source, release, part):
    def damage(tensor):
        raw = tensor.view(torch.uint8)
        raw[: len(raw) // 2] ^= 0x44
        return tensor

    edit(release[1], f"{NAME}.{part}", damage)
    with pytest.raises(RequantError, match=rf"{NAME}.weight: "):
        check(source, release)


def test_a_doubled_global_scale_is_found(source, nvfp4_release):
    edit(nvfp4_release[1], f"{NAME}.weight_global_scale", lambda tensor: tensor * 2)
    with pytest.raises(RequantError, match=rf"{NAME}.weight: relative MAE"):
        check(source, nvfp4_release)


def test_scales_that_differ_within_a_fused_group_are_found(source, nvfp4_release):
    """Both weights are right by themselves, but an engine would use one scale for the pair."""
    folder = nvfp4_release[1]
    from requant.encoding import QuantizedWeight, encode
    from requant.nvfp4 import global_scale
    from requant.schemes import SCHEMES

    weight = Checkpoint(source).read([f"{NAME}.weight"])[f"{NAME}.weight"]
    own = global_scale(weight.abs().amax()) * 1.25
    from requant.encoding import plain_rounding

    rounded = plain_rounding(weight, own, SCHEMES["NVFP4"])
    parts = encode(NAME, QuantizedWeight(rounded.weight, rounded.scales, own), torch.ones(1), SCHEMES["NVFP4"])
    for name, tensor in parts.items():
        edit(folder, name, lambda _, tensor=tensor: tensor)
    with pytest.raises(RequantError, match=r"weight_global_scale differs within a fused group \(gate_proj .*up_proj"):
        check(source, nvfp4_release)


def test_two_swapped_experts_are_found(source, release):
    folder = release[1]
    a, b = (f"model.layers.1.mlp.experts.{expert}.down_proj.weight_packed" for expert in (0, 3))
    packed = PackedCheckpoint(folder / "model")
    first = load_file(folder / "model" / packed.stored[a])[a]
    second = load_file(folder / "model" / packed.stored[b])[b]
    edit(folder, a, lambda _: second)
    edit(folder, b, lambda _: first)
    with pytest.raises(RequantError, match=r"experts.0.down_proj.weight: "):
        check(source, release)


def test_an_unquantized_tensor_that_changed_is_found(source, release):
    edit(release[1], "model.layers.1.mlp.gate.weight", lambda tensor: tensor + 0.01)
    with pytest.raises(RequantError, match="model.layers.1.mlp.gate.weight: differs from the source"):
        check(source, release)


@pytest.mark.parametrize(
    ("remove", "message"), [(True, "is missing; the source has it"), (False, "the source has no such")]
)
def test_every_tensor_is_accounted_for(source, release, remove, message):
    index = release[1] / "model" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    if remove:
        del data["weight_map"]["model.norm.weight"]
    else:
        data["weight_map"]["model.extra.weight"] = data["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(data))
    with pytest.raises(RequantError, match=message):
        check(source, release)


def test_shards_are_the_block_files_and_bytes_are_shared(made):
    folder = made["W3A16"]
    for block in range(2):
        shard = folder / "model" / f"model-{block + 1:05d}-of-00003.safetensors"
        assert shard.samefile(folder / "blocks" / f"{block}.safetensors")


def test_copying_where_links_are_impossible(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"weights")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    assert link_or_copy(tmp_path / "a", tmp_path / "b") is False
    assert (tmp_path / "b").read_bytes() == b"weights" and not (tmp_path / "b").samefile(tmp_path / "a")


def test_decoded_checkpoint_loads_in_transformers_with_the_verified_weights(source, made, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = made["NVFP4"]
    write_decoded(folder / "model", tmp_path / "decoded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded", dtype=torch.bfloat16)
    packed = PackedCheckpoint(folder / "model")
    decoded = torch.from_numpy(packed.decoded(f"{NAME}.weight")).to(torch.bfloat16)
    assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj[5, 128:], decoded)


def test_transformers_reads_the_w3a16_release_as_it_is(made):
    """The layout is one that a public loader reads right: every weight, experts included, and the logits."""
    from transformers import AutoModelForCausalLM

    folder = made["W3A16"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).eval()
    tokens = torch.randint(3, 320, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(tokens).logits.float()
    packed = PackedCheckpoint(folder / "model")
    experts = model.model.layers[1].mlp.experts
    for expert in range(8):
        decoded = torch.from_numpy(packed.decoded(f"model.layers.1.mlp.experts.{expert}.up_proj.weight"))
        assert torch.equal(experts.gate_up_proj[expert, 128:].float(), decoded.to(torch.bfloat16).float())
    ours = StreamedModel(packed).logits_of(tokens)
    assert (logits - ours).abs().max() < 0.05 * ours.abs().max()


def test_compare_gives_the_textbook_figures():
    import numpy as np

    source, decoded = np.array([1.0, -2.0, 2.0]), np.array([1.0, -2.0, 1.0])
    cosine, relative, sqnr = compare(source, decoded)
    assert cosine == pytest.approx(7 / (3 * 6**0.5))
    assert relative == pytest.approx(1 / 5)
    assert sqnr == pytest.approx(10 * np.log10(9.0))


def test_compare_takes_a_part_at_a_time(monkeypatch):
    """The figures are those of whole arrays, whatever the parts."""
    import numpy as np

    draw = np.random.default_rng(0)
    source = draw.standard_normal((37, 64)).astype(np.float32)
    decoded = source + 0.1 * draw.standard_normal((37, 64)).astype(np.float32)
    whole = compare(source, decoded)
    monkeypatch.setattr(rows, "AT_A_TIME", 100)
    assert compare(source, decoded) == pytest.approx(whole, rel=1e-12)
    w, d = source.ravel().astype(np.float64), decoded.ravel().astype(np.float64)
    assert whole[0] == pytest.approx(w @ d / np.sqrt(w @ w * (d @ d)), rel=1e-12)
    assert whole[2] == pytest.approx(10 * np.log10(w @ w / ((w - d) @ (w - d))), rel=1e-12)


@pytest.mark.parametrize(
    ("source", "decoded", "figures"),
    [
        ([0.0, 0.0], [0.0, 0.0], (1, 0, None)),
        ([1.0, -2.0], [1.0, -2.0], (1, 0, None)),
        ([0.0, 0.0], [0.0, 1.0], (0, 1, None)),
    ],
)
def test_infinite_ratios_are_no_numbers(source, decoded, figures):
    import numpy as np

    assert compare(np.array(source), np.array(decoded)) == figures


def test_means_of_sqnr_leave_exact_weights_out():
    def check(sqnr):
        return TensorCheck(block=0, cosine=0.99, relative_mae=0.1, sqnr_db=sqnr)

    assert summary({"a": check(10.0), "b": check(None), "c": check(20.0)})["mean_sqnr_db"] == 15
    assert summary({"a": check(None)})["mean_sqnr_db"] is None
    assert summary({})["mean_sqnr_db"] is None


def test_a_weight_is_checked_part_by_part_to_its_last_row(source, release, monkeypatch):
    """What stands in the last rows is found, and the record is that of whole weights."""
    whole = check(source, release)
    monkeypatch.setattr(rows, "AT_A_TIME", 1000)
    parts = check(source, release)
    for name, found in whole.tensors.items():
        assert parts.tensors[name].model_dump() == pytest.approx(found.model_dump(), rel=1e-12)
    name = f"{NAME}.weight_scale"
    edit(release[1], name, lambda tensor: torch.cat([tensor, tensor[:1]]))
    with pytest.raises(RequantError, match=rf"{NAME}\.weight: weight_\w+.* \[129, "):
        check(source, release)
    edit(
        release[1],
        name,
        lambda tensor: torch.cat([tensor[:127].float(), tensor[:1].float() * float("nan")]).to(tensor.dtype),
    )
    with pytest.raises(RequantError, match=rf"{NAME}\.weight: weight_scale: NaN"):
        check(source, release)


def test_an_input_scale_that_is_not_there_or_no_scale_is_named(source, nvfp4_release):
    for value in (0.0, float("inf"), float("nan"), -1.0):
        edit(nvfp4_release[1], f"{NAME}.input_global_scale", lambda tensor, value=value: tensor.fill_(value))
        with pytest.raises(RequantError, match=rf"{NAME}.weight: input_global_scale \["):
            check(source, nvfp4_release)
        with pytest.raises(RequantError, match=rf"{NAME}.weight: input_global_scale \["):
            StreamedModel(PackedCheckpoint(nvfp4_release[1] / "model")).block(1, quantize_activations=True)
    parts = PackedCheckpoint(nvfp4_release[1] / "model").parts(f"{NAME}.weight")
    del parts["input_global_scale"]
    with pytest.raises(RequantError, match=r"^x: input_global_scale \[\]; expected a finite number above 0"):
        check_weight("x", torch.zeros(128, 128), parts, SCHEMES["NVFP4"], 0, (0.0, 1.0))


@pytest.mark.parametrize(
    ("family", "stacked"), [("mixtral", False), ("mixtral", True), ("glm4_moe", True), ("deepseek_v32", False)]
)
def test_a_release_has_the_names_that_engines_load(family, stacked, tmp_path):
    """Whether the source has them or not; read back it is the same model, and transformers loads it."""
    dense = {} if family == "mixtral" else {"first_k_dense_replace": 0}
    source = tiny.write_checkpoint(tmp_path / "source", family, num_hidden_layers=1, stacked=stacked, **dense)
    folder = make_release(tmp_path, source, "W3A16")
    check(source, ("W3A16", folder))
    packed = PackedCheckpoint(folder / "model")
    moe, gate = ("block_sparse_moe", "w1") if family == "mixtral" else ("mlp", "gate_proj")
    assert f"model.layers.0.{moe}.experts.7.{gate}.weight_packed" in packed.stored
    kept = {f"{moe}.gate"}
    if family == "deepseek_v32":
        kept |= {"self_attn.kv_b_proj", "self_attn.indexer.wk", "self_attn.indexer.weights_proj"}
    ignored = packed.config["quantization_config"]["ignore"]
    assert ignored == ["lm_head", *sorted(f"model.layers.0.{name}" for name in kept)]
    write_decoded(folder / "model", tmp_path / "decoded")
    tokens = torch.randint(3, 320, (2, 12), generator=torch.Generator().manual_seed(1))
    streamed = StreamedModel(packed).logits_of(tokens)
    for directory in (folder / "model", tmp_path / "decoded"):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            logits = model(tokens).logits.float()
        assert (logits - streamed).abs().max() < 0.03 * streamed.abs().max(), directory


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """Kimi-K2 with a layer for multi-token prediction, and releases that keep it and drop it."""
    folder = tmp_path_factory.mktemp("drafting")
    source = tiny.write_checkpoint(folder / "source", "kimi_k2", num_hidden_layers=2, mtp=True)
    return source, {mtp: make_release(folder / mtp, source, "W3A16", mtp) for mtp in ("keep", "drop")}


def test_multi_token_prediction_is_kept_in_bf16_or_dropped_with_the_config_changed(drafting, tmp_path):
    source, releases = drafting
    layer = set(load_file(source / "mtp.safetensors"))
    records = {mtp: read_json(folder / "pack.json", PackRecord) for mtp, folder in releases.items()}
    configs = {mtp: json.loads((folder / "model/config.json").read_text()) for mtp, folder in releases.items()}
    verified = {mtp: check(source, ("W3A16", folder)) for mtp, folder in releases.items()}
    kept, dropped = (PackedCheckpoint(releases[mtp] / "model") for mtp in ("keep", "drop"))
    assert layer <= set(kept.stored) and not layer & set(dropped.stored)
    assert kept.stored.keys() - dropped.stored.keys() == layer
    assert [configs[mtp]["num_nextn_predict_layers"] for mtp in ("keep", "drop")] == [1, 0]
    assert [records[mtp].multi_token_prediction for mtp in ("keep", "drop")] == ["kept", "dropped"]
    assert [configs[mtp]["model_type"] for mtp in ("keep", "drop")] == ["deepseek_v3"] * 2
    assert not any("auto_map" in config for config in configs.values()), "code that the release does not have"
    assert "model.layers.2.mlp.experts.0.up_proj" in configs["keep"]["quantization_config"]["ignore"]
    assert not any(".layers.2." in name for name in configs["drop"]["quantization_config"]["ignore"])
    parameters = sum(tensor.numel() for tensor in load_file(source / "mtp.safetensors").values())
    assert records["keep"].parameters - records["drop"].parameters == parameters
    assert records["keep"].activated_parameters == records["drop"].activated_parameters
    assert verified["keep"].unchanged - verified["drop"].unchanged == len(layer)


def test_a_part_of_multi_token_prediction_is_not_enough(drafting, tmp_path):
    folder = Path(shutil.copytree(drafting[1]["keep"], tmp_path / "release"))
    packed = PackedCheckpoint(folder / "model")
    name = "model.layers.2.eh_proj.weight"
    tensors = load_file(folder / "model" / packed.stored[name])
    del tensors[name]
    save(folder / "model" / packed.stored[name], tensors)
    index = json.loads((folder / "model" / INDEX).read_text())
    del index["weight_map"][name]
    (folder / "model" / INDEX).write_text(json.dumps(index))
    with pytest.raises(RequantError, match=f"{name} is missing; the source has it"):
        check(drafting[0], ("W3A16", folder))
