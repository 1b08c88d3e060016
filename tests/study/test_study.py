import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tomli_w

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.study import command as ablations
from fastlab.study import pool as runner
from fastlab.study import report as study
from fastlab.study.pool import Screen, State, StudyDir, look
from fastlab.study.spec import Finding, Task, make_task, read_study, tasks_of

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "ablations").glob("*.toml"))


def studies_of(paths: list[Path], *overrides: str, **changes) -> list:
    return [read_study(path, list(overrides), **changes) for path in paths]


# The grid


def test_shared_rows_of_the_shipped_studies_run_once():
    studies = studies_of([path for path in SHIPPED if "additions" not in path.name])
    # Each model: 6 dropout pairs, 1 without normalization, 3 factors, 2 depths, 4 rates beside the
    # default; 3 plain networks.
    assert len(tasks_of(studies)) == 3 * (2 * (6 + 1 + 3 + 2 + 4) + 3)
    default = {
        row.tasks
        for s in studies
        for row in s.rows
        if row.config == configs.load(ROOT / "configs/cnn8.toml")
    }
    assert len(default) == 1
    holders = [s.name for s in studies if any(row.tasks in default for row in s.rows)]
    assert holders == ["cnn-depth", "cnn-dropout", "cnn-lr-factor", "cnn-lr", "cnn-normalization"]


def test_all_rows_come_with_their_first_seed_before_any_with_its_second():
    seeds = [task.seed for task in tasks_of(studies_of(SHIPPED))]
    assert seeds == sorted(seeds)


def test_identity_is_the_resolved_configuration():
    base = configs.load(ROOT / "configs/cnn8.toml")
    assert make_task(base) == make_task(
        configs.load(ROOT / "configs/resnet11.toml", ["model.name=cnn8"])
    )
    changed = ["train.epochs=2", "train.seed=1", "data.path=elsewhere", "optim.lr=0.01"]
    names = {make_task(configs.load(ROOT / "configs/cnn8.toml", [one])).name for one in changed}
    assert len(names | {make_task(base).name}) == 5
    # A seed is told apart by the end of the name alone.
    assert make_task(base).name.removesuffix("seed0") == next(
        name.removesuffix("seed1") for name in names if name.endswith("seed1")
    )


def test_rows_win_over_overrides_and_seeds_are_cut_or_extended(tmp_path):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]\nseeds = [5, 1]')
    found = read_study(path, ["optim.lr=0.5", "model.width=7"], epochs=3, seeds=4)
    assert [row.label for row in found.rows] == ["0.1", "0.2"]
    configurations = [task.config for task in found.rows[1].tasks]
    assert [c.train.seed for c in configurations] == [5, 1, 0, 2]
    assert {(c.optim.lr, c.model.width, c.train.epochs) for c in configurations} == {(0.2, 7, 3)}
    assert [task.seed for task in read_study(path, [], seeds=1).rows[0].tasks] == [5]


