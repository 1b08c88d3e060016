"""The wheel and the sdist: what they hold, and that the wheel works outside of a checkout. What a
user does with it first, `.ci/wheel` does with all its dependencies in a new environment."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.install import first_steps
from tests.packages import has

ROOT = Path(__file__).parents[2]
VERSION = "9.8.7"
PARTS = ("benchmarks", "configs", "examples", "fastlab", "pipelines", "tests")
FILES = ("pyproject.toml", "README.md", "LICENSE", ".gitignore")
NOT_CARRIED = {"fastlab/version.txt", "pipelines/engines.toml"}

pytestmark = pytest.mark.skipif(not has("build") or not has("hatch_vcs"), reason="needs build")


def tracked(part: str) -> set[str]:
    """The files of a folder of the checkout, without records, caches and what a build wrote."""
    paths = [path.relative_to(ROOT) for path in (ROOT / part).rglob("*") if path.is_file()]
    left_out = {"results", "__pycache__"}
    return {path.as_posix() for path in paths if not left_out & {*path.parts}} - NOT_CARRIED


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it. The checkout is copied, without git: a build writes
    the version into it."""
    folder = tmp_path_factory.mktemp("build")
    checkout = folder / "checkout"
    for part in PARTS:
        shutil.copytree(ROOT / part, checkout / part)
    for file in FILES:
        shutil.copy(ROOT / file, checkout)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", checkout],
        env={"PATH": "", "SETUPTOOLS_SCM_PRETEND_VERSION": VERSION},
        cwd=folder,
        check=True,
        timeout=120,
    )
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory) -> Path:
    """A virtual environment with the wheel, and with the dependencies of this one. A folder that a
    .pth names has its own .pth files ignored, and with them the checkout in editable mode."""
    path = tmp_path_factory.mktemp("environment")
    venv.create(path, symlinks=True)
    (site,) = path.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", path / "bin" / "python"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", distributions[1]], check=True)
    return path


def test_the_wheel_holds_two_packages_and_within_one_what_comes_with_them(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    carried = {
        f"fastlab/checkout/{file}"
        for part in ("benchmarks", "configs", "examples")
        for file in tracked(part)
    }
    expected = tracked("fastlab") | tracked("pipelines") | carried | {"fastlab/version.txt"}
    assert names == expected
    assert {"fastlab/py.typed", "pipelines/py.typed", "fastlab/study/reference.toml"} <= names


def test_the_sdist_holds_the_tests_and_few_megabytes(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert tracked("tests") | tracked("configs") | {"pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith("report.html")]
    assert distributions[0].stat().st_size < 3_000_000


def test_the_command_has_the_version_of_the_build(environment, tmp_path):
    assert first_steps.run(environment, tmp_path, "fastlab", "--version") == f"fastlab {VERSION}\n"


def test_a_package_that_is_missing_is_installed_for_the_wheel(environment, tmp_path):
    code = "from fastlab.machine import installing; print(installing('remote'))"
    printed = first_steps.run(environment, tmp_path, "python", "-c", code)
    assert printed == 'run `pip install "fastlab-train[remote]"`\n'


def test_the_revision_of_a_surrounding_checkout_is_not_taken_for_that_of_fastlab(
    environment, tmp_path
):
    subprocess.run(["git", "init", "--quiet", environment], check=True)
    user = ("-c", "user.name=x", "-c", "user.email=x@y")
    commit = ["git", "-C", environment, *user, "commit", "--quiet", "--allow-empty", "-m", "x"]
    subprocess.run(commit, check=True)
    code = "from fastlab.machine import environment; print(environment(1)['git'])"
    assert first_steps.run(environment, tmp_path, "python", "-c", code) == "None\n"
