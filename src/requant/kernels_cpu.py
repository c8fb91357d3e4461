"""The tuner's element-wise passes on the CPU: `signround`'s definitions as loops that Numba compiles.

Loops see BF16 as its 16 bits (uint16) and rows as [groups, 16], so that the compiler knows every index and uses whole
vector registers. Sums run in a fixed order and nothing is contracted to fused multiply-adds: the numbers are those of
the definitions, on every CPU and with any number of threads.
"""

import numpy as np
import torch
from numba import njit

from requant.nvfp4 import check_width
from requant.stacks import Stack
from requant.threads import in_parts

inner = njit(error_model="numpy")  # no check for division by zero: it would keep loops from being vectorized
row_part = njit(error_model="numpy", inline="always")
kernel = njit(error_model="numpy", cache=True, nogil=True)

F32 = np.float32
LANES = 16  # the values of an NVFP4 group; sums of any length are kept in as many parts


@inner
def _float(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inner
def _bf16(value):
    bits = np.float32(value).view(np.uint32)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inner
def _through_bf16(value):
    return _float(_bf16(value))


@inner
def _e4m3(value):
    """The nearest e4m3 number of a value from 0 to 448, ties to even."""
    exponent = np.uint32(max(np.uint32(np.float32(value).view(np.uint32) >> np.uint32(23)), np.uint32(121)))
    step = np.uint32(np.uint32(exponent - np.uint32(3)) << np.uint32(23)).view(np.float32)
    inverse = np.uint32(np.uint32(np.uint32(257) - exponent) << np.uint32(23)).view(np.float32)
    return np.rint(value * inverse) * step


@inner
def _e2m1(value):
    """The nearest e2m1 number of a value, at most 6 in magnitude, ties to even codes."""
    value = min(max(value, F32(-6)), F32(6))
    magnitude = abs(value)
    step = F32(0.5) if magnitude < F32(2) else (F32(1) if magnitude < F32(4) else F32(2))
    inverse = F32(2) if magnitude < F32(2) else (F32(1) if magnitude < F32(4) else F32(0.5))
    return np.rint(value * inverse) * step


@inner
def _inverse(value):
    return F32(1) / value if value != F32(0) else F32(0)


@inner
def _sign(value):
    return np.int32(value > F32(0)) - np.int32(value < F32(0))


@inner
def _sum(lanes):
    a, b = (lanes[0] + lanes[8]) + (lanes[4] + lanes[12]), (lanes[1] + lanes[9]) + (lanes[5] + lanes[13])
    c, d = (lanes[2] + lanes[10]) + (lanes[6] + lanes[14]), (lanes[3] + lanes[11]) + (lanes[7] + lanes[15])
    return (a + c) + (b + d)


@inner
def _scratch(groups):
    return np.empty(groups, F32)


@row_part
def _peaks(row, peaks):
    for group in range(len(row)):
        peak = F32(0)
        for lane in range(LANES):
            peak = max(peak, abs(_float(row[group, lane])))
        peaks[group] = peak


@inner
def _unrounded_scale(peak, tensor_scale):
    """What the scale of a group is rounded from, and clamped to 448: beyond that it does not move."""
    return tensor_scale * (peak * F32(1.0 / 6.0))


@inner
def _nvfp4_scale(peak, tensor_scale):
    """The scale, an e4m3 number, of a group's largest magnitude."""
    return _e4m3(min(_unrounded_scale(peak, tensor_scale), F32(448)))


@row_part
def _nvfp4_factors(peaks, tensor_scale, inverses, steps):
    """What takes a group's values to codes, and codes to values, from the largest magnitudes."""
    inverse_of_tensor = _inverse(tensor_scale)
    for group in range(len(peaks)):
        inverse = _inverse(_nvfp4_scale(peaks[group], tensor_scale) * inverse_of_tensor)
        inverses[group] = inverse
        steps[group] = _inverse(inverse)


@kernel
def _nvfp4_weights(
    weight, offsets, shrink, tensor_scale, unit, shrink_unit, out, codes, kept_scales, keep, first, last
):
    groups = weight.shape[1]
    peaks, inverses, steps = _scratch(groups), _scratch(groups), _scratch(groups)
    for row in range(first, last):
        _peaks(weight[row], peaks)
        for group in range(groups):
            peaks[group] *= F32(1) - shrink_unit * F32(shrink[row, group])
        _nvfp4_factors(peaks, tensor_scale[row], inverses, steps)
        for group in range(groups):
            inverse, step = inverses[group], steps[group]
            for lane in range(LANES):
                scaled = _float(weight[row, group, lane]) * inverse + unit * F32(offsets[row, group, lane])
                out[row, group, lane] = _bf16(_e2m1(scaled) * step)
        if keep:
            for group in range(groups):
                kept_scales[row, group] = _bf16(_nvfp4_scale(peaks[group], tensor_scale[row]))
                for lane in range(LANES):
                    scaled = _float(weight[row, group, lane]) * inverses[group] + unit * F32(offsets[row, group, lane])
                    codes[row, group, lane] = np.int8(F32(2) * _e2m1(scaled))


@kernel
def _nvfp4_step(
    gradient, weight, offsets, shrink, tensor_scale, unit, shrink_unit, move, shrink_move, most, out, first, last
):
    groups = weight.shape[1]
    peaks, inverses, steps, full = _scratch(groups), _scratch(groups), _scratch(groups), _scratch(groups)
    terms = np.empty((groups, LANES), F32)
    for row in range(first, last):
        _peaks(weight[row], full)
        for group in range(groups):
            peaks[group] = full[group] * (F32(1) - shrink_unit * F32(shrink[row, group]))
        _nvfp4_factors(peaks, tensor_scale[row], inverses, steps)
        for group in range(groups):
            inverse = inverses[group]
            for lane in range(LANES):
                slope = _float(gradient[row, group, lane])
                base = _float(weight[row, group, lane]) * inverse
                scaled = base + unit * F32(offsets[row, group, lane])
                inside = (abs(scaled) <= F32(6)) & (scaled != F32(0)) & (inverse != F32(0))
                terms[group, lane] = slope * (_e2m1(scaled) - (base if inside else F32(0)))
                direction = _sign(slope) if inside else np.int32(0)
                offsets[row, group, lane] = np.int32(offsets[row, group, lane]) - move * direction
        for group in range(groups):
            if inverses[group] != F32(0) and _unrounded_scale(peaks[group], tensor_scale[row]) <= F32(448):
                moved = shrink[row, group] + shrink_move * _sign(_sum(terms[group]))
                shrink[row, group] = min(max(moved, 0), most)
            peaks[group] = full[group] * (F32(1) - shrink_unit * F32(shrink[row, group]))
        _nvfp4_factors(peaks, tensor_scale[row], inverses, steps)
        for group in range(groups):
            inverse, step = inverses[group], steps[group]
            for lane in range(LANES):
                scaled = _float(weight[row, group, lane]) * inverse + unit * F32(offsets[row, group, lane])
                out[row, group, lane] = _bf16(_e2m1(scaled) * step)


@row_part
def _round_row(values, tensor_scale, peaks, inverses, steps, out):
    """Fills `out` with BF16 `values` [groups, 16] rounded to NVFP4."""
    _peaks(values, peaks)
    _nvfp4_factors(peaks, tensor_scale, inverses, steps)
    for group in range(len(values)):
        inverse, step = inverses[group], steps[group]
        for lane in range(LANES):
            out[group, lane] = _bf16(_e2m1(_float(values[group, lane]) * inverse) * step)


@inner
def _rank(bits, lane):
    """Orders the values of a group by magnitude, the first of equal ones above the others."""
    return np.int32(np.int32(bits) & np.int32(0x7FFF)) * np.int32(LANES) + np.int32(LANES - 1 - lane)


@row_part
def _largest(row, ranks, peaks, largest):
    """The largest magnitude of every group and the lane of the first value that has it."""
    for group in range(len(row)):
        for lane in range(8):
            ranks[group, lane] = max(_rank(row[group, lane], lane), _rank(row[group, lane + 8], lane + 8))
    for group in range(len(row)):
        a, b = max(ranks[group, 0], ranks[group, 1]), max(ranks[group, 2], ranks[group, 3])
        c, d = max(ranks[group, 4], ranks[group, 5]), max(ranks[group, 6], ranks[group, 7])
        rank = max(max(a, b), max(c, d))
        peaks[group] = _float(np.uint32(rank) >> np.uint32(4))
        largest[group] = np.int32(LANES - 1) - (rank & np.int32(LANES - 1))


@row_part
def _round_row_backward(gradient, values, tensor_scale, peaks, inverses, steps, terms, ranks, largest, out):
    """Fills float32 `out` with the gradient of `values` from that of the rounded values: straight through, and through
    the scale, which is that of the largest value: what reaches it lands there, on the first of equal ones."""
    _largest(values, ranks, peaks, largest)
    _nvfp4_factors(peaks, tensor_scale, inverses, steps)
    for group in range(len(values)):
        inverse = inverses[group]
        for lane in range(LANES):
            slope = _float(gradient[group, lane])
            scaled = _float(values[group, lane]) * inverse
            inside = (abs(scaled) <= F32(6)) & (scaled != F32(0))
            terms[group, lane] = slope * (_e2m1(scaled) - (scaled if inside else F32(0)))
            out[group, lane] = slope if inside else F32(0)
    for group in range(len(values)):
        if inverses[group] != F32(0) and _unrounded_scale(peaks[group], tensor_scale) <= F32(448):
            lane = np.uint32(largest[group])
            through_scale = _sum(terms[group]) * F32(1.0 / 6.0)
            out[group, lane] += through_scale if _float(values[group, lane]) > F32(0) else -through_scale


@kernel
def _round_inputs(x, tensor_scale, out, first, last):
    groups = x.shape[1]
    peaks, inverses, steps = _scratch(groups), _scratch(groups), _scratch(groups)
    for row in range(first, last):
        _round_row(x[row], tensor_scale[row], peaks, inverses, steps, out[row])


@kernel
def _round_inputs_backward(gradient, x, tensor_scale, out, first, last):
    groups = x.shape[1]
    peaks, inverses, steps = _scratch(groups), _scratch(groups), _scratch(groups)
    terms, slopes = np.empty((groups, LANES), F32), np.empty((groups, LANES), F32)
    ranks, largest = np.empty((groups, 8), np.int32), np.empty(groups, np.int32)
    for row in range(first, last):
        _round_row_backward(
            gradient[row], x[row], tensor_scale[row], peaks, inverses, steps, terms, ranks, largest, slopes
        )
        for group in range(groups):
            for lane in range(LANES):
                out[row, group, lane] = _bf16(slopes[group, lane])


@kernel
def _place(chosen, starts, token, rows):
    free = starts.copy()
    token[:] = -1
    for number in range(chosen.shape[0]):
        for choice in range(chosen.shape[1]):
            expert = chosen[number, choice]
            row = free[expert]
            free[expert] += 1
            token[row] = number
            rows[number, choice] = row


@kernel
def _spread(token, hidden, rounds, tensor_scale, out, first, last):
    groups = hidden.shape[1]
    peaks, inverses, steps = _scratch(groups), _scratch(groups), _scratch(groups)
    for row in range(first, last):
        if token[row] < 0:
            out[row] = 0
        elif rounds:
            _round_row(hidden[token[row]], tensor_scale[row], peaks, inverses, steps, out[row])
        else:
            out[row] = hidden[token[row]]


@kernel
def _spread_backward(rows, hidden, gradient, rounds, tensor_scale, out, first, last):
    groups = hidden.shape[1]
    peaks, inverses, steps = _scratch(groups), _scratch(groups), _scratch(groups)
    terms, slopes = np.empty((groups, LANES), F32), np.empty((groups, LANES), F32)
    ranks, largest = np.empty((groups, 8), np.int32), np.empty(groups, np.int32)
    total = np.empty((groups, LANES), F32)
    for token in range(first, last):
        total[:] = F32(0)
        for choice in range(rows.shape[1]):
            row = rows[token, choice]
            if rounds:
                _round_row_backward(
                    gradient[row],
                    hidden[token],
                    tensor_scale[row],
                    peaks,
                    inverses,
                    steps,
                    terms,
                    ranks,
                    largest,
                    slopes,
                )
                for group in range(groups):
                    for lane in range(LANES):
                        total[group, lane] += slopes[group, lane]
            else:
                for group in range(groups):
                    for lane in range(LANES):
                        total[group, lane] += _float(gradient[row, group, lane])
        for group in range(groups):
            for lane in range(LANES):
                out[token, group, lane] = _bf16(total[group, lane])


@inner
def _exp(x):
    """e to the x, for x up to 88, to 1e-7 of its value: 2 to the nearest power times a polynomial (Cephes expf)."""
    x = max(x, F32(-87))
    shifted = x * F32(1.44269504) + F32(12582912)  # the last bits hold the power
    power = shifted - F32(12582912)
    rest = (x - power * F32(0.693359375)) + power * F32(2.12194440e-4)
    value = F32(1.9875691500e-4)
    value = value * rest + F32(1.3981999507e-3)
    value = value * rest + F32(8.3334519073e-3)
    value = value * rest + F32(4.1665795894e-2)
    value = value * rest + F32(1.6666665459e-1)
    value = value * rest + F32(5.0000001201e-1)
    value = value * rest * rest + rest + F32(1)
    return value * np.uint32(np.uint32(F32(shifted).view(np.uint32) + np.uint32(127)) << np.uint32(23)).view(np.float32)


@inner
def _sigmoid(x):
    return F32(1) / (F32(1) + _exp(-x))


@row_part
def _gated_row(gate, up, values):
    """Fills `values` with silu(gate) * up, rounded to BF16 after either."""
    for column in range(len(values)):
        value = _float(gate[column])
        values[column] = _bf16(_through_bf16(value * _sigmoid(value)) * _float(up[column]))


@kernel
def _gate(token, gate_up, rounds, tensor_scale, out, first, last):
    width = gate_up.shape[2]
    groups = width // LANES
    peaks, inverses, steps = _scratch(groups), _scratch(groups), _scratch(groups)
    values = np.empty(width, np.uint16)
    grouped = values.reshape((groups, LANES))
    for row in range(first, last):
        if token[row] < 0:
            out[row] = 0
        else:
            _gated_row(gate_up[row, 0], gate_up[row, 1], values)
            if rounds:
                _round_row(grouped, tensor_scale[row], peaks, inverses, steps, out[row])
            else:
                out[row] = grouped


@kernel
def _gate_backward(token, gradient, gate_up, rounds, tensor_scale, out, first, last):
    width = gate_up.shape[2]
    groups = width // LANES
    peaks, inverses, steps = _scratch(groups), _scratch(groups), _scratch(groups)
    terms, slopes, values = np.empty((groups, LANES), F32), np.empty(width, F32), np.empty(width, np.uint16)
    ranks, largest = np.empty((groups, 8), np.int32), np.empty(groups, np.int32)
    grouped, grouped_slopes = values.reshape((groups, LANES)), slopes.reshape((groups, LANES))
    for row in range(first, last):
        if token[row] < 0:
            out[row] = 0
            continue
        if rounds:
            _gated_row(gate_up[row, 0], gate_up[row, 1], values)
            _round_row_backward(
                gradient[row], grouped, tensor_scale[row], peaks, inverses, steps, terms, ranks, largest, grouped_slopes
            )
        else:
            for group in range(groups):
                for lane in range(LANES):
                    grouped_slopes[group, lane] = _float(gradient[row, group, lane])
        _gated_row_backward(slopes, gate_up[row, 0], gate_up[row, 1], out[row, 0], out[row, 1])


@row_part
def _gated_row_backward(slopes, gate, up, of_gate, of_up):
    for column in range(len(slopes)):
        slope = _through_bf16(slopes[column])
        value = _float(gate[column])
        share = _sigmoid(value)
        of_up[column] = _bf16(slope * _through_bf16(value * share))
        of_silu = _through_bf16(slope * _float(up[column]))
        of_gate[column] = _bf16(of_silu * share * (F32(1) + value * (F32(1) - share)))


@kernel
def _normalize(x, weight, epsilon, out, roots, first, last):
    width = x.shape[1]
    groups = (width + LANES - 1) // LANES
    values, factors = np.zeros((groups, LANES), F32), np.empty(width, F32)  # zeros behind the last column
    flat, lanes = values.reshape(groups * LANES), np.empty(LANES, F32)
    for column in range(width):
        factors[column] = _float(weight[column])
    for row in range(first, last):
        for column in range(width):
            flat[column] = _float(x[row, column])
        lanes[:] = F32(0)
        for group in range(groups):
            for lane in range(LANES):
                lanes[lane] += values[group, lane] * values[group, lane]
        root = F32(1) / np.sqrt(_sum(lanes) / F32(width) + epsilon)
        roots[row] = root
        for column in range(width):
            out[row, column] = _bf16(factors[column] * _through_bf16(flat[column] * root))


@kernel
def _normalize_backward(gradient, x, weight, roots, out, first, last):
    width = x.shape[1]
    groups = (width + LANES - 1) // LANES
    normal, slopes = np.zeros((groups, LANES), F32), np.zeros((groups, LANES), F32)  # zeros behind the last column
    factors = np.empty(width, F32)
    flat, flat_slopes, lanes = normal.reshape(groups * LANES), slopes.reshape(groups * LANES), np.empty(LANES, F32)
    for column in range(width):
        factors[column] = _float(weight[column])
    for row in range(first, last):
        root = roots[row]
        for column in range(width):
            flat[column] = _float(x[row, column]) * root
            flat_slopes[column] = _through_bf16(_float(gradient[row, column]) * factors[column])
        lanes[:] = F32(0)
        for group in range(groups):
            for lane in range(LANES):
                lanes[lane] += slopes[group, lane] * normal[group, lane]
        mean = _sum(lanes) / F32(width)
        for column in range(width):
            out[row, column] = _bf16(root * (flat_slopes[column] - flat[column] * mean))


@inner
def _largest_lane(lanes):
    peak = lanes[0]
    for lane in range(1, LANES):
        peak = max(peak, lanes[lane])
    return peak


@kernel
def _attend(scores, scale, out, first, last):
    length = scores.shape[1]
    chunks = (length + LANES - 1) // LANES
    powers, lanes = np.empty((chunks, LANES), F32), np.empty(LANES, F32)
    flat = powers.reshape(chunks * LANES)
    for row in range(first, last):
        seen = row % length + 1
        for column in range(seen):
            flat[column] = scores[row, column] * scale
        flat[seen:] = F32(-np.inf)
        lanes[:] = F32(-np.inf)
        for chunk in range(chunks):
            for lane in range(LANES):
                lanes[lane] = max(lanes[lane], powers[chunk, lane])
        peak = _largest_lane(lanes)
        for column in range(chunks * LANES):
            flat[column] = _exp(flat[column] - peak)
        lanes[:] = F32(0)
        for chunk in range(chunks):
            for lane in range(LANES):
                lanes[lane] += powers[chunk, lane]
        share = F32(1) / _sum(lanes)
        for column in range(seen):
            out[row, column] = _bf16(flat[column] * share)
        for column in range(seen, length):
            out[row, column] = 0


@kernel
def _attend_backward(shares, gradient, scale, out, first, last):
    length = shares.shape[1]
    chunks = (length + LANES - 1) // LANES
    terms, lanes = np.zeros((chunks, LANES), F32), np.empty(LANES, F32)
    flat = terms.reshape(chunks * LANES)
    for row in range(first, last):
        for column in range(length):
            flat[column] = _float(shares[row, column]) * _float(gradient[row, column])
        lanes[:] = F32(0)
        for chunk in range(chunks):
            for lane in range(LANES):
                lanes[lane] += terms[chunk, lane]
        mean = _sum(lanes)
        for column in range(length):
            slope = _float(gradient[row, column]) - mean
            out[row, column] = _bf16(_float(shares[row, column]) * slope * scale)


@kernel
def _combine(rows, outputs, gates, out, first, last):
    groups = outputs.shape[1]
    total = np.empty((groups, LANES), F32)
    for token in range(first, last):
        total[:] = F32(0)
        for choice in range(rows.shape[1]):
            row, gate = rows[token, choice], gates[token, choice]
            for group in range(groups):
                for lane in range(LANES):
                    total[group, lane] += gate * _float(outputs[row, group, lane])
        for group in range(groups):
            for lane in range(LANES):
                out[token, group, lane] = _bf16(total[group, lane])


@kernel
def _combine_backward(rows, gradient, outputs, gates, of_outputs, of_gates, first, last):
    lanes = np.empty(LANES, F32)
    for token in range(first, last):
        for choice in range(rows.shape[1]):
            row, gate = rows[token, choice], gates[token, choice]
            lanes[:] = F32(0)
            for group in range(outputs.shape[1]):
                for lane in range(LANES):
                    slope = _float(gradient[token, group, lane])
                    of_outputs[row, group, lane] = _bf16(gate * slope)
                    lanes[lane] += slope * _float(outputs[row, group, lane])
            of_gates[token, choice] = _sum(lanes)


@row_part
def _ends(row, shrink_low, shrink_high, shrink_unit, low, high):
    """-min and max of every group's weights, as shrunk; row: [groups, parts, 16]."""
    for group in range(len(row)):
        smallest, largest = F32(0), F32(0)
        for part in range(row.shape[1]):
            for lane in range(LANES):
                value = _float(row[group, part, lane])
                smallest, largest = min(smallest, value), max(largest, value)
        low[group] = -smallest * (F32(1) - shrink_unit * F32(shrink_low[group]))
        high[group] = largest * (F32(1) - shrink_unit * F32(shrink_high[group]))


@inner
def _unclamped_scale(low, high, limit):
    return _through_bf16((low if high < low else -high) / limit)


@inner
def _integer_scale(low, high, limit):
    """The BF16 scale of a group; the larger tail gets the extra code."""
    scale = _unclamped_scale(low, high, limit)
    smallest = _through_bf16(F32(1e-5))
    return min(scale, -smallest) if scale < F32(0) else max(scale, smallest)


@kernel
def _integer_weights(
    weight, offsets, shrink_low, shrink_high, limit, unit, shrink_unit, out, codes, kept_scales, keep, first, last
):
    groups = weight.shape[1]
    low, high = np.empty(groups, F32), np.empty(groups, F32)
    for row in range(first, last):
        _ends(weight[row], shrink_low[row], shrink_high[row], shrink_unit, low, high)
        for group in range(groups):
            scale = _integer_scale(low[group], high[group], limit)
            for part in range(weight.shape[2]):
                for lane in range(LANES):
                    quotient = _through_bf16(_float(weight[row, group, part, lane]) / scale)
                    rounded = np.rint(quotient + unit * F32(offsets[row, group, part, lane]))
                    code = min(max(rounded, -limit), limit - F32(1))
                    out[row, group, part, lane] = _bf16(code * scale)
                    if keep:
                        codes[row, group, part, lane] = np.int8(code)
            if keep:
                kept_scales[row, group] = _bf16(scale)


@kernel
def _integer_step(
    gradient,
    weight,
    offsets,
    shrink_low,
    shrink_high,
    limit,
    unit,
    shrink_unit,
    move,
    shrink_move,
    most,
    out,
    first,
    last,
):
    groups = weight.shape[1]
    low, high = np.empty(groups, F32), np.empty(groups, F32)
    lanes = np.empty(LANES, F32)
    for row in range(first, last):
        _ends(weight[row], shrink_low[row], shrink_high[row], shrink_unit, low, high)
        for group in range(groups):
            scale = _integer_scale(low[group], high[group], limit)
            toward = _sign(scale) * move
            lanes[:] = F32(0)
            for part in range(weight.shape[2]):
                for lane in range(LANES):
                    slope = _float(gradient[row, group, part, lane])
                    quotient = _through_bf16(_float(weight[row, group, part, lane]) / scale)
                    rounded = np.rint(quotient + unit * F32(offsets[row, group, part, lane]))
                    code = min(max(rounded, -limit), limit - F32(1))
                    inside = code == rounded
                    lanes[lane] += slope * (code - (quotient if inside else F32(0)))
                    direction = _sign(slope) if inside else np.int32(0)
                    offsets[row, group, part, lane] = np.int32(offsets[row, group, part, lane]) - toward * direction
            clamped = abs(_unclamped_scale(low[group], high[group], limit)) < _through_bf16(F32(1e-5))
            direction = np.int32(0) if clamped else shrink_move * _sign(_sum(lanes))
            if high[group] < low[group]:
                shrink_low[row, group] = min(max(shrink_low[row, group] + direction, 0), most)
            else:
                shrink_high[row, group] = min(max(shrink_high[row, group] - direction, 0), most)
                if high[group] == low[group]:
                    shrink_low[row, group] = min(max(shrink_low[row, group] - direction, 0), most)
        _ends(weight[row], shrink_low[row], shrink_high[row], shrink_unit, low, high)
        for group in range(groups):
            scale = _integer_scale(low[group], high[group], limit)
            for part in range(weight.shape[2]):
                for lane in range(LANES):
                    quotient = _through_bf16(_float(weight[row, group, part, lane]) / scale)
                    rounded = np.rint(quotient + unit * F32(offsets[row, group, part, lane]))
                    out[row, group, part, lane] = _bf16(min(max(rounded, -limit), limit - F32(1)) * scale)


def weights(stack: Stack, first: int, last: int, out: torch.Tensor, keep: bool) -> None:
    """Fills `out` with the values of rows first..last as they are tuned now; `keep` stores their codes and scales."""
    kernel, arrays, format = _of_stack(stack, first, last, _nvfp4_weights, _integer_weights)
    units = F32(stack.schedule.unit), F32(stack.schedule.shrink_unit)
    group_size = stack.scheme.group_size
    kept = _grouped(stack.codes[first:last], group_size), _array(stack.scales[first:last])
    _over_rows(kernel, *arrays, *format, *units, _grouped(out, group_size), *kept, keep)


def step(stack: Stack, first: int, last: int, gradient: torch.Tensor, iteration: int) -> None:
    """Moves the offsets and shrinks of rows first..last against `gradient`, that of their values, and these values."""
    schedule, group_size = stack.schedule, stack.scheme.group_size
    kernel, arrays, format = _of_stack(stack, first, last, _nvfp4_step, _integer_step)
    units = F32(schedule.unit), F32(schedule.shrink_unit)
    move = np.int32(schedule.move(iteration))
    moves = move, move * np.int32(schedule.shrinks), np.int32(schedule.most_shrunk)
    out = _grouped(stack.held[first:last], group_size)
    _over_rows(kernel, _grouped(gradient, group_size), *arrays, *format, *units, *moves, out)


def _of_stack(stack: Stack, first: int, last: int, nvfp4_kernel, integer_kernel) -> tuple:
    """(kernel, what is tuned, format) of a stack's scheme, for rows first..last."""
    group, part = stack.scheme.group_size, slice(first, last)
    shrinks = (_array(shrink[part]) for shrink in stack.shrinks)
    arrays = _grouped(stack.weight[part], group), _grouped(stack.offsets[part], group), *shrinks
    if stack.scheme.is_nvfp4:
        return nvfp4_kernel, arrays, (_array(stack.tensor_scale[part]),)
    return integer_kernel, arrays, (F32(2 ** (stack.scheme.weight_bits - 1)),)


def round_inputs(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """BF16 x [rows, width], tensor_scale [rows] -> x rounded to NVFP4."""
    check_width(x.shape[1])
    out = torch.empty_like(x)
    _over_rows(_round_inputs, _grouped(x), _array(tensor_scale), _grouped(out))
    return out


def round_inputs_backward(gradient: torch.Tensor, x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """The gradient of x, from that of `round_inputs(x, tensor_scale)`."""
    check_width(x.shape[1])
    out = torch.empty_like(x)
    _over_rows(_round_inputs_backward, _grouped(gradient), _grouped(x), _array(tensor_scale), _grouped(out))
    return out


def place(chosen: torch.Tensor, starts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """chosen [tokens, k] -> (token [rows], -1 for none; rows [tokens, k]), each expert's from starts[expert] on."""
    token, rows = torch.empty(starts[-1], dtype=torch.long), torch.empty(chosen.shape, dtype=torch.long)
    _place(chosen.contiguous().numpy(), np.array(starts), token.numpy(), rows.numpy())
    return token, rows


def spread(hidden: torch.Tensor, token: torch.Tensor, tensor_scale: torch.Tensor | None) -> torch.Tensor:
    """hidden [tokens, width], token [rows] -> [rows, width]: the token of each row, 0 for token -1.

    With tensor scales [rows] it is rounded to NVFP4.
    """
    rounds, filled = _scale(tensor_scale, hidden), _filled(hidden)
    out = filled.new_empty(len(token), filled.shape[1])
    _over_rows(_spread, _array(token), _grouped(filled), *rounds, _grouped(out))
    return _cut(out, hidden.shape[1])


def spread_backward(
    gradient: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor, tensor_scale: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of `hidden` from that of `spread`; rows: [tokens, k], where each token went."""
    rounds, filled = _scale(tensor_scale, hidden), _filled(hidden)
    out = torch.empty_like(filled)
    arrays = _grouped(filled), _grouped(_filled(gradient))
    _over_rows(_spread_backward, _array(rows), *arrays, *rounds, _grouped(out))
    return _cut(out, hidden.shape[1])


def gate(gate_up: torch.Tensor, token: torch.Tensor, tensor_scale: torch.Tensor | None) -> torch.Tensor:
    """gate_up [rows, 2 * width] -> silu(gate) * up [rows, width], rounded to NVFP4 if there are scales [rows]."""
    halves = gate_up.unflatten(-1, (2, -1))
    rounds, filled = _scale(tensor_scale, halves), _filled(halves)
    out = filled.new_empty(len(filled), filled.shape[-1])
    _over_rows(_gate, _array(token), _array(filled), *rounds, _grouped(out))
    return _cut(out, halves.shape[-1])


def gate_backward(
    gradient: torch.Tensor, gate_up: torch.Tensor, token: torch.Tensor, tensor_scale: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of gate_up, from that of `gate`."""
    halves = gate_up.unflatten(-1, (2, -1))
    rounds, filled = _scale(tensor_scale, halves), _filled(halves)
    out = torch.empty_like(filled)
    arrays = _grouped(_filled(gradient)), _array(filled)
    _over_rows(_gate_backward, _array(token), *arrays, *rounds, _array(out))
    return _cut(out, halves.shape[-1]).flatten(1)


def normalize(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, width], weight [width] -> (x over its root mean square times weight, 1 / that root [rows])."""
    out, roots = torch.empty_like(x), torch.empty(len(x))
    _over_rows(_normalize, _array(x), _array(weight), F32(epsilon), _array(out), _array(roots))
    return out, roots


def normalize_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, roots: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, from that of `normalize`."""
    out = torch.empty_like(x)
    _over_rows(
        _normalize_backward, _array(gradient), _array(x), _array(weight), _array(roots), _array(out)
    )  # fmt: skip
    return out


def attend(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """float32 scores [n, T, T] -> BF16 shares: the softmax of scores * scale over what is not ahead, 0 ahead."""
    out = torch.empty(scores.shape, dtype=torch.bfloat16)
    _over_rows(_attend, _array(scores.flatten(0, 1)), F32(scale), _array(out.flatten(0, 1)))
    return out


def attend_backward(gradient: torch.Tensor, shares: torch.Tensor, scale: float) -> torch.Tensor:
    """The gradient of the scores, BF16, from that of `attend`."""
    out = torch.empty_like(shares)
    rows = (_array(tensor.flatten(0, 1)) for tensor in (shares, gradient))
    _over_rows(_attend_backward, *rows, F32(scale), _array(out.flatten(0, 1)))
    return out


def combine(outputs: torch.Tensor, rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """outputs [rows, width], rows and float32 gates [tokens, k] -> [tokens, width]: gated sums of a token's rows."""
    filled = _filled(outputs)
    out = filled.new_empty(len(rows), filled.shape[1])
    _over_rows(_combine, _array(rows), _grouped(filled), _array(gates), _grouped(out))
    return _cut(out, outputs.shape[1])


def combine_backward(
    gradient: torch.Tensor, outputs: torch.Tensor, token: torch.Tensor, rows: torch.Tensor, gates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of outputs and gates, from that of `combine`; token: [rows], -1 for rows without one."""
    filled = _filled(outputs)
    of_outputs, of_gates = torch.empty_like(filled), torch.empty_like(gates)
    of_outputs[token < 0] = 0
    arrays = _grouped(_filled(gradient)), _grouped(filled), _array(gates)
    _over_rows(_combine_backward, _array(rows), *arrays, _grouped(of_outputs), _array(of_gates))
    return _cut(of_outputs, outputs.shape[1]), of_gates


def _over_rows(kernel, *arguments) -> None:
    """Runs a kernel over the rows of its first argument, in parts side by side."""
    size = max(argument.nbytes for argument in arguments if isinstance(argument, np.ndarray))
    in_parts(lambda first, last: kernel(*arguments, first, last), len(arguments[0]), size)


def _scale(tensor_scale: torch.Tensor | None, rows: torch.Tensor) -> tuple[bool, np.ndarray]:
    """(whether `rows` are rounded, their scales)."""
    if tensor_scale is None:
        return False, np.zeros(0, np.float32)
    check_width(rows.shape[-1])
    return True, _array(tensor_scale)


def _filled(rows: torch.Tensor) -> torch.Tensor:
    """[..., width] filled up with zeros to a multiple of 16, as the loops go; themselves if they have one."""
    missing = -rows.shape[-1] % LANES
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def _cut(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[..., width] of what was made of `_filled` rows."""
    return rows if rows.shape[-1] == width else rows[..., :width].contiguous()


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory, BF16 as its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _grouped(tensor: torch.Tensor, group_size: int = LANES) -> np.ndarray:
    """The memory of [rows, width] as [rows, groups, 16], or as [rows, groups, parts, 16] for larger groups."""
    shape = (-1, LANES) if group_size == LANES else (-1, group_size // LANES, LANES)
    return _array(tensor.unflatten(-1, shape))