def write_study(folder: Path, body: str, name: str = "mine") -> Path:
    path = folder / f"{name}.toml"
    base = ROOT / "configs" / "demo.toml"
    path.write_text(f'title = "Mine"\nbase = "{base}"\n{body}\n')
    return path


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "factor and values are missing"),
        ('factor = "optim.lr"\nvalues = []', "has no rows"),
        ('factor = "optim.lrr"\nvalues = [1]', "nearest valid key: optim.lr"),
        ('factor = "optim.lr"\nvalues = [0.1, 0.1]', "two rows are labelled '0.1'"),
        ('factor = "optim.lr"\nvalues = [0.1]\nlabels = ["a", "b"]', "one text for each"),
        ('factor = "optim.lr"\nvalues = [0.1]\nseeds = [1, 1]', "different whole numbers"),
        ('factor = "optim.lr"\nvalues = [0.1]\nseed = [1]', "'seed': unknown key"),
        ("[[rows]]\noptim = 3", "expected section.key = value"),
        ('factor = "train.seed"\nvalues = [5, 6]\nseeds = [0]', "list the study's seeds"),
        ("[[rows]]\noptim.lr = 0.1\ntrain.seed = 5", "list the study's seeds"),
        ('factor = "optim.lr"\nvalues = [0.1]\n[[findings]]\nclaim = "x"', "better and worse"),
        (
            'factor = "optim.lr"\nvalues = [0.1]\n[[findings]]\nclaim = "x"\nchance = ["none"]',
            "no row 'none'; rows: 0.1",
        ),
    ],
)
def test_a_bad_study_is_told_in_one_line(body, said, tmp_path, capsys):
    path = write_study(tmp_path, body)
    assert ablations.main([str(path), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and str(path) in lines[0]


@pytest.mark.parametrize("text", ["data/😀", "a\x7fb", 'tab\t\x01\r\\ "quoted"', "two\nlines"])
def test_a_row_takes_any_text(text, tmp_path):
    path = write_study(tmp_path, tomli_w.dumps({"factor": "data.path", "values": [text]}))
    assert read_study(path, []).rows[0].config.data.path == text


def test_settings_of_a_cluster_are_read_before_the_plan(tmp_path, capsys):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1]')
    arguments = [str(path), "--out", str(tmp_path / "out"), "--dry-run", "--no-calibration"]
    assert ablations.main([*arguments, "--cluster-set", "x"]) == 2
    said = capsys.readouterr()
    assert "--cluster-set x: expected key=value" in said.err and not said.out


def test_a_seed_among_the_overrides_is_refused(tmp_path, capsys):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1]')
    arguments = [str(path), "--out", str(tmp_path / "out"), "--dry-run", "--set", "train.seed=9"]
    assert ablations.main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--set train.seed=9" in line and "list the study's seeds" in line


def test_every_row_of_the_reference_stands_beside_exactly_its_own():
    found = {
        row.tasks[0].name: study.find_reference(row.config)
        for s in studies_of(SHIPPED, "model.width=8", "train.epochs=2")
        for row in s.rows
    }
    figures = [reference for reference in found.values() if reference]
    assert len(figures) == len(study._reference_file()["rows"]) == 24
    deep = configs.load(ROOT / "configs/resnet15.toml")
    assert study.find_reference(deep).top1 == 0.4322
    plain = configs.load(ROOT / "configs/resnet15.toml", ["model.shortcuts=false"])
    assert study.find_reference(plain) is None
    assert study.find_reference(configs.load(ROOT / "configs/resnet11-modern.toml")) is None


def test_the_references_loss_is_converted():
    without_norm = configs.load(ROOT / "configs/cnn8.toml", ["model.batch_norm=false"])
    # At chance among 200 classes.
    assert study.find_reference(without_norm).loss == pytest.approx(math.log(200), rel=2e-3)


# Statistics


def t_probability(t: float, degrees: int, steps: int = 4000) -> float:
    """P(|T| < t) by Simpson's rule on the density of Student's t."""
    scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = math.exp(scale) / math.sqrt(degrees * math.pi)
    h = t / steps
    values = [
        scale * (1 + (i * h) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps + 1)
    ]
    return 2 * h / 3 * (values[0] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]) + values[-1])


@pytest.mark.parametrize("degrees", [*range(1, 36), 60, 120, 1000])
def test_quantiles_hold_95_percent(degrees):
    assert t_probability(study.student_t(degrees), degrees) == pytest.approx(0.95, abs=1e-5)


def test_an_interval_by_hand():
    found = study.interval([1.0, 2.0, 3.0])
    # deviation 1, t of two degrees of freedom 4.3027, divided by the root of 3
    assert found.mean == 2 and found.half == pytest.approx(2.48416, abs=1e-4)
    assert found.text() == "2.00 ± 2.48"
    assert study.interval([0.25]) == study.Interval(0.25, None)
    assert study.interval([0.25]).text(100) == "25.00"
    assert study.interval([]) is None
    assert study.interval([1.0, None]) is None, "a diverged seed must not vanish in a mean"


# Reports of made-up runs

FIGURES = ("train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5")


