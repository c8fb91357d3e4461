"""The fused engine on whole blocks: AutoRound's result, and what AutoRound does not promise."""

import dataclasses
import math
from functools import cache
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from requant import autoround, fused
from requant.blocks import Expert, Experts
from requant.checkpoint import Checkpoint
from requant.config import Tuning
from requant.errors import RequantError
from requant.grouped import group
from requant.quantize import mean_squared_error, packed_tensors, prepare, shipped_block
from requant.routed import Routing
from requant.routing import observe
from requant.schemes import SCHEMES
from requant.streamed import StreamedModel
from requant.tuned import NotFinite


@cache
def checkpoint(family: str, **changes) -> str:
    import tempfile
    from pathlib import Path

    return str(tiny.write_checkpoint(Path(tempfile.mkdtemp()), family, num_hidden_layers=2, **changes))


def case(family: str, samples: int = 16, tokens: int = 32, seed: int = 0, **changes) -> SimpleNamespace:
    """Block 1 of a random model, hidden states [samples, tokens, width] and what the block makes of them."""
    directory = checkpoint(family, **changes)
    model = StreamedModel(Checkpoint(directory))
    width = changes.get("hidden_size", 128)
    hidden = torch.randn(samples, tokens, width, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    targets = model.run(model.block(1), hidden)
    return SimpleNamespace(model=model, hidden=hidden, targets=targets, mask=None, directory=directory)


def tuned(case, scheme="NVFP4", engine="fused", keep=(), report=lambda iteration, loss: None, **settings):
    """Tunes the case's block; `prepare` and the engines' own calls, as quantize_block makes them."""
    prepared = prepare(case.model, 1, SCHEMES[scheme], list(keep), case.hidden, case.mask)
    linears = [name.removeprefix("model.layers.1.") for name in prepared.linears]
    tuning = Tuning(**({"iters": 20, "batch_size": 4} | settings))
    what = (case.hidden, case.targets, case.mask, case.model.positions(case.hidden.shape[1]))
    what += (SCHEMES[scheme], tuning, 11, report)
    if engine == "fused":
        return fused.tune(prepared.block, linears, *what)
    return autoround.tune(prepared.block, case.model.config, case.directory, linears, *what)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_losses_follow_auto_rounds(family, scheme):
    """The same samples in the same order. AutoRound runs a block under BF16 autocast, its router too, so that tokens
    near a tie go to other experts than in the model itself: curves of random MoE blocks part a little."""
    it = case(family, samples=32, tokens=64)
    ours, theirs = (tuned(it, scheme, engine, batch_size=8) for engine in ("fused", "auto_round"))
    routed = family not in ("llama", "qwen3")
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=0.03 if routed else 0.005)
    for window in (slice(0, 10), slice(10, 20)):
        assert sum(ours.losses[window]) == pytest.approx(sum(theirs.losses[window]), rel=0.05 if routed else 0.02)
    assert ours.weights.keys() == theirs.weights.keys()


def shipped_error(case, scheme: str, weights) -> float:
    """MSE over all samples of the case's block with `weights`, as a reader of the packed block gets it."""
    prepared = prepare(case.model, 1, SCHEMES[scheme], [], case.hidden, case.mask)
    source = {f"model.layers.1.{name}": tensor for name, tensor in case.model.block(1).state_dict().items()}
    weights = {f"model.layers.1.{name}": weight for name, weight in weights.items()}
    tensors = packed_tensors(source, weights, prepared.peaks, SCHEMES[scheme])
    shipped = shipped_block(case.model, 1, tensors, list(weights), SCHEMES[scheme])
    return mean_squared_error(observe(case.model, shipped, case.hidden, case.mask).output, case.targets, case.mask)


UNEVEN = {
    "llama": {"hidden_size": 136},
    "qwen3": {"hidden_size": 72, "head_dim": 40, "num_attention_heads": 16},
    "qwen3_moe": {"hidden_size": 72, "head_dim": 40, "num_attention_heads": 16, "moe_intermediate_size": 72},
    "deepseek_v3": {"hidden_size": 136, "q_lora_rank": 72, "kv_lora_rank": 40, "moe_intermediate_size": 40},
}


