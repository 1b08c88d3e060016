"""What this device can do at best, measured: the denominators of every share.

    python -m benchmarks.ceilings --out FILE.json

On a GPU the time of each round is that between two CUDA events. All operands are random: a GPU
draws less power on zeros and runs faster. FLOP are 2 for a multiply-add; a copy counts what it
reads and what it writes. A convolution is 3x3, in bf16 and channels-last, forward and backward, of
the shapes that bound ResNet-11 at batch 1024 (on a CPU of one image).
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.measurements import Record, Session, save, session
from fastlab.console import run_command

_ROUNDS = 7
_ROUND = 0.05  # seconds of a round at least
_LONGEST = 5.0  # seconds for one ceiling
# Name, type and what `torch.set_float32_matmul_precision` is told: only "highest" is plain fp32.
_PRODUCTS = (
    ("matmul_fp32", torch.float32, "highest"),
    ("matmul_tf32", torch.float32, "high"),
    ("matmul_bf16", torch.bfloat16, "highest"),
)
_CONVOLUTIONS = ((64, 32), (128, 16), (256, 8))  # channels and side of ResNet-11's blocks


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    made = session("ceilings", measure_rounds(default_device()))
    print(table(made))
    if args.out:
        save(made, args.out)


def table(found: Session) -> str:
    """Markdown: a row a ceiling."""
    lines = ["| ceiling | measured |", "| --- | --- |"]
    lines += [
        f"| {r.case} | {r.median / 1e12:.4g} T{r.unit} ± {r.spread:.0%} |" for r in found.records
    ]
    return "\n".join(lines)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(device: torch.device) -> dict[str, float]:
    """The median of each ceiling by its name, FLOP/s or bytes/s."""
    return {record.case: record.median for record in measure_rounds(device)}


def measure_rounds(device: torch.device) -> list[Record]:
    """FLOP/s of matrix products in fp32 (on an accelerator as TF32 too) and bf16 and of
    convolutions in bf16, bytes/s of copies (read and written), and, on an accelerator, bytes/s of
    copies from pinned host memory."""
    return [*_products(device), *_convolutions(device), *_copies(device)]


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(device seconds, host seconds) of `work`: those between CUDA events around what it queues,
    and those until it has queued it. On a CPU both are the host's."""
    wait(device)
    if device.type == "cpu":
        seconds = _host_seconds(work)
        return seconds, seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    host = _host_seconds(work)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000, host


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _products(device: torch.device) -> Iterator[Record]:
    side = 8192 if device.type == "cuda" else 1024
    for name, dtype, precision in _PRODUCTS:
        if name == "matmul_tf32" and device.type == "cpu":
            continue
        with _settings(precision):
            record = _record(name, "FLOP/s", 2 * side**3, _matmul(side, dtype, device), device)
        yield record


def _matmul(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _convolutions(device: torch.device) -> Iterator[Record]:
    batch = 1024 if device.type == "cuda" else 1
    for channels, side in _CONVOLUTIONS:
        flop = convolution_flop(batch, channels, side)
        work = _convolution(batch, channels, side, device)
        with _settings():
            record = _record(f"conv_bf16_{channels}x{side}", "FLOP/s", flop, work, device)
        yield record


def convolution_flop(batch: int, channels: int, side: int) -> int:
    """Of the output and of both gradients of a 3x3 convolution that keeps channels and side."""
    return 3 * 2 * batch * side**2 * channels**2 * 9


def _convolution(batch: int, channels: int, side: int, device) -> Callable[[], object]:
    def operand(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, device=device, dtype=torch.bfloat16)
        return values.to(memory_format=torch.channels_last)

    images, gradient = (operand(batch, channels, side, side) for _ in range(2))
    weight = operand(channels, channels, 3, 3)
    needed = (images.requires_grad_(), weight.requires_grad_())

    def work() -> object:
        out = torch.nn.functional.conv2d(images, weight, padding=1)
        return torch.autograd.grad(out, needed, gradient)

    return work


def _copies(device: torch.device) -> Iterator[Record]:
    size = 1 << (30 if device.type == "cuda" else 27)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield _record("copy", "bytes/s", 2 * size, partial(target.copy_, source), device)
    if device.type == "cuda":
        host = source.cpu().pin_memory()
        work = partial(target.copy_, host, non_blocking=True)
        yield _record("host_to_device", "bytes/s", size, work, device)


@contextmanager
def _settings(precision: str = "highest") -> Iterator[None]:
    """That of fp32 products, and the fastest convolutions that cuDNN finds by trying."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _record(
    name: str, unit: str, amount: int, work: Callable[[], object], device: torch.device
) -> Record:
    """`amount`: what one call computes or moves, in FLOP or bytes."""
    return Record(name, unit, [amount / seconds for seconds in _seconds(work, device)])


def _seconds(work: Callable[[], object], device: torch.device) -> list[float]:
    """Of one call, in each of several rounds; in fewer where that takes seconds, as bf16 does on a
    CPU without instructions for it."""
    deadline = time.perf_counter() + _LONGEST
    work()  # cuDNN and cuBLAS choose their kernels
    once, _ = timed(work, device)
    if once > _LONGEST:
        return [once]
    calls = math.ceil(_ROUND / once)
    found: list[float] = []
    while len(found) < _ROUNDS and not (found and time.perf_counter() > deadline):
        device_seconds, _ = timed(partial(_repeat, work, calls), device)
        found.append(device_seconds / calls)
    return found


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def _host_seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
