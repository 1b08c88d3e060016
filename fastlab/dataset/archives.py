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
_MAGIC = slice(257, 265)  # where in the header
_USTAR, _GNU = b"ustar\x0000", b"ustar  \0"
_MARK = slice(260, 264)  # the part of it that is a word of 32 bits
COMPRESSED_TAR = (".tar.xz", ".txz", ".tar.gz", ".tgz", ".tar.bz2")


class Stamp(NamedTuple):
    """What tells whether a file changed: its size in bytes, and its checksum or time of change."""

    size: int
    version: int


_UNREADABLE = Stamp(0, 0)


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

    def read_many(self, paths: list[str]) -> tuple[list[bytes | OSError], np.ndarray]:
        """For each path its bytes, or why there are none, and its stamp: int64 [paths, 2]."""
        found: list[bytes | OSError] = []
        stamps = []
        for path in paths:
            try:
                data, stamp = self.read(path)
            except OSError as error:
                data, stamp = error, _UNREADABLE
            found.append(data)
            stamps.append(stamp)
        return found, np.array(stamps, dtype=np.int64).reshape(-1, 2)

    @abstractmethod
    def _stamp(self, path: str) -> Stamp:
        """Raises OSError."""

    def stamp(self, path: str) -> Stamp:
        """Zeros for a file that cannot be read, as in `read_many`."""
        try:
            return self._stamp(path)
        except OSError:
            return _UNREADABLE

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
        # Without waiting, should it be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._descriptor)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedMember("no regular file")
            return os.read(descriptor, status.st_size), Stamp(status.st_size, status.st_mtime_ns)
        finally:
            os.close(descriptor)

    def _stamp(self, path: str) -> Stamp:
        status = os.stat(path, dir_fd=self._descriptor)
        return Stamp(status.st_size, status.st_mtime_ns)


class _Members(Tree):
    """The folders of an archive, from the names of its files."""

    def __init__(self, paths: list[str]) -> None:
        folders: dict[str, list[str]] = {}
        parts = map(str.rpartition, paths, itertools.repeat("/"))
        # Archives keep the files of a folder together; otherwise the groups are many, no more.
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


class ZipTree(_Members):
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
        found = _plain_members(self._bytes) or _any_members(path, self._bytes)
        self._rows = dict(zip(found.names, range(len(found.names)), strict=True))
        self._places = np.vstack([found.places, (-1, 0, 0)])  # the last: of what is not there
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
            return super().read_many(paths)  # which says what is wrong with each
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


_LINK, _SPARSE = -1, -2
_UNUSABLE = {
    _LINK: "a link; pack the archive again with tar --dereference",
    _SPARSE: "stored as a sparse file; pack the archive again without --sparse",
}


class _TarMembers(NamedTuple):
    """The files of a tar; of several with the same name the last counts."""

    names: list[str]
    places: np.ndarray
    """int64 [files, 3]: start (or why there is none, of `_UNUSABLE`), size, time of change."""


def _any_members(path: Path, data: mmap.mmap) -> _TarMembers:
    members: dict[str, tuple[int, int, int]] = {}
    nowhere = (_LINK, 0, 0)
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.issparse():
                members[name] = (_SPARSE, 0, 0)
            elif member.isfile():
                members[name] = (member.offset_data, member.size, int(member.mtime))
            elif member.islnk():  # a further name of a file that came before
                members[name] = members.get(member.linkname.removeprefix("./"), nowhere)
            elif member.issym():
                members[name] = nowhere
        # tarfile takes a cut between two members, or a damaged header, for the end.
        if data[archive.offset : archive.offset + _HEADER] != bytes(_HEADER):
            raise tarfile.ReadError("cut short, or a damaged header")
    return _TarMembers(list(members), np.array(list(members.values()), np.int64).reshape(-1, 3))


