"""Rehearse the stages of `benchmarks.gpu_suite` on a CPU, as they will run on the rented machine.

    python -m benchmarks.gpu_suite --rehearse

The commands run in a new folder that holds the content of an upload and nothing else: the files
that git tracks or does not ignore, ``wheels/`` and the pieces of a dataset of generated images.
They run under a Python that sees, of the packages here, only those that the machine has. So
whatever works here will not lack a file or a package there.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
from importlib.metadata import Distribution, distributions
from pathlib import Path

from fastlab.console import UserError, run_command

ROOT = Path(__file__).parents[1]
CARRIED = ("braceexpand", "nvidia-ml-py", "simplejpeg", "tomli-w", "webdataset")
_PIECES = [f".lease/piece-{number}.tar.xz" for number in (1, 2, 3)]
_MEASURING = [
    *("ready", "measure", "reference", "race", "savings"),
    *("loaders", "tests", "more", "search", "recipe", "study"),
]
COMMANDS = [
    "python3 -m benchmarks.gpu_suite smoke --pack $OUT/smoke",
    f"python3 -m benchmarks.gpu_suite data --piece {_PIECES[0]} --cache $OUT/smoke",
    *(f"python3 -m benchmarks.gpu_suite data --piece {piece}" for piece in _PIECES[1:]),
    *(f"python3 -m benchmarks.gpu_suite {stage} --pack $OUT/{stage}" for stage in _MEASURING),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 where every stage succeeded, else that of a failed stage."""
    folder = args.keep or Path(tempfile.mkdtemp(prefix="rehearsal-"))
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--keep {folder}: is not empty; choose a new folder")
    upload = folder / "upload"
    copy_checkout(upload)
    fetch_wheels(upload / "wheels")
    cut(folder / "originals", upload / ".lease")
    bare = bare_environment(folder / "python")
    status = max(rehearse(command, upload, bare, folder / "out") for command in COMMANDS)
    if not args.keep:
        shutil.rmtree(folder)
    return status


def copy_checkout(upload: Path) -> None:
    """Copy every file that git tracks or does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (upload / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, upload / name)


def fetch_wheels(wheels: Path) -> None:
    """Download what `make wheels` does, for the Python of the rehearsal."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
    command = [sys.executable, "-m", "pip", "download", *options, *CARRIED]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"wheels cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")


def cut(originals: Path, target: Path) -> None:
    """Cut a generated dataset into three pieces, laid out as those of Tiny ImageNet: the first
    holds all validation images and a third of every class."""
    from fastlab.dataset.synth import synthesise  # `gpu_suite` imports us on a bare machine

    target.mkdir(parents=True)
    synthesise(originals, classes=4, per_class=24)
    images = sorted(originals.glob("train/*/images/*"))
    for number, name in enumerate(_PIECES):
        rest = [originals / part for part in ("wnids.txt", "words.txt", "val")]
        with tarfile.open(target / Path(name).name, "w:xz") as archive:
            for path in [*(rest if number == 0 else ()), *images[number::3]]:
                archive.add(path, f"tiny-imagenet-200/{path.relative_to(originals)}")


def bare_environment(folder: Path) -> Path:
    """Make a ``python3`` that has the machine's packages and no others. Returns its folder."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    machine = (Path(__file__).parent / "gpu_machine.txt").read_text(encoding="utf-8").splitlines()
    for distribution in distributions(path=[sysconfig.get_path("purelib")]):
        name = distribution.name.lower().replace("_", "-")
        if name in machine or name.startswith("nvidia-"):
            link(distribution, site)
    return folder / "bin"


def link(distribution: Distribution, site: Path) -> None:
    """Link the packages, modules and metadata of `distribution` into `site`."""
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
    for top in tops - {"__pycache__"}:
        source, target = Path(str(distribution.locate_file(top))), site / top
        # Several distributions share a namespace package such as nvidia.
        if source.exists() and not target.is_symlink() and not target.is_dir():
            target.symlink_to(source)


def rehearse(command: str, upload: Path, bare: Path, out: Path) -> int:
    """Run `command` as the machine would. Returns its exit status."""
    print(f"$ {command}", flush=True)
    environment = {
        "PATH": f"{bare}:{os.environ['PATH']}",
        "HOME": str(upload),
        "OUT": str(out.resolve()),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # threads of concurrent processes would wait for each other
    }
    started = time.monotonic()
    words = [word.replace("$OUT", environment["OUT"]) for word in shlex.split(command)]
    code = subprocess.run(words, cwd=upload, env=environment).returncode
    print(f"{words[3]}: exit {code}, {time.monotonic() - started:.0f} s", flush=True)
    return code
