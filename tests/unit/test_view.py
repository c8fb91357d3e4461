"""A pruned model is a view: it reads as the checkpoint that pruning by hand writes, of each family and storage."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_verify import make_release

from requant.checkpoint import INDEX, Checkpoint
from requant.config import VERIFY_DEFAULTS
from requant.errors import RequantError
from requant.locks import tensors_of
from requant.records import KeepList, PackRecord, read_json
from requant.safetensors_io import read_header
from requant.streamed import StreamedModel
from requant.verify import verify

EVERY_BLOCK = ("mixtral", "qwen3_moe")  # families with experts in every block; the others' first is dense
# Two of each group of 4 in blocks 1 and 2; of 8 experts otherwise.
GROUPED = {1: [0, 3, 4, 5], 2: [1, 2, 6, 7]}
PLAIN = {0: [0, 2, 3, 5, 6, 7], 1: [1, 2, 3, 4, 5, 6], 2: [0, 1, 2, 5, 6, 7]}


def keep_of(blocks: dict[int, list[int]], groups: int = 1, before: int = 8) -> KeepList:
    return KeepList(
        model="pruned",
        source="whole",
        method="reap",
        observe="oneshot",
        calibration="c",
        seed=42,
        experts_before=before,
        experts=len(next(iter(blocks.values()))),
        groups=groups,
        blocks=blocks,
        never_reached={},
    )


def prune_by_hand(source, directory, family: str, keep: dict[int, list[int]]):
    """A checkpoint of its own, from one stored an expert a tensor: plain loops over the names in its files."""
    tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    parent = "block_sparse_moe" if family == "mixtral" else "mlp"
    for block, experts in keep.items():
        prefix = f"model.layers.{block}.{parent}."
        found = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{prefix}experts.")}
        for new, old in enumerate(experts):
            start = f"{prefix}experts.{old}."
            tensors |= {
                f"{prefix}experts.{new}.{name.removeprefix(start)}": tensor.clone()
                for name, tensor in found.items()
                if name.startswith(start)
            }
        for leaf in ("gate.weight", "gate.e_score_correction_bias"):
            if prefix + leaf in tensors:
                tensors[prefix + leaf] = torch.stack([tensors[prefix + leaf][old] for old in experts])
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    key = next(key for key in ("n_routed_experts", "num_experts", "num_local_experts") if key in config)
    changed = {key: len(next(iter(keep.values())))} | {"num_nextn_predict_layers": 0}
    tiny.edit_config(directory, **{key: value for key, value in changed.items() if key in config})
    return directory


def blocks_kept(family: str) -> dict[int, list[int]]:
    return PLAIN if family in EVERY_BLOCK else {block: PLAIN[block] for block in (1, 2)}


TOKENS = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "glm4_moe", "qwen3_moe", "mixtral"])
def test_a_view_is_the_checkpoint_pruned_by_hand(tmp_path, family, stacked):
    changes = {"n_group": 2, "topk_group": 1} if family.startswith("deepseek") else {}
    keep = GROUPED if changes else blocks_kept(family)
    whole = tiny.write_checkpoint(tmp_path / "apart", family, seed=5, **changes)
    source = tiny.write_checkpoint(tmp_path / "read", family, seed=5, stacked=True, **changes) if stacked else whole
    by_hand = prune_by_hand(whole, tmp_path / "hand", family, keep)

    view = Checkpoint(source, keep_of(keep))
    other = Checkpoint(by_hand)
    assert view.index.keys() == other.index.keys()
    for name, tensor in other.read(sorted(other.index)).items():
        assert torch.equal(view.read([name])[name], tensor), name
    entries = view.entries(tensors_of(str(source)))
    assert {name: entry.shape for name, entry in entries.items()} == {
        name: entry.shape for name, entry in other.entries(read_header(by_hand / "model.safetensors")).items()
    }
    logits = StreamedModel(view).logits_of(TOKENS)
    assert torch.equal(logits, StreamedModel(other).logits_of(TOKENS))
    assert not torch.equal(logits, StreamedModel(Checkpoint(source)).logits_of(TOKENS))
    assert_transformers_agrees(by_hand, logits)


def assert_transformers_agrees(directory, logits: torch.Tensor) -> None:
    """Stock transformers loads the checkpoint and gives the same logits, up to BF16 rounding."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, experts_implementation="eager")
    with torch.no_grad():
        theirs = loaded(TOKENS).logits.float()
    assert (theirs - logits).abs().max() < 0.03 * logits.abs().max()


