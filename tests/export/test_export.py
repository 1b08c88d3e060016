"""`fastlab export`: the files compute what the run's model computes, wherever they are loaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastlab.console import UserError
from fastlab.dataset.manifest import read_manifest
from fastlab.export import check, export, graphs
from fastlab.export.facts import weights_file
from fastlab.predict import Predictor
from fastlab.runs import RunDir
from tests.export.conftest import documented
from tests.trainings import ROOT


def validation(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The validation images as pixels, uint8 [N, S, S, 3], and as numpy normalises them, fp32
    [N, 3, S, S]; their labels, int64 [N]."""
    array, manifest = folder / "data" / "array", read_manifest(folder / "data")
    pixels = np.load(array / "val-images.npy")
    normalised = (pixels / 255 - manifest.mean) / manifest.std
    labels = np.load(array / "val-labels.npy")
    return pixels, normalised.transpose(0, 3, 1, 2).astype(np.float32), labels


def test_an_onnx_graph_has_the_top1_count_of_evaluate(folder, fastlab, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pixels, images, labels = validation(folder)
    cases = [("resnet", [], images), ("cnn", ["--normalise", "--dynamic-batch"], pixels)]
    for run, options, values in cases:
        out = tmp_path / f"{run}.onnx"
        status, printed, errors = fastlab("export", run, "--to", "onnx", "--out", out, *options)
        assert (status, errors) == (0, [])
        session = runtime.InferenceSession(out, providers=["CPUExecutionProvider"])
        size = len(values) if "--dynamic-batch" in options else 1
        name = session.get_inputs()[0].name
        parts = [values[at : at + size] for at in range(0, len(values), size)]
        logits = np.concatenate([session.run(["logits"], {name: part})[0] for part in parts])
        correct = int((logits.argmax(axis=1) == labels).sum())
        figures = json.loads(fastlab("evaluate", run, "--json")[1])
        assert correct == round(figures["top1"] * figures["images"])
        counts = f"{correct} by the file, {correct} by the model in fp32, {correct} by fastlab"
        assert f"{len(labels)} validation images, top-1: {counts}" in printed
        facts = session.get_modelmeta().custom_metadata_map
        words = [each["name"] for each in json.loads(facts["classes"])]
        assert words == [each.words for each in read_manifest("data").classes]
        assert json.loads(facts["mean"]) == read_manifest("data").mean
        assert facts["image_size"] == "64" and facts["fit"] == "crop"
        assert str(ROOT).encode() not in out.read_bytes()


def test_a_torch_program_gives_the_logits_without_fastlab(folder, fastlab, tmp_path):
    out, options = tmp_path / "run.pt2", ["--normalise", "--dynamic-batch"]
    assert fastlab("export", "resnet", "--to", "torch", "--out", out, *options)[0] == 0
    pixels, images, _ = validation(folder)
    np.save(tmp_path / "pixels.npy", pixels[:5])
    code = """
import sys
sys.modules["fastlab"] = sys.modules["pipelines"] = None
import numpy, torch
model = torch.export.load("run.pt2").module()
numpy.save("logits.npy", model(torch.from_numpy(numpy.load("pixels.npy"))).numpy())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    model = Predictor(RunDir("resnet")).model.cpu()
    with torch.no_grad():
        expected = model(torch.from_numpy(images[:5])).numpy()
    assert np.load(tmp_path / "logits.npy") == pytest.approx(expected, abs=1e-4)
    assert str(ROOT).encode() not in out.read_bytes()


@pytest.fixture
def demo(folder, tmp_path, monkeypatch) -> Path:
    """A working directory in which the blocks of docs/export.md run."""
    shutil.copytree(folder / "resnet", tmp_path / "demo" / "run")
    Image.new("RGB", (80, 70), "teal").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_documented_blocks_load_the_files(demo, fastlab):
    model = Predictor(RunDir("demo/run")).model.cpu()
    out = "demo/run.safetensors"
    assert fastlab("export", "demo/run", "--to", "safetensors", "--out", out)[0] == 0
    found: dict = {}
    exec(documented("fastlab.load_run"), found)
    assert found["exported"].path == Path("demo/run.pt2")
    exec(documented("models.build"), found)
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found["model"](images), model(images))
    exec(documented("torch.export.load"), found)
    with torch.no_grad():
        expected = model(torch.zeros(1, 3, 64, 64))
    assert torch.allclose(found["logits"], expected, atol=1e-4)
    assert found["facts"]["weights"] == "best"


def test_the_documented_block_loads_the_weights_of_a_model_of_timm(demo):
    timm = pytest.importorskip("timm")
    trained = timm.create_model("test_resnet", num_classes=3).eval()
    named = {"model": {"name": "timm:test_resnet", "arguments": {}}, "classes": ["a", "b", "c"]}
    Path("demo/timm.safetensors").write_bytes(weights_file(trained, named))
    found: dict = {}
    exec(documented("timm.create_model"), found)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found["model"](images), trained(images))


def test_the_documented_blocks_export_and_load_onnx(demo, fastlab, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = "demo/run.onnx"
    assert fastlab("export", "demo/run", "--to", "onnx", "--normalise", "--out", out)[0] == 0
    Image.open("photo.jpg").resize((64, 64)).save("small.png")
    predicted = fastlab("predict", "demo/run", "small.png", "--json", "--top", "1")[1]
    best = json.loads(predicted)["predicted"][0]["name"]
    exec(documented("onnxruntime"), {})
    assert capsys.readouterr().out.strip() == best


def test_a_run_without_its_dataset_is_checked_on_generated_images(demo, fastlab, trained):
    status, printed, errors = fastlab("export", "demo/run", "--to", "torch")
    assert (status, errors) == (0, []) and Path("run.pt2").exists()
    assert "compared on 64 generated images: the dataset is not at hand" in printed
    options = ["--to", "torch", "--force", "--data", trained / "data"]
    status, printed, errors = fastlab("export", "demo/run", *options)
    assert (status, errors) == (0, []) and "20 validation images, top-1" in printed


def test_the_moving_average_of_the_last_weights_is_exported(demo):
    from safetensors.torch import load_file

    exported = export("demo/run", "safetensors", which="last")
    expected = Predictor(RunDir("demo/run"), "last").model.state_dict()
    found = load_file(exported.path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].cpu()) for name in found)
    raw = load_file(next(Path("demo/run/checkpoints").glob("step-*")) / "model.safetensors")
    assert any(not torch.equal(found[name], raw[name]) for name in found)


def test_a_graph_with_other_logits_is_refused_and_not_written(demo, fastlab, monkeypatch):
    run_torch = graphs.run_torch

    def run_another(content: bytes) -> graphs.Call:
        call = run_torch(content)
        return lambda values: call(values) + 0.1

    monkeypatch.setattr(graphs, "run_torch", run_another)
    status, out, (line,) = fastlab("export", "demo/run", "--to", "torch")
    assert status == 2 and not out and not Path("run.pt2").exists()
    assert "logits differ from the model's by up to 0.1 (the largest logit is" in line


def test_classes_that_tie_within_the_rounding_are_counted(demo):
    """The model gives two classes the same logit; the graph gives the second a little more."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    torch.nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 1.0, 0.0])
    spec = Predictor(RunDir("demo/run")).spec
    data = [(torch.zeros(4, 3, 2, 2), np.zeros(4, np.int64))]
    nearly = np.array([[1.0, 1.0 + 1e-5, 0.0]], np.float32).repeat(4, axis=0)
    takes = graphs.Input(normalise=False, dynamic_batch=True)
    found = check.compare(lambda _: nearly, takes, model, spec, data)
    assert (found.correct, found.expected, found.others) == (0, 4, 4)
    assert found.difference == pytest.approx(1e-5, rel=0.1)
    with pytest.raises(UserError, match="nan"):
        check.compare(lambda _: nearly * np.nan, takes, model, spec, data)


class ByValue(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images if images.sum() > 0 else -images


def test_a_model_that_has_no_graph_is_refused_in_one_line():
    with pytest.raises(UserError, match="this model cannot be exported") as refused:
        graphs.capture(ByValue(), graphs.Input(False, False), 8)
    assert len(str(refused.value).splitlines()) == 1


def test_mistakes_are_one_line_each(demo, fastlab, monkeypatch):
    Path("run.pt2").write_text("mine")
    monkeypatch.setitem(sys.modules, "onnx", None)  # which is looked for first
    cases = {
        ("torch",): "run.pt2: exists; choose another --out, or replace a file with --force",
        ("safetensors", "--normalise"): "--normalise and --dynamic-batch are for graphs",
        ("safetensors", "--out", "nowhere/x"): "nowhere/x: cannot be written (No such file",
        ("safetensors", "--out", "demo", "--force"): "demo: exists",
        ("onnx",): "onnx is not installed here; run `make extras`",
    }
    for options, expected in cases.items():
        status, out, (line,) = fastlab("export", "demo/run", "--to", *options)
        assert status == 2 and not out and expected in line
    assert Path("run.pt2").read_text() == "mine"
    with pytest.raises(UserError, match="tensorrt: expected one of onnx, torch, safetensors"):
        export("demo/run", "tensorrt")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_graph_of_a_run_lies_on_the_cpu_where_there_is_a_gpu(demo):
    exported = export("demo/run", "torch", dynamic_batch=True)
    graph = torch.export.load(exported.path).module()
    assert {each.device.type for each in graph.state_dict().values()} == {"cpu"}
