import base64
import hashlib
import json

import pytest

from fastlab import config as configs
from fastlab.study.folder import StudyDir
from fastlab.study.report import write_report
from fastlab.study.spec import read_study, tasks_of
from tests.study.studies import Page, make_run, write_study


def test_the_page_of_a_partial_study_shows_figures_references_and_gaps(partial):
    folder, studies = partial
    write_report(folder, studies, "fastlab study <b>")
    text = folder.html.read_text()
    page = Page(text)
    cells = {}
    row = ""
    for element in page.elements:
        row = (
            element["text"].split("seed")[0].strip() if element.get("scope") == "rowgroup" else row
        )
        if element["tag"] == "td" and "data-key" in element:
            cells.setdefault((row, element["data-key"]), []).append(element["text"])
    # here, the reference's row of the factor, the difference
    assert cells["0.1", "top1"] == ["51.00 ± 2.48", "45.12", "+5.88"]
    assert cells["0.1", "loss"] == ["1.490 ± 0.025", "2.392", "-0.902"]
    assert cells["0.1", "printed"] == ["0.0118 ± 0.0002", "0.0189", "-0.0071"]
    assert cells["0.1", "seeds"][0] == "3 of 3" and cells["0.1", "rate"][0] == "100"
    assert cells["0.5", "top1"][0] == "49.00" and cells["0.5", "seeds"][0] == "1 of 3"
    assert cells["0.99", "top1"] == ["—", "39.25", "—"]
    # Seed by seed 20 points below the first row; of the third row, seed 0 alone is finished.
    paired = [cells[row, "paired"][0] for row in ("0.1", "0.2", "0.5", "0.99")]
    assert paired == ["", "-20.00 ± 0.00", "-1.00", "—"]
    notes = " ".join(p["text"] for p in page.all("p") if p.get("class") == "note")
    assert "seed 1 failed: out of <memory>; seed 2 interrupted" in notes
    assert "Not at the reference’s scale" in text and "classes 10 (reference: 200)" in text
    assert "pixels a side 32 (reference: 64)" in text
    assert "training images 100 (reference: 100,000)" in text
    assert "Mine & <more>" in next(h["text"] for h in page.all("h2") if "Mine" in h["text"])
    claims = [li["text"] for li in page.all("li") if "small beats middle" in li["text"]]
    # 20 percentage points in every seed.
    assert len(claims) == 1 and "✓" in claims[0] and "20.0 ± " in claims[0]


def test_the_page_is_self_contained_and_accessible(partial):
    folder, studies = partial
    write_report(folder, studies, "command")
    text = folder.html.read_text()
    page = Page(text)
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(ids) == len({*ids})
    assert all(a["href"].startswith("#") and a["href"][1:] in ids for a in page.all("a"))
    assert all(e["aria-labelledby"] in ids for e in page.elements if "aria-labelledby" in e)
    assert not [e for e in page.elements if "src" in e or e["tag"] in ("link", "iframe")]
    (script,) = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert "prefers-color-scheme: dark" in text and "url(" not in text and "@import" not in text
    assert {"name": "viewport"}.items() <= page.all("meta")[1].items()
    plots = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    tables = [t for t in page.all("table") if "figure" in t["within"]]
    # Loss, top-1 and top-5, each with its values as a table, and accuracy beside speed.
    assert len(plots) == 4 and len(tables) == 3 and all(svg["aria-label"] for svg in plots)
    assert all("details" in table["within"] for table in tables)
    outer = [svg for svg in page.all("svg") if "svg" not in svg["within"]]
    assert all(svg.get("aria-hidden") for svg in outer if svg not in plots)
    assert all(
        th.get("scope")
        for th in page.all("th")
        if "pre" not in th["within"][-2:] and "settings" not in str(th.get("class"))
    )


def test_every_runs_configuration_is_on_the_page(partial):
    folder, studies = partial
    write_report(folder, studies, "command")
    page = Page(folder.html.read_text())
    configurations = {pre["id"].removeprefix("run-"): pre for pre in page.all("pre")}
    tasks = tasks_of(studies)
    assert configurations.keys() == {task.name for task in tasks}
    for task in tasks:
        assert configurations[task.name]["text"].strip() == configs.dump(task.config).strip()
        assert "details" in configurations[task.name]["within"]


