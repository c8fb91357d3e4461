"""Saliencies are those of the model's own routing, by hand and by an independent pass; keep lists follow from them."""

import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from requant.blocks import Experts
from requant.chain import embed, run_reference_block
from requant.checkpoint import Checkpoint
from requant.errors import RequantError
from requant.keep_list import Pruning, keep_list
from requant.reap import Watch
from requant.routing import observe
from requant.safetensors_io import save
from requant.saliency import COLUMNS, read_table, table_of, write_table
from requant.streamed import StreamedModel

DEMO = Path(__file__).parents[2] / "demo"
GROUPS = 4


def scaled(factor: float) -> nn.Module:
    """An expert whose output is its input times `factor`, so that its norm is known."""
    linear = nn.Linear(2, 2, bias=False)
    linear.weight = nn.Parameter(torch.eye(2) * factor, requires_grad=False)
    return linear


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    """24 samples of 64 tokens of the embedded model's calibration text."""
    sys.path.append(str(DEMO))
    documents = import_module("generate").documents("calibration", "stories", 120, 3)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    ids = [token for row in documents for token in tokenizer(row["text"])["input_ids"]]
    return torch.tensor(ids[: 24 * 64]).view(24, 64)


@pytest.fixture(scope="module")
def watched(texts) -> dict[int, Watch]:
    """The embedded model's blocks, watched one after another as the reference chain runs them."""
    model, watches = StreamedModel(Checkpoint(DEMO / "model")), {}
    hidden = model.embed(texts)
    for block in range(model.blocks):
        watches[block] = Watch()
        hidden = observe(model, model.block(block), hidden, None, watch=watches[block]).output
    return watches


def test_known_gates_and_norms_give_the_numbers_by_hand():
    """Tokens of norms 5, 10 and 1 through experts that scale by 1, 2, 3 and 10; the last is not reached."""
    experts, watch = Experts([scaled(1), scaled(2), scaled(3), scaled(10)]), Watch()
    hidden = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]])
    chosen = torch.tensor([[0, 1], [2, 1], [1, 2]])
    gates = torch.tensor([[0.5, 0.25], [0.75, 0.5], [1.0, 0.125]])
    handles = watch.hooks(experts)
    experts(hidden[:2], chosen[:2], gates[:2])
    experts(hidden[2:], chosen[2:], gates[2:])
    for handle in handles:
        handle.remove()
    experts(hidden, chosen, gates)
    table = watch.table(groups=2)
    assert table["group"].tolist() == [0, 0, 1, 1]
    assert table["tokens"].tolist() == [1, 3, 2, 0]
    assert table["frequency"].tolist() == [1 / 6, 3 / 6, 2 / 6, 0]
    assert table["weighted_frequency"].tolist() == [0.5 / 3.125, 1.75 / 3.125, 0.875 / 3.125, 0]
    # by gate x factor x norm of the token
    mass = [0.5 * 1 * 5, 0.25 * 2 * 5 + 0.5 * 2 * 10 + 1 * 2 * 1, 0.75 * 3 * 10 + 0.125 * 3 * 1, 0]
    assert table["mass"].tolist() == mass
    assert table["saliency"].tolist() == [mass[0], mass[1] / 3, mass[2] / 2, 0]


