"""`fastlab doctor`: what it finds on this machine, and what it says of what is missing."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from fastlab import machine
from fastlab.cli import main
from fastlab.machine import Finding, examine
from tests.packages import forget

ROOT = Path(__file__).parents[1]


def findings() -> dict[tuple[str, str], Finding]:
    return {(finding.group, finding.name): finding for finding in examine()}


def test_doctor_names_every_engine_and_the_running_versions(capsys):
    assert main(["doctor", "--json"]) == 0
    printed = {(f["group"], f["name"]): f for f in json.loads(capsys.readouterr().out)}
    assert printed["versions", "torch"]["detail"] == torch.__version__.partition("+")[0]
    engines = {name for group, name in printed if group == "engines"}
    assert engines == {"resident", "torchvision", "ffcv", "dali", "stream"}
    assert printed["devices", "cuda"]["usable"] == torch.cuda.is_available()


def test_doctor_lists_trackers_with_the_way_to_install_a_missing_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    found = {name: finding for (group, name), finding in findings().items() if group == "trackers"}
    assert list(found) == ["tensorboard", "wandb", "mlflow", "trackio"]
    assert found["tensorboard"].usable and "version 2." in found["tensorboard"].detail
    assert not found["wandb"].usable and '".[trackers]"' in found["wandb"].detail


def test_a_missing_engine_is_reported_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)  # importing it raises ModuleNotFoundError
    ffcv = findings()["engines", "ffcv"]
    assert not ffcv.usable and "pip install --no-deps ffcv" in ffcv.detail


@pytest.mark.parametrize(
    ("code", "message"),
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
def test_an_engine_that_cannot_be_imported_is_reported_with_the_error(
    code, message, monkeypatch, tmp_path
):
    (tmp_path / "ffcv.py").write_text(f"{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    forget("ffcv", monkeypatch)
    ffcv = findings()["engines", "ffcv"]
    assert not ffcv.usable and "cannot be imported" in ffcv.detail and message in ffcv.detail


def test_a_missing_package_is_reported_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(machine, "_REQUIRED", ("torch", "no-such-package"))
    examined = findings()
    assert examined["versions", "torch"].usable
    missing = examined["versions", "no-such-package"]
    assert not missing.usable and "pip install no-such-package" in missing.detail


@pytest.mark.parametrize("line", ["engines", "devices", "processes"])
def test_doctor_prints_a_table_with_a_heading_for_each_group(capsys, line):
    assert main(["doctor"]) == 0
    assert line in capsys.readouterr().out.splitlines()


def test_extras_are_never_installed_from_another_project(monkeypatch):
    """On the package index, the name fastlab belongs to one."""
    folders = [ROOT / name for name in ("fastlab", "pipelines", "benchmarks", "docs", "tests")]
    files = [*ROOT.glob("*.md"), ROOT / "Makefile"]
    files += [path for each in folders for path in each.rglob("*") if path.suffix in (".py", ".md")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path != Path(__file__)}
    assert len(texts) > 100
    index = re.compile(r"pip install[^\n`]*['\" ]fastlab\b(?!-train)")
    assert not [path for path, text in texts.items() if index.search(text)]
    asked = {extra for text in texts.values() for extra in re.findall(r"installing\('(\w+)'", text)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"dali", "ffcv"} <= asked <= set(project["optional-dependencies"])
    for extra in asked:
        assert "`make extras`" in machine.installing(extra)
        assert f'`pip install -e ".[{extra}]"`' in machine.installing(extra)
    monkeypatch.setattr(machine.shipped, "INSTALLED", True)
    assert machine.installing("dali") == f'run `pip install "{project["name"]}[dali]"`'


def test_the_revision_is_read_without_writing_the_checkout(tmp_path, monkeypatch):
    """A lock on the index, left by a killed git, would block the user's next commit."""

    def git(*arguments):
        user = ("-c", "user.name=x", "-c", "user.email=x@y")
        subprocess.run(["git", "-C", str(tmp_path), *user, *arguments], check=True)

    (tmp_path / "machine.py").write_text("first")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    os.utime(tmp_path / "machine.py", (1, 1))  # git compares the content, and would note the time
    before = (tmp_path / ".git" / "index").read_bytes()
    revision = machine.environment(1)["git"]
    assert revision and not revision.endswith("-dirty")
    assert (tmp_path / ".git" / "index").read_bytes() == before
    (tmp_path / "machine.py").write_text("second")
    assert machine.environment(1)["git"] == f"{revision}-dirty"
