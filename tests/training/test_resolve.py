"""Which configuration and run directory the options of a training name, and what it refuses."""

import argparse
import shlex
from pathlib import Path

import pytest
import torch

from fastlab.cli import main
from fastlab.config import SECTIONS, dump, load
from fastlab.console import UserError
from fastlab.fields import field_types
from fastlab.options import add_training_options
from fastlab.training.resolve import CHANGEABLE, resolve
from tests.trainings import ROOT, command

DEMO = str(ROOT / "configs" / "demo.toml")


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_training_options(parser)
    return parser.parse_args(arguments)


def test_a_run_is_named_after_its_configuration_unless_out_is_given():
    _, run = resolve(options("--config", DEMO))
    assert run.path == Path("runs/demo")
    _, run = resolve(options("--config", DEMO, "--out", "elsewhere"))
    assert run.path == Path("elsewhere")


def test_overrides_and_profile_change_nothing_else():
    cfg, _ = resolve(
        options("--config", DEMO, "--set", "train.epochs=7", "--set", "optim.lr=0.5", "--profile")
    )
    assert cfg == load(Path(DEMO), ["train.epochs=7", "optim.lr=0.5", "profile.enabled=true"])


def test_a_resumed_run_has_its_own_configuration(tmp_path):
    before = load(Path(DEMO), ["train.epochs=7", f"data.path={tmp_path}"])
    (tmp_path / "config.toml").write_text(dump(before))
    cfg, run = resolve(options("--resume", str(tmp_path)))
    assert cfg == before and run.path == tmp_path


@pytest.mark.parametrize(
    "arguments", [("--config", DEMO), ("--out", "elsewhere"), ("--init", "a"), ("--overwrite",)]
)
def test_resume_refuses_options_of_a_new_run(arguments, tmp_path):
    with pytest.raises(UserError, match=f": drop {arguments[0]}$"):
        resolve(options("--resume", str(tmp_path), *arguments))


def test_the_default_directory_for_the_configuration_of_a_run_is_a_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("wide", "wide-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "wide" / "config.toml").write_text(dump(load(Path(DEMO))))
    monkeypatch.chdir(tmp_path / "runs" / "wide")
    assert resolve(options("--config", "config.toml"))[1].path == Path("runs/wide-2")
    monkeypatch.chdir(tmp_path)
    assert resolve(options("--config", "runs/wide/config.toml"))[1].path == Path("runs/wide-3")


def test_a_resumed_run_takes_settings_that_its_checkpoint_does_not_depend_on(tmp_path):
    before = load(Path(DEMO), [f"data.path={tmp_path}"])
    (tmp_path / "config.toml").write_text(dump(before))
    sets = ("optim.lr=0.5", "train.epochs=99", "schedule.warmup=0.5", "profile.enabled=true")
    arguments = [word for each in sets for word in ("--set", each)]
    cfg, _ = resolve(options("--resume", str(tmp_path), *arguments))
    assert cfg == load(Path(DEMO), [f"data.path={tmp_path}", *sets])


@pytest.mark.parametrize(
    "change",
    [
        "data.pipeline=torchvision",
        "augment.flip=true",
        "model.name=cnn8",
        "model.dropout_fc=0.5",
        "optim.name=sgd",
        "optim.beta1=0.5",
        "schedule.name=plateau",
        "train.batch_size=4",
        "train.seed=7",
        "train.precision=bf16",
        "train.ema=0.9",
    ],
)
def test_a_resumed_run_refuses_another_setting_by_its_name(change, tmp_path):
    (tmp_path / "config.toml").write_text(dump(load(Path(DEMO))))
    arguments = ("--resume", str(tmp_path), "--set", "optim.lr=0.5", "--set", change)
    with pytest.raises(UserError) as caught:
        resolve(options(*arguments))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"--set {change.split('=')[0]}: a resumed run cannot change it")
    # The command that it advises instead is one that a shell and fastlab take.
    advised = shlex.split(line.partition(": fastlab train ")[2])
    cfg, _ = resolve(options(*advised))
    assert cfg == load(Path(DEMO), ["optim.lr=0.5", change])


def test_a_setting_that_keeps_its_value_is_not_refused(tmp_path):
    (tmp_path / "config.toml").write_text(dump(load(Path(DEMO), [f"data.path={tmp_path}"])))
    resolve(options("--resume", str(tmp_path), "--set", "train.batch_size=64"))


def test_every_setting_that_may_change_exists():
    for section, keys in CHANGEABLE.items():
        assert keys <= set(field_types(SECTIONS[section]))


def test_fp16_without_a_gpu_is_refused(synth_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = tmp_path / "run"
    assert main(["train", *command(synth_dataset, run, "train.precision=fp16")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'train.precision = "fp16" needs a GPU' in line and not run.exists()