def test_a_plain_forward_with_hooks_gives_the_same_saliencies_and_keep_list(texts, watched, tmp_path):
    """transformers' own model, all of it at once, experts stacked: their outputs computed from the hooked inputs."""
    model = AutoModelForCausalLM.from_pretrained(
        DEMO / "model", dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="eager"
    )
    seen: dict[int, list[tuple]] = {}
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(
                lambda module, inputs, number=number: seen.setdefault(number, []).append(inputs)
            )
    with torch.no_grad():
        for start in range(0, len(texts), 8):
            model(texts[start : start + 8])
    ours, theirs = {}, {}
    for block, batches in seen.items():
        experts = model.model.layers[block].mlp.experts
        hidden, chosen, gates = (torch.cat(parts) for parts in zip(*batches, strict=True))
        sums = [saliency_sums(experts, expert, hidden, chosen, gates) for expert in range(experts.num_experts)]
        expected, found = table_of(*zip(*sums, strict=True), GROUPS), watched[block].table(GROUPS)
        assert found["tokens"].tolist() == expected["tokens"].tolist()
        for column in ("weighted_frequency", "saliency", "mass"):
            assert found[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-4), (block, column)
        ours[block], theirs[block] = tmp_path / f"ours_{block}.csv", tmp_path / f"theirs_{block}.csv"
        write_table(ours[block], found)
        write_table(theirs[block], expected)
    assert list(seen) == [1, 2, 3, 4, 5]
    for experts in (12, 8):
        pruning = Pruning("small", "demo", "reap", "oneshot", "c", 42, 16, experts, GROUPS)
        assert keep_list(pruning, ours) == keep_list(pruning, theirs)


def saliency_sums(experts: nn.Module, expert: int, hidden, chosen, gates) -> tuple[int, float, float]:
    """(tokens, sum of gates, sum of gate x norm) of one expert of transformers' stacked ones, token by token."""
    tokens, gate_sum, mass = 0, 0.0, 0.0
    gate_rows, up_rows = experts.gate_up_proj[expert].chunk(2)
    reached = (chosen == expert).any(-1)
    with torch.no_grad():
        inner = experts.act_fn(hidden[reached] @ gate_rows.T) * (hidden[reached] @ up_rows.T)
        outputs = (inner @ experts.down_proj[expert].T).double()
    for output, gate in zip(outputs, gates[chosen == expert].double(), strict=True):
        tokens, gate_sum, mass = tokens + 1, gate_sum + float(gate), mass + float(gate * output.square().sum().sqrt())
    return tokens, gate_sum, mass


def test_saliencies_are_the_same_bytes_on_every_run_and_with_two_threads(texts, tmp_path):
    model = StreamedModel(Checkpoint(DEMO / "model"))
    hidden, block, threads = model.embed(texts), model.block(1), torch.get_num_threads()
    written = []
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        watch = Watch()
        observe(model, block, hidden, None, watch=watch)
        write_table(tmp_path / "table.csv", watch.table(GROUPS))
        written.append((tmp_path / "table.csv").read_bytes())
    torch.set_num_threads(threads)
    assert written[0] == written[1] == written[2]


def reference_table(folder: Path, texts: torch.Tensor, heldout: torch.Tensor, mask: torch.Tensor) -> pd.DataFrame:
    """The table that the job of the reference chain writes of block 1, for an embedding as its input."""
    folder.mkdir()
    paths = [folder / name for name in ("tokens", "embedded", "hidden", "routing.json", "saliency.csv")]
    masks = {"calibration_mask": mask, "heldout_mask": torch.ones_like(heldout, dtype=torch.uint8)}
    save(paths[0], {"calibration": texts.int(), "heldout": heldout.int()} | masks)
    embed(DEMO / "model", paths[0], paths[1])
    run_reference_block(DEMO / "model", paths[0], paths[1], 1, *paths[2:], "demo", "c")
    return read_table(paths[4])


def test_padding_and_held_out_tokens_are_left_out(texts, tmp_path):
    whole = torch.ones(8, 64, dtype=torch.uint8)
    padded = whole.clone()
    padded[2, 40:] = 0
    table = reference_table(tmp_path / "a", texts[:8], texts[8:12], whole)
    assert table["tokens"].sum() == 8 * 64 * 4
    pd.testing.assert_frame_equal(table, reference_table(tmp_path / "b", texts[:8], texts[12:20], whole))
    changed = texts[:8].clone()
    changed[2, 40:] = 7
    short = reference_table(tmp_path / "c", texts[:8], texts[8:12], padded)
    assert short["tokens"].sum() == (8 * 64 - 24) * 4
    pd.testing.assert_frame_equal(short, reference_table(tmp_path / "d", changed, texts[8:12], padded))
    assert short["mass"].sum() < table["mass"].sum()


