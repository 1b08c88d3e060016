"""The report of studies: `report.html`, and the same tables without curves as `report.md`."""

import base64
import hashlib
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
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
from fastlab.study.figures import draw_dots, draw_scatter, factor_of, median_rate
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
from fastlab.study.screen import counted
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


_SCRIPT = Path(__file__).parents[1] / "report" / "templates" / "study.js"
_DECISIONS = {"holds": "Confirmed", "does not hold": "Refuted", "undecided": "Undecided"}
_METRICS = (
    _Metric("top1", "top-1 %", "top1", 100, 2),
    _Metric("top5", "top-5 %", "top5", 100, 2),
    _Metric("loss", "loss", "loss", 1, 3),
    _Metric("printed", "as printed", "loss", 1 / MEAN_OF_PRINTED, 4),
)
_OTHER_COLUMNS = (
    ("rate", "images/s"),
    ("time", "time"),
    ("seeds", "seeds"),
    ("paired", "top-1 against the first"),
)


def write_report(folder: StudyDir, studies: list[Study], command: str) -> None:
    """Write both files, about the runs that are finished so far. `command` is shown as what made
    them."""
    page = _page(folder, analyse(folder, studies), command)
    script = _SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page_of_studies = render(
        "study.html.j2", script=script, script_hash=digest, signed=_signed, **page
    )
    write_whole(folder.html, page_of_studies)
    write_whole(folder.markdown, render("study.md.j2", **page))


def _page(folder: StudyDir, results: list[StudyResult], command: str) -> dict[str, Any]:
    """Everything that both files show, as text except for the drawings."""
    runs = {run.task.name: run for study in results for row in study.rows for run in row.runs}
    environments = [run.run.environment for run in runs.values() if run.run]
    records = [folder.read_record(run.task) for run in runs.values()]
    referenced = [study for study in results if _is_referenced(study)]
    return {
        "command": command,
        "scale": _scale_note([r for study in referenced for row in study.rows for r in row.runs]),
        "referenced": bool(referenced),
        "counts": _counts([run.state.status for run in runs.values()]),
        "studies": [_study(study) for study in results],
        "scatter": draw_scatter(results),
        "runs": [_run(run) for run in runs.values()],
        "verdicts": _verdicts(results),
        "decided": _decided_text(results),
        "best": _best(folder, results),
        "environment": _environment(environments),
        "side_by_side": max((record.get("side_by_side", 1) for record in records), default=1),
    }


def _counts(statuses: list[str]) -> str:
    """How many runs there are, and where those that are not finished stand."""
    counts = Counter(statuses)
    finished = counts.pop("finished", 0)
    rest = "".join(f", {count} {status}" for status, count in counts.items())
    return f"{finished} of {counted(len(statuses), 'run')} finished{rest}"


def _is_referenced(study: StudyResult) -> bool:
    """Whether the reference has a row of the study."""
    return any(find_reference(row.row.config) for row in study.rows)


def _metric_columns(referenced: bool) -> list[tuple[str, str]]:
    return [(m.key, m.title) for m in _METRICS if referenced or m.key != "printed"]


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
        "epochs of patience": {config.schedule.patience for config in configurations},
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
    referenced = _is_referenced(result)
    return {
        "name": result.study.name,
        "title": result.study.title,
        "about": result.study.about,
        "factor": factor_of(result.rows),
        "referenced": referenced,
        "columns": [*_metric_columns(referenced), *_OTHER_COLUMNS],
        "dots": draw_dots(result.rows),
        "extremes": _extremes(result),
        "rows": rows,
        "notes": [f"{row['label']}: {note}" for row in rows for note in row["notes"]],
        "curves": [row.title for row in curves],
        "plots": make_plots([_mean_run(row) for row in curves], [row.finished for row in curves])
        if curves
        else [],
    }


def _extremes(result: StudyResult) -> list[tuple[str, str, str]]:
    """The best and the worst run: which it is, its name and its top-1 in percent; both are left
    out with fewer than two runs."""
    runs = [run for row in result.rows for run in row.runs if run.best]
    ranked = sorted(runs, key=lambda run: (run.best or {})["val_top1"] or 0.0, reverse=True)
    ends = {"best": ranked[0], "worst": ranked[-1]} if len(ranked) > 1 else {}
    return [
        (which, run.task.name, percent_text((run.best or {})["val_top1"]))
        for which, run in ends.items()
    ]


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
    times = [time for run in row.finished if (time := train_seconds(run)) is not None]
    reference = find_reference(row.row.config)
    here = {
        "who": "here",
        **_cells(row.figures),
        "rate": number_text(median_rate(row)),
        "time": duration_text(statistics.median(times) if times else None),
        "seeds": f"{len(row.finished)} of {len(row.runs)}",
        "paired": "" if row is first else _signed(paired_difference(row, first)),
    }
    return {
        "label": row.title,
        "lines": [here, *(_reference_lines(row, reference) if reference else [])],
        "notes": _notes(row),
        "tasks": row.row.tasks,
    }


