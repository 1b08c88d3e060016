"""The loaders: every engine and rival gives batches, and the table says what was not measured."""

import argparse

import numpy as np
import pytest

from benchmarks import loaders, rivals, tables
from benchmarks.measurements import Record, child_result, new_session, save
from tests.packages import has


def _needs(case: str, *packages: str):
    missing = not all(map(has, packages))
    return pytest.param(case, marks=pytest.mark.skipif(missing, reason=f"needs {packages}"))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "case",
    [
        "fastlab resident",
        "fastlab torchvision",
        "DataLoader + PIL",
        _needs("LitData", "litdata"),
        _needs("Grain", "grain"),
    ],
)
def test_a_loader_is_measured(originals, dataset, case, tmp_path):
    arguments = [str(dataset), "--originals", str(originals), "--cores", "1"]
    arguments += ["--scratch", str(tmp_path), "--seconds", "0.1", "--case", case]
    result = child_result("benchmarks.loaders", arguments)
    assert result["rate"] > 0 and result["batch"] == 256 and result["memory"] > 1e8
    assert 0 < result["cpu"] < 3


def test_spdl_gives_the_images_flipped_and_translated(originals):
    io = pytest.importorskip("spdl.io")
    try:
        io.get_video_filter_desc(pix_fmt="rgb24")
        io.load_image(next((originals / "train").rglob("*.JPEG")).read_bytes())
    except RuntimeError as error:  # FFmpeg's libraries are missing
        pytest.skip(str(error))
    batches = rivals.RIVALS["SPDL"](argparse.Namespace(originals=originals), 1)
    first = next(batches)
    assert first.shape == (256, 64, 64, 3) and first.dtype == np.uint8
    batches.close()


def test_a_flipped_and_translated_image_is_a_part_of_the_image_or_of_its_mirror_image():
    image = np.random.default_rng(0).integers(1, 256, (9, 10, 3), dtype=np.uint8)
    generator, seen = np.random.default_rng(1), set()
    for _ in range(2000):
        moved = rivals._flip_and_translate(image, generator)
        assert moved.shape == image.shape
        seen.add(moved.tobytes())
    expected = set()
    for mirrored in (image, image[:, ::-1]):
        padded = np.pad(mirrored, ((4, 4), (4, 4), (0, 0)))
        expected |= {
            padded[top : top + 9, left : left + 10].tobytes()
            for top in range(9)
            for left in range(9)
        }
    assert seen == expected and len(expected) == 2 * 81


def record(name: str, cores: int, rate: float) -> Record:
    details = {"cores": cores, "cpu": 1.0, "memory": 1e9}
    return Record(f"{name}, {cores}", "images/s", [rate], details)


LIMIT = "memory gather, no augmentation"


def test_the_table_of_loaders_shows_what_was_not_measured():
    records = [record(LIMIT, 1, 50.0), record(LIMIT, 2, 100.0), record("x", 2, 25.0)]
    rows = loaders.table(new_session("loaders", records)).splitlines()
    assert rows[2].startswith(f"| {LIMIT} | 50 ± 0% | 100 ± 0% | 100.0% |")
    assert rows[3].startswith("| x | not measured | 25 ± 0% | 25.0% |")


def test_the_table_of_loaders_has_a_column_of_what_decodes_on_a_gpu(tmp_path, monkeypatch):
    """Two records of different benchmarks give one table; a GPU's figure is that of 256 images."""
    made = new_session("loaders", [record(LIMIT, 1, 50.0), record("fastlab torchvision", 1, 5.0)])
    rates = {"nvJPEG, 256": 7.0, "nvJPEG, 1024": 8.0}
    on_gpu = new_session(
        "device_loaders", [Record(case, "images/s", [rate]) for case, rate in rates.items()]
    )
    on_gpu.machine["gpus"] = ["Some GPU"]
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    for name, session in (("cpu", made), ("gpu", on_gpu)):
        save(session, tmp_path / "benchmarks" / "results" / f"{name}.json")
    lines = tables.render("cpu", "gpu").splitlines()
    assert lines[0].endswith("| peak memory | on Some GPU |")
    assert lines[2].endswith("| 1,000 MB | not measured |")
    assert lines[3].endswith("| 1,000 MB | 7 ± 0% |")
