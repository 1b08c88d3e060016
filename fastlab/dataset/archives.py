"""Read-only file trees: a directory, a zip and a tar, all read without unpacking.

Paths are relative, with "/" between their parts. A tree may be used in forked worker processes.
"""

import bz2
import gzip
import itertools
import lzma
import mmap
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastlab.console import UserError
from fastlab.dataset.tar_members import LINK, SPARSE, list_members

# What zipfile, tarfile and the decompressors raise on damaged bytes.
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    struct.error,
    EOFError,
    ArithmeticError,
    NotImplementedError,
    ValueError,
)
_UNUSABLE = {
    LINK: "a link; pack the archive again with tar --dereference",
    SPARSE: "stored as a sparse file; pack the archive again without --sparse",
}
COMPRESSED_TAR = (".tar.xz", ".txz", ".tar.gz", ".tgz", ".tar.bz2")


class Stamp(NamedTuple):
    """Shows whether a file has changed."""

    size: int
    """Bytes."""
    version: int
    """Checksum, or time of the last change."""


_UNREADABLE = Stamp(0, 0)


class DamagedMember(OSError):
    """A file of a tree that cannot be read."""


class Tree(ABC):
    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Sorted names directly in `folder` ("" is the root); empty where there is no such folder.
        Raises OSError."""

    @abstractmethod
    def read(self, path: str) -> tuple[bytes, Stamp]:
        """The bytes of a file and its stamp. Raises OSError."""

    def read_many(self, paths: list[str]) -> tuple[list[bytes | OSError], np.ndarray]:
        """For each path its bytes, or the error of reading it, and its stamp: int64 [paths, 2]."""
        contents: list[bytes | OSError] = []
        stamps = []
        for path in paths:
            try:
                data, stamp = self.read(path)
            except OSError as error:
                data, stamp = error, _UNREADABLE
            contents.append(data)
            stamps.append(stamp)
        return contents, np.array(stamps, dtype=np.int64).reshape(-1, 2)

    @abstractmethod
    def _stamp(self, path: str) -> Stamp:
        """Raises OSError."""

    def stamp(self, path: str) -> Stamp:
        """The stamp that `read_many` gives: zeros for a file that cannot be read."""
        try:
            return self._stamp(path)
        except OSError:
            return _UNREADABLE

    def text(self, path: str) -> str:
        """Raises OSError."""
        try:
            return self.read(path)[0].decode("utf-8", errors="replace")
        except OSError as error:
            raise OSError(f"{path}: {error.strerror or error}") from None


class DirectoryTree(Tree):
    def __init__(self, root: Path) -> None:
        self._root = f"{root}/"
        # Opening a path relative to an open directory walks fewer folders: 100,000 times.
        self._descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self._root + folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, path: str) -> tuple[bytes, Stamp]:
        # Bare system calls: `open` takes half as long again, and there are 100,000 files to open.
        # O_NONBLOCK, since opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._descriptor)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedMember("not a regular file")
            return os.read(descriptor, status.st_size), Stamp(status.st_size, status.st_mtime_ns)
        finally:
            os.close(descriptor)

    def _stamp(self, path: str) -> Stamp:
        status = os.stat(path, dir_fd=self._descriptor)
        return Stamp(status.st_size, status.st_mtime_ns)


class _ArchiveTree(Tree):
    """An archive, whose folders follow from the paths of its files."""

    def __init__(self, paths: list[str]) -> None:
        folders: dict[str, list[str]] = {}
        parts = map(str.rpartition, paths, itertools.repeat("/"))
        # Archives keep the files of a folder together; if one does not, there are more groups.
        for folder, group in itertools.groupby(parts, itemgetter(0)):
            folders.setdefault(folder, []).extend(map(itemgetter(2), group))
        for folder in list(folders):
            _add_to_parents(folders, folder)
        self._folders = {folder: sorted(set(names)) for folder, names in folders.items()}

    def names(self, folder: str) -> list[str]:
        return self._folders.get(folder.rstrip("/"), [])


def _add_to_parents(folders: dict[str, list[str]], folder: str) -> None:
    while folder:
        folder, _, name = folder.rpartition("/")
        folders.setdefault(folder, []).append(name)


class ZipTree(_ArchiveTree):
    def __init__(self, path: Path) -> None:
        self._bytes = _map(path)
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
        self._members = {member.filename.removeprefix("./"): member for member in members}
        if len(self._members) < len(members):
            raise zipfile.BadZipFile("two members have the same name")
        super().__init__(list(self._members))

    def read(self, path: str) -> tuple[bytes, Stamp]:
        member = self._member(path)
        if member.flag_bits & 1:
            raise DamagedMember("encrypted")
        # The local header repeats the name; the extra field after it may have another length.
        start = member.header_offset + 30
        header = self._bytes[member.header_offset : start]
        if header[:4] != b"PK\x03\x04":
            raise DamagedMember("no local header")
        start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = _inflate(self._bytes[start : start + member.compress_size], member)
        if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
            raise DamagedMember("does not match its checksum")
        return data, Stamp(member.file_size, member.CRC)

    def _stamp(self, path: str) -> Stamp:
        member = self._member(path)
        return Stamp(member.file_size, member.CRC)

    def _member(self, path: str) -> zipfile.ZipInfo:
        if path not in self._members:
            raise DamagedMember("no such file in the archive")
        return self._members[path]


def _inflate(data: bytes, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type == zipfile.ZIP_STORED:
        return data
    if member.compress_type != zipfile.ZIP_DEFLATED:
        raise DamagedMember("compressed by a method other than deflate")
    try:
        # One byte more than the promised size is enough to notice a decompression bomb.
        return zlib.decompressobj(-15).decompress(data, member.file_size + 1)
    except zlib.error as error:
        raise DamagedMember(str(error)) from None


class TarTree(_ArchiveTree):
    def __init__(self, path: Path) -> None:
        self._bytes = _map(path)
        members = list_members(path, self._bytes)
        self._rows = dict(zip(members.names, range(len(members.names)), strict=True))
        self._places = np.vstack([members.places, (-1, 0, 0)])  # row -1: no such file
        super().__init__(list(self._rows))

    def read(self, path: str) -> tuple[bytes, Stamp]:
        start, size, changed = self._place(path)
        data = self._bytes[start : start + size]
        if len(data) != size:
            raise DamagedMember("cut short")
        return data, Stamp(size, changed)

    def read_many(self, paths: list[str]) -> tuple[list[bytes | OSError], np.ndarray]:
        places = self._places[[self._rows.get(path, -1) for path in paths]]
        stops = places[:, 0] + places[:, 1]
        if places[:, 0].min() < 0 or stops.max() > len(self._bytes):
            return super().read_many(paths)  # which gives the error of each
        bounds = zip(places[:, 0].tolist(), stops.tolist(), strict=True)
        return [self._bytes[start:stop] for start, stop in bounds], places[:, 1:]

    def _stamp(self, path: str) -> Stamp:
        return Stamp(*self._place(path)[1:])

    def _place(self, path: str) -> tuple[int, int, int]:
        if path not in self._rows:
            raise DamagedMember("no such file in the archive")
        start, size, changed = self._places[self._rows[path]].tolist()
        if start < 0:
            raise DamagedMember(_UNUSABLE[start])
        return start, size, changed


def open_tree(source: Path, scratch: Path) -> Tree:
    """The tree of a directory, ``.zip``, ``.tar`` or compressed tar. The last can only be read in
    order, so it is unpacked to a plain tar in `scratch`.

    Raises `UserError` where `source` is none of these or cannot be read.
    """
    try:
        return _open_tree(source, scratch)
    except _DAMAGE as error:
        raise UserError(f"{source}: damaged archive ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None


def _open_tree(source: Path, scratch: Path) -> Tree:
    if source.is_dir():
        return DirectoryTree(source)
    if not source.exists():
        raise UserError(f"{source}: no such directory or archive")
    if source.suffix == ".zip" or zipfile.is_zipfile(source):
        return ZipTree(source)
    if source.name.endswith(COMPRESSED_TAR):
        return TarTree(_decompress(source, scratch / "source.tar"))
    if source.suffix == ".tar":
        return TarTree(source)
    raise UserError(f"{source}: expected a directory, .zip, .tar or {', '.join(COMPRESSED_TAR)}")


def _decompress(source: Path, target: Path) -> Path:
    opener = {"z2": bz2.open, "gz": gzip.open}.get(source.name[-2:], lzma.open)
    with opener(source, "rb") as packed, target.open("wb") as plain:
        while data := packed.read(1 << 20):
            _write(plain, data, target)
    return target


def _write(file: BinaryIO, data: bytes, path: Path) -> None:
    try:
        file.write(data)
        file.flush()
    except OSError as error:  # distinguished from those of the source
        raise UserError(f"{path.parent}: cannot be written ({error.strerror})") from None


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise EOFError("the file is empty") from None
