"""What a training reports: console lines, the progress bar, trackers and the run's records."""

import shlex
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from fastlab import models
from fastlab.config import Config, tta_label
from fastlab.console import UserError, printable, tell
from fastlab.dataset.manifest import Manifest
from fastlab.runs import RunDir
from fastlab.training import checkpoint, trackers
from fastlab.training.metrics import Figures
from fastlab.training.review import review
from fastlab.training.state import State

_HEAD = (
    f"{'epoch':>11}  {'lr':>9}  {'train loss':>10}  {'top-1':>7}  {'val loss':>10}  {'top-1':>7}  "
    f"{'top-5':>7}  {'images/s':>10}  {'seconds':>8}"
)


class Bar(tqdm):
    """A progress bar over the training images of a whole run, with images/s and the time left. What
    happens between two epochs, such as validation, counts in the time left and not in images/s. It
    counts on the host alone, and looks at the clock in each step."""

    monitor_interval = 0  # tqdm needs no thread that looks at the bar

    def __init__(self, epochs: int, epoch_images: int, done: int, *, disable: bool) -> None:
        """`done`: images of all epochs that earlier processes trained on."""
        self._epochs = self._epochs_left = epochs
        self._paused: float | None = None
        self._between = 0.0
        """Seconds between the last two epochs."""
        super().__init__(
            total=epochs * epoch_images,
            initial=done,
            leave=False,
            miniters=1,
            disable=disable,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {images} images/s, {left} left{postfix}",
        )

    def begin(self, epoch: int) -> None:
        """Show the bar again, for an epoch (from 0)."""
        if self._paused is not None:
            self._between = time.perf_counter() - self._paused
        self._epochs_left = self._epochs - epoch
        self.unpause()
        self.set_description_str(f"epoch {epoch + 1}/{self._epochs}", refresh=False)

    def pause(self) -> None:
        """Hide the bar until `begin`."""
        self._paused = time.perf_counter()
        self.clear()

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        images = left = "?"
        if rate := values["rate"]:
            images = f"{rate:,.0f}"
            seconds = (values["total"] - self.n) / rate + self._epochs_left * self._between
            left = self.format_interval(seconds)
        return {**values, "images": images, "left": left}


