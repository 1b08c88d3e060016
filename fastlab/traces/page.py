"""`fastlab trace`: a review as text and as a page, two side by side, or TensorBoard on a run."""

import argparse
import importlib.util
import os
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlab.console import UserError
from fastlab.report.page import MISSING, number_text, render, write_whole
from fastlab.traces.events import SUFFIX, find_traces, read_traces
from fastlab.traces.review import RULES, Review, review

_PERFETTO = "https://ui.perfetto.dev"


@dataclass(frozen=True)
class Reviewed:
    """One run's newest recording."""

    name: str
    batch_size: int | None
    """Images a step, over all processes; None where the configuration is not at hand."""
    ranks: list[Review]

    @property
    def main(self) -> Review:
        return self.ranks[0]


def run(args: argparse.Namespace) -> None:
    """Raises `UserError` for a run without a trace, a damaged trace or a missing TensorBoard."""
    if args.tensorboard:
        _tensorboard(args.run, args.port)
    paths = [args.run, *([args.compare] if args.compare else [])]
    runs = [look(path) for path in paths]
    out = args.out or find_traces(args.run)[0].parent / "review.html"
    write_page(runs, out)
    print(text(runs))
    print(f"\npage: {out}")
    print(f"timeline: fastlab trace {args.run} --tensorboard; the same files open at {_PERFETTO}")


def look(path: Path) -> Reviewed:
    """Review the newest recording of a run directory, or one trace. Raises `UserError`."""
    traces = read_traces(path)
    settings = _settings(traces[0].path)
    batch_size = settings.get("train", {}).get("batch_size")
    return Reviewed(str(path), batch_size, review(traces, settings))


def _settings(trace: Path) -> dict[str, Any]:
    """The configuration of the run that a trace belongs to; empty where there is none."""
    path = trace.absolute().parent.parent / "config.toml"
    try:
        return _checked(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); mend or remove it") from None


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """ValueError for what a review cannot use; other keys may be those of another version."""
    for name, section in settings.items():
        if not isinstance(section, dict):
            raise ValueError(f"{name} is not a section")
    batch_size = settings.get("train", {}).get("batch_size", 1)
    if type(batch_size) is not int or not 1 <= batch_size < 2**53:
        raise ValueError("train.batch_size is not a whole number from 1")
    return settings


def figures(run: Reviewed) -> dict[str, tuple[float | None, str]]:
    """Label -> value and format, of the first rank."""
    one = run.main
    rate = run.batch_size * 1e3 / one.step_ms if run.batch_size else None
    found = {
        "step, ms": (one.step_ms, ",.2f"),
        "images/s": (rate, ",.0f"),
        **{f"{_words(name)}, ms": (host, ",.2f") for name, host, _ in one.parts},
        "augmentation in other threads, ms": (one.ahead_ms or None, ",.2f"),
        "GPU busy": (one.busy, ".1%"),
        **{f"share: {name}": (share, ".1%") for name, share in _shares(one)},
        "memory-bound kernels": (one.memory_kernels, ".1%"),
        "median kernel, µs": (one.kernel_us, ",.1f"),
        "launches a step": (one.launches if one.gpu else None, ",.0f"),
        "synchronisations a step": (sum(sync.calls for sync in one.syncs), ",.1f"),
        "communication, ms": (one.comm_ms if one.world > 1 else None, ",.2f"),
        "communication hidden": (one.hidden, ".1%"),
        "peak memory, MB": (one.peak_bytes / 1e6 if one.peak_bytes else None, ",.1f"),
    }
    return found


def figure_rows(runs: list[Reviewed]) -> list[list[str]]:
    """Label, a value a run, and with two runs the change; what no run has is left out."""
    tables = [figures(run) for run in runs]
    labels = list(dict.fromkeys(label for table in tables for label in table))
    rows = []
    for label in labels:
        pairs = [table.get(label, (None, "")) for table in tables]
        values = [value for value, _ in pairs]
        if all(value is None for value in values):
            continue
        texts = [MISSING if value is None else format(value, form) for value, form in pairs]
        rows.append([label, *texts, *([_change(*values, texts[0])] if len(runs) == 2 else [])])
    return rows


def _change(before: float | None, after: float | None, shown: str) -> str:
    if before is None or after is None:
        return MISSING
    if shown.endswith("%"):
        return f"{100 * (after - before):+.1f} points"
    return f"{after / before - 1:+.1%}" if before else MISSING


def _shares(one: Review) -> list[tuple[str, float]]:
    """Without what a single process does not do."""
    return [item for item in one.shares.items() if one.world > 1 or item[0] != "communication"]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _title(run: Reviewed) -> str:
    one = run.main
    ranks = f"{len(run.ranks)} of {one.world} ranks" if one.world > 1 else "one process"
    numbers = f"steps {one.numbers[0]} to {one.numbers[-1]}"
    return f"{run.name}: {numbers}, {one.gpu or 'CPU'}, {ranks}"


# Text


def text(runs: list[Reviewed]) -> str:
    parts = [_one_text(run) for run in runs]
    if len(runs) == 2:
        head = ["", *(Path(run.name).name for run in runs), "change"]
        parts.append("\n".join(["Side by side", *_columns([head, *figure_rows(runs)])]))
    return "\n\n".join(parts)


