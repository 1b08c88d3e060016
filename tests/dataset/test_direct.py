import errno
import fcntl
import mmap
import os

import numpy as np
import pytest

from fastlab.dataset import direct
from fastlab.dataset.direct import ALIGNMENT, DirectFile


def pages(count: int, seed: int = 0) -> np.ndarray:
    """uint8, in memory that starts on a page."""
    data = np.frombuffer(mmap.mmap(-1, count * ALIGNMENT), dtype=np.uint8)
    data[:] = np.random.default_rng(seed).integers(0, 256, len(data), dtype=np.uint8)
    return data


def is_direct(file: DirectFile) -> bool:
    return bool(fcntl.fcntl(file._file, fcntl.F_GETFL) & os.O_DIRECT)


def written(path, parts) -> tuple[bytes, DirectFile]:
    file = DirectFile(path)
    for part in parts:
        file.write(memoryview(part))
    file.close()
    return path.read_bytes(), file


def test_aligned_and_other_pieces_follow_each_other(tmp_path):
    whole = pages(9)
    parts = [whole[:4096], whole[4096:20480], whole[20480:20485], whole[20485:], b"", b"end"]
    found, file = written(tmp_path / "x", parts)
    assert found == b"".join(map(bytes, parts))
    assert file.size == len(found)


def test_memory_that_is_not_aligned_is_written_all_the_same(tmp_path):
    whole = pages(3)
    assert written(tmp_path / "x", [whole[1:4097]])[0] == bytes(whole[1:4097])


@pytest.mark.parametrize("refused", ["flag", "write"])
def test_a_file_system_without_direct_writing(tmp_path, monkeypatch, refused):
    set_flags, write = fcntl.fcntl, os.write

    def fcntl_(file, command, *flags):
        if refused == "flag" and flags and flags[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return set_flags(file, command, *flags)

    def write_(file, data):
        if set_flags(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, data)

    monkeypatch.setattr(fcntl, "fcntl", fcntl_)
    monkeypatch.setattr(os, "write", write_)
    whole = pages(4)
    assert written(tmp_path / "x", [whole[:8192], whole[8192:]])[0] == bytes(whole)


def test_a_slow_disk_is_written_through_the_page_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(direct, "_TRIAL", 8192)
    monkeypatch.setattr(direct, "_ENOUGH", float("inf"))
    whole = pages(6)
    file = DirectFile(tmp_path / "x")
    before = is_direct(file)
    for first in range(0, len(whole), 4096):
        file.write(memoryview(whole[first : first + 4096]))
        assert is_direct(file) == (before and file.size <= 8192)
    file.close()
    assert (tmp_path / "x").read_bytes() == bytes(whole)


def test_other_errors_are_the_callers(tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = DirectFile(tmp_path / "x")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        file.write(memoryview(pages(1)))
    file.close()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "x")
