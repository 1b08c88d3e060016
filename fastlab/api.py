"""What `import fastlab` offers in Python. The commands are built on the same functions.

A mistake raises `UserError`, whose message is one line; it may name an option of a command, such as
``--image-size``, whose keyword here is ``image_size``. Ctrl-C raises KeyboardInterrupt, from a
training after its checkpoint. Nothing exits, and torch is imported when it is first needed.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastlab import config as configs
from fastlab.api_data import Location
from fastlab.config import Config, Tta
from fastlab.console import UserError
from fastlab.fields import Count, Positive, checked
from fastlab.processes import interruption, spin_briefly
from fastlab.runs import RunDir

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import nn

    from fastlab.export import Exported
    from fastlab.predict import Evaluation, Predictor
    from fastlab.run_records import Epoch
    from fastlab.study.command import Request
    from fastlab.study.results import RowResult

    Picture = str | os.PathLike[str] | Image | np.ndarray
    """The path of an image file, an open image of Pillow, or pixels, uint8 [H, W, 3], RGB."""

if "torch" not in sys.modules:
    spin_briefly()

Weights = Literal["best", "last"]


class Run:
    """A run directory, which a training wrote. Its files are read anew at each use, the
    configuration and the weights once."""

    def __init__(self, path: Location) -> None:
        """Raises `UserError` where `path` is no run."""
        self.path = Path(path)
        self._files = RunDir(self.path)
        self.config: Config = self._files.load_config()

    @property
    def metrics(self) -> "list[Epoch]":
        """The figures of each epoch by name, such as "val_top1" (0 to 1), None where one is not
        finite. Raises `UserError` where no epoch is recorded yet."""
        from fastlab.run_records import read_run

        return read_run(self.path, self.path.name).epochs

    @property
    def summary(self) -> dict[str, Any]:
        """Parameters, dataset, status and seconds. Raises as `metrics` does."""
        from fastlab.run_records import read_run

        return read_run(self.path, self.path.name).summary

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the model's outputs."""
        return [each.words for each in self._predictor.spec.classes]

    @property
    def model(self) -> "nn.Module":
        """The model with its best weights by validation, in evaluation mode, on the GPU where there
        is one. It takes images as `pipeline` gives them. Raises `UserError` where the weights
        cannot be read."""
        return self._predictor.model

    @cached_property
    def _predictor(self) -> "Predictor":
        from fastlab.predict import Predictor

        return Predictor(self._files)

    def predict(
        self, images: "Picture | Iterable[Picture]", top: int = 5
    ) -> list[list[tuple[str, float]]]:
        """The `top` most probable classes of each image, best first: (name, probability).

        `images`: one or more of `Picture`, or pixels of several, uint8 [b, H, W, 3]. They are
        fitted as the run's dataset was. Raises `UserError` for the first that cannot be read.
        """
        import numpy as np
        from PIL.Image import Image

        from fastlab.predict import BATCH

        checked("top", Positive, top)
        given: Any = images
        one = isinstance(given, str | os.PathLike | Image)
        one = one or (isinstance(given, np.ndarray) and given.ndim == 3)
        pictures = [given] if one else list(given)
        results = []
        for start in range(0, len(pictures), BATCH):
            pixels = [self._predictor.prepare(each) for each in pictures[start : start + BATCH]]
            results += self._predictor.guesses(np.stack(pixels), top)
        return [[(each.words, share) for each, share in guesses] for guesses in results]

    def evaluate(
        self,
        split: str = "val",
        *,
        checkpoint: Weights = "best",
        data: Location | None = None,
        tta: Tta | None = None,
    ) -> "Evaluation":
        """The figures of the run on a split of its dataset, which lies at `data` where it is not at
        ``data.path`` of the run. `tta` takes the place of the run's own."""
        from fastlab.predict import evaluate_run

        checked("checkpoint", Weights, checkpoint)
        checked("tta", Tta, tta or "none")
        dataset = None if data is None else os.fspath(data)
        return evaluate_run(self.path, split, checkpoint, dataset, tta)

    def export(
        self,
        to: Literal["onnx", "torch", "safetensors"],
        out: Location | None = None,
        *,
        checkpoint: Weights = "best",
        dynamic_batch: bool = False,
        normalise: bool = False,
        data: Location | None = None,
        force: bool = False,
    ) -> "Exported":
        """Write the model for other programs; the keywords are the options of `fastlab export`.
        Returns the path of the file with the figures of its check. Raises `UserError` where the
        file exists (unless `force`), or the model cannot be exported."""
        from fastlab.export import export

        checked("checkpoint", Weights, checkpoint)
        return export(
            self.path,
            to,
            None if out is None else os.fspath(out),
            which=checkpoint,
            dynamic_batch=dynamic_batch,
            normalise=normalise,
            data=None if data is None else os.fspath(data),
            force=force,
        )

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        status, last = self._files.progress()
        epochs = f"{last.get('epoch', 0)} of {self.config.train.epochs} epochs"
        return f"<Run {self.path}: {self.config.model.name}, {epochs}, {status or 'not begun'}>"


def load_run(path: Location) -> Run:
    """Open a run directory. Raises `UserError` where it is none."""
    return Run(path)