def _signed(difference: Interval | None) -> str:
    if difference is None:
        return MISSING
    sign = "+" if difference.mean > 0 else ""
    return sign + difference.text(100)


def _notes(row: RowResult) -> list[str]:
    """Which seeds are not finished and why, those with the same reason together."""
    seeds: dict[str, list[int]] = {}
    for run in row.runs:
        if not run.run:
            reason = f": {run.state.reason}" if run.state.reason else ""
            seeds.setdefault(run.state.status + reason, []).append(run.task.seed)
    return [f"{_seeds_text(numbers)} {why}" for why, numbers in seeds.items()]


def _seeds_text(seeds: list[int]) -> str:
    if len(seeds) > 2 and seeds == [*range(seeds[0], seeds[-1] + 1)]:
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seed{'s' if len(seeds) > 1 else ''} {listed([str(seed) for seed in seeds])}"


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


def _verdicts(results: list[StudyResult]) -> dict[str, list[tuple[Study, Verdict, bool]]]:
    """The verdicts under the heading of their decision, each with its study and whether the
    reference makes the claim; no heading without any."""
    groups: dict[str, list[tuple[Study, Verdict, bool]]] = {h: [] for h in _DECISIONS.values()}
    for study in results:
        for verdict in study.verdicts:
            reported = verdict.finding.reported and _is_referenced(study)
            groups[_DECISIONS[verdict.decision]].append((study.study, verdict, reported))
    return {heading: group for heading, group in groups.items() if group}


def _decided_text(results: list[StudyResult]) -> str:
    """How many claims are decided, and how; empty without claims."""
    decisions = [str(verdict.decision) for study in results for verdict in study.verdicts]
    held, refuted, undecided = map(decisions.count, _DECISIONS)
    if not decisions:
        return ""
    claims = counted(len(decisions), "claim")
    counts = f"{held} confirmed (✓), {refuted} refuted (✗), {undecided} undecided (?)"
    return f"{claims} about validation top-1: {counts}."


def _run(result: RunResult) -> dict[str, Any]:
    best = result.best or {}
    return {
        "name": result.task.name,
        "state": result.state,
        "tta": configs.tta_label(result.task.config.evaluate.tta),
        "epochs": f"{result.state.epochs} of {result.task.config.train.epochs} epochs",
        "skipped_epochs": result.run.summary.get("skipped_epochs", "") if result.run else "",
        "top1": percent_text(best.get("val_top1")),
        "facts": _facts(result.run, best) if result.run and best else "",
        "config": configs.dump(result.task.config),
    }


def _facts(run: Run, best: Epoch) -> str:
    """The figures of a finished run in a sentence."""
    cells = [f"{metric.title} {_cell(best[f'val_{metric.figure}'], metric)}" for metric in _METRICS]
    return (
        f"Best epoch {number_text(best['epoch'])}: {', '.join(cells[:3])}. Training took "
        f"{duration_text(train_seconds(run))} at {number_text(images_per_second(run))} images/s."
    )


def _best(folder: StudyDir, results: list[StudyResult]) -> dict[str, Any]:
    """What is shown of the best run; empty without a finished one."""
    best = best_run(results)
    if not (best and best.best):
        return {}
    figures = {key.removeprefix("val_"): value for key, value in best.best.items()}
    label = configs.tta_label(best.task.config.evaluate.tta)
    rows = [{"split": f"validation{label}", **_cells(figures)}]
    tested, referenced = read_json(folder.test), any(map(_is_referenced, results))
    if tested.get("run") == best.task.name and "top1" in tested:
        rows.append(
            {"split": f"test{configs.tta_label(tested.get('tta', 'none'))}", **_cells(tested)}
        )
        if referenced:
            reference = reference_figures(reference_table()["test"])
            rows.append({"split": "reference, test", **_cells(reference)})
    of_best = [row for study in results for row in study.rows if best.task in row.row.tasks]
    lacking = list(dict.fromkeys(seed for row in of_best for seed in row.lacking))
    notes = [f"Its row lacks {listed(lacking)}."] if lacking else []
    note = " ".join([*notes, tested.get("note", "")]).strip()
    columns = _metric_columns(referenced)
    return {"name": best.task.name, "columns": columns, "rows": rows, "note": note}


def _environment(environments: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rows of key and text; where runs differ, each text that occurs."""
    texts: dict[str, dict[str, None]] = {}
    for key, text in itertools.chain.from_iterable(map(flat_rows, environments)):
        if key not in _OF_ONE_RUN:
            texts.setdefault(key, {})[text] = None
    dates = sorted(str(environment.get("date", "")) for environment in environments)
    span = [("runs begun", " to ".join(dict.fromkeys([dates[0], dates[-1]])))] if dates else []
    return span + [(key, " | ".join(different)) for key, different in texts.items()]
