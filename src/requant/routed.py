"""Tokens sorted by the experts that they go to."""

from dataclasses import dataclass
from itertools import accumulate

import torch

# Rows of an expert in a batched product are filled up to a multiple of this: few distinct shapes, no new kernels.
ROW_MULTIPLE = 32
# A batched product over all experts may have this many times the rows that were routed, else experts go one by one.
MOST_PADDING = 2.0


@dataclass(frozen=True)
class Routing:
    """Tokens sorted by expert: each expert has rows of its own, of which it may not use the last ones.

    starts: the first row of each expert, and the number of rows. size: rows of an expert if all have equally many,
    else 0. token: [rows] the token of each row, -1 for none. expert: [rows] whose row it is. rows: [tokens, k] the
    row of each token's choices.
    """

    starts: list[int]
    size: int
    token: torch.Tensor
    expert: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, chosen: torch.Tensor, experts: int) -> "Routing":
        """chosen: [tokens, k], the experts of each token."""
        flat, device = chosen.reshape(-1), chosen.device
        found = torch.bincount(flat, minlength=experts)
        counts = found.tolist()
        size = filled_up(max(counts))
        if chosen.is_cuda or size * experts > MOST_PADDING * len(flat) + ROW_MULTIPLE * experts:
            size = 0
        lengths = [size or filled_up(count) for count in counts]
        starts = [0, *accumulate(lengths)]
        expert = torch.arange(experts, device=device).repeat_interleave(
            torch.tensor(lengths, device=device), output_size=starts[-1]
        )
        if not chosen.is_cuda:
            from requant.kernels_cpu import place

            token, rows = place(chosen, starts)
            return cls(starts, size, token, expert, rows)
        order = torch.argsort(flat, stable=True)
        shift = torch.tensor(starts[:-1], device=device) - (found.cumsum(0) - found)
        sorted_rows = torch.arange(len(flat), device=device) + shift[flat[order]]
        rows = torch.empty_like(order)
        rows[order] = sorted_rows
        token = torch.full((starts[-1],), -1, device=device)
        token[sorted_rows] = order // chosen.shape[-1]
        return cls(starts, size, token, expert, rows.view_as(chosen))

    @property
    def experts(self) -> int:
        return len(self.starts) - 1

    def rows_of(self, experts: slice) -> slice:
        return slice(self.starts[experts.start], self.starts[experts.stop])

    def ends_of(self, experts: slice) -> torch.Tensor:
        """int32: where the rows of each of `experts` end, counted from the first row of all of them."""
        start = self.starts[experts.start]
        ends = [end - start for end in self.starts[experts.start + 1 : experts.stop + 1]]
        return torch.tensor(ends, dtype=torch.int32, device=self.token.device)


def filled_up(rows: int) -> int:
    """The next multiple of ROW_MULTIPLE."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
