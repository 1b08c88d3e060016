"""Which module may import which: the contracts in pyproject.toml, and what they cannot express."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lint(checkout: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command as main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=checkout, capture_output=True, text=True
    )


def test_the_contracts_are_kept():
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


def test_every_part_of_fastlab_has_a_layer():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (c["layers"] for c in project["tool"]["importlinter"]["contracts"] if "layers" in c)
    placed = {name.strip() for line in layers for name in line.split("|")}
    parts = {path.stem for path in (ROOT / "fastlab").glob("*.py")} - {"__init__"}
    parts |= {path.parent.name for path in (ROOT / "fastlab").glob("*/__init__.py")}
    assert {f"fastlab.{part}" for part in parts} | {"pipelines", "benchmarks"} == placed


@pytest.mark.parametrize(
    ("file", "statement", "contract"),
    [
        ("fastlab/console.py", "import fastlab.runs", "Imports go one way"),
        ("fastlab/models/cnn.py", "import fastlab.dataset.manifest", "Imports go one way"),
        ("fastlab/models/cnn.py", "import pipelines.base", "Imports go one way"),
        ("pipelines/base.py", "import fastlab.training.metrics", "Imports go one way"),
        ("pipelines/base.py", "import fastlab.report", "Imports go one way"),
        ("pipelines/base.py", "import fastlab.models", "Pipelines know nothing of models"),
        ("fastlab/files.py", "import torch", "Reports, traces and configuration need no torch"),
        (
            "fastlab/report/texts.py",
            "def late():\n    import accelerate",
            "Reports, traces and configuration need no torch",
        ),
    ],
)
def test_a_planted_import_breaks_its_contract(file, statement, contract, tmp_path):
    for package in ("fastlab", "pipelines", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{statement}\n")
    result = lint(tmp_path)
    assert result.returncode == 1
    output = " ".join(result.stdout.split())
    assert f"{contract} BROKEN" in output
    module = file.removesuffix(".py").replace("/", ".")
    imported = statement.split()[-1]
    assert f"{module} -> {imported} (l." in output


def test_training_imports_numba_only_where_a_cpu_makes_batches():
    code = "import sys, fastlab.train; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = "import sys, pipelines.augment_cpu; sys.exit('numba' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_module_hides_a_standard_module_or_a_dependency():
    """``accelerate launch fastlab/train.py`` puts fastlab/ itself first in the search path."""
    modules = {path.stem for path in (ROOT / "fastlab").glob("*.py")}
    modules |= {path.parent.name for path in (ROOT / "fastlab").glob("*/__init__.py")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(text for extra in extras for text in extra)]
    names = {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in wanted}
    needed = {
        module
        for module, distributions in packages_distributions().items()
        if names & {name.lower().replace("_", "-") for name in distributions}
    }
    assert {"torch", "PIL", "accelerate"} <= needed
    assert {"train", "models"} <= modules
    assert not modules & (set(sys.stdlib_module_names) | needed)
