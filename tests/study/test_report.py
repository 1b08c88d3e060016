import json

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
    assert sum("points above" in li["text"] and "holds" in li["text"] for li in page.all("li")) == 1


def test_the_page_is_self_contained_and_accessible(partial):
    folder, studies = partial
    write_report(folder, studies, "command")
    text = folder.html.read_text()
    page = Page(text)
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(ids) == len({*ids})
    assert all(a["href"].startswith("#") and a["href"][1:] in ids for a in page.all("a"))
    assert all(e["aria-labelledby"] in ids for e in page.elements if "aria-labelledby" in e)
    assert not [e for e in page.elements if "src" in e or e["tag"] in ("script", "link", "iframe")]
    assert "prefers-color-scheme: dark" in text and "url(" not in text and "@import" not in text
    assert {"name": "viewport"}.items() <= page.all("meta")[1].items()
    plots = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    tables = [t for t in page.all("table") if "figure" in t["within"]]
    assert len(plots) == len(tables) == 3 and all(svg["aria-label"] for svg in plots)
    assert all("details" in table["within"] for table in tables)
    assert all(svg.get("aria-hidden") for svg in page.all("svg") if svg not in plots)
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
    assert "- Small beats middle (Mine & <more>): **holds**." in text
    assert "Not in the figures: 0.5: seed 1 failed: out of <memory>" in text
    assert "`fastlab study x`" in text


def test_a_study_without_any_run_has_a_report(tmp_path):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]')
    study, folder = read_study(path, []), StudyDir(tmp_path / "out")
    folder.create(tasks_of([study]))
    write_report(folder, [study], "command")
    assert "No run is finished yet" in Page(folder.html.read_text()).all("section")[0]["text"]
