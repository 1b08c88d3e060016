"""torch.compile with a cache that only this user can write and that no kill damages."""

import functools
import os
import re
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlab.console import UserError, tell

# A compiler writes its output in place. Killed half-way, it would leave a torn library in
# Inductor's cache, which takes every file there to be whole. Renaming what is complete avoids that.
_WHOLE_OUTPUTS = """#!/bin/sh
for word do
    shift
    if [ "$last" = -o ] && [ ! -c "$word" ]; then out=$word word=$word.$$.partial; fi
    set -- "$@" "$word"
    last=$word
done
{compiler} "$@" || exit
[ -z "$out" ] || mv -f "$out.$$.partial" "$out"
"""


def compiled(function: Callable, **options: Any) -> Callable:
    """`torch.compile(function, **options)`, with the cache of `cache_folder`. Where no compiler is
    installed: `function` itself, and one line that says so.

    Raises `UserError` as `cache_folder` does.
    """
    import torch

    return torch.compile(function, **options) if _prepare() else function


@functools.cache
def _prepare() -> bool:
    """Set up torch.compile for this process. False where no compiler is installed."""
    import torch

    gpu = torch.cuda.is_available()
    compiler = c_compiler() if gpu else cpp_compiler()
    if compiler is None:
        if os.environ.get("RANK", "0") == "0":
            missing = "C compiler; install gcc" if gpu else "C++ compiler; install g++"
            tell(f"train.compile = true needs a {missing} to use it; continuing without compiling")
        return False
    folder = cache_folder()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    if not gpu:  # Triton renames what it compiles; and the path would enter the keys of the cache
        _set_up_cpp(compiler, folder)
    return True


def _set_up_cpp(compiler: str, folder: Path) -> None:
    from torch._inductor import codecache, config

    config.cpp.cxx = (None, str(_wrapped(compiler, folder)))
    # Inductor would keep these in the temporary folder, whatever its cache folder is.
    codecache._HEADER_DIR = str(folder / "precompiled_headers")
    codecache._HEADER_LOCK_DIR = str(folder / "precompiled_headers" / "locks")


def c_compiler() -> str | None:
    """The command of the C compiler that Triton calls; None where there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def cpp_compiler() -> str | None:
    """The command of the C++ compiler for code that runs on a CPU; None where there is none."""
    chosen = os.environ.get("CXX", "g++")
    words = shlex.split(chosen)
    return chosen if words and shutil.which(words[0]) else shutil.which("clang++")


def cache_folder() -> Path:
    """The folder of `TORCHINDUCTOR_CACHE_DIR`, or one of this user in the temporary folder: homes
    are shared by machines, and compiled code is made for the CPU of one.

    Raises `UserError` where others could place files in it, which torch.compile would run.
    """
    chosen, temporary = os.environ.get("TORCHINDUCTOR_CACHE_DIR"), tempfile.gettempdir()
    if chosen and chosen.startswith(f"{temporary}/torchinductor_"):
        chosen = None  # torch's default, which torch itself sets as soon as it is asked for
    folder = Path(chosen or f"{temporary}/fastlab-{os.getuid()}").absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat() if chosen else folder.lstat()
    except OSError as error:
        raise UserError(
            f"{folder}: the cache of torch.compile cannot be made ({error.strerror}); set "
            f"TORCHINDUCTOR_CACHE_DIR to another folder"
        ) from None
    private = not found.st_mode & stat.S_IWOTH
    if not chosen:
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022
        private = private and found.st_uid == os.getuid()
    if not private:
        raise UserError(
            f"{folder}: torch.compile would run code from it, and others can write there; set "
            f"TORCHINDUCTOR_CACHE_DIR to a folder of your own"
        )
    return folder


def _wrapped(compiler: str, folder: Path) -> Path:
    """A command in `folder` that calls `compiler` and renames its output when it is complete. The
    compiler's name is kept: Inductor tells gcc from clang by it."""
    command = folder / re.sub(r"[^\w.+-]", "_", compiler)
    partial = folder / f"{command.name}.{os.getpid()}.partial"
    words = shlex.join(shlex.split(compiler))
    partial.write_text(_WHOLE_OUTPUTS.format(compiler=words), encoding="utf-8")
    partial.chmod(0o700)
    partial.replace(command)
    return command
