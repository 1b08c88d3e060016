"""Many short trainings in one process on one device: which settings of a recipe are best?

    python -m benchmarks.search SPEC.toml --data DIR --out FILE.json --limit 300

Successive halving (Jamieson and Talwalkar, 2016): every candidate trains a whole schedule of a few
epochs from fresh weights; the best by validation top-1 after the last epoch train a longer one, and
so on. `benchmarks.search_spec` documents the file. A training that diverges counts as 0.

What is compiled stays for the whole search, so that candidates of the same shapes compile nothing
anew, and the images stay on the device. The seconds of a training include what it was the first to
compile. After an interruption or ``--limit``, the same command does what is left.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch._dynamo import config as dynamo

from benchmarks.measurements import (
    Record,
    Results,
    Session,
    check_dataset,
    command_line,
    public_config,
)
from benchmarks.records import clock
from benchmarks.search_spec import Candidate, Search, read_search
from fastlab.config import Config
from fastlab.console import UserError, positive_float, run_command
from fastlab.report.texts import setting_text
from fastlab.runs import RunDir
from fastlab.train import Trainer
from fastlab.training.setup import make_accelerator, open_dataset, open_split, torch_settings
from pipelines.base import Pipeline

_VARIANTS = 256  # of a function, that a process may compile; torch's default is eight


def main() -> int:
    parser = command_line(__doc__, overrides=True)
    parser.add_argument("spec", type=Path, help="the file of the search")
    parser.add_argument("--data", required=True, help="dataset directory")
    parser.add_argument("--limit", type=positive_float, default=math.inf, help="seconds in all")
    return run_command(run, parser.parse_args())


def run(args: argparse.Namespace) -> None:
    deadline = time.monotonic() + args.limit
    search = read_search(args.spec, [*clock.overrides({"data.path": args.data}), *args.overrides])
    check_dataset(args.data)
    results = Results("search", args.out)
    check_results(search, results)
    successive_halving(search, results, deadline)
    if not results.session.records:
        raise UserError(f"--limit {args.limit:g}: ended before the first training did")
    print(table(results.session))


def check_results(search: Search, results: Results) -> None:
    """Raises `UserError` where `results` has trainings of another search."""
    known = {each.name: once(search, each) for each in search.candidates}
    for record in results.session.records:
        details = {key: record.details.get(key) for key in known["base"]}
        if details != known.get(record.case):
            raise UserError("--out: its file holds another search; choose another file")


def once(search: Search, candidate: Candidate) -> dict[str, Any]:
    """What a record says of the search and of the candidate."""
    return {
        "title": search.title,
        "candidates": len(search.candidates),
        "rungs": search.rungs,
        "keep": search.keep,
        "seeds": search.seeds,
        "settings": candidate.settings,
        "config": public_config(candidate.config),
    }


def successive_halving(search: Search, results: Results, deadline: float = math.inf) -> None:
    """Train what `results` lacks, until `deadline`, a time of `time.monotonic`."""
    first = search.candidates[0].config
    with torch_settings(first), dynamo.patch(recompile_limit=_VARIANTS):
        accelerator = make_accelerator(first)
        images = open_images(search, accelerator)  # as long as one is open, the device keeps them
        survivors = search.candidates
        for rung, budget in enumerate(search.budgets()):
            for candidate in shapes_together(survivors):
                if results.rounds(candidate.name) > rung:
                    continue
                if time.monotonic() > deadline:
                    return
                done = train(candidate.trained(*budget), accelerator, deadline)
                if done.stopped:
                    return
                report(results, candidate, budget, done, once(search, candidate))
            if rung + 1 < len(search.rungs):
                survivors = promoted(survivors, results, rung, search.keep)
        del images


def open_images(search: Search, accelerator: Accelerator) -> list[Pipeline]:
    """The images of every candidate. Raises `UserError` where one cannot have them, before anything
    is trained."""
    opened = []
    for candidate in search.candidates:
        try:
            manifest = open_dataset(candidate.config)
            split = partial(open_split, candidate.config, manifest, accelerator)
            opened += [split("train", train=True), split("val")]
        except UserError as error:
            raise UserError(f"candidate {candidate.label}: {error}") from None
    return opened


def shapes_together(candidates: list[Candidate]) -> list[Candidate]:
    """One after the other those of one model and batch size, which compile the same code."""
    kinds = [(each.config.model, each.config.train.batch_size) for each in candidates]
    order = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return [candidates[i] for i in sorted(range(len(kinds)), key=lambda i: order[kinds[i]])]


def promoted(
    candidates: list[Candidate], results: Results, rung: int, keep: float
) -> list[Candidate]:
    """The share `keep` of `candidates`, at least one: those with the highest top-1 at `rung`."""
    count = max(1, round(keep * len(candidates)))
    ranked = sorted(candidates, key=lambda each: -results.session[each.name].rounds[rung])
    return ranked[:count]


def train(config: Config, accelerator: Accelerator, deadline: float = math.inf) -> clock.Race:
    """A whole training by a new trainer, which finds compiled what an earlier one of the same
    shapes has compiled."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(config, RunDir(Path(scratch)), accelerator)
        done = clock.timed(trainer, config.train.seed, math.inf, deadline)
    del trainer
    accelerator.free_memory()  # it refers to the model and the optimizer
    return done


