"""Whether two runs of one benchmark agree, within the spread that each of them states.

    python -m benchmarks.agreement FIRST.json SECOND.json

Every case is divided, round by round, by the first case of its own run, since ratios are what the
benchmarks promise: the speed of the machine itself differs from run to run. Two ratios agree where
they differ by no more than half the range of the one and half the range of the other. Exit status 1
where one does not.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.measurements import Record, Session, load


class Pair(NamedTuple):
    case: str
    first: Record
    second: Record

    @property
    def agrees(self) -> bool:
        slack = sum(ratio.median * ratio.spread for ratio in self[1:])
        return abs(self.first.median - self.second.median) <= slack


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args()
    try:
        pairs = compare(load(args.first), load(args.second))
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"{args.first}, {args.second}: cannot be compared ({error})", file=sys.stderr)
        return 2
    print(table(pairs))
    return 0 if all(pair.agrees for pair in pairs) else 1


def compare(first: Session, second: Session) -> list[Pair]:
    """Of the cases that both have. Raises `ValueError` where they are not of one benchmark."""
    if first.benchmark != second.benchmark or first.records[0].case != second.records[0].case:
        raise ValueError("two runs of one benchmark, with the same first case, can be compared")
    before, after = ratios(first), ratios(second)
    return [Pair(case, before[case], after[case]) for case in before if case in after]


def ratios(found: Session) -> dict[str, Record]:
    """Of each case to the run's first, round by round."""
    limit, *cases = found.records
    return {
        record.case: Record(
            record.case,
            "ratio",
            # A command that was cut off has a round more of its first cases.
            [a / b for a, b in zip(record.rounds, limit.rounds, strict=False)],
        )
        for record in cases
    }


def table(pairs: list[Pair]) -> str:
    """Markdown: a row a case."""
    lines = ["| case | first run | second run | agree |", "| --- | --- | --- | --- |"]
    for pair in pairs:
        cells = (f"{ratio.median:.3f} ± {ratio.spread:.0%}" for ratio in pair[1:])
        lines.append(f"| {pair.case} | {' | '.join(cells)} | {'yes' if pair.agrees else 'NO'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
