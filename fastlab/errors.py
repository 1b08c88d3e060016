"""The one exception for mistakes that a user can mend, and how its line stays one."""

import os
import sys
from typing import TextIO


class UserError(Exception):
    """Bad input, told in one line: what, where, what to do. The command exits with 2."""


def tell(what: object) -> None:
    """Print the one line."""
    try:
        # At once: other processes may write to the same terminal.
        print(f"fastlab: {what}\n", end="", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)  # the exit status is all that is left to tell


def silence(stream: TextIO) -> None:
    """Nothing more may be written to it: what it holds would fail again when Python ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def printable(text: str) -> str:
    """`text`, escaped where it would break a message's one line or cannot be printed at all."""
    return text if text.isprintable() else repr(text)[1:-1]


def first_line(error: BaseException) -> str:
    """What `error` says, for a message of one line."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
