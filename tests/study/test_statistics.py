import math

import numpy as np
import pytest
from scipy import stats

from fastlab.study.statistics import (
    Holm,
    Interval,
    Margins,
    claim_test,
    interval,
    look_share,
    more_seeds,
    t_quantile,
    t_tail,
)

NO_LEAST = 1e-9


def margins(*of: list[float], least: float = NO_LEAST, planned: int | None = None) -> Margins:
    return Margins(of, least, 2, planned)


@pytest.mark.parametrize("degrees", [1, 2, 4, 29, 1000])
def test_students_t_agrees_with_scipy(degrees):
    for t in (-3.0, 0.0, 0.1, 1.0, 2.5, 12.0, 300.0):
        assert t_tail(t, degrees) == pytest.approx(stats.t.sf(t, degrees), rel=1e-9, abs=1e-300)
    for tail in (0.5, 0.2, 0.025, 1e-7):
        expected = stats.t.isf(tail, degrees)
        assert t_quantile(tail, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-9)


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


def test_a_comparison_is_a_paired_t_test():
    a, b = np.random.default_rng(0).normal([[0.6], [0.5]], 0.05, (2, 6))
    test = claim_test(margins([*(a - b)]))
    assert test.holds and test.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    test = claim_test(margins([*(b - a)]))
    assert not test.holds and test.p == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_a_distance_from_a_limit_is_tested_on_one_side():
    values = [0.02, 0.03, 0.01]
    expected = stats.ttest_1samp(values, 0, alternative="greater").pvalue
    assert claim_test(Margins([values], NO_LEAST, 1, None)).p == pytest.approx(expected)


def test_a_claim_over_several_rows_is_as_sure_as_its_weakest_comparison():
    strong, weak, below = [0.3, 0.31, 0.29], [0.01, 0.03, -0.01], [-0.3, -0.31, -0.29]
    test = claim_test(margins(strong, weak))
    assert test.holds and test.p == pytest.approx(stats.ttest_1samp(weak, 0).pvalue)
    test = claim_test(margins(strong, weak, below))
    # One of three comparisons speaks against it: Bonferroni.
    assert not test.holds and test.p == pytest.approx(3 * stats.ttest_1samp(below, 0).pvalue)


def test_seeds_that_agree_to_the_image_are_not_infinitely_certain():
    image = 1 / 500
    test = claim_test(margins([image, image], least=image / math.sqrt(6)))
    assert test.holds and 0.1 < test.p < 0.5
    assert claim_test(margins([0.0, 0.0, 0.0], least=image / math.sqrt(6))).p == 1


def test_holm_agrees_with_its_steps_by_hand():
    ps = [0.01, 0.04, 0.03, 0.005]
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, and never less than the one before
    holm = Holm(ps)
    assert [holm.corrected(p, p) for p in ps] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert Holm([0.6, 0.9]).corrected(0.6, 0.6) == 1


@pytest.mark.parametrize(("effect", "claims"), [(0.5, 1), (1.0, 1), (1.0, 5), (2.0, 18)])
def test_the_number_of_seeds_gives_the_power_of_the_noncentral_t(effect, claims):
    values = [effect - math.sqrt(0.5), effect + math.sqrt(0.5)]  # of standard deviation 1
    more = more_seeds(margins(values), claims)
    assert more is not None

    def power(seeds: int) -> float:
        critical = stats.t.isf(0.025 / claims, seeds - 1)
        return stats.nct.sf(critical, seeds - 1, effect * math.sqrt(seeds))

    assert power(2 + more) > 0.77 and power(2 + more - 2) < 0.8


def test_no_number_of_seeds_decides_what_has_no_effect():
    assert more_seeds(margins([0.1, -0.1]), 1) is None


def test_looks_spend_no_more_than_the_level():
    assert sum(look_share(seeds, 3) for seeds in range(3, 10_000)) == pytest.approx(1, abs=1e-3)
    assert look_share(2, 1) == look_share(2, 2) == 0.5


def test_a_decision_once_taken_stays():
    values = [0.3, 0.31, 0.29, 0.3, -0.2, 0.2]
    first = claim_test(margins(values[:4], planned=4))
    assert first.p == pytest.approx(2 * stats.ttest_1samp(values[:4], 0).pvalue)
    assert claim_test(margins(values, planned=4)) == first
