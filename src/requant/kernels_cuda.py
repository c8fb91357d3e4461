"""The tuner's element-wise passes on a GPU, in Triton: the same functions, and the same numbers, as `kernels_cpu`.

An instance of a kernel takes a row, or a tile of groups. Divisions round to nearest and multiply-adds are not fused,
as on the CPU. Sums over a group may be added up in another order: where one is all but zero, its sign can differ from
the CPU's, but not from one run to the next.
"""

import torch
import triton
import triton.language as tl

from requant.nvfp4 import check_width
from requant.stacks import Stack

TILE = 128  # groups of 16 an instance
EXACT = {"enable_fp_fusion": False}


@triton.jit
def _inverse(x):
    return tl.where(x == 0, 0.0, tl.div_rn(1.0, tl.where(x == 0, 1.0, x)))


@triton.jit
def _round(x):
    """To the nearest integer, ties to even; |x| below 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _bf16(x):
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _e4m3(x):
    """The nearest e4m3 number of a value from 0 to 448, ties to even."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)
    step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    inverse = ((257 - exponent) << 23).to(tl.float32, bitcast=True)
    return _round(x * inverse) * step


@triton.jit
def _e2m1(x):
    x = tl.minimum(tl.maximum(x, -6.0), 6.0)
    magnitude = tl.abs(x)
    step = tl.where(magnitude < 2, 0.5, tl.where(magnitude < 4, 1.0, 2.0))
    inverse = tl.where(magnitude < 2, 2.0, tl.where(magnitude < 4, 1.0, 0.5))
    return _round(x * inverse) * step


@triton.jit
def _sign(x):
    return (x > 0).to(tl.int32) - (x < 0).to(tl.int32)


@triton.jit
def _unrounded_scale(peak, tensor_scale):
    """What the scale of a group is rounded from, and clamped to 448: beyond that it does not move."""
    return tensor_scale * (peak * (1.0 / 6.0))


@triton.jit
def _nvfp4_scale(peak, tensor_scale):
    return _e4m3(tl.minimum(_unrounded_scale(peak, tensor_scale), 448.0))


@triton.jit
def _round_groups(values, tensor_scale):
    """values [groups, 16], tensor_scale [groups] -> rounded to NVFP4, and what their backward pass needs."""
    peak = tl.max(tl.abs(values), axis=1)
    inverse = _inverse(_nvfp4_scale(peak, tensor_scale) * _inverse(tensor_scale))
    return _bf16(_e2m1(values * inverse[:, None]) * _inverse(inverse)[:, None]), peak, inverse


@triton.jit
def _round_groups_backward(slope, values, tensor_scale):
    """The gradient of `values` from that of the rounded values; through the scale it lands on the first largest."""
    _, peak, inverse = _round_groups(values, tensor_scale)
    scaled = values * inverse[:, None]
    inside = (tl.abs(scaled) <= 6.0) & (scaled != 0)
    terms = slope * (_e2m1(scaled) - tl.where(inside, scaled, 0.0))
    lane = tl.arange(0, 16)[None, :]
    largest = tl.min(tl.where(tl.abs(values) == peak[:, None], lane, 16), axis=1)
    moves = (inverse != 0) & (_unrounded_scale(peak, tensor_scale) <= 448.0)
    through = tl.where(moves, tl.sum(terms, axis=1) * (1.0 / 6.0), 0.0)
    on_largest = tl.where(lane == largest[:, None], tl.where(values > 0, through[:, None], -through[:, None]), 0.0)
    return tl.where(inside, slope, 0.0) + on_largest


@triton.jit
def _exp(x):
    x = tl.maximum(x, -87.0)
    shifted = x * 1.44269504 + 12582912.0
    power = shifted - 12582912.0
    rest = (x - power * 0.693359375) + power * 2.12194440e-4
    value = rest * 0.0 + 1.9875691500e-4
    value = value * rest + 1.3981999507e-3
    value = value * rest + 8.3334519073e-3
    value = value * rest + 4.1665795894e-2
    value = value * rest + 1.6666665459e-1
    value = value * rest + 5.0000001201e-1
    value = value * rest * rest + rest + 1.0
    return value * ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + _exp(-x))


