"""What a command says to people: errors in one line, text without the machine's paths, exit codes.

`run_command` runs every command of the project; `UserError` is the one exception for a mistake that
the user can correct.
"""

import argparse
import io
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO, cast

# Two components or more: "12 /s" is no path. The character before it is none that a path may hold,
# as in "data/tiny/train", "https://pytorch.org/docs" and base64, and not "<", as in "</p>".
_ABSOLUTE = re.compile(r"(?<![\w.+~/<-])(?:/[\w.+@%~-]+){2,}")
# What a terminal obeys instead of showing it, such as escape sequences and changes of the direction
# of writing; and what UTF-8 cannot encode. Lines and tabs remain.
_CONTROL = re.compile(
    r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

# Of the C library, the dynamic linker, Python, torch and oneDNN.
_REFUSALS = (
    "Cannot allocate memory",
    "Resource temporarily unavailable",
    "failed to map segment",
    "can't start new thread",
    "DefaultCPUAllocator",
    "could not create a primitive",
    "error return without exception set",  # of CPython, where memory ran out within an import
)


class UserError(Exception):
    """Bad input. Its message is one line: what is wrong, where, and what to do. The command exits
    with status 2."""


def run_command(call: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run `call` and return its exit status. A `UserError` becomes one line on standard error and
    status 2; so do a full disk under standard output and what the system refused. Control
    characters on standard output are escaped."""
    _open_streams()
    out = cast(TextIO, _Escaped(sys.stdout))
    try:
        _check_paths()
        with redirect_stdout(out):
            status = call(args) or 0
        out.flush()  # here, where a failure can still be reported
        return status
    except UserError as error:
        tell(error)
        return 2
    except KeyboardInterrupt as stop:
        if not stop.args:
            tell("interrupted")
            return 130
        number = signal.Signals(stop.args[0])  # see `processes.interrupted_by_signals`
        tell(f"ended by {number.name}")
        return 128 + number
    except BrokenPipeError:
        silence(sys.stdout)  # the reader left
        return 141
    except Exception as error:
        message = _explained(error)
        if not message:
            raise
        tell(message)
        if isinstance(error, OSError):
            silence(sys.stdout)
        return 2


def _explained(error: Exception) -> str:
    """What to report of an error that no part of the project explains; empty for a defect."""
    if refusal := _refusal(error):
        return (
            f"the system refused memory, a thread or a process ({refusal}); raise the limits "
            f"(ulimit -v, ulimit -u), or free what other programs use"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        cause = first_line(getattr(error, "inner_exception", error))
        return (
            f"torch.compile failed ({cause}); its cache may be damaged: remove "
            f"{os.environ.get('TORCHINDUCTOR_CACHE_DIR')}, or set train.compile=false"
        )
    if isinstance(error, OSError) and error.filename is None:
        return f"standard output or a file cannot be written ({error.strerror}); make room for it"
    return ""


class _Escaped:
    """A text stream with `_CONTROL` escaped: names of classes and files may come from others."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(_CONTROL.sub(lambda found: repr(found[0])[1:-1], text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_streams() -> None:
    """Open /dev/null in place of the standard streams that the caller closed: the next files would
    get their descriptors, and what a library prints would go into them. Print what standard output
    cannot encode with escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # takes the lowest free number
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _check_paths() -> None:
    """Raises `UserError` where the working directory is gone, or an argument is no UTF-8:
    manifests, safetensors and TensorBoard could not name such a file."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory no longer exists; change to another one") from None
    for argument in sys.argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"{printable(argument)}: is no UTF-8; give it another name") from None


def _refusal(error: BaseException | None) -> str:
    """What the system refused, in the words of the library, each of which has its own exceptions
    for it; empty where it refused nothing."""
    while error is not None:
        if isinstance(error, MemoryError):
            return str(error) or "out of memory"
        for line in str(error).splitlines():
            if any(text in line for text in _REFUSALS):
                return line.strip()
        error = error.__cause__ or error.__context__
    return ""


def tell(message: object) -> None:
    """Print one line to standard error, at once: other processes may write to the same terminal.
    Of `message`, what would not be shown, or not in one line, is escaped."""
    try:
        print(f"fastlab: {printable(str(message))}\n", end="", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)  # the exit status is all that is left to report


def silence(stream: TextIO) -> None:
    """Send what `stream` still buffers to /dev/null, so that Python's exit does not fail on it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def printable(text: str) -> str:
    """`text` with the characters escaped that cannot be printed or would break a line in two."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


def positive_int(text: str) -> int:
    """For argparse: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def port_number(text: str) -> int:
    """For argparse: a TCP port; 0 stands for any that is free."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """For argparse: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def positive_duration(text: str) -> int:
    """For argparse: the seconds of a time such as 90m, 2h or 1h30m."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    if not (total := 3600 * hours + 60 * minutes + seconds):
        raise argparse.ArgumentTypeError(f"expected a time such as 90m, 2h or 1h30m, got {text!r}")
    return total


def positive_ints(text: str) -> list[int]:
    """For argparse: whole numbers from 1, such as 1,2."""
    return [positive_int(part) for part in text.split(",")]


def public_path(path: str) -> str:
    """`path` relative to the current directory where it lies below it; the last component of any
    other absolute path."""
    absolute, here = Path(path), Path.cwd()
    if absolute.is_relative_to(here):
        return str(absolute.relative_to(here))
    return absolute.name if absolute.is_absolute() else path


def public_text(text: str) -> str:
    """`text`, which may be HTML, with its absolute paths replaced by `public_path` of each: pages
    and records are passed on to others."""
    return _ABSOLUTE.sub(lambda match: public_path(match[0]), text)


def public_value(value: Any) -> Any:
    """`value`, of JSON's types, with `public_text` of every text in it, keys included."""
    if isinstance(value, dict):
        return {public_value(key): public_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public_value(item) for item in value]
    return public_text(value) if isinstance(value, str) else value


def public_command(argv: list[str]) -> str:
    """`argv` as a shell takes it, its program as one would call it from a checkout."""
    program = Path(argv[0].removesuffix("/__main__.py"))  # of python -m fastlab
    kept = 2 if program.suffix == ".py" else 1  # fastlab/train.py, but fastlab of .venv/bin
    arguments = [public_text(public_path(argument)) for argument in argv[1:]]
    return shlex.join(["/".join(program.parts[-kept:]), *arguments])
