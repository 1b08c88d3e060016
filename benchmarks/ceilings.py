"""What this device can do at best, measured: the denominators of every share.

python -m benchmarks.ceilings
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(json.dumps(measure(default_device()), indent=1))


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(device: torch.device) -> dict[str, float]:
    """FLOP/s of matrix products in fp32 and bf16, bytes/s of copies (read and written), and, on an
    accelerator, bytes/s of copies from pinned host memory."""
    side = 8192 if device.type == "cuda" else 1024
    found = {
        f"matmul_{name}": 2 * side**3 / _seconds(_matmul(side, dtype, device), device)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    size = 1 << (30 if device.type == "cuda" else 27)
    one, other = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    found["copy"] = 2 * size / _seconds(lambda: other.copy_(one), device)
    if device.type == "cuda":
        host = torch.zeros(size, dtype=torch.uint8).pin_memory()
        seconds = _seconds(lambda: other.copy_(host, non_blocking=True), device)
        found["host_to_device"] = size / seconds
    return found


def _matmul(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _seconds(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Median time of one call."""
    work()
    wait(device)
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(5):
            work()
        wait(device)
        found.append((time.perf_counter() - started) / 5)
    return statistics.median(found)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
