"""Train one classifier.

accelerate launch -m fastlab.train --config configs/resnet11.toml    # one or many devices
fastlab train --config configs/demo.toml --set train.epochs=3        # one process
fastlab train --resume runs/resnet11                                 # continue where it stopped
torchrun --nproc_per_node 2 -m fastlab.train --config FILE           # two processes, also on a CPU
"""

import argparse
import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial

from fastlab.training.start import start_script

if __name__ == "__main__":
    start_script()  # before the imports, which take seconds

import torch
from accelerate import Accelerator

from fastlab.config import Config
from fastlab.console import run_command
from fastlab.dataset.manifest import fingerprint
from fastlab.models.dropout import DropoutKeys
from fastlab.options import add_training_options
from fastlab.runs import RunDir
from fastlab.tracing import Tracer, span
from fastlab.training import setup, trackers
from fastlab.training.distributed import agreed, largest_int
from fastlab.training.evaluate import evaluate
from fastlab.training.failures import batch_fits, data_fits, failures_explained, model_fits
from fastlab.training.guards import Diverged, StopRequested, Watch, divergence_explained
from fastlab.training.journal import Journal
from fastlab.training.metrics import Figures, Sums, Throughput, make_loss
from fastlab.training.optim import Rate, WeightAverage
from fastlab.training.resizing import image_side, resized
from fastlab.training.resolve import begun, resolve
from fastlab.training.state import State
from fastlab.training.step import Step
from pipelines.base import Batch


class Trainer:
    """One run: everything that lives from its first step to its last."""

    def __init__(
        self, cfg: Config, run: RunDir, accelerator: Accelerator, init: str | None = None
    ) -> None:
        """`init`: as `setup.build` takes it."""
        self.cfg, self.run, self.accelerator = cfg, run, accelerator
        self.device, rank = accelerator.device, accelerator.process_index

        with agreed(accelerator):
            self.manifest = setup.open_dataset(cfg)
            with data_fits(cfg):
                split = partial(setup.open_split, cfg, self.manifest, accelerator)
                self.train_data, self.val_data = split("train", train=True), split("val")
            with model_fits(cfg):
                model, self.origin = setup.build(cfg, self.manifest, init)
        with model_fits(cfg):
            self.model, self.net, self.optimizer = setup.prepare(cfg, model, accelerator)
            self.average = WeightAverage(self.model, cfg.train.ema) if cfg.train.ema else None

        steps = cfg.train.epochs * self.train_data.steps()
        self.rate = Rate(cfg.schedule, cfg.optim.lr, steps, self.device)
        self.rate.attach(self.optimizer)
        self.dropout = DropoutKeys(self.model, cfg.train.seed, rank, self.device)
        self.sums = Sums(self.device)
        self.loss_and_sums = make_loss(compile=cfg.train.compile)
        self.captures = setup.captures(cfg, accelerator)
        self.step = self.make_step()
        self.side = image_side(cfg.train, 0, self.manifest.image_size)

        parts = (self.model, self.optimizer, self.rate, self.average, self.sums)
        self.state = State(run, accelerator, *parts)
        self.progress = self.state.progress
        self.watch = Watch(accelerator, self.step, self.sums)
        self.tracer = Tracer(cfg.profile, run.traces, rank, self.device)
        self.journal = Journal(run, cfg, self.manifest, self.model, self.state, accelerator)
        self.throughput = Throughput(self.device)

    def make_step(self) -> Step:
        return Step(
            lambda batch: train_step(self, batch),
            self.optimizer,
            self.dropout,
            self.rate,
            self.average,
            self.train_data.steps(),
            self.device,
            # On a CPU, compiling its small parts takes longer than it saves.
            compile=self.cfg.train.compile and self.device.type == "cuda",
        )

    def batches(self, epoch: int, first: int = 0) -> Iterable[Batch | None]:
        """What to call `step` with, from step `first` of `epoch` on."""
        side = image_side(self.cfg.train, epoch, self.manifest.image_size)
        if side != self.side:
            self.side = side
            self.step.release()  # a captured step has its shapes
            self.throughput.warm_up_again()
        capture = self.captures and self.tracer.over
        return self.step.batches(self.train_data, epoch, first, capture=capture)

    def steps_done(self) -> int:
        return self.progress.epoch * self.train_data.steps() + self.progress.step

    def save(self) -> None:
        """Collective: write a checkpoint, unless a number in it is not finite: raise `Diverged`."""
        with span("checkpoint"):  # a review subtracts it from the step around it
            self.watch.refuse_divergence(self.model)
            self.state.save(self.steps_done())
            self.watch.forget()


def train(trainer: Trainer) -> int:
    """Train the epochs that are left. Returns the exit status: 0, or 128 + the signal's number."""
    journal = trainer.journal
    journal.summarise("running")
    journal.started(trainer.origin, setup.hints(trainer.cfg, trainer.device))
    with trainer.watch.signals(), journal.opened(trainer.train_data.steps()), trainer.tracer:
        try:
            while not trainer.state.over(trainer.cfg):
                trainer.watch.agree_to_stop()
                epoch(trainer)
        except StopRequested as stop:
            trainer.save()
            journal.summarise("interrupted")
            journal.stopped(stop.number)
            return 128 + stop.number
    journal.summarise("finished")
    journal.finished(trainer.device)
    return 0


