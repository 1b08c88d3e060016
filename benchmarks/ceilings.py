"""What this device can do at best, measured: the denominators of every share.

    python -m benchmarks.ceilings --out FILE.json

On a GPU the time of each round is that between two CUDA events. All operands are random: a GPU
draws less power on zeros and runs faster. FLOP are 2 for a multiply-add; a copy counts what it
reads and what it writes. A convolution is 3x3, in bf16 and channels-last, forward and backward, of
the shapes that bound ResNet-11 at batch 1024 (on a CPU at batch 1).
"""

import argparse
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.measurements import Record, Session, command_line, new_session, save
from benchmarks.timing import default_device, timed
from fastlab.console import run_command

_ROUNDS = 7
_ROUND = 0.05  # seconds that a round takes at least
_LONGEST = 5.0  # seconds for one ceiling


# Name, dtype, and precision for `torch.set_float32_matmul_precision`: only "highest" is plain fp32.
_PRODUCTS = (
    ("matmul_fp32", torch.float32, "highest"),
    ("matmul_tf32", torch.float32, "high"),
    ("matmul_bf16", torch.bfloat16, "highest"),
)
_CONVOLUTIONS = ((64, 32), (128, 16), (256, 8))  # channels and side of ResNet-11's blocks


def main(argv: list[str] | None = None) -> int:
    return run_command(run, command_line(__doc__).parse_args(argv))


def run(args: argparse.Namespace) -> None:
    session = new_session("ceilings", measure_rounds(default_device()))
    print(table(session))
    if args.out:
        save(session, args.out)


def table(session: Session) -> str:
    """In Markdown: a row for each ceiling."""
    lines = ["| ceiling | measured |", "| --- | --- |"]
    lines += [
        f"| {r.case} | {r.median / 1e12:.4g} T{r.unit} ± {r.spread:.0%} |" for r in session.records
    ]
    return "\n".join(lines)


def measure(device: torch.device) -> dict[str, float]:
    """The median of each ceiling by its name, in FLOP/s or bytes/s."""
    return {record.case: record.median for record in measure_rounds(device)}


def measure_rounds(device: torch.device) -> list[Record]:
    """FLOP/s of matrix products in fp32 (on a GPU as TF32 too) and bf16 and of convolutions in
    bf16, bytes/s of copies (read and written), and, on a GPU, bytes/s of copies from pinned host
    memory."""
    return [*_products(device), *_convolutions(device), *_copies(device)]


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
    """FLOP of the output and both gradients of a 3x3 convolution that keeps channels and side."""
    return 3 * 2 * batch * side**2 * channels**2 * 9


def _convolution(
    batch: int, channels: int, side: int, device: torch.device
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Work that returns the gradients of the images and of the weight."""

    def operand(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, device=device, dtype=torch.bfloat16)
        return values.to(memory_format=torch.channels_last)

    images, gradient = (operand(batch, channels, side, side) for _ in range(2))
    weight = operand(channels, channels, 3, 3)
    inputs = (images.requires_grad_(), weight.requires_grad_())

    def work() -> tuple[torch.Tensor, ...]:
        out = torch.nn.functional.conv2d(images, weight, padding=1)
        return torch.autograd.grad(out, inputs, gradient)

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
def _settings(precision: str = "highest") -> Generator[None]:
    """Set the precision of fp32 products, and let cuDNN find its fastest convolutions by trial."""
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
    """`amount` is what one call computes or moves, in FLOP or bytes."""
    return Record(name, unit, [amount / seconds for seconds in _seconds(work, device)])


def _seconds(work: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of one call in each of several rounds; fewer rounds where a call takes seconds, as
    bf16 does on a CPU without instructions for it."""
    deadline = time.perf_counter() + _LONGEST
    work()  # cuDNN and cuBLAS choose their kernels
    once = timed(work, device).device
    if once > _LONGEST:
        return [once]
    calls = math.ceil(_ROUND / once)
    rounds: list[float] = []
    while len(rounds) < _ROUNDS and not (rounds and time.perf_counter() > deadline):
        rounds.append(timed(partial(_repeat, work, calls), device).device / calls)
    return rounds


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


if __name__ == "__main__":
    raise SystemExit(main())