def test_reports_show_neither_absolute_paths_nor_a_memory_that_varies(tmp_path):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]\nseeds = [0]')
    study = read_study(path, ["data.path=/elsewhere/data/tiny"])
    folder = StudyDir(tmp_path / "out")
    for row, memory in zip(study.rows, (101.5, 102.5), strict=True):
        make_run(folder, row.tasks[0], 0.5)
        environment = {"machine": {"cores": 2, "memory_gib": memory}}
        (folder.run(row.tasks[0]) / "environment.json").write_text(json.dumps(environment))
    write_report(folder, [study], "fastlab study x --set 'data.path=\"/elsewhere/data/tiny\"'")
    for report in (folder.html, folder.markdown):
        text = report.read_text()
        assert "elsewhere" not in text and "tiny" in text
        assert "machine.cores" in text and "memory_gib" not in text


def test_markdown_shows_the_same_as_the_page(partial):
    folder, studies = partial
    write_report(folder, studies, "fastlab study x")
    text = folder.markdown.read_text()
    assert "| 0.1 | here | 51.00 ± 2.48 |" in text and "|  | difference | +5.88 |" in text
    confirmed = text.split("## Confirmed")[1].split("## Refuted")[0]
    assert "- Mine & <more>: small beats middle." in confirmed
    assert "Not in the figures: 0.5: seed 1 failed: out of <memory>" in text
    assert "`fastlab study x`" in text


def test_a_study_without_any_run_has_a_report(tmp_path):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]\nseeds = [3, 4, 5, 7]')
    study, folder = read_study(path, []), StudyDir(tmp_path / "out")
    folder.create(tasks_of([study]))
    for task in study.rows[1].tasks[:3]:
        folder.write_record(task, "failed", "out of memory")
    write_report(folder, [study], "command")
    text = Page(folder.html.read_text()).all("body")[0]["text"]
    assert "0 of 8 runs finished, 5 waiting, 3 failed" in text and "No run is finished yet" in text
    assert "Not in the figures of 0.1: seeds 3, 4, 5 and 7 waiting" in text
    assert "Not in the figures of 0.2: seeds 3 to 5 failed: out of memory; seed 7 waiting" in text


def _position(text: str) -> float:
    return float(text.removesuffix("%"))


def _dots(page: Page) -> dict[str, dict[str, list[float]]]:
    """For each row the values at which its marks lie, by the axis's first and last tick."""
    drawings = [e for e in page.elements if "figure" in e["within"] and "ol" in e["within"]]
    ticks = [e for e in drawings if e["tag"] == "text" and e.get("y") == "19"]
    ends = [(_position(tick["x"]), float(tick["text"])) for tick in (ticks[0], ticks[-1])]
    (start, low), (end, high) = ends

    def value(position: str) -> float:
        return low + (_position(position) - start) / (end - start) * (high - low)

    rows: dict[str, dict[str, list[float]]] = {}
    marks: dict[str, list[float]] = {}
    for e in drawings:
        if e.get("class") == "row":
            marks = rows.setdefault(e["text"].split()[0] if e["text"].strip() else "", {})
        elif e["tag"] == "circle":
            marks.setdefault(e["class"], []).append(value(e["cx"]))
        elif e["tag"] == "svg" and "x" in e:
            marks.setdefault("reference", []).append(value(e["x"]))
        elif e.get("class") in ("interval", "chance"):
            marks.setdefault(e["class"], []).extend((value(e["x1"]), value(e["x2"])))
    return rows


