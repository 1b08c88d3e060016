"""Read-only file trees: a directory, a zip and a tar, all read without unpacking.

Paths are relative, with "/" between their parts. A tree may be used in forked worker processes.
"""

import bz2
import gzip
import lzma
import mmap
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlab.errors import UserError

# What zipfile, tarfile and the decompressors raise on bytes that are not what they expect.
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
_HEADER = 512  # bytes, of a tar's header and of its blocks
_USTAR, _GNU = (np.frombuffer(magic, np.uint8) for magic in (b"ustar\x0000", b"ustar  \0"))
COMPRESSED_TAR = (".tar.xz", ".txz", ".tar.gz", ".tgz", ".tar.bz2")


class Stamp(NamedTuple):
    """What tells whether a file changed: its size in bytes, and its checksum or time of change."""

    size: int
    version: int


class DamagedMember(OSError):
    """A file of an archive that cannot be read."""


class Tree(ABC):
    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Sorted names directly in `folder` ("" is the root); empty where there is none.
        Raises OSError."""

    @abstractmethod
    def read(self, path: str) -> tuple[bytes, Stamp]:
        """The bytes of a file and its stamp. Raises OSError."""

    @abstractmethod
    def _stamp(self, path: str) -> Stamp:
        """Raises OSError."""

    def stamp(self, path: str) -> Stamp:
        """Raises `UserError` where there is no such file."""
        try:
            return self._stamp(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None

    def text(self, path: str) -> str:
        try:
            return self.read(path)[0].decode("utf-8", errors="replace")
        except OSError as error:
            raise OSError(f"{path}: {error.strerror or error}") from None


class DirectoryTree(Tree):
    def __init__(self, root: Path) -> None:
        self._root = f"{root}/"
        # Opening by a path below a directory that is open walks fewer folders: 100,000 times.
        self._descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self._root + folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, path: str) -> tuple[bytes, Stamp]:
        # Bare system calls: `open` costs half as much again, and there are 100,000 files to open.
        descriptor = os.open(path, os.O_RDONLY, dir_fd=self._descriptor)
        try:
            status = os.fstat(descriptor)
            return os.read(descriptor, status.st_size), Stamp(status.st_size, status.st_mtime_ns)
        finally:
            os.close(descriptor)

    def _stamp(self, path: str) -> Stamp:
        status = os.stat(path, dir_fd=self._descriptor)
        return Stamp(status.st_size, status.st_mtime_ns)


class _Members(Tree):
    """The folders of an archive, from the names of its files."""

    def __init__(self, paths: list[str]) -> None:
        folders: dict[str, set[str]] = {}
        for path in paths:
            folder, _, name = path.rpartition("/")
            if folder not in folders:
                _add_folder(folders, folder)
            folders[folder].add(name)
        self._folders = {folder: sorted(names) for folder, names in folders.items()}

    def names(self, folder: str) -> list[str]:
        return self._folders.get(folder.rstrip("/"), [])


def _add_folder(folders: dict[str, set[str]], folder: str) -> None:
    """`folder`, and its name in each folder above it."""
    folders[folder] = set()
    while folder:
        folder, _, name = folder.rpartition("/")
        known = folder in folders
        folders.setdefault(folder, set()).add(name)
        if known:
            return


class ZipTree(_Members):
    def __init__(self, path: Path) -> None:
        self._bytes = _map(path)
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
        self._members = {member.filename: member for member in members}
        if len(self._members) < len(members):
            raise zipfile.BadZipFile("two members have the same name")
        super().__init__(list(self._members))

    def read(self, path: str) -> tuple[bytes, Stamp]:
        member = self._member(path)
        if member.flag_bits & 1:
            raise DamagedMember("encrypted")
        # The local header repeats the name, with an extra field of another length.
        start = member.header_offset + 30
        header = self._bytes[member.header_offset : start]
        if header[:4] != b"PK\x03\x04":
            raise DamagedMember("no local header")
        start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = self._bytes[start : start + member.compress_size]
        data = _inflate(data, member)
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
        # One byte past the promised size is enough to notice a bomb.
        return zlib.decompressobj(-15).decompress(data, member.file_size + 1)
    except zlib.error as error:
        raise DamagedMember(str(error)) from None


class TarTree(_Members):
    def __init__(self, path: Path) -> None:
        self._bytes = _map(path)
        # Start, size, time of change; None for a link that leads nowhere in the archive.
        self._members: dict[str, tuple[int, int, int] | None] = _plain_members(self._bytes) or {}
        if not self._members:
            self._read_members(path)
        super().__init__(list(self._members))

    def _read_members(self, path: Path) -> None:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile():
                    self._members[name] = (member.offset_data, member.size, int(member.mtime))
                elif member.islnk():  # a further name of a file that came before
                    self._members[name] = self._members.get(member.linkname.removeprefix("./"))
                elif member.issym():
                    self._members[name] = None
            # tarfile takes a cut between two members, or a damaged header, for the end.
            if self._bytes[archive.offset : archive.offset + 512] != bytes(512):
                raise tarfile.ReadError("cut short, or a damaged header")

    def read(self, path: str) -> tuple[bytes, Stamp]:
        start, size, changed = self._member(path)
        data = self._bytes[start : start + size]
        if len(data) != size:
            raise DamagedMember("cut short")
        return data, Stamp(size, changed)

    def _stamp(self, path: str) -> Stamp:
        return Stamp(*self._member(path)[1:])

    def _member(self, path: str) -> tuple[int, int, int]:
        if path not in self._members:
            raise DamagedMember("no such file in the archive")
        found = self._members[path]
        if found is None:
            raise DamagedMember("a link; pack the archive again with tar --dereference")
        return found


def _plain_members(data: mmap.mmap) -> dict[str, tuple[int, int, int]] | None:
    """The files of a tar of nothing but files and folders with short names, in a fraction of
    tarfile's time; None for any other tar, and wherever something is not as it should be."""
    starts: list[int] = []
    end = 0
    try:
        while (size := data[end + 124 : end + 135]) != bytes(11):
            if not size.isdigit():  # a sign would lead back, and round and round
                return None
            starts.append(end)
            end += _HEADER + -(-int(size, 8) // _HEADER) * _HEADER
        if data[end : end + _HEADER] != bytes(_HEADER):
            return None
        blocks = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), _HEADER)
        members: dict[str, tuple[int, int, int]] = {}
        for first in range(0, len(starts), 1024):
            some = np.array(starts[first : first + 1024])
            members.update(_plain_files(blocks[some], some))
    except ValueError:  # of this module, or of a size in another form
        return None
    return members