@pytest.mark.parametrize("family", list(UNEVEN))
@pytest.mark.parametrize("scheme", ["NVFP4", "W4A16"])
def test_widths_of_a_block_need_be_no_multiples_of_16(family, scheme):
    """Norms, attention and experts of any width, around the Linears that fit: the losses are those of what is shipped,
    and where no router can choose otherwise, AutoRound's."""
    it = case(family, samples=8, tokens=16, **UNEVEN[family])
    settings = {"keep": [r"mlp\.experts"], "iters": 6}
    ours = tuned(it, scheme, **settings)
    assert ours.weights and all(map(math.isfinite, ours.losses))
    plain = tuned(it, scheme, **settings | {"iters": 1})
    for loss, weights in ((ours.judged[0], plain.weights), (ours.judged[ours.kept], ours.weights)):
        assert loss == pytest.approx(shipped_error(it, scheme, weights), rel=0.05)
    if scheme == "NVFP4" and family in ("llama", "qwen3"):
        theirs = tuned(it, scheme, "auto_round", **settings)
        assert ours.weights.keys() == theirs.weights.keys()
        assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=0.03)
        assert sum(ours.losses) == pytest.approx(sum(theirs.losses), rel=0.05)


def test_rows_that_auto_round_makes_no_integers_of_are_refused_before_it_starts():
    it = case("llama", **UNEVEN["llama"])
    with pytest.raises(RequantError, match=r"^mlp\.down_proj: 136 rows; AutoRound .* multiples of 32: .*engine: fused"):
        tuned(it, "W4A16", "auto_round", report=lambda *_: pytest.fail("it was tuned"))


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_one_iteration_keeps_the_codes_and_scales_of_auto_round(scheme):
    ours, theirs = (tuned(case("deepseek_v3"), scheme, engine, iters=1) for engine in ("fused", "auto_round"))
    for name, weight in ours.weights.items():
        assert torch.equal(weight.weight, theirs.weights[name].weight), name
        assert torch.equal(weight.scales.float(), theirs.weights[name].scales.float()), name


class Plain(nn.Module):
    """Experts whose weights are those of stacks: the same sum, by autograd, in float64."""

    def __init__(self, experts: fused.TunedExperts):
        super().__init__()
        rows = (len(experts.gate_up.rows) // 2, -1)
        self.gate_up = experts.gate_up.values().double().unflatten(0, rows).requires_grad_()
        self.down = experts.down.values().double().unflatten(0, rows).requires_grad_()

    def forward(self, hidden, chosen, gates):
        output = torch.zeros_like(hidden)
        for expert in range(len(self.down)):
            token, choice = torch.where(chosen == expert)
            gate, up = (hidden[token] @ self.gate_up[expert].t()).chunk(2, -1)
            part = (nn.functional.silu(gate) * up) @ self.down[expert].t()
            output = output.index_add(0, token, part * gates[token, choice, None])
        return output


@pytest.mark.parametrize("skewed", [False, True])
def test_gradients_of_all_experts_are_autograds_in_float64(skewed, monkeypatch):
    """Also where nearly all tokens go to one expert, another gets none, and experts are multiplied one by one."""
    count, width, inner, tokens = 8, 64, 128, 200
    draw = torch.Generator().manual_seed(0)
    experts = Experts(Expert(width, inner, nn.SiLU()) for _ in range(count)).to(torch.bfloat16)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    schedule = fused.Schedule(10, 0.1, 0.1, True)
    linears = [f"experts.{name}" for name, module in experts.named_modules() if isinstance(module, nn.Linear)]
    block = nn.ModuleDict({"experts": experts})
    scheme = dataclasses.replace(SCHEMES["W8A16"], group_size=64)
    gate_up, down = fused.take_apart(block, linears, scheme, schedule, fused.Iteration())
    gradients = {}
    monkeypatch.setattr(fused.Stack, "step", lambda self, gradient, *_: gradients.update({id(self): gradient}))
    hidden = torch.randn(tokens, width, generator=draw).to(torch.bfloat16).requires_grad_()
    scores = torch.rand(tokens, count, generator=draw)
    if skewed:
        scores[:, 0], scores[:, 5] = 1, 0
    gates, chosen = scores.topk(2)
    gates = gates.clone().requires_grad_()
    assert bool(Routing.of(chosen, count).size) is not skewed
    of_output = torch.randn(tokens, width, generator=draw).to(torch.bfloat16)

    output = block["experts"](hidden, chosen, gates)
    output.backward(of_output)
    plain = Plain(block["experts"])
    exact_hidden, exact_gates = (x.detach().double().requires_grad_() for x in (hidden, gates))
    exact = plain(exact_hidden, chosen, exact_gates)
    exact.backward(of_output.double())
    pairs = [
        (output, exact),
        (hidden.grad, exact_hidden.grad),
        (gates.grad, exact_gates.grad),
        (gradients[id(gate_up)], plain.gate_up.grad.flatten(0, 1)),
        (gradients[id(down)], plain.down.grad.flatten(0, 1)),
    ]
    for found, wanted in pairs:
        assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "glm4_moe", "llama"])
