"""Batches on their way from the host to a GPU, copied while earlier ones are used there."""

from collections import deque
from collections.abc import Generator, Iterable, Sequence

import torch

_AHEAD = 2  # batches whose copies are under way or done before they are asked for


def uploaded(
    batches: Iterable[Sequence[torch.Tensor]], device: torch.device
) -> Generator[list[torch.Tensor]]:
    """For each batch, whose parts lie in pinned memory, copies of its parts on `device`.

    They are made on a stream of their own, for which the stream that is current when a batch is
    asked for waits. Torch reuses neither the pinned memory before the copy is done, nor that of
    the copies before what that stream did with them is done.
    """
    copying = torch.cuda.Stream(device)
    waiting: deque[tuple[list[torch.Tensor], torch.cuda.Event]] = deque()
    for batch in batches:
        with torch.cuda.stream(copying):
            copies = [part.to(device, non_blocking=True) for part in batch]
            waiting.append((copies, copying.record_event()))
        if len(waiting) > _AHEAD:
            yield _taken(*waiting.popleft())
    while waiting:
        yield _taken(*waiting.popleft())


def _taken(copies: list[torch.Tensor], done: torch.cuda.Event) -> list[torch.Tensor]:
    """`copies`, for use on the current stream."""
    current = torch.cuda.current_stream(copies[0].device)
    current.wait_event(done)
    for copy in copies:
        copy.record_stream(current)
    return copies
