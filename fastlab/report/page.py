"""Turn run directories into one HTML page: results, curves, sample predictions, configuration."""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from fastlab import __version__
from fastlab.console import UserError, public_text
from fastlab.files import write_atomically
from fastlab.runs import (
    EPOCH_KEYS,
    Run,
    best_epoch,
    images_per_second,
    read_run,
    train_seconds,
)

TEMPLATES = Path(__file__).with_name("templates")

MISSING = "—"

# Any two differ by 23 or more in CIELAB, for normal sight and simulated deuteranopia, protanopia
# and tritanopia; contrast on the page is at least 3.2 (light) and 4.5 (dark). Five marker shapes
# beside eight colours tell 40 runs apart.
PALETTE = (  # (light page, dark page)
    ("#00528f", "#71a8f5"),
    ("#dc6600", "#e87030"),
    ("#459e5f", "#12e198"),
    ("#ca6d9c", "#c7699d"),
    ("#65400c", "#ffdc44"),
    ("#251384", "#776eef"),
    ("#2e2e27", "#f7edec"),
    ("#0798dd", "#b7d4fb"),
)
MARKERS = (  # SVG paths around the origin
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "M-3.6-3.6h7.2v7.2h-7.2Z",
    "M0-4.8L4.6 3.4H-4.6Z",
    "M0-5L5 0L0 5L-5 0Z",
    "M0 4.8L4.6-3.4H-4.6Z",
)
MARKS_PER_CURVE = 10
_LARGEST = 1e300  # of a metric

# The plotting area in the SVG's own units, 480 x 300 with room for the axes' labels.
PLOT_WIDTH, PLOT_HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 462, 12, 254

PLOTTED = (  # (suffix in metrics.jsonl, title, unit, scale from file to page, decimals)
    ("loss", "Loss", "mean cross-entropy", 1, 4),
    ("top1", "Top-1 accuracy", "%", 100, 2),
    ("top5", "Top-5 accuracy", "%", 100, 2),
)
SPLITS = (("train", "training"), ("val", "validation"))


def write_report(run_dirs: list[Path], out: Path) -> None:
    """Write one self-contained HTML page about the runs, in the order given, to `out`.

    A directory given twice counts once. `out` is replaced whole or left as it was. Raises
    UserError where a run directory or one of its files is missing or malformed, or where `out` is
    no .html or cannot be written.
    """
    if not run_dirs:
        raise UserError("no run directory given: name at least one")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: expected a file name that ends in .html")
    distinct = {os.path.realpath(directory): directory for directory in run_dirs}
    names = _names(list(distinct))
    runs = [read_run(path, name) for path, name in zip(distinct.values(), names, strict=True)]
    write_whole(out, _render(runs))


def _names(paths: list[str]) -> list[str]:
    """The last part of each distinct path, with as many parents as it takes to differ."""
    parts = [Path(path).parts for path in paths]
    depths = [1] * len(parts)
    while True:
        names = ["/".join(p[-depth:]) for p, depth in zip(parts, depths, strict=True)]
        counts = Counter(names)
        if len(counts) == len(names):
            return names
        depths = [d + (counts[name] > 1) for d, name in zip(depths, names, strict=True)]


# The results table


def _setting(run: Run, section: str, key: str) -> str:
    values = run.config.get(section)
    return _setting_text(values.get(key)) if isinstance(values, dict) else MISSING


def _result(run: Run) -> dict[str, str]:
    """The run's row in the results table, each value as text."""
    best = best_epoch(run) or dict.fromkeys(("epoch", *EPOCH_KEYS))
    classes = run.summary.get("classes")
    return {
        "model": _setting(run, "model", "name"),
        "parameters": number_text(run.summary.get("parameters")),
        "epochs": f"{run.epochs[-1]['epoch']} of {_setting(run, 'train', 'epochs')}",
        "best_top1": percent_text(best["val_top1"]),
        "best_epoch": number_text(best["epoch"]),
        "best_top5": percent_text(best["val_top5"]),
        "best_loss": number_text(best["val_loss"], 4),
        "final_top1": percent_text(run.epochs[-1]["val_top1"]),
        "chance": percent_text(1 / classes if classes else None),
        "images_per_second": number_text(images_per_second(run)),
        "time": duration_text(train_seconds(run)),
        "status": str(run.summary.get("status") or "unknown"),
    }


def number_text(value: float | None, decimals: int = 0) -> str:
    return MISSING if value is None else f"{value:,.{decimals}f}"


def percent_text(fraction: float | None, decimals: int = 2) -> str:
    return number_text(None if fraction is None else 100 * fraction, decimals)


