"""A user's loader as batches without end, with the cost of beginning an epoch kept apart."""

import math
import multiprocessing
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from fastlab.console import UserError
from fastlab.usercode import blamed

_DEEPEST = 64  # batches that a loader may have made ahead and that `drain` discards


@contextmanager
def processes_ended() -> Generator[None]:
    """At the end of the block, kill the processes that were started in it and would keep Python
    from ending; daemonic ones end with it."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for child in set(multiprocessing.active_children()) - before:
            if not child.daemon:
                child.kill()
                child.join()


def own_loader(loader: Any) -> DataLoader | None:
    """The DataLoader that makes the batches, also within Accelerate's; None for other iterables."""
    inner = getattr(loader, "base_dataloader", loader)
    return inner if isinstance(inner, DataLoader) else None


def open_loader(found: Any, name: str, limit: float) -> tuple[Any, Callable[[], Any] | None]:
    """The loader, and the function that makes another one; None: `found` is the loader itself.

    Raises `UserError` where `found` is neither a loader nor a function that returns one.
    """
    if isinstance(found, Iterable):
        return found, None
    if not callable(found):
        kind = type(found).__name__
        raise UserError(f"{name}: is an object of {kind}; name a function that returns the loader")
    with blamed(f"{name}()", limit):
        loader = found()
    if not (isinstance(loader, Iterable) or hasattr(loader, "__getitem__")):
        raise UserError(
            f"{name}() returned an object of {type(loader).__name__}; expected a loader"
        )
    return loader, found


class Feed:
    """Batches of one epoch after the other. Closing it ends the workers."""

    def __init__(self, found: Any, name: str, limit: float) -> None:
        """`limit`: seconds that a batch may take. Raises `UserError` as `open_loader` does."""
        self.found = found
        """What the user named: the loader, or the function that makes it."""
        self.loader, self._make = open_loader(found, name, limit)
        self.name, self._limit = name, limit
        self.own = own_loader(self.loader)
        self.workers = 0 if self.own is None else self.own.num_workers
        self.length = _length(self.loader)
        """Batches of an epoch; None until it is known."""
        self.starts: list[float] = []
        """Seconds from the beginning of each epoch to its first batch."""
        self.outside = 0.0
        """Seconds of all epochs' beginnings, which no rate counts."""
        self._iterator: Iterator[Any] = iter(())
        self._given = 0
        self.held = self._begin()
        """The first batch of all."""

    def next(self) -> Any:
        """The next batch, if need be of the next epoch. Raises `UserError` where the loader raises,
        takes too long, or ends for good.

        Where the beginning of an epoch can be told apart, each worker's first batch is discarded,
        as they come at once, and the time until then is `outside`.
        """
        try:
            return self._next()
        except StopIteration:
            self.length = self._given
        started = time.perf_counter()
        batch = self._begin()
        if not self.starts_apart():
            return batch
        for _ in range(self.workers - 1):
            self._next()
        self.outside += time.perf_counter() - started
        return self._next()

    def drain(self, patience: float) -> None:
        """Discard the batches that are ready: until one takes longer than `patience` seconds."""
        for _ in range(_DEEPEST):
            started = time.perf_counter()
            self.next()
            if time.perf_counter() - started > patience:
                return

    def starts_apart(self) -> bool:
        """Whether an epoch is long enough to tell its beginning from its other batches."""
        return self.length is None or self.length > 2 * max(1, self.workers)

    def at_once(self) -> float:
        """Batches that are made at the same time, on average over an epoch: the number of workers,
        unless an epoch has fewer batches, or no multiple of it."""
        workers = max(1, self.workers)
        return self.length / math.ceil(self.length / workers) if self.length else workers

    def close(self) -> None:
        """End the iterator and its workers."""
        iterator, self._iterator = self._iterator, iter(())
        for name in ("_shutdown_workers", "close"):  # of a DataLoader's iterator; of a generator
            getattr(iterator, name, _nothing)()
        if self.own is not None:
            self.own._iterator = None  # that of persistent workers

    def _next(self) -> Any:
        with blamed(f"{self.name}: batch {self._given}", self._limit):
            batch = next(self._iterator)
        self._given += 1
        return batch

    def _begin(self) -> Any:
        """The first batch of an epoch."""
        if self._make and self._iterator is self.loader:  # an iterator can be used once
            self.loader, _ = open_loader(self._make, self.name, self._limit)
        started = time.perf_counter()
        with blamed(f"iter() of {self.name}", self._limit):
            self._iterator = iter(self.loader)
        self._given = 0
        try:
            batch = self._next()
        except StopIteration:
            raise UserError(self._empty()) from None
        self.starts.append(time.perf_counter() - started)
        return batch

    def _empty(self) -> str:
        if not self.starts:
            return f"{self.name}: the loader is empty; has its dataset fewer samples than a batch?"
        return (
            f"{self.name}: the loader ended after {self.length} batches and gives no more; name a "
            f"function that makes it anew"
        )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # an iterable of unknown length
        return None


def _nothing() -> None:
    pass
