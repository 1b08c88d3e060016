"""Curves over the epochs: one plot for each metric, with those of its splits for every run.

The template parts.html.j2 draws them as SVG. Positions are in the SVG's own units.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastlab.report.texts import MISSING, number_text
from fastlab.run_records import Run, epoch_number

# Any two differ by 23 or more in CIELAB, for normal sight and simulated deuteranopia, protanopia
# and tritanopia; contrast on the page is at least 3.2 (light) and 4.5 (dark). Five marker shapes
# and eight colours tell 40 runs apart.
_PALETTE = (  # (light page, dark page)
    ("#00528f", "#71a8f5"),
    ("#dc6600", "#e87030"),
    ("#459e5f", "#12e198"),
    ("#ca6d9c", "#c7699d"),
    ("#65400c", "#ffdc44"),
    ("#251384", "#776eef"),
    ("#2e2e27", "#f7edec"),
    ("#0798dd", "#b7d4fb"),
)
_MARKERS = (  # SVG paths around the origin
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "M-3.6-3.6h7.2v7.2h-7.2Z",
    "M0-4.8L4.6 3.4H-4.6Z",
    "M0-5L5 0L0 5L-5 0Z",
    "M0 4.8L4.6-3.4H-4.6Z",
)
_MARKS_PER_CURVE = 10
_DIVERGED = 3  # where the axis of the loss ends, in losses of guessing: ln(classes)

# The plotting area within an SVG of 480 x 300, with room for the labels of the axes.
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 462, 12, 254
_SPLITS = {"train": "training", "val": "validation"}
DRAWING = {
    "splits": _SPLITS.items(),
    "palette": _PALETTE,
    "markers": _MARKERS,
    "area": {"left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM},
    "size": (480, 300),
}
"""What the template needs apart from the plots."""


class _Metric(NamedTuple):
    """A metric that is plotted."""

    key: str
    """Its name in metrics.jsonl, without a split."""
    title: str
    unit: str
    scale: int = 1
    """Factor from the values in the file to those on the page."""
    decimals: int | None = None
    """None: three significant digits."""
    splits: tuple[str, ...] = ("train", "val")

    def record_key(self, split: str) -> str:
        """Its name in metrics.jsonl, which has the split where there are several."""
        return f"{split}_{self.key}" if len(self.splits) > 1 else self.key

    def text(self, value: float | None) -> str:
        if value is None or self.decimals is not None:
            return number_text(value, self.decimals or 0)
        return f"{value:.3g}"


_METRICS = (
    _Metric("loss", "Loss", "mean cross-entropy", 1, 4),
    _Metric("top1", "Top-1 accuracy", "%", 100, 2),
    _Metric("top5", "Top-5 accuracy", "%", 100, 2),
)
_RATES = (
    _Metric("lr", "Learning rate", "at the epoch's first step", splits=("train",)),
    _Metric("images_per_second", "Throughput", "images/s", 1, 0, splits=("train",)),
)

_Series = dict[tuple[int, str], dict[int, float | None]]
"""(index of the run, split) -> epoch -> value; None where it is not a number."""

_Ranges = dict[int, tuple[float, float]]
"""Epoch -> lowest and highest value over the seeds."""


class Axis(NamedTuple):
    """An axis with labelled ticks."""

    values: tuple[float, float]
    """The values at the axis's ends."""
    ends: tuple[float, float]
    """The positions of the axis's ends."""
    labels: dict[float, str]
    """Value -> label of each tick."""
    log: bool = False

    def place(self, value: float) -> float:
        (first, last), (start, end) = self.values, self.ends
        if self.log:
            first, last, value = math.log10(first), math.log10(last), math.log10(value)
        return round(start + (value - first) / (last - first) * (end - start), 2)

    def ticks(self) -> list[tuple[float, str]]:
        return [(self.place(value), label) for value, label in self.labels.items()]


def make_plots(runs: list[Run], seeds: Sequence[Sequence[Run]] = ()) -> list[dict[str, Any]]:
    """What the template draws: loss, top-1 and top-5 of runs that have at least one epoch.

    Where each of `runs` is a mean, `seeds` holds for each the runs that it is the mean of. A band
    then spans the lowest to the highest of their validation values.

    A run that diverged would flatten the other curves, so the axis of the loss ends at a few times
    the loss of guessing. Arrows on the upper edge stand for the values above it.
    """
    names = [run.name for run in runs]
    counts = [run.summary.get("classes") or 0 for run in runs]
    classes = max(max(counts), 2) if any(counts) else 1000  # unknown: as in ImageNet
    limits = {"loss": _DIVERGED * math.log(classes)}
    return [
        _plot(
            names,
            metric,
            _series(runs, metric),
            limits.get(metric.key, math.inf),
            [_ranges(of_row, metric) for of_row in seeds],
        )
        for metric in _METRICS
    ]


