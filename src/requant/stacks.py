"""Weights that are tuned together: one matrix of rows, with the offsets and shrinks of all of them.

A stack holds one Linear, or one projection of all experts of a block, so that each pass of the tuner is one call
however many experts there are. The gradient of its values is spent as soon as it is made: no gradient outlives its
stack's backward pass, and there is no optimizer state.
"""

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch

from requant.encoding import QuantizedWeight
from requant.errors import RequantError
from requant.schemes import Scheme
from requant.signround import inverse


@dataclass(frozen=True)
class Schedule:
    """Learning rates that fall linearly to 0: rate * (1 - i / iters) at iteration i, a multiple of rate / iters.

    Offsets and shrinks are counted in these units, so integers hold them exactly.
    """

    iters: int
    rate: float
    shrink_rate: float
    shrinks: bool

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest integers that hold the sum of all moves."""
        return torch.int16 if self.iters * (self.iters + 1) // 2 < 2**15 else torch.int32

    @property
    def unit(self) -> float:
        return self.rate / max(self.iters, 1)

    @property
    def shrink_unit(self) -> float:
        return self.shrink_rate / max(self.iters, 1)

    @property
    def most_shrunk(self) -> int:
        """The shrink that leaves nothing of a group's range."""
        return min(int(1 / self.shrink_unit), torch.iinfo(self.dtype).max)

    def move(self, iteration: int) -> int:
        """The units that iteration `iteration` moves by."""
        return self.iters - iteration


# Bytes of BF16 values and of their gradient that a GPU holds at a time.
LARGEST_PART = 2**31


class Stack:
    """BF16 weights [rows, width] and what is tuned of them: offsets and shrinks from 0, in units of the schedule.

    rows: how many of them belong to each Linear, in order. tensor_scale: float32 [rows], NVFP4 only. `codes` and
    `scales` are those that were kept last: int8 [rows, width], e2m1 values doubled or integers, and BF16
    [rows, groups].
    """

    def __init__(
        self,
        rows: dict[str, int],
        weight: torch.Tensor,
        tensor_scale: torch.Tensor | None,
        scheme: Scheme,
        schedule: Schedule,
    ):
        if weight.shape[1] % scheme.group_size:
            raise RequantError(
                f"{next(iter(rows))}: width {weight.shape[1]}; {scheme.name} expects a multiple of "
                f"{scheme.group_size}, another stays in BF16"
            )
        self.rows, self.weight, self.tensor_scale = rows, weight, tensor_scale
        self.scheme, self.schedule = scheme, schedule
        groups = (len(weight), weight.shape[1] // scheme.group_size)
        device = weight.device
        self.offsets = torch.zeros(weight.shape, dtype=schedule.dtype, device=device)
        self.shrinks = [
            torch.zeros(groups, dtype=schedule.dtype, device=device) for _ in range(1 if scheme.is_nvfp4 else 2)
        ]
        self.codes = torch.zeros(weight.shape, dtype=torch.int8, device=device)
        self.scales = torch.zeros(groups, dtype=torch.bfloat16, device=device)
        # A CPU holds the values from step to step; a GPU, where memory is short, makes them again at every use.
        self.held = torch.empty_like(weight) if device.type == "cpu" else None
        self._sum: torch.Tensor | None = None
        self._kept_shown = False
        if self.held is not None:
            self.kernels.weights(self, 0, len(weight), self.held, False)

    @cached_property
    def kernels(self) -> ModuleType:
        """The passes over memory for the device that the stack is on."""
        return kernels_for(self.weight.device)

    def values(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """BF16 [last - first, width]: what rows first..last are rounded to, as they are tuned now."""
        if self.held is not None:
            return self.held[first:last]
        if self._kept_shown:
            return self.kept_values(first, len(self.weight) if last is None else last)
        out = torch.empty_like(self.weight[first:last])
        self.kernels.weights(self, first, first + len(out), out, False)
        return out

    def keep(self) -> None:
        """Stores the codes and scales of the weights as they are tuned now."""
        for first, last in self.parts(1):
            out = torch.empty_like(self.weight[first:last])
            self.kernels.weights(self, first, last, out, True)

    def parts(self, rows: int) -> list[tuple[int, int]]:
        """All rows in parts of a multiple of `rows`: one on a CPU; on a GPU, whose values are made part by part, of
        LARGEST_PART bytes or less."""
        if self.held is not None:
            return [(0, len(self.weight))]
        size = max(rows, LARGEST_PART // (rows * self.weight.shape[1] * 2) * rows)
        return [(first, min(first + size, len(self.weight))) for first in range(0, len(self.weight), size)]

    def step(self, gradient: torch.Tensor, iteration: int, more: bool, first: int = 0) -> None:
        """Takes the gradient of the values of rows from `first` on; moves them unless `more` is to be added first."""
        last = first + len(gradient)
        if more and self._sum is None:
            self._sum = torch.zeros_like(self.weight)
        if self._sum is not None:
            gradient = self._sum[first:last].add_(gradient)
        if not more:
            self.kernels.step(self, first, last, gradient, iteration)
            if self._sum is not None:
                gradient.zero_()

    def reset(self) -> None:
        """Takes all moves back: the stack is rounded plainly again."""
        for moved in (self.offsets, *self.shrinks):
            moved.zero_()
        if self.held is not None:
            self.kernels.weights(self, 0, len(self.weight), self.held, False)

    def show_kept(self, shown: bool) -> None:
        """Lets `values` be those of the kept codes, or again those that are tuned now."""
        self._kept_shown = shown
        if self.held is not None:
            if shown:
                self.held.copy_(self.kept_values(0, len(self.weight)))
            else:
                self.kernels.weights(self, 0, len(self.weight), self.held, False)

    def kept_values(self, first: int, last: int) -> torch.Tensor:
        """BF16: what the kept codes of rows first..last stand for."""
        out = torch.empty_like(self.weight[first:last])
        size = max(1, LARGEST_PART // 32 // out.shape[1])
        for start in range(first, last, size):
            rows = slice(start, min(start + size, last))
            scales = self.scales[rows].float()
            if self.scheme.is_nvfp4:
                scales = inverse(inverse(scales * inverse(self.tensor_scale[rows, None]))) / 2
            grouped = self.codes[rows].unflatten(-1, (-1, self.scheme.group_size))
            out[start - first : rows.stop - first] = (grouped * scales[..., None]).flatten(-2)
        return out

    def quantized(self) -> dict[str, QuantizedWeight]:
        """What was kept, by Linear, on the stack's device. It is the end of the stack: its own tensors are let go."""
        self.offsets, self.shrinks, self.held = None, [], None
        found, first = {}, 0
        for name, rows in self.rows.items():
            last = first + rows
            weight, scales = self.kept_values(first, last), self.scales[first:last]
            if self.scheme.is_nvfp4:
                tensor_scale = self.tensor_scale[first : first + 1]
                found[name] = QuantizedWeight(weight, scales.to(torch.float8_e4m3fn), tensor_scale)
            else:
                found[name] = QuantizedWeight(weight, scales)
            first = last
        self.weight = self.codes = None
        return found


def kernels_for(device: torch.device) -> ModuleType:
    """The module that computes on `device`."""
    if device.type == "cpu":
        from requant import kernels_cpu

        return kernels_cpu
    from requant import kernels_cuda

    return kernels_cuda
