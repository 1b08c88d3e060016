"""What runs say: figures over seeds, the reference beside them, findings, and the report of it."""

import dataclasses
import json
import math
import statistics
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError, public_text
from fastlab.files import write_json
from fastlab.report.page import (
    EPOCH_KEYS,
    MISSING,
    Run,
    augmented_text,
    best_epoch,
    duration_text,
    flat_rows,
    images_per_second,
    make_plots,
    number_text,
    percent_text,
    read_run,
    render,
    train_seconds,
    write_whole,
)
from fastlab.study.pool import State, StudyDir, look
from fastlab.study.spec import Finding, Row, Study, Task, tasks_of

REFERENCE = Path(__file__).with_name("reference.toml")

# The reference's 10,000 validation images make 79 batches of 128: reference.toml has the reason.
MEAN_OF_PRINTED = 10_000 / 79

# Settings that are the scale of an experiment, not its subject: a row of another scale still
# stands beside the reference's row, and the page says that its scale is another.
_SCALE = {
    "model": {"width", "sync_batch_norm"},
    "train": {f.name for f in dataclasses.fields(configs.TrainConfig)}
    - {"label_smoothing", "grad_clip", "ema"},
}
_REFERENCE_SCALE = {
    "classes": 200,
    "pixels a side": 64,
    "training images": 100_000,
    "validation images": 10_000,
    "base width": 64,
    "epochs": 100,
    "images a batch": 128,
}

METHOD = (
    "Mean over the finished seeds ± half of the 95 % interval of the mean (Student t), each run at "
    "its best epoch by validation top-1. Loss is the mean cross-entropy on validation; “as "
    "printed” is the same in the reference's own column, the sum of its 79 batch means over 10,000 "
    "images: mean cross-entropy × 79 / 10,000. The reference has one run a row, of unknown seed."
)
RULE = (
    "Decided by the 95 % intervals of validation top-1: a claim holds, or does not, where they lie "
    "apart, and is undecided where they overlap, a single seed gives none, or a seed is missing. "
    "“Nothing is learned” means: not above chance by more than three standard errors of guessing."
)
SCALE_ADVICE = (
    "Compare rows with each other; the difference from the reference's row is mostly one of scale."
)
SHARED_RATE = "images/s and time were measured with up to {} trainings side by side."

# Each run has its own; a virtual machine's memory, as reported, grows while it is used.
_OF_ONE_RUN = ("command", "date", "machine.memory_gib")

# Quantiles 0.975 of Student's t for 1 to 30 degrees of freedom.
_T975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
_Z975 = 1.959964


def student_t(degrees: int) -> float:
    """The 0.975 quantile of Student's t; above 30 degrees of freedom its expansion in 1/degrees."""
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z = _Z975
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % interval; None for a single seed."""

    mean: float
    half: float | None

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0)

    def text(self, scale: float = 1, decimals: int = 2) -> str:
        mean = number_text(scale * self.mean, decimals)
        return mean if self.half is None else f"{mean} ± {scale * self.half:,.{decimals}f}"


def interval(values: list[float | None]) -> Interval | None:
    """None without values, and where one is no number: the mean of the others would hide it."""
    if not values or any(value is None for value in values):
        return None
    if len(values) == 1:
        return Interval(values[0], None)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), student_t(len(values) - 1) * error)


@dataclass(frozen=True)
class Reference:
    """A row of the reference report."""

    loss_printed: float
    top1: float
    top5: float

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.loss_printed * MEAN_OF_PRINTED


@cache
def _reference_file() -> dict[str, Any]:
    return tomllib.loads(REFERENCE.read_text(encoding="utf-8"))


def reference_test() -> Reference:
    table = _reference_file()["test"]
    return Reference(table["loss_printed"], table["top1"], table["top5"])


def find_reference(config: Config) -> Reference | None:
    """The reference's row of the same settings, scale apart."""
    own = _subject(config)
    for row in _reference_file()["rows"]:
        wanted = _subject(Config())
        for model, values in row["set"].items():
            wanted.update({(model, key): value for key, value in values.items()})
        if own == wanted:
            return Reference(row["loss_printed"], row["top1"], row["top5"])
    return None


def _subject(config: Config) -> dict[tuple[str, str], Any]:
    return {
        (section, key): value
        for section, table in dataclasses.asdict(config).items()
        for key, value in table.items()
        if section != "data" and key not in _SCALE.get(section, ())
    }


@dataclass(frozen=True)
class RunResult:
    task: Task
    state: State
    run: Run | None
    """Where it is finished."""


