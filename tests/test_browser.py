"""The pages that fastlab writes, loaded in a real browser."""

import json
from pathlib import Path

import pytest

from fastlab.cli import main
from tests import browser
from tests.trainings import command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium"),
]


@pytest.fixture(scope="module")
def run(synth_dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "profiled"
    profile = ("profile.enabled=true", "profile.wait=2", "profile.warmup=1", "profile.active=3")
    assert main(["train", *command(synth_dataset, out, *profile)]) == 0
    return out


@pytest.fixture(scope="module")
def pages(run, synth_dataset, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    assert main(["report", str(run), "--out", str(folder / "report.html")]) == 0
    assert main(["trace", str(run), "--out", str(folder / "trace.html")]) == 0
    study = folder / "study.toml"
    base = json.dumps(str(run / "config.toml"))
    study.write_text(
        f'title = "Flip"\nbase = {base}\nfactor = "augment.flip"\n'
        "values = [true, false]\nseeds = [0, 1]\n"
    )
    out = folder / "study"
    more = ["--epochs", "1", "--set", "profile.enabled=false"]
    assert main(["study", str(study), "--out", str(out), *more]) == 0
    return {
        "report": folder / "report.html",
        "trace": folder / "trace.html",
        "study": out / "report.html",
    }


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", ["report", "trace", "study"])
def test_a_page_loads_without_errors_and_fits_the_window(page, width, pages):
    loaded = browser.load(pages[page], width)
    assert loaded.messages == []
    assert 0 < loaded.width <= width


_USE = """
const shown = (element) => getComputedStyle(element).display !== "none";
const check = (holds, what) => { if (!holds) throw new Error(what); };
const study = page.querySelector(".study");
const [curve] = study.querySelectorAll(".curves > g");
const [button] = study.querySelectorAll(".legend button");
button.click();
check(!shown(curve) && button.getAttribute("aria-pressed") === "false", "a click hides the curve");
button.click();
check(shown(curve), "another click shows it again");
const line = curve.querySelector("polyline"), before = line.getAttribute("points");
const box = study.querySelector(".choice input");
box.click();
check(line.getAttribute("points") !== before, "the logarithm moves the curve");
box.click();
const numbers = (text) => text.split(/[ ,]/).map(Number);
const moved = numbers(line.getAttribute("points"));
check(numbers(before).every((n, i) => Math.abs(n - moved[i]) < 0.01), "and moves it back");
const run = page.querySelector(".dots svg a").getAttribute("href").slice(1);
const details = page.getElementById(run).closest("details");
check(!details.open, "a run is folded up");
page.defaultView.location.hash = run;
page.defaultView.dispatchEvent(new Event("hashchange"));
check(details.open, "a link opens it");
"""


def test_a_study_page_answers_clicks(pages):
    assert browser.load(pages["study"], 1280, _USE).messages == []


def test_an_error_and_an_overflow_are_detected(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<div style='width:3000px'>x</div><script>nothing.there</script>")
    loaded = browser.load(page, 800)
    assert loaded.messages and loaded.width >= 3000
