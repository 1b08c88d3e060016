"""Models that are not built in: timm's and a user's own, from the configuration to a prediction."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlab import api, config, models
from fastlab import train as training
from fastlab.cli import main
from fastlab.config import ModelConfig, OptimConfig
from fastlab.console import UserError
from fastlab.models.dropout import DropoutKeys
from fastlab.models.foreign import check_foreign
from fastlab.runs import RunDir
from fastlab.study.spec import make_task
from fastlab.training import metrics, setup, step
from fastlab.training.failures import failures_explained
from fastlab.training.muon import is_hidden
from fastlab.training.optim import make_optimizer
from fastlab.training.warm_start import heads
from tests.models import own
from tests.trainings import assert_same_run, checkpoints

OWN = "tests.models.own"
SETTINGS = """
[data]
path = "{dataset}"
[model]
name = "{name}"
[optim]
name = "adamw"
lr = 0.01
weight_decay = 0.01
[schedule]
name = "onecycle"
[train]
epochs = {epochs}
batch_size = 16
eval_batch_size = 20
precision = "fp32"
checkpoint_seconds = 0
compile = false
[profile]
wait = 0
warmup = 0
active = 2
"""


@pytest.fixture
def train(synth_dataset, tmp_path):
    """Trains the model `name` in `out`, and returns the exit status."""

    def train(name: str, out: Path, *options: str, epochs: int = 1, dataset: Any = None) -> int:
        file = tmp_path / "some.toml"
        dataset = dataset or synth_dataset
        file.write_text(SETTINGS.format(dataset=dataset, name=name, epochs=epochs))
        return main(["train", "--config", str(file), "--out", str(out), *options])

    return train


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@pytest.fixture
def imagenet_file(timm, tmp_path) -> Path:
    """Weights in timm's own format: a plain file, whose head has 1000 classes."""
    file = tmp_path / "model.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), file)
    return file


def made(name: str, classes: int = 4, **arguments: Any) -> nn.Module:
    return models.build(ModelConfig(name=name, arguments=arguments), classes)


def weights(run: Path, name: str = "checkpoints/best") -> dict[str, torch.Tensor]:
    return load_file(run / f"{name}.safetensors")


@pytest.mark.parametrize("kind", ["timm", "own", "fine-tuned"])
def test_a_model_is_trained_traced_evaluated_exported_reported_and_predicts(
    kind, train, synth_source, tmp_path, request, capsys
):
    name, options = f"{OWN}:network", ["--set", "model.arguments.width=8"]
    if kind != "own":
        file = request.getfixturevalue("imagenet_file")
        name, options = "timm:test_resnet", ["--set", "model.arguments.drop_path_rate=0.1"]
    if kind == "fine-tuned":
        options = ["--init", str(file)]
    run = tmp_path / "run"
    assert train(name, run, "--profile", *options) == 0
    parameters = sum(value.numel() for value in made(name, **arguments_of(run)).parameters())
    assert f"{name}: {parameters:,} parameters" in capsys.readouterr().out
    assert main(["trace", str(run)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    top1 = json.loads(capsys.readouterr().out)["top1"]
    assert top1 == json.loads((run / "metrics.jsonl").read_text())["val_top1"]
    assert main(["predict", str(run), str(synth_source / "val"), "--json"]) == 0
    predicted = [json.loads(line)["predicted"] for line in capsys.readouterr().out.splitlines()]
    assert predicted and all(len(each) == 4 for each in predicted)
    exported = api.load_run(run).export("torch", tmp_path / "model.pt2", dynamic_batch=True)
    assert exported.agreement.correct == round(top1 * exported.agreement.images)
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(page)]) == 0
    assert name in page.read_text()


def arguments_of(run: Path) -> dict[str, Any]:
    return config.load(run / "config.toml").model.arguments


