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
from fastlab.bottleneck.target import blamed

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
    rounds, ends = Rounds(), time.perf_counter() + seconds
    share = seconds / (ROUNDS + 1) / (3 if step else 1)
    run = _Runner(feed, step, limit, share)
    while len(rounds.alone) < _FEWEST or (
        len(rounds.alone) < ROUNDS and time.perf_counter() < ends
    ):
        run.both(rounds.both)  # first: it leaves no more batches ready than the loader can make
        run.alone(rounds.alone)
        run.step(rounds.step)
    return rounds


class _Runner:
    """The three measurements. Each adds one round to the list that it is given."""

    def __init__(
        self, feed: Feed, step: Callable[[Any], Any] | None, limit: float, seconds: float
    ) -> None:
        """Warms everything up, and learns how many batches take about `seconds`."""
        self._feed, self._step, self._limit, self._seconds = feed, step, limit, seconds
        self._wait = 0.0  # seconds per batch of the loader alone, as last measured
        self._pace: dict[str, float] = {}
        for name, work in self._works().items():
            self._pace[name] = _calibrated(work, self._outside, seconds / 2)
        self._wait = self._pace["alone"]

    def alone(self, into: list[float]) -> None:
        self._feed.drain(self._wait / 2)
        into.append(self._timed("alone"))
        self._wait = into[-1]

    def step(self, into: list[float]) -> None:
        if self._step:
            into.append(self._timed("step"))

    def both(self, into: list[float]) -> None:
        if self._step:
            self._feed.drain(self._wait / 2)
            into.append(self._timed("both"))

    def _works(self) -> dict[str, Callable[[], None]]:
        works: dict[str, Callable[[], None]] = {"alone": self._take}
        if self._step:
            works |= {"step": lambda: self._stepped(self._feed.held), "both": self._take_and_step}
        return works

    def _take(self) -> None:
        self._feed.next()

    def _take_and_step(self) -> None:
        self._stepped(self._feed.next())

    def _stepped(self, batch: Any) -> None:
        with blamed("the step", self._limit):
            self._step(batch)  # ty: ignore[call-non-callable]

    def _outside(self) -> float:
        return self._feed.outside

    def _timed(self, name: str) -> float:
        """Seconds per batch over about `_seconds`. The number of batches is fixed beforehand, as a
        GPU's queue would take many more than it can do in time; it is a multiple of the number of
        workers, whose batches come at once."""
        burst = max(1, self._feed.workers) if name != "step" else 1
        count = max(1, round(self._seconds / self._pace[name] / burst)) * burst
        work = self._works()[name]
        synchronise()
        started, outside, done = time.perf_counter(), self._feed.outside, 0
        while done < count and (done < burst or time.perf_counter() - started < 2 * self._seconds):
            work()
            done += 1
        synchronise()
        passed = time.perf_counter() - started - (self._feed.outside - outside)
        self._pace[name] = passed / done
        return passed / done


def _calibrated(work: Callable[[], None], outside: Callable[[], float], seconds: float) -> float:
    """Seconds per call, roughly, after a first one that may compile and allocate."""
    work()
    synchronise()
    started, before, calls = time.perf_counter(), outside(), 0
    while not calls or time.perf_counter() - started < seconds:
        work()
        synchronise()
        calls += 1
    return max(1e-7, time.perf_counter() - started - (outside() - before)) / calls
