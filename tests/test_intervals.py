"""Intervals hold the truth as often as they say, agree with scipy where it has them, and are exact where nothing varies."""

import warnings

import numpy as np
import pytest

from distill import intervals
from distill.errors import DataError
from distill.intervals import bootstrap_mean, calibration, mcnemar, paired_difference, quantiles, ratio_of_means, retained, wilson

SETS = 1000


@pytest.mark.parametrize(("right", "n"), [(0, 200), (1, 7), (5, 10), (194, 200), (200, 200)])
def test_wilson_bounds_solve_the_score_equation(right, n):
    """Each bound b is where the observed share lies 1.96 standard errors of b away: (share - b)² = z² b (1 - b) / n."""
    score = wilson(right, n)
    assert (score["value"], score["n"]) == (right / n, n)
    low, high = score["ci"]
    assert 0 <= low < high <= 1 and low - 1e-12 <= right / n <= high + 1e-12
    for bound in (low, high):
        assert (right / n - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / n, abs=1e-9)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (3, 11), (90, 100), (1999, 2000)])
def test_wilson_agrees_with_scipy(right, n):
    from scipy.stats import binomtest

    assert wilson(right, n)["ci"] == pytest.approx(list(binomtest(right, n).proportion_ci(method="wilson")), abs=1e-12)


