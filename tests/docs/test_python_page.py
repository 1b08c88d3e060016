"""The Python blocks of docs/python.md, run in order as one script."""

import os
import re
import shutil
import subprocess
import sys

from tests.trainings import ROOT


def test_the_python_blocks_run(synth_source, tmp_path):
    shutil.copytree(synth_source / "train", tmp_path / "photos")
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(<!-- not run: [^\n]*\n)?```python\n(.*?)```", page, re.DOTALL)
    code = "\n".join(block for not_run, block in blocks if not not_run)
    assert len(blocks) > 5 and "fastlab.resume(" in code
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("train.epoch: unknown key; nearest valid key: train.epochs\n")
    assert sorted(os.listdir(tmp_path / "runs")) == ["photos", "tuned", "wide"]
