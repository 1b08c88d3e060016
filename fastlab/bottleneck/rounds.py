"""Loader alone, step alone and both, measured in turns so that a machine whose speed drifts changes
all three alike.

The step alone takes one held batch again and again: no faster loader can win more than that. SPDL
calls this headspace analysis (`spdl.dataloader.CacheDataLoader` replays cached batches).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlab.bottleneck.feed import Feed
from fastlab.usercode import blamed

ROUNDS = 5
_FEWEST = 3  # rounds, however slow the loader is: a spread takes so many


@dataclass
class Rounds:
    """Seconds per batch, one for each round. Without a step, `step` and `both` stay empty."""

    alone: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)


def synchronise() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure(feed: Feed, step: Callable[[Any], Any] | None, limit: float, seconds: float) -> Rounds:
    """Measure for about `seconds`; a step that takes longer than `limit` seconds is refused.

    Raises `UserError` where the loader or the step raises.
    """
    works = _works(feed, step, limit)
    run = _Runner(feed, works, limit, seconds / len(works) / (ROUNDS + 1))
    rounds, ends = Rounds(), time.perf_counter() + seconds
    while len(rounds.alone) < _FEWEST or (
        len(rounds.alone) < ROUNDS and time.perf_counter() < ends
    ):
        for name in works:
            getattr(rounds, name).append(run.seconds_per_batch(name))
    return rounds


def _works(
    feed: Feed, step: Callable[[Any], Any] | None, limit: float
) -> dict[str, Callable[[], Any]]:
    """What is measured, by its name in `Rounds`. "both" comes before "alone", and leaves it no more
    batches that are ready than the loader can make."""
    if step is None:
        return {"alone": feed.next}

    def stepped(batch: Any) -> None:
        with blamed("the step", limit):
            step(batch)

    return {
        "both": lambda: stepped(feed.next()),
        "alone": feed.next,
        "step": lambda: stepped(feed.held),
    }


class _Runner:
    """Times `works`, each over about `seconds`."""

    def __init__(
        self, feed: Feed, works: dict[str, Callable[[], Any]], limit: float, seconds: float
    ) -> None:
        """Warms everything up."""
        self._feed, self._works, self._limit, self._seconds = feed, works, limit, seconds
        self._pace = {name: self._first_pace(name) for name in works}
        self._patience = self._pace["alone"] / 2

    def seconds_per_batch(self, name: str) -> float:
        """The number of batches is fixed beforehand, as a GPU's queue would take many more than it
        can do in time; it is a multiple of `_burst`."""
        burst = self._burst(name)
        if name != "step":
            self._feed.drain(self._patience)
        count = max(1, round(self._seconds / self._pace[name] / burst)) * burst
        self._pace[name] = self._timed(self._works[name], count, burst, 2 * self._seconds)
        # Of the slowest round: a round of batches that were ready would have the next one drain
        # too little, too.
        self._patience = max(self._patience, self._pace["alone"] / 2)
        return self._pace[name]

    def _burst(self, name: str) -> int:
        """Batches that come together: one of each worker; a whole epoch where its beginning counts
        for its batches."""
        if name == "step":
            return 1
        workers = max(1, self._feed.workers)
        return workers if self._feed.starts_apart() else self._feed.length or workers

    def _first_pace(self, name: str) -> float:
        """Seconds per batch, roughly, after a first one that may compile and allocate."""
        work, burst = self._works[name], self._burst(name)
        self._timed(work, 1, 1, 0)
        pace = self._timed(work, 1, 1, 0)
        count = max(2 * burst, min(100, round(self._seconds / 2 / pace)))
        return self._timed(work, count, 2 * burst, self._seconds)

    def _timed(self, work: Callable[[], Any], count: int, fewest: int, seconds: float) -> float:
        """Seconds per call of `work`, called `count` times, or fewer where `seconds` are over."""
        self._finish()
        started, outside, done = time.perf_counter(), self._feed.outside, 0
        while done < count and (done < fewest or time.perf_counter() - started < seconds):
            work()
            done += 1
        self._finish()
        passed = time.perf_counter() - started - (self._feed.outside - outside)
        return max(passed, 1e-7) / done

    def _finish(self) -> None:
        """Wait for the GPU; only now may it report what went wrong in a step."""
        with blamed("the step", self._limit):
            synchronise()
