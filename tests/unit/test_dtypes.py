"""What is not quantized has the file's own bytes, F16 and F32 models are rounded once; plan and verify agree."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from bad_input import refused
from safetensors.torch import load_file, save_file

from requant.architecture import block_of
from requant.benchmark import _whole_model
from requant.chain import embed, run_reference_block
from requant.checkpoint import Checkpoint
from requant.config import Target, Tuning
from requant.copying import copy_block
from requant.dtypes import main_dtype, released_dtype
from requant.errors import RequantError
from requant.locks import source_record, tensors_of
from requant.packing import pack
from requant.plan import source_of
from requant.quantize import BlockJob, quantize_block
from requant.records import CheckedFile, KeepList, VerifyRecord
from requant.safetensors_io import save
from requant.schemes import SCHEMES
from requant.sizes import Shaped
from requant.streamed import StreamedModel
from requant.targets import weight_bytes
from requant.verify import verify

BIAS = "e_score_correction_bias"


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() > 1


# Name: family, and the dtype that each tensor is stored in.
STORED = {
    "all F32": ("deepseek_v3", lambda name, tensor: torch.float32),
    "all F16": ("qwen3", lambda name, tensor: torch.float16),
    "F16 but for norms in F32": ("qwen3_moe", lambda n, t: torch.float16 if is_matrix(n, t) else torch.float32),
    "F32 norms and head": (
        "llama",
        lambda n, t: torch.float32 if "norm" in n or "lm_head" in n or "embed" in n else torch.bfloat16,
    ),
    "F32 indexer, as DeepSeek has it": (
        "deepseek_v32",
        lambda n, t: torch.float32 if BIAS in n or "k_norm" in n or "weights_proj" in n else torch.bfloat16,
    ),
    "F16 router and biases": (
        "glm4_moe",
        lambda n, t: torch.float16 if "gate.weight" in n or n.endswith(".bias") else torch.bfloat16,
    ),
    "one block in F32": ("qwen3", lambda n, t: torch.float32 if "layers.1." in n else torch.bfloat16),
}


def make_source(folder: Path, case: str) -> Path:
    """A tiny model of two blocks in the case's dtypes; values that BF16 does not hold where F16 or F32 does."""
    family, dtype = STORED[case]
    source = tiny.write_checkpoint(folder / "m", family, seed=3, num_hidden_layers=2)
    draw = torch.Generator().manual_seed(1)
    for shard in source.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load_file(shard).items():
            wide = tensor.float() + torch.randn(tensor.shape, generator=draw) * 1e-3 * tensor.float().abs()
            tensors[name] = wide.to(dtype(name, tensor))
        save_file(tensors, shard, metadata={"format": "pt"})
    tensors_of.cache_clear()
    return source


