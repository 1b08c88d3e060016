"""What this device can do at best, measured: the denominators of every share.

python -m benchmarks.ceilings
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measurements import Record, Session, save, session
from fastlab.cli import run_command

_LONGEST = 5.0  # seconds for one ceiling


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    units = {"matmul": "FLOP/s"}
    found = [
        Record(name, units.get(name.partition("_")[0], "bytes/s"), [value])
        for name, value in measure(default_device()).items()
    ]
    made = session("ceilings", found)
    print(table(made))
    if args.out:
        save(made, args.out)


def table(found: Session) -> str:
    """Markdown: a row a ceiling."""
    lines = ["| ceiling | measured |", "| --- | --- |"]
    lines += [f"| {r.case} | {r.median / 1e12:.4g} T{r.unit} |" for r in found.records]
    return "\n".join(lines)


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
    """Median time of one call, over `rounds` of five; of fewer where that takes seconds, as bf16
    does on a CPU without instructions for it."""
    started = time.perf_counter()
    work()
    wait(device)
    calls = 5 if time.perf_counter() - started < 0.1 else 1
    deadline = started + _LONGEST
    found: list[float] = []
    while len(found) < rounds and not (found and time.perf_counter() > deadline):
        started = time.perf_counter()
        for _ in range(calls):
            work()
        wait(device)
        found.append((time.perf_counter() - started) / calls)
    return statistics.median(found)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