def make_rate_plots(runs: list[Run]) -> list[dict[str, Any]]:
    """What the template draws: learning rate and throughput of runs with at least one epoch."""
    names = [run.name for run in runs]
    return [_plot(names, metric, _series(runs, metric)) for metric in _RATES]


def _series(runs: list[Run], metric: _Metric) -> _Series:
    return {
        (index, split): {
            epoch_number(epoch): None if (value := epoch[key]) is None else metric.scale * value
            for epoch in run.epochs
        }
        for index, run in enumerate(runs)
        for split in metric.splits
        for key in [metric.record_key(split)]
    }


def _ranges(runs: Sequence[Run], metric: _Metric) -> _Ranges:
    """Over the epochs of several runs, up to the first that one of them lacks or has no value of;
    empty for a single run."""
    key, ranges = f"val_{metric.key}", {}
    for epochs in zip(*(run.epochs for run in runs), strict=False) if len(runs) > 1 else ():
        values = [value for epoch in epochs if (value := epoch[key]) is not None]
        if len(values) < len(runs):
            break
        ends = metric.scale * min(values), metric.scale * max(values)
        ranges[epoch_number(epochs[0])] = ends
    return ranges


def _plot(
    names: list[str],
    metric: _Metric,
    series: _Series,
    limit: float = math.inf,
    ranges: Sequence[_Ranges] = (),
) -> dict[str, Any]:
    numbers = sorted({number for values in series.values() for number in values})
    measured = [v for values in series.values() for v in values.values() if v is not None]
    measured += [end for of_row in ranges for ends in of_row.values() for end in ends]
    within = [value for value in measured if value <= limit]
    x = _epoch_axis(numbers[-1])
    y = _metric_axis(metric, within or measured or [0.0])
    texts = {
        key: {number: metric.text(value) for number, value in values.items()}
        for key, values in series.items()
    }
    return {
        "metric": metric,
        "description": _description(names, metric, numbers[-1], texts),
        "x_ticks": x.ticks(),
        "y_ticks": y.ticks(),
        "splits": [(split, _SPLITS[split]) for split in metric.splits],
        "clipped": _clipped_text(names, metric, series, y.values[1]),
        "bands": [_band(of_row, x, y) for of_row in ranges],
        "curves": [_curve(index, split, values, x, y) for (index, split), values in series.items()],
        "columns": [_column(x, names, metric, number, texts) for number in numbers],
        "rows": [
            (number, [text.get(number, MISSING) for text in texts.values()]) for number in numbers
        ],
    }


# Axes


def _epoch_axis(last: int) -> Axis:
    """The axis for epochs 1 to `last`."""
    if last == 1:
        return Axis((0.5, 1.5), (_LEFT, _RIGHT), {1: "1"})
    step = max(1, round(_nice_step(last, 8)))
    start = 1 if step == 1 else 0
    return Axis((start, last), (_LEFT, _RIGHT), {n: str(n) for n in range(start, last + 1, step)})


def _metric_axis(metric: _Metric, values: list[float]) -> Axis:
    """Logarithmic for learning rates that are more than a factor of ten apart, unless one is zero
    or beyond reason."""
    if metric.key == "lr" and 1e-30 < 10 * min(values) < max(values) < 1e30:
        return _log_axis(values)
    return value_axis(values, 100 if metric.unit == "%" else math.inf)


def _log_axis(values: list[float]) -> Axis:
    """Powers of ten whose first and last enclose the positive values."""
    first = math.floor(math.log10(min(values)) + 1e-9)
    last = math.ceil(math.log10(max(values)) - 1e-9)
    step = math.ceil((last - first) / 8)
    powers = [10.0**n for n in range(first, last + step, step)]
    labels = {power: f"{power:.0e}" for power in powers}
    return Axis((powers[0], powers[-1]), (_BOTTOM, _TOP), labels, log=True)


