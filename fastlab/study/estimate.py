"""How long the trainings of a study will take: from finished runs, else from measured steps.

Nothing is compiled to measure, since compiling takes longer than the measurement: on a GPU the
training itself is faster.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fastlab.config import Config
from fastlab.console import first_line, silence
from fastlab.processes import die_with_parent
from fastlab.report.texts import duration_text
from fastlab.run_records import train_seconds
from fastlab.runs import RunDir
from fastlab.study.child import places
from fastlab.study.folder import State, StudyDir
from fastlab.study.results import read_result
from fastlab.study.screen import counted
from fastlab.study.spec import Task

_WARMUP = 2  # steps
_BUDGET = 1.0  # seconds of steps


def estimate(
    folder: StudyDir, tasks: list[Task], todo: list[Task], states: dict[str, State], measure: bool
) -> tuple[dict[str, float], str]:
    """Seconds that each run in `todo` still needs, by its name, and where the figures come from:
    the epochs of finished runs that cost the same; where there is none and `measure` is set,
    measured steps. A run is left out where neither is known. The start of a worker's process is
    not counted: it is paid once for all runs that the worker trains."""
    finished = _finished_epochs(folder, [t for t in tasks if states[t.name].status == "finished"])
    kinds = {_cost(task): task for task in todo}
    unknown = [task for cost, task in kinds.items() if cost not in finished]
    if measure and unknown:
        print(f"measuring an epoch's time, {counted(len(unknown), 'kind')} of run", flush=True)
    measured, problem = _measured_epochs(unknown if measure else [])
    epochs = finished | {_cost(t): measured[t.name] for t in unknown if t.name in measured}
    seconds = {
        task.name: epochs[_cost(task)] * (task.config.train.epochs - states[task.name].epochs)
        for task in todo
        if _cost(task) in epochs
    }
    counts = [
        (len(kinds.keys() & finished.keys()), "from finished runs"),
        (len(measured), "measured now over some steps without torch.compile"),
        (len(kinds.keys() - epochs.keys()), f"unknown{problem and f' ({problem})'}"),
    ]
    sources = ", ".join(f"{count} {source}" for count, source in counts if count)
    return seconds, f"time per epoch for {counted(len(kinds), 'kind')} of run: {sources}"


def estimate_text(seconds: dict[str, float], source: str, todo: list[Task], jobs: int) -> str:
    if not todo:
        return "nothing left to train"
    if not seconds:
        return f"no estimate of time: {source}"
    total = sum(seconds.values())
    known = "" if len(seconds) == len(todo) else f" for {len(seconds)} of the {len(todo)} runs"
    jobs = min(jobs, len(todo))
    side = f", at best {duration_text(total / jobs)} with --jobs {jobs}" if jobs > 1 else ""
    return f"about {duration_text(total)} of training{known}{side}; {source}"


def _cost(task: Task) -> tuple[Any, ...]:
    """Equal for runs whose epochs take about the same time."""
    data, model, train = task.config.data, task.config.model, task.config.train
    return (
        *(data.path, data.pipeline, data.placement),
        *(model.name, model.width, model.batch_norm, model.shortcuts),
        json.dumps(model.arguments, sort_keys=True),
        *(train.batch_size, train.precision, train.channels_last, train.compile),
        *(train.image_size, task.config.optim.name, task.config.evaluate.tta),
    )


def _finished_epochs(folder: StudyDir, tasks: list[Task]) -> dict[tuple[Any, ...], float]:
    """Mean seconds of an epoch, by cost."""
    seconds: dict[tuple[Any, ...], list[float]] = {}
    for task in tasks:
        run = read_result(folder, task).run
        if run and (total := train_seconds(run)):
            seconds.setdefault(_cost(task), []).append(total / len(run.epochs))
    return {cost: statistics.fmean(each) for cost, each in seconds.items()}


def _measured_epochs(tasks: list[Task]) -> tuple[dict[str, float], str]:
    """Seconds of an epoch by task name, and why those that are missing could not be measured.

    They are measured in another process, since importing torch takes memory and time, and in a new
    one for each precision, which a process sets once."""
    seconds, problem = {}, ""
    for precision in sorted({task.config.train.precision for task in tasks}):
        with ProcessPoolExecutor(1, get_context("spawn"), _begin, (places(1)[0],)) as process:
            for task in tasks:
                if task.config.train.precision != precision:
                    continue
                try:
                    seconds[task.name] = process.submit(epoch_seconds, task.config).result()
                except Exception as error:  # any: the training itself will meet it and report it
                    problem = first_line(error)
    return seconds, problem


def _begin(environment: dict[str, str]) -> None:
    """In the process that measures: print nothing, and do not outlive the command."""
    die_with_parent()
    os.environ.update(environment)
    silence(sys.stdout)
    silence(sys.stderr)


def epoch_seconds(cfg: Config) -> float:
    """Seconds of the mean epoch's training and validation, from the median step of each size of
    images."""
    import torch  # a study's own process, which imports this module, does without it

    from fastlab.train import Trainer
    from fastlab.training.metrics import wait_for_device
    from fastlab.training.resizing import epochs_by_side
    from fastlab.training.setup import make_accelerator, torch_settings

    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, compile=False))
    with torch_settings(cfg):
        trainer = Trainer(cfg, RunDir(Path(os.devnull)), make_accelerator(cfg))
        wait = partial(wait_for_device, trainer.device)
        trainer.model.train()
        training = sum(
            len(epochs) * step_seconds(trainer.batches(epochs[0]), trainer.step, wait)
            for epochs in epochs_by_side(cfg.train, trainer.manifest.image_size).values()
        )
        trainer.model.eval()
        with torch.no_grad():
            batches = trainer.val_data.epoch(0)
            validation = step_seconds(batches, lambda batch: trainer.net(batch.images), wait)
    passes = 2 if cfg.evaluate.tta == "flip" else 1
    return (
        training / cfg.train.epochs * trainer.train_data.steps()
        + passes * validation * trainer.val_data.steps()
    )


def step_seconds(
    batches: Iterable[Any], step: Callable[[Any], object], wait: Callable[[], None]
) -> float:
    """Median seconds of a step, over steps of `_BUDGET` seconds in all after `_WARMUP` steps; over
    all steps where there are no more than those. `wait` waits for the device."""
    seconds, started = [], time.perf_counter()
    for batch in batches:
        step(batch)
        wait()
        seconds.append(time.perf_counter() - started - sum(seconds))
        if len(seconds) > _WARMUP and sum(seconds[_WARMUP:]) > _BUDGET:
            break
    return statistics.median(seconds[_WARMUP:] or seconds)
