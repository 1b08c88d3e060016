import json
import sys

import pytest
import torch

from fastlab.cli import main
from fastlab.doctor import examine


def findings():
    return {(found.group, found.name): found for found in examine()}


def test_names_every_engine_and_the_running_versions(capsys):
    assert main(["doctor", "--json"]) == 0
    found = {(f["group"], f["name"]): f for f in json.loads(capsys.readouterr().out)}
    assert found["versions", "torch"]["detail"] == torch.__version__.partition("+")[0]
    engines = {name for group, name in found if group == "engines"}
    assert engines == {"resident", "torchvision", "ffcv", "dali"}
    assert found["devices", "cuda"]["usable"] == torch.cuda.is_available()


def test_a_missing_engine_is_told_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)  # importing it raises ModuleNotFoundError
    found = findings()["engines", "ffcv"]
    assert not found.usable and "pip install --no-deps ffcv" in found.detail


def test_an_engine_that_lacks_a_shared_library_is_told_so(monkeypatch, tmp_path):
    (tmp_path / "ffcv.py").write_text("raise ImportError('libturbojpeg.so.0: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    found = findings()["engines", "ffcv"]
    assert not found.usable and "libturbojpeg.so.0" in found.detail


@pytest.mark.parametrize("line", ["engines", "devices", "processes"])
def test_prints_a_table(capsys, line):
    assert main(["doctor"]) == 0
    assert line in capsys.readouterr().out.splitlines()
