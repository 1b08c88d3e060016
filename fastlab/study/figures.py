"""The drawings of a study's page: the top-1 of its rows as dots, and top-1 beside speed.

The templates dots.html.j2 and scatter.html.j2 draw them as SVG. Positions are percentages of the
drawing's width and height, so that it takes any width while its text and marks keep their size.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastlab.report.charts import Axis, value_axis
from fastlab.report.texts import flat, number_text, percent_text
from fastlab.run_records import images_per_second
from fastlab.study.reference import find_reference
from fastlab.study.results import RowResult, StudyResult
from fastlab.study.statistics import Interval

_MOST_SETTINGS = 3  # that name a factor; rows that differ in more are named by their labels alone
_ACROSS, _UP = (0.0, 100.0), (100.0, 0.0)  # the ends of an axis, in percent of the drawing


def factor_of(rows: Sequence[RowResult]) -> str:
    """The settings in which the rows differ, such as "model.dropout_conv, model.dropout_fc"; empty
    where they are more than three."""
    tables = [flat(dataclasses.asdict(row.row.config)) for row in rows]
    names = dict.fromkeys(name for table in tables for name in table)
    first, *others = tables
    differing = [name for name in names if any(t.get(name) != first.get(name) for t in others)]
    return ", ".join(differing) if len(differing) <= _MOST_SETTINGS else ""


# The values of each row


def draw_dots(rows: Sequence[RowResult]) -> dict[str, Any]:
    """What the template draws: for each row the top-1 of each seed, their mean with its interval
    and the reference's value, on an axis in percent that all rows share."""
    references = [find_reference(row.row.config) for row in rows]
    printed = [100 * reference["top1"] if reference else None for reference in references]
    chance = _chance(rows)
    values = [value for value in (*printed, chance) if value is not None]
    for row in rows:
        values += [value for _, _, value in _seeds(row)]
        if top1 := row.figures["top1"]:
            values += _ends(top1)
    axis = value_axis(values or [0.0, 100.0], 100)._replace(ends=_ACROSS)
    return {
        "ticks": axis.ticks(),
        "chance": None if chance is None else (axis.place(chance), number_text(chance, 1)),
        "rows": [_dots(row, value, axis) for row, value in zip(rows, printed, strict=True)],
    }


def _dots(row: RowResult, reference: float | None, axis: Axis) -> dict[str, Any]:
    top1 = row.figures["top1"]
    return {
        "label": row.title,
        "text": f"{top1.text(100)} %" if top1 else "no finished run",
        "seeds": [
            (axis.place(value), name, f"seed {seed}: {number_text(value, 2)} %")
            for name, seed, value in _seeds(row)
        ],
        "mean": axis.place(100 * top1.mean) if top1 else None,
        "interval": [axis.place(end) for end in _ends(top1)] if top1 else [],
        "reference": None
        if reference is None
        else (axis.place(reference), f"reference: {number_text(reference, 2)} %"),
    }


def _seeds(row: RowResult) -> list[tuple[str, int, float]]:
    """Name, seed and top-1 in percent of each run with figures."""
    bests = [(run.task, (run.best or {}).get("val_top1")) for run in row.runs]
    return [(task.name, task.seed, 100 * top1) for task, top1 in bests if top1 is not None]


def _ends(top1: Interval) -> tuple[float, float]:
    """The ends of the interval in percent, cut off where no accuracy can lie."""
    return max(100 * top1.low, 0.0), min(100 * top1.high, 100.0)


def _chance(rows: Sequence[RowResult]) -> float | None:
    """Top-1 of guessing in percent; None without a finished run that knows its classes."""
    counts = [run.summary.get("classes") for row in rows for run in row.finished]
    return next((100 / count for count in counts if count), None)


# Accuracy beside speed


class _Point(NamedTuple):
    """A row with figures."""

    study: int
    """The index of the study."""
    label: str
    rate: float
    """Median training images/s over the seeds."""
    top1: Interval
    """0 to 1."""


def draw_scatter(results: Sequence[StudyResult]) -> dict[str, Any]:
    """What the template draws: a point for each row with a finished run, coloured by study, and
    which rows no other one beats in both speed and accuracy. Empty without points."""
    points = [
        _Point(index, row.title, rate, top1)
        for index, study in enumerate(results)
        for row in study.rows
        if (top1 := row.figures["top1"]) and (rate := median_rate(row)) is not None
    ]
    if not points:
        return {}
    x = value_axis([point.rate for point in points])._replace(ends=_ACROSS)
    y = value_axis([100 * point.top1.mean for point in points], 100)._replace(ends=_UP)
    studies = {point.study: results[point.study].study for point in points}
    return {
        "x_ticks": x.ticks(),
        "y_ticks": y.ticks(),
        "studies": [(index, study.title) for index, study in studies.items()],
        "points": [
            {
                "study": point.study,
                "x": x.place(point.rate),
                "y": y.place(100 * point.top1.mean),
                "cells": (*_named(point, results), *_cells(point)),
            }
            for point in points
        ],
        "unbeaten": _unbeaten(points, results),
    }


def median_rate(row: RowResult) -> float | None:
    """The median over the finished seeds of the training images/s."""
    rates = [rate for run in row.finished if (rate := images_per_second(run)) is not None]
    return statistics.median(rates) if rates else None


def _named(point: _Point, results: Sequence[StudyResult]) -> tuple[str, str]:
    return results[point.study].study.title, point.label


def _cells(point: _Point) -> tuple[str, str]:
    return number_text(point.rate), point.top1.text(100)


def _unbeaten(points: list[_Point], results: Sequence[StudyResult]) -> list[str]:
    """The rows that no other row beats in both, fastest first, each as text; once for each pair of
    figures, since studies share runs."""
    best = {
        (point.rate, point.top1.mean): point
        for point in reversed(points)
        if not any(p.rate > point.rate and p.top1.mean > point.top1.mean for p in points)
    }
    ordered = sorted(best.values(), key=lambda point: -point.rate)
    return [
        f"{point.label} ({results[point.study].study.title}): {number_text(point.rate)} images/s, "
        f"{percent_text(point.top1.mean)} %"
        for point in ordered
    ]
