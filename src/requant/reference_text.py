"""The reference text: the beginning of the held-out tokens. What a model thinks of it tells which model it is.

Evaluation records the log-probability of each of its tokens; the smoke test holds the served model against them.
"""

from collections.abc import Callable

import torch

LONGEST = 512  # tokens of a row: engines with a short context read it too
RECORDED = 512  # tokens whose log-probabilities evaluate.json has


def first_rows(tokens: torch.Tensor, mask: torch.Tensor | None, count: int) -> list[list[int]]:
    """The first `count` tokens of samples [n, T], a row a sample, of LONGEST tokens at most; mask: 0 where padded.

    The rows of a smaller count are the beginning of those of a larger one, but that the last may be shorter.
    """
    rows: list[list[int]] = []
    for index, row in enumerate(tokens):
        if count <= 0:
            break
        length = len(row) if mask is None else int(mask[index].sum())
        rows.append(row[: min(length, LONGEST, count)].tolist())
        count -= len(rows[-1])
    return rows


def log_probabilities(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, rows: list[list[int]]
) -> list[list[float]]:
    """For each row the log-probability, nats, of each of its tokens but the first, given those before it.

    hidden [n, T, width]: last hidden states; n and T no smaller than those of `rows`. head: norm and output matrix.
    """
    found = []
    for states, ids in zip(hidden, rows, strict=False):
        scores = head(states[: max(len(ids) - 1, 0)]).double().log_softmax(-1)
        next_ids = torch.tensor(ids[1:], device=scores.device)
        found.append([round(value, 6) for value in scores.gather(-1, next_ids[:, None])[:, 0].tolist()])
    return found
