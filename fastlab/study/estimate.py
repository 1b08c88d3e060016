"""How long an epoch of a configuration takes here, from some seconds of real steps.

    python -m fastlab.study.estimate CONFIG.toml ...

Writes a JSON line for each configuration, which are to share their precision: {"config", "epoch"}
(seconds, validation included) or {"config", "error"}. Never compiled, since compiling takes longer
than the measurement: on a GPU the training itself is faster.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from fastlab import config as configs
from fastlab.config import Config
from fastlab.runs import RunDir
from fastlab.train import Trainer, make_accelerator, torch_settings, wait_for_device
from pipelines.base import Batch

_WARMUP = 2  # steps
_BUDGET = 1.0  # seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", metavar="CONFIG.toml")
    for path in parser.parse_args(argv).configs:
        try:
            found = {"epoch": epoch_seconds(configs.load(Path(path)))}
        except Exception as error:  # whatever it is, the training itself will meet it and say so
            found = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        print(json.dumps({"config": path, **found}), flush=True)


def epoch_seconds(cfg: Config) -> float:
    """Of training and validation, from the median step of each."""
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, compile=False))
    with torch_settings(cfg):
        trainer = Trainer(cfg, RunDir(Path(os.devnull)), make_accelerator(cfg))
        wait = partial(wait_for_device, trainer.device)
        trainer.model.train()
        training = step_seconds(trainer.batches(0), trainer.step, wait)
        trainer.model.eval()
        with torch.no_grad():
            look = trainer.val_data.epoch(0)
            validation = step_seconds(look, lambda batch: trainer.net(batch.images), wait)
    return training * trainer.train_data.steps() + validation * trainer.val_data.steps()


def step_seconds(
    batches: Iterable[Batch | None],
    step: Callable[[Batch | None], object],
    wait: Callable[[], None],
) -> float:
    """Median over the steps of `_BUDGET` seconds, the first ones left out where there are more."""
    found, started = [], time.perf_counter()
    for batch in batches:
        step(batch)
        wait()
        found.append(time.perf_counter() - started - sum(found))
        if len(found) > _WARMUP and sum(found[_WARMUP:]) > _BUDGET:
            break
    return statistics.median(found[_WARMUP:] or found)


if __name__ == "__main__":
    main()
