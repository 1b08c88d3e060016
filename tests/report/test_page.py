"""Reports, read back with the standard library's HTML parser."""

import base64
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastlab.cli import main
from fastlab.console import UserError
from fastlab.report.page import write_report
from tests.trainings import command, launch, wait_until

VOID = {"meta", "img", "br", "link", "wbr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    parent: "Element | None" = None
    children: list["Element"] = field(default_factory=list)
    pieces: list["str | Element"] = field(default_factory=list)

    @property
    def text(self) -> str:
        texts = [piece if isinstance(piece, str) else piece.text for piece in self.pieces]
        return " ".join("".join(texts).split())

    def all(self, tag: str, **attributes: str) -> list["Element"]:
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        elements = []
        for child in self.children:
            if child.tag == tag and wanted.items() <= child.attributes.items():
                elements.append(child)
            elements += child.all(tag, **attributes)
        return elements

    def one(self, tag: str, **attributes: str) -> "Element":
        (element,) = self.all(tag, **attributes)
        return element


class Tree(HTMLParser):
    """Builds the tree of elements; a tag that is closed out of order fails the test."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = self.open = Element("", {})
        self.feed(page)
        self.close()
        assert self.open is self.root

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs), self.open)
        self.open.children.append(element)
        self.open.pieces.append(element)
        if tag not in VOID:
            self.open = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.tag == tag
        self.open = self.open.parent

    def handle_data(self, data: str) -> None:
        self.open.pieces.append(data)


def png(width: int, height: int) -> str:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + bytes(width)) * height))
    image = b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
    return base64.b64encode(image).decode()


def epoch(number: int, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl; validation top-1 grows by a hundredth with each epoch."""
    defaults = {
        "epoch": number,
        "step": 10 * number,
        "lr": 0.1,
        "train_loss": 5.0 - 0.1 * number,
        "train_top1": 0.02 * number,
        "train_top5": 0.04 * number,
        "val_loss": 5.0 - 0.05 * number,
        "val_top1": 0.01 * number,
        "val_top5": 0.03 * number,
        "val_images": 100,
        "val_correct1": number,
        "val_correct5": 3 * number,
        "images_per_second": 1000.0,
        "seconds": 2.0,
    }
    return {**defaults, **values}


CONFIG = """
[data]
path = "/data/<i>tiny</i>"
[model]
name = "resnet11"
widths = [64, 128]
[train]
epochs = 5
compile = true
"""

SUMMARY = {
    "name": "a",
    "parameters": 1234567,
    "dataset": {"path": "tiny", "classes": 200, "counts": {"train": 100000, "val": 10000}},
    "status": "finished",
    "train_seconds": 3723.4,
}

ENVIRONMENT = {
    "date": "2026-11-24T10:00:00+00:00",
    "command": "fastlab train",
    "machine": {"cpu": "EPYC", "cores": 2, "memory_gib": 7.5, "gpus": []},
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "processes": 1,
    "git": None,
}


def make_run(path: Path, epochs: list[dict[str, Any]], **files: Any) -> Path:
    """Write a run directory; `files` are the contents of JSON files such as summary."""
    path.mkdir(parents=True)
    (path / "config.toml").write_text(CONFIG)
    (path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def page_of(*runs: Path) -> Element:
    out = runs[0].parent / "report.html"
    write_report(list(runs), out)
    return Tree(out.read_text(encoding="utf-8")).root


def results(page: Element) -> list[list[str]]:
    rows = page.one("table", class_="results figures").one("tbody").all("tr")
    return [[cell.text for cell in row.children] for row in rows]


def curve(page: Element, name: str) -> list[list[tuple[float, float]]]:
    """The points of each segment of a curve."""
    lines = page.one("g", data_curve=name).all("polyline")
    points = [line.attributes["points"].split() for line in lines]
    return [[tuple(map(float, point.split(","))) for point in segment] for segment in points]


def test_a_row_of_results_holds_the_values_of_the_best_epoch(tmp_path: Path) -> None:
    epochs = [
        epoch(1, val_top1=0.10, images_per_second=5.0),
        epoch(2, val_top1=0.4217, val_top5=0.7, val_loss=2.34567, images_per_second=3000.0),
        epoch(3, val_top1=0.4217, val_top5=0.8, images_per_second=1000.0),
        epoch(4, val_top1=0.30, images_per_second=None),
    ]
    page = page_of(make_run(tmp_path / "a", epochs, summary=SUMMARY))
    (row,) = results(page)
    assert row[:6] == ["a", "42.17", "2", "70.00", "2.3457", "30.00"]
    assert row[6:10] == ["0.50", "resnet11", "1,234,567", "4 of 5"]
    assert row[10:] == ["2,000", "1 h 02 min", "✓ finished"]


def test_a_run_without_a_summary_and_with_one_epoch_is_reported(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a", [epoch(1, seconds=61.2, images_per_second=12.0)]))
    (row,) = results(page)
    assert row[:6] == ["a", "1.00", "1", "3.00", "4.9500", "1.00"]
    assert row[6:10] == ["—", "resnet11", "—", "1 of 5"]
    assert row[10:] == ["12", "1 min 01 s", "? unknown"]
    # A line through a single point draws nothing, so the mark must show it.
    group = page.one("g", data_curve="a val top1")
    (mark,) = group.all("path")
    ((point,),) = curve(page, "a val top1")
    assert mark.attributes["transform"] == f"translate({point[0]} {point[1]})"


def test_the_time_of_an_unfinished_run_is_the_sum_over_its_epochs(tmp_path: Path) -> None:
    summary = {**SUMMARY, "status": "running", "train_seconds": 0.0}
    run = make_run(tmp_path / "a", [epoch(1), epoch(2, seconds=40.5)], summary=summary)
    *_, time, status = results(page_of(run))[0]
    assert (time, status) == ("42.5 s", "■ interrupted")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_run_is_interrupted_and_no_longer_running(
    synth_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = launch(command(synth_dataset, run, "train.compile=false", "train.epochs=100000"))
    try:
        metrics = run / "metrics.jsonl"
        assert wait_until(lambda: metrics.exists() and b"\n" in metrics.read_bytes(), process)
        assert results(page_of(run))[0][-1] == "▶ running"
        copy = Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns(".*")))
        assert results(page_of(copy))[0][-1] == "■ interrupted"
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert results(page_of(run))[0][-1] == "■ interrupted"


def test_what_is_no_run_yet_is_left_out_with_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs/a", [epoch(1)])
    make_run(tmp_path / "runs/begun", [])
    make_run(tmp_path / "runs/claimed", [])
    (tmp_path / "runs/claimed/metrics.jsonl").unlink()
    (tmp_path / "runs/empty").mkdir()
    (tmp_path / "runs/report.html").write_text("a page")
    paths, out = sorted((tmp_path / "runs").iterdir()), tmp_path / "out.html"
    assert main(["report", *map(str, paths), "--out", str(out)]) == 0
    assert [row[0] for row in results(Tree(out.read_text()).root)] == ["a"]
    begun, claimed, empty, page = capsys.readouterr().err.splitlines()
    assert "runs/begun/" in begun and "runs/claimed/" in claimed
    assert "no epoch" in begun and "no epoch" in claimed
    assert "runs/empty: not a run" in empty and "runs/report.html: not a run" in page
    # Without any run there is no report, and a path that does not exist is a mistake.
    out.unlink()
    assert main(["report", *map(str, paths[1:]), "--out", str(out)]) == 2
    assert "nothing to report" in capsys.readouterr().err.splitlines()[-1]
    assert main(["report", str(tmp_path / "runs/b"), *map(str, paths), "--out", str(out)]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert not out.exists()


def ticks_of(page: Element, name: str) -> list[float]:
    """The labels of the vertical axis on which a curve is drawn."""
    texts = page.one("g", data_curve=name).parent.parent.all("text")
    return [float(t.text) for t in texts if t.attributes["text-anchor"] == "end"]


def test_a_diverged_run_does_not_flatten_the_other_curves(tmp_path: Path) -> None:
    usual = [epoch(n, train_loss=2.4 - 0.2 * n, val_loss=2.5 - 0.2 * n) for n in range(1, 7)]
    diverged = [epoch(1, train_loss=2.3, val_loss=2.4), epoch(2, train_loss=9e3, val_loss=4e15)]
    summary = {**SUMMARY, "dataset": {"path": "tiny", "classes": 10}}
    alone = make_run(tmp_path / "usual", usual, summary=summary)
    expected = curve(page_of(alone), "usual val loss"), ticks_of(page_of(alone), "usual val loss")
    page = page_of(alone, make_run(tmp_path / "lost", diverged, summary=summary))
    assert (curve(page, "usual val loss"), ticks_of(page, "usual val loss")) == expected
    # The value above the axis lies on its upper edge, at an arrow, and is said in words.
    group = page.one("g", data_curve="lost val loss")
    ((_, (left, top)),) = curve(page, "lost val loss")
    assert top == 12
    (arrow,) = group.all("path", class_="arrow")
    assert arrow.attributes["transform"] == f"translate({left} 12)"
    figure = group.parent.parent.parent
    note = figure.one("p", class_="note").text
    assert "lost (up to 4e+15)" in note and "usual" not in note
    assert "4e+15" in figure.one("table").text
    assert [len(f.all("p", class_="note")) for f in page.all("figure")] == [1, 0, 0, 0, 0]
    assert page.one("g", data_curve="usual val loss").all("path", class_="arrow") == []


def test_a_run_that_only_diverged_keeps_its_axis(tmp_path: Path) -> None:
    losses = [epoch(n, train_loss=100.0 * n, val_loss=200.0 * n) for n in (1, 2)]
    page = page_of(make_run(tmp_path / "a", losses, summary=SUMMARY))
    assert ticks_of(page, "a val loss")[-1] == 400
    assert page.all("path", class_="arrow") == []


def test_each_run_has_one_row_and_a_distinct_name(tmp_path: Path) -> None:
    paths = [tmp_path / "x/seed0", tmp_path / "y/seed0", tmp_path / "y/seed1"]
    runs = [make_run(path, [epoch(1)]) for path in paths]
    page = page_of(*runs, runs[0])
    assert [row[0].split()[0] for row in results(page)] == ["x/seed0", "y/seed0", "seed1"]
    links = page.one("table", class_="results figures").all("a")
    targets = {article.attributes["id"] for article in page.all("article")}
    assert {"#" + target for target in targets} == {a.attributes["href"] for a in links}
    assert len(targets) == 3


def test_curves_follow_the_values(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a", [epoch(n) for n in range(1, 31)]))
    (accuracy,) = curve(page, "a val top1")
    (loss,) = curve(page, "a val loss")
    for points in (accuracy, loss):
        assert len(points) == 30
        steps = [after[0] - before[0] for before, after in pairwise(points)]
        assert max(steps) - min(steps) < 0.05 and min(steps) > 0
    # SVG's y grows downwards.
    assert [y for _, y in accuracy] == sorted({y for _, y in accuracy}, reverse=True)
    assert [y for _, y in loss] == sorted({y for _, y in loss})


def test_points_agree_with_the_axes(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a", [epoch(n) for n in range(1, 31)]))
    svg = page.one("g", data_curve="a val top1").parent.parent
    labels = svg.all("text")
    values = [t for t in labels if t.attributes["text-anchor"] == "end"]
    epochs = [t for t in labels if t.attributes["text-anchor"] == "middle" and t.text != "epoch"]
    # Training reaches 60 %, validation starts at 1 %.
    assert [t.text for t in values] == ["0", "20", "40", "60"]
    assert [t.text for t in epochs] == ["0", "5", "10", "15", "20", "25", "30"]
    gridlines = [float(line.attributes["y1"]) for line in svg.all("line", class_="grid")]
    ((*_, twentieth, _, _, _, _, _, _, _, _, _, _),) = curve(page, "a val top1")
    assert twentieth[1] == gridlines[1]
    assert twentieth[0] == float(epochs[4].attributes["x"])


def test_learning_rates_far_apart_have_a_logarithmic_axis(tmp_path: Path) -> None:
    rates = [0.02, 0.002, 0.0002]
    epochs = [epoch(number, lr=rate) for number, rate in enumerate(rates, 1)]
    page = page_of(make_run(tmp_path / "a", epochs))
    (points,) = curve(page, "a train lr")
    drops = [after[1] - before[1] for before, after in pairwise(points)]
    assert drops[0] == pytest.approx(drops[1], abs=0.02) and drops[0] > 0
    assert ticks_of(page, "a train lr") == [1e-4, 1e-3, 1e-2, 1e-1]
    figure = page.one("g", data_curve="a train lr").parent.parent.parent
    assert figure.one("figcaption").text == "Learning rate at the epoch's first step"
    rows = figure.one("table").one("tbody").all("tr")
    assert [[cell.text for cell in row.children] for row in rows] == [
        ["1", "0.02"],
        ["2", "0.002"],
        ["3", "0.0002"],
    ]


@pytest.mark.parametrize("rates", [(0.02, 0.01), (0.02, 0.0), (0.02, 5e-324), (1e299, 1.0)])
def test_other_learning_rates_have_a_linear_axis(
    tmp_path: Path, rates: tuple[float, float]
) -> None:
    page = page_of(make_run(tmp_path / "a", [epoch(1, lr=rates[0]), epoch(2, lr=rates[1])]))
    ticks = ticks_of(page, "a train lr")
    steps = [after - before for before, after in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_throughput_is_drawn_in_images_per_second(tmp_path: Path) -> None:
    rates = [1200.0, None, 4000.0]
    epochs = [epoch(number, images_per_second=rate) for number, rate in enumerate(rates, 1)]
    page = page_of(make_run(tmp_path / "a", epochs))
    figure = page.one("g", data_curve="a train images_per_second").parent.parent.parent
    assert figure.one("figcaption").text == "Throughput images/s"
    tooltips = [title.text for title in figure.all("title")]
    assert tooltips == ["Epoch 1 a: train 1,200", "Epoch 2 a: train —", "Epoch 3 a: train 4,000"]


@pytest.mark.parametrize(("loss", "label"), [(0.0, "0.0"), (2.5, "2.5"), (4e12, "4e+12")])
def test_the_axis_of_a_constant_encloses_it(tmp_path: Path, loss: float, label: str) -> None:
    page = page_of(make_run(tmp_path / "a", [epoch(1, train_loss=loss, val_loss=loss)]))
    svg = page.one("g", data_curve="a val loss").parent.parent
    ticks = {
        t.text: float(t.attributes["y"])
        for t in svg.all("text")
        if t.attributes["text-anchor"] == "end"
    }
    ((point,),) = curve(page, "a val loss")
    # Labels lie 5 units below their line, which centres them on it.
    assert ticks[label] - 5 == pytest.approx(point[1], abs=0.02)


@pytest.mark.parametrize(("share", "last"), [(1.0, "100"), (0.0, "1.0")])
def test_the_axis_of_an_accuracy_stays_within_0_and_100(
    tmp_path: Path, share: float, last: str
) -> None:
    page = page_of(make_run(tmp_path / "a", [epoch(1, train_top1=share, val_top1=share)]))
    svg = page.one("g", data_curve="a val top1").parent.parent
    ticks = [t.text for t in svg.all("text") if t.attributes["text-anchor"] == "end"]
    assert ticks[-1] == last
    assert float(ticks[0]) >= 0


def test_a_value_that_is_not_a_number_leaves_a_gap(tmp_path: Path) -> None:
    epochs = [epoch(n) for n in range(1, 7)]
    epochs[2]["val_loss"] = float("nan")
    epochs[4]["val_loss"] = None
    page = page_of(make_run(tmp_path / "a", epochs))
    assert [len(segment) for segment in curve(page, "a val loss")] == [2, 1, 1]
    assert [len(segment) for segment in curve(page, "a train loss")] == [6]
    table = page.one("g", data_curve="a val loss").parent.parent.parent.one("table", class_="data")
    values = [row.all("td")[1].text for row in table.one("tbody").all("tr")]
    assert values == ["4.9500", "4.9000", "—", "4.8000", "—", "4.7000"]


def test_a_metric_without_any_number_has_no_curve(tmp_path: Path) -> None:
    epochs = [epoch(1, train_top1=None, val_top1=float("nan"), val_top5=None, train_top5=None)]
    page = page_of(make_run(tmp_path / "a", epochs))
    assert curve(page, "a val top1") == []
    assert results(page)[0][1:6] == ["—", "—", "—", "—", "—"]


@pytest.mark.parametrize("loss", ["1e308", "-1e308", "9" * 400, "-1e999"])
def test_a_value_too_large_for_arithmetic_counts_as_not_a_number(tmp_path: Path, loss: str) -> None:
    run = make_run(tmp_path / "a", [epoch(1, val_loss=1e308), epoch(2), epoch(3)])
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines.replace('"val_loss": 4.9,', f'"val_loss": {loss},'))
    page = page_of(run)
    assert [len(segment) for segment in curve(page, "a val loss")] == [1]
    assert "4.8500" in results(page)[0]


def test_the_table_below_a_plot_holds_every_run(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", [epoch(1), epoch(2)]), make_run(tmp_path / "b", [epoch(1)])]
    page = page_of(*runs)
    table = page.all("table", class_="data")[1]
    rows = [[cell.text for cell in row.children] for row in table.one("tbody").all("tr")]
    assert rows == [["1", "2.00", "1.00", "2.00", "1.00"], ["2", "4.00", "2.00", "—", "—"]]
    assert [head.text for head in table.all("th", scope="colgroup")] == ["a", "b"]


def test_class_names_are_not_truncated(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a", [epoch(1)]))
    assert "line-clamp" not in page.one("style").text


def test_predictions_are_marked_right_or_wrong_in_words(tmp_path: Path) -> None:
    guesses = [{"name": "cat", "probability": 0.625}, {"name": "dog", "probability": 0.25}]
    predictions = [
        {"png": png(6, 4), "label": label, "predicted": guesses} for label in ("cat", "dog", "eel")
    ]
    page = page_of(make_run(tmp_path / "a", [epoch(1)], predictions=predictions))
    verdicts = [p.text for p in page.all("p", class_="verdict")]
    assert verdicts == [
        "✓ right",
        "✗ wrong, true class ranked 2",
        "✗ wrong, true class not in the top 2",
    ]
    assert "Sample predictions: 1 of 3 right" in [h.text for h in page.all("h4")]
    image = page.all("img")[0].attributes
    assert image["src"] == f"data:image/png;base64,{png(6, 4)}"
    assert (image["width"], image["height"]) == ("6", "4")
    assert "cat" in image["alt"]
    first = page.one("ul", class_="predictions").all("ol")[0]
    assert [li.text for li in first.all("li")] == ["cat62.5 %", "dog25.0 %"]
    bars = [span.attributes["style"] for span in first.all("span") if "style" in span.attributes]
    assert bars == ["width: 62.5%", "width: 25.0%"]


ERRORS = {
    "classes": [
        {"name": "cat", "images": 4, "correct": 3},
        {"name": "dog", "images": 8, "correct": 1},
        {"name": "eel", "images": 0, "correct": 0},
    ],
    "confused": [{"label": "dog", "predicted": "cat", "count": 6}],
    "worst": [
        {"png": png(3, 3), "label": "dog", "predicted": [{"name": "cat", "probability": 0.875}]}
    ],
}


def test_the_errors_of_a_run_are_shown_by_class_pair_and_picture(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a", [epoch(1)], errors=ERRORS))
    classes, confused = (
        [[cell.text for cell in row.children] for row in table.one("tbody").all("tr")]
        for table in page.one("div", class_="errors").all("table")
    )
    # A class without validation images has no accuracy.
    assert classes == [["dog", "12.50", "1", "8"], ["cat", "75.00", "3", "4"]]
    assert confused == [["dog", "cat", "6"]]
    assert [p.text for p in page.all("p", class_="verdict")] == [
        "✗ wrong, true class not in the top 1"
    ]
    assert "cat87.5 %" in page.one("ul", class_="predictions").text
    assert all("open" in details.attributes for details in page.one("article").all("details"))


def test_the_errors_of_several_runs_are_folded_and_an_older_run_has_none(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", [epoch(1)], errors=ERRORS),
        make_run(tmp_path / "b", [epoch(1)]),
    ]
    first, second = page_of(*runs).all("article")
    summaries = [[d.one("summary").text for d in each.all("details")] for each in (first, second)]
    assert summaries[1] == ["Configuration", "Environment"]
    assert [text.split(":")[0] for text in summaries[0]] == [
        "Worst mistakes",
        "Accuracy by class, lowest first",
        "Most confused pairs",
        *summaries[1],
    ]
    assert not [d for d in first.all("details") if "open" in d.attributes]


def test_a_run_without_a_mistake_says_so(tmp_path: Path) -> None:
    errors = {"classes": ERRORS["classes"], "confused": [], "worst": []}
    page = page_of(make_run(tmp_path / "a", [epoch(1)], errors=errors))
    assert "No image is wrong." in page.text
    assert len(page.one("div", class_="errors").all("table")) == 1


def test_configuration_and_environment_are_shown_as_tables(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a", [epoch(1)]))
    tables = {
        table.one("caption").text: {
            row.one("th").text: row.one("td").text for row in table.all("tr")
        }
        for table in page.all("table", class_="settings")
    }
    assert list(tables) == ["data", "model", "train", "environment"]
    assert tables["data"] == {"path": "/data/<i>tiny</i>"}
    assert tables["model"] == {"name": "resnet11", "widths": "[64, 128]"}
    assert tables["train"] == {"epochs": "5", "compile": "true"}
    assert tables["environment"]["machine.gpus"] == "none"
    assert tables["environment"]["versions.torch"] == "2.15.0"
    assert tables["environment"]["git"] == "—"


def test_a_page_holds_no_absolute_path(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [epoch(1)], summary=SUMMARY)
    for file in run.iterdir():
        content = file.read_text().replace("fastlab train", "/elsewhere/bin/fastlab train")
        content = re.sub(r'"(tiny|/data/<i>tiny</i>)"', '"/elsewhere/data/tiny"', content)
        file.write_text(content)
    page = page_of(run)
    assert "elsewhere" not in page.text
    assert "tiny, 200 classes" in page.text and "fastlab train" in page.text


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    attack = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
    prediction = {
        "png": png(2, 2),
        "label": attack,
        "predicted": [{"name": attack, "probability": 1.0}],
    }
    summary = {**SUMMARY, "status": attack, "dataset": {"path": attack, "classes": 2}}
    run = make_run(tmp_path / "<script>x", [epoch(1)], predictions=[prediction], summary=summary)
    page = page_of(run)
    assert page.all("script") == [] and page.all("i") == []
    assert len(page.all("img")) == 1
    assert page.one("p", class_="label").text == attack
    handlers = [a for e in everything(page) for a in e.attributes if a.startswith("on")]
    assert handlers == []


def everything(element: Element) -> list[Element]:
    return [element, *(e for child in element.children for e in everything(child))]


def test_a_page_loads_nothing(tmp_path: Path) -> None:
    prediction = {"png": png(2, 2), "label": "cat", "predicted": []}
    page = page_of(make_run(tmp_path / "a", [epoch(1)], predictions=[prediction]))
    elements = everything(page)
    assert {e.tag for e in elements}.isdisjoint({"script", "link", "iframe", "object", "base"})
    sources = [e.attributes[a] for e in elements for a in ("src", "href") if a in e.attributes]
    assert len(sources) == 2
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    style = page.one("style").text
    assert "url(" not in style and "@import" not in style
    assert not re.search("https?:", (tmp_path / "report.html").read_text())


def test_a_page_is_accessible(tmp_path: Path) -> None:
    prediction = {"png": png(2, 2), "label": "cat", "predicted": []}
    page = page_of(make_run(tmp_path / "a", [epoch(1), epoch(2)], predictions=[prediction]))
    assert page.one("html").attributes["lang"] == "en"
    page.one("meta", name="viewport")
    plots = page.all("svg", class_="plot")
    assert [plot.attributes["role"] for plot in plots] == ["img"] * 5
    assert "Validation at the last epoch: a 2.00" in plots[1].attributes["aria-label"]
    assert all("scope" in head.attributes for head in page.all("th"))
    identifiers = [e.attributes["id"] for e in everything(page) if "id" in e.attributes]
    assert len(identifiers) == len(set(identifiers))
    references = {
        e.attributes["aria-labelledby"]
        for e in everything(page)
        if "aria-labelledby" in e.attributes
    }
    assert references and references <= set(identifiers)
    tooltips = [title.text for title in plots[1].all("title")]
    assert tooltips == ["Epoch 1 a: train 2.00, val 1.00", "Epoch 2 a: train 4.00, val 2.00"]


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_an_incomplete_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    run = make_run(tmp_path / "a", [epoch(1), epoch(2)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(epoch(3))[:cut])
    assert results(page_of(run))[0][9] == "2 of 5"


def test_a_last_line_that_lacks_only_its_newline_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [epoch(1)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(epoch(2)))
    assert results(page_of(run))[0][9] == "2 of 5"


BROKEN_LINES = {
    "cut short": '{"epoch": 2, "val',
    "blank": "",
    "list": "[2]",
    "no epoch": '{"loss": 1.0}',
    "no loss": json.dumps({k: v for k, v in epoch(2).items() if k != "val_loss"}),
    "text": json.dumps(epoch(2, val_loss="1.0")),
    "repeated": json.dumps(epoch(1)),
    "huge epoch": json.dumps({**epoch(2), "epoch": 10**400}),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("line", BROKEN_LINES.values(), ids=BROKEN_LINES)
def test_a_malformed_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    run = make_run(tmp_path / "a", [])
    lines = [json.dumps(epoch(1)), line, json.dumps(epoch(3))]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert_user_error([run], tmp_path / "report.html", "metrics.jsonl: line 2 ")


def assert_user_error(runs: list[Path], out: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        write_report(runs, out)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert [part for part in parts if part not in message] == []


def test_a_directory_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert_user_error([tmp_path / "gone"], out, str(tmp_path / "gone"), "no such directory")
    assert_user_error([tmp_path], out, str(tmp_path), "not a run directory")
    assert not out.exists()


def test_a_run_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [epoch(1)])
    (run / "environment.json").unlink()
    assert_user_error([run], tmp_path / "report.html", str(run / "environment.json"), "missing")


@pytest.mark.parametrize("content", ["", '{"epoch": 1, "st'])
def test_a_run_without_an_epoch_is_refused(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path / "a", [])
    (run / "metrics.jsonl").write_text(content)
    assert_user_error([run], tmp_path / "report.html", "metrics.jsonl", "no epoch")


BROKEN_FILES = [
    ("config.toml", "epochs = "),
    ("environment.json", "[]"),
    ("environment.json", "{"),
    ("summary.json", '{"parameters": "many"}'),
    ("summary.json", '{"dataset": {"classes": true}}'),
    ("summary.json", '{"dataset": []}'),
    ("summary.json", "[" * 100_000),
    ("config.toml", f"a = {'[' * 100_000}"),
    ("config.toml", f"{'a.' * 200_000}a = 1"),
    ("predictions.json", '[{"png": "AAAA", "label": "cat", "predicted": []}]'),
    ("predictions.json", json.dumps([{"png": png(1, 1) + "'>", "label": "", "predicted": []}])),
    ("predictions.json", '[{"label": "cat", "predicted": []}]'),
    ("predictions.json", "[1]"),
    ("predictions.json", '["é' + "a" * 2000),
    ("errors.json", "[]"),
    ("errors.json", '{"classes": [{"name": "a", "images": 1, "correct": 2}], "confused": []}'),
    ("errors.json", json.dumps({**ERRORS, "confused": [{**ERRORS["confused"][0], "count": "6"}]})),
    ("errors.json", json.dumps({**ERRORS, "worst": [{"png": "AAAA"}]})),
]


@pytest.mark.parametrize(("name", "content"), BROKEN_FILES)
def test_a_malformed_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    run = make_run(tmp_path / "a", [epoch(1)])
    (run / name).write_text(content, encoding="latin-1")
    assert_user_error([run], tmp_path / "report.html", str(run / name), "correct the file")


def test_an_unwritable_output_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [epoch(1)])
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    for out in ("gone/report.html", "file/report.html", "folder.html"):
        assert_user_error([run], tmp_path / out, out, "cannot be written")
    assert_user_error([run], tmp_path / "file", "ends in .html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file", "folder.html"]


def test_a_report_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "a", [epoch(1)])
    out = tmp_path / "report.html"
    out.write_text("earlier")

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk)
        assert_user_error([run], out, "No space left on device")
    assert out.read_text() == "earlier"
    with out.open() as reader:
        write_report([run], out)
        assert reader.read() == "earlier"
    assert out.read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "report.html"]


def test_the_report_does_not_import_torch() -> None:
    code = "import sys, fastlab.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
