"""Commands of this checkout besides `fastlab`: a mistake gives one line and exit status 2."""

import sys
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import (
    convert,
    device_loaders,
    loaders,
    measurements,
    scaling,
    tables,
    training,
)
from benchmarks.records import clock, reference
from fastlab import cli
from fastlab.console import UserError, run_command
from fastlab.dataset.archives import COMPRESSED_TAR
from tests import screenshots
from tests.faults import __main__ as faults

DEMO = ["--config", "configs/demo.toml"]
MISTAKES = {
    "loaders: no dataset": (loaders.main, ["nope"]),
    "loaders: no such case": (loaders.main, ["nope", "--only", "fastlab resident;fastlab nope"]),
    "device_loaders: no dataset": (device_loaders.main, ["nope"]),
    "device_loaders: no such case": (device_loaders.main, ["nope", "--cases", "copy roof;nope"]),
    "training: no configuration": (training.main, ["--config", "nope.toml"]),
    "training: no such variant": (training.main, [*DEMO, "--variants", "foo"]),
    "training: no dataset": (training.main, [*DEMO, "--set", "data.path=nope"]),
    "scaling: no configuration": (scaling.main, ["--config", "nope.toml"]),
    "scaling: no dataset": (scaling.main, [*DEMO, "--set", "data.path=nope"]),
    "convert: no source": (convert.main, ["nope", "--scratch", "SCRATCH"]),
    "tables: no record": (tables.main, ["--agreement", "nope", "nope"]),
    "screenshots: no run": (screenshots.main, ["nope", "nowhere"]),
    "faults: no such stage": (faults.main, ["--only", "images,nope"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line_and_status_2(mistake, tmp_path, capsys):
    main, arguments = MISTAKES[mistake]
    assert main([text.replace("SCRATCH", str(tmp_path)) for text in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fastlab: ") and len(err.splitlines()) == 1
    assert ("nope" in err or "foo" in err) and not out


def test_a_speed_record_without_a_dataset_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reference", "--data", "nope"])
    config = "configs/resnet11.toml"
    assert clock.main("reference", reference.TARGET, reference.RECIPE, config) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (scaling.main, [*DEMO, "--processes", "x"]),
        (loaders.main, ["nope", "--cores", "1,x"]),
        (device_loaders.main, ["nope", "--batches", "256,0"]),
        (training.main, [*DEMO, "--batches", "0"]),
        (convert.main, ["nope", "--rounds", "0"]),
        (screenshots.main, []),
    ],
)
def test_unreadable_arguments_give_status_2(main, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_help_is_not_taken_for_a_file_name(capsys):
    with pytest.raises(SystemExit) as end:
        faults.main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")


def test_the_stages_of_faults_are_listed(capsys):
    assert list(faults.STAGES) == list(faults.stages(0, False))
    with pytest.raises(SystemExit):
        faults.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {name:<16}{what}" in shown for name, what in faults.STAGES.items())


def test_without_any_measured_case_the_command_fails(capsys):
    results = measurements.Results("loaders", None)
    with pytest.raises(UserError, match="no case"):
        results.report(loaders.table, {"case": "why"})
    assert capsys.readouterr().err == "skipped case: why\n"


def test_an_unwritable_record_is_refused_with_its_option(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    made = measurements.new_session("loaders", [])
    out = tmp_path / "file" / "out.json"
    assert run_command(lambda _: measurements.save(made, out), Namespace()) == 2
    assert "--out" in capsys.readouterr().err


def test_a_picture_ends_between_two_parts_of_the_page(tmp_path):
    pixels = np.full((200, 40, 3), 255, np.uint8)
    pixels[30:100, 5:30] = 0  # a part of the page, and one that the window cuts off
    pixels[140:200, 5:30] = np.arange(60, dtype=np.uint8)[:, None, None]
    Image.fromarray(pixels).save(tmp_path / "page.png")
    screenshots.cut(tmp_path / "page.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "page.png")), pixels[:140])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "configs/demo.toml"], "give it as --config configs/demo.toml"),
        (["train", "--confg", "configs/demo.toml"], "see fastlab train --help"),
        (["report", "runs/a", "--nope"], "see fastlab report --help"),
    ],
)
def test_an_unexpected_argument_gives_one_line_with_what_to_do(arguments, hint, capsys):
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.endswith(f"{hint}\n")


def test_help_names_every_archive_and_what_inspect_shows(capsys):
    for command in ("convert", "inspect"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in (".zip", *COMPRESSED_TAR))
    assert "augmented" in shown
