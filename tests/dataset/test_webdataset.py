"""WebDataset shards as a source: written by webdataset, read on this machine and behind URLs."""

import functools
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from fastlab.cli import main
from fastlab.dataset import remote
from fastlab.dataset.manifest import read_manifest
from tests.dataset.test_sources import picture, refused
from tests.s3 import Faults
from tests.trainings import ROOT, wait_until


def samples(count: int, label=lambda k: {"cls": str(k % 3)}, suffix: str = "png") -> list[dict]:
    return [{"__key__": f"{k:04}", suffix: picture(k), **label(k)} for k in range(count)]


def write(path: Path, written: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as shard:
        for sample in written:
            encoded = {k: v.encode() if isinstance(v, str) else v for k, v in sample.items()}
            shard.write({**encoded, "__key__": sample["__key__"]})


@pytest.fixture
def shards(tmp_path) -> Path:
    folder = tmp_path / "shards"
    every = samples(30)
    write(folder / "train-000000.tar", every[:12])
    write(folder / "train-000001.tar", every[12:24])
    write(folder / "val-000000.tar", every[24:])
    return folder


def arrays(out: Path, split: str) -> tuple[np.ndarray, list[int]]:
    images = np.load(out / "array" / f"{split}-images.npy")
    return images, np.load(out / "array" / f"{split}-labels.npy").tolist()


def by_webdataset(*paths: Path) -> tuple[np.ndarray, list[int]]:
    """Images and labels as webdataset groups them and Pillow decodes them, by their keys."""
    found = []
    for path in paths:
        with path.open("rb") as shard:  # `webdataset.WebDataset` would leave it open
            files = tar_file_expander([{"url": str(path), "stream": shard}])
            for sample in group_by_keys(files):
                image = np.asarray(Image.open(io.BytesIO(sample["png"])))
                found.append((sample["__key__"], image, int(sample["cls"])))
    found.sort(key=itemgetter(0))  # fastlab's own shards lie in another order
    return np.stack([image for _, image, _ in found]), [label for *_, label in found]


def assert_same(out: Path, folder: Path) -> None:
    for split in ("train", "val"):
        images, labels = arrays(out, split)
        expected = by_webdataset(*sorted(folder.glob(f"{split}-*.tar")))
        assert np.array_equal(images, expected[0]) and labels == expected[1]


def test_shards_give_the_images_and_labels_that_webdataset_reads(shards, tmp_path):
    out = tmp_path / "out"
    assert main(["convert", str(shards), str(out), "--formats", "array,tar"]) == 0
    assert_same(out, shards)
    assert_same(out, out / "tar")
    assert [each.id for each in read_manifest(out).classes] == ["0", "1", "2"]


def test_shards_in_the_folders_of_splits_and_a_single_shard_are_read(shards, tmp_path):
    whole, folders = tmp_path / "whole", tmp_path / "folders"
    (folders / "train").mkdir(parents=True)
    (folders / "validation").mkdir()
    for path in shards.iterdir():
        split = "train" if "train" in path.name else "validation"
        os.link(path, folders / split / f"{path.name[-5]}.tar")
    assert main(["convert", str(shards), str(whole)]) == 0
    assert main(["convert", str(folders), str(tmp_path / "out")]) == 0
    assert arrays(tmp_path / "out", "val")[1] == arrays(whole, "val")[1]
    single = [str(shards / "train-000000.tar"), str(tmp_path / "single"), "--val-fraction", "0.25"]
    assert main(["convert", *single]) == 0
    assert sorted(arrays(tmp_path / "single", "train")[1]) == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("name", ["label", "species"])
def test_labels_may_be_names_in_json(name, tmp_path):
    words = ("cat", "ant", "bee")
    folder = tmp_path / "shards"
    write(folder / "train.tar", samples(9, lambda k: {"json": json.dumps({name: words[k % 3]})}))
    write(folder / "val.tar", samples(3, lambda k: {"json": json.dumps({name: words[k % 3]})}))
    out = tmp_path / "out"
    columns = [] if name == "label" else ["--columns", f"label={name}"]
    assert main(["convert", str(folder), str(out), *columns]) == 0
    assert [each.id for each in read_manifest(out).classes] == ["ant", "bee", "cat"]
    assert arrays(out, "val")[1] == [2, 0, 1]


def test_classes_are_named_by_a_list_beside_the_shards(shards, tmp_path, capsys):
    (shards / "classnames.txt").write_text("cat\nant\nbee, wasp\n")
    out = tmp_path / "out"
    assert main(["convert", str(shards), str(out)]) == 0
    assert [each.id for each in read_manifest(out).classes] == ["cat", "ant", "bee, wasp"]
    (shards / "classnames.txt").write_text("cat\nant\n")
    line = refused(capsys, shards, tmp_path / "other")
    assert "label 2 is none of its 2 classes" in line


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda k: {} if k == 5 else {"cls": "0"}, "train-1.tar: sample 0005 has no label"),
        (lambda k: {"json": '{"other": 1}'}, "its json has no field 'label'"),
        (lambda k: {"json": '{"label": 1.5}'}, "labels must be whole numbers or strings"),
        (lambda k: {"json": "[" * 100_000}, "its json has no field"),
        (lambda k: {"cls": "7000000000"}, "has label 7000000000, but only 9 images"),
        (lambda k: {"cls": "-1"}, "label -1 is none of its"),
        (lambda k: {"cls": "0", "jpg": b"x"}, "sample 0000 has 2 images"),
    ],
)
def test_shards_that_cannot_be_used_are_refused_with_the_reason(label, message, tmp_path, capsys):
    write(tmp_path / "shards" / "train-1.tar", samples(9, label))
    assert message in refused(capsys, tmp_path / "shards", tmp_path / "out")