@dataclass(frozen=True)
class RowResult:
    """One value of a factor: figures of the best epoch by validation top-1, over finished seeds."""

    row: Row
    runs: tuple[RunResult, ...]
    loss: Interval | None
    """Mean cross-entropy on validation."""
    top1: Interval | None
    top5: Interval | None
    rate: float | None
    """images/s in training, median over seeds."""
    seconds: float | None
    """Of training and validation, median over seeds."""
    reference: Reference | None

    @property
    def label(self) -> str:
        return self.row.label

    @property
    def finished(self) -> list[Run]:
        return [result.run for result in self.runs if result.run]


@dataclass(frozen=True)
class Verdict:
    finding: Finding
    decision: str
    """ "holds", "does not hold" or "undecided"."""
    sentence: str


@dataclass(frozen=True)
class StudyResult:
    study: Study
    rows: list[RowResult]
    verdicts: list[Verdict]


def analyse(folder: StudyDir, studies: list[Study]) -> list[StudyResult]:
    runs = {task.name: read_result(folder, task) for task in tasks_of(studies)}
    found = []
    for study in studies:
        rows = [_row(row, tuple(runs[task.name] for task in row.tasks)) for row in study.rows]
        verdicts = [decide(finding, rows) for finding in study.findings]
        found.append(StudyResult(study, rows, verdicts))
    return found


def read_result(folder: StudyDir, task: Task) -> RunResult:
    state = look(folder, task)
    if state.name != "finished":
        return RunResult(task, state, None)
    try:
        return RunResult(task, state, read_run(folder.run(task), task.name))
    except UserError as error:
        return RunResult(task, State("unreadable", str(error)), None)


def _row(row: Row, results: tuple[RunResult, ...]) -> RowResult:
    runs = [result.run for result in results if result.run]
    best = [best_epoch(run) or dict.fromkeys(EPOCH_KEYS) for run in runs]
    rates = [rate for run in runs if (rate := images_per_second(run)) is not None]
    seconds = [time for run in runs if (time := train_seconds(run)) is not None]
    return RowResult(
        row,
        results,
        loss=interval([epoch["val_loss"] for epoch in best]),
        top1=interval([epoch["val_top1"] for epoch in best]),
        top5=interval([epoch["val_top5"] for epoch in best]),
        rate=statistics.median(rates) if rates else None,
        seconds=statistics.median(seconds) if seconds else None,
        reference=find_reference(row.config),
    )


# Findings


def decide(finding: Finding, rows: list[RowResult]) -> Verdict:
    """Whether the claim holds, by the 95 % intervals of validation top-1."""
    named = {row.label: row for row in rows}
    wanted = [finding.better] * bool(finding.better) + [*finding.worse, *finding.chance]
    missing = [label for label in wanted if named[label].top1 is None]
    if missing:
        return Verdict(finding, "undecided", f"no finished run of {_listed(missing)}.")
    figures = _listed([_figure(named[label]) for label in wanted])
    # A seed that diverged speaks against its row: the interval of the others hides that.
    partial = [label for label in wanted if _unfinished(named[label])]
    if partial:
        said = [f"{_listed(_unfinished(named[label]))} of {label}" for label in partial]
        return Verdict(finding, "undecided", f"{figures}, without {'; '.join(said)}.")
    single = [label for label in wanted if _single(named[label])]
    if single:
        return Verdict(
            finding, "undecided", f"{figures}; a single seed of {_listed(single)} has no interval."
        )
    if finding.chance:
        return _decide_chance(finding, [named[label] for label in finding.chance])
    return _decide_order(finding, named[finding.better], [named[label] for label in finding.worse])


def _decide_order(finding: Finding, better: RowResult, worse: list[RowResult]) -> Verdict:
    against = [row for row in worse if row.top1.low > better.top1.high]
    open_ = [row for row in worse if row not in against and row.top1.high >= better.top1.low]
    if against:
        said = f"{_figure(better)} lies below {_listed(list(map(_figure, against)))}."
        return Verdict(finding, "does not hold", said)
    if open_:
        said = f"the interval of {_figure(better)} overlaps {_listed(list(map(_figure, open_)))}."
        return Verdict(finding, "undecided", said)
    said = f"{_figure(better)} lies above {_listed(list(map(_figure, worse)))}."
    return Verdict(finding, "holds", said)


