"""The Python blocks of docs/python.md, run in order."""

import os
import re
import shutil

from tests.trainings import ROOT


def test_the_python_blocks_run(synth_source, tmp_path, monkeypatch, capsys):
    shutil.copytree(synth_source / "train", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(<!-- not run: [^\n]*\n)?```python\n(.*?)```", page, re.DOTALL)
    code = "\n".join(block for not_run, block in blocks if not not_run)
    assert len(blocks) > 5 and "fastlab.resume(" in code
    exec(compile(code, "docs/python.md", "exec"), {})
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "train.epoch: unknown key; nearest valid key: train.epochs"
    assert sorted(os.listdir("runs")) == ["photos", "tuned", "wide"]
