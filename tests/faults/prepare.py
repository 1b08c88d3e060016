"""What the damaged inputs are made from: originals, a dataset, and runs of a training on it.

python -m tests.faults.prepare BASE
"""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from fastlab.dataset.synth import synthesise
from tests.faults import mutations
from tests.faults.outcomes import call
from tests.packages import has
from tests.trainings import ROOT, command


def prepare(base: Path) -> None:
    """Write below `base`: the image folder ``folder``; ``tiny``, in the layout of Tiny ImageNet;
    its ``dataset`` in all formats; ``sources`` of other kinds, and what they are ``converted`` to;
    ``whole``, a finished run; ``stopped``, the same run as a kill left it.

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


def _sources(base: Path) -> None:
    """A table with checksums, shards and batches of CIFAR: each a folder of ``sources``."""
    random = np.random.default_rng(0)
    images = [mutations.jpeg(mutations.picture(random)) for _ in range(12)]
    labels = [k % 3 for k in range(12)]
    for kind in ("parquet", "shards", "cifar"):
        (base / "sources" / kind).mkdir(parents=True)
    if has("pyarrow"):
        from pyarrow import parquet, table

        path = base / "sources" / "parquet" / "train.parquet"
        parquet.write_table(
            table({"image": images, "label": labels}),
            path,
            row_group_size=5,
            write_page_checksum=True,
        )
    with TarWriter(str(base / "sources" / "shards" / "train.tar"), encoder=False) as shard:
        for k, (data, label) in enumerate(zip(images, labels, strict=True)):
            shard.write({"__key__": f"{k:04}", "jpg": data, "cls": str(label).encode()})
    pixels = random.integers(0, 256, (12, 3072), dtype=np.uint8)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"):
        batch = {"data": pixels, "labels": labels, "label_names": ["a", "b", "c"]}
        (base / "sources" / "cifar" / name).write_bytes(pickle.dumps(batch, protocol=2))
    for path in (base / "sources").iterdir():
        if any(path.iterdir()):
            out = base / "converted" / path.name
            assert call(["convert", str(path), str(out), "--val-fraction", "0.3"]) == (0, "")


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
    _sources(base)
    _runs(base)
