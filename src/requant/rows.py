"""A matrix some rows at a time: to round, to code or to compare weights takes a dozen tensors of their size."""

from collections.abc import Callable, Iterator

import torch

AT_A_TIME, AT_A_TIME_ON_GPU = 2**19, 2**24  # elements


def row_parts(rows: int, columns: int, device: str | torch.device = "cpu") -> Iterator[slice]:
    """The rows of a matrix in parts of AT_A_TIME elements or fewer, at least a row each."""
    size = AT_A_TIME if torch.device(device).type == "cpu" else AT_A_TIME_ON_GPU
    step = max(1, size // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def by_rows(work: Callable[..., torch.Tensor], *matrices: torch.Tensor) -> torch.Tensor:
    """work(*matrices) of matrices with equally many rows, each row of which depends on its own alone."""
    first = matrices[0]
    parts = list(row_parts(*first.shape, first.device))
    if len(parts) < 2:
        return work(*matrices)
    return torch.cat([work(*(matrix[part] for matrix in matrices)) for part in parts])
