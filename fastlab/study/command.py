"""Ablation studies: plan the grid, train each configuration once, report.

    python -m fastlab.study.command configs/ablations/*.toml --out studies/all --jobs 4
    python -m fastlab.study.command configs/ablations/cnn-dropout.toml --out studies/narrow \\
        --epochs 2 --seeds 2 --set data.path=data/tiny-imagenet-10 --set model.width=8

The same command goes on where it was stopped, by Ctrl-C, SIGTERM or SIGKILL: a run that ended is
never run again, one that was stopped resumes from its checkpoint. A study is a TOML file;
benchmarks/grid.py says what it may hold.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlab import config as configs
from fastlab.console import UserError, positive_int, run_command
from fastlab.dataset.manifest import check_sizes, read_manifest
from fastlab.report.page import train_seconds
from fastlab.study import report as studying
from fastlab.study.pool import (
    Pool,
    Screen,
    State,
    Stop,
    StudyDir,
    clock,
    look,
    places,
    run_on_cluster,
)
from fastlab.study.spec import Study, Task, read_study, tasks_of

# Python, torch and the dataset, before the first step; measured on two cores of an AMD EPYC.
_START_SECONDS = 5.0

_EVALUATE = "import sys; from fastlab.cli import main; sys.exit(main())"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY.toml")
    parser.add_argument("--out", type=Path, required=True, help="directory of runs and report")
    parser.add_argument("--epochs", type=positive_int, default=0, help="of every run")
    parser.add_argument(
        "--seeds", type=positive_int, default=0, help="how many (default: the study's)"
    )
    parser.add_argument("--jobs", type=positive_int, default=1, help="trainings side by side")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="change the base configurations; a study's own rows come after",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, train nothing")
    parser.add_argument(
        "--no-calibration",
        action="store_true",
        help="do not measure epochs for the estimate, only take them from finished runs",
    )
    parser.add_argument("--retry", action="store_true", help="try failed runs again")
    parser.add_argument("--report-only", action="store_true", help="report what is there")
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local"),
        help="hand the runs to SLURM through submitit; local: start all at once, to try it",
    )
    parser.add_argument(
        "--cluster-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of submitit, such as timeout_min=600 or slurm_partition=gpu",
    )
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "-m", "fastlab.study.command", *argv])
    return run_command(run, args)


def run(args: argparse.Namespace) -> int:
    """0: every run is finished; 1: some are not; 128 and its number after a signal."""
    studies, settings = read_studies(args), cluster_settings(args.cluster_set)
    tasks, folder = tasks_of(studies), StudyDir(args.out)
    if args.report_only:
        if not args.out.is_dir():
            raise UserError(f"{args.out}: no such directory; leave --report-only out to train")
        return report(folder, studies, tasks, args.command)
    states = {task.name: look(folder, task) for task in tasks}
    todo = [task for task in tasks if _wanted(states[task.name], args.retry)]
    print(plan(studies, tasks, states), flush=True)
    if not args.dry_run:
        check_datasets(todo)
    seconds, source = estimate(folder, tasks, todo, states, calibrate=not args.no_calibration)
    print(estimate_text(seconds, todo, source, args.jobs), flush=True)
    if args.dry_run:
        return 0
    folder.create(tasks)
    with folder.locked() as lock, Stop() as stop:
        # Another command, or trainings that outlived it, may have ended some meanwhile.
        todo = [task for task in todo if _wanted(look(folder, task), args.retry)]
        screen = Screen(folder, todo, seconds, args.jobs)
        if args.cluster:
            run_on_cluster(folder, todo, args.jobs, args.cluster, settings, stop, screen)
        else:
            Pool(folder, lock, args.jobs, places(args.jobs)).run(todo, stop, screen)
    if stop.asked:
        report(folder, studies, tasks, args.command)
        print("stopped; the same command goes on with it")
        return 128 + stop.number
    evaluate_best(folder, studies)
    return report(folder, studies, tasks, args.command)


def read_studies(args: argparse.Namespace) -> list[Study]:
    studies = [read_study(path, args.overrides, args.epochs, args.seeds) for path in args.studies]
    names = [study.name for study in studies]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}.toml: two studies of this name; rename one")
    return studies


def _wanted(state: State, retry: bool) -> bool:
    return state.name != "finished" and (retry or state.name != "failed")


def check_datasets(tasks: list[Task]) -> None:
    """Raises `UserError` here, once, rather than in every run."""
    for path in sorted({task.config.data.path for task in tasks}):
        check_sizes(Path(path), read_manifest(Path(path)))


def plan(studies: list[Study], tasks: list[Task], states: dict[str, State]) -> str:
    """The grid as text: a line a row, with where its runs stand."""
    lines = []
    for study in studies:
        lines.append(f"{study.name}: {study.title}")
        for row in study.rows:
            seeds = ", ".join(_seed_text(task, states) for task in row.tasks)
            name = row.tasks[0].name.rpartition("-seed")[0]
            lines.append(f"  {row.label:<28} {name:<22} seeds {seeds}")
    asked = sum(len(row.tasks) for study in studies for row in study.rows)
    counts = {name: 0 for name in ("finished", "interrupted", "failed", "waiting")}
    for task in tasks:
        counts[states[task.name].name] += 1
    shared = f" ({asked} asked for, {asked - len(tasks)} shared)" if asked > len(tasks) else ""
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    lines.append(f"{_counted(len(tasks), 'run')}{shared}: {said}")
    if counts["failed"]:
        lines.append("failed runs stay as they are; --retry tries them again")
    return "\n".join(lines)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _seed_text(task: Task, states: dict[str, State]) -> str:
    mark = {"finished": " ✓", "failed": " ✗", "interrupted": " ■"}
    return f"{task.seed}{mark.get(states[task.name].name, '')}"


# The estimate


def estimate(
    folder: StudyDir, tasks: list[Task], todo: list[Task], states: dict[str, State], calibrate: bool
) -> tuple[dict[str, float], str]:
    """Seconds of what is left of each run in `todo` that anything is known about, and where from:
    the epochs of finished runs that cost the same, else a measurement of some steps."""
    known: dict[str, list[float]] = {}
    for task in tasks:
        if states[task.name].name == "finished" and (epoch := _epoch_seconds(folder, task)):
            known.setdefault(_cost(task), []).append(epoch)
    epochs = {cost: sum(found) / len(found) for cost, found in known.items()}
    unknown = {_cost(task): task for task in todo if _cost(task) not in epochs}
    measured, problem = _calibrated(list(unknown.values())) if calibrate and unknown else ({}, "")
    epochs |= {
        _cost(task): measured[task.name] for task in unknown.values() if task.name in measured
    }
    seconds = {
        task.name: _START_SECONDS
        + epochs[_cost(task)] * (task.config.train.epochs - states[task.name].epochs)
        for task in todo
        if _cost(task) in epochs
    }
    used = {_cost(task) for task in todo}
    sources = [
        (len(used & known.keys()), "from finished runs"),
        (len(measured), "measured now, some steps without torch.compile"),
        (len(used - epochs.keys()), f"not known{problem and f' ({problem})'}"),
    ]
    said = ", ".join(f"{count} {source}" for count, source in sources if count)
    return seconds, f"epochs of {_counted(len(used), 'kind')} of run: {said}"


def _cost(task: Task) -> tuple[Any, ...]:
    """Equal for runs whose epochs take about the same time."""
    data, model, train = task.config.data, task.config.model, task.config.train
    return (
        *(data.path, data.pipeline, data.placement),
        *(model.name, model.width, model.batch_norm, model.shortcuts),
        *(train.batch_size, train.precision, train.channels_last, train.compile),
    )


def _epoch_seconds(folder: StudyDir, task: Task) -> float | None:
    result = studying.read_result(folder, task)
    seconds = train_seconds(result.run) if result.run else None
    return seconds / len(result.run.epochs) if seconds else None


def _calibrated(tasks: list[Task]) -> tuple[dict[str, float], str]:
    """Seconds an epoch of each task that could be measured; why not, for the others."""
    print(f"measuring an epoch's time, {_counted(len(tasks), 'kind')} of run", flush=True)
    found, problem = {}, ""
    by_precision = sorted(tasks, key=_precision)  # which is fixed for a process
    with tempfile.TemporaryDirectory() as directory:
        for _, group in itertools.groupby(by_precision, key=_precision):
            for name, line in _calibrate(Path(directory), list(group)):
                found |= {name: line["epoch"]} if "epoch" in line else {}
                problem = line.get("error", problem)
    return found, problem


def _precision(task: Task) -> str:
    return task.config.train.precision


def _calibrate(directory: Path, tasks: list[Task]) -> Iterator[tuple[str, dict[str, Any]]]:
    for task in tasks:
        (directory / task.name).write_text(configs.dump(task.config), encoding="utf-8")
    command = [sys.executable, "-m", "fastlab.study.calibrate"]
    command += [str(directory / task.name) for task in tasks]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **places(1)[0]}
    )
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            yield Path(found["config"]).name, found
    if done.returncode:
        yield "", {"error": (done.stderr.strip().splitlines() or ["ended without a word"])[-1]}


def estimate_text(seconds: dict[str, float], todo: list[Task], source: str, jobs: int) -> str:
    if not todo:
        return "nothing left to train"
    if not seconds:
        return f"no estimate of time: {source}"
    total = sum(seconds.values())
    known = "" if len(seconds) == len(todo) else f" for {len(seconds)} of the {len(todo)} runs"
    jobs = min(jobs, len(todo))
    side = f", at best {clock(total / jobs)} with --jobs {jobs}" if jobs > 1 else ""
    return f"about {clock(total)} of training{known}{side}; {source}"


# Afterwards


def cluster_settings(texts: list[str]) -> dict[str, Any]:
    """``key=value`` as submitit takes them: numbers and booleans as such, else text."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key.isidentifier() or not equals:
            raise UserError(f"--cluster-set {text}: expected key=value, such as timeout_min=600")
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):
            found[key] = value
    return found