# Tables


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = table_of([3, 0, 1, 2], [0.1 + 0.2, 0.0, 1 / 3, 2 / 3], [1 / 7, 0.0, 1e-17, 12345.678901234567], 2)
    write_table(tmp_path / "t.csv", table)
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.csv"), table, check_exact=True)
    assert (tmp_path / "t.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_dense_block_has_the_header_alone(tmp_path):
    write_table(tmp_path / "t.csv", Watch().table(4))
    header, digest = (tmp_path / "t.csv").read_text().splitlines()
    assert header == ",".join(COLUMNS) and digest.startswith("# xxh3_64 ")
    assert len(read_table(tmp_path / "t.csv")) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "t.csv: not there; expected a table of saliencies"),
        ("expert,tokens\n0,1\n", "t.csv: columns expert, tokens; expected expert, group, tokens"),
        ("", "t.csv: no CSV (No columns to parse from file); expected a table of saliencies; delete it to rebuild"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "t.csv").write_text(text)
    with pytest.raises(RequantError) as caught:
        read_table(tmp_path / "t.csv")
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


# Keep lists


def tables(folder: Path, *, tokens: list[int], mass: list[float], groups: int = 2) -> dict[int, Path]:
    """Tables of a dense block 0 and of the MoE block 1."""
    write_table(folder / "0.csv", table_of([], [], [], groups))
    write_table(folder / "1.csv", table_of(tokens, [float(count) for count in tokens], mass, groups))
    return {0: folder / "0.csv", 1: folder / "1.csv"}


def keep(found: dict[int, Path], experts: int, groups: int = 2, method: str = "reap", seed: int = 42):
    return keep_list(Pruning("small", "large", method, "oneshot", "c", seed, 8, experts, groups), found)


def test_every_group_keeps_its_best_by_the_method(tmp_path):
    """Saliencies 1..4 in the first group, ten times that in the second; frequencies the other way round."""
    found = tables(tmp_path, tokens=[8, 7, 6, 5, 4, 3, 2, 1], mass=[8, 14, 18, 20, 40, 60, 60, 40])
    reap = keep(found, 4)
    assert reap.blocks == {1: [2, 3, 6, 7]} and reap.experts_before == 8
    assert keep(found, 4, groups=1).blocks == {1: [4, 5, 6, 7]}, "a router without groups keeps the best of all"
    assert keep(found, 4, method="frequency").blocks == {1: [0, 1, 4, 5]}


def test_of_equal_experts_those_of_lower_index_are_kept(tmp_path):
    found = tables(tmp_path, tokens=[1] * 8, mass=[1, 2, 1, 1, 3, 3, 3, 3])
    assert keep(found, 4).blocks == {1: [0, 1, 4, 5]}


def test_experts_never_reached_go_first_and_are_named(tmp_path):
    found = tables(tmp_path, tokens=[5, 0, 5, 5, 5, 5, 5, 0], mass=[1, 0, 1, 1, 1, 1, 1, 0])
    record = keep(found, 6)
    assert record.blocks == {1: [0, 2, 3, 4, 5, 6]} and record.never_reached == {1: [1, 7]}


def test_random_lists_follow_from_the_seed_and_differ_by_block(tmp_path):
    found = tables(tmp_path, tokens=[1] * 8, mass=[1.0] * 8)
    found |= {block: found[1] for block in range(2, 12)}
    first, again, other = (keep(found, 4, method="random", seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(kept) for kept in first.blocks.values()}) > 5, "11 blocks, 36 lists to draw from"
    for kept in first.blocks.values():
        assert sum(expert < 4 for expert in kept) == 2 and kept == sorted(set(kept))


def test_a_table_of_another_number_of_experts_is_refused(tmp_path):
    found = tables(tmp_path, tokens=[1] * 4, mass=[1.0] * 4)
    with pytest.raises(RequantError, match=r"1\.csv: 4 experts found; expected 8, or none if it is dense"):
        keep(found, 4)