def _decide_chance(finding: Finding, rows: list[RowResult]) -> Verdict:
    """At chance: not above it by more than three standard errors of guessing."""
    bounds = [_chance(row) for row in rows]
    said = _listed([_figure(row) for row in rows])
    said += f", where chance is {percent_text(bounds[0][0])} %"
    limits = f"{percent_text(max(bound for _, bound in bounds))} %"
    if any(row.top1.low > bound for row, (_, bound) in zip(rows, bounds, strict=True)):
        return Verdict(finding, "does not hold", f"{said}: above the {limits} that guessing gives.")
    if all(row.top1.high <= bound for row, (_, bound) in zip(rows, bounds, strict=True)):
        return Verdict(finding, "holds", f"{said} and guessing gives up to {limits}.")
    return Verdict(finding, "undecided", f"{said}: the interval spans the {limits} of guessing.")


def _chance(row: RowResult) -> tuple[float, float]:
    """Top-1 of guessing, and that plus three standard errors over the validation images."""
    summary = row.finished[0].summary
    chance = 1 / summary["classes"]
    return chance, chance + 3 * math.sqrt(chance * (1 - chance) / summary["counts"]["val"])


def _unfinished(row: RowResult) -> list[str]:
    return [f"seed {run.task.seed} ({run.state.name})" for run in row.runs if not run.run]


def _single(row: RowResult) -> bool:
    return row.top1.half is None


def _figure(row: RowResult) -> str:
    return f"“{row.label}” ({row.top1.text(100)} %)"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# The best model


def best_run(results: list[StudyResult]) -> RunResult | None:
    """The finished run with the highest validation top-1."""
    finished = [run for study in results for row in study.rows for run in row.runs if run.run]
    measured = [run for run in finished if best_epoch(run.run)]
    return max(measured, key=lambda run: best_epoch(run.run)["val_top1"], default=None)


# The report


def write_report(folder: StudyDir, studies: list[Study], command: str) -> None:
    """`report.html` and `report.md` about what is finished so far."""
    results = analyse(folder, studies)
    page = _page(folder, results, command)
    write_whole(folder.html, render("study.html.j2", **page))
    write_whole(folder.markdown, public_text(_markdown(page)))


def _page(folder: StudyDir, results: list[StudyResult], command: str) -> dict[str, Any]:
    """All that both reports show, as text but for the plots."""
    runs = {run.task.name: run for study in results for row in study.rows for run in row.runs}
    environments = [run.run.environment for run in runs.values() if run.run]
    shared = max((_side_by_side(folder, run.task) for run in runs.values()), default=1)
    verdicts = [(study, verdict) for study in results for verdict in study.verdicts]
    groups = [
        (
            "What the reference found, here",
            [_verdict(*v) for v in verdicts if v[1].finding.reported],
        ),
        ("Other questions", [_verdict(*v) for v in verdicts if not v[1].finding.reported]),
    ]
    return {
        "command": command,
        "method": METHOD,
        "rule": RULE,
        "advice": SCALE_ADVICE,
        "scale": scale_note(list(runs.values())),
        "finished": sum(run.run is not None for run in runs.values()),
        "columns": _COLUMNS,
        "studies": [_study(study) for study in results],
        "runs": [_run(run) for run in runs.values()],
        "verdicts": [(title, found) for title, found in groups if found],
        "best": _best(folder, results),
        "environment": _environment(environments),
        "shared": SHARED_RATE.format(shared) if shared > 1 else "",
        "augmented": augmented_text([dataclasses.asdict(run.task.config) for run in runs.values()]),
    }


def scale_note(runs: list[RunResult]) -> str:
    """How the scale differs from the reference's; empty where it does not."""
    found: dict[str, set[float]] = {name: set() for name in _REFERENCE_SCALE}
    for run in runs:
        found["base width"].add(run.task.config.model.width)
        found["epochs"].add(run.task.config.train.epochs)
        found["images a batch"].add(run.task.config.train.batch_size)
        if run.run and run.run.summary:
            found["classes"].add(run.run.summary["classes"])
            found["pixels a side"].add(run.run.summary["image_size"])
            found["training images"].add(run.run.summary["counts"].get("train"))
            found["validation images"].add(run.run.summary["counts"].get("val"))
    parts = []
    for name, values in found.items():
        own = sorted(value for value in values if value is not None)
        if own and own != [_REFERENCE_SCALE[name]]:
            listed = " or ".join(f"{value:,}" for value in own)
            parts.append(f"{name} {listed} (reference: {_REFERENCE_SCALE[name]:,})")
    return "; ".join(parts)


