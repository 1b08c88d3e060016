"""Several runs on one page: their order, the best of them, and what distinguishes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastlab.console import UserError
from fastlab.report.page import write_report
from tests.report.test_page import CONFIG, SUMMARY, Element, epoch, make_run, page_of, png, results

DATASET = {
    "classes": ["cat", "dog"],
    "image_size": 32,
    "images": {"train": 100, "val": 20},
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.2],
    "request": {"layout": "folder"},
    "files": {"array": {"array/val-images.npy": "1f"}},
}


def reaching(path: Path, top1: float | None, **dataset: Any) -> Path:
    """A run with that best top-1; `dataset`: what its fingerprint has unlike `DATASET`."""
    return make_run(path, [epoch(1, val_top1=top1)], dataset={**DATASET, **dataset})


def names(page: Element) -> list[str]:
    return [row[0] for row in results(page)]


def test_runs_are_sorted_by_their_best_top1_and_the_best_is_marked(tmp_path: Path) -> None:
    values = {"a": 0.2, "b": None, "c": 0.4, "d": 0.3}
    page = page_of(*(reaching(tmp_path / name, top1) for name, top1 in values.items()))
    assert names(page) == ["c ★ best", "d", "a", "b"]
    assert [article.one("h3").text for article in page.all("article")] == ["c", "d", "a", "b"]
    legend = page.one("ul", class_="legend").all("li")
    assert [item.text for item in legend][:4] == ["c", "d", "a", "b"]


def test_runs_that_are_equally_good_are_all_marked(tmp_path: Path) -> None:
    page = page_of(*(reaching(tmp_path / n, v) for n, v in (("a", 0.3), ("b", 0.3), ("c", 0.1))))
    assert names(page) == ["a ★ best", "b ★ best", "c"]


def test_a_run_alone_is_not_called_the_best_and_differs_from_none(tmp_path: Path) -> None:
    page = page_of(reaching(tmp_path / "a", 0.3))
    assert names(page) == ["a"]
    assert "Settings that differ" not in page.text


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.5, 0.4, 0.2]},
        {"classes": ["cat", "eel"]},
        {"request": {"layout": "zip"}, "files": {"array": {"array/val-images.npy": "2f"}}},
    ],
)
def test_runs_on_another_dataset_are_marked_and_have_a_best_of_their_own(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    runs = [reaching(tmp_path / "x", 0.9, **change), reaching(tmp_path / "y", 0.8, **change)]
    runs += [reaching(tmp_path / name, top1) for name, top1 in (("a", 0.1), ("b", 0.3), ("c", 0.2))]
    page = page_of(*runs)
    other = "other dataset (2): not comparable"
    assert names(page) == ["b ★ best", "c", "a", f"x ★ best {other}", f"y {other}"]
    assert len(page.one("ol", class_="note datasets").all("li")) == 2


def test_another_copy_or_format_of_a_dataset_is_the_same_dataset(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"request": {"layout": "zip"}},  # equal files
        {"files": {"tar": {"tar/val.tar": "3f"}}},  # an equal request
        {"request": {"layout": "zip"}, "files": {**DATASET["files"], "tar": {"tar/val.tar": "4f"}}},
    ]
    runs = [reaching(tmp_path / f"run{n}", 0.1, **change) for n, change in enumerate(changes)]
    assert "other dataset" not in page_of(*runs).text


def test_a_damaged_fingerprint_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [epoch(1)], dataset={"classes": []})
    with pytest.raises(UserError, match=r"dataset\.json: damaged"):
        write_report([run], tmp_path / "report.html")


def test_the_settings_that_differ_come_first_and_no_others(tmp_path: Path) -> None:
    runs = [reaching(tmp_path / name, top1) for name, top1 in (("a", 0.1), ("b", 0.3), ("c", 0.2))]
    changed = CONFIG.replace("/data/", "/other/").replace("epochs = 5", "epochs = 7")
    (runs[1] / "config.toml").write_text(changed)
    (runs[2] / "config.toml").write_text(CONFIG + "[augment]\nflip = true\n")
    page = page_of(*runs)
    table = page.one("table", class_="results differences")
    rows = [[cell.text for cell in row.children] for row in table.all("tr")]
    assert rows == [
        ["Run", "train.epochs", "augment.flip", "data.path"],
        ["b", "7", "—", "/other/<i>tiny</i>"],
        ["c", "5", "true", "/data/<i>tiny</i>"],
        ["a", "5", "—", "/data/<i>tiny</i>"],
    ]
    assert page.all("table")[0] is table


def test_runs_of_equal_settings_are_said_to_have_them(tmp_path: Path) -> None:
    page = page_of(reaching(tmp_path / "a", 0.1), reaching(tmp_path / "b", 0.2))
    assert "None: all runs have equal settings." in page.text
    assert page.all("table", class_="results differences") == []


def test_a_page_of_many_runs_folds_them_and_shows_pictures_of_the_best(tmp_path: Path) -> None:
    samples = [{"png": png(2, 2), "label": "cat", "predicted": []}]
    top1 = [((7 * n) % 45) / 100 for n in range(45)]
    runs = [reaching(tmp_path / f"run{n}", value) for n, value in enumerate(top1)]
    for run in runs:
        (run / "predictions.json").write_text(json.dumps(samples))
        (run / "summary.json").write_text(json.dumps(SUMMARY))
    page = page_of(*runs)
    assert len(results(page)) == len(page.all("article")) == 45
    assert [len(article.all("img")) for article in page.all("article")] == [1] * 3 + [0] * 42
    for article in page.all("article"):
        head, folded = article.children
        assert (head.tag, folded.tag, "open" in folded.attributes) == ("h3", "details", False)
    drawn = [
        group for group in page.all("g") if "val top1" in (group.attributes.get("data-curve") or "")
    ]
    best = sorted(range(45), key=lambda n: -top1[n])[:40]
    assert [group.attributes["data-curve"] for group in drawn] == [f"run{n} val top1" for n in best]
    assert "The first 40 of 45 runs" in page.text
    few = page_of(*runs[:12])
    assert [len(article.all("img")) for article in few.all("article")] == [1] * 12
