"""Hugging Face datasets and Parquet as sources: written and judged by `datasets` and pyarrow."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fastlab.cli import main
from fastlab.dataset.manifest import read_manifest
from tests.dataset.test_sources import picture, refused

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

NAMES = ["cat", "ant", "bee"]


def dataset(count: int, seed: int, **features):
    """Random images, PNG, of random classes."""
    random = np.random.default_rng(seed)
    labels = [*range(len(NAMES)), *random.integers(0, len(NAMES), count - len(NAMES)).tolist()]
    images = [{"bytes": picture(1000 * seed + k), "path": None} for k in range(count)]
    values = {"image": images, "label": labels}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), **features}
    return datasets.Dataset.from_dict(values, features=datasets.Features(kinds))


@pytest.fixture(scope="module")
def both():
    return datasets.DatasetDict({"train": dataset(150, 1), "validation": dataset(20, 2)})


def assert_same(out: Path, both) -> None:
    """The arrays are the images and labels that `datasets` decodes, in its order."""
    for split, name in (("train", "train"), ("validation", "val")):
        images = np.stack([np.asarray(image) for image in both[split]["image"]])
        assert np.array_equal(np.load(out / "array" / f"{name}-images.npy"), images)
        assert np.load(out / "array" / f"{name}-labels.npy").tolist() == both[split]["label"][:]
    assert [each.id for each in read_manifest(out).classes] == NAMES


def test_a_saved_dataset_gives_the_images_and_labels_that_datasets_decodes(both, tmp_path, capsys):
    shuffled = datasets.DatasetDict({name: each.shuffle(seed=1) for name, each in both.items()})
    shuffled.save_to_disk(tmp_path / "saved", num_shards={"train": 3, "validation": 1})
    command = ["convert", str(tmp_path / "saved"), str(tmp_path / "out")]
    assert main([*command, "--formats", "array,tar"]) == 0
    assert_same(tmp_path / "out", shuffled)
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["files", "folders", "data"])
def test_parquet_gives_the_images_and_labels_that_datasets_decodes(layout, both, tmp_path, capsys):
    folder = tmp_path / "parquet"
    for split, each in both.items():
        for shard in range(2):
            part = each.shard(2, shard, contiguous=True)
            name = {
                "files": f"{split}-0000{shard}-of-00002.parquet",
                "folders": f"{split}/{shard}.parquet",
                "data": f"data/{split}-{shard}.parquet",
            }[layout]
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            part.to_parquet(folder / name, batch_size=40)  # rows of a row group
    command = ["convert", str(folder), str(tmp_path / "out"), "--workers", "2"]
    assert main([*command, "--formats", "array,tar"]) == 0
    assert_same(tmp_path / "out", both)
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out


def test_parquet_of_a_bucket_is_read(s3, both, tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    for split, each in both.items():
        each.to_parquet(folder / f"{split}.parquet")
    assert main(["convert", s3.bucket("tables", folder), str(tmp_path / "out")]) == 0
    assert_same(tmp_path / "out", both)


def test_images_in_files_of_their_own_are_read_from_there(both, tmp_path):
    """As `load_dataset("imagefolder")` gives them."""
    paths = []
    for k in range(6):
        paths.append(str(tmp_path / f"{k}.png"))
        Path(paths[-1]).write_bytes(picture(k))
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": None, "path": path} for path in paths],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "label": ["a", "b"] * 3,
        }
    )
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    options = ["--val-fraction", "0.3", "--formats", "array,tar"]
    assert main(["convert", str(tmp_path / "saved"), str(tmp_path / "out"), *options]) == 0
    assert [each.id for each in read_manifest(tmp_path / "out").classes] == ["a", "b"]


def table(**columns) -> "pa.Table":
    return pa.table({"image": [picture(k) for k in range(9)], **columns})


def test_plain_parquet_needs_no_metadata(tmp_path):
    path = tmp_path / "plain.parquet"
    pq.write_table(table(label=[k % 3 for k in range(9)], score=[0.5] * 9), path)
    assert main(["convert", str(path), str(tmp_path / "out"), "--val-fraction", "0.3"]) == 0
    assert [each.id for each in read_manifest(tmp_path / "out").classes] == ["0", "1", "2"]


def test_a_column_is_chosen_by_name_and_is_part_of_the_request(tmp_path, capsys):
    path, out = tmp_path / "two.parquet", tmp_path / "out"
    pq.write_table(table(fine=[k % 3 for k in range(9)], coarse=["x", "y", "y"] * 3), path)
    line = refused(capsys, path, out, "--val-fraction", "0.3")
    assert "has several label columns: fine, coarse; choose one with --columns label=" in line
    chosen = ["--val-fraction", "0.3", "--columns", "label=coarse"]
    assert main(["convert", str(path), str(out), *chosen]) == 0
    assert [each.id for each in read_manifest(out).classes] == ["x", "y"]
    capsys.readouterr()
    chosen[-1] = "label=fine"
    assert main(["convert", str(path), str(out), *chosen]) == 2
    assert "converted with --columns 'label=coarse', not 'label=fine'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"label": [0] * 9}, ["--columns", "label"], "--columns label: expected image="),
        ({"label": [0] * 9}, ["--columns", "label=x"], "is no label column; those are: label"),
        ({"label": [0.5] * 9}, [], "has no label column"),
        ({"label": [0, None] + [1] * 7}, [], "labels must be whole numbers or strings"),
        ({"label": [0] * 8 + [10**12]}, [], "has label 1000000000000, but only 9 images"),
        ({"label": [0] * 8 + [-1]}, [], "label -1 is none of its"),
        ({"label": [0] * 9}, [], "has no validation images"),
        ({"label": [0] * 9, "more": [b""] * 9}, [], "has several image columns: image, more"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(columns, options, message, tmp_path, capsys):
    pq.write_table(table(**columns), tmp_path / "x.parquet")
    assert message in refused(capsys, tmp_path / "x.parquet", tmp_path / "out", *options)


def test_hidden_labels_leave_the_test_split_out(tmp_path, capsys):
    for split, label in (("train", 0), ("val", 0), ("test", -1)):
        pq.write_table(table(label=[label] * 9), tmp_path / f"{split}.parquet")
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 0
    assert list(read_manifest(tmp_path / "out").splits) == ["train", "val"]


def test_damaged_tables_are_named_in_one_line(both, tmp_path, capsys):
    path = tmp_path / "train.parquet"
    both["train"].to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "train.parquet: damaged Parquet" in refused(capsys, path, tmp_path / "out")
    both.save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved" / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100_000])
    line = refused(capsys, tmp_path / "saved", tmp_path / "out")
    assert "damaged" in line
    (tmp_path / "saved" / "dataset_dict.json").write_text("[]")
    assert "damaged" in refused(capsys, tmp_path / "saved", tmp_path / "out")


def test_a_missing_package_is_named_with_its_command(both, tmp_path, capsys, monkeypatch):
    both["train"].to_parquet(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = refused(capsys, tmp_path / "x.parquet", tmp_path / "out")
    assert "needs pyarrow" in line and '".[sources]"' in line
    monkeypatch.setitem(sys.modules, "datasets", None)
    line = refused(capsys, "hf://datasets/owner/name", tmp_path / "out")
    assert "needs datasets" in line and '".[sources]"' in line


def test_a_dataset_of_the_hub_is_loaded_by_its_name(both, tmp_path, monkeypatch):
    """There is no hub here: `load_dataset` reads what lies under this name in a folder."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for split, each in both.items():
        each.to_parquet(tmp_path / "owner" / "name" / f"{split}.parquet")
    load = datasets.load_dataset

    def load_dataset(name: str):
        return load(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    out = tmp_path / "out"
    assert main(["convert", "hf://datasets/owner/name", str(out)]) == 0
    assert_same(out, both)
    assert read_manifest(out).name == "name"


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(capsys, "hf://datasets/owner/name", tmp_path / "out")
    assert "hf://datasets/owner/name: cannot be loaded (" in line
