"""The command `fastlab study`: plan the runs, train each configuration once, report.

    fastlab study configs/ablations/*.toml --out studies/all --jobs 4
    fastlab study configs/ablations/cnn-dropout.toml --out studies/narrow \\
        --epochs 2 --seeds 2 --only '*-seed0' \\
        --set data.path=data/tiny-imagenet-10 --set model.width=8

After a stop by Ctrl-C, SIGTERM or SIGKILL the same command resumes the study: a run that ended is
not run again, one that was stopped resumes from its checkpoint. `fastlab.study.spec` describes the
study files.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastlab.console import UserError, public_command
from fastlab.dataset.manifest import check_sizes, read_manifest
from fastlab.files import write_json
from fastlab.study.child import last_line, places, stop_signals
from fastlab.study.cluster import Cluster, cluster_options
from fastlab.study.estimate import estimate, estimate_text
from fastlab.study.folder import State, StudyDir, look, read_json
from fastlab.study.names import selected, with_names
from fastlab.study.pool import Pool
from fastlab.study.report import write_report
from fastlab.study.results import analyse, best_run
from fastlab.study.screen import Screen, counted
from fastlab.study.sequential import add_seeds, with_added
from fastlab.study.spec import Study, Task, read_study, tasks_of

_STATUSES = ("finished", "interrupted", "failed", "waiting")
_MARKS = {"finished": " ✓", "failed": " ✗", "interrupted": " ■"}


@dataclass(frozen=True)
class Request:
    """What is asked for; each field is the option of `fastlab study` with its name."""

    studies: list[Path]
    out: Path
    epochs: int = 0
    """0: those of the base configurations."""
    seeds: int = 0
    """0: those that the studies list."""
    jobs: int = 1
    only: Sequence[str] = ()
    until_decided: bool = False
    budget: float | None = None
    """Seconds; None: no limit."""
    overrides: Sequence[str] = ()
    """``section.key=value``, of ``--set``."""
    dry_run: bool = False
    no_calibration: bool = False
    retry: bool = False
    report_only: bool = False
    cluster: str | None = None
    cluster_set: Sequence[str] = ()


def run(args: Request) -> int:
    """Run the command. The exit status is 0 where every run that it is asked for is finished, 1
    where some are not, and 128 plus its number after a signal."""
    studies, options = read_studies(args), cluster_options([*args.cluster_set])
    folder = StudyDir(args.out)
    tasks = tasks_of(studies)
    chosen = selected(tasks, args.only)
    if args.report_only:
        if not args.out.is_dir():
            raise UserError(f"{args.out}: no such directory; leave --report-only out to train")
        return report(folder, studies, chosen)
    states = {task.name: look(folder, task) for task in tasks}
    todo = [task for task in chosen if is_wanted(states[task.name], args.retry)]
    print(plan(studies, tasks, states), flush=True)
    if not args.dry_run:
        check_datasets(todo)
    seconds, source = estimate(folder, tasks, todo, states, measure=not args.no_calibration)
    print(estimate_text(seconds, source, todo, args.jobs), flush=True)
    if args.dry_run:
        return 0
    folder.create(tasks)
    with folder.resumable(), folder.locked() as lock, stop_signals() as stop:
        # Another command, or trainings that outlived one, may have finished some runs meanwhile.
        todo = [task for task in todo if is_wanted(look(folder, task), args.retry)]
        cluster = nullcontext(Cluster(folder, args.jobs, options)) if args.cluster else None
        with cluster or Pool(folder, lock, args.jobs) as place:
            train = partial(_train, place, stop)
            train(todo, seconds)
            if args.until_decided and not stop:
                studies = add_seeds(folder, studies, train, args.jobs, args.budget)
                chosen = selected(tasks_of(studies), args.only)
    if stop:
        report(folder, studies, chosen)
        print("stopped; the same command resumes the study")
        return 128 + stop[-1]
    with folder.resumable():
        evaluate_best(folder, studies)
    return report(folder, studies, chosen)


def _train(
    place: Pool | Cluster, stop: list[int], tasks: list[Task], seconds: dict[str, float]
) -> None:
    place.run(tasks, stop, Screen(place.study, tasks, seconds, place.jobs))


def read_studies(args: Request) -> list[Study]:
    """The studies, with the names that their runs have in the folder. Raises `UserError` where one
    is not valid."""
    overrides = list(args.overrides)
    studies = [read_study(path, overrides, args.epochs, args.seeds) for path in args.studies]
    names = [study.name for study in studies]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}.toml: two studies of this name; rename one")
    return (with_added if args.until_decided else with_names)(StudyDir(args.out), studies)


def is_wanted(state: State, retry: bool) -> bool:
    """Whether to train the run: it is not finished, and has not failed unless `retry`."""
    return state.status != "finished" and (retry or state.status != "failed")


def check_datasets(tasks: list[Task]) -> None:
    """Raises `UserError` for a missing or incomplete dataset, once rather than in every run."""
    for path in sorted({task.config.data.path for task in tasks}):
        check_sizes(path, read_manifest(path))


def plan(studies: list[Study], tasks: list[Task], states: dict[str, State]) -> str:
    """The rows as text, each with where its runs stand."""
    lines = []
    for study in studies:
        lines.append(f"{study.name}: {study.title}")
        for row in study.rows:
            seeds = [f"{t.seed}{_MARKS.get(states[t.name].status, '')}" for t in row.tasks]
            name = row.tasks[0].name.rpartition("-seed")[0]
            lines.append(f"  {row.label:<28} {name:<22} seeds {', '.join(seeds)}")
    asked = sum(len(row.tasks) for study in studies for row in study.rows)
    shared = f" ({asked} asked for, {asked - len(tasks)} shared)" if asked > len(tasks) else ""
    counts = Counter(states[task.name].status for task in tasks)
    by_status = ", ".join(f"{counts[status]} {status}" for status in _STATUSES if counts[status])
    lines.append(f"{counted(len(tasks), 'run')}{shared}: {by_status}")
    if counts["failed"]:
        lines.append("failed runs are not repeated; --retry tries them again")
    return "\n".join(lines)


def evaluate_best(folder: StudyDir, studies: list[Study]) -> None:
    """Once all runs have ended, evaluate the model that validation chose on the test split."""
    if any(look(folder, task).status in ("waiting", "interrupted") for task in tasks_of(studies)):
        return
    best = best_run(analyse(folder, studies))
    if best and read_json(folder.test).get("run") != best.task.name:
        figures = _test_figures(folder, best.task)
        write_json(folder.test, {"run": best.task.name, **figures})


def _test_figures(folder: StudyDir, task: Task) -> dict[str, Any]:
    """The figures of a run on the test split, or a note why there are none."""
    split = read_manifest(task.config.data.path).splits.get("test")
    if split is None or not split.images:
        return {"note": "The dataset has no labelled test split."}
    run = str(folder.run(task))
    command = [sys.executable, "-m", "fastlab", "evaluate", run, "--split", "test", "--json"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **places(1)[0]})
    if done.returncode:
        return {"note": f"The test split could not be evaluated: {last_line(done.stderr)}"}
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return {key: figures[key] for key in ("loss", "top1", "top5", "images", "tta")}


def report(folder: StudyDir, studies: list[Study], tasks: list[Task]) -> int:
    """Write the report and print where the runs stand. 0: every run is finished; else 1."""
    write_report(folder, studies, public_command(sys.argv))
    statuses = [look(folder, task).status for task in tasks]
    finished, failed = statuses.count("finished"), statuses.count("failed")
    failures = f", {failed} failed (logs in {folder.path / 'logs'})" if failed else ""
    print(f"{finished} of {len(tasks)} runs finished{failures}; report: {folder.html}")
    return 0 if finished == len(tasks) else 1
