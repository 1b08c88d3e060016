"""Reading values from a device without waiting for it."""

import torch


class DelayedRead:
    """Returns at each call the values of the call before, which have been copied by then.

    A plain read (`.item()`, `.tolist()`) waits until the device has done all that is queued, and
    leaves it idle until the host has queued more. A CPU reads with the same delay, so that a
    training takes the same path on every device.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.float64, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._pending = False

    def exchange(self, values: torch.Tensor) -> list[float]:
        """Keep `values` (float64 [size], on the device) for the next call; return those of the call
        before, or [] if there was none."""
        before = self._read() if self._pending else []
        self._host.copy_(values, non_blocking=True)
        if self._copied:
            self._copied.record()
        self._pending = True
        return before

    def forget(self) -> None:
        """Have the next call return [], as the first call does."""
        self._pending = False

    def _read(self) -> list[float]:
        if self._copied:
            self._copied.synchronize()
        return self._host.tolist()
