"""A review as text and as an HTML page, of one run or of two side by side; or TensorBoard."""

import argparse
import importlib.util
import os
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from fastlab.console import UserError
from fastlab.machine import installing
from fastlab.report.page import render, write_whole
from fastlab.report.texts import MISSING, formatted, number_text
from fastlab.traces.advice import RULES
from fastlab.traces.events import SUFFIX, find_traces
from fastlab.traces.figures import Part, Review, Row
from fastlab.traces.review import RunReview, review_run

_PERFETTO = "https://ui.perfetto.dev"


def run(args: argparse.Namespace) -> None:
    """Run `fastlab trace`. Raises `UserError` for a run without a trace, a damaged trace or a
    missing TensorBoard."""
    if args.tensorboard:
        _tensorboard(args.run, args.port)
    paths = [args.run, *([args.compare] if args.compare else [])]
    runs = [review_run(path) for path in paths]
    out = args.out or find_traces(args.run)[0].parent / "review.html"
    write_page(runs, out)
    print(text(runs))
    print(f"\npage: {out}")
    print(f"timeline: fastlab trace {args.run} --tensorboard; the same files open at {_PERFETTO}")


def _tensorboard(path: Path, port: int) -> None:
    """Replace this process by TensorBoard on `path`, reachable from this machine only."""
    find_traces(path)
    if importlib.util.find_spec("torch_tb_profiler") is None:
        raise UserError(
            f"TensorBoard lacks its profiler plugin: {installing('profile')}; "
            f"or open the *{SUFFIX} files at {_PERFETTO}"
        )
    folder = path if path.is_dir() else path.parent
    command = ["-m", "tensorboard.main", "--logdir", str(folder), "--host", "localhost"]
    print(f"TensorBoard: http://localhost:{port}/#pytorch_profiler (Ctrl-C ends it)", flush=True)
    # Signals then reach TensorBoard itself, and no process stays behind.
    os.execv(sys.executable, [sys.executable, *command, "--port", str(port)])


class Table(NamedTuple):
    title: str
    head: list[str]
    """The second column is the one by which the rows are sorted."""
    rows: list[list[str]]


def _title(run: RunReview) -> str:
    main = run.main
    ranks = f"{len(run.ranks)} of {main.world} ranks" if main.world > 1 else "one process"
    if not main.numbers:
        steps = "the whole recording as one step, since it marks none"
    elif len(main.numbers) == 1:
        steps = f"step {main.numbers[0]}"
    else:
        steps = f"steps {main.numbers[0]} to {main.numbers[-1]}"
    return f"{run.name}: {steps}, {main.gpu or 'CPU'}, {ranks}"


def _figures(run: RunReview, parts: list[Part]) -> dict[str, tuple[float | None, str]]:
    """Label -> value and format, for the first rank."""
    main = run.main
    rate = run.batch_size * 1e3 / main.step_ms if run.batch_size else None
    return {
        "step, ms": (main.step_ms, ",.2f"),
        "images/s": (rate, ",.0f"),
        **{f"{_words(part.name)}, ms": (part.host_ms, ",.2f") for part in parts},
        "augmentation in other threads, ms": (main.ahead_ms or None, ",.2f"),
        "GPU busy": (main.busy, ".1%"),
        **{f"share: {name}": (share, ".1%") for name, share in _shares(main)},
        "memory-bound kernels": (main.memory_kernels, ".1%"),
        "median kernel, µs": (main.kernel_us, ",.1f"),
        "launches per step": (main.launches if main.gpu else None, ",.0f"),
        "synchronisations per step": (sum(sync.calls for sync in main.syncs), ",.1f"),
        "communication, ms": (main.comm_ms if main.world > 1 else None, ",.2f"),
        "overlapping communication": (main.hidden, ".1%"),
        "peak memory, MB": (main.peak_bytes / 1e6 if main.peak_bytes else None, ",.1f"),
    }


def _figure_rows(runs: list[RunReview]) -> list[list[str]]:
    """A label and a value for each run, and for two runs the change. A figure that no run has is
    left out; so are the parts of a single run, which have a table of their own."""
    tables = [_figures(run, run.main.parts if len(runs) == 2 else []) for run in runs]
    labels = list(dict.fromkeys(label for table in tables for label in table))
    rows = []
    for label in labels:
        pairs = [table.get(label, (None, "")) for table in tables]
        values = [value for value, _ in pairs]
        if all(value is None for value in values):
            continue
        texts = [formatted(value, form) for value, form in pairs]
        rows.append([label, *texts, *([_change(*values, texts[0])] if len(runs) == 2 else [])])
    return rows