@pytest.mark.parametrize(
    ("family", "scheme", "blocks"),
    [("deepseek_v3", "NVFP4", GROUPED), ("qwen3_moe", "W3A16", PLAIN), ("mixtral", "NVFP4", PLAIN)],
)
def test_a_pruned_release_is_that_of_the_checkpoint_pruned_by_hand(tmp_path, family, scheme, blocks):
    """Byte for byte, config.json included; and it is verified against the view."""
    changes = {"n_group": 2, "topk_group": 1} if family == "deepseek_v3" else {}
    source = tiny.write_checkpoint(tmp_path / "whole", family, **changes)
    by_hand = prune_by_hand(source, tmp_path / "hand", family, blocks)
    keep = keep_of(blocks)
    of_view = make_release(tmp_path / "view", source, scheme, experts=keep)
    of_hand = make_release(tmp_path / "plain", by_hand, scheme)
    names = {path.name for path in (of_hand / "model").iterdir()}
    assert names == {path.name for path in (of_view / "model").iterdir()}
    for name in names:
        assert (of_view / "model" / name).read_bytes() == (of_hand / "model" / name).read_bytes(), name
    record, other = (read_json(folder / "pack.json", PackRecord) for folder in (of_view, of_hand))
    different = {"source_bytes", "seconds"}
    assert record.model_dump(exclude=different) == other.model_dump(exclude=different)
    assert record.routed_experts == len(blocks[1]) and record.parameters == other.parameters
    limits = VERIFY_DEFAULTS[scheme]
    found = verify(source, of_view / "model", "r", limits, 2, tmp_path / "verify.json", keep)
    assert found.source_tensors == len(Checkpoint(by_hand).index)
    other_keep = keep_of({block: sorted({7 - expert for expert in experts}) for block, experts in blocks.items()})
    with pytest.raises(RequantError, match="expected 0.98|expected 0.93|the same bytes"):
        verify(source, of_view / "model", "r", limits, 2, tmp_path / "verify.json", other_keep)
    with pytest.raises(RequantError, match="is missing; the source has it"):
        verify(source, of_view / "model", "r", limits, 2, tmp_path / "verify.json")


def test_a_view_of_an_fp8_source_decodes_what_it_keeps(tmp_path):
    plain = tiny.write_checkpoint(tmp_path / "plain", "deepseek_v3", n_group=2, topk_group=1)
    fp8 = tiny.write_fp8(plain, tmp_path / "fp8", tmp_path / "decoded")
    by_hand = prune_by_hand(tmp_path / "decoded", tmp_path / "hand", "deepseek_v3", GROUPED)
    view, other = Checkpoint(fp8, keep_of(GROUPED, groups=2)), Checkpoint(by_hand)
    assert any(name.startswith("model.layers.3.") for name in other.index)
    assert view.index.keys() == {name for name in other.index if not name.startswith("model.layers.3.")}
    assert view.config["num_nextn_predict_layers"] == 0 and view.config["n_routed_experts"] == 4
    names = sorted(view.index)
    theirs = other.read(names)
    for name, tensor in view.read(names).items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert torch.equal(StreamedModel(view).logits_of(TOKENS), StreamedModel(other).logits_of(TOKENS))


def test_files_of_a_view_are_those_of_its_source(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "m", "kimi_k2", mtp=True)
    keep = keep_of({1: [0, 1, 2, 3, 5], 2: [3, 4, 5, 6, 7]})
    view, whole = Checkpoint(source, keep), Checkpoint(source)
    assert view.files == whole.files and view.stored == whole.stored
    assert whole.config["n_routed_experts"] == 8 == json.loads((source / "config.json").read_text())["n_routed_experts"]
    assert "mtp.safetensors" in view.shards and "mtp.safetensors" not in view.index.values()


def test_a_block_that_the_list_does_not_decide_on_cannot_be_read(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "m", "glm4_moe")
    model = StreamedModel(Checkpoint(source, keep_of({1: [0, 1, 2, 3]})))
    model.block(0)
    model.block(1)
    with pytest.raises(RequantError, match=r"^keep list of pruned: block 2: not there; found: 1$"):
        model.block(2)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (keep_of({1: [0, 1]}, before=16), r"^keep list of pruned: 16 experts before; config.json counts 8$"),
        (keep_of({1: [1, 0]}), r"^keep list of pruned: block 1: \[1, 0\]; expected 2 of 8 experts, ascending$"),
        (keep_of({1: [1, 8]}), r"block 1: \[1, 8\]; expected 2 of 8"),
        (keep_of({1: [1, 1]}), r"block 1: \[1, 1\]; expected 2 of 8"),
        (keep_of({1: [0, 1], 2: [1, 2, 3]}), r"block 2: \[1, 2, 3\]; expected 2 of 8"),
    ],
)
def test_a_list_of_another_model_is_refused(tmp_path, keep, message):
    (tmp_path / "config.json").write_text(json.dumps(tiny.FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe"}))
    with pytest.raises(RequantError, match=message):
        Checkpoint(tmp_path, keep)
