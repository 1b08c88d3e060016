"""The files of a dataset directory, wherever it lies: on this machine, or behind a URL.

Those behind a URL are copied into a cache on this machine, which all its processes share.
"""

import contextlib
import fcntl
import functools
import mmap
import os
import re
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

from fastlab.console import UserError
from fastlab.dataset.manifest import FileInfo, describe_file
from fastlab.dataset.remote import FetchStopped, Remote, is_remote
from fastlab.files import try_flock

_POLL = 0.02  # seconds between looks at what another process fetches
# The names of cached files and of parts of them: others in the folder are not touched.
_CACHED = re.compile(r"\.?([0-9a-f]{32})(\.arrived(\.partial)?)?")


def never() -> bool:
    return False


def open_files(path: str, cache: str, gib: float) -> "LocalFiles | CachedFiles":
    """The files of the dataset directory `path`, which may be a URL; `cache` and `gib` are
    `data.cache` and `data.cache_gib`."""
    if not is_remote(path):
        return LocalFiles(Path(path))
    return CachedFiles(Remote(path), Path(cache) if cache else _default(), int(gib * 2**30))


def _default() -> Path:
    """A folder of this user on this machine: homes may lie on the network that it spares."""
    folder = Path(tempfile.gettempdir()) / f"fastlab-stream-{os.getuid()}"
    with _usable(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"{folder}: others can write to it; set data.cache to a folder of your own")
    return folder


@contextlib.contextmanager
def _usable(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot hold the stream's cache ({error.strerror}); set data.cache to a "
            f"folder on a disk with room for data.cache_gib"
        ) from None


class LocalFiles:
    """Files that are read where they lie, ahead of their use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, name: str, info: FileInfo, stopped: Callable[[], bool] = never) -> mmap.mmap:
        """The file at the path `name` in the dataset directory, which `info` describes, mapped into
        memory. Raises `UserError` where it cannot be read or is another file."""
        try:
            with (self._folder / name).open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise UserError(f"{self._folder / name}: cannot be read ({error})") from None
        if len(content) != info.bytes:
            raise UserError(
                f"{self._folder / name}: {len(content)} bytes instead of {info.bytes}; convert "
                f"again with --force"
            )
        content.madvise(mmap.MADV_WILLNEED)
        return content


class CachedFiles:
    """Files behind a URL, in a folder that keeps those that were used last.

    Each is kept under its hash, so that another version of it never takes its place. Whoever maps a
    file holds a shared lock on it (`flock`), and whoever fetches it one on ``<hash>.lock``: the
    other processes wait for that one. What is locked is not removed. So the folder stays within its
    bound but for the files that are being fetched, and for those in use where together they are
    larger.
    """

    def __init__(self, remote: Remote, folder: Path, bound: int) -> None:
        """`bound` is in bytes. Raises `UserError` where the folder cannot be made."""
        self._remote, self._folder, self.bound = remote, folder, bound
        with _usable(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def open(self, name: str, info: FileInfo, stopped: Callable[[], bool] = never) -> mmap.mmap:
        """As `LocalFiles.open`. Raises `UserError` also where the cache cannot be written, and
        `FetchStopped` soon after `stopped` gives True."""
        path = self._folder / info.xxh128
        with _usable(self._folder):
            while (content := _mapped(path, info.bytes)) is None:
                if stopped():
                    raise FetchStopped
                with _lock_file(path).open("w") as lock:
                    if not try_flock(lock):
                        time.sleep(_POLL)
                    elif not _is_whole(path, info.bytes):
                        self._fetch(name, info, path, stopped)
        return content

    def _fetch(self, name: str, info: FileInfo, path: Path, stopped: Callable[[], bool]) -> None:
        self._make_room(info.bytes)
        arrived = path.with_suffix(".arrived")
        self._remote.fetch(name, arrived, info.bytes, functools.partial(_end_if, stopped))
        if (actual := describe_file(arrived).xxh128) != info.xxh128:
            arrived.unlink()
            raise UserError(
                f"{self._remote.url}/{name}: damaged, or of another dataset (XXH128 "
                f"{actual[:12]}…, manifest says {info.xxh128[:12]}…); copy the dataset there again"
            )
        arrived.rename(path)

    def _make_room(self, size: int) -> None:
        """Remove the files that were used longest ago until `size` bytes more stay in the bound."""
        status = {}
        for path in filter(_is_cached, self._folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                status[path] = path.stat()
        total = sum(each.st_size for each in status.values())
        for path in sorted(status, key=lambda path: status[path].st_mtime_ns):
            if total + size <= self.bound:
                return
            if _remove(path):
                total -= status[path].st_size


def _end_if(stopped: Callable[[], bool], size: int) -> None:
    if stopped():
        raise FetchStopped


def _mapped(path: Path, size: int) -> mmap.mmap | None:
    """The file, locked for as long as it is mapped, and marked as used now; None where it is not
    whole."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # a map has a duplicate of the descriptor: it keeps it
            if os.fstat(file.fileno()).st_size != size:
                return None
            os.utime(file.fileno())
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _is_cached(path: Path) -> bool:
    return _CACHED.fullmatch(path.name) is not None


def _lock_file(path: Path) -> Path:
    """Of a file in the cache, or of a part of it that is being fetched."""
    return path.with_name(path.name.strip(".").partition(".")[0] + ".lock")


def _remove(path: Path) -> bool:
    """Remove a file of the cache, unless a process uses or fetches it; return whether it did."""
    try:
        with _lock_file(path).open("w") as fetching, path.open("rb") as used:
            free = try_flock(fetching) and try_flock(used)
            if free:
                path.unlink()
            return free
    except FileNotFoundError:
        return False