def evaluate_best(folder: StudyDir, studies: list[Study]) -> None:
    """Look at the test split once, with the model that validation chose, when all runs ended."""
    best = studying.best_run(studying.analyse(folder, studies))
    left = [
        task for task in tasks_of(studies) if look(folder, task).name in ("waiting", "interrupted")
    ]
    if best is None or left or studying.read_test(folder).get("run") == best.task.name:
        return
    studying.remember_test(folder, {"run": best.task.name, **_test_figures(folder, best.task)})


def _test_figures(folder: StudyDir, task: Task) -> dict[str, Any]:
    split = read_manifest(Path(task.config.data.path)).splits.get("test")
    if split is None or not split.images:
        return {"note": "The dataset has no labelled test split."}
    command = [sys.executable, "-c", _EVALUATE, "evaluate", str(folder.run(task))]
    command += ["--split", "test", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **places(1)[0]}
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["ended without a word"])[-1]
        return {"note": f"The test split could not be evaluated: {reason}"}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {key: found[key] for key in ("loss", "top1", "top5", "images")}


def report(folder: StudyDir, studies: list[Study], tasks: list[Task], command: str) -> int:
    studying.write_report(folder, studies, command)
    states = [look(folder, task) for task in tasks]
    finished = sum(state.name == "finished" for state in states)
    failed = sum(state.name == "failed" for state in states)
    print(
        f"{finished} of {len(tasks)} runs finished"
        + (f", {failed} failed (logs in {folder.path / 'logs'})" if failed else "")
        + f"; report: {folder.html}"
    )
    return 0 if finished == len(tasks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