def test_a_shard_of_no_split_beside_others_is_named(shards, tmp_path, capsys):
    write(shards / "more.tar", samples(3))
    assert "more.tar: its name says no split" in refused(capsys, shards, tmp_path / "out")


def test_a_truncated_shard_is_named(shards, tmp_path, capsys):
    path = shards / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:50_000])
    assert "train-000001.tar: damaged shard" in refused(capsys, shards, tmp_path / "out")


def test_a_tar_of_an_image_folder_is_no_shard(tmp_path):
    with tarfile.open(tmp_path / "folder.tar", "w") as archive:
        for k in range(8):
            member = tarfile.TarInfo(f"{('train', 'val')[k % 2]}/{'ab'[k // 4]}/{k}.png")
            data = picture(k)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert main(["convert", str(tmp_path / "folder.tar"), str(tmp_path / "out")]) == 0
    assert read_manifest(tmp_path / "out").request["layout"] == "image-folder"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE", 0.001)


@pytest.mark.parametrize(
    "faults", [Faults(), Faults(throttle_every=2), Faults(cut_every=2), Faults(delay=0.1)]
)
def test_shards_in_a_failing_bucket_arrive_whole(s3, shards, tmp_path, quick, faults, capsys):
    bucket = s3.bucket("shards", shards)
    s3.faults = faults
    out = tmp_path / "out"
    assert main(["convert", bucket, str(out)]) == 0
    assert_same(out, shards)
    assert read_manifest(out).name == "shards"
    assert {path.name for path in out.iterdir()} == {"array", "manifest.json"}


def test_what_is_unchanged_behind_a_url_is_not_fetched_again(s3, shards, tmp_path, capsys):
    bucket, out = s3.bucket("shards", shards), tmp_path / "out"
    assert main(["convert", bucket, str(out)]) == 0
    s3.gets.clear()
    assert main(["convert", bucket, str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["convert", bucket, str(out), "--image-size", "32"]) == 2
    assert "was converted with --image-size 64, not 32" in capsys.readouterr().err
    assert not s3.gets
    undecoded = ["convert", bucket, str(tmp_path / "copy"), "--formats", "tar", "--undecoded"]
    assert main(undecoded) == 0
    s3.gets.clear()
    assert main(undecoded) == 0 and not s3.gets
    # A file beside them makes another listing: they are fetched, and recognised by its content.
    (shards / "README.md").write_text("More.")
    s3.bucket("more", shards)
    assert main(["convert", "s3://more", str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().out and s3.gets
    write(shards / "val-000000.tar", samples(6))
    assert main(["convert", s3.bucket("other", shards), str(out)]) == 2
    assert "was converted from other originals" in capsys.readouterr().err


def test_a_format_can_be_added_from_a_bucket(s3, shards, tmp_path):
    bucket, out = s3.bucket("shards", shards), tmp_path / "out"
    assert main(["convert", bucket, str(out)]) == 0
    assert main(["convert", bucket, str(out), "--formats", "array,tar"]) == 0
    assert_same(out, out / "tar")


@pytest.mark.parametrize("faults", [Faults(throttle_every=1), Faults(cut_every=1)])
def test_a_bucket_that_always_fails_ends_in_one_line(
    s3, shards, tmp_path, quick, faults, capsys, monkeypatch
):
    monkeypatch.setattr(remote, "_TRIES", 2)
    bucket = s3.bucket("shards", shards)
    s3.faults = faults
    assert "cannot be read in 2 tries" in refused(capsys, bucket, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_bucket_without_credentials_or_without_anything_is_one_line(
    s3, tmp_path, capsys, monkeypatch
):
    assert "no such file or folder" in refused(capsys, "s3://nowhere/x", tmp_path / "out")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    assert "no credentials" in refused(capsys, "s3://nowhere/x", tmp_path / "out")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None: ...


def test_an_archive_in_a_bucket_and_on_a_web_server_is_read(s3, synth_source, tmp_path, capsys):
    folder = tmp_path / "files"
    folder.mkdir()
    with tarfile.open(folder / "tiny.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(synth_source, "tiny")
    assert main(["convert", str(synth_source), str(tmp_path / "expected")]) == 0
    bucket = s3.bucket("archives", folder)
    assert main(["convert", f"{bucket}/tiny.tar.gz", str(tmp_path / "out")]) == 0
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert main(["convert", f"{url}/tiny.tar.gz", str(tmp_path / "web")]) == 0
        line = refused(capsys, f"{url}/other.zip", tmp_path / "other")
        assert "cannot be read" in line and "404" in line
        server.shutdown()
    for name in ("out", "web"):
        for path in (tmp_path / "expected" / "array").iterdir():
            assert (tmp_path / name / "array" / path.name).read_bytes() == path.read_bytes()


def test_more_than_the_disk_holds_is_not_fetched(s3, shards, tmp_path, capsys, monkeypatch):
    from fastlab.dataset.sources import fetching

    usage = fetching.shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: usage)
    bucket = s3.bucket("shards", shards)
    assert "whose disk has 0.0 GB free" in refused(capsys, bucket, tmp_path / "out")
    assert not s3.gets


@pytest.mark.multiprocess
def test_an_interrupted_fetch_leaves_nothing_behind(s3, shards, tmp_path):
    bucket = s3.bucket("shards", shards)
    s3.faults = Faults(delay=5)
    command = [sys.executable, "-m", "fastlab", "convert", bucket, str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert wait_until(lambda: s3.gets, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "fastlab: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
