"""The passes on a GPU give the numbers of those on the CPU, which test_signround.py holds to the definitions."""

import pytest
import torch
from test_signround import clear_gradient, odd_stack, random_stack

from requant.routed import Routing
from requant.stacks import Stack

pytestmark = pytest.mark.gpu


def on_gpu(stack: Stack) -> Stack:
    """A copy of a stack of the CPU."""
    scale = None if stack.tensor_scale is None else stack.tensor_scale.cuda()
    copy = Stack(stack.rows, stack.weight.cuda(), scale, stack.scheme, stack.schedule)
    copy.offsets.copy_(stack.offsets)
    for mine, theirs in zip(copy.shrinks, stack.shrinks, strict=True):
        mine.copy_(theirs)
    return copy


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16", "W8A16"])
@pytest.mark.parametrize("tuned", [False, True])
def test_values_and_codes_are_the_cpus_bit_for_bit(scheme, tuned):
    cpu = random_stack(scheme, tuned)
    gpu = on_gpu(cpu)
    assert torch.equal(gpu.values().cpu(), cpu.values())
    for stack in (cpu, gpu):
        stack.keep()
    assert torch.equal(gpu.codes.cpu(), cpu.codes) and torch.equal(gpu.scales.cpu(), cpu.scales)


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16", "W8A16"])
def test_a_step_is_the_cpus(scheme):
    cpu = random_stack(scheme, tuned=True)
    gpu = on_gpu(cpu)
    gradient = torch.randn(cpu.weight.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    cpu.step(gradient, 20, more=False)
    gpu.step(gradient.cuda(), 20, more=False)
    assert torch.equal(gpu.offsets.cpu(), cpu.offsets)
    for mine, theirs in zip(gpu.shrinks, cpu.shrinks, strict=True):
        assert (mine.cpu() != theirs).float().mean() < 0.01, "sums in another order may differ in sign near zero"


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16", "W8A16"])
@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_the_cpus_for_groups_of_every_kind(scheme, seed):
    """Clamped scales, zeros, equal ends: and no sum that depends on its order."""
    cpu = odd_stack(scheme, seed)
    gpu, gradient = on_gpu(cpu), clear_gradient(cpu, seed)
    cpu.step(gradient, 20, more=False)
    gpu.step(gradient.cuda(), 20, more=False)
    assert torch.equal(gpu.offsets.cpu(), cpu.offsets)
    for mine, theirs in zip(gpu.shrinks, cpu.shrinks, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    assert torch.equal(gpu.values().cpu(), cpu.values())


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_a_stack_that_takes_its_moves_back_is_rounded_plainly(scheme):
    moved, fresh = on_gpu(random_stack(scheme, tuned=True)), on_gpu(random_stack(scheme, tuned=False))
    moved.reset()
    assert torch.equal(moved.values(), fresh.values())


@pytest.mark.parametrize("call", ["round_inputs", "spread", "gate"])
def test_rows_that_are_no_whole_groups_are_not_rounded(call):
    from requant import kernels_cuda

    rows, token, scale = torch.randn(4, 24).bfloat16().cuda(), torch.arange(4).cuda(), torch.ones(4).cuda()
    arguments = {"round_inputs": (rows, scale), "spread": (rows, token, scale), "gate": (rows, token, scale)}[call]
    with pytest.raises(ValueError, match="expected a multiple of 16"):
        getattr(kernels_cuda, call)(*arguments)


@pytest.mark.parametrize(
    ("width", "rounds"),
    [(256, True), *((width, False) for width in (8, 40, 72, 136, 205, 256, 2056, 4100))],
)
def test_rows_of_experts_are_the_cpus(width, rounds):
    """Any width where nothing is rounded: also those whose last columns fill no tile of 2048."""
    from requant import kernels_cpu, kernels_cuda

    draw = torch.Generator().manual_seed(4)
    tokens, experts = 96, 8
    hidden = torch.randn(tokens, width, generator=draw).to(torch.bfloat16)
    gates, chosen = torch.rand(tokens, 2, generator=draw), torch.rand(tokens, experts, generator=draw).topk(2).indices
    routing = Routing.of(chosen, experts)
    scale = torch.rand(len(routing.token), generator=draw) * 100 + 500 if rounds else None
    wide = torch.randn(len(routing.token), 2 * width, generator=draw).to(torch.bfloat16)
    rows, of_tokens = wide[:, :width].contiguous(), torch.randn(tokens, width, generator=draw).to(torch.bfloat16)
    weight = torch.rand(width, generator=draw).to(torch.bfloat16)
    roots = kernels_cpu.normalize(hidden, weight, 1e-6)[1]
    calls = [
        ("spread", hidden, routing.token, scale),
        ("spread_backward", rows, hidden, routing.rows, scale),
        ("gate", wide, routing.token, scale),
        ("gate_backward", rows, wide, routing.token, scale),
        ("combine", rows, routing.rows, gates),
        ("combine_backward", of_tokens, rows, routing.token, routing.rows, gates),
        ("normalize", hidden, weight, 1e-6),
        ("normalize_backward", of_tokens, hidden, weight, roots),
    ]
    if rounds:
        calls += [("round_inputs", rows, scale), ("round_inputs_backward", rows, wide[:, width:].contiguous(), scale)]
    for name, *arguments in calls:
        there = [argument.cuda() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        found, wanted = getattr(kernels_cuda, name)(*there), getattr(kernels_cpu, name)(*arguments)
        for mine, theirs in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, wanted)), strict=True):
            mine, theirs = mine.cpu().float(), theirs.float()
            assert (mine - theirs).norm() <= 2e-3 * theirs.norm(), name
            assert (mine != theirs).float().mean() < 0.02 or mine.dtype == torch.float32, name


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_a_block_is_tuned_as_on_the_cpu_and_twice_the_same(scheme):
    from test_fused import case, tuned

    on_cpu = tuned(case("deepseek_v3"), scheme)
    first, second = (tuned(case("deepseek_v3"), scheme, device="cuda") for _ in range(2))
    assert first.losses == second.losses
    for name, weight in first.weights.items():
        assert torch.equal(weight.weight, second.weights[name].weight), name
    assert first.losses[0] == pytest.approx(on_cpu.losses[0], rel=0.01)
    assert sum(first.losses) == pytest.approx(sum(on_cpu.losses), rel=0.03)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_block_of_uneven_widths_is_tuned_as_on_the_cpu(family):
    """Its experts, which stay in BF16, run one by one there too, so that gradients pass them."""
    from test_fused import UNEVEN, case, tuned

    on_cpu, on_gpu = (
        tuned(case(family, **UNEVEN[family]), keep=[r"mlp\.experts"], device=device) for device in ("cpu", "cuda")
    )
    assert on_gpu.weights.keys() == on_cpu.weights.keys()
    assert on_gpu.losses[0] == pytest.approx(on_cpu.losses[0], rel=0.03)
    assert sum(on_gpu.losses) == pytest.approx(sum(on_cpu.losses), rel=0.05)


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_shipped_is_never_worse_than_plain_rounding(padded):
    """Where values are made again at every use, as well."""
    from test_fused import one_is_easy, plain_wins, tuned

    found = tuned(one_is_easy(padded), "W3A16", batch_size=1, lr=0.3, device="cuda")
    assert plain_wins(found, "cuda", padded)


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_what_is_kept_is_judged_as_on_the_cpu(scheme):
    from test_fused import case, tuned

    on_cpu, on_gpu = (tuned(case("qwen3", seed=2), scheme, device=device) for device in ("cpu", "cuda"))
    assert on_gpu.judged[0] == pytest.approx(on_cpu.judged[0], rel=0.02)
    assert on_gpu.judged[on_gpu.kept] == min(on_gpu.judged.values())
    assert on_gpu.judged[on_gpu.kept] == pytest.approx(on_cpu.judged[on_cpu.kept], rel=0.05)


def test_a_loss_that_is_no_number_ends_the_tuner():
    from test_fused import case, tuned

    from requant.tuned import NotFinite

    it = case("qwen3")
    it.targets[5, 7, 3] = 3e38
    with pytest.raises(NotFinite, match=r"^loss (nan|inf) at iteration [0-3]; expected a finite number$"):
        tuned(it, device="cuda")
