"""Weights that are no numbers are refused by the first job that reads them; weights of zeros stay exactly zero."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from bad_input import refused
from safetensors.torch import load_file, save_file

from requant import fp8
from requant.chain import embed, run_reference_block
from requant.checkpoint import INDEX, Checkpoint
from requant.config import VERIFY_DEFAULTS, Tuning
from requant.errors import RequantError
from requant.packed import PackedCheckpoint
from requant.packing import pack
from requant.quantize import BlockJob, quantize_block
from requant.records import BlockRecord, VerifyRecord
from requant.safetensors_io import save
from requant.verify import verify

EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
ZERO_EXPERT = "model.layers.0.mlp.experts.5"
ROUTER = "model.layers.0.mlp.gate.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.write_checkpoint(
        tmp_path_factory.mktemp("weights") / "moe", "deepseek_v3", num_hidden_layers=1, first_k_dense_replace=0
    )


@pytest.fixture
def work(original, tmp_path):
    """A copy of the checkpoint, with tokens."""
    source = tmp_path / "moe"
    source.mkdir()
    for path in original.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tokens = torch.randint(3, 320, (10, 24), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    sets = {"calibration": tokens[:8].clone(), "heldout": tokens[8:].clone()}
    masks = {f"{part}_mask": torch.ones_like(rows, dtype=torch.uint8) for part, rows in sets.items()}
    save(tmp_path / "tokens.safetensors", sets | masks)
    return SimpleNamespace(folder=tmp_path, source=source)


def edit(source, name: str, change) -> None:
    """Changes one tensor in its shard, in place."""
    shard = source / json.loads((source / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    change(tensors[name])
    save_file(tensors, shard, metadata={"format": "pt"})


def embedded(work) -> None:
    embed(work.source, work.folder / "tokens.safetensors", work.folder / "embedded.safetensors")


def walked(work) -> None:
    paths = [work.folder / name for name in ("hidden_0.safetensors", "routing_0.json", "saliency_0.csv")]
    tokens, before = work.folder / "tokens.safetensors", work.folder / "embedded.safetensors"
    run_reference_block(work.source, tokens, before, 0, *paths, "moe", "c")


def quantized(work, scheme: str, **tuning) -> BlockRecord:
    return quantize_block(
        BlockJob(
            source=work.source,
            release="r",
            model="moe",
            block=0,
            scheme=scheme,
            tuning=Tuning(**({"iters": 20, "batch_size": 4, "best_mse": False} | tuning)),
            keep=[],
            tokens=work.folder / "tokens.safetensors",
            hidden=work.folder / "embedded.safetensors",
            targets=work.folder / "hidden_0.safetensors",
        ),
        work.folder / "blocks/0.safetensors",
        work.folder / "blocks/0.json",
        work.folder / "next.safetensors",
    )


def put(value: float):
    def change(tensor):
        tensor.view(-1)[5] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EXPERT, ROUTER, "model.layers.0.input_layernorm.weight"])
def test_a_value_of_a_block_that_is_not_finite_stops_the_reference_chain(work, name, value):
    embedded(work)
    edit(work.source, name, put(value))
    with refused(work.folder, f"{work.source}: {name}: 1 of", "values are NaN or infinite; expected finite ones"):
        walked(work)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_value_outside_of_blocks_that_is_not_finite_stops_the_first_job(work, name):
    edit(work.source, name, put(float("nan")))
    with refused(work.folder, f"{work.source}: {name}: 1 of", "NaN or infinite"):
        embedded(work)


def test_a_value_that_is_not_finite_stops_the_quantize_job(work):
    embedded(work)
    walked(work)
    edit(work.source, EXPERT, put(float("inf")))
    with refused(work.folder, f"{EXPERT}: 1 of 16384 values are NaN or infinite"):
        quantized(work, "W4A16")


def test_a_factor_of_an_fp8_weight_that_is_not_finite_names_the_weight(original, tmp_path):
    source = tiny.write_fp8(original, tmp_path / "fp8")
    edit(source, EXPERT + fp8.SCALE_SUFFIX, put_all(float("nan")))
    with refused(tmp_path, f"{source}: {EXPERT}: 16384 of 16384 values"):
        Checkpoint(source).read([EXPERT])


def put_all(value: float):
    return lambda tensor: tensor.fill_(value)


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16", "W4A16", "W8A16"])
def test_groups_of_zeros_are_zeros_in_the_release(work, scheme):
    """Columns, rows and a whole expert of zeros: legal, quantized, tuned, and exactly zero when decoded."""

    def some(tensor):
        tensor[:, :16] = 0
        tensor[7:40] = 0

    edit(work.source, EXPERT, some)
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        edit(work.source, f"{ZERO_EXPERT}.{leaf}.weight", put_all(0.0))
    embedded(work)
    walked(work)
    quantized(work, scheme)
    record = verified(work, scheme)
    assert record.tensors[f"{ZERO_EXPERT}.up_proj.weight"].cosine == 1
    stored = load_file(work.folder / "blocks/0.safetensors")
    for name, tensor in stored.items():
        assert bool(tensor.float().isfinite().all()), name
    packed = PackedCheckpoint(work.folder / "model")
    decoded = packed.decoded(EXPERT)
    assert np.count_nonzero(decoded[7:40]) == 0 and np.count_nonzero(decoded) > 0
    assert scheme != "NVFP4" or np.count_nonzero(decoded[:, :16]) == 0
    assert np.count_nonzero(packed.decoded(f"{ZERO_EXPERT}.down_proj.weight")) == 0


def verified(work, scheme: str, loosely: bool = False) -> VerifyRecord:
    """Packs the block and verifies it; loosely if it was tuned for three iterations, which move far."""
    pack(work.source, "r", "moe", scheme, work.folder / "blocks", work.folder / "model", work.folder / "pack.json")
    kept = (0.9, 0.4) if loosely else limits(scheme)
    return verify(work.source, work.folder / "model", "r", kept, 4, work.folder / "verify.json")


TUNED, ROUNDED, BY_AUTO_ROUND = {"iters": 3}, {"iters": 0}, {"engine": "auto_round", "iters": 3}


def scale(work, name: str) -> float:
    """A tensor scale in the file of the block."""
    return float(load_file(work.folder / "blocks/0.safetensors")[name])


@pytest.mark.parametrize("tuning", [TUNED, ROUNDED])
def test_a_projection_of_zeros_has_no_part_in_the_scale_it_shares(work, tuning):
    """NVFP4: gate and up of an expert have one tensor scale, the gate's own; and MLA's first projections."""
    attention = "model.layers.0.self_attn"
    for name in (EXPERT, f"{attention}.kv_a_proj_with_mqa.weight"):
        edit(work.source, name, put_all(0.0))
    embedded(work)
    walked(work)
    record = quantized(work, "NVFP4", **tuning)
    for zero, other in (
        (EXPERT, EXPERT.replace("up_proj", "gate_proj")),
        (f"{attention}.kv_a_proj_with_mqa.weight", f"{attention}.q_a_proj.weight"),
    ):
        assert any({zero, other} <= set(group) for group in record.shared_global_scale)
        amax = float(Checkpoint(work.source).read([other])[other].abs().amax())
        assert scale(work, zero + "_global_scale") == scale(work, other + "_global_scale")
        assert scale(work, other + "_global_scale") == pytest.approx(2688 / amax, rel=1e-6)
    found = verified(work, "NVFP4", loosely=True)
    assert (found.tensors[EXPERT].cosine, found.tensors[EXPERT].sqnr_db) == (1, None)
    numbers = [check.sqnr_db for check in found.tensors.values() if check.sqnr_db is not None]
    assert len(numbers) < len(found.tensors) and found.mean_sqnr_db == pytest.approx(sum(numbers) / len(numbers))
    assert found.mean_sqnr_db < 30, "no placeholder is part of it"


@pytest.mark.parametrize("tuning", [TUNED, ROUNDED])
def test_an_expert_that_sees_zeros_alone_has_the_input_scale_of_its_peers(work, tuning):
    edit(work.source, EXPERT, put_all(0.0))
    embedded(work)
    walked(work)
    record = quantized(work, "NVFP4", **tuning)
    downs = [f"model.layers.0.mlp.experts.{number}.down_proj" for number in range(8)]
    scales = [scale(work, f"{name}.input_global_scale") for name in downs]
    assert record.zero_inputs == [downs[3]] and record.tokens_per_expert[3] > 0
    assert scales[3] == min(scales[:3] + scales[4:]) and len(set(scales)) > 2
    verified(work, "NVFP4", loosely=True)


@pytest.mark.parametrize("tuning", [TUNED, BY_AUTO_ROUND, ROUNDED])
def test_zeros_everywhere_stop_no_build(work, tuning):
    """No expert's down_proj, nor the shared one's, ever sees another input: their scale is 1."""
    ups = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(8)]
    ups += ["model.layers.0.mlp.shared_experts.up_proj"]
    for name in ups:
        edit(work.source, f"{name}.weight", put_all(0.0))
    embedded(work)
    walked(work)
    record = quantized(work, "NVFP4", **tuning)
    downs = [name.replace("up_proj", "down_proj") for name in ups]
    assert set(record.zero_inputs) == set(downs)
    assert {scale(work, f"{name}.input_global_scale") for name in downs} == {1.0}
    verified(work, "NVFP4", loosely=True)


def made_small(value: float):
    return lambda tensor: tensor.copy_((tensor.float() / tensor.float().abs().amax() * value).to(tensor.dtype))


@pytest.mark.parametrize(
    ("tuning", "value"), [(TUNED, 9.2e-41), (TUNED, 1e-36), (TUNED, 1e-33), (BY_AUTO_ROUND, 1e-38), (ROUNDED, 1e-38)]
)
def test_tiny_weights_and_inputs_have_finite_scales(work, value, tuning):
    """Down to BF16's subnormal numbers: in a weight beside an ordinary one, in one that stands alone, and in inputs."""
    alone, norm = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.q_a_layernorm.weight"
    for name in (EXPERT, alone, norm):
        edit(work.source, name, made_small(value))
    embedded(work)
    walked(work)
    quantized(work, "NVFP4", **tuning)
    for name, tensor in load_file(work.folder / "blocks/0.safetensors").items():
        assert bool(tensor.float().isfinite().all()), name
        assert not name.endswith("global_scale") or bool((tensor > 0).all()), name
    assert scale(work, f"{alone}_global_scale") > 1e30
    assert scale(work, "model.layers.0.self_attn.q_b_proj.input_global_scale") > 1e30
    record = verified(work, "NVFP4", loosely=True)
    assert record.tensors[EXPERT].cosine == record.tensors[alone].cosine == 1, "as weights of zeros"