def train(
    config: Location | Config | Mapping[str, Mapping[str, Any]],
    out: Location,
    *,
    init: Location = "",
    overwrite: bool = False,
    **sections: Any,
) -> Run:
    """Train a model, and print a table of its epochs; `out` is the run directory.

    `config` is a file, a `Config` or a dict of sections; what it lacks is at its default. Each
    keyword changes a section: ``train={"epochs": 2}``; ``profile=True`` records a trace. `init`
    starts from the best weights of another run, or from a .safetensors file; `overwrite` replaces
    the run in `out`. The random numbers of Python, NumPy and torch start anew from
    ``train.seed``.

    Raises `UserError` for a mistake and for a loss that is no longer finite. SIGINT, SIGTERM and
    SIGHUP (in the main thread) raise KeyboardInterrupt once a checkpoint is written.
    """
    if isinstance(config, Mapping):
        cfg = configs.changed(Config(), _plain(config))
    else:
        cfg = config if isinstance(config, Config) else configs.load(Path(config))
    cfg = configs.changed(cfg, _plain(sections))
    return _train(cfg, out, overwrite=overwrite, init=os.fspath(init))


def resume(run: Location, **sections: Any) -> Run:
    """Continue a run where it stopped. A keyword changes a section, as in `train`, in values that
    its checkpoint does not depend on. Raises as `train` does."""
    from fastlab.training.resolve import unchangeable

    files = RunDir(Path(run))
    before = files.load_config()
    after = configs.changed(before, _plain(sections))
    if name := unchangeable(before, after):
        raise UserError(
            f"{name}: a resumed run cannot change it; start another run from this one's settings "
            f"with fastlab.train({str(files.config)!r}, …)"
        )
    files.check_data_path(after.data.path)
    return _train(after, run, resume=True)


def _train(
    cfg: Config, out: Location, *, resume: bool = False, overwrite: bool = False, init: str = ""
) -> Run:
    from fastlab.training.resolve import refuse_missing_trackers

    refuse_missing_trackers(cfg)  # before torch is imported
    from fastlab.train import run

    status = run(cfg, RunDir(Path(out)), resume=resume, overwrite=overwrite, init=init)
    if status:
        raise interruption(status - 128)
    return Run(out)


def _plain(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections with paths as text; ``profile=True`` stands for its key "enabled"."""
    if isinstance(sections.get("profile"), bool):
        sections = {**sections, "profile": {"enabled": sections["profile"]}}
    return {name: _with_text(section) for name, section in sections.items()}


def _with_text(section: Any) -> Any:
    if not isinstance(section, Mapping):
        return section  # which `configs.changed` refuses
    return {
        str(key): os.fspath(value) if isinstance(value, os.PathLike) else value
        for key, value in section.items()
    }


@dataclass(frozen=True)
class Study:
    """What a study came to."""

    path: Path
    runs: list[Run]
    """The finished runs, in the order in which they were planned."""
    table: list[dict[str, Any]]
    """The rows of all studies: "study", "row", "seeds" (that are finished), "failed" (why a run of
    it failed; empty: none did), and over the finished seeds the mean validation "top1", "top5" (0
    to 1) and "loss" at the best epoch, each with half of its 95 % interval as "top1_half" and so
    on, None where there is none."""

    @property
    def report(self) -> Path:
        """The page with tables, curves and findings."""
        return self.path / "report.html"


def study(
    studies: Location | Sequence[Location],
    out: Location,
    *,
    epochs: int = 0,
    seeds: int = 0,
    jobs: int = 1,
    only: Sequence[str] = (),
    retry: bool = False,
    **sections: Any,
) -> Study:
    """Train every row of the study files with each seed, in other processes, and write the report
    into `out`. The same call resumes a study and skips its finished runs.

    `epochs` and `seeds` (0: as the files say), `jobs`, `only` and `retry` are the options of
    `fastlab study`. Each keyword changes a section of the base configurations, as in `train`.

    Raises `UserError` for a mistake; a run that fails is listed in `Study.table` instead. A signal
    raises KeyboardInterrupt once the trainings have written their checkpoints.
    """
    from fastlab.study.command import Request, run

    request = Request(
        [Path(studies)] if isinstance(studies, str | os.PathLike) else [*map(Path, studies)],
        Path(out),
        epochs=checked("epochs", Count, epochs),
        seeds=checked("seeds", Count, seeds),
        jobs=checked("jobs", Positive, jobs),
        only=only,
        retry=retry,
        overrides=_overrides(sections),
        no_calibration=True,  # which would run a script again that calls this at its top level
    )
    status = run(request)
    if status > 128:
        raise interruption(status - 128)
    return _outcome(request)


def _outcome(request: "Request") -> Study:
    """What the study of `request` came to."""
    from fastlab.study.command import read_studies
    from fastlab.study.folder import StudyDir, look
    from fastlab.study.results import analyse
    from fastlab.study.spec import tasks_of

    planned, folder = read_studies(request), StudyDir(request.out)
    finished = [task for task in tasks_of(planned) if look(folder, task).status == "finished"]
    rows = [_row(each.study.name, row) for each in analyse(folder, planned) for row in each.rows]
    return Study(request.out, [Run(folder.run(task)) for task in finished], rows)


def _overrides(sections: Mapping[str, Any]) -> list[str]:
    """The sections as ``section.key=value``. Raises `UserError` where a value is not valid."""
    from fastlab.report.texts import flat
    from fastlab.study.spec import toml_text

    values = flat(configs.check_sections(_plain(sections)))
    return [f"{key}={toml_text(value)}" for key, value in values.items()]


def _row(study: str, row: "RowResult") -> dict[str, Any]:
    failed = [run.state.reason for run in row.runs if run.state.status == "failed"]
    values: dict[str, Any] = {"study": study, "row": row.label, "seeds": len(row.finished)}
    values["failed"] = failed[0] if failed else ""
    for name, figure in row.figures.items():
        values[name] = figure and figure.mean
        values[f"{name}_half"] = figure and figure.half
    return values
