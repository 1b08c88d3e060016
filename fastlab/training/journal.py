"""What a training reports: console lines, the progress bar, TensorBoard and the run's records."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from fastlab import models
from fastlab.config import Config
from fastlab.console import UserError, tell
from fastlab.dataset.manifest import Manifest
from fastlab.runs import RunDir
from fastlab.training import checkpoint
from fastlab.training.evaluate import sample_predictions
from fastlab.training.metrics import Figures
from fastlab.training.state import State

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Journal:
    """Reports of one run. Every rank has one; only the main process's writes anything."""

    def __init__(
        self,
        run: RunDir,
        cfg: Config,
        manifest: Manifest,
        model: nn.Module,
        state: State,
        main: bool,
    ) -> None:
        self._run, self._cfg, self._manifest, self._model = run, cfg, manifest, model
        self._state, self._main = state, main
        self._board: SummaryWriter | None = None
        self._bar: tqdm | None = None

    @contextmanager
    def opened(self) -> Generator[None]:
        """Open TensorBoard's curves. Those of a resumed run lose what came after its checkpoint."""
        if not self._main:
            yield
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        purge = self._state.progress.epoch + 1
        with SummaryWriter(str(self._run.tensorboard), purge_step=purge) as self._board:
            yield

    @contextmanager
    def bar(self, steps: int) -> Generator[None]:
        """A progress bar of the epoch's `steps`, where the output is a terminal."""
        off = None if self._main else True  # None: off where there is no terminal
        progress = self._state.progress
        name, done = f"epoch {progress.epoch + 1}", progress.step
        with tqdm(total=steps, initial=done, desc=name, leave=False, disable=off) as self._bar:
            yield

    def show(self, sums: list[float]) -> None:
        """Move the bar, with loss and top-1 of `sums` (a `Look`'s)."""
        if sums and self._bar is not None and not self._bar.disable:
            loss, hits, _, images = sums
            text = f"loss {loss / images:.3f}, top-1 {hits / images:.1%}"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(self._state.progress.step - self._bar.n)

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
        self._run.append_metrics({"epoch": progress.epoch, "step": step, **values, **counts})
        for name, value in values.items():
            group, _, metric = name.partition("_")
            tag = f"{metric}/{group}" if group in ("train", "val") else name
            if self._board is not None:
                self._board.add_scalar(tag, value, progress.epoch)
        print(
            f"epoch {progress.epoch:3d}/{self._cfg.train.epochs}  lr {progress.lr:.2e}  "
            f"train loss {train.loss:.4f} top-1 {train.top1:.2%}  "
            f"val loss {val.loss:.4f} top-1 {val.top1:.2%} top-5 {val.top5:.2%}  "
            f"{images_per_second:,.0f} images/s  {seconds:.1f} s",
            flush=True,
        )

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
                "status": status,
                "train_seconds": self._state.seconds(),
                "wall_seconds": self._state.wall(),
            }
        )

    def stopped(self, number: int) -> None:
        """The last line of a run that the signal `number` stopped."""
        if self._main:
            progress, path = self._state.progress, self._run.path
            print(
                f"stopped by signal {number} after epoch {progress.epoch}, step {progress.step}; "
                f"resume with: --resume {path}"
            )

    def finished(self, device: torch.device) -> None:
        """Write sample predictions of the best weights, and print the last lines."""
        if not self._main:
            return
        if self._run.best.exists():
            checkpoint.load_weights(self._model, self._run.best)
        try:
            samples = sample_predictions(self._model, self._cfg, self._manifest, device)
            self._run.write_predictions(samples)
        except UserError as error:  # such as a dataset that was replaced or moved meanwhile
            tell(f"{self._run.path}: is trained, but has no sample predictions: {error}")
        progress, path = self._state.progress, self._run.path
        print(
            f"best validation top-1 {progress.best_top1:.2%} at epoch {progress.best_epoch}, "
            f"{progress.seconds:.0f} s in all; run directory: {path}\n"
            f"look at it: fastlab report {path} --out report.html"
        )


def _named(split: str, figures: Figures) -> dict[str, float]:
    values = {"loss": figures.loss, "top1": figures.top1, "top5": figures.top5}
    return {f"{split}_{name}": value for name, value in values.items()}