def test_a_weight_that_is_lost_beside_another_is_named_before_it_is_tuned(work):
    edit(work.source, EXPERT, made_small(1e-9))
    embedded(work)
    walked(work)
    said = "model.layers.0.mlp.experts.3.up_proj.weight: largest value 9.97e-10, beside "
    with refused(work.folder, said, "it would be zeros in NVFP4"):
        quantized(work, "NVFP4")


@pytest.mark.parametrize(("scheme", "value"), [("W3A16", 1e-20), ("W8A16", 4e-6)])
def test_weights_of_integers_that_no_scale_reaches_are_zeros(work, scheme, value):
    edit(work.source, EXPERT, lambda tensor: tensor.copy_(tensor.sign() * value))
    embedded(work)
    walked(work)
    quantized(work, scheme)
    assert verified(work, scheme).tensors[EXPERT].sqnr_db is None
    assert np.count_nonzero(PackedCheckpoint(work.folder / "model").decoded(EXPERT)) == 0


def test_a_block_whose_output_overflows_stops_the_reference_chain(work):
    edit(work.source, "model.layers.0.mlp.shared_experts.up_proj.weight", put_all(3e38))
    embedded(work)
    with refused(work.folder, "moe block 0: its output has NaN or infinite values over the calibration tokens"):
        walked(work)