def test_a_compiled_model_trains_and_predicts_like_an_eager_one(
    train, synth_source, tmp_path, monkeypatch, capsys
):
    compiled = []

    def compile_simply(function, **options):
        compiled.append(function)
        return torch.compile(function, backend="eager", **options)

    for module in (setup, metrics):
        monkeypatch.setattr(module, "compiled", compile_simply)
    runs, printed = (tmp_path / "eager", tmp_path / "compiled"), []
    for run, choice in zip(runs, ("false", "true"), strict=True):
        assert train(f"{OWN}:network", run, "--set", f"train.compile={choice}") == 0
        capsys.readouterr()
        assert main(["predict", str(run), str(synth_source / "val")]) == 0
        printed.append(capsys.readouterr().out)
    assert compiled
    assert_same_run(*runs)
    assert printed[0] == printed[1]


class StandIn:
    """Stands in for `CUDAGraph` where there is no GPU: each replay runs `body`."""

    def __init__(self, body) -> None:
        self.replay = body


@pytest.mark.parametrize("steps", ["eager", "captured"])
@pytest.mark.parametrize("model", ["network", "Spare"])
def test_a_resumed_run_with_torchs_dropout_repeats_an_uninterrupted_one_bit_for_bit(
    steps, model, train, tmp_path, monkeypatch
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(f"{OWN}:{model}", whole, epochs=2) == 0
    train_step, taken = training.train_step, []

    def stopping(trainer, batch):
        taken.append(batch)
        if len(taken) == 7:  # in the second epoch of five steps
            trainer.watch.signal = signal.SIGTERM
        return train_step(trainer, batch)

    monkeypatch.setattr(training, "train_step", stopping)
    if steps == "captured":
        monkeypatch.setattr(setup, "refuses_capture", lambda accelerator: "")
        monkeypatch.setattr(step, "CUDAGraph", StandIn)
    assert train(f"{OWN}:{model}", stopped, epochs=2) == 128 + signal.SIGTERM
    assert checkpoints(stopped)[-1].name == "step-00000007"
    torch.rand(3)
    assert main(["train", "--resume", str(stopped)]) == 0
    assert_same_run(whole, stopped)


def test_what_torch_draws_is_a_function_of_seed_rank_and_step():
    def drawn(seed: int, rank: int, number: int) -> tuple[float, ...]:
        keys = DropoutKeys(nn.Dropout(0.5), seed, rank, torch.device("cpu"))
        keys.seed_generators(number)
        return tuple(torch.rand(4).tolist())

    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert [drawn(*place) for place in places] == [drawn(*place) for place in places]


MISTAKES = {
    f"{OWN}:raising": "failed: ValueError: no such depth (tests/models/own.py:",
    f"{OWN}:no_module": "expected a torch.nn.Module, got list",
    f"{OWN}:one_more": "gives [2, 5] for two images of 64 pixels a side in evaluation",
    f"{OWN}:Auxiliary": "gives tuple for two images of 64 pixels a side in training",
    f"{OWN}:lazy": "has lazy layers",
    f"{OWN}:infinite": "mask holds a number that is not finite",
    f"{OWN}:fixed_size": "on images of 64 pixels a side failed: RuntimeError: mat1 and mat2",
    f"{OWN}:nothing": "has no 'nothing'; it has: Mean, network, fine, ",
    f"{OWN}:OWN": "has no 'OWN'",
    "no_such_module:network": "No module named 'no_such_module'",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_model_that_cannot_be_trained_is_refused_in_one_line(name, train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(name, run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name.partition(":")[0] in line and MISTAKES[name] in line
    assert not run.exists()


@pytest.mark.parametrize(
    ("name", "sets", "message"),
    [
        ("timm:test_resnt", (), "has no such model; nearest: test_resnet"),
        ("timm:test_resnet.none", (), "Invalid pretrained tag (none)"),
        ("timm:test_resnet", ("model.arguments.depth=1",), "unexpected keyword argument 'depth'"),
        ("timm:test_convnext", ("train.image_size=[[0.5,8]]",), "on images of 8 pixels a side"),
        ("timm:test_efficientnet", ("model.sync_batch_norm=true",), "is no plain BatchNorm2d"),
    ],
)
def test_a_mistake_with_timm_is_refused_in_one_line(
    name, sets, message, timm, train, tmp_path, capsys
):
    assert train(name, tmp_path / "run", *(part for s in sets for part in ("--set", s))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_norms_that_cannot_be_synchronised_are_refused_by_name():
    config = ModelConfig(name=f"{OWN}:other_norms", sync_batch_norm=True)
    with pytest.raises(UserError, match=r"sync_batch_norm: 0 is no plain BatchNorm2d \(Norm\)"):
        check_foreign(models.build(config, 4), config, 4, [16])
    usual = replace(config, name=f"{OWN}:network")
    check_foreign(models.build(usual, 4), usual, 4, [16])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("Expected to have finished reduction in the prior iteration", "several processes cannot"),
        ("f does not have a deterministic implementation", "train.deterministic = true: f does"),
    ],
)
def test_what_torch_cannot_do_with_a_model_is_explained(error, message, tmp_path):
    with pytest.raises(UserError, match=message), failures_explained(RunDir(tmp_path)):
        raise RuntimeError(f"{error}\nsecond line")


def test_without_timm_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm is not installed here; run `make extras`.*\[timm\]"):
        made("timm:test_resnet")


def test_weights_that_cannot_be_downloaded_are_one_line(timm, train, tmp_path, monkeypatch, capsys):
    from timm.models import _builder

    def no_network(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(_builder, "load_pretrained", no_network)
    options = ("--set", "model.arguments.pretrained=true")
    assert train("timm:test_resnet", tmp_path / "run", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "timm:test_resnet failed: ConnectionError: no route to host" in line


def test_pretrained_weights_begin_a_new_training_and_are_not_asked_for_again(
    train, synth_source, tmp_path, monkeypatch, capsys
):
    def killed(trainer):
        raise KeyboardInterrupt

    run, calls = tmp_path / "run", own.pretrained_calls
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(training, "epoch", killed)
        assert train(f"{OWN}:fine", run, "--set", "model.arguments.pretrained=true") == 130
    assert f"weights: pretrained, of {OWN}:fine" in capsys.readouterr().out
    assert weights(run, "initial")["0.weight"].eq(0.25).all()
    assert main(["train", "--resume", str(run)]) == 0
    assert main(["predict", str(run), str(synth_source / "val")]) == 0
    assert train(f"{OWN}:fine", tmp_path / "next", "--init", str(run)) == 0
    assert calls == [True, False, False, False]


def test_the_check_changes_neither_statistics_nor_random_numbers_and_freezes_unused_weights():
    model = made(f"{OWN}:Spare")
    state, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    check_foreign(model, ModelConfig(name=f"{OWN}:Spare"), 4, [16, 32])
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(drawn) and model.training
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"spare.weight", "spare.bias"}
    assert all(p.grad is None for p in model.parameters())


def test_a_file_of_timm_gives_all_weights_but_the_head(imagenet_file, train, tmp_path, capsys):
    run, held = tmp_path / "run", load_file(imagenet_file)
    without = {name: v for name, v in held.items() if not name.endswith("num_batches_tracked")}
    assert len(without) < len(held)
    save_file(without, imagenet_file)
    assert train("timm:test_resnet", run, "--init", str(imagenet_file)) == 0
    assert "with a new classifier" in capsys.readouterr().out
    begun = weights(run, "initial")
    assert {n for n in without if not begun[n].equal(without[n])} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("classes", [4, 7])
def test_a_head_that_is_a_convolution_is_replaced_where_the_classes_differ(
    classes, train, tmp_path
):
    file, run = tmp_path / "own.safetensors", tmp_path / "run"
    held = made(f"{OWN}:network", classes).state_dict()
    save_file(held, file)
    assert train(f"{OWN}:network", run, "--init", str(file)) == 0
    begun = weights(run, "initial")
    new = {name for name in held if not begun[name].equal(held[name])}
    assert new == ({"4.weight", "4.bias"} if classes == 7 else set())


def test_the_heads_are_those_that_the_model_names_or_the_last_layer_with_the_classes(timm):
    assert heads(made(f"{OWN}:network"), 4) == ["4"]
    assert heads(made(f"{OWN}:TwoHeads"), 4) == ["one", "other"]
    assert heads(models.build(ModelConfig(name="cnn8"), 200), 200) == ["head.4"]
    for name in ("test_resnet", "test_vit", "test_convnext", "test_efficientnet"):
        head = timm.create_model(name, num_classes=4).default_cfg["classifier"]
        assert heads(made(f"timm:{name}"), 4) == [head]


def test_the_optimizer_leaves_out_decay_and_orthogonalisation_where_they_make_no_sense(timm):
    model = made("timm:test_vit", img_size=32)
    decayed, others = make_optimizer(OptimConfig(name="muon"), model).param_groups
    named = dict(model.named_parameters())
    exempt = {name for name in model.no_weight_decay() if name in named}
    assert "pos_embed" in exempt
    assert all(any(named[name] is p for p in others["params"]) for name in exempt)
    assert sum(map(len, (decayed["params"], others["params"]))) == len(named)
    assert not is_hidden(torch.zeros(1, 16, 8, 8)) and is_hidden(torch.zeros(2, 16, 3, 3))


@pytest.mark.parametrize(
    ("name", "file_name"),
    [
        ("timm:resnet10t.c3_in1k", "timm-resnet10t-c3_in1k"),
        ("mine.models:net", "mine-models-net"),
        ("cnn8", "cnn8"),
    ],
)
def test_a_run_s_name_can_be_that_of_a_folder(name, file_name):
    task = make_task(config.load(None, [f'model.name="{name}"']))
    assert task.name.startswith(f"{file_name}-") and "/" not in task.name


@pytest.mark.slow
def test_models_are_rows_and_arguments_a_factor_of_studies(timm, train, tmp_path):
    widths, kinds, out = (tmp_path / name for name in ("widths.toml", "kinds.toml", "studies"))
    widths.write_text(
        'title = "Widths"\nbase = "some.toml"\nseeds = [0]\n'
        'factor = "model.arguments.width"\nvalues = [4, 8]\n'
    )
    kinds.write_text(
        f'title = "Kinds"\nbase = "some.toml"\nseeds = [0]\n'
        f'[[rows]]\nlabel = "own"\nmodel.name = "{OWN}:network"\n'
        f'[[rows]]\nlabel = "timm"\nmodel.name = "timm:test_resnet"\n'
        f'[[rows]]\nlabel = "tuned"\nmodel.name = "{OWN}:fine"\nmodel.arguments.pretrained = true\n'
    )
    train(f"{OWN}:network", tmp_path / "run")  # writes the base
    options = ("--out", str(out), "--no-calibration")
    assert main(["study", str(widths), str(kinds), *options]) == 0
    named = "tests-models-own-network"
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        "tests-models-own-fine-kinds-tuned-seed0",
        f"{named}-kinds-own-seed0",
        f"{named}-widths-4-seed0",
        f"{named}-widths-8-seed0",
        "timm-test_resnet-kinds-timm-seed0",
    ]
    for width in (4, 8):
        assert arguments_of(out / "runs" / f"{named}-widths-{width}-seed0") == {"width": width}
    begun = weights(out / "runs" / "tests-models-own-fine-kinds-tuned-seed0", "initial")
    assert begun["0.weight"].eq(0.25).all()
    page = (out / "report.html").read_text()
    assert "model.arguments.width" in page and "timm:test_resnet" in page
