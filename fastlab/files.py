"""Files and directories that are whole or absent, and locks.

Each is written under a temporary name beside its place and renamed when it is complete, so that a
reader, or a process that continues after a kill, never sees half of it.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

from fastlab.console import UserError, printable


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` as a whole, or leave it as it was. Raises OSError.

    The mode follows the umask, unlike tempfile's: these files are passed on to other people."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` of `value` as JSON, with null for NaN and infinities. Raises OSError."""
    text = json.dumps(without_nan(value), indent=1, ensure_ascii=False)
    write_atomically(path, text + "\n")


def without_nan(value: Any) -> Any:
    """`value`, of JSON's types, with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def process_lock(path: Path, busy: str) -> Generator[None]:
    """Hold `path` against other processes until the end of the block or of this process.

    Forked children, such as decoding workers, do not share this lock (POSIX `lockf`): they may
    outlive their parent by seconds. Raises `UserError(busy)` where another process holds it.
    """
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(busy) from None
            # Some network file systems have no locks; there, nothing is held.
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds `path` through `process_lock`. True also where that cannot be
    known: the file system has no locks, or `path` cannot be read."""
    try:
        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextlib.contextmanager
def inherited_lock(path: Path, busy: str, patience: float = 0) -> Generator[int]:
    """Hold `path` for as long as any process has the descriptor that this gives (`flock`).

    A training that was handed it keeps the lock after the command that started it was killed.
    Raises `UserError(busy)` where others still hold it after `patience` seconds.
    """
    with path.open("w") as file:
        deadline = time.monotonic() + patience
        while not try_flock(file):
            if time.monotonic() >= deadline:
                raise UserError(busy)
            time.sleep(0.2)
        yield file.fileno()


def try_flock(file: IO[Any] | int) -> bool:
    """Lock an open file, as `inherited_lock` does, until it is closed; False: another process holds
    it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def resolved(out: Path) -> Path:
    """`out` without links, "." and "..", so that it has a name, and siblings on its own disk.

    Raises `UserError` for the root of the file system and for the working directory, which would no
    longer be the working directory after a replacement.
    """
    path = Path(os.path.realpath(out))
    if not path.name or path == Path(os.path.realpath(os.curdir)):
        raise UserError(f"{out}: choose a directory below it")
    return path


def is_free(out: Path) -> bool:
    """Whether nothing would be lost: `out` does not exist, or is an empty directory."""
    return not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))


def check_free(out: Path) -> None:
    """Raises `UserError` where something would be lost."""
    if not is_free(out):
        raise UserError(f"{out}: exists; choose another directory, or replace it with --force")


def check_replaceable(out: Path, kind: str, mark: str, belongs: Callable[[str], bool]) -> None:
    """Raises `UserError` unless `out` is free, or a `kind`: a directory with a file `mark` and with
    no names but those that `belongs` accepts. --force must not cost anybody other files."""
    if is_free(out):
        return
    why = f"no {mark}" if not (out / mark).exists() else ""
    others = [] if why else sorted(name for name in os.listdir(out) if not belongs(name))
    if others:
        why = f"{printable(others[0])} is no part of one"
    if why:
        raise UserError(
            f"{out}: is no {kind} ({why}), and --force replaces nothing else; choose another "
            f"directory, or move this away"
        )


@contextlib.contextmanager
def partial_directory(out: Path) -> Generator[Path]:
    """An empty directory beside `out`, locked against a second writer. At the end it is removed,
    unless `move_into_place` has made it `out`.

    Raises `UserError` where it cannot be made, where something else has its name, and where another
    process is writing `out`.
    """
    partial = out.with_name(f".{out.name}.fastlab-partial")
    try:
        try:
            partial.mkdir(parents=True)
        except FileExistsError:
            _check_leftover(partial)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        # Where it no longer lies at its path, its writer moved it into place since it was opened.
        if not (try_flock(descriptor) and lies_at(descriptor, partial)):
            raise UserError(f"{out}: another command is writing it")
        _restore(out)
        for leftover in partial.iterdir():  # of a writer that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield partial
        finally:
            if lies_at(descriptor, partial):
                shutil.rmtree(partial, ignore_errors=True)
                _restore(out)  # after an interruption between the renames of `move_into_place`
    finally:
        os.close(descriptor)


def _check_leftover(partial: Path) -> None:
    """Raises `UserError` unless `partial` may be what a killed writer of this user left: it will be
    emptied. A link would lead to files of others."""
    status = partial.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise UserError(
            f"{partial}: is a link, a file or of another user, but fastlab writes to this name; "
            f"move it away"
        )


def lies_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still is the file or directory that was opened as `descriptor`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def move_into_place(partial: Path, out: Path) -> None:
    """Make `partial` the new `out`. What was there before is removed afterwards, never earlier."""
    if is_free(out):
        partial.rename(out)
        return
    old = _replaced(out)
    out.rename(old)
    partial.rename(out)
    # From here on the next writer finds the lock free, and may be removing `old`, too.
    shutil.rmtree(old, ignore_errors=True)


def _replaced(out: Path) -> Path:
    """Where a directory lies for the moment in which another takes its place."""
    return out.with_name(f".{out.name}.fastlab-replaced")


def _restore(out: Path) -> None:
    """Put back what a writer left that was killed between the two renames."""
    old = _replaced(out)
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)
