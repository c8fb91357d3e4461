"""How far an engine is from the chain is told beside what rounding does to this very model, and beyond chance."""

import math

import pytest
import tiny
import torch

from requant import chance
from requant.distances import EVERYWHERE, FEWEST, Reading, Row, distances, distinct, farthest, reading
from requant.engine_client import echo_rows, next_tokens
from requant.packed import PackedCheckpoint
from requant.roundings import ROUNDINGS, STEP, again, passed
from requant.streamed import StreamedModel

# Chance


def test_the_most_that_chance_explains():
    """Of 16 events with a probability of 0.05 each, 5 or more happen in 0.0009 of all cases, 4 or more in 0.007."""
    assert chance.most(16, 0.05) == 4 and chance.most(16, 0.05, alpha=0.01) == 3
    assert chance.most(2, 0.05) == 2, "even both of two tell nothing"
    assert chance.most(0, 0.05) == 0 and chance.most(100, 0.0) == 0 and chance.most(100, 1.0) == 100


def test_an_upper_bound_of_a_probability():
    """Wilson's interval: for no event among n, z^2 / (n + z^2)."""
    square = 2.326348**2
    assert chance.upper_bound(0, 100) == pytest.approx(square / (100 + square))
    assert chance.upper_bound(50, 100) == pytest.approx(0.5 + 0.5 * 2.326348 / math.sqrt(100 + square))
    assert chance.upper_bound(7, 7) == pytest.approx(1) and chance.upper_bound(0, 0) == 1


def test_samples_of_one_distribution_are_apart_by_chance():
    """Smirnov's limit law, checked by drawing: of 400 pairs of 100 and 200 values, none is so far apart."""
    allowed = chance.apart(100, 200)
    assert allowed == pytest.approx(math.sqrt(math.log(1000) / 2 * 0.015))
    assert chance.apart(100, 200, tests=10) > allowed > chance.apart(1000, 2000)
    draw = torch.Generator().manual_seed(0)
    for _ in range(400):
        values, usual = (torch.rand(size, generator=draw).exp() for size in (100, 200))
        assert chance.times_larger(values, usual, allowed) <= 1


def test_how_many_times_larger_a_sample_is():
    usual = torch.linspace(1, 2, 1001)
    assert chance.times_larger(3 * usual, usual, 0.0) == pytest.approx(3, rel=0.01)
    assert chance.times_larger(3 * usual, usual, 0.2) == pytest.approx(3 * 1.8 / 2, rel=0.01), "0.8 of it beside all"
    half = torch.cat([usual, 8 * usual])
    assert chance.times_larger(half, usual, 0.1) > 4, "half of it is far larger"
    assert chance.times_larger(torch.cat([usual] * 19 + [8 * usual]), usual, 0.1) < 1, "a twentieth of it is"
    assert chance.times_larger(3 * usual[:5], usual, 1.0) == 0
    assert chance.times_larger(torch.zeros(50), torch.zeros(50), 0.1) == 0


def test_values_that_depend_on_each_other_are_fewer_than_they_seem():
    draw = torch.Generator().manual_seed(0)
    alone = torch.rand(30, 640, generator=draw)
    assert chance.overdispersion(alone) == pytest.approx(1, abs=0.5)
    together = torch.rand(30, 40, generator=draw).repeat_interleave(16, dim=1)
    assert chance.overdispersion(together) == pytest.approx(16, rel=0.5)
    assert chance.overdispersion(alone[:1]) == 1


# Distances


def read_of(noise: torch.Tensor, experts: dict[tuple[int, int], list[int]], rows: list[Row] | None = None) -> Reading:
    """A reading of one value a position, whose other roundings are `noise` [roundings, positions] off."""
    count = noise.shape[1]
    own = torch.zeros(count, 1, dtype=torch.float64)
    masks = {expert: [torch.isin(torch.arange(count), torch.tensor(places))] for expert, places in experts.items()}
    rows = rows or echo_rows([list(range(count + 1))])
    return Reading(rows, [own], [[part[:, None].double()] for part in noise], masks)


def noise_of(count: int, seed: int) -> torch.Tensor:
    return torch.rand(3, count, generator=torch.Generator().manual_seed(seed)) + 0.5


def test_a_right_engine_is_as_far_off_as_another_rounding():
    read = read_of(noise_of(2000, 0), {(1, expert): list(range(expert, 2000, 8)) for expert in range(8)})
    found = farthest([noise_of(2000, 1)[0].double()], read)
    assert 0.8 < found.times < 1 and found.positions in (2000, 250)


@pytest.mark.parametrize("positions", [FEWEST, 250])
def test_an_expert_that_is_farther_off_is_named(positions):
    places = list(range(positions))
    read = read_of(noise_of(2000, 0), {(3, 7): places, (3, 6): list(range(500, 1500))})
    found = noise_of(2000, 1)[0].double()
    found[:positions] *= 10
    far = farthest([found], read)
    assert far.where == "tokens of expert 7 of block 3" and far.positions == positions
    assert 1.25 < far.times < 10
    few = farthest([found], read_of(noise_of(2000, 0), {(3, 7): places[: FEWEST - 1]}))
    assert few.where == EVERYWHERE, "too few to tell"