@pytest.mark.parametrize(("right", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(right, n):
    with pytest.raises(DataError):
        wilson(right, n)


def covered(truth: float, made) -> float:
    """Share of SETS intervals that hold the truth; `made` makes one of a set's number."""
    cis = (made(number)["ci"] for number in range(SETS))
    return sum(low <= truth <= high for low, high in cis) / SETS


def pairs(number: int, n: int, both: float, teacher: float, student: float) -> tuple:
    """Correlated teacher and student, right or wrong: shares of rows that both, only the teacher, only the student get right."""
    drawn = np.random.default_rng([1, number]).random(n)
    is_both, alone = drawn < both, drawn >= both + teacher
    return (is_both | (drawn < both + teacher)).astype(float), (is_both | (alone & (drawn < both + teacher + student))).astype(float)


@pytest.mark.parametrize(("p", "n"), [(0.5, 100), (0.8, 200), (0.9, 200), (0.95, 400)])
def test_wilson_holds_the_truth_in_95_of_100_sets(p, n):
    rights = np.random.default_rng(0).binomial(n, p, SETS).tolist()
    assert 0.93 <= covered(p, lambda number: wilson(rights[number], n)) <= 0.97


# the teacher is right in 0.90 of the rows, the student in 0.80; both in 0.75, so their answers are correlated
N, BOTH, TEACHER, STUDENT = 200, 0.75, 0.15, 0.05


def test_the_paired_difference_holds_the_truth_in_95_of_100_sets():
    sets = [pairs(number, N, BOTH, TEACHER, STUDENT) for number in range(SETS)]
    assert np.corrcoef(*np.concatenate(sets, axis=1))[0, 1] > 0.2
    assert 0.93 <= covered(STUDENT - TEACHER, lambda number: paired_difference(*sets[number][::-1], seed=number)) <= 0.97


def test_what_is_retained_holds_the_truth_in_95_of_100_sets():
    sets = [pairs(number, N, BOTH, TEACHER, STUDENT) for number in range(SETS)]
    truth = (BOTH + STUDENT) / (BOTH + TEACHER)
    assert 0.93 <= covered(truth, lambda number: retained(*sets[number][::-1], seed=number)) <= 0.97


def test_the_mean_holds_the_truth_in_95_of_100_sets():
    sets = np.random.default_rng(2).beta(4, 1, (SETS, 100))
    assert 0.93 <= covered(0.8, lambda number: bootstrap_mean(sets[number], seed=number)) <= 0.97


def test_p_is_below_5_percent_in_about_5_of_100_sets_without_a_difference():
    sets = [pairs(number, N, 0.7, 0.1, 0.1) for number in range(SETS)]
    found = sum(paired_difference(*each, seed=number)["p"] < 0.05 for number, each in enumerate(sets))
    assert 0.03 <= found / SETS <= 0.07


def test_a_model_against_itself_differs_in_nothing():
    scores = np.random.default_rng(0).random(50).tolist()
    for own in (scores, [0.0] * 9 + [1.0], [0.1] * 7):
        assert retained(own, own) == {"value": 1.0, "n": len(own), "ci": [1.0, 1.0]}
        assert paired_difference(own, own) == {"value": 0.0, "n": len(own), "ci": [0.0, 0.0], "p": 1.0}
    assert mcnemar([1, 0, 1], [1, 0, 1]) == {"gained": 0, "lost": 0, "p": 1.0}
    assert ratio_of_means([3.0, 3.0], [3.0, 3.0]) == {"value": 1.0, "n": 2, "ci": [1.0, 1.0]}


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1 / 3, 1e9])
@pytest.mark.parametrize("n", [1, 7, 200])
def test_values_that_are_all_equal_have_an_exact_interval_and_no_warning(value, n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bootstrap_mean([value] * n) == {"value": value, "n": n, "ci": [value, value]}
        assert quantiles([value] * n)["p95"] == {"value": value, "n": n, "ci": [value, value]}
        change = paired_difference([value + 1] * n, [value] * n)
        assert change["ci"] == [change["value"]] * 2
        ratio = retained([value] * n, [2.0] * n)
        assert ratio["value"] == value / 2 and ratio["ci"] == [value / 2] * 2
        assert calibration([0.3] * n, [1] * n)["ci"] == pytest.approx([0.7, 0.7])


def test_nothing_is_retained_of_a_teacher_that_gets_nothing_right():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert retained([1, 0, 1], [0, 0, 0]) == {"value": None, "n": 3, "ci": None}
        assert ratio_of_means([1, 2], [0, 0]) == {"value": None, "n": 2, "ci": None}
        low, high = retained([1, 0, 0, 0, 0], [1, 1, 0, 0, 0])["ci"]  # many resamples have no right answer of the teacher's
    assert 0 <= low <= high < float("inf")


def test_the_bootstrap_agrees_with_scipys():
    from scipy.stats import bootstrap

    values = np.random.default_rng(3).gamma(2, 1, 150)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    assert bootstrap_mean(values)["ci"] == pytest.approx(list(theirs), abs=0.02)


def test_mcnemar_counts_what_changed_and_agrees_with_the_binomial_distribution():
    after, before = [1] * 12 + [0] * 3 + [1] * 20 + [0] * 5, [0] * 12 + [1] * 3 + [1] * 20 + [0] * 5
    found = mcnemar(after, before)
    assert (found["gained"], found["lost"]) == (12, 3)
    assert found["p"] == pytest.approx(2 * (1 + 15 + 105 + 455) / 2**15)
    assert mcnemar(before, after)["p"] == found["p"]


def test_p_follows_the_interval():
    before, after = pairs(0, 400, 0.6, 0.02, 0.2)
    clear = paired_difference(after, before)
    assert clear["ci"][0] > 0 and clear["p"] == pytest.approx(2 / (intervals.DRAWS + 1))
    assert paired_difference(before, after)["value"] == pytest.approx(-clear["value"])


def test_a_ratio_of_speeds_is_that_of_the_means():
    ratio = ratio_of_means([30.0, 34.0, 32.0], [10.0, 11.0, 9.0, 10.0])
    assert ratio["value"] == pytest.approx(3.2) and ratio["n"] == 3 and ratio["ci"][0] < 3.2 < ratio["ci"][1]


def test_quantiles_are_numpys_with_intervals_about_them():
    values = np.random.default_rng(4).exponential(1, 200)
    found = quantiles(values, (0.5, 0.95))
    assert list(found) == ["p50", "p95"]
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        assert found[name]["value"] == pytest.approx(np.quantile(values, share))
        assert found[name]["ci"][0] < found[name]["value"] < found[name]["ci"][1] <= values.max()


def test_calibration_is_the_weighted_gap_of_its_bins():
    found = calibration([0.0, 0.05, 0.1, 0.95, 1.0, 1.0], [0, 1, 0, 1, 1, 0])
    assert [(one["low"], one["high"], one["n"]) for one in found["bins"]] == [(0.0, 0.1, 2), (0.1, 0.2, 1), (0.9, 1.0, 3)]
    assert [one["accuracy"] for one in found["bins"]] == pytest.approx([0.5, 0.0, 2 / 3])
    assert found["ece"] == pytest.approx((2 * (0.5 - 0.025) + 0.1 + 3 * (2.95 / 3 - 2 / 3)) / 6) and found["n"] == 6


def test_an_overconfident_model_shows_and_a_calibrated_one_is_near_0():
    rng = np.random.default_rng(5)
    confidences = rng.beta(4, 1, 1000)
    good, bad = (calibration(confidences, rng.random(1000) < confidences - gap) for gap in (0, 0.2))
    assert good["ece"] < 0.05 < 0.15 < bad["ci"][0] < bad["ece"] < bad["ci"][1]
    assert good["ci"][0] <= good["ece"] <= good["ci"][1]


def test_the_same_seed_gives_the_same_interval_and_pieces_do_not_matter(monkeypatch):
    values = np.random.default_rng(6).random(30)
    first, again, other = (bootstrap_mean(values, seed=seed) for seed in (0, 0, 1))
    assert first == again and first["ci"] != other["ci"]
    monkeypatch.setattr(intervals, "VALUES_AT_ONCE", 100)
    assert bootstrap_mean(values, seed=0) == first


def test_resampling_many_rows_takes_bounded_memory():
    import tracemalloc

    values = np.random.default_rng(7).random(2000)
    bootstrap_mean(values[:2])
    tracemalloc.start()
    try:
        bootstrap_mean(values)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # all at once, an array takes 32 MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap_mean([]), "No values were measured"),
        (lambda: bootstrap_mean([0.5, float("nan")]), "number 1 of 2 is nan"),
        (lambda: retained([1.0], [float("inf")]), "number 0 of 1 is inf"),
        (lambda: calibration([1.5], [1]), "between 0 and 1"),
    ],
)
def test_what_has_no_mean_is_refused(call, words):
    with pytest.raises(DataError, match=words):
        call()


@pytest.mark.parametrize("call", [paired_difference, retained, mcnemar, calibration])
def test_rows_that_do_not_pair_are_refused(call):
    with pytest.raises(ValueError):
        call([1, 0, 1], [1, 0])