def epoch(trainer: Trainer) -> None:
    """Train and validate one epoch, or what is left of it; record it; checkpoint."""
    state, progress, cfg = trainer.state, trainer.progress, trainer.cfg
    state.epoch_started = started = time.perf_counter()
    if progress.step == 0:
        progress.lr = trainer.rate.at(trainer.steps_done())
    train_figures, images_per_second = train_epoch(trainer)
    trainer.tracer.end_epoch()
    state.average_buffers()
    with trainer.average.applied() if trainer.average else nullcontext():
        val_figures = evaluate(trainer.net, trainer.val_data, trainer.accelerator, cfg.evaluate.tta)
        if not math.isfinite(val_figures.loss):
            raise Diverged("the validation loss is not a finite number at the end")
        if val_figures.top1 > progress.best_top1:
            progress.best_top1, progress.best_epoch = val_figures.top1, progress.epoch + 1
            state.keep_best()
    trainer.rate.end_epoch(val_figures.top1)
    progress.epoch, progress.step = progress.epoch + 1, 0
    trainer.sums.values.zero_()
    trainer.watch.forget()
    seconds = time.perf_counter() - started
    progress.seconds, state.epoch_started = progress.seconds + seconds, None
    figures = (train_figures, val_figures, images_per_second, seconds)
    trainer.journal.record(trainer.steps_done(), *figures)
    due = state.checkpoint_due(cfg.train.checkpoint_seconds)
    if state.over(cfg) or largest_int(trainer.accelerator, due):
        trainer.save()


def train_epoch(trainer: Trainer) -> tuple[Figures, float]:
    """The steps that are left of the epoch. Returns its figures, in training mode, weights
    changing; and images/s over all ranks, without the first steps of the process."""
    progress, steps = trainer.progress, trainer.train_data.steps()
    trainer.net.train()
    batches = trainer.batches(progress.epoch, progress.step)
    trainer.throughput.start(steps - progress.step)
    with trainer.journal.bar() as bar:
        for batch in trainer.tracer.steps(batches, trainer.steps_done()):
            trainer.step(batch)
            progress.step += 1
            trainer.throughput.step()
            bar.update(trainer.cfg.train.batch_size)
            if progress.step == steps:
                break  # a stop, and the checkpoint, wait for the validation
            save_or_stop(trainer)
    trainer.watch.refuse_divergence(trainer.model)
    figures = trainer.sums.reduce(trainer.accelerator)
    return figures, trainer.throughput.images_per_second(trainer.cfg.train.batch_size)


def train_step(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """Forward, backward, update. Returns this rank's loss. Nothing here reads the device or
    differs from one step to the next: on a GPU it is captured, and repeated without Python."""
    settings, optimizer = trainer.cfg.train, trainer.optimizer
    with span("forward"):
        logits = trainer.net(resized(batch.images, trainer.side))
        loss, sums = trainer.loss_and_sums(logits, settings.label_smoothing, *batch[1:])
    with span("backward"):
        trainer.accelerator.backward(loss)
    with span("optimizer"):
        if settings.grad_clip:
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    trainer.sums.values += sums
    return loss.detach()


def save_or_stop(trainer: Trainer) -> None:
    """What may be due after a step within an epoch: a look, a checkpoint, a stop."""
    step, settings = trainer.progress.step, trainer.cfg.train
    due = settings.checkpoint_every > 0 and step % settings.checkpoint_every == 0
    if step % settings.log_every == 0:
        seconds = settings.checkpoint_seconds  # 0: at the end of each epoch
        look = trainer.watch.look(seconds > 0 and trainer.state.checkpoint_due(seconds))
        due = due or look.checkpoint_due
        seen = trainer.steps_done() - settings.log_every  # `sums` are those of the look before
        trainer.journal.show(look.sums, seen, trainer.rate.at(seen))
    if due:
        trainer.save()
    # Several processes stop together, by a look or between two epochs.
    if trainer.accelerator.num_processes == 1:
        trainer.watch.agree_to_stop()


def main(argv: list[str] | None = None) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add_training_options(parser)
    return run_command(lambda args: run(*resolve(args), **begun(args)), parser.parse_args(argv))


def run(cfg: Config, directory: RunDir, *, resume: bool, overwrite: bool, init: str) -> int:
    """Train in `directory`; the others are options of `fastlab train`. Returns the exit status."""
    accelerator = setup.make_accelerator(cfg, trackers.make(cfg.train.trackers))
    with setup.torch_settings(cfg):
        try:
            trainer = Trainer(cfg, directory, accelerator, None if resume else init)
            state, dataset = trainer.state, fingerprint(trainer.manifest)
            with (
                divergence_explained(directory, state, trainer.journal, accelerator),
                batch_fits(cfg, trainer.model, accelerator),
                failures_explained(directory),
                state.held(cfg, dataset, resume, overwrite, trainer.origin),
            ):
                return train(trainer)
        finally:
            accelerator.end_training()


if __name__ == "__main__":
    raise SystemExit(main())
