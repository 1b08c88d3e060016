"""Records and pages do not show where on a machine the project lies."""

import sys

import pytest

from fastlab.console import public_command, public_path, public_text
from fastlab.machine import environment


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_below_the_current_directory_are_relative_and_others_are_names(here):
    assert public_path(f"{here}/data/tiny") == "data/tiny"
    assert public_path("/elsewhere/data/tiny/") == "tiny"
    assert public_path("data/tiny") == "data/tiny"


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("/x/.venv/bin/fastlab", "fastlab"),
        ("/x/fastlab/train.py", "fastlab/train.py"),
        ("fastlab/train.py", "fastlab/train.py"),
        ("-c", "-c"),
    ],
)
def test_the_program_is_shown_as_it_is_called_from_a_checkout(program, shown):
    assert public_command([program, "--resume"]) == f"{shown} --resume"


def test_arguments_lose_only_the_folders_of_their_absolute_paths(here):
    argv = ["fastlab", "train", "--set", 'data.path="/elsewhere/tiny"', "--set", "optim.lr=1e-3"]
    argv += ["--out", f"{here}/runs/a", f"--config={here}/configs/demo.toml", "/with a/space here"]
    assert public_command(argv) == (
        "fastlab train --set 'data.path=\"tiny\"' --set optim.lr=1e-3 --out runs/a "
        "--config=configs/demo.toml 'space here'"
    )


def test_a_run_records_a_public_command(here, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/bin/fastlab", "train", "--out", f"{here}/run"])
    assert environment(processes=1)["command"] == "fastlab train --out run"


@pytest.mark.parametrize(
    "text",
    [
        "images/s, 3 /s, data/tiny/train, ../data/tiny, ~/data/tiny",
        "https://pytorch.org/memory_viz/x",
        "<p>a</p></li><img src='data:image/png;base64,iVBO/a/b+/c/d=='>",
    ],
)
def test_text_without_an_absolute_path_is_unchanged(text):
    assert public_text(text) == text


def test_paths_in_text_and_markup_are_shortened():
    assert public_text("/a/b/tiny: is damaged") == "tiny: is damaged"
    assert public_text("<td>/a/b/tiny</td>") == "<td>tiny</td>"
    assert public_text("path = &#34;/a/b/tiny&#34;") == "path = &#34;tiny&#34;"
