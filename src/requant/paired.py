"""Two models on the same rows: whether they differ, and how much of one's score the other keeps.

A row's result is a pair (hits, weight): (1, 1) for a right answer, (2, 3) for two of three instructions followed. A
score is the sum of hits over the sum of weights.
"""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from requant.records import PairedTest

if TYPE_CHECKING:
    import numpy as np

Rows = Sequence[tuple[float, float]]
RESAMPLES = 10_000
SEED = 0
Z95 = 1.959964  # half-width of a 95 % interval in standard errors
MCNEMAR = "McNemar, exact binomial"
BOOTSTRAP = f"paired bootstrap over rows, {RESAMPLES} resamples"
DELTA = "delta method, as if the two scores were independent"
CITED = "of the release alone: the cited score is taken as exact"
_CHUNK = 2**24  # row numbers drawn at once


def of_row(results: list[Any]) -> tuple[float, float]:
    """(hits, weight) of a row from its result in each repeat: a number, or a list of hits, then of that weight."""
    lists = [result if isinstance(result, list | tuple) else [result] for result in results]
    return (statistics.fmean(sum(map(float, found)) for found in lists), statistics.fmean(map(len, lists)))


def score(rows: Rows) -> float:
    """Sum of hits over sum of weights."""
    return math.fsum(hits for hits, _ in rows) / math.fsum(weight for _, weight in rows)


def standard_error(rows: Rows) -> float | None:
    """Of `score`, over independent rows: for weights of 1 that of a mean. None for a single row.

    Ratio estimator (Cochran, Sampling Techniques, 6.4): sum((h - r w)^2) / (n (n - 1) mean(w)^2).
    """
    if len(rows) < 2:
        return None
    ratio, weights = score(rows), math.fsum(weight for _, weight in rows)
    squares = math.fsum((hits - ratio * weight) ** 2 for hits, weight in rows)
    return math.sqrt(squares / (1 - 1 / len(rows))) / weights


def compare(release: Rows, source: Rows, higher_is_better: bool = True) -> PairedTest:
    """McNemar's exact test where each row is right or wrong; else a paired bootstrap of the difference."""
    sign = 1 if higher_is_better else -1
    differences = [sign * (a / w - b / v) for (a, w), (b, v) in zip(release, source, strict=True)]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    binary = all(pair in ((0, 1), (1, 1)) for pair in (*release, *source))
    p_value = mcnemar(better, worse) if binary else bootstrap_p(release, source)
    name = MCNEMAR if binary else BOOTSTRAP
    return PairedTest(test=name, rows=len(differences), better=better, worse=worse, p_value=p_value)


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p of McNemar's test: the rows that differ are heads or tails of a fair coin."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def bootstrap_p(release: Rows, source: Rows) -> float:
    """Two-sided p of no difference between the scores: how often resampled differences reach zero, twice."""
    if list(release) == list(source):
        return 1.0
    ours, theirs = _resampled(release, source)
    differences = ours - theirs
    beyond = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1))


def recovery_interval(release: Rows, source: Rows, higher_is_better: bool = True) -> tuple[float, float] | None:
    """95 % of the recovery by paired bootstrap; None if a resample of the divisor scores 0."""
    import numpy as np

    ours, theirs = _resampled(release, source)
    part, whole = (ours, theirs) if higher_is_better else (theirs, ours)
    if not (whole > 0).all():
        return None
    low, high = np.quantile(part / whole, [0.025, 0.975])
    return float(low), float(high)


def independent_interval(
    recovery: float, score: float, stderr: float | None, source: float, source_stderr: float | None
) -> tuple[float, float] | None:
    """95 % of a ratio of two scores by the delta method; None without the first one's standard error."""
    if stderr is None or not score or not source:
        return None
    spread = recovery * math.hypot(stderr / score, (source_stderr or 0.0) / source)
    return recovery - Z95 * spread, recovery + Z95 * spread


def _resampled(release: Rows, source: Rows) -> "tuple[np.ndarray, np.ndarray]":
    """(scores [RESAMPLES] of the release, of the source) on rows drawn with replacement, the same for both."""
    import numpy as np

    rows = np.array([release, source], dtype=np.float64)  # [2, n, 2]
    count = rows.shape[1]
    draw = np.random.default_rng(SEED)
    parts = []
    step = max(1, _CHUNK // count)
    for start in range(0, RESAMPLES, step):
        chosen = draw.integers(0, count, size=(min(step, RESAMPLES - start), count))
        parts.append([rows[side, :, 0][chosen].sum(1) / rows[side, :, 1][chosen].sum(1) for side in (0, 1)])
    ours, theirs = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    return ours, theirs
