"""The documents as a site: every relative link and heading exists, and nothing is loaded from the
network. Links to other sites are not fetched."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("material")


def build(site: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "--site-dir", site],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("site") / "built"
    done = build(path)
    assert done.returncode == 0, done.stderr
    return path


def test_the_site_holds_the_documents_and_the_references(site):
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {"index.html", "CONTRIBUTING.html", "benchmarks/index.html"} <= pages
    assert {"docs/training.html", "docs/reference/configuration.html"} <= pages
    assert 'id="train.epochs"' in (site / "docs" / "reference" / "configuration.html").read_text()


def test_every_step_of_a_numbered_list_is_an_item(site):
    steps = re.findall(r"^\d+\. ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    page = (site / "CONTRIBUTING.html").read_text().partition("<article")[2]
    lists = "".join(re.findall(r"<ol>.*?</ol>", page, re.DOTALL))
    inner = "".join(re.findall(r"<ul>.*?</ul>", lists, re.DOTALL))
    assert len(steps) == lists.count("<li>") - inner.count("<li>") > 20
    assert "```" not in page


def test_a_notebook_becomes_a_page_without_its_outputs(tmp_path):
    from docs.mirror import as_markdown

    cells = [
        {"cell_type": "markdown", "source": ["# First\n", "words"]},
        {"cell_type": "code", "source": ["x = 1\n", "x"], "outputs": [{"text": ["printed"]}]},
    ]
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": cells}))
    assert as_markdown(tmp_path / "x.ipynb") == "# First\nwords\n\n```python\nx = 1\nx\n```"


def test_no_page_loads_anything_from_the_network(site):
    loads = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=\"?https?:|<link[^>]*\shref=\"?https?:")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    assert not [path for path in pages if loads.search(path.read_text())]


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("[x](missing.md)", "missing.md"),
        ("[x](page.md#no-such-heading)", "no-such-heading"),
        ("[x](/page.md)", "absolute"),
        ("![x](../nothing.png)", "nothing.png"),
    ],
)
def test_a_broken_link_fails_the_build(link, message, tmp_path):
    """With the rules of the project's configuration, on a page alone."""
    rules = re.search(r"^validation:\n(?:  .*\n)+", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert rules
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(f"# Page\n\n[fine](page.md#page) {link}\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"site_name: x\n{rules[0]}")
    done = build(tmp_path / "site", config)
    assert done.returncode != 0 and message in done.stderr
