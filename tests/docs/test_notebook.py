"""The notebook that a newcomer reads first: it runs from beginning to end, anywhere."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.trainings import ROOT

NOTEBOOK = ROOT / "docs" / "first-steps.ipynb"


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_the_notebook_runs(tmp_path, without_coverage):
    """In a folder without the checkout, as where only the wheel is installed."""
    pytest.importorskip("nbmake")
    shutil.copy(NOTEBOOK, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbmake", "-p", "no:cacheprovider", NOTEBOOK.name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout and os.listdir(tmp_path) == [NOTEBOOK.name]
