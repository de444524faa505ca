"""Intervals of what is measured: proportions, means, differences and ratios of paired rows, calibration; pure numbers.

An estimate is {"value", "n", "ci": [low, high]}, at 95%. Where values are resampled, the interval runs from the 2.5th to the 97.5th
percentile of DRAWS resamples, reproducibly by `seed` (the percentile bootstrap: Efron and Tibshirani 1993, chapter 13). Values that are
all equal give an interval without width: n says how far to trust it.
"""

import math
from collections.abc import Callable, Sequence

from .errors import DataError

Z_95 = 1.959963984540054
DRAWS = 2000
PERCENTILES = (2.5, 97.5)
VALUES_AT_ONCE = 1 << 16  # half a MiB an array, which stays in the processor's cache


def wilson(right: int, n: int) -> dict:
    """A proportion with its Wilson score interval at 95%: {"value", "n", "ci": [low, high]}.

    right  successes, 0 to n;  n  trials, at least 1
    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if not 0 <= right <= n or n < 1:
        raise DataError(f"A share of {right} in {n} has no interval.")
    share, spread = right / n, Z_95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    low, high = (middle - half if right else 0.0), (middle + half if right < n else 1.0)  # which rounding would miss by a hair
    return {"value": share, "n": n, "ci": [max(0.0, low), min(1.0, high)]}


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> dict:
    """The mean of at least one finite number, as an estimate. Raises DataError for none, or one that is not finite."""
    values = _numbers(values)
    return _estimate(*_bootstrap(_mean_of(values), values, seed=seed), len(values))


def paired_difference(after: Sequence[float], before: Sequence[float], seed: int = 0) -> dict:
    """The mean of after − before over the same rows, as an estimate with "p".

    p  two-sided, from the same resamples as the interval: twice the smaller share of them that lies on one side of 0, counting the data
       themselves as one, so that it is never 0; 1.0 where all differences are 0
    Raises DataError as `bootstrap_mean`; ValueError where there are not as many on both sides.
    """
    after, before = _pairs(after, before).T
    differences = after - before
    value, draws = _bootstrap(_mean_of(differences), differences, seed=seed)
    beyond = int(min((draws <= 0).sum(), (draws >= 0).sum()))
    return {**_estimate(value, draws, len(differences)), "p": min(1.0, 2 * (beyond + 1) / (DRAWS + 1))}


def retained(student: Sequence[float], teacher: Sequence[float], seed: int = 0) -> dict:
    """What a student keeps of its teacher: the ratio of their means over the same rows, as an estimate.

    student, teacher  a score each row, 0 or above, in the same order
    Value and interval are None where the teacher's mean is 0. Resamples in which it is 0 have no ratio and are left out.
    Raises DataError as `bootstrap_mean`; ValueError where there are not as many on both sides.
    """
    student, teacher = _pairs(student, teacher).T
    mean_student, mean_teacher = _mean_of(student), _mean_of(teacher)
    values, draws = _bootstrap(lambda one, other: (mean_student(one), mean_teacher(other)), student, teacher, seed=seed)
    return _ratio(values, draws, len(student))


def ratio_of_means(a: Sequence[float], b: Sequence[float], seed: int = 0) -> dict:
    """The ratio of the means of two samples that are not paired (speeds, say), as an estimate; n is that of the smaller one.

    Each is resampled by itself. Value and interval are None where the mean of b is 0. Raises DataError as `bootstrap_mean`.
    """
    a, b = _numbers(a), _numbers(b)
    both = [_bootstrap(_mean_of(each), each, seed=[seed, number]) for number, each in enumerate((a, b))]
    return _ratio(*zip(*both, strict=True), min(len(a), len(b)))


def mcnemar(after: Sequence, before: Sequence) -> dict:
    """McNemar's exact test of right and wrong before and after: {"gained", "lost", "p"}; p is 1.0 where nothing changed.

    after, before  0 or 1 each row, in the same order
    Source: McNemar 1947, doi:10.1007/BF02295996; exact, by the binomial distribution.
    """
    from scipy.stats import binomtest

    pairs = list(zip(map(bool, after), map(bool, before), strict=True))
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    return {"gained": gained, "lost": lost, "p": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0}


def calibration(confidences: Sequence[float], right: Sequence, bins: int = 10) -> dict:
    """How far a model's confidence is what it gets right: {"ece", "n", "ci", "bins": [{"low", "high", "n", "confidence", "accuracy"}]}.

    confidences  probabilities, 0 to 1;  right  0 or 1 each, in the same order
    Bins are equally wide; one holds its lower bound, the last one 1 as well; empty ones are left out. "ece" is the expected calibration
    error (Guo et al. 2017, arXiv:1706.04599). It comes out too large of few rows, and larger still of resamples: the interval lies about
    the ece itself, without what resampling adds.
    """
    import numpy as np

    confidences, right = _pairs(confidences, right).T
    if not ((confidences >= 0) & (confidences <= 1)).all():
        raise DataError(f"A confidence lies between 0 and 1, and these reach from {confidences.min():g} to {confidences.max():g}.")

    def ece(confidences, right):
        numbers = _bin_numbers(confidences, bins)
        gaps = [np.abs(np.where(numbers == number, right - confidences, 0).sum(axis=1)) for number in range(bins)]
        return np.sum(gaps, axis=0) / confidences.shape[1]

    value, draws = _bootstrap(ece, confidences, right, seed=0)
    estimate = _estimate(value, np.clip(draws + (value - np.median(draws)), 0, 1), len(right))
    return {"ece": estimate["value"], "n": len(right), "ci": estimate["ci"], "bins": _bins(confidences, right, bins)}


def quantiles(values: Sequence[float], shares: Sequence[float] = (0.5, 0.95), seed: int = 0) -> dict:
    """Quantiles, each as an estimate: {"p50": …, "p95": …}.

    shares  each from 0 to 1
    No interval reaches beyond the smallest and the largest value: fewer than some 70 cannot tell how far up a p95 may lie.
    """
    import numpy as np

    values = _numbers(values)
    found, draws = _bootstrap(lambda rows: np.quantile(rows, shares, axis=1), values, seed=seed)
    return {f"p{100 * share:g}": _estimate(found[place], draws[place], len(values)) for place, share in enumerate(shares)}


def _numbers(values: Sequence[float]):
    import numpy as np

    numbers = np.asarray([float(value) for value in values])
    if not len(numbers):
        raise DataError("No values were measured, so they have no mean: ask at least one question.")
    if len(wrong := np.flatnonzero(~np.isfinite(numbers))):
        raise DataError(
            f"A measured value is no finite number: number {wrong[0]} of {len(numbers)} is {numbers[wrong[0]]}. "
            "Weights that are not finite give such values: train that model anew with a lower learning_rate."
        )
    return numbers


def _pairs(one: Sequence[float], other: Sequence[float]):
    """Two columns of numbers, (n, 2)."""
    import numpy as np

    if len(one) != len(other):
        raise ValueError(f"{len(one)} rows cannot be paired with {len(other)}")
    return np.stack([_numbers(one), _numbers(other)], axis=1)


def _mean_of(values) -> Callable:
    """The mean of each row of an array that holds some of `values`: exact where all are equal, which a plain sum is not."""
    smallest = values.min()
    return lambda rows: smallest + (rows - smallest).mean(axis=1)


def _bootstrap(statistic: Callable, *columns, seed) -> tuple:
    """A statistic of paired columns (n,) and of DRAWS resamples of their rows: (value, draws), the draws along the last axis.

    statistic  takes an array (draws, n) for each column, returns one value a draw, or several arrays of them
    """
    import numpy as np

    rng, n = np.random.default_rng(seed), len(columns[0])
    at_once, made = max(1, VALUES_AT_ONCE // n), []
    for start in range(0, DRAWS, at_once):
        rows = rng.integers(n, size=(min(at_once, DRAWS - start), n))
        made.append(np.asarray(statistic(*(column[rows] for column in columns))))
    return np.asarray(statistic(*(column[None] for column in columns)))[..., 0], np.concatenate(made, axis=-1)


def _estimate(value, draws, n: int) -> dict:
    import numpy as np

    return {"value": float(value), "n": n, "ci": [float(bound) for bound in np.percentile(draws, PERCENTILES)]}


def _ratio(values, draws, n: int) -> dict:
    """The estimate of a ratio from (above, below) and its draws."""
    (above, below), (above_draws, below_draws) = values, draws
    if below == 0:
        return {"value": None, "n": n, "ci": None}
    some = below_draws != 0
    return _estimate(above / below, above_draws[some] / below_draws[some], n)


def _bin_numbers(confidences, bins: int):
    import numpy as np

    return np.minimum((confidences * bins).astype(int), bins - 1)


def _bins(confidences, right, bins: int) -> list[dict]:
    numbers, found = _bin_numbers(confidences, bins), []
    for number in sorted(set(numbers.tolist())):
        inside = numbers == number
        means = {"confidence": float(confidences[inside].mean()), "accuracy": float(right[inside].mean())}
        found.append({"low": number / bins, "high": (number + 1) / bins, "n": int(inside.sum()), **means})
    return found