def test_what_rounding_does_to_these_tokens_is_no_fault():
    """An expert whose tokens lie between two others is far off by another rounding, and so by an engine."""
    noise = noise_of(2000, 0)
    noise[:, :200] *= 10
    found = noise_of(2000, 1)[0].double()
    found[:200] *= 10
    assert farthest([found], read_of(noise, {(3, 7): list(range(200))})).times < 1


def test_a_few_flips_are_no_fault_and_many_are():
    read = read_of(noise_of(2000, 0), {})
    found = noise_of(2000, 1)[0].double()
    found[:60] = 100
    assert farthest([found], read).times < 1
    found[:600] = 100
    assert farthest([found], read).times > 10


def test_the_same_computation_counts_once():
    rows = echo_rows([[0, 1, 2], [0, 1, 3], [0, 1, 2]])
    assert distinct(rows).tolist() == [True, True, False, False, False, False], "what comes next is compared"
    same = echo_rows([[0, 1]] * 500 + [[0, *range(2, 102)]])
    noise = noise_of(600, 0)
    found = noise_of(600, 1)[0].double()
    found[:500] = 100  # one token that rounding sends elsewhere, five hundred times
    rows_of = [part.double() for part in found.split([1] * 500 + [100])]
    read = read_of(noise, {}, same)
    read.own = list(read.own[0].split([1] * 500 + [100]))
    read.others = [list(part[0].split([1] * 500 + [100])) for part in read.others]
    assert farthest(rows_of, read).times < 1


# Roundings


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v3", "llama"])
def model(request, tmp_path_factory) -> StreamedModel:
    return StreamedModel(PackedCheckpoint(tiny.write_checkpoint(tmp_path_factory.mktemp("m") / "m", request.param)))


def rows_of(count: int, length: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=draw).tolist() for _ in range(count)]


def test_the_chains_own_rounding_is_the_chain(model):
    rows = rows_of(3, 20, 0)
    done = passed(model, rows)
    expected = model.logits_of(torch.tensor(rows))
    head = model.head()
    for states, logits in zip(done.states[0], expected, strict=True):
        assert torch.equal(head(states), logits)
    assert len(done.states) == 1 + ROUNDINGS
    for others in done.states[1:]:
        assert not any(torch.equal(a, b) for a, b in zip(others, done.states[0], strict=True))
    for these, those in zip(done.states, passed(model, rows).states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(these, those, strict=True)), "the same numbers each time"


def test_rows_of_any_length_come_back_in_their_order(model):
    rows = [*rows_of(2, 5, 1), *rows_of(1, 40, 2), *rows_of(2, 6, 3)]
    done = passed(model, rows, 0)
    for row, states in zip(rows, done.states[0], strict=True):
        alone = passed(model, [row], 0).states[0][0]
        assert states.shape == alone.shape
        assert float((states - alone).abs().max()) <= 2**-4 * float(alone.abs().max())
    for reached in done.experts.values():
        assert [len(part) for part in reached] == [len(row) for row in rows]
    per_token = sum(part.sum() for reached in done.experts.values() for part in reached)
    chosen = getattr(model.config, "num_experts_per_tok", 0) * len({block for block, _ in done.experts})
    assert per_token == chosen * sum(map(len, rows))


def test_another_rounding_moves_a_value_by_one_step_at_most():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    moved = again(x, torch.Generator().manual_seed(1))
    assert moved.dtype == x.dtype
    step = 2.0 ** (x.float().abs().log2().floor() - 7)
    assert float(((moved.float() - x.float()).abs() / step).max()) == 1
    assert 0.2 < float((moved != x).double().mean()) < 0.35
    assert float((moved.float() / x.float() - 1).abs().max()) <= 2 * STEP


def test_one_more_rounding_of_a_random_model_passes_and_a_damaged_expert_does_not(model):
    rows = echo_rows(rows_of(16, 64, 4))
    done = passed(model, [row.ids for row in rows], ROUNDINGS + 1)
    engine = done.states.pop()
    read = reading(done, model.head(), rows, next_tokens)
    head = model.head()
    views = [next_tokens(head(states), row) for states, row in zip(engine, rows, strict=True)]
    assert 0.7 < farthest(distances(views, read.own), read).times < 1.15
    if not done.experts:
        return
    block, expert = max(done.experts, key=lambda name: sum(int(part.sum()) for part in done.experts[name]))
    real = model.block

    def damaged(index: int, quantize_activations: bool | str = False) -> torch.nn.Module:
        module = real(index, quantize_activations)
        if index == block:
            module.mlp.experts[expert].down_proj.weight.data.mul_(2)
        return module

    model.block = damaged
    try:
        states = passed(model, [row.ids for row in rows], 0).states[0]
    finally:
        del model.block
    views = [next_tokens(head(part), row) for part, row in zip(states, rows, strict=True)]
    assert farthest(distances(views, read.own), read).times > 1.5
