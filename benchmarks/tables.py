"""The tables of the pages, from the records under benchmarks/results/.

    python -m benchmarks.tables            # rewrite them
    python -m benchmarks.tables --check    # exit status 1 where a page is out of date
    python -m benchmarks.tables --agreement FIRST.json SECOND.json    # exit status 1: they differ

A page marks each table: ``<!-- table: cpu-2026-11-24/loaders -->`` … ``<!-- end -->``. Two records
give the table of their agreement: ``<!-- table: DATE/loaders DATE/loaders-again -->``; of counts,
which are exact, and of different benchmarks they give one table of both. ``<!-- table: leaderboard
-->`` is that of the speed records.

Two runs of a benchmark agree where every ratio of a case to the run's first case differs by no more
than half the range of that ratio in both runs. Ratios are taken round by round. They are what the
benchmarks promise: the speed of the machine itself differs from run to run.
"""

import argparse
import importlib
import re
from pathlib import Path
from typing import NamedTuple

from benchmarks.measurements import Record, Session, load
from fastlab.console import UserError, run_command

ROOT = Path(__file__).parents[1]
PAGES = ("benchmarks/README.md", "docs/gpus.md", "pipelines/README.md")
_EXACT = "kernel_counts"
_MARKED = re.compile(r"(<!-- table: (\S+)(?: (\S+))? -->\n).*?<!-- end -->", re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables of measurements, from their records.")
    parser.add_argument("--check", action="store_true", help="only report pages out of date")
    parser.add_argument("--agreement", nargs=2, type=Path, help="compare two records")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    if args.agreement:
        pairs = compare(*(load(path, "--agreement") for path in args.agreement))
        print(agreement_table(pairs))
        return int(not all(pair.agrees for pair in pairs))
    stale = [page for page in PAGES if update(ROOT / page, write=not args.check)]
    for page in stale:
        print(f"{page}: {'is out of date' if args.check else 'rewritten'}")
    return int(args.check and bool(stale))


def update(page: Path, write: bool) -> bool:
    """Whether `page` differs from what the records give; with `write`, rewrite it."""
    before = page.read_text(encoding="utf-8")
    after = _MARKED.sub(lambda m: m[1] + render(m[2], m[3]) + "\n<!-- end -->", before)
    if write and after != before:
        page.write_text(after, encoding="utf-8")
    return after != before


def render(name: str, again: str | None = None) -> str:
    """In Markdown: the table of ``benchmarks/results/<name>.json`` and what made it; with `again`
    the table of how the two records agree, or one of both where they are counts or of different
    benchmarks."""
    if name == "leaderboard":
        return importlib.import_module("benchmarks.records.leaderboard").table()
    results = ROOT / "benchmarks" / "results"
    sessions = [load(results / f"{part}.json") for part in (name, again) if part]
    benchmarks = [session.benchmark for session in sessions]
    if len(set(benchmarks)) < len(benchmarks) and _EXACT not in benchmarks:
        return agreement_table(compare(*sessions))
    table = importlib.import_module(f"benchmarks.{benchmarks[0]}").table(*sessions)
    return "\n\n".join([table, *map(origin, sessions)])


def origin(session: Session) -> str:
    """One line: command, machine, date and versions, and how often each case was measured."""
    machine = session.machine
    devices = ", ".join(machine.get("gpus", [])) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in session.versions.items())
    cpu = machine["cpu"] + (f" ({machine['instructions']})" if "instructions" in machine else "")
    made = (
        f"`{session.command}`; {machine['cores']} cores of {cpu}, {devices}; "
        f"{session.date[:10]}; {versions}."
    )
    if session.benchmark == _EXACT:
        return made
    rounds = sorted({len(record.rounds) for record in session.records})
    parts = f", in {len(session.calls)} parts" if len(session.calls) > 1 else ""
    return f"{made} Median ± half the range over {' or '.join(map(str, rounds))} rounds{parts}."


class Pair(NamedTuple):
    """The ratios of one case to the first case of its run, in two runs."""

    case: str
    first: Record
    second: Record

    @property
    def agrees(self) -> bool:
        slack = sum(ratio.median * ratio.spread for ratio in (self.first, self.second))
        return abs(self.first.median - self.second.median) <= slack


def compare(first: Session, second: Session) -> list[Pair]:
    """The cases that both runs have. Raises `UserError` where they are not of one benchmark."""
    names = [
        (run.benchmark, [record.case for record in run.records[:1]]) for run in (first, second)
    ]
    if names[0] != names[1] or not first.records:
        raise UserError("only two runs of one benchmark with the same first case can be compared")
    before, after = ratios(first), ratios(second)
    return [Pair(case, before[case], after[case]) for case in before if case in after]


def ratios(session: Session) -> dict[str, Record]:
    """Each case divided by the run's first, round by round."""
    limit, *cases = session.records
    return {
        record.case: Record(
            record.case,
            "ratio",
            # An interrupted command has one round more of its first cases.
            [a / b for a, b in zip(record.rounds, limit.rounds, strict=False)],
        )
        for record in cases
    }


def agreement_table(pairs: list[Pair]) -> str:
    """In Markdown: a row for each case."""
    lines = ["| case | first run | second run | agree |", "| --- | --- | --- | --- |"]
    for pair in pairs:
        cells = (f"{ratio.median:.3f} ± {ratio.spread:.0%}" for ratio in (pair.first, pair.second))
        lines.append(f"| {pair.case} | {' | '.join(cells)} | {'yes' if pair.agrees else 'NO'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
