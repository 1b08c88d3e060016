import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks import device_loaders, tables
from benchmarks.measurements import Record, load, new_session, save
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.formats.array import open_array
from fastlab.dataset.manifest import read_manifest
from pipelines.augment import augment_on_device

CPU = torch.device("cpu")
AUGMENTED = ["gather, no augmentation", "flip and translate", "crop and flip"]


@pytest.fixture(scope="module")
def dataset(synth_source, tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "synth"
    convert(synth_source, path, Options(formats=("array", "tar")))
    return path


@pytest.fixture
def compiled(monkeypatch):
    """Counts compilations; without Inductor, which takes seconds each time."""
    counter = CompileCounter()
    apply = torch.compile(augment_on_device, dynamic=False, backend=counter)
    monkeypatch.setattr(device_loaders, "device_augmenter", lambda compile: apply)
    monkeypatch.setattr(device_loaders, "_LEAST", 0.0)
    torch.compiler.reset()
    return counter


def run(dataset, out, monkeypatch, *more):
    arguments = [str(dataset), "--rounds", "2", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    return device_loaders.main()


def test_every_case_is_measured_at_every_size(dataset, compiled, tmp_path, monkeypatch, capsys):
    """Each case is compiled for each size, though torch's default limit is lower."""
    out = tmp_path / "new" / "x.json"
    with torch._dynamo.config.patch(recompile_limit=1):
        assert run(dataset, out, monkeypatch, "--batches", "8,16,32,81") == 0
    assert compiled.frame_count == 3 * len(AUGMENTED)
    session = load(out)
    cases = [f"{name}, {batch}" for batch in (8, 16, 32) for name in ("copy roof", *AUGMENTED)]
    assert session.benchmark == "device_loaders" and [r.case for r in session.records] == cases
    for record in session.records:
        details = record.details
        assert len(record.rounds) == 2 and min(record.rounds) > 0
        assert details["bytes"] == 64 * 64 * 3 * (1 + 2) == 36_864
        assert details["bytes/s"] == [rate * 36_864 for rate in record.rounds]
        assert min(details["device seconds"]) > 0 and min(details["host seconds"]) > 0
    shown = capsys.readouterr()
    assert "skipped nvJPEG, 8: needs a CUDA device" in shown.err
    assert "skipped batch 81: the training split has only 80 images" in shown.err
    assert device_loaders.table(session) in shown.out


def test_more_shapes_than_the_limit_are_an_error(dataset, compiled):
    """The alternative would be a figure of eager code."""
    data = device_loaders.Data(dataset, CPU)
    limits = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(**limits):
        device_loaders._prepare("flip and translate", data, 8)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            device_loaders._prepare("flip and translate", data, 16)


def test_a_batch_equals_one_of_the_resident_pipeline(dataset, compiled):
    data = device_loaders.Data(dataset, CPU)
    (batch,) = device_loaders.CASES["gather, no augmentation"](data, 8).batches(1)
    manifest = read_manifest(dataset)
    images, labels = open_array(dataset, manifest, "train")
    rows = device_loaders._rows(80, 1, 8)[0]
    plain = torch.from_numpy(images[rows]).double() / 255 - torch.tensor(manifest.mean)
    plain = (plain / torch.tensor(manifest.std)).permute(0, 3, 1, 2)
    assert batch.images.dtype == torch.bfloat16
    assert torch.allclose(batch.images.double(), plain, rtol=2**-8, atol=1e-6)
    assert batch.labels.tolist() == labels[rows].tolist() and batch.mask.all()


def test_rows_are_whole_shuffled_epochs():
    rows = device_loaders._rows(10, 5, 4)
    assert rows.shape == (5, 4)
    epochs = rows.reshape(2, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_copy_moves_as_many_bytes_as_a_batch(dataset):
    """Copies come from all over the images and go to one place."""
    data = device_loaders.Data(dataset, CPU)
    work = device_loaders.CASES["copy roof"](data, 80)
    copies = list(work.batches(3))
    assert work.bytes == 36_864 and 2 * copies[0].nbytes == 80 * 36_864
    assert len({copy.data_ptr() for copy in copies}) == 1


@pytest.mark.multiprocess
def test_nvjpeg_counts_the_bytes_that_it_decodes(dataset, compiled, monkeypatch):
    """A decoder of the CPU takes nvJPEG's place here."""
    monkeypatch.setattr(device_loaders, "_check_gpu", lambda device: None)
    data = device_loaders.Data(dataset, CPU)
    sizes = [len(data.shards[row]) for row in range(80)]
    whole = device_loaders.CASES["nvJPEG"](data, 16)
    assert whole.bytes == pytest.approx(sum(sizes) / 80 + 2 * 64 * 64 * 3)
    assert [len(batch.images) for batch in whole.batches(7)] == [16] * 7  # over the epoch's end
    alone = device_loaders.CASES["nvJPEG decode alone"](data, 16)
    assert alone.bytes == sum(sizes[:16]) / 16 + 64 * 64 * 3
    assert [len(images) for images in alone.batches(2)] == [16, 16]


def test_an_interrupted_command_measures_only_the_rest(dataset, compiled, tmp_path, monkeypatch):
    clock = device_loaders._batch_seconds
    calls = []

    def cut(*arguments):
        calls.append(arguments)
        if len(calls) == 5:  # a warm-up and a measurement of each case, then one more
            raise KeyboardInterrupt
        return clock(*arguments)

    monkeypatch.setattr(device_loaders, "_batch_seconds", cut)
    out = tmp_path / "x.json"
    cases = ("--cases", "copy roof;flip and translate", "--batches", "8")
    assert run(dataset, out, monkeypatch, *cases) == 130
    assert [len(record.rounds) for record in load(out).records] == [1, 1]
    assert "flip and translate | 8" in device_loaders.table(load(out))
    monkeypatch.setattr(device_loaders, "_batch_seconds", clock)
    assert run(dataset, out, monkeypatch, *cases) == 0
    assert [record.details["call"] for record in load(out).records] == [[1, 2], [1, 2]]
    assert [len(record.details["bytes/s"]) for record in load(out).records] == [2, 2]


def measured(case, batch, rates, bytes_an_image):
    details = {"batch": batch, "bytes": bytes_an_image, "device seconds": [2e-6, 4e-6, 3e-6]}
    details |= {"host seconds": [1e-6], "bytes/s": [rate * bytes_an_image for rate in rates]}
    return Record(f"{case}, {batch}", "images/s", rates, details)


def test_shares_are_of_the_roof_of_the_same_size_and_round(tmp_path, monkeypatch):
    records = [
        measured("copy roof", 256, [1e9, 2e9, 4e9], 100),
        measured("crop and flip", 256, [5e8, 5e8, 4e8], 100),
        measured("nvJPEG", 256, [1e9, 1e9, 1e9], 10),
        measured("crop and flip", 1024, [5e8, 5e8, 4e8], 100),
    ]
    save(new_session("device_loaders", records), tmp_path / "benchmarks" / "results" / "x.json")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    roof, crop, nvjpeg, alone = tables.render("x").splitlines()[2:6]
    assert roof.endswith("| 200.0 | 100.0% (100.0% to 100.0%) | 3 | 1 |")
    assert crop.startswith("| crop and flip | 256 | 500,000,000 ± 10% | 50.0 |")
    assert "| 25.0% (10.0% to 50.0%) |" in crop and "| 5.0% (2.5% to 10.0%) |" in nvjpeg
    assert "| crop and flip | 1,024 |" in alone and "| not measured |" in alone


def test_a_command_that_measured_nothing_fails_with_the_reasons(
    dataset, compiled, tmp_path, monkeypatch, capsys
):
    assert run(dataset, tmp_path / "x.json", monkeypatch, "--batches", "81,500") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[-1] == "fastlab: no case could be measured"
    assert not (tmp_path / "x.json").exists()


def test_a_dataset_without_the_array_format_is_refused(synth_source, tmp_path, monkeypatch, capsys):
    convert(synth_source, tmp_path / "tar", Options(formats=("tar",)))
    assert run(tmp_path / "tar", tmp_path / "x.json", monkeypatch) == 2
    assert "has no array format" in capsys.readouterr().err
