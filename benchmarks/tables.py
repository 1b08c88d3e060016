"""The tables of the README pages, from the records under benchmarks/results/.

    python -m benchmarks.tables            # rewrite them
    python -m benchmarks.tables --check    # exit 1 where one is not current

A page marks each table: ``<!-- table: cpu-2026-11-24/loaders -->`` … ``<!-- end -->``. Two records
give the table of their ratios: ``<!-- table: DATE/loaders DATE/loaders-again -->``; of counts,
which are exact, one table of both.
"""

import argparse
import importlib
import re
from pathlib import Path

from benchmarks import agreement
from benchmarks.measurements import Session, load

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "benchmarks/README.md", "pipelines/README.md")
_EXACT = "kernel_counts"
_MARKED = re.compile(r"(<!-- table: (\S+)(?: (\S+))? -->\n).*?<!-- end -->", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = [page for page in PAGES if update(ROOT / page, write=not args.check)]
    for page in stale:
        print(f"{page}: {'is not current' if args.check else 'rewritten'}")
    return 1 if args.check and stale else 0


def update(page: Path, write: bool) -> bool:
    """Whether `page` differs from what the records give; rewrite it if asked."""
    before = page.read_text(encoding="utf-8")
    after = _MARKED.sub(lambda m: m[1] + render(m[2], m[3]) + "\n<!-- end -->", before)
    if write and after != before:
        page.write_text(after, encoding="utf-8")
    return after != before


def render(name: str, again: str | None = None) -> str:
    """The table of ``benchmarks/results/<name>.json`` and what made it, in Markdown; with `again`
    that of how the ratios of the two agree, or of the counts in both."""
    found = [_load(part) for part in (name, again) if part]
    if again and found[0].benchmark != _EXACT:
        return agreement.table(agreement.compare(*found))
    table = importlib.import_module(f"benchmarks.{found[0].benchmark}").table(*found)
    return "\n\n".join([table, *map(origin, found)])


def _load(name: str) -> Session:
    return load(ROOT / "benchmarks" / "results" / f"{name}.json")


def origin(found: Session) -> str:
    """Command, machine, date and versions, in one line; and what its figures are, if measured."""
    machine, versions = found.machine, found.versions
    devices = ", ".join(machine.get("gpus", [])) or "no GPU"
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = f", in {len(found.calls)} parts" if len(found.calls) > 1 else ""
    rounds = sorted({len(record.rounds) for record in found.records})
    cpu = machine["cpu"] + (f" ({machine['instructions']})" if "instructions" in machine else "")
    made = (
        f"`{found.command}`; {machine['cores']} cores of {cpu}, {devices}; "
        f"{found.date[:10]}; {names}."
    )
    if found.benchmark == _EXACT:
        return made
    return f"{made} Median ± half the range over {' or '.join(map(str, rounds))} rounds{parts}."


if __name__ == "__main__":
    raise SystemExit(main())
