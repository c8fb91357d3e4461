"""One step of SignRound: the definitions are AutoRound's, the compiled loops are the definitions."""

import pytest
import torch

from requant import signround
from requant.nvfp4 import global_scale
from requant.schemes import SCHEMES
from requant.stacks import Schedule, Stack

SCHEDULE = Schedule(iters=200, rate=1 / 200, shrink_rate=1 / 200, shrinks=True)
UNIT = SCHEDULE.unit
ROWS, WIDTH = 48, 256


def random_stack(scheme: str, tuned: bool, seed: int = 0, schedule: Schedule = SCHEDULE) -> Stack:
    """BF16 weights with a zero, a group of zeros and equal largest values; offsets and shrinks anywhere if `tuned`."""
    draw = torch.Generator().manual_seed(seed)
    weight = (torch.randn(ROWS, WIDTH, generator=draw) * torch.rand(ROWS, 1, generator=draw) * 0.05).to(torch.bfloat16)
    weight[0, :16], weight[1, 3], weight[2, 16:18] = 0, 0, weight[2].abs().amax()
    tensor_scale = (2688 / weight.abs().amax().float()).expand(ROWS).contiguous()
    stack = Stack({"x": ROWS}, weight, tensor_scale if scheme == "NVFP4" else None, SCHEMES[scheme], schedule)
    if tuned:
        stack.offsets.random_(-20000, 20000, generator=draw)
        for shrink in stack.shrinks:
            shrink.random_(0, 20000, generator=draw)
        stack.kernels.weights(stack, 0, ROWS, stack.held, False)
    return stack


ODD = ("as drawn", "zeros", "positive", "negative", "equal ends", "small", "minus zero", "below clamp", "at clamp")