def make_run(folder: StudyDir, task: Task, top1: float, status: str = "finished") -> None:
    """A run directory whose best epoch, its second of three, has `top1`."""
    run = folder.run(task)
    run.mkdir(parents=True)
    (run / "config.toml").write_text(configs.dump(task.config))
    (run / "environment.json").write_text(
        json.dumps({"date": "2026-11-24", "machine": {"cores": 2}})
    )
    lines = []
    for epoch, value in enumerate((top1 / 2, top1, top1 - 0.001), 1):
        figures = {"epoch": epoch, **dict.fromkeys(FIGURES, value), "val_loss": 2 - value}
        lines.append({**figures, "val_top5": 2 * value, "images_per_second": 100.0, "seconds": 2.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = {"path": "d", "classes": 10, "image_size": 32}
    dataset["counts"] = {"train": 100, "val": 500}
    summary = {"parameters": 1, "dataset": dataset, "status": status, "train_seconds": 6.0}
    (run / "summary.json").write_text(json.dumps(summary))


STUDY = """
factor = "schedule.factor"
values = [0.1, 0.2, 0.5, 0.99]
seeds = [0, 1, 2]
[[findings]]
claim = "small beats middle"
better = "0.1"
worse = ["0.2"]
reported = true
[[findings]]
claim = "middle beats small"
better = "0.2"
worse = ["0.1"]
[[findings]]
claim = "small <beats> large"
better = "0.1"
worse = ["0.2", "0.5"]
[[findings]]
claim = "all is chance"
chance = ["0.2"]
[[findings]]
claim = "large is chance"
chance = ["0.99"]
"""


@pytest.fixture
def partial(tmp_path) -> tuple[StudyDir, list]:
    """Rows far apart, one close to the first with a single finished seed, one that never began."""
    path = tmp_path / "mine.toml"
    path.write_text(f'title = "Mine & <more>"\nbase = "{ROOT}/configs/cnn8.toml"\n{STUDY}')
    found, folder = read_study(path, ["train.epochs=3"]), StudyDir(tmp_path / "out")
    folder.create(tasks_of([found]))
    for row, tops in zip(
        found.rows, ([0.5, 0.51, 0.52], [0.3, 0.31, 0.32], [0.49], []), strict=True
    ):
        for task, top1 in zip(row.tasks, tops, strict=False):
            make_run(folder, task, top1)
    runner.record(folder, found.rows[2].tasks[1], "failed", "out of <memory>")
    make_run(folder, found.rows[2].tasks[2], 0.9, "interrupted")
    return folder, [found]


def test_findings_are_decided_by_the_intervals(partial):
    folder, studies = partial
    [result] = study.analyse(folder, studies)
    decided = {verdict.finding.claim: verdict for verdict in result.verdicts}
    assert {claim: verdict.decision for claim, verdict in decided.items()} == {
        "small beats middle": "holds",
        "middle beats small": "does not hold",
        "small <beats> large": "undecided",
        "all is chance": "does not hold",
        "large is chance": "undecided",
    }
    assert "“0.1” (51.00 ± 2.48 %) lies above “0.2”" in decided["small beats middle"].sentence
    lacking = "without seed 1 (failed) and seed 2 (interrupted) of 0.5."
    assert lacking in decided["small <beats> large"].sentence
    assert "no finished run of 0.99" in decided["large is chance"].sentence


def test_overlapping_intervals_decide_nothing(tmp_path):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]\nseeds = [0, 1]')
    found, folder = read_study(path, []), StudyDir(tmp_path / "out")
    for row, tops in zip(found.rows, ([0.5, 0.52], [0.47, 0.49]), strict=True):
        for task, top1 in zip(row.tasks, tops, strict=True):
            make_run(folder, task, top1)
    [result] = study.analyse(folder, [found])
    verdict = study.decide(Finding("x", better="0.1", worse=("0.2",)), result.rows)
    assert verdict.decision == "undecided" and "overlaps" in verdict.sentence


def test_a_single_seed_decides_nothing(tmp_path):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]\nseeds = [0]')
    found, folder = read_study(path, []), StudyDir(tmp_path / "out")
    for row, top1 in zip(found.rows, (0.5, 0.3), strict=True):
        make_run(folder, row.tasks[0], top1)
    [result] = study.analyse(folder, [found])
    verdict = study.decide(Finding("x", better="0.1", worse=("0.2",)), result.rows)
    assert verdict.decision == "undecided"
    assert "a single seed of 0.1 and 0.2 has no interval" in verdict.sentence


