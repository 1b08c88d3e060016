"""Trackers: what each holds of a run, read back as its own tools do; and that none ends a training
or changes it."""

import io
import json
import os
import sqlite3
import struct
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, tracking
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastlab
from fastlab import train as training
from fastlab.cli import main
from fastlab.config import Config
from fastlab.machine import missing_tracker
from fastlab.runs import RunDir
from fastlab.training import trackers
from tests.packages import has
from tests.trainings import assert_same_run, command

Curves = dict[str, dict[int, float]]
"""The value at each step, by the name of the curve."""

ALL = 'train.trackers=["tensorboard","wandb","mlflow","trackio"]'
NONE = "train.trackers=[]"
SETS = ("train.epochs=2", "train.log_every=1", "train.checkpoint_every=0", "schedule.name=constant")
STEPS = 5  # of an epoch: 80 images, 16 at a time
LOOKED_AT = (1, 2, 3)  # within an epoch: a look shows the steps up to the look before


def run_quietly(arguments: list[str]) -> tuple[int, str, str]:
    """The exit status of `fastlab train`, and what it printed on both streams."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        status = main(["train", *arguments])
    return status, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def untracked(synth_dataset, tmp_path_factory) -> Path:
    """Two epochs without any tracker, and a third after a resumption."""
    run = tmp_path_factory.mktemp("untracked") / "run"
    assert run_quietly(command(synth_dataset, run, *SETS, NONE))[0] == 0
    assert run_quietly(["--resume", str(run), "--set", "train.epochs=3"])[0] == 0
    return run


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """The losses of all steps of `tracked`, as the training step returns them."""
    return []


@pytest.fixture(scope="module")
def tracked(synth_dataset, tmp_path_factory, losses) -> Iterator[Path]:
    """The same, with all trackers; trackio's folder lies beside it."""
    if missing := [name for name in ("wandb", "mlflow", "trackio") if not has(name)]:
        pytest.skip(f"not installed: {missing}")
    run = tmp_path_factory.mktemp("tracked") / "run"
    take_step = training.train_step

    def noted(*arguments: Any) -> Any:
        loss = take_step(*arguments)
        losses.append(float(loss))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        assert "trackio" not in sys.modules  # its import reads where its folder lies
        patch.setenv("TRACKIO_DIR", str(run.parent / "trackio"))
        for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        patch.setattr(training, "train_step", noted)
        begun = run_quietly(command(synth_dataset, run, *SETS, ALL))
        resumed = run_quietly(["--resume", str(run), "--set", "train.epochs=3"])
    for status, out, errors in (begun, resumed):
        assert (status, errors) == (0, "")
        assert not [word for word in ("rackio", "wandb", "mlflow", "* ") if word in out]
    yield run
    import wandb

    wandb.teardown()


# Each tracker's own record


