"""Which dataset a run was trained on: on another, its figures and class names mean nothing."""

from typing import Any

from fastlab.config import Config
from fastlab.dataset.manifest import Manifest
from fastlab.errors import UserError
from fastlab.rundir import RunDir

_FORMATS = {"resident": "array", "ffcv": "ffcv", "dali": "tar", "torchvision": "tar"}


def fingerprint(manifest: Manifest) -> dict[str, Any]:
    """What tells a dataset from others, wherever it lies."""
    return {
        "classes": [each.id for each in manifest.classes],
        "image_size": manifest.image_size,
        "images": {name: split.images for name, split in manifest.splits.items()},
        "mean": manifest.mean,
        "std": manifest.std,
        "request": manifest.request,
        "files": {
            name: {path: info.xxh128 for path, info in files.items()}
            for name, files in manifest.formats.items()
        },
    }


def check_dataset(run: RunDir, cfg: Config, manifest: Manifest) -> None:
    """Raises `UserError` where the dataset is not the one that the run began with. A run from
    before there was a fingerprint is not checked."""
    if not run.dataset.exists():
        return
    before, now = run.read_dataset(), fingerprint(manifest)
    try:
        other = _differences(before, now, _FORMATS[cfg.data.pipeline])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run.dataset}: damaged ({error!r}); put the file back") from None
    if other:
        raise UserError(
            f"{cfg.data.path}: is not the dataset that {run.path} was trained on (other "
            f"{', '.join(other)}); convert that one again, or set data.path in {run.config}"
        )


def _differences(before: dict[str, Any], now: dict[str, Any], used: str) -> list[str]:
    names = ("classes", "image_size", "images", "mean", "std")
    other = [name for name in names if before[name] != now[name]]
    # Equal requests give equal images, in files that a later fastlab may lay out otherwise. Equal
    # files may come of another copy of the originals. Formats that are not in use come and go.
    same = before["request"] == now["request"] or not {used} <= before["files"].keys()
    if not same and before["files"][used] != now["files"].get(used):
        other.append(f"files in {used}/")
    return other
