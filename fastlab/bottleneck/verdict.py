"""What limits, said only where the rounds agree on it."""

from statistics import median
from typing import Literal, NamedTuple

from fastlab.bottleneck.rounds import Rounds

Limit = Literal["loader", "step", "balanced", "unknown"]


class Verdict(NamedTuple):
    limit: Limit
    """"unknown": there is no step to compare with."""
    times: float
    """How many times as long the one that limits takes; 1 where nothing does."""
    gain: float
    """How many times as fast training would be with a loader that costs nothing."""
    apart: float
    """How many times as long both take together than the slower alone: 1 where they overlap."""


def judge(rounds: Rounds, start: float) -> Verdict:
    """`start`: seconds that the beginning of an epoch adds to each of its batches.

    Loader or step limits where it took longer in every round than the other in any: with five
    rounds, chance alone would do that once in 126 times, either way (the rank-sum test of Wilcoxon,
    1945). Otherwise both are within the noise.
    """
    if not rounds.step:
        return Verdict("unknown", 1.0, 1.0, 1.0)
    loader = [seconds + start for seconds in rounds.alone]
    slow, step, both = median(loader), median(rounds.step), median(rounds.both) + start
    gain, apart = both / step, both / max(slow, step)
    if min(loader) > max(rounds.step):
        return Verdict("loader", slow / step, gain, apart)
    if max(loader) < min(rounds.step):
        return Verdict("step", step / slow, gain, apart)
    return Verdict("balanced", 1.0, gain, apart)
