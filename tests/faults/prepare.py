"""What the damaged inputs are made from: originals, a dataset, and runs of a training on it.

python -m tests.faults.prepare BASE
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from fastlab.dataset.synth import synthesise
from tests.faults import mutations
from tests.faults.outcomes import call
from tests.packages import has
from tests.trainings import ROOT, command


def prepare(base: Path) -> None:
    """Write below `base`: the image folder ``folder``; ``tiny``, in the layout of Tiny ImageNet;
    its ``dataset`` in all formats; ``whole``, a finished run; ``stopped``, the same run as a kill
    left it.

    This takes a process of its own, as each resumed run does: what a process did before may change
    the last bits of its sums.
    """
    subprocess.run([sys.executable, "-m", "tests.faults.prepare", str(base)], cwd=ROOT, check=True)


def _folder(folder: Path) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(4):
                data = mutations.jpeg(mutations.picture(random))
                (folder / split / name / f"{number}.jpg").write_bytes(data)


def _runs(base: Path) -> None:
    from fastlab.training import checkpoint

    save = checkpoint.save

    def save_and_copy(folder: Path, step: int, *rest) -> None:
        save(folder, step, *rest)
        if step == 3:
            shutil.copytree(base / "whole", base / "stopped")

    checkpoint.save = save_and_copy  # ty: ignore[invalid-assignment]  # the same call
    sets = ("train.epochs=2", "train.checkpoint_every=1")
    assert call(["train", *command(base / "dataset", base / "whole", *sets)]) == (0, "")


if __name__ == "__main__":
    base = Path(sys.argv[1])
    _folder(base / "folder")
    synthesise(base / "tiny", classes=3, per_class=12)
    formats = "array,tar" + (",ffcv" if has("ffcv") else "")
    convert = ["convert", str(base / "tiny"), str(base / "dataset"), "--formats", formats]
    assert call(convert) == (0, "")
    _runs(base)
