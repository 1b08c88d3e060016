"""Events of a trace, the sets of time that they cover, and how they nest."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_ROUNDING = 0.01  # µs: a trace rounds starts and durations separately


class Event(NamedTuple):
    """A recorded operation, in microseconds on the trace's clock."""

    name: str
    start: float
    end: float
    thread: str
    args: dict[str, Any]

    @property
    def duration(self) -> float:
        return self.end - self.start


class Intervals:
    """A set of times, as disjoint intervals in order."""

    def __init__(self, intervals: Iterable[tuple[float, float]]) -> None:
        starts: list[float] = []
        ends: list[float] = []
        for start, end in sorted((start, end) for start, end in intervals if end > start):
            if ends and start <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(start)
                ends.append(end)
        self.starts, self.ends = np.array(starts), np.array(ends)

    def __iter__(self) -> Iterator[tuple[float, float]]:
        return zip(self.starts.tolist(), self.ends.tolist(), strict=True)

    def total(self) -> float:
        return float((self.ends - self.starts).sum())

    def overlap(self, start: ArrayLike, end: ArrayLike) -> np.ndarray:
        """How much of each interval from `start` to `end` lies in the set.

        `start` and `end` are numbers or float arrays of one shape; so is the result.
        """
        start, end = np.asarray(start, dtype=float), np.asarray(end, dtype=float)
        if not len(self.starts):
            return np.zeros_like(start)
        edges = np.stack([self.starts, self.ends], axis=1).ravel()
        lengths = self.ends - self.starts
        covered = np.stack([np.cumsum(lengths) - lengths, np.cumsum(lengths)], axis=1).ravel()
        return np.asarray(np.interp(end, edges, covered) - np.interp(start, edges, covered))

    def common(self, other: "Intervals") -> float:
        """The total time that both sets cover."""
        return float(self.overlap(other.starts, other.ends).sum())

    def clipped(self, low: float, high: float) -> "Intervals":
        """The part of the set from `low` to `high`."""
        return Intervals((max(start, low), min(end, high)) for start, end in self)

    def gaps(self, low: float, high: float) -> "Intervals":
        """The times from `low` to `high` that the set does not cover."""
        inside = self.clipped(low, high)
        return Intervals(
            zip([low, *inside.ends.tolist()], [*inside.starts.tolist(), high], strict=True)
        )

    def without(self, other: "Intervals") -> "Intervals":
        """The part of the set that `other` does not cover."""
        if not len(self.starts):
            return self
        low, high = self.starts[0], self.ends[-1]
        return Intervals([*self.gaps(low, high), *other]).gaps(low, high)


def covered_by(events: Iterable[Event]) -> Intervals:
    return Intervals((event.start, event.end) for event in events)


def enclosing(points: list[Event], events: Iterable[Event]) -> list[list[Event]]:
    """For each of `points`, the `events` of its thread that enclose it, outermost first."""
    ordered = _by_start(events)
    starts = np.array([event.start for event in ordered])
    ends = np.array([event.end for event in ordered])
    chains = []
    for point in points:
        begun = np.searchsorted(starts, point.start, "right")
        around = np.flatnonzero(ends[:begun] >= point.end - _ROUNDING)
        chains.append([ordered[i] for i in around if ordered[i].thread == point.thread])
    return chains


def self_times(events: Iterable[Event]) -> dict[str, list[float]]:
    """Name -> the duration of each of its events without the events nested in it, in µs."""
    ordered = _by_start(events)
    own = [event.duration for event in ordered]
    unfinished: dict[str, list[int]] = defaultdict(list)
    for index, event in enumerate(ordered):
        stack = unfinished[event.thread]
        while stack and ordered[stack[-1]].end <= event.start:
            stack.pop()
        if stack:
            own[stack[-1]] -= event.duration
        stack.append(index)
    times: dict[str, list[float]] = defaultdict(list)
    for event, time in zip(ordered, own, strict=True):
        times[event.name].append(time)
    return times


def _by_start(events: Iterable[Event]) -> list[Event]:
    """An enclosing event precedes what is nested in it."""
    return sorted(events, key=lambda event: (event.start, -event.end))
