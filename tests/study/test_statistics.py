import math

import pytest

from fastlab.study.statistics import Interval, interval, student_t


def t_probability(t: float, degrees: int, steps: int = 4000) -> float:
    """P(|T| < t) by Simpson's rule on the density of Student's t."""
    scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = math.exp(scale) / math.sqrt(degrees * math.pi)
    h = t / steps
    values = [
        scale * (1 + (i * h) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps + 1)
    ]
    return 2 * h / 3 * (values[0] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]) + values[-1])


@pytest.mark.parametrize("degrees", [*range(1, 36), 60, 120, 1000])
def test_quantiles_hold_95_percent(degrees):
    assert t_probability(student_t(degrees), degrees) == pytest.approx(0.95, abs=1e-5)


def test_an_interval_agrees_with_one_computed_by_hand():
    computed = interval([1.0, 2.0, 3.0])
    # deviation 1, t of two degrees of freedom 4.3027, divided by the root of 3
    assert computed is not None and computed.half is not None
    assert computed.mean == 2 and computed.half == pytest.approx(2.48416, abs=1e-4)
    assert computed.text() == "2.00 ± 2.48"


def test_a_single_seed_has_a_mean_without_an_interval():
    assert interval([0.25]) == Interval(0.25, None)
    assert Interval(0.25, None).text(100) == "25.00"


def test_no_seed_or_a_diverged_one_leaves_no_mean():
    assert interval([]) is None
    assert interval([1.0, None]) is None, "a diverged seed must not vanish in a mean"
