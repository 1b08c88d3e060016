"""The trackers that `train.trackers` names: those of Accelerate, each of which may fail without
ending the training. They get curves, the configuration and sample predictions; `metrics.jsonl`
holds the same figures, whatever becomes of them.
"""

import base64
import dataclasses
import io
import json
import os
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator, tracking
from accelerate.tracking import GeneralTracker, on_main_process
from PIL import Image

from fastlab import __version__
from fastlab.config import Config
from fastlab.console import first_line, tell
from fastlab.files import write_json
from fastlab.report.texts import flat
from fastlab.runs import RunDir, read_object

PROJECT = "fastlab"
"""The project of W&B and trackio, and the experiment of MLflow."""

_ENVIRONMENT = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # later versions refuse folders without it
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # of a server that does not answer, which stops a step
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_MODE": "offline",
}
"""Set unless the environment has them, before a tracker is imported."""
_WAIT = 60  # seconds for W&B's server to answer at the start, and to take the rest at the end


class Place(NamedTuple):
    """The run that a tracker records, and where it begins or goes on."""

    run: RunDir
    cfg: Config
    device: str
    """The kind of device, such as "cuda"."""
    epoch: int
    """Whole epochs that are done."""
    step: int
    """Steps that are done."""

    def kept(self, name: str, value: str) -> str:
        """What `trackers.json` of the run holds as `name`; `value`, which it then keeps, where it
        holds nothing. Raises `UserError` where the file is damaged."""
        path = self.run.trackers
        values = read_object(path) if path.exists() else {}
        if name not in values:
            write_json(path, {**values, name: value})
        return values.get(name, value)

    def name(self) -> str:
        return self.run.path.absolute().name

    def labels(self) -> dict[str, str]:
        cfg = self.cfg
        return {
            "model": cfg.model.name,
            "dataset": PurePath(cfg.data.path).name or cfg.data.path,
            "device": self.device,
            "precision": cfg.train.precision,
            "version": f"fastlab {__version__}",
        }

    def settings(self) -> dict[str, Any]:
        """The configuration: section.key -> value; a list becomes JSON."""
        return {
            name: json.dumps(value) if isinstance(value, tuple | list) else value
            for name, value in flat(dataclasses.asdict(self.cfg)).items()
        }


class Sample(NamedTuple):
    """A validation image and what the model makes of it."""

    image: Image.Image
    label: str
    guess: str
    """The most probable class, and its probability."""

    def caption(self) -> str:
        return f"{self.label}; predicted: {self.guess}"


class Tracker(GeneralTracker):
    """A tracker of Accelerate that may fail: the user is told once, and it is left out from there
    on. It works from `start` on, on the main process alone, and prints nothing."""

    name = ""
    requires_logging_directory = False
    main_process_only = True

    def __init__(self) -> None:
        super().__init__()
        self.place: Place
        """Set before `start`."""
        self.inner: Any = None
        """Accelerate's own tracker while it works."""

    @property
    def tracker(self) -> Any:
        return self.inner.tracker if self.inner else None

    @on_main_process
    def start(self) -> None:
        with self._failing_alone():
            self.inner = self._make(self.place)
            self._start(self.inner)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._attempt(lambda inner: self._store(inner, values))

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        """Log numbers at a step of the run; those of an epoch hold its number as "epoch"."""
        self._attempt(lambda inner: self._log(inner, values, step))

    @on_main_process
    def log_samples(self, samples: list[Sample], step: int) -> None:
        self._attempt(lambda inner: self._log_samples(inner, samples, step))

    @on_main_process
    def finish(self) -> None:
        self._attempt(self._finish)
        self.inner = None

    def _attempt(self, action: Callable[[Any], object]) -> None:
        if self.inner:
            with self._failing_alone():
                action(self.inner)

    @contextmanager
    def _failing_alone(self) -> Generator[None]:
        try:
            with redirect_stdout(io.StringIO()):
                yield
        except Exception as error:
            tell(f"tracker {self.name} failed ({first_line(error)}); it is left out from here on")
            inner, self.inner = self.inner, None
            with suppress(Exception), redirect_stdout(io.StringIO()):
                if inner:
                    self._finish(inner)  # else a later training of the process would find it

    # What the trackers differ in

    def _make(self, place: Place) -> GeneralTracker:
        raise NotImplementedError

    def _start(self, inner: Any) -> None:
        inner.start()

    def _store(self, inner: Any, values: dict[str, Any]) -> None:
        inner.store_init_configuration(values)

    def _log(self, inner: Any, values: dict[str, float], step: int | None) -> None:
        inner.log(values, step=step)

    def _log_samples(self, inner: Any, samples: list[Sample], step: int) -> None:
        raise NotImplementedError

    def _finish(self, inner: Any) -> None:
        inner.finish()


class TensorBoard(Tracker):
    """Curves over epochs in ``tensorboard``, and over steps in a folder of their own in it, since a
    resumed run cuts the curves of a folder at one number: that of its checkpoint's epoch or step.
    """

    name = "tensorboard"

    def _make(self, place: Place) -> GeneralTracker:
        self._steps = tracking.TensorBoardTracker(
            "steps", place.run.tensorboard, purge_step=place.step + 1
        )
        return tracking.TensorBoardTracker(
            place.run.tensorboard.name, place.run.path, purge_step=place.epoch + 1
        )

    def _start(self, inner: Any) -> None:
        inner.start()
        self._steps.start()

    def _store(self, inner: Any, values: dict[str, Any]) -> None:
        inner.log({"configuration": _table("setting", values)}, step=self.place.epoch)

    def _log(self, inner: Any, values: dict[str, float], step: int | None) -> None:
        epoch = values.get("epoch")
        if epoch is None:
            self._steps.log(values, step=step)
        else:
            inner.log({name: v for name, v in values.items() if name != "epoch"}, step=epoch)

    def _log_samples(self, inner: Any, samples: list[Sample], step: int) -> None:
        captions = {}
        for number, sample in enumerate(samples, 1):
            captions[tag := f"predictions/{number:02}"] = sample.caption()
            self._steps.tracker.add_image(tag, np.array(sample.image), step, dataformats="HWC")
        self._steps.log({"predictions": _table("image", captions)}, step=step)

    def _finish(self, inner: Any) -> None:
        inner.finish()
        self._steps.finish()


