"""Which configuration and run directory the options of a training name, and what it refuses."""

import argparse
from pathlib import Path

import pytest
import torch

from fastlab.cli import main
from fastlab.config import dump, load
from fastlab.console import UserError
from fastlab.options import add_training_options
from fastlab.training.setup import resolve
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
    before = load(Path(DEMO), ["train.epochs=7"])
    (tmp_path / "config.toml").write_text(dump(before))
    cfg, run = resolve(options("--resume", str(tmp_path)))
    assert cfg == before and run.path == tmp_path


@pytest.mark.parametrize(
    "arguments", [("--config", DEMO), ("--set", "optim.lr=1"), ("--out", "elsewhere")]
)
def test_resume_refuses_options_that_would_change_the_run(arguments, tmp_path):
    with pytest.raises(UserError, match="drop --config, --set, --out"):
        resolve(options("--resume", str(tmp_path), *arguments))


def test_fp16_without_a_gpu_is_refused(synth_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = tmp_path / "run"
    assert main(["train", *command(synth_dataset, run, "train.precision=fp16")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'train.precision = "fp16" needs a GPU' in line and not run.exists()