def report(
    results: Results,
    candidate: Candidate,
    budget: tuple[int, int],
    done: clock.Race,
    details: dict[str, Any],
) -> None:
    """Add a training to `results`, and print a line."""
    top1 = 0.0 if done.diverged else done.top1[-1]
    results.add(candidate.name, "top-1", top1, {"runs": done._asdict()}, details)
    epochs, seed = budget
    figure = "diverged" if done.diverged else f"{top1:.2%}"
    print(
        f"{figure:>8}  epochs: {epochs}, seed {seed}, {done.seconds:.1f} s: {candidate.label}",
        flush=True,
    )


def table(session: Session) -> str:
    """In Markdown: a row for each candidate with its settings and its top-1 after each rung, best
    first; after the last rung, where there are several seeds, their mean and deviation."""
    details = session.records[0].details
    head = [
        "candidate",
        *details["settings"],
        *(f"epochs: {n}" for n in details["rungs"]),
        "seconds",
    ]
    rows = [head, ["---"] * len(head)]
    for record in sorted(session.records, key=_rank):
        settings = map(setting_text, record.details["settings"].values())
        seconds = sum(run["seconds"] for run in record.details["runs"])
        rows.append([record.case, *settings, *_figures(record), f"{seconds:.1f}"])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    trained = f"{len(session.records)} of {details['candidates']} candidates"
    return "\n".join([*lines, "", f"{details['title']}: {trained}, successive halving."])


def _at_rungs(record: Record) -> list[list[float]]:
    """The top-1 values at each rung that `record` has trained."""
    last = len(record.details["rungs"]) - 1
    values = [[top1] for top1 in record.rounds[:last]]
    return [*values, record.rounds[last:]] if record.rounds[last:] else values


def _rank(record: Record) -> tuple[int, float]:
    """Lowest first: rungs trained, then the mean at the last of them."""
    values = _at_rungs(record)
    return -len(values), -statistics.mean(values[-1])


def _figures(record: Record) -> list[str]:
    """A cell for each rung; empty after the last that was trained."""
    runs = iter(record.details["runs"])
    cells = []
    for values in _at_rungs(record):
        diverged = any(run["diverged"] for run in itertools.islice(runs, len(values)))
        deviation = f" ± {statistics.stdev(values):.2%}" if len(values) > 1 else ""
        cells.append("diverged" if diverged else f"{statistics.mean(values):.2%}{deviation}")
    return [*cells, *[""] * (len(record.details["rungs"]) - len(cells))]


if __name__ == "__main__":
    raise SystemExit(main())
