"""Text that may be shown to others: it does not tell where things lie on the machine."""

import re
import shlex
from pathlib import Path

# Two components or more: "12 /s" is no path. Preceded by none of a path's own characters, as in
# "data/tiny/train", "https://pytorch.org/docs" and base64, and not by "<", as in "</p>".
_ABSOLUTE = re.compile(r"(?<![\w.+~/<-])(?:/[\w.+@%~-]+){2,}")


def public_path(path: str) -> str:
    """`path` from the current directory where it lies below; of another absolute one, the name."""
    found, here = Path(path), Path.cwd()
    if found.is_relative_to(here):
        return str(found.relative_to(here))
    return found.name if found.is_absolute() else path


def public_text(text: str) -> str:
    """`text`, which may be HTML, with its absolute paths as `public_path` gives them."""
    return _ABSOLUTE.sub(lambda match: public_path(match[0]), text)


def public_command(argv: list[str]) -> str:
    """`argv` as a shell takes it, its program as one would call it from a checkout."""
    program = Path(argv[0])
    kept = 2 if program.suffix == ".py" else 1  # fastlab/train.py, but fastlab of .venv/bin
    arguments = [public_text(public_path(argument)) for argument in argv[1:]]
    return shlex.join(["/".join(program.parts[-kept:]), *arguments])