def duration_text(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


# The curves


@dataclass(frozen=True)
class Curve:
    """One metric of one run on one split, in the SVG's units."""

    run: int
    split: str
    segments: list[str]
    """Points for a polyline each; a value that is no number ends a segment."""
    marks: list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One metric of all runs over the epochs, in the SVG's units."""

    metric: str
    title: str
    unit: str
    description: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Curve]
    columns: list[tuple[float, float, str]]
    """Left edge, width and tooltip of each epoch's strip."""
    hidden: list[str]
    """Runs whose curve lies under a later one's, as text."""
    rows: list[tuple[int, list[str]]]
    """Epoch, then training and validation of each run in turn, as text."""


def _nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that spans `span` in `count` steps or fewer."""
    power = 10 ** math.floor(math.log10(span / count))
    return next(m * power for m in (1, 2, 5, 10) if m * power * count >= span * (1 - 1e-9))


def _value_ticks(values: list[float], ceiling: float) -> list[float]:
    """Round numbers whose first and last enclose the values and stay between 0 and `ceiling`."""
    low, high = min(values), max(values)
    floor, ceiling = min(low, 0), max(high, ceiling)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-6):
        margin = 0.1 * abs(high) or 1.0
        low, high = low - margin, high + margin
    step = _nice_step(high - low, 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [n * step for n in range(first, last + 1)]
    return [tick for tick in ticks if floor - step / 2 < tick < ceiling + step / 2]


def _epoch_ticks(last: int) -> tuple[float, float, list[int]]:
    """The axis's first and last value, and its ticks, for epochs from 1 to `last`."""
    if last == 1:
        return 0.5, 1.5, [1]
    step = max(1, round(_nice_step(last, 8)))
    start = 1 if step == 1 else 0
    return start, last, list(range(start, last + 1, step))


def _tick_label(tick: float, step: float) -> str:
    if abs(tick) >= 1e5 or step < 1e-4:
        return f"{tick:.3g}"
    return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _scale(value: float, domain: tuple[float, float], pixels: tuple[float, float]) -> float:
    share = (value - domain[0]) / (domain[1] - domain[0])
    return round(pixels[0] + share * (pixels[1] - pixels[0]), 2)


def _curve(run: int, split: str, points: list[tuple[float, float | None]]) -> Curve:
    """The curve through points (x, y), y None where there is no value."""
    segments: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            segments.append([])
        else:
            segments[-1].append((x, y))
    segments = [segment for segment in segments if segment]
    stride = math.ceil(len(points) / MARKS_PER_CURVE)
    # Each run starts at another epoch, so that the marks of curves close together stay apart.
    marks = [p for s in segments for p in (*s[run % stride : -1 : stride], s[-1])]
    lines = [" ".join(f"{x:g},{y:g}" for x, y in segment) for segment in segments]
    return Curve(run, split, lines, marks)


def _hidden(names: list[str], heights: dict[tuple[int, str], dict[int, float]]) -> list[str]:
    """Which curves nobody sees: each of their points is drawn over by a later run. `heights` are in
    the SVG's units, of each run and split."""
    found: dict[tuple[int, int], list[str]] = {}
    for (index, split), lower in heights.items():
        later = range(index + 1, len(names))
        over = next((i for i in later if _covers(heights[i, split], lower)), None)
        if over is not None:
            found.setdefault((index, over), []).append(dict(SPLITS)[split])
    return [
        f"{names[index]} lies under {names[over]} ({', '.join(splits)})"
        for (index, over), splits in found.items()
    ]


def _covers(upper: dict[int, float], lower: dict[int, float]) -> bool:
    return bool(lower) and all(n in upper and abs(upper[n] - y) <= 1 for n, y in lower.items())