@pytest.mark.parametrize("finding", [{"better": "0.1", "worse": ("0.2",)}, {"chance": ("0.1",)}])
def test_a_diverged_seed_leaves_a_claim_open(finding, tmp_path):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]\nseeds = [0, 1, 2]')
    found, folder = read_study(path, []), StudyDir(tmp_path / "out")
    folder.create(tasks_of([found]))
    for row, tops in zip(found.rows, ([0.6, 0.61], [0.3, 0.31, 0.3]), strict=True):
        for task, top1 in zip(row.tasks, tops, strict=False):
            make_run(folder, task, top1)
    diverged = found.rows[0].tasks[2]
    make_run(folder, diverged, 0.1, "diverged")
    runner.record(folder, diverged, "failed", "the loss is not a finite number")
    [result] = study.analyse(folder, [found])
    verdict = study.decide(Finding("x", **finding), result.rows)
    assert verdict.decision == "undecided" and "seed 2 (failed) of 0.1" in verdict.sentence
    study.write_report(folder, [found], "command")
    for report in (folder.html, folder.markdown):  # the best model is of that row
        assert "chosen by validation top-1 alone. Its row lacks seed 2 (failed)." in (
            report.read_text()
        )


@pytest.mark.parametrize(
    ("tops", "decision"),
    [
        ((0.1, 0.1), "holds"),  # no spread at all: a network that says one class
        ((0.1, 0.104, 0.102), "holds"),
        ((0.1, 0.2), "undecided"),
        ((0.3, 0.301, 0.302), "does not hold"),
    ],
)
def test_at_chance_is_what_guessing_gives(tops, decision, tmp_path):
    path = write_study(
        tmp_path, f'factor = "optim.lr"\nvalues = [1]\nseeds = {[*range(len(tops))]}'
    )
    found, folder = read_study(path, []), StudyDir(tmp_path / "out")
    for task, top1 in zip(found.rows[0].tasks, tops, strict=True):
        make_run(folder, task, top1)
    [result] = study.analyse(folder, [found])
    assert study.decide(Finding("x", chance=("1",)), result.rows).decision == decision