class Journal:
    """Reports of one run. Every rank has one; only the main process's writes anything."""

    def __init__(
        self,
        run: RunDir,
        cfg: Config,
        manifest: Manifest,
        model: nn.Module,
        state: State,
        accelerator: Accelerator,
    ) -> None:
        self._run, self._cfg, self._manifest, self._model = run, cfg, manifest, model
        self._state, self._accelerator = state, accelerator
        self._main = accelerator.is_main_process
        self._epoch_steps = 0
        self._looked = 0.0  # `time.perf_counter()` at the last look
        self._shown: tuple[float, float] | None = None
        """Loss and images of the epoch that have been recorded; None: not known, since an earlier
        process began the epoch."""
        self._bar = Bar(0, 0, 0, disable=True)
        self._label = tta_label(cfg.evaluate.tta)

    def started(self, origin: str, hints: list[str]) -> None:
        """Report what is trained, where and on what, then `hints`, then the head of the table that
        `record` fills. `origin`: whose weights a new run begins with; empty: random ones."""
        cfg, accelerator, progress = self._cfg, self._accelerator, self._state.progress
        device, processes = accelerator.device, accelerator.num_processes
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        splits = self._manifest.splits
        parts = [
            f"{cfg.model.name}: {models.count_parameters(self._model):,} parameters",
            f"{cfg.train.precision} on {name}" + (f" x {processes}" if processes > 1 else ""),
            f"data: {cfg.data.path}, {len(self._manifest.classes)} classes, "
            f"{splits['train'].images:,} training and {splits['val'].images:,} validation images",
            f"output: {self._run.path}",
        ]
        if origin:
            parts.append(f"weights: {origin}")
        if progress.epoch or progress.step:
            parts.append(f"resumed after epoch {progress.epoch}, step {progress.step}")
        lines = [
            printable("; ".join(parts)),
            *hints,
            _HEAD + (f"  val{self._label}" if self._label else ""),
        ]
        accelerator.print("\n".join(lines), flush=True)

    @contextmanager
    def opened(self, steps: int) -> Generator[None]:
        """Start the trackers, and open the progress bar over epochs of `steps` where standard error
        is a terminal. `Accelerator.end_training` ends the trackers."""
        self._epoch_steps = steps
        if not self._main:
            yield
            return
        progress, settings = self._state.progress, self._cfg.train
        done = progress.epoch * steps + progress.step
        images = [count * settings.batch_size for count in (steps, done)]
        shown = sys.stderr is not None and sys.stderr.isatty()
        device = self._accelerator.device.type
        place = trackers.Place(self._run, self._cfg, device, progress.epoch, done)
        trackers.start(self._accelerator, place)
        with Bar(settings.epochs, *images, disable=not shown) as self._bar:
            yield

    @contextmanager
    def bar(self) -> Generator[Bar]:
        """The progress bar, shown while an epoch's steps are taken, to be updated by images."""
        progress = self._state.progress
        self._shown = None if progress.step else (0.0, 0.0)
        self._bar.begin(progress.epoch)
        yield self._bar
        self._bar.pause()

    def show(self, sums: list[float], step: int, lr: float) -> None:
        """Show loss and top-1 of `sums` (a `Look`'s) beside the bar. The trackers get the mean loss
        of this process since the sums shown before, as of `step`, the last step in `sums`; the rate
        `lr` there; and the images/s of all processes since the last look."""
        now = time.perf_counter()
        seconds, self._looked = now - self._looked, now
        if not sums:
            return
        loss, hits, _, images = sums
        if not self._bar.disable:
            text = f"loss {loss / images:.3f}, top-1 {hits / images:.1%}"
            self._bar.set_postfix_str(text, refresh=False)
        if self._shown:
            shown_loss, shown_images = self._shown
            settings = self._cfg.train
            values = {
                "step/loss": (loss - shown_loss) / (images - shown_images),
                "step/lr": lr,
                "step/images_per_second": settings.log_every * settings.batch_size / seconds,
            }
            self._accelerator.log(values, step=step)
        self._shown = loss, images

    def record(
        self, step: int, train: Figures, val: Figures, images_per_second: float, seconds: float
    ) -> None:
        """Report an epoch that took `seconds` and ended after `step` steps of the run."""
        if not self._main:
            return
        progress = self._state.progress
        values = {
            "lr": progress.lr,
            **_named("train", train),
            **_named("val", val),
            "images_per_second": images_per_second,
            "seconds": seconds,
            "wall_seconds": self._state.wall(),
        }
        counts = {"images": val.images, "correct1": val.correct1, "correct5": val.correct5}
        counts = {f"val_{name}": count for name, count in counts.items()}
        values |= counts
        record = {"epoch": progress.epoch, "step": step, **values}
        self._run.append_metrics({**record, "tta": self._cfg.evaluate.tta})
        tagged = {self._tag(name): value for name, value in values.items()}
        self._accelerator.log({"epoch": progress.epoch, **tagged}, step=step)
        print(
            f"{f'{progress.epoch}/{self._cfg.train.epochs}':>11}  {progress.lr:9.2e}  "
            f"{train.loss:#10.4g}  {train.top1:7.2%}  "
            f"{val.loss:#10.4g}  {val.top1:7.2%}  {val.top5:7.2%}  "
            f"{images_per_second:10,.0f}  {seconds:8.1f}",
            flush=True,
        )

    def _tag(self, name: str) -> str:
        """What trackers call a figure: "top1/val" for "val_top1", so that one chart has both."""
        group, _, metric = name.partition("_")
        if group not in ("train", "val"):
            return name
        flipped = group == "val" and self._label
        return f"{metric}/{group}" + (f"-{self._cfg.evaluate.tta}" if flipped else "")

    def summarise(self, status: str) -> None:
        """Write the summary. `status`: "running", "interrupted", "diverged" or "finished"."""
        if not self._main:
            return
        counts = {name: split.images for name, split in self._manifest.splits.items()}
        self._run.write_summary(
            {
                "name": self._cfg.model.name,
                "parameters": models.count_parameters(self._model),
                "dataset": {
                    "path": self._cfg.data.path,
                    "classes": len(self._manifest.classes),
                    "image_size": self._manifest.image_size,
                    "counts": counts,
                    "skipped": len(self._manifest.skipped),
                },
                "tta": self._cfg.evaluate.tta,
                "status": status,
                "epochs": self._state.progress.epoch,
                "skipped_epochs": self._skipped() if status == "finished" else "",
                "train_seconds": self._state.seconds(),
                "wall_seconds": self._state.wall(),
            }
        )

    def _skipped(self) -> str:
        """Why epochs are left that are not trained; empty where none is."""
        left = self._cfg.train.epochs - self._state.progress.epoch
        if not left:
            return ""
        return (
            f"the rate is at its floor of {self._state.progress.lr:.3g}, and "
            f"{self._cfg.schedule.floor_patience} epochs or more brought no better validation "
            f"top-1: the last {left} of {self._cfg.train.epochs} epochs are skipped"
        )

    def stopped(self, number: int) -> None:
        """The last line of a run that the signal `number` stopped."""
        if self._main:
            progress = self._state.progress
            print(
                f"stopped by signal {number} after epoch {progress.epoch}, step {progress.step}; "
                f"{self._run.resume_hint()}"
            )

    def finished(self, device: torch.device) -> None:
        """Write sample predictions and errors of the best weights, and print the last lines."""
        if not self._main:
            return
        if self._run.best.exists():
            checkpoint.load_weights(self._model, self._run.best)
        try:
            samples, errors = review(self._model, self._cfg, self._manifest, device)
            self._run.write_predictions(samples, errors)
            steps = self._state.progress.epoch * self._epoch_steps
            trackers.log_samples(self._accelerator, samples, steps)
        except UserError as error:  # such as a dataset that was replaced or moved meanwhile
            tell(f"{self._run.path}: is trained, but has no sample predictions or errors: {error}")
        progress, path = self._state.progress, self._run.path
        if skipped := self._skipped():
            print(skipped)
        print(
            f"best validation top-1{self._label} {progress.best_top1:.2%} at epoch "
            f"{progress.best_epoch}, {progress.seconds:.0f} s in all; run directory: {path}\n"
            f"look at it: fastlab report {shlex.quote(str(path))} --out report.html"
        )


def _named(split: str, figures: Figures) -> dict[str, float]:
    values = {"loss": figures.loss, "top1": figures.top1, "top5": figures.top5}
    return {f"{split}_{name}": value for name, value in values.items()}
