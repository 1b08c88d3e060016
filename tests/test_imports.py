"""Who may import whom, read from the source."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imported(path: Path, late: bool = True) -> set[str]:
    """Dotted names that a file imports anywhere; ``from a import b`` counts as a and as a.b.
    Without `late`, those alone that importing the file imports, and no call of a function."""
    names = set()
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), late):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def nodes(node: ast.AST, late: bool) -> Iterator[ast.AST]:
    """`node` and what is in it; without `late`, what is in no function."""
    yield node
    if late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in ast.iter_child_nodes(node):
            yield from nodes(child, late)


def reached(module: str, late: bool = True) -> dict[str, set[str]]:
    """What each module of the project that importing `module` reaches imports."""
    waiting, found = [module], {}
    while waiting:
        module = waiting.pop()
        if module in found or (path := source_of(module)) is None:
            continue
        found[module] = imported(path, late)
        parents = {".".join(module.split(".")[:i]) for i in range(1, module.count(".") + 1)}
        waiting += within(found[module], "fastlab", "pipelines") | parents
    return found


def within(names: set[str], *packages: str) -> set[str]:
    return {n for n in names for package in packages if n == package or n.startswith(package + ".")}


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def source_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


def test_the_reader_of_imports_sees_every_form(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text("import a.b\ndef f():\n    from c import d as e\n    import g as h\n")
    assert imported(path) == {"a.b", "c", "c.d", "g"}
    assert imported(path, late=False) == {"a.b"}


@pytest.mark.parametrize("path", sources("fastlab/models"), ids=lambda path: path.name)
def test_models_know_nothing_of_pipelines(path):
    assert not within(imported(path), "pipelines", "fastlab.dataset", "fastlab.train")


@pytest.mark.parametrize("path", sources("pipelines"), ids=lambda path: path.name)
def test_pipelines_know_nothing_of_training(path):
    above = [f"fastlab.{name}" for name in ("train", "models", "optim", "report", "predict")]
    assert not within(imported(path), *above)


def test_the_report_needs_no_torch_not_even_through_others():
    found = reached("fastlab.report.page")
    for module, names in found.items():
        assert not within(names, "torch", "torchvision", "accelerate"), module
    assert {"fastlab", "fastlab.report.page", "fastlab.console"} <= found.keys()


def test_training_imports_numba_only_where_a_cpu_makes_batches():
    found = reached("fastlab.train", late=False)
    for module, names in found.items():
        assert not within(names, "numba"), module
    assert {"fastlab.predict", "pipelines", "pipelines.augment"} <= found.keys()
    assert "numba" in imported(source_of("pipelines.augment_cpu"), late=False)


def test_no_module_hides_a_standard_or_a_needed_one():
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