class Page(HTMLParser):
    """Elements with their attributes and the text within, in order."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        within = [element["tag"] for element in self.open]
        element = {"tag": tag, "text": "", "within": within, **dict(attributes)}
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag: str) -> list[dict]:
        return [element for element in self.elements if element["tag"] == tag]


def test_the_page_of_a_partial_study(partial):
    folder, studies = partial
    study.write_report(folder, studies, "python -m <b>")
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
    notes = " ".join(p["text"] for p in page.all("p") if p.get("class") == "note")
    assert "seed 1 failed: out of <memory>; seed 2 interrupted" in notes
    assert "Not at the reference’s scale" in text and "classes 10 (reference: 200)" in text
    assert "pixels a side 32 (reference: 64)" in text
    assert "training images 100 (reference: 100,000)" in text
    assert "Mine & <more>" in next(h["text"] for h in page.all("h2") if "Mine" in h["text"])
    assert sum("lies above" in li["text"] and "holds" in li["text"] for li in page.all("li")) == 1


def test_the_page_is_whole_by_itself_and_accessible(partial):
    folder, studies = partial
    study.write_report(folder, studies, "command")
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
    study.write_report(folder, studies, "command")
    page = Page(folder.html.read_text())
    found = {pre["id"].removeprefix("run-"): pre for pre in page.all("pre")}
    tasks = tasks_of(studies)
    assert found.keys() == {task.name for task in tasks}
    for task in tasks:
        assert found[task.name]["text"].strip() == configs.dump(task.config).strip()
        assert "details" in found[task.name]["within"]


def test_reports_tell_neither_where_things_lie_nor_a_memory_that_grows(tmp_path):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]\nseeds = [0]')
    found = read_study(path, ["data.path=/elsewhere/data/tiny"])
    folder = StudyDir(tmp_path / "out")
    for row, memory in zip(found.rows, (101.5, 102.5), strict=True):
        make_run(folder, row.tasks[0], 0.5)
        made = {"machine": {"cores": 2, "memory_gib": memory}}
        (folder.run(row.tasks[0]) / "environment.json").write_text(json.dumps(made))
    study.write_report(folder, [found], "python -m x --set 'data.path=\"/elsewhere/data/tiny\"'")
    for report in (folder.html, folder.markdown):
        text = report.read_text()
        assert "elsewhere" not in text and "tiny" in text
        assert "machine.cores" in text and "memory_gib" not in text


def test_markdown_says_the_same(partial):
    folder, studies = partial
    study.write_report(folder, studies, "python -m x")
    text = folder.markdown.read_text()
    assert "| 0.1 | here | 51.00 ± 2.48 |" in text and "|  | difference | +5.88 |" in text
    assert "- Small beats middle (Mine & <more>): **holds**." in text
    assert "Not in the figures: 0.5: seed 1 failed: out of <memory>" in text
    assert "`python -m x`" in text


def test_a_study_without_any_run_has_a_report(tmp_path):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]')
    found, folder = read_study(path, []), StudyDir(tmp_path / "out")
    folder.create(tasks_of([found]))
    study.write_report(folder, [found], "command")
    assert "No run is finished yet" in Page(folder.html.read_text()).all("section")[0]["text"]


def test_a_diverged_seed_is_not_averaged_away(tmp_path):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1]\nseeds = [0, 1]')
    found, folder = read_study(path, []), StudyDir(tmp_path / "out")
    for task in found.rows[0].tasks:
        make_run(folder, task, 0.1)
    metrics = folder.run(found.rows[0].tasks[1]) / "metrics.jsonl"
    metrics.write_text(re.sub(r'"val_loss": [\d.]+', '"val_loss": null', metrics.read_text()))
    [result] = study.analyse(folder, [found])
    assert result.rows[0].loss is None and result.rows[0].top1.mean == pytest.approx(0.1)
    study.write_report(folder, [found], "command")


def test_the_best_model_is_chosen_on_validation_and_tested_once(partial, monkeypatch):
    folder, studies = partial
    asked = []

    def evaluate(_, task):
        asked.append(task.name)
        return {"loss": 1.5, "top1": 0.5, "top5": 0.8, "images": 500}

    monkeypatch.setattr(ablations, "_test_figures", evaluate)
    ablations.evaluate_best(folder, studies)
    assert not asked, "runs are left: the test split is not looked at"
    for task in tasks_of(studies):
        if look(folder, task).name in ("waiting", "interrupted"):
            runner.record(folder, task, "failed", "given up")
    ablations.evaluate_best(folder, studies)
    ablations.evaluate_best(folder, studies)
    assert asked == [studies[0].rows[0].tasks[2].name]  # 0.52; the interrupted 0.9 does not count
    study.write_report(folder, studies, "command")
    [best] = [
        s for s in Page(folder.html.read_text()).all("section") if "The best model" in s["text"]
    ]
    assert all(figure in best["text"] for figure in ("52.00", "50.00", "46.07", "71.73"))


# Plan, estimate, places, the live table


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, capsys):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]')
    arguments = [str(path), "--out", str(tmp_path / "out"), "--dry-run", "--no-calibration"]
    assert ablations.main([*arguments, "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert "4 runs: 4 waiting" in said and "no estimate of time" in said
    assert not (tmp_path / "out").exists()


def test_the_estimate_comes_from_finished_runs(partial, capsys):
    folder, studies = partial
    tasks = tasks_of(studies)
    states = {task.name: look(folder, task) for task in tasks}
    todo = [task for task in tasks if ablations._wanted(states[task.name], retry=False)]
    seconds, source = ablations.estimate(folder, tasks, todo, states, calibrate=False)
    assert len(todo) == 4 and "1 from finished runs" in source
    left = {name: 2.0 * (3 - states[name].epochs) + ablations._START_SECONDS for name in seconds}
    assert seconds == left and len(left) == 4


def test_gpus_are_given_in_turn(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    given = [place["CUDA_VISIBLE_DEVICES"] for place in runner.places(5)]
    assert given == ["2", "5", "2", "5", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert runner.places(2) == [{"OMP_NUM_THREADS": str(max(1, cores // 2))}] * 2
    assert runner.places(1) == [{}]


def test_the_live_table_tells_where_it_stands(tmp_path, capsys):
    tasks = [make_task(configs.load(None, [f"train.seed={seed}"])) for seed in range(4)]
    screen = Screen(StudyDir(tmp_path), tasks, {task.name: 100.0 for task in tasks}, jobs=1)
    screen.ended(tasks[0], State("finished", top1=0.4))
    screen.ended(tasks[1], State("failed", "no memory"))
    head, row = screen.table([(tasks[2], State("interrupted", "", 50, 0.5, 1234.0))], elapsed=125)
    assert head == "1 finished, 1 failed, 1 running, 1 waiting; 2 min gone, about 75 s left"
    assert "epoch  50/100" in row and "50.00%" in row and "1,234 images/s" in row
    assert capsys.readouterr().out.splitlines()[1].endswith("(2 of 4): no memory")


def test_a_run_of_another_configuration_is_not_resumed(tmp_path):
    folder, task = StudyDir(tmp_path), make_task(Config())
    other = Task(task.name, configs.load(None, ["optim.lr=1"]))
    folder.create([task])
    make_run(folder, other, 0.1, "interrupted")
    with pytest.raises(UserError, match="holds a run of another configuration"):
        runner.start(folder, task)


def test_a_missing_dataset_is_told_once_before_anything_runs(tmp_path, capsys):
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1, 0.2]')
    nowhere = ["--set", f"data.path={tmp_path / 'nowhere'}"]
    assert ablations.main([str(path), "--out", str(tmp_path / "out"), *nowhere]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cluster", "setting"),
    [
        ("local", "nonsense=3"),
        ("local", "timeout_min=abc"),
        ("local", "bad"),
        ("slurm", "timeout_min=5"),
    ],
)
def test_mistakes_about_a_cluster_get_one_line(
    cluster, setting, synth_dataset, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM there
    path = write_study(tmp_path, 'factor = "optim.lr"\nvalues = [0.1]')
    arguments = [str(path), "--out", str(tmp_path / "out"), "--set", f"data.path={synth_dataset}"]
    arguments += ["--no-calibration", "--cluster", cluster, "--cluster-set", setting]
    assert ablations.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastlab: --cluster")


# Real trainings, tiny

TINY = (
    "model.width=4",
    "train.batch_size=16",
    "train.eval_batch_size=20",
    "train.epochs=6",
    "train.checkpoint_every=1",
    "augment.translate=0",
)
REAL = """
seeds = [0]
[[rows]]
optim.lr = 0.01
[[rows]]
label = "fails"
train.batch_size = 9999
"""


def command(path: Path, dataset: Path, out: Path, *more: str) -> list[str]:
    sets = [part for value in (f"data.path={dataset}", *TINY) for part in ("--set", value)]
    base = [sys.executable, "-m", "fastlab.study.command", str(path), "--out", str(out)]
    return [*base, "--jobs", "2", "--no-calibration", *sets, *more]


def launch(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, **pipes)


def finish(arguments: list[str]) -> tuple[int, str]:
    process = launch(arguments)
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, said


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Until a training has written the checkpoint of `step` or of a later one."""
    deadline = time.monotonic() + 60
    while process.poll() is None:
        found = [int(path.name[5:13]) for path in out.glob("runs/*/checkpoints/step-*")]
        if max(found, default=0) >= step:
            return
        assert time.monotonic() < deadline
        time.sleep(0.005)


