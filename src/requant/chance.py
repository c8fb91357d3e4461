"""What chance alone does to a proportion and to a sample, so that a verdict of few tokens says no more than it can."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ALPHA = 1e-3  # how often a right release may fail a test
Z99 = 2.326348  # one-sided 99 % of the normal distribution


def most(of: int, rate: float, alpha: float = ALPHA) -> int:
    """The most of `of` events that chance makes happen, each with probability `rate`: more come less often than in
    `alpha` of all cases (the binomial distribution's upper tail). `of` itself where that many tell nothing."""
    from scipy.stats import binom

    return min(of, int(binom.isf(alpha, of, min(rate, 1.0)))) if of else 0


def upper_bound(count: int, of: int) -> float:
    """The largest probability of an event that `count` of `of` are likely to come from, one-sided 99 %.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if of == 0:
        return 1.0
    share, square = count / of, Z99 * Z99
    centre = share + square / (2 * of)
    half = Z99 * math.sqrt(share * (1 - share) / of + square / (4 * of * of))
    return min(1.0, (centre + half) / (1 + square / of))


def apart(n: float, m: float, tests: int = 1) -> float:
    """How far the distribution functions of two samples may be apart by chance, one-sided: n and m values of one
    distribution. ALPHA is shared by `tests` of them.

    N. W. Smirnov's limit law: P(D > d) = exp(-2 d^2 n m / (n + m)).
    """
    return math.sqrt(math.log(tests / ALPHA) / 2 * (1 / n + 1 / m))


def times_larger(values: "torch.Tensor", usual: "torch.Tensor", allowed: float) -> float:
    """The largest factor f for which `values` [n] exceed f times `usual` [m] in distribution, 0 if there is none.

    That is: some value is exceeded by so much a larger share of `values` than of f times `usual` that chance
    (`allowed`, from `apart`) does not explain it.
    """
    import torch

    ordered, usual = values.sort().values, usual.sort().values
    shares = 1 - torch.arange(len(ordered), dtype=torch.float64, device=values.device) / len(ordered)  # at or above
    beyond = shares - allowed
    able = beyond > 0
    if not bool(able.any()):
        return 0.0
    # The smallest of `usual` that no more than `beyond` of them lie above.
    places = (len(usual) * (1 - beyond[able])).ceil().long().clamp(1, len(usual)) - 1
    floor = torch.finfo(usual.dtype).tiny
    return float((ordered[able] / usual[places].clamp(min=floor)).max())


def overdispersion(samples: "torch.Tensor") -> float:
    """How much more the shares of large values differ between repeats than those of independent values, which is 1.

    samples [repeats, values]: the same places measured several times. What happens to one token reaches those behind
    it, so that places are not independent of each other: a sample of n of them is worth n / overdispersion. Taken at
    the median and at 75 and 90 % of all.
    """
    import torch

    if len(samples) < 2:
        return 1.0
    samples = samples.double()
    levels = samples.flatten().quantile(torch.tensor([0.5, 0.75, 0.9], dtype=torch.float64))
    above = (samples[None] > levels[:, None, None]).double().mean(-1)  # [levels, repeats]
    mean = above.mean(1)
    expected = mean * (1 - mean) / samples.shape[1]
    return float((above.var(1) / expected.clamp(min=1e-12)).mean())
