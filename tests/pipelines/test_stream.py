"""Shards from a URL: the batches of the local dataset, and what the cache promises."""

import fcntl
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlab import train as training
from fastlab.cli import main
from fastlab.config import AugmentConfig
from fastlab.console import UserError
from fastlab.dataset.convert import Options, convert
from fastlab.dataset.formats import Settings
from fastlab.dataset.manifest import FileInfo, check_sizes, describe_file, read_manifest
from fastlab.dataset.remote import FetchStopped, Remote
from fastlab.dataset.shard_cache import CachedFiles
from fastlab.predict import evaluate_run
from pipelines import make_pipeline
from tests.pipelines.specs import spec
from tests.s3 import Faults
from tests.trainings import assert_same_run, command

AUGMENT = AugmentConfig(flip=True, translate=4)


@pytest.fixture(scope="module")
def dataset(synth_source, tmp_path_factory):
    """80 training images in 10 shards."""
    path = tmp_path_factory.mktemp("stream") / "dataset"
    convert(
        synth_source, path, Options(formats=("array", "tar"), settings=Settings(shard_images=8))
    )
    return path


def stream(path, cache: Path, split: str = "train", changes: dict | None = None, **options):
    """The pipeline of the dataset at `path`, a folder or a URL, with a window of two shards."""
    made = spec(path, "stream", split, **options)
    data = replace(made.data, cache=str(cache), window=2, **(changes or {}))
    return make_pipeline(replace(made, data=data))


def copied(batches):
    return [batch.clone() for batch in batches]


def assert_equal(batches, expected):
    assert len(batches) == len(expected) > 0
    for batch, reference in zip(batches, expected, strict=True):
        for part, same in zip(batch[:3], reference[:3], strict=True):
            assert torch.equal(part, same)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_url_gives_the_batches_of_the_local_dataset(s3, dataset, tmp_path, split):
    url = s3.bucket("data", dataset)
    for rank in range(2):
        options = {"augment": AUGMENT if split == "train" else None, "rank": rank, "world": 2}
        here = stream(dataset, tmp_path, split, **options)
        there = stream(url, tmp_path / "cache", split, **options)
        for epoch, start in ((0, 0), (1, 1)):
            assert_equal(copied(there.epoch(epoch, start)), copied(here.epoch(epoch, start)))
    if split == "train":
        shards = Counter(path for path in s3.gets if path.endswith(".tar"))
        assert len(shards) == 10 and set(shards.values()) == {1}


def test_lanes_divide_the_shards_among_machines(s3, dataset, tmp_path):
    url, lanes = s3.bucket("data", dataset), {"lanes": 2}
    for epoch in range(2):
        whole = copied(stream(dataset, tmp_path, changes=lanes, batch=8).epoch(epoch))
        fetched, shares = [], []
        for rank in range(2):
            s3.gets.clear()
            cache = tmp_path / f"cache-{epoch}-{rank}"  # of a machine of its own
            data = stream(url, cache, changes=lanes, batch=8, rank=rank, world=2)
            shares.append(copied(data.epoch(epoch)))
            fetched.append([path for path in s3.gets if path.endswith(".tar")])
        assert [len(paths) for paths in fetched] == [5, 5]
        assert len({*fetched[0], *fetched[1]}) == 10
        for batch, *halves in zip(whole, *shares, strict=True):
            assert torch.equal(torch.cat([half.images for half in halves]), batch.images)


@pytest.mark.parametrize("faults", [Faults(throttle_every=8), Faults(cut_every=8)])
def test_a_failing_server_changes_nothing(s3, dataset, tmp_path, faults):
    url = s3.bucket("data", dataset)
    s3.faults = faults
    expected = copied(stream(dataset, tmp_path).epoch(0))
    assert_equal(copied(stream(url, tmp_path / "cache").epoch(0)), expected)


def test_a_shard_that_is_removed_ends_the_epoch_in_one_line(s3, dataset, tmp_path):
    url = s3.bucket("data", dataset)
    data = stream(url, tmp_path / "cache")
    Remote(url)._fs.rm_file("data/tar/train-000003.tar")
    with pytest.raises(UserError, match=r"^s3://data/tar/train-000003\.tar: cannot be read"):
        list(data.epoch(0))