def _table(head: str, values: dict[str, Any]) -> str:
    """Markdown, as TensorBoard shows it."""
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join([f"| {head} | value |", "| --- | --- |", *rows])


class WandB(Tracker):
    name = "wandb"

    def _make(self, place: Place) -> GeneralTracker:
        import wandb

        settings = wandb.Settings(
            console="off",  # it would wrap standard output
            silent=True,
            symlink=False,  # a run that holds links is not resumed
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=_WAIT,
            finish_timeout=_WAIT,
        )
        offline = os.environ["WANDB_MODE"] == "offline"
        return tracking.WandBTracker(
            PROJECT,
            dir=str(place.run.path),
            name=place.name(),
            id=place.kept(self.name, uuid.uuid4().hex[:8]),
            resume=None if offline else "allow",
            tags=[label[:64] for label in place.labels().values()],  # W&B takes no longer ones
            settings=settings,
        )

    def _log_samples(self, inner: Any, samples: list[Sample], step: int) -> None:
        import wandb

        images = [wandb.Image(sample.image, caption=sample.caption()) for sample in samples]
        inner.log({"predictions": images}, step=step)


class MLflow(Tracker):
    """A store of files in the run's directory, unless MLFLOW_TRACKING_URI names another one."""

    name = "mlflow"

    def _make(self, place: Place) -> GeneralTracker:
        import mlflow

        chosen = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(chosen or place.run.mlruns.absolute().as_uri())
        if not chosen:
            # MLflow sets it, and a later training of the process would take it for the user's.
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        kept = read_object(place.run.trackers) if place.run.trackers.exists() else {}
        self._resumed = self.name in kept
        return tracking.MLflowTracker(
            PROJECT, run_id=kept.get(self.name), run_name=place.name(), tags=place.labels()
        )

    def _start(self, inner: Any) -> None:
        inner.start()
        self.place.kept(self.name, inner.tracker.info.run_id)

    def _store(self, inner: Any, values: dict[str, Any]) -> None:
        if not self._resumed:  # MLflow refuses to change parameters
            inner.store_init_configuration(values)

    def _log_samples(self, inner: Any, samples: list[Sample], step: int) -> None:
        import mlflow

        captions = {f"{number:02}.png": each.caption() for number, each in enumerate(samples, 1)}
        for name, sample in zip(captions, samples, strict=True):
            mlflow.log_image(sample.image, artifact_file=f"predictions/{name}")
        mlflow.log_dict(captions, "predictions/captions.json")


class Trackio(Tracker):
    """trackio finds a run by its name alone, which therefore ends in a number of its own."""

    name = "trackio"

    def _make(self, place: Place) -> GeneralTracker:
        return tracking.TrackioTracker(
            PROJECT,
            name=place.kept(self.name, f"{place.name()}-{uuid.uuid4().hex[:6]}"),
            resume="allow",
            config={**place.labels(), **place.settings()},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def _start(self, inner: Any) -> None:
        with _hub_unasked():
            inner.start()

    def _store(self, inner: Any, values: dict[str, Any]) -> None:
        pass  # its start took it

    def _log(self, inner: Any, values: dict[str, Any], step: int | None) -> None:
        inner.tracker.log(values, step=step)  # Accelerate's own leaves the step out before 1.14

    def _log_samples(self, inner: Any, samples: list[Sample], step: int) -> None:
        import trackio

        for number, sample in enumerate(samples, 1):
            image = trackio.Image(sample.image, caption=sample.caption())
            self._log(inner, {f"predictions/{number:02}": image}, step)

    def _finish(self, inner: Any) -> None:
        import trackio

        trackio.finish()  # Accelerate's would leave the run to be finished again at exit


@contextmanager
def _hub_unasked() -> Generator[None]:
    """trackio asks the hub for the name of the user whose token it finds, also where everything
    stays on this machine."""
    from huggingface_hub import constants

    online = {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & os.environ.keys()
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, not online
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


_KINDS = {kind.name: kind for kind in (TensorBoard, WandB, MLflow, Trackio)}


def make(names: tuple[str, ...]) -> list[Tracker]:
    """The trackers with these names, as `Accelerator` takes them for `log_with`."""
    return [_KINDS[name]() for name in names]


def start(accelerator: Accelerator, place: Place) -> None:
    """Begin to record the run with the trackers of `accelerator`, or go on."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for tracker in accelerator.log_with:
        tracker.place = place
    accelerator.init_trackers(PROJECT, config=place.settings())


def log_samples(accelerator: Accelerator, samples: list[dict[str, Any]], step: int) -> None:
    """Record `samples`, as `review` returns them, at the end of a run."""
    pictures = [_sample(each) for each in samples] if accelerator.trackers else []
    for tracker in accelerator.trackers:
        tracker.log_samples(pictures, step)


def _sample(sample: dict[str, Any]) -> Sample:
    best = sample["predicted"][0]
    with Image.open(io.BytesIO(base64.b64decode(sample["png"]))) as image:
        image.load()
        return Sample(image, sample["label"], f"{best['name']} ({best['probability']:.0%})")
