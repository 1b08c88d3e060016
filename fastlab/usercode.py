"""A user's own code (a loader, a step, a model): found by name, blamed for what it raises, and
stopped where it takes too long."""

import importlib
import re
import signal
import sys
import sysconfig
import traceback
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fastlab.console import UserError, first_line, public_path

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_OURS = str(Path(__file__).parent)


class _Late(BaseException):
    """The time is over. No `Exception`: the user's code may catch and repeat on every one."""


def find(target: str, limit: float | None = None) -> Any:
    """What `target` names: FILE.py:NAME or package.module:NAME. A file is imported by its own name
    from its own folder, so that worker processes find it again; a module also from the working
    directory.

    Raises `UserError` where there is no such module or name, or its import raises or takes longer
    than `limit` seconds (None: any time).
    """
    source, _, name = target.rpartition(":")
    if not source or not name:
        raise UserError(f"{target}: expected FILE.py:NAME or package.module:NAME")
    module = _import_file(Path(source), limit) if source.endswith(".py") else _import(source, limit)
    if not hasattr(module, name):
        known = [each for each, value in vars(module).items() if _is_own(each, value, module)]
        hint = f"it has: {', '.join(known)}" if known else "it defines no function"
        raise UserError(f"{source}: has no {name!r}; {hint}")
    return getattr(module, name)


def _is_own(name: str, value: Any, module: Any) -> bool:
    defined_there = getattr(value, "__module__", None) == module.__name__
    return callable(value) and defined_there and not name.startswith("_")


def _import_file(path: Path, limit: float | None) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    sys.path.insert(0, str(path.resolve().parent))
    module = _import(path.stem, limit)
    if not getattr(module, "__file__", None) or not path.samefile(module.__file__):
        raise UserError(f"{path}: another module has the name {path.stem!r}; rename the file")
    return module


def _import(name: str, limit: float | None) -> Any:
    if (here := str(Path.cwd())) not in sys.path:  # as `python -m` has it
        sys.path.insert(0, here)
    with blamed(f"importing {name}", limit):
        return importlib.import_module(name)


@contextmanager
def blamed(what: str, limit: float | None = None) -> Generator[None]:
    """Within the block runs the user's code. Raises `UserError` where it raises, with the text and
    the place, and where it takes longer than `limit` seconds (None: any time)."""
    try:
        with _limited(limit) if limit is not None else nullcontext():
            yield
    except (UserError, StopIteration):
        raise
    except _Late:
        raise UserError(
            f"{what}: not done after {limit:g} s; give it longer with --timeout SECONDS"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} failed: {describe(error)}") from None


@contextmanager
def _limited(seconds: float) -> Generator[None]:
    """Raises `_Late` in the block after `seconds`, and again each second if that is swallowed."""

    def late(number: int, frame: Any) -> None:
        raise _Late

    handler = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def describe(error: BaseException) -> str:
    """Type, text and place of an error in a line: of the user's own code where it passed through
    some. An error of a DataLoader's worker carries the worker's traceback as its text."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    text = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
    if "Original Traceback" in str(error):
        frames = [(match["file"], match["line"]) for match in _FRAME.finditer(str(error))]
        text = str(error).strip().splitlines()[-1]
    frames = [(file, line) for file, line in frames if not file.startswith((_OURS, "<"))]
    own = [(file, line) for file, line in frames if not file.startswith(_LIBRARIES)]
    place = (own or frames or [None])[-1]
    return f"{text} ({public_path(place[0])}:{place[1]})" if place else text