def test_an_epoch_left_early_leaves_no_thread_and_no_partial_file(s3, dataset, tmp_path):
    data = stream(s3.bucket("data", dataset), tmp_path / "cache")
    for epoch in range(3):
        batches = data.epoch(epoch)
        next(batches)
        batches.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("pipeline")]
    assert not [path for path in (tmp_path / "cache").iterdir() if "arrived" in path.name]


def test_only_the_stream_engine_reads_a_url(s3, dataset):
    with pytest.raises(
        UserError, match=r'^data\.path = "s3://data": only data\.pipeline = "stream"'
    ):
        make_pipeline(spec(s3.bucket("data", dataset), "torchvision"))


def test_a_missing_file_behind_a_url_is_named_at_the_start(s3, dataset):
    url = s3.bucket("data", dataset)
    Remote(url)._fs.rm_file("data/tar/train-000003.tar")
    with pytest.raises(UserError, match=r"^s3://data/tar/train-000003\.tar: missing; copy"):
        check_sizes(url, read_manifest(url))


def test_a_dataset_that_was_replaced_behind_its_url_is_refused(s3, dataset, tmp_path, synth_source):
    url = s3.bucket("data", dataset)
    before = spec(url, "stream")
    convert(synth_source, tmp_path / "other", Options(formats=("tar",), classes="2"))
    Remote(url)._fs.put_file(str(tmp_path / "other" / "manifest.json"), "data/manifest.json")
    with pytest.raises(UserError, match="was replaced by another dataset"):
        make_pipeline(replace(before, data=replace(before.data, cache=str(tmp_path / "cache"))))


def test_a_cache_that_is_too_small_is_refused_with_the_size_that_it_needs(s3, dataset, tmp_path):
    url = s3.bucket("data", dataset)
    line = r"^data.cache_gib = 1e-05: two windows of shards take up to 0.001 GiB; set it higher"
    with pytest.raises(UserError, match=line):
        stream(url, tmp_path / "cache", changes={"cache_gib": 1e-5})


def test_a_batch_that_the_lanes_do_not_divide_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match=r"^train.batch_size = 16: .* multiple of data.lanes = 3"):
        stream(dataset, tmp_path, changes={"lanes": 3})


class Cache:
    """A cache of 1000 bytes over four files of 300."""

    def __init__(self, tmp_path: Path) -> None:
        folder = tmp_path / "files"
        folder.mkdir()
        for name in "abcd":
            (folder / name).write_bytes(os.urandom(300))
        self.infos = {name: describe_file(folder / name) for name in "abcd"}
        self.remote, self.folder = Remote(f"file://{folder}"), tmp_path / "c"
        self.fetched: list[str] = []
        self.remote.fetch = self._counted(self.remote.fetch)
        self.files = CachedFiles(self.remote, self.folder, 1000)

    def _counted(self, fetch):
        def counted(name: str, *arguments):
            self.fetched.append(name)
            time.sleep(0.05)  # as long as a server takes, so that others come meanwhile
            fetch(name, *arguments)

        return counted

    def open(self, name: str, *stopped):
        return self.files.open(name, self.infos[name], *stopped)

    def use(self, name: str) -> None:
        """Read the file and let go of it."""
        content = self.open(name)
        assert len(content[:]) == 300

    def kept(self) -> set[str]:
        names = {info.xxh128: name for name, info in self.infos.items()}
        return {names[path.name] for path in self.folder.iterdir() if path.name in names}


@pytest.fixture
def cache(tmp_path) -> Cache:
    pytest.importorskip("fsspec")
    return Cache(tmp_path)


def test_the_file_that_was_used_longest_ago_makes_room(cache):
    for name in "abcad":
        cache.use(name)
    assert cache.kept() == {"a", "c", "d"}
    assert cache.fetched == list("abcd")


def test_a_file_in_use_is_kept_and_others_make_room(cache):
    held = cache.open("a")
    for name in "bcd":
        cache.use(name)
    assert cache.kept() == {"a", "c", "d"}
    assert len(held[:]) == 300
    del held
    cache.use("b")
    assert "a" not in cache.kept()


