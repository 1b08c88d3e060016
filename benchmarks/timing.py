"""Two clocks for work on a device: CUDA's events, and the host's clock around finished work."""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from fastlab.training.metrics import wait_for_device
from pipelines.base import Batch


class Seconds(NamedTuple):
    device: float
    """Between CUDA events around what the work queues."""
    host: float
    """Until Python has queued the work. On a CPU both are the host's seconds."""


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(work: Callable[[], object], device: torch.device) -> Seconds:
    """Start `work`, which may only queue kernels, on an idle device."""
    wait_for_device(device)
    if device.type == "cpu":
        seconds = _host_seconds(work)
        return Seconds(seconds, seconds)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    host = _host_seconds(work)
    end.record()
    end.synchronize()
    return Seconds(start.elapsed_time(end) / 1000, host)


def step_seconds(
    step: Callable[[Batch | None], None],
    batches: Iterable[Batch | None],
    steps: int,
    device: torch.device,
) -> float:
    """Host seconds of each of the first `steps` steps on `batches`: from an idle device to an idle
    device, with what making the batches takes."""
    wait_for_device(device)
    started = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        step(batch)
    wait_for_device(device)
    return (time.perf_counter() - started) / steps


def _host_seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
