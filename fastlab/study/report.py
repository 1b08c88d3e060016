"""The report of studies: `report.html`, and the same tables without curves as `report.md`."""

import itertools
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastlab import config as configs
from fastlab.report.page import (
    duration_text,
    flat_rows,
    make_plots,
    number_text,
    percent_text,
    render,
    write_whole,
)
from fastlab.report.texts import MISSING, formatted
from fastlab.run_records import EPOCH_KEYS, Epoch, Run, images_per_second, train_seconds
from fastlab.study.folder import StudyDir, read_json
from fastlab.study.reference import (
    MEAN_OF_PRINTED,
    find_reference,
    reference_figures,
    reference_table,
)
from fastlab.study.results import (
    RowResult,
    RunResult,
    StudyResult,
    Verdict,
    analyse,
    best_run,
    listed,
    paired_difference,
)
from fastlab.study.spec import Study
from fastlab.study.statistics import Interval, interval

# These differ between any two runs: memory too, since a virtual machine's reported memory changes.
_OF_ONE_RUN = ("command", "date", "machine.memory_gib")


class _Metric(NamedTuple):
    """A column of every table: a figure of a row, scaled."""

    key: str
    title: str
    figure: str
    scale: float
    decimals: int


_METRICS = (
    _Metric("top1", "top-1 %", "top1", 100, 2),
    _Metric("top5", "top-5 %", "top5", 100, 2),
    _Metric("loss", "loss", "loss", 1, 3),
    _Metric("printed", "as printed", "loss", 1 / MEAN_OF_PRINTED, 4),
)
_COLUMNS = (
    *((metric.key, metric.title) for metric in _METRICS),
    ("rate", "images/s"),
    ("time", "time"),
    ("seeds", "seeds"),
    ("paired", "top-1 against the first"),
)


def write_report(folder: StudyDir, studies: list[Study], command: str) -> None:
    """Write both files, about the runs that are finished so far. `command` is shown as what made
    them."""
    page = _page(folder, analyse(folder, studies), command)
    write_whole(folder.html, render("study.html.j2", **page))
    write_whole(folder.markdown, render("study.md.j2", **page))


def _page(folder: StudyDir, results: list[StudyResult], command: str) -> dict[str, Any]:
    """Everything that both files show, as text except for the plots."""
    runs = {run.task.name: run for study in results for row in study.rows for run in row.runs}
    environments = [run.run.environment for run in runs.values() if run.run]
    records = [folder.read_record(run.task) for run in runs.values()]
    return {
        "command": command,
        "scale": _scale_note(list(runs.values())),
        "finished": sum(run.run is not None for run in runs.values()),
        "columns": _COLUMNS,
        "studies": [_study(study) for study in results],
        "runs": [_run(run) for run in runs.values()],
        "verdicts": _verdicts(results),
        "best": _best(folder, results),
        "environment": _environment(environments),
        "side_by_side": max((record.get("side_by_side", 1) for record in records), default=1),
    }


def _scale_note(runs: list[RunResult]) -> str:
    """How the runs' scale differs from the reference's; empty where it does not."""
    configurations = [run.task.config for run in runs]
    summaries = [run.run.summary for run in runs if run.run and run.run.summary]
    values: dict[str, set[float | None]] = {
        "classes": {summary["classes"] for summary in summaries},
        "pixels a side": {summary["image_size"] for summary in summaries},
        "training images": {summary["counts"].get("train") for summary in summaries},
        "validation images": {summary["counts"].get("val") for summary in summaries},
        "base width": {config.model.width for config in configurations},
        "epochs": {config.train.epochs for config in configurations},
        "images a batch": {config.train.batch_size for config in configurations},
    }
    parts = []
    for name, reference in reference_table()["scale"].items():
        known = sorted(value for value in values[name] if value is not None)
        if known and known != [reference]:
            text = " or ".join(f"{value:,}" for value in known)
            parts.append(f"{name} {text} (reference: {reference:,})")
    return "; ".join(parts)


def _study(result: StudyResult) -> dict[str, Any]:
    curves = [row for row in result.rows if row.finished]
    rows = [_row(row, result.rows[0]) for row in result.rows]
    return {
        "name": result.study.name,
        "title": result.study.title,
        "about": result.study.about,
        "rows": rows,
        "notes": [f"{row['label']}: {note}" for row in rows for note in row["notes"]],
        "curves": [row.title for row in curves],
        "plots": make_plots([_mean_run(row) for row in curves]) if curves else [],
    }


def _mean_run(row: RowResult) -> Run:
    """The curves of a row: the means over its finished seeds, up to the last epoch of all."""
    means: list[Epoch] = []
    for epochs in zip(*(run.epochs for run in row.finished), strict=False):
        over_seeds = {key: interval([epoch[key] for epoch in epochs]) for key in EPOCH_KEYS}
        mean = {key: figure.mean if figure else None for key, figure in over_seeds.items()}
        means.append({"epoch": epochs[0]["epoch"], **mean})
    return Run(row.title, {}, {}, row.finished[0].summary, means, [])


