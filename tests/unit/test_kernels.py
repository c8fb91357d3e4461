"""The tuner's passes over activations on a CPU, at any width: plain torch in float64, but for what BF16 rounds."""

import pytest
import torch
from torch import nn

from requant import kernels_cpu
from requant.errors import RequantError
from requant.routed import Routing
from requant.schemes import SCHEMES
from requant.stacks import Schedule, Stack

WIDTHS = [1, 7, 16, 24, 40, 72, 136, 205, 256]  # 16 k + r
TOKENS, EXPERTS = 24, 4


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """BF16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Every element, up to a rounding to BF16 or two."""
    return torch.allclose(
        found.double(), wanted.double(), rtol=2**-7, atol=2**-7 * float(wanted.detach().abs().mean()) + 1e-30
    )


@pytest.fixture
def routing() -> Routing:
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))
    routing = Routing.of(scores.topk(2).indices, EXPERTS)
    assert (routing.token < 0).any(), "rows without a token are among them"
    return routing


def of_rows(tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
    """[tokens, width] -> [rows, width], differentiable."""
    return tokens[routing.token.clamp(min=0)] * (routing.token >= 0)[:, None]


@pytest.mark.parametrize("width", WIDTHS)
def test_tokens_are_spread_over_rows_and_gradients_come_back(routing, width):
    hidden, gradient = drawn(TOKENS, width), drawn(len(routing.token), width, seed=2)
    exact = hidden.double().requires_grad_()
    spread = of_rows(exact, routing)
    assert torch.equal(kernels_cpu.spread(hidden, routing.token, None), spread.to(torch.bfloat16))
    (wanted,) = torch.autograd.grad(spread, exact, gradient.double())
    found = kernels_cpu.spread_backward(gradient, hidden, routing.rows, None)
    assert found.is_contiguous() and close(found, wanted)


@pytest.mark.parametrize("width", WIDTHS)
def test_gated_rows_and_their_gradients(routing, width):
    gate_up, gradient = drawn(len(routing.token), 2 * width), drawn(len(routing.token), width, seed=3)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    gated = nn.functional.silu(gate) * up * (routing.token >= 0)[:, None]
    found = kernels_cpu.gate(gate_up, routing.token, None)
    assert found.is_contiguous() and close(found, gated)
    (wanted,) = torch.autograd.grad(gated, exact, gradient.double())
    found = kernels_cpu.gate_backward(gradient, gate_up, routing.token, None)
    assert found.shape == wanted.shape and close(found, wanted)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_combined_by_their_gates_and_gradients_come_back(routing, width):
    outputs, gradient = drawn(len(routing.token), width), drawn(TOKENS, width, seed=4)
    gates = torch.rand(TOKENS, 2, generator=torch.Generator().manual_seed(5))
    exact, exact_gates = outputs.double().requires_grad_(), gates.double().requires_grad_()
    combined = (exact[routing.rows] * exact_gates[..., None]).sum(1)
    found = kernels_cpu.combine(outputs, routing.rows, gates)
    assert found.is_contiguous() and close(found, combined)
    wanted = torch.autograd.grad(combined, (exact, exact_gates), gradient.double())
    found = kernels_cpu.combine_backward(gradient, outputs, routing.token, routing.rows, gates)
    assert all(close(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("width", WIDTHS)
def test_norms_and_their_gradients(width):
    x, gradient, weight = drawn(TOKENS, width), drawn(TOKENS, width, seed=6), drawn(width, seed=7)
    exact = x.double().requires_grad_()
    roots = (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    normal = exact * roots * weight.double()
    found, found_roots = kernels_cpu.normalize(x, weight, 1e-6)
    assert close(found, normal) and torch.allclose(found_roots.double(), roots[:, 0], rtol=1e-6)
    (wanted,) = torch.autograd.grad(normal, exact, gradient.double())
    found = kernels_cpu.normalize_backward(gradient, x, weight, found_roots)
    assert (found.double() - wanted).norm() <= 0.01 * wanted.norm() + 1e-3


@pytest.mark.parametrize("length", WIDTHS)
def test_shares_of_attention_and_their_gradients(length):
    scores = torch.randn(3, length, length, generator=torch.Generator().manual_seed(8))
    gradient = drawn(3, length, length, seed=9)
    exact = scores.double().requires_grad_()
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    shares = (exact * 0.3).masked_fill(ahead, -torch.inf).softmax(-1)
    found = kernels_cpu.attend(scores, 0.3)
    assert close(found, shares) and not found[:, ahead].any()
    (wanted,) = torch.autograd.grad(shares, exact, gradient.double())
    found = kernels_cpu.attend_backward(gradient, found, 0.3)
    assert (found.double() - wanted).norm() <= 0.01 * wanted.norm() + 1e-6


@pytest.mark.parametrize("width", [8, 24, 136])
def test_rows_that_are_no_whole_groups_are_not_rounded(routing, width):
    """They have no NVFP4: an error, before a value is made."""
    rows, scale = drawn(len(routing.token), width), torch.ones(len(routing.token))
    hidden = drawn(TOKENS, width)
    for call in (
        lambda: kernels_cpu.round_inputs(rows, scale),
        lambda: kernels_cpu.round_inputs_backward(rows, rows, scale),
        lambda: kernels_cpu.spread(hidden, routing.token, scale),
        lambda: kernels_cpu.spread_backward(rows, hidden, routing.rows, scale),
        lambda: kernels_cpu.gate(torch.cat([rows, rows], -1), routing.token, scale),
        lambda: kernels_cpu.gate_backward(rows, torch.cat([rows, rows], -1), routing.token, scale),
    ):
        with pytest.raises(ValueError, match=f"rows of {width}; expected a multiple of 16"):
            call()


@pytest.mark.parametrize(("scheme", "group"), [("NVFP4", 16), ("W3A16", 128)])
def test_weights_that_are_no_whole_groups_are_refused_by_name(scheme, group):
    scale = torch.ones(4) if scheme == "NVFP4" else None
    with pytest.raises(RequantError, match=rf"down_proj: width 136; {scheme} expects a multiple of {group}"):
        Stack({"down_proj": 4}, drawn(4, 136), scale, SCHEMES[scheme], Schedule(1, 1.0, 1.0, True))