@triton.jit
def _nvfp4_weights(
    weight, offsets, shrink, tensor_scale, unit, shrink_unit, out, codes, scales, groups, width,
    KEEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = group < groups
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = there[:, None] & (at >= 0)
    values = tl.load(weight + at, mask, 0).to(tl.float32)
    tensor = tl.load(tensor_scale + group // (width // 16), there, 1.0)
    kept = 1.0 - shrink_unit * tl.load(shrink + group, there, 0).to(tl.float32)
    scale = _nvfp4_scale(tl.max(tl.abs(values), axis=1) * kept, tensor)
    inverse = _inverse(scale * _inverse(tensor))
    code = _e2m1(values * inverse[:, None] + unit * tl.load(offsets + at, mask, 0).to(tl.float32))
    tl.store(out + at, (code * _inverse(inverse)[:, None]).to(tl.bfloat16), mask)
    if KEEP:
        tl.store(codes + at, (code * 2.0).to(tl.int8), mask)
        tl.store(scales + group, scale.to(tl.bfloat16), there)


@triton.jit
def _nvfp4_step(
    gradient, weight, offsets, shrink, tensor_scale, unit, shrink_unit, move, shrink_move, most, groups, width,
    TILE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = group < groups
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = there[:, None] & (at >= 0)
    values = tl.load(weight + at, mask, 0).to(tl.float32)
    slope = tl.load(gradient + at, mask, 0).to(tl.float32)
    offset = tl.load(offsets + at, mask, 0)
    tensor = tl.load(tensor_scale + group // (width // 16), there, 1.0)
    shrunk = tl.load(shrink + group, there, 0).to(tl.int32)
    peak = tl.max(tl.abs(values), axis=1) * (1.0 - shrink_unit * shrunk.to(tl.float32))
    inverse = _inverse(_nvfp4_scale(peak, tensor) * _inverse(tensor))
    base = values * inverse[:, None]
    scaled = base + unit * offset.to(tl.float32)
    inside = (tl.abs(scaled) <= 6.0) & (scaled != 0) & (inverse != 0)[:, None]
    terms = slope * (_e2m1(scaled) - tl.where(inside, base, 0.0))
    moved = offset.to(tl.int32) - move * tl.where(inside, _sign(slope), 0)
    tl.store(offsets + at, moved.to(offset.dtype), mask)
    shrunk_more = tl.minimum(tl.maximum(shrunk + shrink_move * _sign(tl.sum(terms, axis=1)), 0), most)
    moves = (inverse != 0) & (_unrounded_scale(peak, tensor) <= 448.0)
    tl.store(shrink + group, tl.where(moves, shrunk_more, shrunk).to(shrink.dtype.element_ty), there)


@triton.jit
def _integer_scale(values, low_kept, high_kept, limit):
    """(BF16 scale, -min and max as shrunk, whether the scale is clamped) of every row of values [groups, size]."""
    low = -tl.minimum(tl.min(values, axis=1), 0.0) * low_kept
    high = tl.maximum(tl.max(values, axis=1), 0.0) * high_kept
    scale = _bf16(tl.div_rn(tl.where(high < low, low, -high), limit))
    smallest = _bf16(tl.zeros_like(scale) + 1e-5)
    clamped = tl.abs(scale) < smallest
    return tl.where(scale < 0, tl.minimum(scale, -smallest), tl.maximum(scale, smallest)), low, high, clamped


@triton.jit
def _integer_weights(
    weight, offsets, shrink_low, shrink_high, limit, unit, shrink_unit, out, codes, scales, groups,
    KEEP: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = group < groups
    at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = there[:, None] & (at >= 0)
    values = tl.load(weight + at, mask, 0).to(tl.float32)
    low_kept = 1.0 - shrink_unit * tl.load(shrink_low + group, there, 0).to(tl.float32)
    high_kept = 1.0 - shrink_unit * tl.load(shrink_high + group, there, 0).to(tl.float32)
    scale, _, _, _ = _integer_scale(values, low_kept, high_kept, limit)
    quotient = _bf16(tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)))
    code = _round(quotient + unit * tl.load(offsets + at, mask, 0).to(tl.float32))
    code = tl.minimum(tl.maximum(code, -limit), limit - 1.0)
    tl.store(out + at, (code * scale[:, None]).to(tl.bfloat16), mask)
    if KEEP:
        tl.store(codes + at, code.to(tl.int8), mask)
        tl.store(scales + group, scale.to(tl.bfloat16), there)


@triton.jit
def _integer_step(
    gradient, weight, offsets, shrink_low, shrink_high, limit, unit, shrink_unit, move, shrink_move, most, groups,
    TILE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = group < groups
    at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = there[:, None] & (at >= 0)
    values = tl.load(weight + at, mask, 0).to(tl.float32)
    slope = tl.load(gradient + at, mask, 0).to(tl.float32)
    offset = tl.load(offsets + at, mask, 0)
    low_shrunk = tl.load(shrink_low + group, there, 0).to(tl.int32)
    high_shrunk = tl.load(shrink_high + group, there, 0).to(tl.int32)
    low_kept = 1.0 - shrink_unit * low_shrunk.to(tl.float32)
    high_kept = 1.0 - shrink_unit * high_shrunk.to(tl.float32)
    scale, low, high, clamped = _integer_scale(values, low_kept, high_kept, limit)
    quotient = _bf16(tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)))
    rounded = _round(quotient + unit * offset.to(tl.float32))
    code = tl.minimum(tl.maximum(rounded, -limit), limit - 1.0)
    inside = code == rounded
    terms = slope * (code - tl.where(inside, quotient, 0.0))
    moved = offset.to(tl.int32) - move * _sign(scale)[:, None] * tl.where(inside, _sign(slope), 0)
    tl.store(offsets + at, moved.to(offset.dtype), mask)
    direction = tl.where(clamped, 0, shrink_move * _sign(tl.sum(terms, axis=1)))
    low_moved = low_shrunk + tl.where(high < low, direction, tl.where(high == low, -direction, 0))
    high_moved = high_shrunk - tl.where(high < low, 0, direction)
    kind = shrink_low.dtype.element_ty
    tl.store(shrink_low + group, tl.minimum(tl.maximum(low_moved, 0), most).to(kind), there)
    tl.store(shrink_high + group, tl.minimum(tl.maximum(high_moved, 0), most).to(kind), there)


@triton.jit
def _spread(token, hidden, tensor_scale, out, width, ROUNDS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = column < width
    source = tl.load(token + row)
    values = tl.load(hidden + source * width + column, mask & (source >= 0), 0).to(tl.float32)
    if ROUNDS:
        tensor = tl.load(tensor_scale + row) + tl.zeros([TILE], tl.float32)
        values, _, _ = _round_groups(values, tensor)
    tl.store(out + row * width + column, values.to(tl.bfloat16), mask)


@triton.jit
def _round_inputs_backward(gradient, x, tensor_scale, out, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    at, mask = row * width + column, column < width
    tensor = tl.load(tensor_scale + row) + tl.zeros([TILE], tl.float32)
    slope = tl.load(gradient + at, mask, 0).to(tl.float32)
    values = tl.load(x + at, mask, 0).to(tl.float32)
    tl.store(out + at, _round_groups_backward(slope, values, tensor).to(tl.bfloat16), mask)


@triton.jit
def _spread_backward(
    rows, hidden, gradient, tensor_scale, out, width, CHOICES: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = column < width
    values = tl.load(hidden + token * width + column, mask, 0).to(tl.float32)
    total = tl.zeros([TILE, 16], tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(rows + token * CHOICES + choice)
        slope = tl.load(gradient + row * width + column, mask, 0).to(tl.float32)
        if ROUNDS:
            tensor = tl.load(tensor_scale + row) + tl.zeros([TILE], tl.float32)
            slope = _round_groups_backward(slope, values, tensor)
        total += slope
    tl.store(out + token * width + column, total.to(tl.bfloat16), mask)


@triton.jit
def _gate(token, gate_up, tensor_scale, out, width, ROUNDS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = (column < width) & (tl.load(token + row) >= 0)
    gate = tl.load(gate_up + row * 2 * width + column, mask, 0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask, 0).to(tl.float32)
    values = _bf16(_bf16(gate * _sigmoid(gate)) * up)
    if ROUNDS:
        tensor = tl.load(tensor_scale + row) + tl.zeros([TILE], tl.float32)
        values, _, _ = _round_groups(values, tensor)
    tl.store(out + row * width + column, values.to(tl.bfloat16), column < width)


@triton.jit
def _gate_backward(token, gradient, gate_up, tensor_scale, out, width, ROUNDS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = (column < width) & (tl.load(token + row) >= 0)
    slope = tl.load(gradient + row * width + column, mask, 0).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * width + column, mask, 0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask, 0).to(tl.float32)
    share = _sigmoid(gate)
    activated = _bf16(gate * share)
    if ROUNDS:
        tensor = tl.load(tensor_scale + row) + tl.zeros([TILE], tl.float32)
        slope = _bf16(_round_groups_backward(slope, _bf16(activated * up), tensor))
    of_gate = _bf16(slope * up) * share * (1.0 + gate * (1.0 - share))
    at = row * 2 * width + column
    tl.store(out + at, of_gate.to(tl.bfloat16), column < width)
    tl.store(out + at + width, (slope * activated).to(tl.bfloat16), column < width)


@triton.jit
def _combine(rows, outputs, gates, out, width, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(rows + token * CHOICES + choice)
        total += tl.load(gates + token * CHOICES + choice) * tl.load(
            outputs + row * width + column, column < width, 0
        ).to(tl.float32)
    tl.store(out + token * width + column, total.to(tl.bfloat16), column < width)


@triton.jit
def _combine_backward(
    rows, gradient, outputs, gates, of_outputs, of_gates, width, CHOICES: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    for choice in tl.static_range(CHOICES):
        row = tl.load(rows + token * CHOICES + choice)
        gate = tl.load(gates + token * CHOICES + choice)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            slope = tl.load(gradient + token * width + column, column < width, 0).to(tl.float32)
            value = tl.load(outputs + row * width + column, column < width, 0).to(tl.float32)
            tl.store(of_outputs + row * width + column, (gate * slope).to(tl.bfloat16), column < width)
            total += slope * value
        tl.store(of_gates + token * CHOICES + choice, tl.sum(total, axis=0))


@triton.jit
def _normalize(x, weight, epsilon, out, roots, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + row * width + column, column < width, 0).to(tl.float32)
    root = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(values * values, axis=0), width.to(tl.float32)) + epsilon))
    factors = tl.load(weight + column, column < width, 0).to(tl.float32)
    tl.store(out + row * width + column, (factors * _bf16(values * root)).to(tl.bfloat16), column < width)
    tl.store(roots + row, root)


@triton.jit
def _normalize_backward(gradient, x, weight, roots, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    root = tl.load(roots + row)
    values = tl.load(x + row * width + column, column < width, 0).to(tl.float32)
    slope = tl.load(gradient + row * width + column, column < width, 0).to(tl.float32)
    slope = _bf16(slope * tl.load(weight + column, column < width, 0).to(tl.float32))
    mean = tl.div_rn(tl.sum(slope * (values * root), axis=0), width.to(tl.float32))
    tl.store(out + row * width + column, (root * (slope - values * root * mean)).to(tl.bfloat16), column < width)


def weights(stack: Stack, first: int, last: int, out: torch.Tensor, keep: bool) -> None:
    """Fills `out` with the values of rows first..last as they are tuned now; `keep` stores their codes and scales."""
    part = slice(first, last)
    weight = stack.weight[part]
    units = stack.schedule.unit, stack.schedule.shrink_unit
    kept = out, stack.codes[part], stack.scales[part]
    shrinks = [shrink[part] for shrink in stack.shrinks]
    groups = weight.numel() // stack.scheme.group_size
    if stack.scheme.is_nvfp4:
        _nvfp4_weights[(triton.cdiv(groups, TILE),)](
            weight, stack.offsets[part], *shrinks, stack.tensor_scale[part], *units, *kept, groups, weight.shape[1],
            KEEP=keep, TILE=TILE, **EXACT,
        )  # fmt: skip
    else:
        size, tile = stack.scheme.group_size, TILE * 16 // stack.scheme.group_size
        _integer_weights[(triton.cdiv(groups, tile),)](
            weight, stack.offsets[part], *shrinks, _limit(stack), *units, *kept, groups,
            KEEP=keep, TILE=tile, SIZE=size, **EXACT,
        )  # fmt: skip


def step(stack: Stack, first: int, last: int, gradient: torch.Tensor, iteration: int) -> None:
    """Moves the offsets and shrinks of rows first..last against `gradient`, that of their values."""
    part = slice(first, last)
    weight, schedule = stack.weight[part], stack.schedule
    move = schedule.move(iteration)
    moves = schedule.unit, schedule.shrink_unit, move, move * schedule.shrinks, schedule.most_shrunk
    shrinks = [shrink[part] for shrink in stack.shrinks]
    groups = weight.numel() // stack.scheme.group_size
    arrays = gradient, weight, stack.offsets[part], *shrinks
    if stack.scheme.is_nvfp4:
        _nvfp4_step[(triton.cdiv(groups, TILE),)](
            *arrays, stack.tensor_scale[part], *moves, groups, weight.shape[1], TILE=TILE, **EXACT
        )
    else:
        size, tile = stack.scheme.group_size, TILE * 16 // stack.scheme.group_size
        _integer_step[(triton.cdiv(groups, tile),)](
            *arrays, _limit(stack), *moves, groups, TILE=tile, SIZE=size, **EXACT
        )  # fmt: skip


def _limit(stack: Stack) -> float:
    return float(2 ** (stack.scheme.weight_bits - 1))


def round_inputs(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """See kernels_cpu."""
    return spread(x, torch.arange(len(x), device=x.device), tensor_scale)


def round_inputs_backward(gradient: torch.Tensor, x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """See kernels_cpu."""
    check_width(x.shape[1])
    out = torch.empty_like(x)
    _round_inputs_backward[_grid(x)](gradient, x, tensor_scale, out, x.shape[1], TILE=TILE, **EXACT)
    return out


def spread(hidden: torch.Tensor, token: torch.Tensor, tensor_scale: torch.Tensor | None) -> torch.Tensor:
    """See kernels_cpu."""
    out = hidden.new_empty(len(token), hidden.shape[1])
    rounds, scale = _scale(tensor_scale, out)
    _spread[_grid(out)](token, hidden, scale, out, hidden.shape[1], ROUNDS=rounds, TILE=TILE, **EXACT)
    return out


def spread_backward(
    gradient: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor, tensor_scale: torch.Tensor | None
) -> torch.Tensor:
    """See kernels_cpu."""
    out = torch.empty_like(hidden)
    rounds, scale = _scale(tensor_scale, out)
    _spread_backward[_grid(hidden)](
        rows, hidden, gradient, scale, out, hidden.shape[1], CHOICES=rows.shape[1], ROUNDS=rounds, TILE=TILE, **EXACT
    )
    return out


def gate(gate_up: torch.Tensor, token: torch.Tensor, tensor_scale: torch.Tensor | None) -> torch.Tensor:
    """See kernels_cpu."""
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), width)
    rounds, scale = _scale(tensor_scale, out)
    _gate[_grid(out)](token, gate_up, scale, out, width, ROUNDS=rounds, TILE=TILE, **EXACT)
    return out


def gate_backward(
    gradient: torch.Tensor, gate_up: torch.Tensor, token: torch.Tensor, tensor_scale: torch.Tensor | None
) -> torch.Tensor:
    """See kernels_cpu."""
    out = torch.empty_like(gate_up)
    rounds, scale = _scale(tensor_scale, gradient)
    _gate_backward[_grid(gradient)](
        token, gradient, gate_up, scale, out, gradient.shape[1], ROUNDS=rounds, TILE=TILE, **EXACT
    )
    return out


def normalize(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels_cpu."""
    out, roots = torch.empty_like(x), torch.empty(len(x), device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    _normalize[(len(x),)](x, weight, epsilon, out, roots, x.shape[1], BLOCK=block, **EXACT)
    return out, roots


def normalize_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, roots: torch.Tensor
) -> torch.Tensor:
    """See kernels_cpu."""
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    _normalize_backward[(len(x),)](gradient, x, weight, roots, out, x.shape[1], BLOCK=block, **EXACT)
    return out


def combine(outputs: torch.Tensor, rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """See kernels_cpu."""
    width = outputs.shape[1]
    out = outputs.new_empty(len(rows), width)
    grid = (len(rows), triton.cdiv(width, 1024))
    _combine[grid](rows, outputs, gates, out, width, CHOICES=rows.shape[1], BLOCK=1024, **EXACT)
    return out


def combine_backward(
    gradient: torch.Tensor, outputs: torch.Tensor, token: torch.Tensor, rows: torch.Tensor, gates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels_cpu."""
    of_outputs, of_gates = torch.zeros_like(outputs), torch.empty_like(gates)
    _combine_backward[(len(rows),)](
        rows, gradient, outputs, gates, of_outputs, of_gates, outputs.shape[1], CHOICES=rows.shape[1], BLOCK=1024,
        **EXACT,
    )  # fmt: skip
    return of_outputs, of_gates


def _scale(tensor_scale: torch.Tensor | None, rows: torch.Tensor) -> tuple[bool, torch.Tensor]:
    """(whether `rows` are rounded, their scales); something that Triton takes for a pointer where there are none."""
    if tensor_scale is None:
        return False, rows
    check_width(rows.shape[1])
    return True, tensor_scale


def _grid(rows: torch.Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1], 16 * TILE)
