import hashlib
import os
import sys

import pytest

from fastlab.console import UserError
from fastlab.dataset import remote
from fastlab.dataset.remote import FetchStopped, Remote, is_remote
from tests.s3 import Faults


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "below").mkdir(parents=True)
    (path / "a.bin").write_bytes(os.urandom(300_000))
    (path / "below" / "b.bin").write_bytes(b"b" * 10)
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    monkeypatch.setattr(remote, "_TRIES", 2)


def test_a_url_is_remote_and_a_path_is_not():
    assert is_remote("s3://bucket/folder") and is_remote("https://host/file.tar")
    assert not is_remote("data/folder") and not is_remote("data/a:b")


def test_files_of_a_bucket_are_listed_with_size_and_version(s3, folder):
    files = Remote(s3.bucket("photos", folder)).files()
    assert list(files) == ["a.bin", "below/b.bin"]
    assert files["below/b.bin"].size == 10
    assert files["below/b.bin"].version == hashlib.md5(b"b" * 10).hexdigest()  # an S3 ETag


@pytest.mark.parametrize(
    "faults", [Faults(throttle_every=2), Faults(cut_every=2), Faults(delay=0.2)]
)
def test_files_arrive_whole_from_a_failing_server(s3, folder, tmp_path, quick, faults):
    bucket = Remote(s3.bucket("photos", folder))
    s3.faults = faults
    for _ in range(3):
        bucket.fetch("a.bin", tmp_path / "copy", 300_000)
        assert (tmp_path / "copy").read_bytes() == (folder / "a.bin").read_bytes()
        assert bucket.read("below/b.bin") == b"b" * 10
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["copy"]


def test_a_server_that_always_fails_ends_in_one_line(s3, folder, tmp_path, quick):
    bucket = Remote(s3.bucket("photos", folder))
    s3.faults = Faults(cut_every=1)
    with pytest.raises(UserError, match=r"^s3://photos/a.bin: cannot be read in 2 tries \(.+\)$"):
        bucket.fetch("a.bin", tmp_path / "copy", 300_000)
    assert not list(tmp_path.glob("*copy*")) and not list(tmp_path.glob(".*"))


def test_a_fetch_ends_in_the_middle_when_told_to(s3, folder, tmp_path):
    bucket = Remote(s3.bucket("photos", folder))
    partial = tmp_path / ".copy.partial"

    def arrived(size: int) -> None:
        if size and partial.exists():
            raise FetchStopped

    with pytest.raises(FetchStopped):
        bucket.fetch("a.bin", tmp_path / "copy", 300_000, arrived)
    assert not partial.exists() and not (tmp_path / "copy").exists()


def test_a_missing_file_is_named_at_once(s3, folder, tmp_path):
    bucket = Remote(s3.bucket("photos", folder))
    with pytest.raises(
        UserError, match=r"^s3://photos/c.bin: cannot be read \(no such file or folder\)$"
    ):
        bucket.fetch("c.bin", tmp_path / "copy")
    with pytest.raises(UserError, match=r"s3://photos/nothing: .*no such file or folder"):
        Remote("s3://photos/nothing").files()


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^gs://bucket: .*gcsfs.*pip install .*\[remote\]"):
        Remote("gs://bucket")


def test_an_unknown_scheme_is_named():
    with pytest.raises(UserError, match="nowhere://x: cannot be opened"):
        Remote("nowhere://x")
