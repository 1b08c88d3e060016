"""The report's distinct runs on one device, one after the other in a process.

    python -m benchmarks.report_runs --out DIR --limit 590 --set data.path=lease/dataset

They are those rows of `benchmarks.ablations` with figures in the report, with one seed. Runs that
earlier rentals finished, under benchmarks/results/, are not trained again. A rental keeps no
checkpoints, so that what it began and did not finish is lost at its end.
"""

import argparse
import shutil
import signal
import threading
from pathlib import Path

from benchmarks.ablations import report_studies
from fastlab.console import positive_float, run_command
from fastlab.options import add_set_option
from fastlab.study.child import stop_signals
from fastlab.study.folder import StudyDir, look
from fastlab.study.pool import Pool
from fastlab.study.reference import find_reference
from fastlab.study.screen import Screen
from fastlab.study.spec import Task, read_study, tasks_of

RESULTS = Path("benchmarks/results")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    limit = "stop after SECONDS; the run under way saves a checkpoint"
    parser.add_argument(
        "--limit", type=positive_float, required=True, metavar="SECONDS", help=limit
    )
    add_set_option(parser, "override one value of every configuration; may be repeated")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Train until the limit. Exit status: 1 where a run has failed, else 0."""
    tasks, folder = report_tasks(args.overrides), StudyDir(args.out)
    folder.create(tasks)
    restore(folder, tasks, RESULTS)
    todo = [task for task in tasks if look(folder, task).status != "finished"]
    with folder.resumable(), folder.locked() as lock, stop_signals() as stop:
        timer = threading.Timer(args.limit, stop.append, [signal.SIGTERM])
        timer.start()
        try:
            with Pool(folder, lock, 1) as pool:
                pool.run(todo, stop, Screen(folder, todo, {}, 1))
        finally:
            timer.cancel()
    statuses = [look(folder, task).status for task in tasks]
    print(f"{statuses.count('finished')} of {len(tasks)} runs are finished")
    return int("failed" in statuses)


def report_tasks(overrides: list[str]) -> list[Task]:
    """The distinct runs with figures in the report."""
    studies = [read_study(Path(path), overrides, seeds=1) for path in report_studies()]
    return [task for task in tasks_of(studies) if find_reference(task.config)]


def restore(folder: StudyDir, tasks: list[Task], results: Path) -> None:
    """Take over the records of the runs that an earlier rental finished."""
    for task in tasks:
        for earlier in sorted(results.glob(f"*/runs/{folder.path.name}")):
            there = StudyDir(earlier)
            if not folder.run(task).exists() and look(there, task).status == "finished":
                shutil.copytree(there.run(task), folder.run(task))


if __name__ == "__main__":
    raise SystemExit(main())