def _study(result: StudyResult) -> dict[str, Any]:
    curves = [row for row in result.rows if row.finished]
    means = [mean_run(row) for row in curves]
    return {
        "name": result.study.name,
        "title": result.study.title,
        "about": result.study.about,
        "rows": [_row_texts(row) for row in result.rows],
        "curves": [row.label for row in curves],
        "plots": make_plots(means) if means else [],
    }


def mean_run(row: RowResult) -> Run:
    """The curves of a row: each epoch's mean over the finished seeds that reached it."""
    runs = row.finished
    last = min(len(run.epochs) for run in runs)
    epochs = [_mean_epoch([run.epochs[index] for run in runs]) for index in range(last)]
    return Run(row.label, {}, {}, {}, epochs, [])


def _mean_epoch(epochs: list[dict[str, float | None]]) -> dict[str, float | None]:
    means = {key: interval([epoch[key] for epoch in epochs]) for key in EPOCH_KEYS}
    return {"epoch": epochs[0]["epoch"]} | {k: m.mean if m else None for k, m in means.items()}


def _row_texts(row: RowResult) -> dict[str, Any]:
    """The lines of a row in its study's table, each cell as text."""
    notes = [
        f"seed {run.task.seed} {run.state.name}" + (run.state.reason and f": {run.state.reason}")
        for run in row.runs
        if not run.run
    ]
    here = {
        "who": "here",
        **dict.fromkeys(("loss", "printed", "top1", "top5"), MISSING),
        "rate": number_text(row.rate),
        "time": duration_text(row.seconds),
        "seeds": f"{len(row.finished)} of {len(row.runs)}",
    }
    if row.loss:
        here["loss"] = row.loss.text(1, 3)
        here["printed"] = row.loss.text(1 / MEAN_OF_PRINTED, 4)
    if row.top1:
        here["top1"] = row.top1.text(100)
    if row.top5:
        here["top5"] = row.top5.text(100)
    lines = [here] + ([_reference_line(row), _difference_line(row)] if row.reference else [])
    links = [{"seed": run.task.seed, "name": run.task.name} for run in row.runs]
    return {"label": row.label, "lines": lines, "notes": notes, "links": links}


def _reference_line(row: RowResult) -> dict[str, str]:
    found = row.reference
    return {
        "who": "reference",
        "loss": f"{found.loss:.3f}",
        "printed": f"{found.loss_printed:.4f}",
        "top1": percent_text(found.top1),
        "top5": percent_text(found.top5),
        "rate": MISSING,
        "time": MISSING,
        "seeds": "1",
    }


def _difference_line(row: RowResult) -> dict[str, str]:
    def difference(own: Interval | None, other: float, scale: float, decimals: int) -> str:
        return MISSING if own is None else f"{scale * (own.mean - other):+.{decimals}f}"

    found = row.reference
    return {
        "who": "difference",
        "loss": difference(row.loss, found.loss, 1, 3),
        "printed": difference(row.loss, found.loss, 1 / MEAN_OF_PRINTED, 4),
        "top1": difference(row.top1, found.top1, 100, 2),
        "top5": difference(row.top5, found.top5, 100, 2),
        "rate": "",
        "time": "",
        "seeds": "",
    }


def _verdict(study: StudyResult, verdict: Verdict) -> dict[str, str]:
    return {
        "study": study.study.name,
        "title": study.study.title,
        "claim": verdict.finding.claim[:1].upper() + verdict.finding.claim[1:],
        "decision": verdict.decision,
        "sentence": verdict.sentence,
    }


def _run(result: RunResult) -> dict[str, Any]:
    best = best_epoch(result.run) if result.run else None
    return {
        "name": result.task.name,
        "seed": result.task.seed,
        "state": result.state.name,
        "reason": result.state.reason,
        "epochs": f"{result.state.epochs} of {result.task.config.train.epochs} epochs",
        "top1": percent_text(best["val_top1"]) if best else MISSING,
        "config": configs.dump(result.task.config),
    }


def _best(folder: StudyDir, results: list[StudyResult]) -> dict[str, Any]:
    """Texts about the best run; empty without a finished one."""
    best = best_run(results)
    if best is None:
        return {}
    epoch = best_epoch(best.run)
    rows = [_best_line("validation", epoch["val_loss"], epoch["val_top1"], epoch["val_top5"])]
    tested = read_test(folder)
    if tested.get("run") == best.task.name and "top1" in tested:
        rows.append(_best_line("test", tested["loss"], tested["top1"], tested["top5"]))
        found = reference_test()
        rows.append(_best_line("reference, test", found.loss, found.top1, found.top5))
    own = [row for study in results for row in study.rows if best in row.runs]
    lacks = list(dict.fromkeys(seed for row in own for seed in _unfinished(row)))
    notes = [f"Its row lacks {_listed(lacks)}."] if lacks else []
    note = " ".join([*notes, tested.get("note", "")]).strip()
    return {"name": best.task.name, "rows": rows, "note": note}


