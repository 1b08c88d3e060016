"""`fastlab configs`: what comes with fastlab is listed, and copied to where it works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.search_spec import read_search
from fastlab.cli import main
from fastlab.study.spec import read_study

ROOT = Path(__file__).parents[1]


def copied(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_configuration_is_listed_with_the_sentence_that_it_begins_with(capsys):
    assert main(["configs"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    files = {path.stem for path in (ROOT / "configs").glob("*.toml")}
    studies = {f"ablations/{path.stem}" for path in (ROOT / "configs/ablations").glob("*.toml")}
    assert set(listed) == files | studies | {"benchmarks", "examples"}
    assert listed["ablations/cnn-lr"] == "A sweep of the initial learning rate, CNN-8."
    assert listed["resnet18"].endswith("images, without test-time flips.")  # of a second line


def test_everything_is_copied_with_its_place_in_a_checkout(tmp_path, capsys):
    assert main(["configs", "--copy", str(tmp_path / "new")]) == 0
    names = copied(tmp_path / "new")
    assert {"examples/slurm-train.sh", "benchmarks/records/clock.py"} <= names
    assert not [name for name in names if "results" in name or name.endswith(".pyc")]
    for name in names:
        assert (tmp_path / "new" / name).read_bytes() == (ROOT / name).read_bytes()
    assert f"files copied: {len(names)}" in capsys.readouterr().out
    assert main(["configs", "--copy", str(tmp_path / "new")]) == 0
    assert "holds these files already" in capsys.readouterr().out


def test_a_study_is_copied_with_the_configuration_that_it_changes(tmp_path):
    assert main(["configs", "--copy", str(tmp_path), "ablations/resnet18-additions"]) == 0
    study = "configs/ablations/resnet18-additions.toml"
    assert copied(tmp_path) == {study, "configs/resnet18.toml"}
    assert read_study(tmp_path / study, []).rows


def test_copied_benchmarks_run_there_and_find_their_bases(tmp_path):
    assert main(["configs", "--copy", str(tmp_path), "benchmarks"]) == 0
    for name in ("reference", "rehearsal"):
        assert read_search(tmp_path / f"benchmarks/searches/{name}.toml", [])
    done = subprocess.run(
        [sys.executable, "-c", "import benchmarks.loaders; print(benchmarks.loaders.__file__)"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == tmp_path / "benchmarks/loaders.py"


def test_a_file_with_other_content_is_refused_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/speed8.toml").write_text("mine = 1\n")
    assert main(["configs", "--copy", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "configs/speed8.toml: exists with other content" in error
    assert len(error.splitlines()) == 1 and copied(tmp_path) == {"configs/speed8.toml"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--copy", "FOLDER", "resnet12"], "resnet12: no such configuration; "),
        (["resnet11"], "add --copy DIR"),
        (["--copy", "FOLDER/file/below", "demo"], "cannot be written (Not a directory)"),
    ],
)
def test_a_mistake_gives_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = [text.replace("FOLDER", str(tmp_path)) for text in arguments]
    assert main(["configs", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["resnet11", "resnet11.toml", "configs/resnet11.toml"])
def test_a_configuration_that_is_not_there_is_offered_as_a_copy(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", name]) == 2
    error = capsys.readouterr().err
    assert "`fastlab configs --copy . resnet11`, then give configs/resnet11.toml" in error


def test_a_configuration_that_cannot_be_read_is_not_offered_as_a_copy(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.toml").mkdir()
    assert main(["train", "--config", "demo.toml"]) == 2
    assert "check --config" in capsys.readouterr().err
