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
from requant.packed import PackedCheckpoint
from requant.packing import pack
from requant.quantize import BlockJob, quantize_block
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


def quantized(work, scheme: str) -> None:
    quantize_block(
        BlockJob(
            source=work.source,
            release="r",
            model="moe",
            block=0,
            scheme=scheme,
            tuning=Tuning(iters=20, batch_size=4, best_mse=False),
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
    pack(work.source, "r", "moe", scheme, work.folder / "blocks", work.folder / "model", work.folder / "pack.json")
    record = verify(work.source, work.folder / "model", "r", limits(scheme), 4, work.folder / "verify.json")
    assert record.tensors[f"{ZERO_EXPERT}.up_proj.weight"].cosine == 1
    stored = load_file(work.folder / "blocks/0.safetensors")
    for name, tensor in stored.items():
        assert bool(tensor.float().isfinite().all()), name
    packed = PackedCheckpoint(work.folder / "model")
    decoded = packed.decoded(EXPERT)
    assert np.count_nonzero(decoded[7:40]) == 0 and np.count_nonzero(decoded) > 0
    assert scheme != "NVFP4" or np.count_nonzero(decoded[:, :16]) == 0
    assert np.count_nonzero(packed.decoded(f"{ZERO_EXPERT}.down_proj.weight")) == 0


def limits(scheme: str) -> tuple[float, float]:
    """Those of the scheme, with room for a model this small."""
    cosine, relative_mae = VERIFY_DEFAULTS[scheme]
    return cosine * 0.97, relative_mae * 1.3