def _one_text(run: Reviewed) -> str:
    one = run.main
    lines = [_title(run)]
    for name, facts, advice in one.findings:
        lines += ["", *_wrapped(f"{name}: {facts}"), *_wrapped(f"  try: {advice}")]
    spread = f"{one.fastest_ms:,.2f} to {one.slowest_ms:,.2f} ms on the host"
    lines += [f"\nStep: {one.step_ms:,.2f} ms ({spread})", *_columns(_part_rows(one))]
    lines += ["\nOther figures", *_columns(_other_figures(run))]
    for title, head, rows in _tables(run):
        lines += [f"\n{title}", *_columns([head, *rows])]
    return "\n".join(lines)


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 100, subsequent_indent="  ", drop_whitespace=True)


def _other_figures(run: Reviewed) -> list[list[str]]:
    parts = {f"{_words(name)}, ms" for name, _, _ in run.main.parts}
    return [row for row in figure_rows([run]) if row[0] not in parts]


def _part_rows(one: Review) -> list[list[str]]:
    gpu = ["GPU ms"] if one.gpu else []
    head = ["part", "host ms", *gpu]
    rows = [
        [_words(name), f"{host:,.2f}", *([f"{device:,.2f}"] if gpu else [])]
        for name, host, device in one.parts
    ]
    return [head, *rows]


def _tables(run: Reviewed) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of what a review lists, what they are sorted by in the second column;
    nothing for an empty list."""
    one = run.main
    waited = "waited, ms" if one.gpu else "took, ms"
    first = 0 if one.gpu else 1
    tables = [
        (
            "Kernels, by GPU time",
            ["kernel", "GPU ms a step", "calls a step"],
            [[_shown(r.name), f"{r.gpu_ms:,.3f}", f"{r.calls:,.1f}"] for r in one.kernels],
        ),
        (
            f"Operators, by {'GPU' if one.gpu else 'their own CPU'} time",
            ["operator", *["GPU ms a step", "own CPU ms a step"][first:], "calls a step"],
            [
                [
                    _shown(r.name),
                    *[f"{r.gpu_ms:,.3f}", f"{r.cpu_ms:,.3f}"][first:],
                    f"{r.calls:,.1f}",
                ]
                for r in one.ops
            ],
        ),
        (
            "Synchronisations of host and device"
            if one.gpu
            else "Reads of values, which on a GPU synchronise",
            ["call", waited, "calls a step", "where"],
            [[s.call, f"{s.ms:,.3f}", f"{s.calls:,.1f}", s.place] for s in one.syncs],
        ),
        (
            "Ranks",
            ["rank", "step, ms", "waits for data", "communication, ms", "hidden", "GPU busy"],
            [_rank_row(r) for r in run.ranks] if one.world > 1 else [],
        ),
    ]
    return [table for table in tables if table[2]]


def _rank_row(one: Review) -> list[str]:
    hidden, busy = (MISSING if v is None else f"{v:.1%}" for v in (one.hidden, one.busy))
    data = f"{one.shares['data']:.1%}"
    return [str(one.rank), f"{one.step_ms:,.2f}", data, f"{one.comm_ms:,.2f}", hidden, busy]


def _shown(name: str) -> str:
    """Names of C++ templates run to hundreds of characters."""
    return name if len(name) <= 70 else name[:67] + "..."


def _columns(rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# The page


def write_page(runs: list[Reviewed], out: Path) -> None:
    """One self-contained page. Raises `UserError` where it cannot be written."""
    pages = [
        {
            "title": _title(run),
            "findings": run.main.findings,
            "step": run.main,
            "shares": _shares(run.main),
            "parts": [(_words(name), host, device) for name, host, device in run.main.parts],
            "figures": _other_figures(run),
            "tables": _tables(run),
        }
        for run in runs
    ]
    both = figure_rows(runs) if len(runs) == 2 else []
    names = [Path(run.name).name for run in runs]
    page = render("trace.html.j2", runs=pages, names=names, both=both, rules=RULES, fixed=_fixed)
    write_whole(out, page)


def _fixed(value: float) -> str:
    return number_text(value, 2)


# TensorBoard


def _tensorboard(path: Path, port: int) -> None:
    """Become TensorBoard on `path`, reachable from this machine only. Raises `UserError`."""
    find_traces(path)
    if importlib.util.find_spec("torch_tb_profiler") is None:
        raise UserError(
            "TensorBoard lacks its profiler plugin: pip install 'fastlab[profile]'; "
            f"or open the *{SUFFIX} files at {_PERFETTO}"
        )
    folder = path if path.is_dir() else path.parent
    command = ["-m", "tensorboard.main", "--logdir", str(folder), "--host", "localhost"]
    print(f"TensorBoard: http://localhost:{port}/#pytorch_profiler (Ctrl-C ends it)", flush=True)
    # In place of this process: signals reach it, and nothing stays behind.
    os.execv(sys.executable, [sys.executable, *command, "--port", str(port)])
