"""fastlab called from Python, as by a notebook: several times, in threads, paths as strings."""

import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch

from fastlab import config
from fastlab.training.setup import compile_forward, make_accelerator
from tests.trainings import ROOT, TINY


def python(code: str, folder: Path) -> str:
    """Run `code` in a process of its own, in `folder`. Returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(synth_dataset, tmp_path) -> Path:
    """A working directory with a dataset and a configuration of a tiny training."""
    (tmp_path / "data").symlink_to(synth_dataset)
    sets = [f'"--set", "{each}"' for each in (*TINY, "data.path=data", "train.epochs=1")]
    demo = ROOT / "configs" / "demo.toml"
    (tmp_path / "tiny.py").write_text(
        f'ARGUMENTS = ["--config", "{demo}", {", ".join(sets)}, "--out"]\n'
    )
    return tmp_path


def test_a_second_training_of_a_process_has_a_precision_of_its_own(folder):
    assert "[0, 0, 0]" in python(
        """
        from tiny import ARGUMENTS
        from fastlab.train import main

        print([main([*ARGUMENTS, name, "--set", f"train.precision={name}"])
               for name in ("fp32", "bf16", "fp64")])
        """,
        folder,
    )
    alone = "from tiny import ARGUMENTS\nfrom fastlab.train import main\n"
    alone += 'main([*ARGUMENTS, "alone", "--set", "train.precision=bf16"])'
    python(alone, folder)
    files = [folder / run / "checkpoints" / "best.safetensors" for run in ("alone", "bf16", "fp32")]
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2]


def test_a_training_runs_in_a_thread(folder):
    """It has no signal handlers there, so that the main thread keeps its own."""
    assert "done [0]" in python(
        """
        import signal, threading
        from tiny import ARGUMENTS
        from fastlab import train

        before, epoch = signal.getsignal(signal.SIGINT), train.epoch

        def checked(trainer):
            assert signal.getsignal(signal.SIGINT) is before
            epoch(trainer)

        train.epoch, ends = checked, []
        thread = threading.Thread(target=lambda: ends.append(train.main([*ARGUMENTS, "run"])))
        thread.start()
        thread.join()
        print("done", ends)
        """,
        folder,
    )


def test_paths_may_be_strings(folder):
    assert python(
        """
        from tiny import ARGUMENTS
        from fastlab import config, predict, runs, train
        from fastlab.dataset.convert import Options, convert
        from fastlab.dataset.manifest import read_manifest
        from fastlab.dataset.synth import synthesise
        from fastlab.report.page import write_report
        from fastlab.training.setup import make_accelerator

        synthesise("originals", 4, 8)
        convert("originals", "dataset", Options())
        assert len(read_manifest("dataset").classes) == 4
        assert train.main([*ARGUMENTS, "run"]) == 0
        cfg = config.load("run/config.toml")
        trainer = train.Trainer(cfg, runs.RunDir("other"), make_accelerator(cfg), "run")
        assert trainer.run.path.name == "other" and trainer.origin == "run"
        assert "top-1" in str(predict.evaluate_run("run", "val", "best"))
        write_report(["run"], "report.html")
        print("all of them")
        """,
        folder,
    ).endswith("all of them\n")


def test_the_model_of_every_training_of_a_process_is_compiled(monkeypatch):
    """By itself, torch compiles eight variants of a function, which all models of a class share."""
    # Equal configurations would count as equal shapes, of which nothing is forgotten.
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for width in range(1, 11):
        make_accelerator(config.load(None, ["train.precision=fp32", f"model.width={width}"]))
        model = torch.nn.Linear(width, 1)
        compile_forward(model, deterministic=False)
        model(torch.zeros(2, width))
    assert len(graphs) == 10
