"""Tests over seeds by Student's t: intervals of means, p values of claims, and their correction."""

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fastlab.report.page import number_text

LEVEL = 0.05
"""The chance of any false decision among the claims of a command."""
_POWER = 0.8
_MOST_SEEDS = 100  # beyond these, no number of seeds is given as what would decide


def t_tail(t: float, degrees: int) -> float:
    """P(T > t) of Student's t with `degrees` degrees of freedom, from 1."""
    if t < 0:
        return 1 - t_tail(-t, degrees)
    return _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5) / 2


@lru_cache(4096)
def t_quantile(tail: float, degrees: int) -> float:
    """The t with P(T > t) = `tail`, above 0 and at most 0.5, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, degrees) > tail:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > tail else (low, middle)
    return high


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by the continued fraction 8.17.22 of the
    NIST Digital Library of Mathematical Functions, evaluated forwards by Lentz's method."""
    if x in (0, 1):
        return x
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - math.log(a)
    front = math.exp(log_front + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction, m, change = d, 0, 0.0
    while abs(change - 1) > 1e-15 and m < 1000:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for numerator in (even, odd):
            d, c = 1 / (1 + numerator * d), 1 + numerator / c
            change *= c * d
        fraction *= change
    return front * fraction


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval."""

    mean: float
    half: float | None
    """Half of the interval's width; None for a single seed."""

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0)

    def text(self, scale: float = 1, decimals: int = 2) -> str:
        mean = number_text(scale * self.mean, decimals)
        return mean if self.half is None else f"{mean} ± {number_text(scale * self.half, decimals)}"


def interval(values: Sequence[float | None], least: float = 0.0) -> Interval | None:
    """The interval of the mean of `values`, one for each seed, whose standard deviation is at
    least `least`. None without values, or where one of them is None, for not a number: the mean of
    the others would hide it."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    if len(numbers) == 1:
        return Interval(numbers[0], None)
    mean, error = _mean_and_error(numbers, least)
    return Interval(mean, t_quantile(0.025, len(numbers) - 1) * error)


# Claims


@dataclass(frozen=True)
class Margins:
    """By how much each comparison of a claim speaks for it, seed by seed."""

    of: Sequence[Sequence[float]]
    """[comparisons, seeds], the planned seeds first; positive speaks for the claim, which needs
    every comparison to be positive."""
    least: float
    """A lower bound of their standard deviation, above 0: they are differences of counted images,
    whose rounding hides a smaller spread. Few equal margins would else be infinitely certain."""
    sides: int
    """2: a comparison may be without any effect, which a decision either way would miss. 1: the
    margins are distances from a limit, of which one side is true."""
    planned: int | None
    """The number of seeds at the first look, where seeds were added after looks at the results;
    None: all seeds were planned."""

    @property
    def seeds(self) -> int:
        return len(self.of[0])

    @property
    def against(self) -> list[Sequence[float]]:
        return [margins for margins in self.of if statistics.fmean(margins) < 0]


@dataclass(frozen=True)
class Tested:
    """A claim after its test, before the correction for other claims."""

    holds: bool
    """The direction: whether the seeds speak for the claim."""
    p: float
    each: list[float]
    """The p of each comparison. The claim's p is the largest of them where all speak for it, else
    the smallest of those that speak against it."""


def claim_test(margins: Margins) -> Tested:
    """Test a claim by one-sample t tests of its margins, in both directions.

    That it holds is an intersection-union test (Berger 1982): every comparison must be significant
    by itself. That it does not is the smallest p times the number of comparisons (Bonferroni).
    Where seeds were added one by one, look k tests at 1 / (k (k + 1)) of the level, which adds up
    to the whole however many looks there are; the look with the most evidence counts. So p stays
    valid whenever, and for whatever reason, the seeds end (Johari et al. 2022, always valid p
    values), and a decision once taken stays.
    """
    if margins.planned is None:
        return _one_look(margins, margins.seeds, 1)
    first = max(2, margins.planned)
    looks = [
        _one_look(margins, seeds, look_share(seeds, margins.planned))
        for seeds in range(first, margins.seeds + 1)
    ]
    return min(looks, key=lambda tested: tested.p)


def look_share(seeds: int, planned: int) -> float:
    """The share of the level that the look after `seeds` seeds spends."""
    look = seeds - max(2, planned) + 1
    return 1 / (look * (look + 1))


def _one_look(margins: Margins, seeds: int, share: float) -> Tested:
    each, against = [], []
    for values in margins.of:
        mean, error = _mean_and_error(values[:seeds], margins.least)
        p = margins.sides * t_tail(abs(mean) / error, seeds - 1) / share
        each.append(min(1.0, p if mean >= 0 else p * len(margins.of)))
        if mean < 0:
            against.append(each[-1])
    return Tested(not against, min(against) if against else max(each), each)


def _mean_and_error(values: Sequence[float], least: float) -> tuple[float, float]:
    count, mean = len(values), statistics.fmean(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, max(spread, least) / math.sqrt(count)


class Holm:
    """Holm's correction (1979) for the p values of several claims."""

    def __init__(self, ps: Sequence[float]) -> None:
        self.ps = sorted(ps)

    def corrected(self, p: float, claim: float) -> float:
        """`p` of a comparison, corrected as its claim is, whose uncorrected p is `claim`."""
        smaller = [other for other in self.ps if other < claim]
        steps = [(len(self.ps) - i) * other for i, other in enumerate(smaller)]
        return min(1.0, max([*steps, (len(self.ps) - len(smaller)) * p]))


def more_seeds(margins: Margins, claims: int) -> int | None:
    """How many more seeds would decide a claim with 80 % power, were its means and deviations the
    true ones, at the level divided by `claims`. None where 100 seeds would not do.

    The smallest n with d √n / s at least t(1 - tail) + t(0.8), both of n - 1 degrees of freedom:
    the sample size of a one-sample t test with t in the place of its noncentral distribution
    (Chow, Shao, Wang, Sample Size Calculations in Clinical Research, 3.1).
    """
    tail = LEVEL / margins.sides / claims
    if margins.against:
        needed = [_seeds_needed(m, margins, tail / len(margins.of)) for m in margins.against]
        return min((n for n in needed if n), default=None)
    needed = [_seeds_needed(m, margins, tail) for m in margins.of]
    return None if None in needed else max(n for n in needed if n)


def _seeds_needed(values: Sequence[float], margins: Margins, tail: float) -> int | None:
    mean, error = _mean_and_error(values, margins.least)

    def decide(seeds: int) -> bool:
        t = abs(mean) / error * math.sqrt(seeds / len(values))
        share = look_share(seeds, margins.planned) if margins.planned is not None else 1
        return t_tail(t - t_quantile(1 - _POWER, seeds - 1), seeds - 1) <= tail * share

    numbers = range(len(values) + 1, _MOST_SEEDS + 1)
    index = bisect.bisect_left(numbers, True, key=decide)
    return numbers[index] - len(values) if index < len(numbers) else None