def of_tensorboard(run: Path) -> Curves:
    curves: Curves = {}
    for folder in ("tensorboard", "tensorboard/steps"):
        events = EventAccumulator(str(run / folder)).Reload()
        for tag in events.Tags()["scalars"]:
            curves[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return curves


def of_mlflow(run: Path) -> Curves:
    client, found = mlflow_run(run)
    curves: Curves = {}
    for name in found.data.metrics:
        history = client.get_metric_history(found.info.run_id, name)
        curves[name] = {metric.step: metric.value for metric in history}
        assert len(curves[name]) == len(history)
    return curves


def mlflow_run(run: Path) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient((run / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("fastlab")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def of_wandb(run: Path) -> Curves:
    curves: Curves = {}
    for record in wandb_records(run):
        items = {item.key or item.nested_key[0]: item for item in record.history.item}
        for name in items.keys() - {"_step", "_runtime", "_timestamp", "predictions"}:
            step = int(items["_step"].value_json)
            curves.setdefault(name, {})[step] = float(items[name].value_json)
    return curves


def wandb_records(run: Path) -> list[Any]:
    """The records of all processes: a file of LevelDB's log format for each of them, which begins
    with seven bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for path in sorted((run / "wandb").glob("*/*.wandb")):
        content, position, whole = path.read_bytes(), 7, b""
        while position < len(content):
            if 32768 - position % 32768 < 7:  # no header fits into the rest of the block
                position += 32768 - position % 32768
            _, length, kind = struct.unpack_from("<IHB", content, position)
            whole += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or the last part
                records.append(Record.FromString(whole))
                whole = b""
    return records


def of_trackio(run: Path) -> Curves:
    curves: Curves = {}
    for _, step, values in trackio_rows(run):
        for name, value in json.loads(values).items():
            if not name.startswith("predictions"):
                curves.setdefault(name, {})[step] = value
    return curves


def trackio_rows(run: Path) -> list[Any]:
    with sqlite3.connect(run.parent / "trackio" / "fastlab.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    database.close()
    return rows


READERS = [of_tensorboard, of_wandb, of_mlflow, of_trackio]


@pytest.mark.parametrize("read", READERS)
def test_a_tracker_holds_the_figures_of_every_epoch(read, tracked):
    lines = [json.loads(line) for line in (tracked / "metrics.jsonl").read_text().splitlines()]
    curves = read(tracked)
    at = "epoch" if read is of_tensorboard else "step"
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for key in lines[0].keys() - {"epoch", "step", "tta"}:
        split, _, metric = key.partition("_")
        name = f"{metric}/{split}" if split in ("train", "val") else key
        assert curves[name] == pytest.approx({line[at]: line[key] for line in lines}), key
    if at == "step":
        assert curves["epoch"] == {line["step"]: line["epoch"] for line in lines}


@pytest.mark.parametrize("read", READERS)
def test_a_tracker_holds_loss_rate_and_speed_of_the_steps(read, tracked, losses):
    curves = read(tracked)
    steps = [epoch * STEPS + step for epoch in range(3) for step in LOOKED_AT]
    assert len(losses) == 3 * STEPS
    expected = {step: losses[step - 1] for step in steps}
    assert curves["step/loss"] == pytest.approx(expected, rel=1e-5)
    assert curves["step/lr"] == pytest.approx(dict.fromkeys(steps, 0.01))
    assert list(curves["step/images_per_second"]) == steps
    assert min(curves["step/images_per_second"].values()) > 0


def test_trackers_change_nothing_in_the_run(tracked, untracked):
    assert_same_run(tracked, untracked)
    assert not [name for name in ("tensorboard", "wandb", "mlruns") if (untracked / name).exists()]


def test_trackers_hold_the_configuration_and_tags(tracked):
    _, found = mlflow_run(tracked)
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    assert found.data.params["optim.lr"] == "0.01" and found.data.params["model.width"] == "4"
    tags = {name: found.data.tags[name] for name in ("model", "dataset", "device", "precision")}
    assert tags == {"model": "resnet11", "dataset": "synth", "device": "cpu", "precision": "fp32"}
    runs = [r.run for r in wandb_records(tracked) if r.WhichOneof("record_type") == "run"]
    first = runs[0]
    assert {run.run_id for run in runs} == {first.run_id} and first.display_name == "run"
    assert (first.project, set(tags.values()) - set(first.tags)) == ("fastlab", set())
    events = EventAccumulator(str(tracked / "tensorboard")).Reload()
    (texts, *_) = (event for event in events.Tensors("configuration/text_summary"))
    assert b"| optim.lr | 0.01 |" in texts.tensor_proto.string_val[0]


def test_a_resumed_run_goes_on_in_the_run_that_each_tracker_holds(tracked):
    (name,) = {row[0] for row in trackio_rows(tracked)}
    kept = json.loads((tracked / "trackers.json").read_text())
    assert kept["trackio"] == name and name.startswith("run-")
    assert kept["mlflow"] == mlflow_run(tracked)[1].info.run_id


def test_trackers_show_the_sample_predictions(tracked):
    samples = json.loads((tracked / "predictions.json").read_text())
    first = f"{samples[0]['label']}; predicted: {samples[0]['predicted'][0]['name']} ("
    events = EventAccumulator(str(tracked / "tensorboard" / "steps")).Reload()
    assert sum(tag.startswith("predictions/") for tag in events.Tags()["images"]) == len(samples)
    (*_, text) = events.Tensors("predictions/text_summary")
    assert f"| predictions/01 | {first}".encode() in text.tensor_proto.string_val[0]
    client, found = mlflow_run(tracked)
    artifacts = client.list_artifacts(found.info.run_id, "predictions")
    assert len(artifacts) == len(samples) + 1
    media = list((tracked / "wandb").glob("*/files/media/images/*.png"))
    media += (tracked.parent / "trackio").rglob("*.png")
    assert len(media) == 2 * 2 * len(samples)  # of both processes
    with Image.open(media[0]) as image:
        assert image.size == (64, 64)


# A tracker that fails


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_left_out(
    method, synth_dataset, tmp_path, monkeypatch
):
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(tracking.TensorBoardTracker, method, fail)
        sets = (*SETS, "train.epochs=1")
        failed = run_quietly(command(synth_dataset, tmp_path / "failed", *sets))
    assert failed[0] == 0
    assert failed[2] == (
        "fastlab: tracker tensorboard failed ([Errno 28] No space left on device); it is left out "
        "from here on\n"
    )
    assert run_quietly(command(synth_dataset, tmp_path / "none", *sets, NONE))[0] == 0
    assert_same_run(tmp_path / "failed", tmp_path / "none")


def test_the_trackers_beside_one_that_fails_go_on(tmp_path, capsys):
    class Broken(trackers.Tracker):
        name = "broken"

        def _make(self, place: trackers.Place) -> Any:
            raise RuntimeError("no\nserver")

    record(tmp_path, [Broken(), *trackers.make(("tensorboard",))], [1])
    assert of_tensorboard(tmp_path)["top1/val"] == {1: 0.5}
    assert capsys.readouterr().err == (
        "fastlab: tracker broken failed (no); it is left out from here on\n"
    )


def record(path: Path, log_with: list[Any], epochs: list[int]) -> None:
    """Track `epochs` of `STEPS` steps of a run in `path`, as a process that begins with them."""
    accelerator = Accelerator(cpu=True, log_with=log_with)
    done = epochs[0] - 1
    place = trackers.Place(RunDir(path), Config(), "cpu", done, done * STEPS)
    trackers.start(accelerator, place)
    for epoch in epochs:
        for step in range(1, STEPS):
            accelerator.log({"step/loss": epoch / 10}, step=(epoch - 1) * STEPS + step)
        accelerator.log({"epoch": epoch, "top1/val": 0.5 * epochs[0]}, step=epoch * STEPS)
    accelerator.end_training()


def test_curves_of_a_resumed_run_lose_what_came_after_its_checkpoint(tmp_path):
    record(tmp_path, trackers.make(("tensorboard",)), [1, 2, 3])
    for path in list(tmp_path.rglob("events*")):  # their names begin with the second
        path.rename(path.with_name("events.out.tfevents.1"))
    record(tmp_path, trackers.make(("tensorboard",)), [2])
    curves = of_tensorboard(tmp_path)
    assert curves["top1/val"] == {1: 0.5, 2: 1.0}
    assert list(curves["step/loss"]) == [1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"mlflow": "no such run"}'])
def test_a_damaged_record_of_trackers_does_not_keep_a_run_from_being_trained(
    damaged, tmp_path, capsys
):
    pytest.importorskip("mlflow")
    (tmp_path / "trackers.json").write_text(damaged)
    record(tmp_path, trackers.make(("mlflow", "tensorboard")), [1])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastlab: tracker mlflow failed (") and line.isprintable()
    assert of_tensorboard(tmp_path)["top1/val"] == {1: 0.5}


def test_a_server_named_by_the_environment_takes_the_runs(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "shared" / "mlruns").as_uri())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        record(tmp_path / name, trackers.make(("mlflow",)), [1])
        assert not (tmp_path / name / "mlruns").exists()
    runs = [path for path in (tmp_path / "shared" / "mlruns").glob("*/*/meta.yaml")]
    assert len(runs) == 2


# What is refused, and what is left


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_training(
    name, synth_dataset, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "run"
    chosen = f'train.trackers=["{name}"]'
    status, _, errors = run_quietly(command(synth_dataset, out, chosen))
    (line,) = errors.splitlines()
    assert status == 2 and not out.exists()
    assert f"{name} is not installed" in line and '".[trackers]"' in line
    with pytest.raises(fastlab.UserError, match=f"{name} is not installed"):
        fastlab.train({"train": {"trackers": [name]}}, out)


def test_a_folder_with_the_name_of_a_tracker_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "someones_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "not installed" in missing_tracker("someones_tracker")
    assert not missing_tracker("tensorboard")


def test_overwriting_a_run_removes_what_trackers_kept_of_it(synth_dataset, tmp_path):
    arguments = command(synth_dataset, tmp_path / "run", *SETS, "train.epochs=1")
    assert run_quietly(arguments)[0] == 0
    left = [tmp_path / "run" / name for name in ("wandb/old", "mlruns/old", "trackers.json")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    assert run_quietly([*arguments, "--overwrite"])[0] == 0
    assert not [path for path in left if path.exists()]
    (events,) = (tmp_path / "run" / "tensorboard").glob("events*")
    assert events.is_file()


def test_a_run_with_the_log_of_wandb_as_a_link_is_resumed(synth_dataset, tmp_path):
    """W&B's service makes the link, whatever its settings say."""
    run = tmp_path / "run"
    assert run_quietly(command(synth_dataset, run, *SETS, NONE))[0] == 0
    logs = run / "wandb" / "offline-run-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path / "log")
    assert run_quietly(["--resume", str(run)])[0] == 0
    (logs / "other").symlink_to(tmp_path / "log")
    assert "is a link" in run_quietly(["--resume", str(run)])[2]
