"""Work on a GPU: rows of the CPU's memory brought there ahead of their use, and operations that repeat exactly."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def fed(
    device: torch.device, tensors: list[torch.Tensor], batches: Iterable[list[int]]
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """(rows, those rows of each of `tensors` on `device`) for every batch of rows.

    tensors: in the CPU's memory. On a GPU a batch is on its way while the one before it is in use: a thread copies it
    to pinned memory, from where the device takes it beside its other work.
    """
    if device.type != "cuda":
        for rows in batches:
            yield rows, [tensor[rows].to(device) for tensor in tensors]
        return
    coming, stream = iter(batches), torch.cuda.Stream(device)
    pinned: list[torch.Tensor] = []

    def bring(rows: list[int]) -> list[torch.Tensor]:
        if not pinned or len(pinned[0]) < len(rows):
            pinned[:] = [torch.empty(len(rows), *t.shape[1:], dtype=t.dtype, pin_memory=True) for t in tensors]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            found = []
            for tensor, place in zip(tensors, pinned, strict=True):
                part = torch.index_select(tensor, 0, torch.tensor(rows), out=place[: len(rows)])
                found.append(part.to(device, non_blocking=True))
        stream.synchronize()
        return found

    with ThreadPoolExecutor(1) as pool:
        rows = next(coming, None)
        brought = None if rows is None else pool.submit(bring, rows)
        while rows is not None:
            following = next(coming, None)
            found = brought.result()
            brought = None if following is None else pool.submit(bring, following)
            for tensor in found:
                tensor.record_stream(torch.cuda.current_stream(device))
            yield rows, found
            rows = following


def prepare_device(device: torch.device) -> None:
    """What has to be set before a process first multiplies matrices on a GPU, for products that repeat exactly."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def same_bytes(device: torch.device) -> Iterator[None]:
    """On a GPU, torch's operations that give the same bytes at every run; RuntimeError from one without such a form."""
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