def _plain_members(data: mmap.mmap) -> _TarMembers | None:
    """The files of a tar of nothing but files and folders with short names, in a fraction of
    tarfile's time; None for any other tar, and wherever something is not as it should be."""
    blocks = np.frombuffer(data, np.uint8, len(data) // _HEADER * _HEADER).reshape(-1, _HEADER)
    words = blocks.view(np.uint32)[:, _MARK.start // 4].copy()
    posix, gnu = (np.frombuffer(magic[3:7], np.uint32) for magic in (_USTAR, _GNU))
    headers = np.flatnonzero((words == posix) | (words == gnu))
    names: list[str] = []
    places = []
    end = 0  # block where the next header has to be
    try:
        for first in range(0, len(headers), 1024):
            some = headers[first : first + 1024]
            found = _plain_files(blocks[some], some * _HEADER)
            ends = some + 1 + -(-found.sizes // _HEADER)
            if some[0] != end or (some[1:] != ends[:-1]).any():
                return None  # something else is between them, or looks like one of them
            end = ends[-1]
            names += found.names
            places.append(found.places)
    except ValueError:
        return None
    if not places or end >= len(blocks) or blocks[end].any():
        return None
    return _TarMembers(names, np.concatenate(places))


class _PlainFiles(NamedTuple):
    sizes: np.ndarray  # int64 [headers], of folders too
    names: list[str]  # of files alone
    places: np.ndarray


def _plain_files(headers: np.ndarray, starts: np.ndarray) -> _PlainFiles:
    """`headers`: uint8 [n, 512]. Raises ValueError where one is not plain, or not whole."""
    sizes, times, sums = _octal(headers, 124, 11), _octal(headers, 136, 11), _octal(headers, 148, 6)
    headers[:, 148:156] = ord(" ")  # as POSIX sums them
    folders = headers[:, 156] == ord("5")
    magic = np.ascontiguousarray(headers[:, _MAGIC]).view("S8")[:, 0]
    posix = magic == _USTAR
    if not (
        (_row_sums(headers) == sums).all()
        and (folders | (headers[:, 156] == ord("0"))).all()
        and (posix | (magic == _GNU.rstrip(b"\0"))).all()
        and not sizes[folders].any()
        and not (posix & (headers[:, 345] != 0)).any()  # the start of a name over 100 characters
    ):
        raise ValueError("not plain")
    files = ~folders
    places = np.stack([starts[files] + _HEADER, sizes[files], times[files]], axis=1)
    return _PlainFiles(sizes, _names(headers[files, :100]), places)


def _names(fields: np.ndarray) -> list[str]:
    """`fields`: uint8 [n, 100]. Raises ValueError where they cannot be told apart."""
    if not len(fields):
        return []
    # All at once, with a separator that only a name of several lines can hold.
    text = b"/\n".join(np.ascontiguousarray(fields).view("S100")[:, 0].tolist())
    names = text.decode("utf-8", "surrogateescape").split("/\n")
    if len(names) != len(fields):
        raise ValueError("a name of several lines")
    if b"\0" in text or b"./" in text:
        names = [name.partition("\0")[0].removeprefix("./") for name in names]
    return names


def _row_sums(rows: np.ndarray) -> np.ndarray:
    """uint64 [n]: of uint8 [n, 512], four sums of 16 bits side by side in each word."""
    words, low = rows.view(np.uint64), np.uint64(0x00FF00FF00FF00FF)
    lanes = ((words & low) + ((words >> np.uint64(8)) & low)).sum(axis=1)
    return lanes.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.uint64)


def _octal(headers: np.ndarray, first: int, digits: int) -> np.ndarray:
    """The numbers of that many octal digits at `first`. Raises ValueError for any other form."""
    found = headers[:, first : first + digits] - np.uint8(ord("0"))
    after = headers[:, first + digits]
    if (found > 7).any() or not ((after == 0) | (after == ord(" "))).all():
        raise ValueError("a number")
    # 11 digits are 33 bits: exact in double precision, which numpy multiplies much faster.
    return (found @ 8.0 ** np.arange(digits - 1, -1, -1)).astype(np.int64)


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
        while data := packed.read(1 << 20):
            _write(plain, data, target)
    return target


def _write(file: BinaryIO, data: bytes, path: Path) -> None:
    try:
        file.write(data)
        file.flush()
    except OSError as error:  # apart from those of the source
        raise UserError(f"{path.parent}: cannot be written ({error.strerror})") from None


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise EOFError("the file is empty") from None
