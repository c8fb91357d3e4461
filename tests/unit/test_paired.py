"""Paired tests: values that others publish and compute, and no difference where there is none."""

import math
import random
import statistics

import pytest

from requant import paired


def rows(*hits: float) -> list[tuple[float, float]]:
    return [(hit, 1) for hit in hits]


def test_mcnemar_is_the_exact_binomial_test():
    tail = sum(math.comb(22, heads) for heads in range(7))
    assert paired.mcnemar(6, 16) == pytest.approx(2 * tail / 2**22, rel=1e-12)
    assert paired.mcnemar(16, 6) == paired.mcnemar(6, 16)
    assert paired.mcnemar(0, 5) == pytest.approx(0.0625)
    assert paired.mcnemar(3, 3) == 1.0 and paired.mcnemar(0, 0) == 1.0


def test_right_or_wrong_is_compared_by_mcnemar_and_direction_counts():
    ours, theirs = rows(1, 0, 0, 0, 1, 1), rows(1, 1, 1, 1, 0, 1)
    found = paired.compare(ours, theirs)
    assert (found.test, found.rows, found.better, found.worse) == (paired.MCNEMAR, 6, 1, 3)
    assert found.p_value == pytest.approx(0.625)
    turned = paired.compare(ours, theirs, higher_is_better=False)
    assert (turned.better, turned.worse, turned.p_value) == (3, 1, found.p_value)


def test_parts_of_rows_are_compared_by_bootstrap():
    from scipy import stats

    choose = random.Random(3)
    theirs = [choose.gauss(0.5, 0.2) for _ in range(200)]
    for shift in (0.0, 0.01, 0.02):
        ours = [value - shift + choose.gauss(0, 0.1) for value in theirs]
        found = paired.compare(rows(*ours), rows(*theirs))
        assert found.test == paired.BOOTSTRAP
        assert found.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, abs=0.03)
    assert paired.compare(rows(*theirs), rows(*theirs)).p_value == 1.0
    assert paired.compare(rows(*(value + 1 for value in theirs)), rows(*theirs)).p_value < 0.001


def test_score_and_its_error_are_those_of_a_mean_where_weights_are_one():
    hits = [1, 0, 1, 1, 0, 1, 1]
    assert paired.score(rows(*hits)) == pytest.approx(5 / 7)
    assert paired.standard_error(rows(*hits)) == pytest.approx(statistics.stdev(hits) / 7**0.5)
    assert paired.standard_error(rows(1)) is None


def test_the_error_of_a_ratio_agrees_with_resampling():
    choose = random.Random(5)
    weights = choose.choices((1, 2, 3), k=150)
    pairs = [(sum(choose.random() < 0.2 + 0.2 * w for _ in range(w)), w) for w in weights]
    resampled = [paired.score(choose.choices(pairs, k=len(pairs))) for _ in range(2000)]
    assert paired.standard_error(pairs) == pytest.approx(statistics.stdev(resampled), rel=0.08)


def test_a_row_of_several_results_is_their_mean():
    assert paired.of_row([1.0]) == (1, 1)
    assert paired.of_row([True, False]) == (0.5, 1)
    assert paired.of_row([[True, False, True]]) == (2, 3)
    assert paired.of_row([[True, False], [True, True]]) == (1.5, 2)


def test_the_interval_of_a_recovery_holds_it_and_shrinks_when_rows_agree():
    choose = random.Random(1)
    theirs = [float(choose.random() < 0.7) for _ in range(400)]
    near = [hit if choose.random() < 0.97 else 1 - hit for hit in theirs]
    far = [float(choose.random() < 0.7) for _ in range(400)]
    for ours in (near, far):
        low, high = paired.recovery_interval(rows(*ours), rows(*theirs))
        assert low < sum(ours) / sum(theirs) < high
    widths = [
        high - low for low, high in (paired.recovery_interval(rows(*ours), rows(*theirs)) for ours in (near, far))
    ]
    assert widths[0] < widths[1] / 2
    assert paired.recovery_interval(rows(1, 1), rows(1, 0)) is None, "a resample of the source may score 0"


def test_the_interval_against_a_cited_score_is_the_releases_own():
    low, high = paired.independent_interval(0.9, 0.45, 0.02, 0.5, None)
    assert (low + high) / 2 == pytest.approx(0.9)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.02 / 0.5, rel=1e-4)
    wider = paired.independent_interval(0.9, 0.45, 0.02, 0.5, 0.02)
    assert wider[1] - wider[0] > high - low
    assert paired.independent_interval(0.9, 0.45, None, 0.5, None) is None