def _row(row: RowResult, first: RowResult) -> dict[str, Any]:
    """The lines of a row in its study's table, each cell as text, with notes and links. Rate and
    time are medians over the finished seeds."""
    rates = [rate for run in row.finished if (rate := images_per_second(run)) is not None]
    times = [time for run in row.finished if (time := train_seconds(run)) is not None]
    reference = find_reference(row.row.config)
    here = {
        "who": "here",
        **_cells(row.figures),
        "rate": number_text(statistics.median(rates) if rates else None),
        "time": duration_text(statistics.median(times) if times else None),
        "seeds": f"{len(row.finished)} of {len(row.runs)}",
        "paired": "" if row is first else _paired_cell(paired_difference(row, first)),
    }
    return {
        "label": row.title,
        "lines": [here, *(_reference_lines(row, reference) if reference else [])],
        "notes": [_note(run) for run in row.runs if not run.run],
        "tasks": row.row.tasks,
    }


def _paired_cell(difference: Interval | None) -> str:
    if difference is None:
        return MISSING
    sign = "+" if difference.mean > 0 else ""
    return sign + difference.text(100)


def _note(run: RunResult) -> str:
    reason = f": {run.state.reason}" if run.state.reason else ""
    return f"seed {run.task.seed} {run.state.status}{reason}"


def _reference_lines(row: RowResult, reference: dict[str, float]) -> list[dict[str, str]]:
    """The reference's figures, and the difference of the row's from them."""
    differences = {}
    for metric in _METRICS:
        here = row.figures[metric.figure]
        distance = metric.scale * (here.mean - reference[metric.figure]) if here else None
        differences[metric.key] = formatted(distance, f"+.{metric.decimals}f")
    untimed = {"rate": MISSING, "time": MISSING, "seeds": "1", "paired": ""}
    return [
        {"who": "reference", **_cells(reference), **untimed},
        {"who": "difference", **differences, **dict.fromkeys(untimed, "")},
    ]


def _cells(figures: Mapping[str, Any]) -> dict[str, str]:
    """The cells of "top1", "top5" and "loss" in `figures`, each an interval, a number or None."""
    return {metric.key: _cell(figures[metric.figure], metric) for metric in _METRICS}


def _cell(value: Interval | float | None, metric: _Metric) -> str:
    if isinstance(value, Interval):
        return value.text(metric.scale, metric.decimals)
    return number_text(None if value is None else metric.scale * value, metric.decimals)


def _verdicts(results: list[StudyResult]) -> dict[str, list[tuple[Study, Verdict]]]:
    """The verdicts under their headings; none of these without verdicts."""
    verdicts = [(study.study, verdict) for study in results for verdict in study.verdicts]
    groups = {
        "What the reference found, here": [v for v in verdicts if v[1].finding.reported],
        "Other questions": [v for v in verdicts if not v[1].finding.reported],
    }
    return {title: group for title, group in groups.items() if group}


def _run(result: RunResult) -> dict[str, Any]:
    return {
        "name": result.task.name,
        "state": result.state,
        "tta": configs.tta_label(result.task.config.evaluate.tta),
        "epochs": f"{result.state.epochs} of {result.task.config.train.epochs} epochs",
        "top1": percent_text(result.best["val_top1"] if result.best else None),
        "config": configs.dump(result.task.config),
    }


def _best(folder: StudyDir, results: list[StudyResult]) -> dict[str, Any]:
    """What is shown of the best run; empty without a finished one."""
    best = best_run(results)
    if not (best and best.best):
        return {}
    figures = {key.removeprefix("val_"): value for key, value in best.best.items()}
    label = configs.tta_label(best.task.config.evaluate.tta)
    rows = [{"split": f"validation{label}", **_cells(figures)}]
    tested = read_json(folder.test)
    if tested.get("run") == best.task.name and "top1" in tested:
        rows.append(
            {"split": f"test{configs.tta_label(tested.get('tta', 'none'))}", **_cells(tested)}
        )
        reference = reference_figures(reference_table()["test"])
        rows.append({"split": "reference, test", **_cells(reference)})
    of_best = [row for study in results for row in study.rows if best.task in row.row.tasks]
    lacking = list(dict.fromkeys(seed for row in of_best for seed in row.lacking))
    notes = [f"Its row lacks {listed(lacking)}."] if lacking else []
    note = " ".join([*notes, tested.get("note", "")]).strip()
    return {"name": best.task.name, "rows": rows, "note": note}


def _environment(environments: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rows of key and text; where runs differ, each text that occurs."""
    texts: dict[str, dict[str, None]] = {}
    for key, text in itertools.chain.from_iterable(map(flat_rows, environments)):
        if key not in _OF_ONE_RUN:
            texts.setdefault(key, {})[text] = None
    dates = sorted(str(environment.get("date", "")) for environment in environments)
    span = [("runs begun", " to ".join(dict.fromkeys([dates[0], dates[-1]])))] if dates else []
    return span + [(key, " | ".join(different)) for key, different in texts.items()]