def _change(before: float | None, after: float | None, shown: str) -> str:
    if before is None or after is None:
        return MISSING
    if shown.endswith("%"):
        return f"{formatted(100 * (after - before), '+.1f')} points"
    return formatted(after / before - 1 if before else None, "+.1%")


def _shares(review: Review) -> list[tuple[str, float]]:
    """The shares of the step; a single process has no communication."""
    shares = review.shares.items()
    return [item for item in shares if review.world > 1 or item[0] != "communication"]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _part_table(review: Review) -> Table:
    columns = 3 if review.gpu else 2
    rows = [
        [_words(part.name), number_text(part.host_ms, 2), number_text(part.gpu_ms, 2)][:columns]
        for part in review.parts
    ]
    return Table("Parts, ms per step", ["part", "host", "GPU"][:columns], rows)


def tables(run: RunReview) -> list[Table]:
    """The lists of a review, without empty ones."""
    main = run.main
    waited, syncs = (
        ("waited, ms", "Synchronisations of host and device")
        if main.gpu
        else ("took, ms", "Reads of tensor values, which synchronise on a GPU")
    )
    filled = [
        Table(
            "Kernels, by GPU time",
            ["kernel", "GPU ms per step", "calls per step"],
            [
                [_shortened(r.name), number_text(r.gpu_ms, 3), number_text(r.calls, 1)]
                for r in main.kernels
            ],
        ),
        _operator_table(main),
        Table(
            syncs,
            ["call", waited, "calls per step", "where"],
            [[s.call, number_text(s.ms, 3), number_text(s.calls, 1), s.place] for s in main.syncs],
        ),
        Table(
            "Ranks",
            ["rank", "step, ms", "waits for data", "communication, ms", "overlapping", "GPU busy"],
            [_rank_row(rank) for rank in run.ranks] if main.world > 1 else [],
        ),
    ]
    return [table for table in filled if table.rows]


def _operator_table(review: Review) -> Table:
    first, processor = (0, "GPU") if review.gpu else (1, "self CPU")

    def cells(row: Row) -> list[str]:
        times = [number_text(row.gpu_ms, 3), number_text(row.cpu_ms, 3)][first:]
        return [_shortened(row.name), *times, number_text(row.calls, 1)]

    head = ["operator", *["GPU ms per step", "self CPU ms per step"][first:], "calls per step"]
    return Table(f"Operators, by {processor} time", head, [cells(row) for row in review.ops])


def _rank_row(rank: Review) -> list[str]:
    shares = (rank.shares["data"], rank.hidden, rank.busy)
    data, hidden, busy = (formatted(share, ".1%") for share in shares)
    step, communication = number_text(rank.step_ms, 2), number_text(rank.comm_ms, 2)
    return [str(rank.rank), step, data, communication, hidden, busy]


def _shortened(name: str) -> str:
    """The names of C++ templates can have hundreds of characters."""
    return name if len(name) <= 70 else name[:67] + "..."


def text(runs: list[RunReview]) -> str:
    parts = [_run_text(run) for run in runs]
    if len(runs) == 2:
        head = ["", *(Path(run.name).name for run in runs), "change"]
        parts.append("\n".join(["Side by side", *_columns([head, *_figure_rows(runs)])]))
    return "\n\n".join(parts)


def _run_text(run: RunReview) -> str:
    main = run.main
    lines = [_title(run)]
    for name, facts, advice in run.findings:
        lines += ["", *_wrapped(f"{name}: {facts}"), *_wrapped(f"  try: {advice}")]
    step, fastest, slowest = (
        number_text(time, 2) for time in (main.step_ms, main.fastest_ms, main.slowest_ms)
    )
    lines.append(f"\nStep: {step} ms ({fastest} to {slowest} ms on the host)")
    figures = Table("Other figures", [], _figure_rows([run]))
    for title, head, rows in (_part_table(main), figures, *tables(run)):
        lines += [f"\n{title}", *_columns([head, *rows] if head else rows)]
    return "\n".join(lines)


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 100, subsequent_indent="  ", drop_whitespace=True)


def _columns(rows: list[list[str]]) -> list[str]:
    """Align the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def write_page(runs: list[RunReview], out: Path) -> None:
    """Write one self-contained HTML page. Raises `UserError` where `out` cannot be written."""
    pages = [
        {
            "title": _title(run),
            "findings": run.findings,
            "step_ms": run.main.step_ms,
            "shares": _shares(run.main),
            "parts": _part_table(run.main),
            "figures": _figure_rows([run]),
            "tables": tables(run),
        }
        for run in runs
    ]
    both = _figure_rows(runs) if len(runs) == 2 else []
    names = [Path(run.name).name for run in runs]
    write_whole(out, render("trace.html.j2", runs=pages, names=names, both=both, rules=RULES))