def test_dots_lie_where_the_figures_are(partial):
    folder, studies = partial
    write_report(folder, studies, "command")
    rows = _dots(Page(folder.html.read_text()))
    first = rows["0.1"]
    assert first["seed"] == pytest.approx([50, 51, 52], abs=0.02)
    assert first["mean"] == pytest.approx([51], abs=0.02)
    # Student's 95 % quantile for two degrees of freedom times the standard error, 1 / sqrt(3).
    half = 4.3027 / 3**0.5
    assert first["interval"] == pytest.approx([51 - half, 51 + half], abs=0.02)
    assert first["reference"] == pytest.approx([45.12], abs=0.02)
    assert first["chance"] == pytest.approx([10, 10], abs=0.02)  # ten classes
    assert rows["0.5"]["mean"] == pytest.approx([49], abs=0.02)
    assert rows["0.99"].keys() == {"reference", "chance"}  # no run has finished


def test_the_scatter_has_a_point_for_each_row_with_a_finished_run(partial):
    folder, studies = partial
    write_report(folder, studies, "command")
    page = Page(folder.html.read_text())
    points = [e for e in page.all("svg") if e.get("class", "").startswith("point ")]
    assert len(points) == 3
    field = [e for e in page.all("text") if "figure" in e["within"] and "ol" not in e["within"]]
    ticks = [e for e in field if e.get("x") == "-8"]
    (bottom, low), (top, high) = (
        (_position(tick["y"]), float(tick["text"])) for tick in (ticks[0], ticks[-1])
    )
    values = [low + (_position(p["y"]) - bottom) / (top - bottom) * (high - low) for p in points]
    assert values == pytest.approx([51, 31, 49], abs=0.02)
    texts = [e["text"] for e in page.all("text")]
    assert "training images/s (median over the seeds)" in texts
    assert texts.count("validation top-1 (%)") == 1


def test_bands_span_the_seeds_and_only_rows_with_several_have_one(partial):
    folder, studies = partial
    write_report(folder, studies, "command")
    bands = [e["points"] for e in Page(folder.html.read_text()).all("polygon")]
    # Loss, top-1, top-5 of three rows, the last of which has a single seed; three epochs each.
    assert [len(points.split()) for points in bands] == [6, 6, 0] * 3
    heights = [[float(corner.split(",")[1]) for corner in points.split()] for points in bands]
    upper, lower = heights[3][:3], heights[3][:2:-1]
    assert all(above < below for above, below in zip(upper, lower, strict=True))


@pytest.fixture
def plain(tmp_path):
    """A study of one setting that the reference has no row of, with two finished seeds each."""
    body = """
factor = "train.label_smoothing"
values = [0.05, 0.1]
seeds = [0, 1]
[[findings]]
claim = "more is better"
better = "0.1"
worse = ["0.05"]
"""
    study, folder = read_study(write_study(tmp_path, body), []), StudyDir(tmp_path / "out")
    folder.create(tasks_of([study]))
    for row, top1 in zip(study.rows, (0.3, 0.4), strict=True):
        for task in row.tasks:
            make_run(folder, task, top1 + task.seed / 100)
    write_report(folder, [study], "command")
    return folder


def test_a_study_without_a_reference_never_speaks_of_one(plain):
    main = Page(plain.html.read_text()).all("main")[0]["text"]
    header = Page(plain.html.read_text()).all("header")[0]["text"]
    for text in (main, header, plain.markdown.read_text()):
        assert "reference" not in text.lower() and "as printed" not in text
    assert "| train.label_smoothing | top-1 % | top-5 % | loss | images/s |" in (
        plain.markdown.read_text()
    )


def test_what_was_found_is_said_first(plain):
    page = Page(plain.html.read_text())
    first = page.all("section")[0]
    assert first["text"].strip().startswith("What was found")
    assert "1 claim about validation top-1: 1 confirmed" in first["text"]
    assert "10.0 ± " in first["text"]
    (ends,) = [p["text"] for p in page.all("p") if p["text"].startswith("best run")]
    assert "41.00 %" in ends and "30.00 %" in ends


def test_every_comparison_is_in_a_table(partial):
    folder, studies = partial
    write_report(folder, studies, "command")
    page = Page(folder.html.read_text())
    cells = [td["text"] for td in page.all("td") if "details" in td["within"]]
    start = cells.index("+20.00 ± 0.20") - 2  # of the first claim
    assert cells[start : start + 5] == ["0.1", "0.2", "+20.00 ± 0.20", "3", "< 0.0001"]
