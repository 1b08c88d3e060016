"""What a conversion found of its originals, as the manifest of the new dataset."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastlab
from fastlab.console import UserError, printable
from fastlab.dataset.blocks import mean_and_std
from fastlab.dataset.manifest import Manifest, SplitInfo
from fastlab.dataset.originals import Originals
from fastlab.dataset.remote import is_remote
from fastlab.dataset.request import Options


class Found(NamedTuple):
    """What was found of the originals of a split."""

    sizes: np.ndarray
    """int64 [images], bytes."""
    greyscale: int
    """Originals with a single channel."""
    fitted: int
    """Originals of another size."""


def new_manifest(
    source: Path | str,
    originals: Originals,
    found: dict[str, Found],
    mean_std: tuple[list[float], list[float]],
    request: dict[str, Any],
    options: Options,
) -> Manifest:
    """The manifest of a dataset that has no format yet."""
    return Manifest(
        name=_dataset_name(source),
        classes=originals.classes,
        image_size=options.image_size,
        splits={name: _split_info(originals, name, each) for name, each in found.items()},
        mean=mean_std[0],
        std=mean_std[1],
        formats={},
        request=request,
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fit=options.fit,
    )


def statistics(sums: list[np.ndarray], pixels: int) -> tuple[list[float], list[float]]:
    """`mean_and_std` of the training images; `sums` are the `channel_sums` of their blocks. Raises
    `UserError` for a deviation of 0, by which no image can be divided."""
    mean, std = mean_and_std(np.sum(sums, axis=0), pixels)
    if min(std) == 0:
        raise UserError(
            f"the {('red', 'green', 'blue')[std.index(0)]} channel of every training image has the "
            f"same value everywhere, so it cannot be normalised; convert other images"
        )
    return mean, std


def refuse(corrupt: dict[str, str], otherwise: str = "skip them with --on-corrupt skip") -> None:
    """`corrupt`: path of each corrupt image -> what is wrong with it; `otherwise`: what to do if
    they cannot be fixed. Raises `UserError` where there is any."""
    if corrupt:
        shown = "; ".join(f"{printable(path)} ({why})" for path, why in list(corrupt.items())[:5])
        raise UserError(
            f"corrupt images: {len(corrupt)}, such as {shown}; fix them, or {otherwise}"
        )


def _split_info(originals: Originals, name: str, found: Found) -> SplitInfo:
    counts = np.bincount(originals.splits[name].labels, minlength=len(originals.classes))
    return SplitInfo(
        images=int(counts.sum()),
        per_class_min=int(counts.min()),
        per_class_max=int(counts.max()),
        greyscale=found.greyscale,
        original_bytes=int(found.sizes.sum()),
        largest_original=int(found.sizes.max()),
        fitted=found.fitted,
    )


def _dataset_name(source: Path | str) -> str:
    path = Path(source) if is_remote(source) else Path(source).resolve()
    name = path.name.split(".")[0]
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("numpy", "pillow", "simplejpeg")}
    return {"fastlab": fastlab.__version__, "python": platform.python_version(), **packages}
