"""What comes with fastlab besides its packages: configurations, examples and benchmarks.

In a checkout they lie beside the packages. A wheel carries them in the folder `checkout` of this
package, in the same layout, and `fastlab configs` copies them from there.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from fastlab.console import UserError
from fastlab.files import write_atomically

_PACKAGE = Path(__file__).parent
_CARRIED = _PACKAGE / "checkout"
INSTALLED = _CARRIED.is_dir()
"""Whether this package came in a wheel; otherwise it lies in a checkout."""
ROOT = _CARRIED if INSTALLED else _PACKAGE.parent

FOLDERS = {
    "benchmarks": "Measurements of loaders and trainings, such as python -m benchmarks.loaders.",
    "examples": "A loader and a step for fastlab bottleneck, and a SLURM job on two nodes.",
}
_LEFT_OUT = {"results", "__pycache__"}


def descriptions() -> dict[str, str]:
    """What each name that `copy` takes stands for, in one sentence."""
    return {name: _first_sentence(path) for name, path in _configs().items()} | FOLDERS


def copy(folder: Path, names: list[str]) -> list[Path]:
    """Copy what `names` stand for, or everything where they are empty, to `folder`: each file to
    its place in a checkout, and with a study or search the configuration that it is based on.

    Returns the files that were written; those that are there with the same content stay. Raises
    `UserError` for an unknown name, for a file that cannot be written and, before anything is
    written, for one that is there with other content.
    """
    contents = {folder / path.relative_to(ROOT): path.read_bytes() for path in _files(names)}
    try:
        written = [path for path in contents if not _holds(path, contents[path])]
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, contents[path])
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None
    return written


def advice(path: Path) -> str:
    """How to get the configuration that `path` names, where it does not exist; or empty."""
    name = path.as_posix().removesuffix(".toml").removeprefix("configs/")
    if name not in _configs() or os.path.lexists(path):
        return ""
    return f"run `fastlab configs --copy . {name}`, then give configs/{name}.toml"


def _configs() -> dict[str, Path]:
    folder = ROOT / "configs"
    paths = sorted(folder.rglob("*.toml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def _first_sentence(path: Path) -> str:
    """That of the comment with which `path` begins."""
    lines = (line.strip("# ") for line in path.read_text(encoding="utf-8").splitlines())
    paragraph = " ".join(takewhile(bool, lines))
    return re.split(r"(?<=[.?]) ", paragraph, maxsplit=1)[0]


def _files(names: list[str]) -> Iterator[Path]:
    configs = _configs()
    for name in names or [*configs, *FOLDERS]:
        if name in FOLDERS:
            paths = [path for path in (ROOT / name).rglob("*") if path.is_file()]
            yield from (path for path in paths if not _LEFT_OUT & {*path.relative_to(ROOT).parts})
            yield from filter(None, map(_base, (ROOT / name).rglob("*.toml")))
        elif name in configs:
            yield configs[name]
            yield from filter(None, [_base(configs[name])])
        else:
            near = difflib.get_close_matches(name, [*configs, *FOLDERS], n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise UserError(f"{name}: no such configuration; `fastlab configs` lists them{hint}")


def _base(path: Path) -> Path | None:
    """The configuration that a study or a search changes."""
    base = tomllib.loads(path.read_text(encoding="utf-8")).get("base")
    return Path(os.path.normpath(path.parent / base)) if base else None


def _holds(path: Path, content: bytes) -> bool:
    """Whether `path` has this content; False where it does not exist."""
    if not os.path.lexists(path):
        return False
    if path.is_file() and path.read_bytes() == content:
        return True
    raise UserError(f"{path}: exists with other content; move it away or choose another directory")
