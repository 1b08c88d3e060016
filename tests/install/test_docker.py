"""The Dockerfile, as far as it can be tried without Docker and without network."""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.packages import has

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
CONTEXT = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def copied() -> list[str]:
    """What the Dockerfile copies from the checkout."""
    lines = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()]


def test_the_context_is_what_the_image_copies():
    assert sorted(copied()) == sorted(line[1:] for line in CONTEXT if line.startswith("!"))
    assert all((ROOT / source).exists() for source in copied())


@pytest.mark.skipif(not has("build") or not has("hatch_vcs"), reason="needs build")
def test_what_the_image_copies_gives_a_wheel_of_the_version_it_is_given(tmp_path):
    for source in copied():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    command = re.search(r'"\$VERSION" python (-m build .+) /dist', DOCKERFILE)
    words = [*shlex.split(command[1]), tmp_path / "dist", "--no-isolation"]
    subprocess.run(
        [sys.executable, *words],
        env={"PATH": "", "SETUPTOOLS_SCM_PRETEND_VERSION": "9.8.7"},
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name == "fastlab_train-9.8.7-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert {"fastlab/cli.py", "fastlab/checkout/configs/demo.toml"} <= {*archive.namelist()}


def test_the_image_installs_the_wheel_as_the_test_in_a_new_environment_does():
    """There with the index that the machine is set up for."""
    (installed,) = re.findall(r"pip install .*?(\S+/\*\.whl)$", DOCKERFILE, re.MULTILINE)
    assert installed == "/dist/*.whl"
    assert 'pip" install --quiet "$scratch"/dist/*.whl' in (ROOT / ".ci/wheel").read_text()


def test_the_image_does_not_run_as_root():
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d*$", last, re.MULTILINE)


@pytest.mark.skipif(
    not shutil.which("hadolint", path=Path(sys.executable).parent), reason="needs hadolint"
)
def test_hadolint_has_no_complaints():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