def odd_stack(scheme: str, seed: int) -> Stack:
    """Groups of every kind that the definitions tell apart: the largest and smallest scales, and what is beyond."""
    draw = torch.Generator().manual_seed(seed)
    size, limit = SCHEMES[scheme].group_size, 2.0 ** (SCHEMES[scheme].weight_bits - 1)
    smallest = float(torch.tensor(signround.SMALLEST_INTEGER_SCALE).to(torch.bfloat16)) * limit
    groups = torch.randn(ROWS, 12, size, generator=draw) * 2.0 ** torch.randint(-6, 3, (ROWS, 12, 1), generator=draw)
    kind = torch.randint(0, len(ODD), (ROWS, 12), generator=draw)
    of = {name: kind == number for number, name in enumerate(ODD)}
    groups *= 1.0 if scheme == "NVFP4" else 4 * smallest
    groups[of["zeros"]] = 0
    groups[of["positive"]] = groups[of["positive"]].abs()
    groups[of["negative"]] = -groups[of["negative"]].abs()
    groups[of["equal ends"]] = (-1.0) ** torch.arange(size) * groups[of["equal ends"]][:, :1].abs()
    groups[of["small"]] *= 1e-4  # NVFP4: a scale of few bits, or 0
    groups[of["minus zero"], 3] = -0.0
    if scheme != "NVFP4":
        for name in ("below clamp", "at clamp"):
            groups[of[name]] *= smallest / groups[of[name]].abs().amax(-1, keepdim=True)
    weight = groups.flatten(1).to(torch.bfloat16)
    scale = 2688 / weight.abs().amax().float() * torch.tensor([0.01, 0.5, 1, 1, 1.2, 4]).repeat(ROWS // 6)
    stack = Stack({"x": ROWS}, weight, scale if scheme == "NVFP4" else None, SCHEMES[scheme], SCHEDULE)
    stack.offsets.random_(-20000, 20000, generator=draw)
    stack.offsets[::3] = 0
    for shrink in stack.shrinks:
        shrink.random_(0, 20000, generator=draw)
        shrink[::2], shrink[5] = 0, SCHEDULE.most_shrunk
        shrink[of["below clamp"]], shrink[of["at clamp"]] = 100, 0  # 0.9975 of BF16's 1e-5 is 1e-5 again in BF16
    stack.kernels.weights(stack, 0, ROWS, stack.held, False)
    return stack


def clear_gradient(stack: Stack, seed: int) -> torch.Tensor:
    """BF16: one whose terms in the slope of a group's factors have one sign, so that their sum in any order has it."""
    draw = torch.Generator().manual_seed(seed)
    offset, factors = parameters(stack)
    rounded = defined(stack, offset, factors)
    (slope,) = torch.autograd.grad(rounded.values.sum(), offset)
    grouped = (tensor.detach().unflatten(1, (-1, stack.scheme.group_size)) for tensor in (rounded.codes, slope))
    codes, inside = next(grouped).float(), next(grouped) != 0
    weight = stack.weight.float().unflatten(1, codes.shape[1:])
    if stack.scheme.is_nvfp4:
        scaled = weight * signround.inverse(rounded.scales * signround.inverse(stack.tensor_scale[:, None]))[..., None]
    else:
        scaled = (weight.to(torch.bfloat16) / rounded.scales[..., None]).float()
    terms = codes - torch.where(inside, scaled, 0)
    sign = torch.randint(0, 2, (*codes.shape[:2], 1), generator=draw) * 2 - 1
    return (torch.where(terms < 0, -sign, sign) * (0.5 + torch.rand(codes.shape, generator=draw))).flatten(1).bfloat16()


def parameters(stack: Stack, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The offsets and factors that the stack's integers stand for, ready for autograd."""
    factors = [(1 - UNIT * shrink.to(dtype)).requires_grad_() for shrink in stack.shrinks]
    return (stack.offsets.to(dtype) * UNIT).requires_grad_(), factors


def auto_rounded(stack: Stack, offset: torch.Tensor, factors: list[torch.Tensor]):
    """(values, scales) of AutoRound's own quantizers, differentiable."""
    from auto_round.data_type.int import quant_tensor_sym
    from auto_round.data_type.nvfp import nv_fp4

    size = stack.scheme.group_size
    offset = offset.reshape(-1, size)
    if stack.scheme.is_nvfp4:
        values, scales, _ = nv_fp4(
            stack.weight, v=offset, global_scale=stack.tensor_scale[:1], max_scale=factors[0].reshape(-1)
        )
    else:
        low, high = (factor.reshape(-1) for factor in factors)
        values, scales, _ = quant_tensor_sym(
            stack.weight,
            bits=stack.scheme.weight_bits,
            group_size=size,
            v=offset,
            min_scale=low,
            max_scale=high,
            scale_dtype=torch.bfloat16,
        )
    return values, scales.reshape(ROWS, -1)


def defined(stack: Stack, offset: torch.Tensor, factors: list[torch.Tensor], dtype=None) -> signround.Rounded:
    """The same by the definitions."""
    weight = stack.weight.to(dtype or (torch.float32 if stack.scheme.is_nvfp4 else torch.bfloat16))
    if stack.scheme.is_nvfp4:
        return signround.round_nvfp4(weight, offset, factors[0], stack.tensor_scale.to(weight.dtype))
    return signround.round_integers(weight, offset, *factors, stack.scheme.weight_bits, stack.scheme.group_size)


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16", "W4A16", "W8A16"])
@pytest.mark.parametrize("tuned", [False, True])
def test_codes_and_scales_are_auto_rounds_bit_for_bit(scheme, tuned):
    """At iteration 0, and anywhere else."""
    stack = random_stack(scheme, tuned)
    values, scales = auto_rounded(stack, *parameters(stack))
    by_definition = defined(stack, *parameters(stack))
    assert torch.equal(by_definition.values.to(torch.bfloat16), values)
    assert torch.equal(by_definition.scales.float(), scales.float())
    assert torch.equal(stack.values(), values)
    stack.keep()
    assert torch.equal(stack.scales.float(), scales.float())
    kept = stack.quantized()["x"]
    assert torch.equal(kept.weight, values) and torch.equal(kept.scales.float(), scales.float())


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16", "W4A16", "W8A16"])
@pytest.mark.parametrize("tuned", [False, True])
def test_a_step_is_one_of_auto_rounds_signed_gradient(scheme, tuned):
    stack = random_stack(scheme, tuned)
    gradient = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    offset, factors = parameters(stack)
    values, _ = auto_rounded(stack, offset, factors)
    of_offset, *of_factors = torch.autograd.grad(values, (offset, *factors), gradient)
    offsets, shrinks = stack.offsets.clone(), [shrink.clone() for shrink in stack.shrinks]
    move = SCHEDULE.move(193)
    stack.step(gradient, 193, more=False)
    assert torch.equal(stack.offsets, offsets - move * of_offset.sign().to(torch.int16))
    for shrink, before, slope in zip(stack.shrinks, shrinks, of_factors, strict=True):
        wanted = (before + move * slope.nan_to_num().sign().to(torch.int16)).clamp(min=0)
        # AutoRound adds integers' slopes up in BF16: where a sum is all but zero its sign differs
        assert (shrink != wanted).float().mean() <= {"NVFP4": 0.001, "W8A16": 0.15}.get(scheme, 0.03)
    assert torch.equal(stack.values(), defined(stack, *parameters(stack)).values.to(torch.bfloat16))


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_a_step_has_the_signs_of_the_gradient_in_float64(scheme):
    stack = random_stack(scheme, tuned=True)
    gradient = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    offset, factors = parameters(stack, torch.float64)
    rounded = defined(stack, offset, factors, torch.float64)
    of_offset, *of_factors = torch.autograd.grad(rounded.values, (offset, *factors), gradient.double())
    offsets, shrinks = stack.offsets.clone(), [shrink.clone() for shrink in stack.shrinks]
    stack.step(gradient, 199, more=False)
    # a code changes where the offset in float32 or BF16 falls on the other side of a tie
    assert (offsets - stack.offsets != of_offset.sign()).float().mean() < 0.002
    for shrink, before, slope in zip(stack.shrinks, shrinks, of_factors, strict=True):
        clear = slope.abs() > 0.1 * slope.nan_to_num().abs().mean()
        moved = (shrink - before).double()
        assert (moved != slope.sign())[clear & (before > 0)].sum() <= 1


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16", "W4A16", "W8A16"])
@pytest.mark.parametrize("seed", range(6))
def test_a_step_is_the_definitions_for_groups_of_every_kind(scheme, seed):
    """Clamped scales do not move, nor do those of zeros; every other one does, and every offset."""
    stack = odd_stack(scheme, seed)
    gradient = clear_gradient(stack, seed)
    offset, factors = parameters(stack)
    values = defined(stack, offset, factors).values
    of_offset, *of_factors = torch.autograd.grad(values, (offset, *factors), gradient.to(values.dtype))
    offsets, shrinks = stack.offsets.clone(), [shrink.clone() for shrink in stack.shrinks]
    stack.step(gradient, 190, more=False)
    assert torch.equal(stack.offsets, offsets - 10 * of_offset.sign().to(torch.int16))
    for shrink, before, slope in zip(stack.shrinks, shrinks, of_factors, strict=True):
        assert 0.05 < (slope != 0).float().mean() < 0.95, "both are there"
        assert torch.equal(shrink.int(), (before + 10 * slope.sign().int()).clamp(0, SCHEDULE.most_shrunk))
    assert torch.equal(stack.values(), defined(stack, *parameters(stack)).values.to(torch.bfloat16))


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16", "W8A16"])
@pytest.mark.parametrize("peak", [1e-45, 9.2e-41, 1e-38, 1e-32, 1e-20, 3.3895e38])
def test_no_magnitude_of_bf16_makes_a_value_that_is_no_number(scheme, peak):
    """Subnormal weights and the largest ones: finite scales, values and steps; what no scale reaches is 0."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.rand(ROWS, WIDTH, generator=draw) * 2 - 1
    weight = (weight / weight.abs().amax() * peak).to(torch.bfloat16)
    scale = global_scale(weight.abs().amax()).expand(ROWS).contiguous()
    assert scale.isfinite().all() and (scale > 0).all()
    stack = Stack({"x": ROWS}, weight, scale if scheme == "NVFP4" else None, SCHEMES[scheme], SCHEDULE)
    values = defined(stack, *parameters(stack)).values.to(torch.bfloat16)
    assert torch.equal(stack.values(), values)
    if peak > (1e-33 if scheme == "NVFP4" else 1e-3):
        error = (values.double() - weight.double()).norm() / weight.double().norm()
        assert error < {"NVFP4": 0.12, "W3A16": 0.2, "W8A16": 0.01}[scheme], "as well as any other tensor"
    stack.step(torch.randn(ROWS, WIDTH, generator=draw).to(torch.bfloat16), 0, more=False)
    stack.keep()
    kept = stack.quantized()["x"]
    for tensor in (kept.weight, kept.scales.float()):
        assert tensor.isfinite().all()


def test_inputs_round_like_auto_rounds_and_so_do_their_gradients():
    from auto_round.data_type.nvfp import nv_fp4_with_static_gs

    from requant import kernels_cpu

    draw = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, WIDTH, generator=draw).to(torch.bfloat16)
    x[2, 16:32], x[3, :2] = 0, 3.0
    peak = torch.tensor([2.5])  # some values are beyond it
    scale = global_scale(peak).expand(ROWS).contiguous()
    gradient = torch.randn(ROWS, WIDTH, generator=draw).to(torch.bfloat16)
    x.requires_grad_()
    theirs, _, _ = nv_fp4_with_static_gs(x, tensor_max=peak)
    (of_theirs,) = torch.autograd.grad(theirs, x, gradient)
    plain = x.detach()
    assert torch.equal(kernels_cpu.round_inputs(plain, scale), theirs)
    assert torch.equal(signround.round_inputs_nvfp4(plain.float(), scale).to(torch.bfloat16), theirs)
    ours = kernels_cpu.round_inputs_backward(gradient, plain, scale)
    there = ~of_theirs.isnan()  # AutoRound's is not a number in a group of zeros
    assert not ours.isnan().any() and (~there).sum() >= 1
    exact = plain.double().requires_grad_()
    (wanted,) = torch.autograd.grad(signround.round_inputs_nvfp4(exact, scale.double()), exact, gradient.double())
    there &= ~wanted.isnan()
    error = (ours.double() - wanted)[there].norm() / wanted[there].norm()
    of_their_own = (of_theirs.double() - wanted)[there].norm() / wanted[there].norm()
    assert error < 0.01 and error < 1.05 * of_their_own


def test_offsets_are_integers_as_narrow_as_their_sum_allows():
    assert Schedule(255, 1 / 255, 1 / 255, True).dtype == torch.int16
    assert Schedule(256, 1 / 256, 1 / 256, True).dtype == torch.int32
    schedule = Schedule(200, 0.005, 0.01, True)
    assert sum(schedule.move(i) for i in range(200)) < 2**15
    assert [schedule.unit * schedule.move(i) for i in (0, 100, 199)] == pytest.approx([0.005, 0.0025, 0.000025])
    assert 1 - schedule.shrink_unit * schedule.most_shrunk == pytest.approx(0)


def test_scales_stay_where_they_are_if_they_are_not_tuned():
    stack = random_stack("NVFP4", tuned=True, schedule=Schedule(200, 1 / 200, 1 / 200, shrinks=False))
    before, offsets = stack.shrinks[0].clone(), stack.offsets.clone()
    stack.step(torch.ones(ROWS, WIDTH, dtype=torch.bfloat16), 0, more=False)
    assert torch.equal(stack.shrinks[0], before) and not torch.equal(stack.offsets, offsets)


def test_gradients_are_added_up_before_a_step():
    parts = [torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16) for n in (1, 2)]
    once, twice = random_stack("NVFP4", tuned=True), random_stack("NVFP4", tuned=True)
    once.step(parts[0] + parts[1], 10, more=False)
    for number, part in enumerate(parts):
        twice.step(part, 10, more=number == 0)
    assert torch.equal(once.offsets, twice.offsets) and torch.equal(once.shrinks[0], twice.shrinks[0])
    once.step(parts[0], 11, more=False)
    twice.step(parts[0], 11, more=False)
    assert torch.equal(once.offsets, twice.offsets), "what was added up is spent"