def _best_line(split: str, loss: float | None, top1: float, top5: float) -> dict[str, str]:
    printed = None if loss is None else loss / MEAN_OF_PRINTED
    return {
        "split": split,
        "loss": number_text(loss, 3),
        "printed": number_text(printed, 4),
        "top1": percent_text(top1),
        "top5": percent_text(top5),
    }


def read_test(folder: StudyDir) -> dict[str, Any]:
    """What `fastlab.study.command` wrote about the test split; empty where it did not."""
    try:
        return json.loads(folder.test.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _environment(environments: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rows of key and text; where runs differ, all that was found."""
    found: dict[str, dict[str, None]] = {}
    for environment in environments:
        for key, text in flat_rows(environment):
            if key not in _OF_ONE_RUN:
                found.setdefault(key, {})[text] = None
    dates = sorted(str(environment.get("date", "")) for environment in environments)
    span = [("runs begun", " to ".join(dict.fromkeys([dates[0], dates[-1]])))] if dates else []
    return span + [(key, " | ".join(texts)) for key, texts in found.items()]


def _side_by_side(folder: StudyDir, task: Task) -> int:
    try:
        return json.loads(folder.record(task).read_text(encoding="utf-8")).get("side_by_side", 1)
    except (OSError, ValueError):
        return 1


# Markdown

_COLUMNS = (
    ("top1", "top-1 %"),
    ("top5", "top-5 %"),
    ("loss", "loss"),
    ("printed", "as printed"),
    ("rate", "images/s"),
    ("time", "time"),
    ("seeds", "seeds"),
)


def _markdown(page: dict[str, Any]) -> str:
    parts = ["# Ablation studies", f"{page['finished']} of {len(page['runs'])} runs finished."]
    if page["scale"]:
        parts.append(f"**Not at the reference's scale**: {page['scale']}. {page['advice']}")
    for title, verdicts in page["verdicts"]:
        parts += [f"## {title}", "\n".join(map(_markdown_verdict, verdicts))]
    parts.append(page["rule"] if page["verdicts"] else "")
    for study in page["studies"]:
        parts += [f"## {study['title']}", study["about"], _markdown_table(study)]
    parts.append(f"{METHOD} {page['shared']}".strip())
    if page["best"]:
        parts += ["## The best model", _markdown_best(page["best"])]
    parts += ["## Environment", "\n".join(f"- {k}: {_cell(v)}" for k, v in page["environment"])]
    parts.append(f"Made by `{page['command']}`. Curves and configurations: report.html.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_verdict(verdict: dict[str, str]) -> str:
    return (
        f"- {verdict['claim']} ({verdict['title']}): **{verdict['decision']}**. "
        f"{verdict['sentence'][:1].upper()}{verdict['sentence'][1:]}"
    )


def _markdown_table(study: dict[str, Any]) -> str:
    heads = ["row", "", *(title for _, title in _COLUMNS)]
    lines = [heads, ["---", "---", *["---:"] * len(_COLUMNS)]]
    for row in study["rows"]:
        for number, line in enumerate(row["lines"]):
            name = "" if number else row["label"]
            lines.append([name, line["who"], *(line[key] for key, _ in _COLUMNS)])
    table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    notes = [f"{row['label']}: {note}" for row in study["rows"] for note in row["notes"]]
    return table + ("\n\nNot in the figures: " + "; ".join(map(_cell, notes)) if notes else "")


def _markdown_best(best: dict[str, Any]) -> str:
    keys = [key for key, _ in _COLUMNS[:4]]
    heads = ["split", *(title for _, title in _COLUMNS[:4])]
    lines = [heads, ["---", *["---:"] * 4]]
    lines += [[row["split"], *(row[key] for key in keys)] for row in best["rows"]]
    table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    said = f"{best['name']}, chosen by validation top-1 alone. {best['note']}".strip()
    return f"{said}\n\n{table}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def remember_test(folder: StudyDir, figures: dict[str, Any]) -> None:
    write_json(folder.test, figures)
