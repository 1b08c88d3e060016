"""Directories that are whole or absent: written beside their place, moved there when complete."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fastlab.errors import UserError, printable


def settled(out: Path) -> Path:
    """`out` without links, "." and "..", so that it has a name, and siblings on its own disk.

    Raises `UserError` for the root of the file system and for the working directory, which would be
    another one afterwards.
    """
    found = Path(os.path.realpath(out))
    if not found.name or found == Path(os.path.realpath(os.curdir)):
        raise UserError(f"{out}: choose a directory below it")
    return found


def is_free(out: Path) -> bool:
    """Whether nothing would be lost: `out` does not exist, or is an empty directory."""
    return not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))


def check_replaceable(out: Path, kind: str, mark: str, own: Callable[[str], bool]) -> None:
    """Raises `UserError` unless `out` is free, or a `kind`: a directory that has `mark` and nothing
    but names that are its `own`. --force is not to cost anybody other files."""
    if is_free(out):
        return
    why = f"no {mark}" if not (out / mark).exists() else ""
    others = [] if why else sorted(name for name in os.listdir(out) if not own(name))
    if others:
        why = f"{printable(others[0])} is no part of one"
    if why:
        raise UserError(
            f"{out}: is no {kind} ({why}), and --force replaces nothing else; choose another "
            f"directory, or move this away"
        )


def check_free(out: Path) -> None:
    """Raises `UserError` where something would be lost."""
    if not is_free(out):
        raise UserError(f"{out}: exists; choose another directory, or replace it with --force")


@contextlib.contextmanager
def partial_directory(out: Path) -> Iterator[Path]:
    """An empty directory beside `out`, locked against a second writer, removed at the end.

    Raises `UserError` where it cannot be made, or somebody else holds it.
    """
    partial = out.with_name(f".{out.name}.fastlab-partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        _lock(lock, partial, out)
        _restore(out)
        for left in partial.iterdir():  # of a writer that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
        finally:
            if _is_at(lock, partial):  # not moved into place
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(lock: int, partial: Path, out: Path) -> None:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(lock, partial):  # else its writer moved it into place since it was opened
            return
    raise UserError(f"{out}: another command is writing it")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def move_into_place(partial: Path, out: Path) -> None:
    """`partial` becomes `out`; what was there before is gone after it, never before."""
    if is_free(out):
        partial.rename(out)
        return
    old = _replaced(out)
    out.rename(old)
    partial.rename(out)
    # The next writer may be at it, too: it finds the lock free from here on.
    shutil.rmtree(old, ignore_errors=True)


def _replaced(out: Path) -> Path:
    """Where a directory lies for the moment in which another takes its place."""
    return out.with_name(f".{out.name}.fastlab-replaced")


def _restore(out: Path) -> None:
    """What a writer that was killed in that moment left."""
    old = _replaced(out)
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)
