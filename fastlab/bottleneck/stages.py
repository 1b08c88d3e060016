"""What a batch costs in each stage, in milliseconds, measured in this process."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader

from fastlab.bottleneck.feed import Feed
from fastlab.bottleneck.handover import hand_over_seconds
from fastlab.bottleneck.profile import PIN, SAMPLER, Call, Profile, costliest, shares
from fastlab.bottleneck.rounds import synchronise

START, EPOCH, TRANSFER = "worker start", "epoch start", "transfer"
HAND_OVER, CORE = "hand-over", "waiting for a core"
_COPIES = 10
_LEAST = 0.005  # share of a batch's time below which a stage is left out


class Stage(NamedTuple):
    """What a batch costs in one stage."""

    name: str
    ms: float
    """Milliseconds where it runs: in one worker, if there are workers."""
    wall: float
    """Milliseconds that it adds to each batch, as workers share the work."""
    where: str = ""
    """The function that costs most; empty where none is known."""


class Stages(NamedTuple):
    start: Stage
    """The beginning of an epoch, spread over its batches."""
    others: list[Stage]


def measure_stages(feed: Feed, alone: float, limit: float, seconds: float) -> Stages:
    """The stages of `feed.loader`, which gives a batch in `alone` seconds, within about `seconds`.

    Raises `UserError` where the loader cannot run in this process.
    """
    took, plain = _profiled(feed, limit, 0.8 * seconds)
    start = start_stage(feed, alone, plain)
    others = [
        _stage(name, 1000 * share * plain, feed.at_once(), costliest(took, name))
        for name, share in shares(took).items()
    ]
    if feed.own is not None and feed.workers:
        steady = alone - (0 if feed.starts_apart() else start.wall / 1000)
        hand_over = hand_over_seconds(feed.own, feed.held, limit, 0.2 * seconds)
        others += _of_workers(steady * feed.at_once(), plain, hand_over, feed.at_once())
    least = _LEAST * 1000 * alone
    return Stages(start, [stage for stage in others if stage.wall > least])


def _of_workers(batch: float, plain: float, hand_over: float, at_once: float) -> list[Stage]:
    """The stages of a worker beside making a batch, which takes `plain` of the `batch` seconds that
    pass for one. What remains is waiting: for this process, if a batch is handed over more slowly
    than made, or for a core."""
    rest = max(0.0, batch - plain - hand_over)
    if hand_over > plain:
        hand_over, rest = hand_over + rest, 0.0
    return [
        _stage(HAND_OVER, 1000 * hand_over, at_once),
        _stage(CORE, 1000 * rest, at_once),
    ]


def start_stage(feed: Feed, alone: float, plain: float) -> Stage:
    """What the beginning of an epoch adds to each of its batches: the time to the first one, less
    what any batch takes in a worker; `plain` seconds where the epoch is too short to show that.
    Nothing where workers persist, or the length of an epoch is unknown."""
    name = START if feed.workers else EPOCH
    if getattr(feed.loader, "persistent_workers", False) or not feed.length:
        return Stage(name, 0.0, 0.0)
    batch = alone * feed.at_once() if feed.starts_apart() else plain
    each = 1000 * max(0.0, median(feed.starts) - batch) / feed.length
    return Stage(name, each, each)


def transfer_stage(batch: Any, device: torch.device | None) -> Stage | None:
    """Copying a held batch to `device`; None where there is none, or the batch lies there."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    if device is None or all(tensor.device.type == device.type for tensor in tensors):
        return None
    ms = 1000 * median(_copy_seconds(batch, device) for _ in range(_COPIES))
    return Stage(TRANSFER, ms, ms)


def accelerator() -> torch.device | None:
    """The device to which a step would copy its batches; None on a machine with a CPU alone."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def first_array(batch: Any) -> Any:
    """The first tensor or array of a batch that is no scalar, in lists and dicts of any depth:
    its length is the number of samples. None where there is none."""
    arrays = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor | np.ndarray))
    return next((array for array in arrays if array.ndim), None)


def _stage(name: str, ms: float, at_once: float, where: str = "") -> Stage:
    alone = name in (SAMPLER, PIN)  # those two run in this process
    return Stage(name, ms, ms if alone else ms / at_once, where)


def _copy_seconds(batch: Any, device: torch.device) -> float:
    started = time.perf_counter()
    tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)
    synchronise()
    return time.perf_counter() - started


def _profiled(feed: Feed, limit: float, seconds: float) -> tuple[dict[Call, float], float]:
    """What functions took to make batches in this process; and the seconds per batch without a
    profiler. Every second batch is profiled: neither finds files cached that the other has read.
    Where an epoch began meanwhile, nothing counts."""
    profile, profiled, plain = Profile(), 0, []
    with _in_this_process(feed.own):
        ends = time.perf_counter() + seconds
        batches = Feed(feed.found if feed.own is None else feed.own, feed.name, limit)
        while not (plain and profiled) or time.perf_counter() < ends:
            outside, started = batches.outside, time.perf_counter()
            batches.next()
            if batches.outside == outside:
                plain.append(time.perf_counter() - started)
            outside, block = batches.outside, Profile()
            with block:
                batches.next()
            if batches.outside == outside:
                profile.add(block)
                profiled += 1
        batches.close()
    return profile.seconds(profiled * mean(plain)), median(plain)


@contextmanager
def _in_this_process(loader: DataLoader | None) -> Generator[None]:
    """Within the block, a DataLoader makes its batches in this process, and a function named
    `collate_fn` calls its own."""
    if loader is None:
        yield
        return
    before = {name: getattr(loader, name) for name in ("num_workers", "timeout", "collate_fn")}

    def collate_fn(samples: Any) -> Any:
        return before["collate_fn"](samples)

    loader.num_workers, loader.timeout, loader.collate_fn = 0, 0, collate_fn
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(loader, name, value)
