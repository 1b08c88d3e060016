"""Means over seeds, and their confidence intervals by Student's t."""

import math
import statistics
from dataclasses import dataclass

from fastlab.report.page import number_text

# Quantiles 0.975 of Student's t for 1 to 30 degrees of freedom.
_T975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
_Z975 = 1.959964


def student_t(degrees: int) -> float:
    """The 0.975 quantile of Student's t with `degrees` degrees of freedom, from 1; above 30 by the
    first terms of its expansion in 1/degrees (Abramowitz and Stegun, 26.7.5)."""
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z = _Z975
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


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


def interval(values: list[float | None]) -> Interval | None:
    """The interval of the mean of `values`, one for each seed. None without values, or where one of
    them is None, for not a number: the mean of the others would hide it."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    if len(numbers) == 1:
        return Interval(numbers[0], None)
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return Interval(statistics.fmean(numbers), student_t(len(numbers) - 1) * error)