def value_axis(values: list[float], ceiling: float = math.inf) -> Axis:
    """Round numbers whose first and last enclose the values and stay between 0 and `ceiling`."""
    low, high = min(values), max(values)
    floor, ceiling = min(low, 0), max(high, ceiling)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-6):
        margin = 0.1 * abs(high) or 1.0
        low, high = low - margin, high + margin
    step = _nice_step(high - low, 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [n * step for n in range(first, last + 1)]
    ticks = [tick for tick in ticks if floor - step / 2 < tick < ceiling + step / 2]
    labels = {tick: _tick_label(tick, step) for tick in ticks}
    return Axis((ticks[0], ticks[-1]), (_BOTTOM, _TOP), labels)


def _nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that spans `span` in `count` steps or fewer."""
    power = 10 ** math.floor(math.log10(span / count))
    return next(m * power for m in (1, 2, 5, 10) if m * power * count >= span * (1 - 1e-9))


def _tick_label(tick: float, step: float) -> str:
    if abs(tick) >= 1e5 or step < 1e-4:
        return f"{tick:.3g}"
    return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


# Curves and texts


def _curve(
    run: int, split: str, values: dict[int, float | None], x: Axis, y: Axis
) -> dict[str, Any]:
    """The polylines and marks of one metric; a value that is not a number ends a polyline. A value
    above the axis lies on its upper edge and has an arrow."""
    segments: list[list[tuple[float, float]]] = [[]]
    highest = y.values[1]
    for number, value in values.items():
        if value is None:
            segments.append([])
        else:
            segments[-1].append((x.place(number), y.place(min(value, highest))))
    segments = [segment for segment in segments if segment]
    stride = math.ceil(len(values) / _MARKS_PER_CURVE)
    # Each run's marks begin at a different epoch, so that those of close curves stay apart.
    marks = [p for s in segments for p in (*s[run % stride : -1 : stride], s[-1])]
    lines = [" ".join(f"{left:g},{top:g}" for left, top in segment) for segment in segments]
    arrows = [x.place(n) for n, value in values.items() if value is not None and value > highest]
    return {"run": run, "split": split, "segments": lines, "marks": marks, "arrows": arrows}


def _band(ranges: _Ranges, x: Axis, y: Axis) -> str:
    """The corners of a band: along its upper edge and back along its lower one."""
    highest = y.values[1]
    upper = [(x.place(number), y.place(min(high, highest))) for number, (_, high) in ranges.items()]
    lower = [(x.place(number), y.place(min(low, highest))) for number, (low, _) in ranges.items()]
    return " ".join(f"{left:g},{top:g}" for left, top in (*upper, *reversed(lower)))


def _clipped_text(names: list[str], metric: _Metric, series: _Series, highest: float) -> str:
    """Which curves rise above the axis, which ends at `highest`; empty where none does."""
    pairs = []
    for index, name in enumerate(names):
        curves = (series[index, split] for split in metric.splits)
        values = [v for curve in curves for v in curve.values() if v is not None]
        if max(values, default=highest) > highest:
            pairs.append(f"{name} (up to {metric.text(max(values))})")
    if not pairs:
        return ""
    return f"Above the axis, at the arrows: {', '.join(pairs)}. The table holds these values."


_Texts = dict[tuple[int, str], dict[int, str]]


def _column(
    x: Axis, names: list[str], metric: _Metric, number: int, texts: _Texts
) -> tuple[float, float, str]:
    """Left edge, width and tooltip of an epoch's strip."""
    left, right = max(x.place(number - 0.5), _LEFT), min(x.place(number + 0.5), _RIGHT)
    lines = []
    for index, name in enumerate(names):
        values = [(split, texts[index, split].get(number)) for split in metric.splits]
        parts = [f"{split} {text}" for split, text in values if text is not None]
        lines += [f"{name}: {', '.join(parts)}"] if parts else []
    return left, round(right - left, 2), "\n".join([f"Epoch {number}", *lines])


def _description(names: list[str], metric: _Metric, last: int, texts: _Texts) -> str:
    *_, split = metric.splits
    final = [list(texts[index, split].values())[-1] for index in range(len(names))]
    pairs = ", ".join(f"{name} {text}" for name, text in zip(names, final, strict=True))
    words = [_SPLITS[each] for each in metric.splits]
    return (
        f"{metric.title} ({metric.unit}) over epochs 1 to {last}, {' and '.join(words)}. "
        f"{words[-1].capitalize()} at the last epoch: {pairs}. The table below holds all values."
    )