def outcome(out: Path) -> list[list[str]]:
    """The table without what is timed."""
    lines = [line.split("|") for line in (out / "report.md").read_text().splitlines()]
    return [line[1:7] + line[9:] for line in lines if len(line) == 11]


def task_in(run: Path) -> Task:
    return Task(run.name, configs.load(run / "config.toml"))


@pytest.fixture(scope="module")
def whole(synth_dataset, tmp_path_factory) -> Path:
    """A study that nothing disturbed, as jobs of submitit's local executor where there is one."""
    folder = tmp_path_factory.mktemp("whole")
    local = ["--cluster", "local", "--cluster-set", "timeout_min=5"]
    more = local if importlib.util.find_spec("submitit") else []
    status, said = finish(command(write_study(folder, REAL), synth_dataset, folder / "out", *more))
    assert status == 1, said
    assert "1 of 2 runs finished, 1 failed" in said
    assert "split train of" in said and "take a smaller batch" in said
    return folder / "out"


@pytest.mark.slow
def test_a_failed_run_is_recorded_and_the_rest_goes_on(whole):
    records = [json.loads(file.read_text()) for file in whole.glob("records/*.json")]
    assert sorted(found["state"] for found in records) == ["failed", "finished"]
    [failed] = [found for found in records if found["state"] == "failed"]
    assert failed["exit_status"] == 2 and failed["reason"].startswith("train.batch_size = 9999")
    assert (
        "take a smaller batch" in Page((whole / "report.html").read_text()).all("main")[0]["text"]
    )