def _plot(runs: list[Run], metric: str, title: str, unit: str, scale: int, digits: int) -> Plot:
    series = {
        (index, split): {
            epoch["epoch"]: None if (v := epoch[f"{split}_{metric}"]) is None else scale * v
            for epoch in run.epochs
        }
        for index, run in enumerate(runs)
        for split, _ in SPLITS
    }
    numbers = sorted({number for values in series.values() for number in values})
    start, end, epoch_ticks = _epoch_ticks(numbers[-1])
    finite = [v for values in series.values() for v in values.values() if v is not None]
    value_ticks = _value_ticks(finite or [0.0], 100 if unit == "%" else math.inf)

    def x(number: float) -> float:
        return _scale(number, (start, end), (LEFT, RIGHT))

    def y(value: float | None) -> float | None:
        domain = (value_ticks[0], value_ticks[-1])
        return None if value is None else _scale(value, domain, (BOTTOM, TOP))

    def text(index: int, split: str, number: int) -> str:
        return number_text(series[index, split].get(number), digits)

    def tooltip(number: int) -> str:
        lines = [
            f"{run.name}: train {text(index, 'train', number)}, val {text(index, 'val', number)}"
            for index, run in enumerate(runs)
            if number in series[index, "val"]
        ]
        return "\n".join([f"Epoch {number}", *lines])

    def column(number: int) -> tuple[float, float, str]:
        left, right = max(x(number - 0.5), LEFT), min(x(number + 0.5), RIGHT)
        return left, round(right - left, 2), tooltip(number)

    heights = {
        key: {number: y(value) for number, value in values.items() if value is not None}
        for key, values in series.items()
    }
    last = ", ".join(
        f"{r.name} {text(i, 'val', r.epochs[-1]['epoch'])}" for i, r in enumerate(runs)
    )
    step = value_ticks[1] - value_ticks[0]
    return Plot(
        metric=metric,
        title=title,
        unit=unit,
        description=f"{title} ({unit}) over epochs 1 to {numbers[-1]}, training and validation. "
        f"Validation at the last epoch: {last}. The table below holds all values.",
        x_ticks=[(x(tick), str(tick)) for tick in epoch_ticks],
        y_ticks=[(y(tick), _tick_label(tick, step)) for tick in value_ticks],
        curves=[
            _curve(index, split, [(x(number), y(value)) for number, value in values.items()])
            for (index, split), values in series.items()
        ],
        columns=[column(number) for number in numbers],
        hidden=_hidden([run.name for run in runs], heights),
        rows=[(number, [text(*key, number) for key in series]) for number in numbers],
    )


# The page


def _setting_text(value: Any) -> str:
    if value is None:
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _config_tables(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Section and its settings, as text; settings above the first section come first."""
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    loose = {key: value for key, value in config.items() if key not in sections}
    titled = ([("general", loose)] if loose else []) + list(sections.items())
    return [(name, [(k, _setting_text(v)) for k, v in s.items()]) for name, s in titled if s]


def flat_rows(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of dotted key and text, one a leaf."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += flat_rows(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows.append((prefix + key, ", ".join(map(_setting_text, value)) or "none"))
        else:
            rows.append((prefix + key, _setting_text(value)))
    return rows


def _dataset_text(run: Run) -> str:
    """The dataset in one phrase; empty where the run has no summary."""
    if not run.summary.get("dataset"):
        return ""
    counts = [f"{number_text(n)} {split} images" for split, n in run.summary["counts"].items()]
    if skipped := run.summary["skipped"]:
        counts.append(f"{number_text(skipped)} corrupt images left out")
    return ", ".join(
        [str(run.summary["dataset"]), f"{number_text(run.summary['classes'])} classes", *counts]
    )


def _render(runs: list[Run]) -> str:
    pages = [
        {
            "name": run.name,
            "result": _result(run),
            "dataset": _dataset_text(run),
            "config": _config_tables(run.config),
            "environment": flat_rows(run.environment),
            "predictions": run.predictions,
        }
        for run in runs
    ]
    augmented = augmented_text([run.config for run in runs])
    return render("report.html.j2", runs=pages, plots=make_plots(runs), augmented=augmented)


def augmented_text(configs: list[dict[str, Any]]) -> str:
    """What a note on training values says of augmentation; empty where no run augments."""
    augmenting = [_augments(config.get("augment")) for config in configs]
    if all(augmenting):
        return " and on augmented images"
    return " and, where a run augments them, on augmented images" if any(augmenting) else ""


def _augments(settings: Any) -> bool:
    if not isinstance(settings, dict):
        return False
    return settings.get("crop_scale", 1) != 1 or any(
        settings.get(key) for key in ("flip", "translate", "cutout")
    )


def make_plots(runs: list[Run]) -> list[Plot]:
    """Loss, top-1 and top-5 of the runs, which have an epoch or more, over the epochs."""
    return [_plot(runs, *metric) for metric in PLOTTED]


def render(template: str, **values: Any) -> str:
    """A page from one of `TEMPLATES`, with what parts.html.j2 needs beside its `values`. Pages are
    passed on: no absolute path is left in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(
        splits=SPLITS,
        palette=PALETTE,
        markers=MARKERS,
        area={"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        size=(PLOT_WIDTH, PLOT_HEIGHT),
        percent=percent_text,
        now=datetime.now(UTC),
        version=__version__,
    )
    return public_text(environment.get_template(template).render(**values))


def write_whole(out: Path, page: str) -> None:
    try:
        # A lone surrogate is valid JSON but not valid UTF-8.
        write_atomically(out, page.encode(errors="replace"))
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}): choose a file in a writable folder"
        ) from error