def test_norms_and_attention_have_the_outputs_and_gradients_of_transformers(family):
    """Taken apart with nothing to tune, a block is what it was."""
    it = case(family, samples=2)
    plain, ours = it.model.block(1), it.model.block(1)
    fused.take_apart(ours, [], SCHEMES["NVFP4"], fused.Schedule(1, 1, 1, True), fused.Iteration())
    for parameter in [*plain.parameters(), *ours.parameters()]:
        parameter.requires_grad_(False)
    found = []
    for block in (plain, ours):
        hidden = it.hidden.clone().requires_grad_()
        positions = it.model.positions(it.hidden.shape[1])
        if block is ours:
            with fused.attention_chosen(block, hidden.device, hidden.shape[1]):
                output = block(hidden, position_embeddings=positions)
        else:
            output = block(hidden, position_embeddings=positions)
        output.float().square().sum().backward()
        found.append((output.float(), hidden.grad.float()))
    for theirs, mine in zip(*found, strict=True):
        assert (mine - theirs).norm() < 0.01 * theirs.norm()
    assert it.model.config._attn_implementation == "sdpa", "what is chosen for tuning does not stay"


def test_a_norm_in_float32_stays_transformers_own():
    block = case("llama").model.block(1)
    block.input_layernorm.float()
    fused.take_apart(block, [], SCHEMES["NVFP4"], fused.Schedule(1, 1, 1, True), fused.Iteration())
    assert not isinstance(block.input_layernorm, fused.Norm)
    assert isinstance(block.post_attention_layernorm, fused.Norm)


def same(first, second) -> bool:
    return first.losses == second.losses and all(
        torch.equal(weight.weight, second.weights[name].weight) for name, weight in first.weights.items()
    )


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_the_same_bytes_with_any_number_of_threads(scheme, monkeypatch):
    from requant import threads

    once = tuned(case("deepseek_v3"), scheme)
    assert same(once, tuned(case("deepseek_v3"), scheme))
    monkeypatch.setattr(threads, "SMALLEST_WORK", 0)
    assert same(once, tuned(case("deepseek_v3"), scheme, threads=3))
    assert torch.get_num_threads() > 0


def test_best_parameters_are_kept_or_the_last():
    best, last = (tuned(case("qwen3", seed=2), judge="minibatch", best_mse=best) for best in (True, False))
    assert best.losses == last.losses and last.kept == 19
    assert best.kept == min(range(20), key=best.losses.__getitem__) != 19, "they differ, or nothing is shown"
    assert not same(best, last)


def test_batches_are_added_up():
    """Two batches of 4 make the step of one of 8, but for what BF16 makes of their sum."""
    eight = tuned(case("deepseek_v3"), batch_size=8)
    twice = tuned(case("deepseek_v3"), batch_size=4, gradient_accumulate_steps=2)
    assert twice.losses[0] == pytest.approx(eight.losses[0], rel=1e-5)
    assert sum(twice.losses) == pytest.approx(sum(eight.losses), rel=0.02)


def test_padding_takes_no_part():
    it = case("deepseek_v3")
    it.mask = torch.ones(it.hidden.shape[:2], dtype=torch.uint8)
    it.mask[::2, 20:] = 0
    with_zeros = tuned(it)
    it.targets = it.targets.clone()
    it.targets[::2, 20:] = 100
    assert same(with_zeros, tuned(it))


def test_samples_come_in_auto_rounds_order():
    import random

    from auto_round.compressors.utils import IndexSampler

    random.seed(5)
    theirs = IndexSampler(13, 4)
    ours = fused.sample_order(13, 2, 2, 5)
    assert [next(ours) for _ in range(9)] == [theirs.next_batch() for _ in range(9)]
    assert len(next(fused.sample_order(3, 8, 1, 0))) == 3, "fewer samples than a batch: all of them"


def test_experts_of_a_block_are_kept_together():
    kept = tuned(case("deepseek_v3"), keep=[r"experts\.3\.up_proj"])
    assert kept.weights and not any(".mlp.experts." in name for name in kept.weights)


def test_experts_can_be_kept_altogether():
    kept = tuned(case("deepseek_v3"), keep=[r"mlp\.experts\."])
    assert kept.weights and not any(".experts." in name for name in kept.weights)


def test_experts_that_are_kept_hand_gradients_on(monkeypatch):
    """Also where the block would run them as one, as on a GPU."""
    alone = tuned(case("deepseek_v3"), keep=[r"mlp\.experts\."])
    it = case("deepseek_v3")
    block = it.model.block
    monkeypatch.setattr(it.model, "block", lambda index: group(block(index)))
    together = tuned(it, keep=[r"mlp\.experts\."])
    assert sum(together.losses) == pytest.approx(sum(alone.losses), rel=0.02)
    moved = [
        float((weight.weight != alone.weights[name].weight).float().mean()) for name, weight in together.weights.items()
    ]
    assert max(moved) < 0.1, "most steps are the same ones"


