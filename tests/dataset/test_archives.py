"""Archives read without unpacking: what they hold, and which damage is noticed."""

import io
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastlab.console import UserError
from fastlab.dataset import tar_members
from fastlab.dataset.archives import TarTree, open_tree

LONG = "folder/" * 18 + "image.png"  # 135 characters: ustar splits it, GNU and pax extend
FILES = {"a/one.png": b"1" * 700, "a/b/two.png": b"", "./three.png": b"3" * 512, LONG: b"4"}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write(path: Path, layout: int, files=FILES, mtime: float = 1_700_000_000) -> Path:
    with tarfile.open(path, "w", format=layout) as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), mtime
            archive.addfile(member, io.BytesIO(data))
    return path


def contents(tree: TarTree, names) -> dict:
    return {name: tree.read(name.removeprefix("./")) for name in names}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("mtime", [0, 1_700_000_000, 1_700_000_000.5])
def test_a_tar_holds_what_tarfile_reads(tmp_path, layout, mtime):
    path = write(tmp_path / "x.tar", FORMATS[layout], mtime=mtime)
    files = contents(TarTree(path), FILES)
    assert {name: data for name, (data, _) in files.items()} == FILES
    assert {stamp.version for _, stamp in files.values()} == {int(mtime)}


@pytest.mark.parametrize("mtime", [0, 1_700_000_000.75])  # the second as webdataset writes it
@pytest.mark.parametrize("layout", FORMATS)
def test_the_quick_listing_equals_that_of_tarfile(tmp_path, monkeypatch, layout, mtime):
    files = {"a/one.png": b"1", "b": b"2" * 5000}
    path = write(tmp_path / "x.tar", FORMATS[layout], files, mtime=mtime)
    quick = TarTree(path)
    assert tar_members.plain_members(quick._bytes)
    monkeypatch.setattr(tar_members, "plain_members", lambda data: {})
    slow = TarTree(path)
    assert quick._members == slow._members and quick._folders == slow._folders
    assert [quick.read(name)[0] for name in ("b", "a/one.png")] == [b"2" * 5000, b"1"]
    assert slow.names("a") == ["one.png"]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("where", [0, 100, 124, 136, 148, 300])
def test_a_damaged_header_is_refused(tmp_path, layout, where):
    path = write(tmp_path / "x.tar", FORMATS[layout], {f"{i}.png": bytes(9) for i in range(9)})
    data = bytearray(path.read_bytes())
    data[512 + 3 * 1024 + where] ^= 5  # in the header of the fourth file
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged archive"):
        open_tree(path, tmp_path)


@pytest.mark.parametrize("end", [0, 100, 512, 700, 1024, 1536])
def test_a_tar_cut_short_is_refused(tmp_path, end):
    path = write(tmp_path / "x.tar", tarfile.GNU_FORMAT, {"one.png": bytes(600)})
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(UserError, match="damaged archive"):
        open_tree(path, tmp_path)


def test_a_later_file_of_the_same_name_replaces_the_first(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for data in (b"old", b"newer"):
            member = tarfile.TarInfo("one.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert TarTree(path).read("one.png")[0] == b"newer"


@pytest.mark.timeout(20)
def test_a_negative_size_leads_into_no_endless_loop(tmp_path):
    path = write(tmp_path / "x.tar", tarfile.GNU_FORMAT, {f"{i}.png": bytes(9) for i in range(3)})
    data = bytearray(path.read_bytes())
    data[512 + 1024 + 124 : 512 + 1024 + 135] = b"-0000003000"  # the second file's: 1,536 back
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged archive"):
        open_tree(path, tmp_path)


def test_a_tar_within_a_tar_is_listed_as_a_file(tmp_path):
    inner = write(tmp_path / "inner.tar", tarfile.GNU_FORMAT).read_bytes()
    path = write(tmp_path / "x.tar", tarfile.GNU_FORMAT, {"inner.tar": inner, "b.png": b"b"})
    tree = TarTree(path)
    assert tree.names("") == ["b.png", "inner.tar"]
    assert tree.read("inner.tar")[0] == inner


@pytest.mark.parametrize("kind", ["directory", "zip", "tar"])
def test_every_kind_of_tree_gives_the_bytes_and_the_stamp_of_a_file(tmp_path, kind):
    files = {f"a/{i}.png": bytes([i]) * i for i in range(5)}
    folder = tmp_path / "tree"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    source = {
        "directory": lambda: folder,
        "zip": lambda: tmp_path / "x.zip",
        "tar": lambda: write(tmp_path / "x.tar", tarfile.GNU_FORMAT, files),
    }[kind]()
    tree = open_tree(source, tmp_path)
    for path in ("a/3.png", "a/0.png", "a/4.png"):
        assert tree.read(path) == (files[path], tree.stamp(path))
    with pytest.raises(OSError):
        tree.read("a/none.png")
    assert tree.stamp("a/none.png") == (0, 0)


def test_a_link_that_leads_out_of_the_archive_is_reported(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/elsewhere.png"
        archive.addfile(link)
        member = tarfile.TarInfo("one.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"one"))
    tree = TarTree(path)
    assert tree.read("one.png")[0] == b"one"
    with pytest.raises(OSError, match="--dereference"):
        tree.read("link.png")


def test_a_name_may_have_several_lines(tmp_path):
    files = {"a.png": b"1", "b/\nc.png": b"22", "d\n.png": b"333", "e.png": b"4"}
    tree = TarTree(write(tmp_path / "x.tar", tarfile.GNU_FORMAT, files))
    assert {name: tree.read(name)[0] for name in files} == files
    assert tree.names("b") == ["\nc.png"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_sparse_file_is_reported(tmp_path, form):
    """Its bytes in the archive differ from those of the file."""
    (tmp_path / "x.png").write_bytes(bytes(1 << 20) + b"end")
    os.truncate(tmp_path / "x.png", 2 << 20)
    layout = "--format=gnu" if form == tarfile.GNU_FORMAT else "--format=pax"
    command = ["tar", layout, "--sparse", "-C", str(tmp_path), "-cf", str(tmp_path / "x.tar")]
    subprocess.run([*command, "x.png"], check=True)
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.getmember("x.png").issparse()
    with pytest.raises(OSError, match="without --sparse"):
        TarTree(tmp_path / "x.tar").read("x.png")


def test_names_in_a_zip_may_begin_with_a_dot(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("./train/a/x.png", b"x")
    tree = open_tree(tmp_path / "x.zip", tmp_path)
    assert tree.names("") == ["train"] and tree.read("train/a/x.png")[0] == b"x"


def test_a_full_disk_is_not_reported_as_a_damaged_archive(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("one.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"one"))
    (tmp_path / "source.tar").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        open_tree(tmp_path / "x.tar.gz", tmp_path)