def _plain_files(
    headers: np.ndarray, starts: np.ndarray
) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """`headers`: uint8 [n, 512]. Raises ValueError where one is not plain, or not whole."""
    sizes, times, sums = _octal(headers, 124, 11), _octal(headers, 136, 11), _octal(headers, 148, 6)
    headers[:, 148:156] = ord(" ")  # as POSIX sums them
    folders = headers[:, 156] == ord("5")
    posix = (headers[:, 257:265] == _USTAR).all(axis=1)
    if not (
        (headers.sum(axis=1, dtype=np.int64) == sums).all()
        and (folders | (headers[:, 156] == ord("0"))).all()
        and (posix | (headers[:, 257:265] == _GNU).all(axis=1)).all()
        and not sizes[folders].any()
        and not (posix & (headers[:, 345] != 0)).any()  # the start of a name over 100 characters
    ):
        raise ValueError("not plain")
    files = ~folders
    names = np.ascontiguousarray(headers[files, :100]).view("S100")[:, 0].tolist()
    texts = b"/\n".join(names).decode("utf-8", "surrogateescape").split("/\n")
    places = (starts[files] + _HEADER).tolist(), sizes[files].tolist(), times[files].tolist()
    return zip(
        (text.partition("\0")[0].removeprefix("./") for text in texts),
        zip(*places, strict=True),
        strict=True,
    )


def _octal(headers: np.ndarray, first: int, digits: int) -> np.ndarray:
    """The numbers of that many octal digits at `first`. Raises ValueError for any other form."""
    found = headers[:, first : first + digits] - np.uint8(ord("0"))
    after = headers[:, first + digits]
    if (found > 7).any() or not ((after == 0) | (after == ord(" "))).all():
        raise ValueError("a number")
    return found @ (8 ** np.arange(digits - 1, -1, -1, dtype=np.int64))


def open_tree(source: Path, scratch: Path) -> Tree:
    """The tree of a directory, ``.zip``, ``.tar`` or compressed tar (which is unpacked to one plain
    tar in `scratch`, since it can only be read in order).

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
        shutil.copyfileobj(packed, plain, 1 << 20)
    return target


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise EOFError("the file is empty") from None
