"""Experts in grouped products give what the experts give one by one."""

import pytest
import tiny
import torch

from requant.checkpoint import Checkpoint
from requant.grouped import group, ungroup
from requant.nvfp4 import global_scale
from requant.packed import round_inputs
from requant.reap import Watch
from requant.routing import observe
from requant.streamed import StreamedModel


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return StreamedModel(Checkpoint(tiny.write_checkpoint(tmp_path_factory.mktemp("m"), "deepseek_v3")))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("rounds", [False, True])
def test_a_pass_is_that_of_the_experts_one_by_one(model, rounds):
    block = model.block(1)
    hidden = torch.randn(6, 16, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    if rounds:
        for name, linear in block.named_modules():
            if isinstance(linear, torch.nn.Linear) and not name.endswith("gate"):
                round_inputs(linear, global_scale(torch.tensor(4.0)))
    one_by_one = observe(model, block, hidden, None)
    assert group(block).mlp.experts.grouped is not None
    at_once = observe(model, block, hidden, None)
    assert 0 < error(at_once.output, one_by_one.output) < 0.01, "sums of experts are rounded once, not at each"
    assert at_once.tokens_per_expert == one_by_one.tokens_per_expert
    assert at_once.input_amax.keys() == one_by_one.input_amax.keys()
    for name, peak in one_by_one.input_amax.items():
        assert at_once.input_amax[name] == pytest.approx(float(peak), rel=0.01), name
    ungroup(block)
    assert torch.equal(observe(model, block, hidden, None).output, one_by_one.output)


def test_experts_are_not_grouped_where_only_some_round_their_inputs(model):
    block = model.block(1)
    round_inputs(block.mlp.experts[0].gate_proj, global_scale(torch.tensor(4.0)))
    assert group(block).mlp.experts.grouped is None


def test_saliencies_are_those_of_the_experts_one_by_one(model):
    block = model.block(1)
    hidden = torch.randn(6, 16, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    watches = [Watch(), Watch()]
    observe(model, block, hidden, None, watch=watches[0])
    observe(model, group(block), hidden, None, watch=watches[1])
    one_by_one, at_once = watches
    assert torch.equal(at_once.tokens, one_by_one.tokens) and torch.equal(at_once.gates, one_by_one.gates)
    assert torch.allclose(at_once.mass, one_by_one.mass, rtol=0.01)
