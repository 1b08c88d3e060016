import json
import sys

import pytest
import torch

from fastlab import machine as doctor
from fastlab.cli import main
from fastlab.machine import examine
from tests.packages import forget


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


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libturbojpeg.so.0: cannot open')", "libturbojpeg.so.0"),
        (
            "raise RuntimeError('compiled against ABI 1\\n\\nbut this is 2')",
            "(compiled against ABI 1)",
        ),
        ("import sys\nsys.no_such_thing", "no_such_thing"),
        ("raise ImportError", "(ImportError())"),
        ("raise ModuleNotFoundError", "(ModuleNotFoundError())"),
        ("import missing_beneath", "No module named 'missing_beneath'"),
    ],
)
def test_an_engine_that_cannot_be_imported_is_told_so(code, said, monkeypatch, tmp_path):
    (tmp_path / "ffcv.py").write_text(f"{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    forget("ffcv", monkeypatch)
    found = findings()["engines", "ffcv"]
    assert not found.usable and "cannot be imported" in found.detail and said in found.detail


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "_REQUIRED", ("torch", "no-such-package"))
    found = findings()
    assert found["versions", "torch"].usable
    missing = found["versions", "no-such-package"]
    assert not missing.usable and "pip install no-such-package" in missing.detail


@pytest.mark.parametrize("line", ["engines", "devices", "processes"])
def test_prints_a_table(capsys, line):
    assert main(["doctor"]) == 0
    assert line in capsys.readouterr().out.splitlines()
