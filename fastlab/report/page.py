"""One HTML page about runs: results, curves, sample predictions, configuration."""

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from fastlab import __version__
from fastlab.config import tta_label
from fastlab.console import UserError, public_text, tell
from fastlab.files import write_atomically
from fastlab.report.charts import DRAWING, make_plots, make_rate_plots
from fastlab.report.comparison import Standing, differing_settings, ranked
from fastlab.report.texts import (
    duration_text,
    flat,
    flat_rows,
    number_text,
    percent_text,
    setting_text,
)
from fastlab.run_records import (
    EPOCH_KEYS,
    Run,
    best_epoch,
    images_per_second,
    read_run,
    train_seconds,
)
from fastlab.runs import NotYetARun

_TEMPLATES = Path(__file__).with_name("templates")
_MANY = 12  # with more runs, the details of each are folded, and only the best have pictures
_PICTURED = 3
_DRAWN = 40  # as many curves as have a colour and a marker of their own


def write_report(run_dirs: Sequence[Path | str], out: Path | str) -> None:
    """Write one self-contained HTML page about the runs, the best first, to `out`.

    A directory given twice counts once. What is not a run yet is left out, with a line on standard
    error. `out` is replaced as a whole or left unchanged. Raises UserError where no run is left, a
    path does not exist, a file of a run is missing or malformed, or where `out` does not end in
    .html or cannot be written.
    """
    out, run_dirs = Path(out), [Path(directory) for directory in run_dirs]
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: expected a file name that ends in .html")
    distinct = {Path(os.path.realpath(directory)): directory for directory in run_dirs}
    standings = ranked(_read_runs(distinct))
    runs = [standing.run for standing in standings]
    pictured = len(runs) if len(runs) <= _MANY else _PICTURED
    values = {
        "runs": [_run(place, index < pictured) for index, place in enumerate(standings)],
        "many": len(runs) > _MANY,
        "pictured": pictured,
        "differing": differing_settings(runs),
        "datasets": _dataset_texts(standings),
        "plots": make_plots(runs[:_DRAWN]) + make_rate_plots(runs[:_DRAWN]),
        "drawn": _DRAWN,
    }
    write_whole(out, render("report.html.j2", **values))


def _run(standing: Standing, pictured: bool) -> dict[str, Any]:
    """What the template says of a run; without pictures unless `pictured`."""
    run = standing.run
    return {
        "name": run.name,
        "number": standing.dataset,
        "best": standing.best,
        "result": _result(run),
        "dataset": _dataset_text(run),
        "config": {
            name: [(key, setting_text(value)) for key, value in flat(section).items()]
            for name, section in run.config.items()
        },
        "environment": flat_rows(run.environment),
        "predictions": run.predictions if pictured else [],
        "errors": run.errors if pictured else None,
        "tta": _tta(run),
    }


def _dataset_texts(standings: list[Standing]) -> list[str]:
    """Each dataset in a phrase, by number."""
    first = {number: run for run, number, _ in reversed(standings)}
    return [_dataset_text(first[number]) or "not recorded" for number in sorted(first)]


def _read_runs(given: dict[Path, Path]) -> list[Run]:
    """The runs at the paths `given`, each by its real path."""
    runs, left_out = [], []
    for path, directory in given.items():
        try:
            run = read_run(directory, _name(path, list(given)))
            runs.append(replace(run, name=run.name + _tta(run)))
        except NotYetARun as error:
            left_out.append(error)
    if not runs and len(left_out) == 1:
        raise left_out[0]
    for error in left_out:
        tell(f"left out: {error}")
    if not runs:
        raise UserError(f"none of {len(left_out)} paths is a run with an epoch; nothing to report")
    return runs


def _name(path: Path, paths: list[Path]) -> str:
    """The last part of `path`, with as many parents as distinguish it from the other `paths`."""
    tails = (path.parts[-depth:] for depth in range(1, len(path.parts) + 1))
    return next(
        "/".join(tail)
        for tail in tails
        if sum(other.parts[-len(tail) :] == tail for other in paths) == 1
    )


def _result(run: Run) -> dict[str, str]:
    """The run's row in the results table, each value as text."""
    best = best_epoch(run) or dict.fromkeys(("epoch", *EPOCH_KEYS))
    last = run.epochs[-1]
    classes = run.summary.get("classes")
    return {
        "model": _setting(run, "model", "name"),
        "parameters": number_text(run.summary.get("parameters")),
        "epochs": f"{last['epoch']} of {_setting(run, 'train', 'epochs')}",
        "skipped_epochs": run.summary.get("skipped_epochs", ""),
        "best_top1": percent_text(best["val_top1"]),
        "best_epoch": number_text(best["epoch"]),
        "best_top5": percent_text(best["val_top5"]),
        "best_loss": number_text(best["val_loss"], 4),
        "final_top1": percent_text(last["val_top1"]),
        "chance": percent_text(1 / classes if classes else None),
        "images_per_second": number_text(images_per_second(run)),
        "time": duration_text(train_seconds(run)),
        "status": str(run.summary.get("status") or "unknown"),
    }


def _setting(run: Run, section: str, key: str) -> str:
    return setting_text(run.config.get(section, {}).get(key))


def _tta(run: Run) -> str:
    """The label of the run's validation figures; earlier versions had none."""
    return tta_label(str(run.config.get("evaluate", {}).get("tta", "none")))


def _dataset_text(run: Run) -> str:
    """Describe the dataset in one phrase; empty where the run has no summary."""
    summary = run.summary
    if not summary.get("dataset"):
        return ""
    parts = [str(summary["dataset"]), f"{number_text(summary['classes'])} classes"]
    parts += [f"{number_text(count)} {split} images" for split, count in summary["counts"].items()]
    if skipped := summary["skipped"]:
        parts.append(f"{number_text(skipped)} corrupt images left out")
    return ", ".join(parts)


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package; parts.html.j2 finds what it needs among the globals.

    Pages are passed on to other people, so absolute paths are shortened.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    shared = {
        **DRAWING,
        "number": number_text,
        "percent": percent_text,
        "now": datetime.now(UTC),
        "version": __version__,
    }
    return public_text(environment.get_template(template, globals=shared).render(**values))


def write_whole(out: Path, page: str) -> None:
    """Replace `out` as a whole, or leave it unchanged and raise `UserError`."""
    try:
        # A lone surrogate is valid JSON but not valid UTF-8.
        write_atomically(out, page.encode(errors="replace"))
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}): choose a file in a writable folder"
        ) from error