@pytest.mark.parametrize(
    ("tuning", "scheme"), [(TUNED, "NVFP4"), (TUNED, "W3A16"), (BY_AUTO_ROUND, "NVFP4"), (ROUNDED, "NVFP4")]
)
def test_a_loss_that_is_no_number_stops_the_block_and_names_its_largest_input(work, scheme, tuning):
    """Finite in BF16, but not when squared: the line comes at iteration 0, and no file of the block is written."""
    for leaf, factor in (("gate_proj", 1e12), ("up_proj", 1e13)):
        edit(work.source, f"model.layers.0.mlp.shared_experts.{leaf}.weight", lambda it, factor=factor: it.mul_(factor))
    embedded(work)
    walked(work)
    said = (
        r"r block 0: loss (inf|nan) at iteration 0; expected a finite number; its largest input is \d\.\d+e\+2\d, of "
    )
    with pytest.raises(RequantError, match=said + r"mlp\.shared_experts\.down_proj: .*`keep`"):
        quantized(work, scheme, **tuning)
    assert not list(work.folder.glob("blocks/*"))


def test_a_block_of_which_nothing_is_quantized_has_nothing_to_tune(tmp_path, original):
    """Its Linears' widths fit no group of 128: it ships what it has, with either engine."""
    source = tiny.write_checkpoint(
        tmp_path / "narrow", "llama", num_hidden_layers=1, hidden_size=72, head_dim=24, intermediate_size=72
    )
    work = SimpleNamespace(folder=tmp_path, source=source)
    tokens = torch.randint(3, 320, (8, 24), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    sets = {part: tokens.clone() for part in ("calibration", "heldout")}
    save(tmp_path / "tokens.safetensors", sets | {f"{part}_mask": torch.ones_like(tokens).byte() for part in sets})
    embedded(work)
    walked(work)
    for engine in ("fused", "auto_round"):
        record = quantized(work, "W4A16", engine=engine)
        assert (record.iterations, record.quantized, record.judged) == (0, {}, {0: record.loss_best})
        assert record.loss_best < 1e-6 and len(record.kept) == 7


def limits(scheme: str) -> tuple[float, float]:
    """Those of the scheme, with room for a model this small."""
    cosine, relative_mae = VERIFY_DEFAULTS[scheme]
    return cosine * 0.97, relative_mae * 1.3