def test_waiting_for_another_fetch_ends_when_told_to(cache):
    with (cache.folder / f"{cache.infos['a'].xxh128}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FetchStopped):
            cache.open("a", iter([False, False, True]).__next__)
    assert {path.suffix for path in cache.folder.iterdir()} == {".lock"}


def test_other_files_in_the_folder_are_never_removed(cache):
    others = [cache.folder / name for name in ("photo.jpg", "notes.txt", ".hidden", "below/x")]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(2000))
        os.utime(path, (1, 1))
    for name in "abcd":
        cache.use(name)
    assert all(path.stat().st_size == 2000 for path in others)
    assert cache.kept() == {"b", "c", "d"}


def test_files_in_use_may_exceed_the_bound(cache):
    held = [cache.open(name) for name in "abcd"]
    assert cache.kept() == set("abcd") and all(len(content) == 300 for content in held)


def test_a_file_is_fetched_once_by_all_that_want_it_at_the_same_time(cache):
    others = [CachedFiles(cache.remote, cache.folder, 1000) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        contents = list(pool.map(lambda files: files.open("a", cache.infos["a"])[:], others))
    assert len(set(contents)) == 1 and cache.fetched == ["a"]


@pytest.mark.parametrize("damage", [b"", b"short", bytes(301)])
def test_a_file_of_another_size_in_the_cache_is_fetched_again(cache, damage):
    path = cache.folder / cache.infos["a"].xxh128
    path.write_bytes(damage)
    cache.use("a")
    assert describe_file(path) == cache.infos["a"]


def test_what_a_killed_fetch_left_is_overwritten_or_removed(cache):
    name = cache.infos["a"].xxh128
    left = [cache.folder / f".{name}.arrived.partial", cache.folder / f"{name}.arrived"]
    for path in left:
        path.write_bytes(bytes(200))
        os.utime(path, (1, 1))
    for each in "bcd":  # to make room
        cache.use(each)
    assert not any(path.exists() for path in left)
    left[0].write_bytes(bytes(200))
    cache.use("a")
    assert not any(path.exists() for path in left)


def test_a_part_of_a_file_that_is_being_fetched_is_not_removed(cache):
    part = cache.folder / f".{cache.infos['a'].xxh128}.arrived.partial"
    part.write_bytes(bytes(900))
    os.utime(part, (1, 1))
    with (cache.folder / f"{cache.infos['a'].xxh128}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.use("b")
    assert part.exists()


def test_another_content_than_that_of_the_manifest_is_refused(cache):
    other = FileInfo(300, "0" * 32)
    with pytest.raises(UserError, match=r"^file://\S+/a: damaged, or of another dataset \(XXH128"):
        cache.files.open("a", other)
    assert not [path for path in cache.folder.iterdir() if path.suffix != ".lock"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, cache):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UserError, match=r"file/c: cannot hold the stream's cache .*set data\.cache"
    ):
        CachedFiles(cache.remote, tmp_path / "file" / "c", 1000)


def test_a_full_disk_is_named(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.remote._fs, "get_file", full)
    with pytest.raises(UserError, match=r"^\S+/c: cannot hold the stream's cache \(No space left"):
        cache.open("a")


def test_a_run_is_trained_resumed_and_evaluated_from_a_url(s3, dataset, tmp_path, capsys):
    """It equals the run of the local dataset. The URL is read through another cache each time."""
    url = s3.bucket("data", dataset)
    sets = ["data.pipeline=stream", "data.window=2", "train.compile=false", "train.epochs=2"]
    sets += ["schedule.name=constant", f"data.cache={tmp_path / 'one'}"]
    here = command(dataset, tmp_path / "here", *sets)
    there = command(url, tmp_path / "there", *sets)
    assert training.main(here) == 0 and training.main([*there, "--set", "train.epochs=1"]) == 0
    more = ["--set", "train.epochs=2", "--set", f"data.cache={tmp_path / 'two'}"]
    assert training.main(["--resume", str(tmp_path / "there"), *more]) == 0
    assert_same_run(tmp_path / "there", tmp_path / "here")
    figures = []
    for run, data in (("there", None), ("here", None), ("here", url)):
        figures.append(replace(evaluate_run(tmp_path / run, "val", "best", data), run=""))
    assert len(set(figures)) == 1
    capsys.readouterr()
    assert main(["inspect", url]) == 0 and "4 classes" in capsys.readouterr().out
    assert main(["inspect", url, "--verify"]) == 2
    assert "give a local copy" in capsys.readouterr().err
