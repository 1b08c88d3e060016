"""What it takes to hand a batch over from a worker: pickling, shared memory, and back."""

import itertools
import time
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from fastlab.usercode import blamed

_FEWEST = 4  # batches


class _Held(Dataset):
    """The same batch again and again, in new memory, as a worker makes it."""

    def __init__(self, batch: Any) -> None:
        self._batch = tree_map_only(torch.Tensor, torch.Tensor.cpu, batch)

    def __getitem__(self, index: int) -> Any:
        return tree_map_only(torch.Tensor, torch.clone, self._batch)


def hand_over_seconds(loader: DataLoader, batch: Any, limit: float, seconds: float) -> float:
    """Seconds in which one worker hands over a held `batch`, within about `seconds`."""
    replay = DataLoader(
        _Held(batch),
        batch_size=None,
        sampler=itertools.repeat(0),
        num_workers=1,
        multiprocessing_context=loader.multiprocessing_context,
    )
    with blamed("replaying a batch", limit):
        batches = iter(replay)
        next(batches)
        started, count = time.perf_counter(), 0
        while count < _FEWEST or time.perf_counter() - started < seconds:
            next(batches)
            count += 1
        return (time.perf_counter() - started) / count