def stopped_and_killed(path: Path, dataset: Path, out: Path) -> bool:
    """Whether the study was still training both times."""
    process = launch(command(path, dataset, out))
    wait_for_step(process, out, 3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    if process.returncode != 130:
        assert process.returncode == 1, said  # as a whole study ends, with the run that fails
        return False
    assert "stopping" in said and "the same command goes on" in said and "Traceback" not in said
    [run] = (out / "runs").iterdir()
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert (out / "report.html").exists()

    process = launch(command(path, dataset, out))
    wait_for_step(process, out, 9)
    process.kill()
    process.communicate(timeout=60)
    with StudyDir(out).locked():  # until the orphaned training is gone, too
        state = look(StudyDir(out), task_in(run)).name
    assert state in ("interrupted", "finished")
    return state == "interrupted"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_study_that_is_stopped_and_killed_ends_as_one_that_was_not(
    whole, synth_dataset, tmp_path
):
    path = write_study(tmp_path, REAL)
    # A signal comes too late where this process is kept waiting while the training goes on.
    attempts = (tmp_path / f"out-{number}" for number in range(3))
    out = next(out for out in attempts if stopped_and_killed(path, synth_dataset, out))
    [run] = (out / "runs").iterdir()
    status, said = finish(command(path, synth_dataset, out))
    assert status == 1, said
    assert outcome(out) == outcome(whole) and len(outcome(out)) == 4
    log = (out / "logs" / f"{run.name}.log").read_text()
    assert [log.count(f"epoch {number:3d}/6") for number in range(1, 7)] == [1] * 6, "resumed"
    before = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/metrics.jsonl")}
    status, said = finish(command(path, synth_dataset, out))
    assert status == 1 and "begins" not in said and "nothing left to train" in said
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("runs/*/metrics.jsonl")}


@pytest.mark.slow
def test_an_epoch_is_measured_where_nothing_is_known(synth_dataset, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    sets = [f"data.path={synth_dataset}", *TINY]
    tasks = [make_task(configs.load(ROOT / "configs/demo.toml", sets))]
    sets.append("train.batch_size=9999")
    tasks.append(make_task(configs.load(ROOT / "configs/demo.toml", sets)))
    found, problem = ablations._calibrated(tasks)
    assert found.keys() == {tasks[0].name} and 0 < found[tasks[0].name] < 60
    assert "take a smaller batch" in problem