def expected(source: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the source as a release has it, by the rule in words: counted anew, and not by requant."""
    stored = {}
    for shard in source.glob("*.safetensors"):
        stored |= load_file(shard)
    groups: dict[int | None, list[str]] = {None: []}
    for name in stored:
        if (block := block_of(name, 2)) is not None:
            groups.setdefault(block, []).append(name)
            groups[None].append(name)
    main = {}
    for block, names in groups.items():
        counts: dict[torch.dtype, int] = {}
        for name in names:
            counts[stored[name].dtype] = counts.get(stored[name].dtype, 0) + stored[name].numel()
        main[block] = max(counts, key=counts.get)
    found = {}
    for name, tensor in stored.items():
        keeps = main[block_of(name, 2)] == torch.bfloat16
        found[name] = tensor.float() if name.endswith(BIAS) else tensor if keeps else tensor.bfloat16()
    return found


def pack_and_verify(work: SimpleNamespace, scheme: str, limits, keep: KeepList | None = None) -> VerifyRecord:
    pack(work.source, "r", "m", scheme, work.blocks, work.model, work.folder / "pack.json", keep=keep)
    return verify(work.source, work.model, "r", limits, 4, work.folder / "verify.json", keep)


@pytest.fixture(params=STORED)
def work(request, tmp_path):
    return SimpleNamespace(
        folder=tmp_path,
        source=make_source(tmp_path, request.param),
        blocks=tmp_path / "blocks",
        model=tmp_path / "model",
        case=request.param,
    )


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_a_release_in_bf16_has_the_files_bytes_or_rounds_once(work):
    for block in range(2):
        copy_block(work.source, "r", block, "BF16", work.blocks / f"{block}.safetensors", work.blocks / f"{block}.json")
    record = pack_and_verify(work, "BF16", None)
    wanted, found = expected(work.source), stored_in(work.model)
    assert record.unchanged == record.source_tensors == len(wanted) and found.keys() == wanted.keys()
    assert [name for name in wanted if not same(found[name], wanted[name])] == []
    check_sizes(work, "BF16")


def check_sizes(work, scheme: str) -> None:
    """Plan, preflight's bytes and files agree to the byte."""
    shards = sorted(work.model.glob("*.safetensors"))
    known = source_of(str(work.source), None).structure
    size = known.release_size(SCHEMES[scheme], [])
    assert size.blocks == [shard.stat().st_size for shard in shards[:-1]] and size.rest == shards[-1].stat().st_size
    held = Checkpoint(work.source).entries(tensors_of(str(work.source)))
    tensors = {name: Shaped(entry.dtype, tuple(entry.shape)) for name, entry in held.items()}
    target = Target(engine="vllm", device="cuda", gpu="sm100", image="x@sha256:" + "0" * 64, memory_gb=80)
    values = sum(t.numel() * t.element_size() for t in stored_in(work.model).values())
    assert weight_bytes(known.config, tensors, SCHEMES[scheme], [], False, target) == values == size.tensors


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_what_a_quantized_release_does_not_quantize_has_the_files_bytes(work, scheme):
    tokens = torch.randint(3, 320, (6, 16), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    sets = {"calibration": tokens[:4].clone(), "heldout": tokens[4:].clone()}
    masks = {f"{part}_mask": torch.ones_like(rows, dtype=torch.uint8) for part, rows in sets.items()}
    save(work.folder / "tokens.safetensors", sets | masks)
    hidden = work.folder / "embedded.safetensors"
    embed(work.source, work.folder / "tokens.safetensors", hidden)
    for block in range(2):
        after = work.folder / f"hidden_{block}.safetensors"
        run_reference_block(
            work.source, work.folder / "tokens.safetensors", hidden, block, after, *beside(work, block), "m", "c"
        )
        tuning = Tuning(iters=0, inputs="reference")
        tokens_path = work.folder / "tokens.safetensors"
        job = BlockJob(work.source, "r", "m", block, scheme, tuning, [], tokens_path, hidden, after)
        quantize_block(job, work.blocks / f"{block}.safetensors", work.blocks / f"{block}.json", None)
        hidden = after
    record = pack_and_verify(work, scheme, (0.9, 0.3))
    wanted, found = expected(work.source), stored_in(work.model)
    plain = [name for name in wanted if name in found]
    assert len(plain) == record.unchanged and record.unchanged + len(record.tensors) == record.source_tensors
    assert [name for name in plain if not same(found[name], wanted[name])] == []
    check_sizes(work, scheme)


def beside(work, block: int) -> list[Path]:
    return [work.folder / f"{name}_{block}" for name in ("routing.json", "saliency.csv")]


@pytest.fixture
def indexer(tmp_path):
    return SimpleNamespace(
        folder=tmp_path,
        source=make_source(tmp_path, "F32 indexer, as DeepSeek has it"),
        blocks=tmp_path / "blocks",
        model=tmp_path / "model",
    )


def test_a_release_that_rounds_what_it_should_keep_is_refused(indexer):
    for block in range(2):
        shard = indexer.blocks / f"{block}.safetensors"
        copy_block(indexer.source, "r", block, "BF16", shard, indexer.blocks / f"{block}.json")
    name = "model.layers.1.self_attn.indexer.k_norm.weight"
    tensors = load_file(indexer.blocks / "1.safetensors")
    save(indexer.blocks / "1.safetensors", tensors | {name: tensors[name].bfloat16()})
    with pytest.raises(RequantError, match=rf"^{name}: differs from the source: bfloat16 found; expected float32"):
        pack_and_verify(indexer, "BF16", None)


def test_pruned_routers_in_f32_lose_rows_and_no_digits(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "m", "qwen3_moe", num_hidden_layers=2)
    router = "model.layers.0.mlp.gate.weight"
    shard = source / Checkpoint(source).stored[router]
    tensors = load_file(shard)
    tensors[router] = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    save_file(tensors, shard, metadata={"format": "pt"})
    kept = {block: [1, 2, 5, 7] for block in range(2)}
    keep = KeepList(
        model="p", source="m", method="reap", observe="oneshot", calibration="c", seed=0, experts_before=8, experts=4,
        groups=1, blocks=kept, never_reached={},
    )  # fmt: skip
    work = SimpleNamespace(folder=tmp_path, source=source, blocks=tmp_path / "blocks", model=tmp_path / "model")
    for block in range(2):
        copy_block(
            source, "r", block, "BF16", work.blocks / f"{block}.safetensors", work.blocks / f"{block}.json", keep
        )
    pack_and_verify(work, "BF16", None, keep)
    assert same(stored_in(work.model)[router], tensors[router][[1, 2, 5, 7]])


def test_blocks_compute_alike_whatever_the_files_dtype_is(tmp_path):
    """The same values in BF16 and in F32: the same hidden states, to the bit."""
    plain = tiny.write_checkpoint(tmp_path / "plain", "deepseek_v3", num_hidden_layers=2)
    wide = tmp_path / "wide"
    wide.mkdir()
    for path in plain.iterdir():
        if path.suffix == ".safetensors":
            save_file({name: t.float() for name, t in load_file(path).items()}, wide / path.name, {"format": "pt"})
        else:
            (wide / path.name).write_bytes(path.read_bytes())
    tokens = torch.arange(3, 40)[None]
    ours, theirs = (StreamedModel(Checkpoint(folder)).logits_of(tokens) for folder in (wide, plain))
    assert torch.equal(ours, theirs)


def test_the_arithmetic_of_a_rounded_source_is_told(tmp_path):
    told = {case: _whole_model(Checkpoint(make_source(tmp_path / case, case)), "cpu")[1] for case in list(STORED)[:2]}
    assert told == {
        "all F32": "F32 weights rounded to BF16, BF16 activations",
        "all F16": "F16 weights rounded to BF16, BF16 activations",
    }
    other = make_source(tmp_path / "other", "F32 norms and head")
    assert _whole_model(Checkpoint(other), "cpu")[1] == "BF16 weights and activations"


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
def test_values_that_bf16_has_not_are_refused_by_name(tmp_path, value):
    source = make_source(tmp_path, "all F32")
    name = "model.norm.weight"
    shard = source / Checkpoint(source).stored[name]
    tensors = load_file(shard)
    tensors[name][5] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    with refused(tmp_path, f"{source}: {name}: 1 of 128 values are NaN or infinite"):
        Checkpoint(source).read([name])


def test_the_record_of_a_source_has_its_dtypes(tmp_path):
    source = make_source(tmp_path, "all F16")
    record = source_record("m", source, None, {"config.json": CheckedFile(size=1, sha256="0" * 64, seconds=0)})
    assert record.dtypes == {"F16": record.parameters}


def test_most_of_the_parameters_decide_and_fp8_counts_as_bf16():
    big, small = Shaped("F32", (10, 10)), Shaped("BF16", (3, 3))
    assert main_dtype([big, small]) == "F32" and main_dtype([small, Shaped("F16", (2, 2))]) == "BF16"
    assert main_dtype([Shaped("F8_E4M3", (20, 10)), big]) == "BF16" and main_dtype([]) == "BF16"
    assert main_dtype([Shaped("F32", (3, 3)), small]) == "BF16", "a tie"
    assert released_dtype("a.weight", "F16", "F32") == "BF16" and released_dtype("a.weight", "F32", "BF16") == "F32"
    assert released_dtype("a.weight", "F8_E4M3", "BF16") == "BF16"
    assert [released_dtype(f"a.{BIAS}", dtype, "BF16") for dtype in ("BF16", "F16", "F32")] == ["F32"] * 3