def test_an_activation_it_does_not_know_is_refused():
    it = case("qwen3_moe")
    prepared = prepare(it.model, 1, SCHEMES["W3A16"], [], it.hidden, None)
    prepared.block.mlp.experts[0].act_fn = nn.GELU()
    linears = [name.removeprefix("model.layers.1.") for name in prepared.linears]
    with pytest.raises(RequantError, match="GELU"):
        fused.take_apart(prepared.block, linears, SCHEMES["W3A16"], fused.Schedule(1, 1, 1, True), fused.Iteration())


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_what_is_kept_is_judged_by_all_samples(scheme):
    """The parameters of the lowest minibatch, or the last: never the worse of both."""
    it = case("qwen3", seed=2)

    def error(**settings):
        found = tuned(it, scheme, **settings)
        return shipped_error(it, scheme, found.weights), found

    (by_samples, ours), (by_minibatch, best), (of_last, last) = (
        error(judge="samples"),
        error(judge="minibatch"),
        error(best_mse=False),
    )
    assert ours.losses == best.losses == last.losses
    assert best.kept == min(range(20), key=best.losses.__getitem__) != last.kept == 19, (
        "they differ, or nothing is shown"
    )
    assert by_samples == min(by_minibatch, of_last)
    assert ours.kept == (best.kept if by_minibatch <= of_last else 19)
    plain, _ = error(iters=1)
    measured = {0: plain, best.kept: by_minibatch, 19: of_last}
    assert ours.judged == pytest.approx(measured, rel=0.01) and best.judged == last.judged == {}


def one_is_easy(padded: bool = False) -> SimpleNamespace:
    """Hidden states of which one sample has no loss, whatever the parameters: its minibatch is the lowest."""
    it = case("qwen3")
    it.hidden[3] = 0
    if padded:
        it.mask = torch.ones(it.hidden.shape[:2], dtype=torch.uint8)
        it.mask[::2, 20:] = 0
    it.targets = it.model.run(it.model.block(1), it.hidden)
    return it


def plain_wins(found, device: str = "cpu", padded: bool = False) -> bool:
    plain = tuned(one_is_easy(padded), "W3A16", iters=1, device=device)
    assert found.losses.index(min(found.losses)) not in (0, 19), "the lowest minibatch is another"
    assert len(found.judged) == 3 and found.judged[0] == min(found.judged.values())
    assert found.judged[0] == pytest.approx(plain.judged[0], rel=1e-6)
    return found.kept == 0 and all(
        torch.equal(weight.weight, plain.weights[name].weight)
        and torch.equal(weight.scales, plain.weights[name].scales)
        for name, weight in found.weights.items()
    )


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_shipped_is_never_worse_than_plain_rounding(padded):
    """Where both the lowest minibatch's parameters and the last are, plain rounding is what is kept."""
    assert plain_wins(tuned(one_is_easy(padded), "W3A16", batch_size=1, lr=0.3), padded=padded)


@pytest.mark.parametrize("engine", ["fused", "auto_round"])
@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_a_loss_that_is_no_number_ends_the_tuner_at_its_iteration(scheme, engine):
    it, seen = case("qwen3"), []
    it.targets[5, 7, 3] = 3e38  # its square overflows: of 16 samples, the fourth batch of 4 at the latest has it
    with pytest.raises(NotFinite, match=r"^loss (nan|inf) at iteration [0-3]; expected a finite number$"):
        tuned(it, scheme, engine, report=lambda iteration, loss: seen.append(loss))
    assert len(seen) <= 3 and all(map(math.isfinite, seen))


def test_peak_memory_is_what_was_measured_on_a_gpu():
    """The formula beside the peaks that benchmarks/real_block.py recorded of blocks of true size."""
    import json
    import sys
    from pathlib import Path

    from requant.blocks import empty_block, empty_model, model_config

    root = Path(__file__).resolve().parents[2]
    sys.path.insert(0, str(root / "benchmarks"))
    from real_block import shape_of

    measured = json.loads((root / "benchmarks" / "results" / "real_block_h100.json").read_text())
    measured = [found for found in measured if found["engine"] == "fused" and "error" not in found]
    assert len(measured) >= 3
    for found in measured:
        shape = shape_of(found["experts"])
        layer = type(empty_model(shape).model.layers[0])
        block = empty_block(layer, model_config(shape), 3 if found["experts"] else 0)
        peak = fused.peak_bytes(block, found["tokens_per_step"], 8, SCHEMES[found["scheme"]], found["iterations"])
        assert peak == pytest.approx(found["peak_bytes"], rel=0.1)
        if found["experts"] == 192:
            assert peak < 80e9, "a block of the reference release fits one device"
