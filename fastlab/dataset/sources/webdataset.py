"""WebDataset shards: ``KEY.jpg`` (png, webp) beside ``KEY.cls``, or ``KEY.json`` with a label.

``cls`` holds a whole number, or the name of a class; of ``json``, the field "label" counts, or the
one of ``--columns label=FIELD``. ``classnames.txt`` or ``classes.txt`` beside the shards names the
classes, one a line. (https://github.com/webdataset/webdataset, "The WebDataset Format")
"""

import itertools
import json
import mmap
import tarfile
from pathlib import Path

from fastlab.console import UserError, printable
from fastlab.dataset.archives import DAMAGE, map_file
from fastlab.dataset.originals import SUFFIXES, Originals
from fastlab.dataset.sources.labels import Label, labelled, split_files
from fastlab.dataset.sources.places import Place, PlacesTree
from fastlab.dataset.tar_members import list_members

_NAMES = ("classnames.txt", "classes.txt")
_PEEKED = 8  # members: a few samples

Samples = dict[str, dict[str, tuple[int, int]]]
"""Key -> extension -> start and size of the member in the shard, bytes."""


def is_shard(path: Path) -> bool:
    """Whether the tar begins with samples, and not with images in folders of classes."""
    try:
        with tarfile.open(path, "r:") as archive:
            first = itertools.islice(archive, _PEEKED)
            members = [_split_name(member.name.removeprefix("./")) for member in first]
    except (tarfile.TarError, OSError):
        return False
    keys = [key for key, _ in members]
    images = [key for key, extension in members if f".{extension}" in SUFFIXES]
    return any("/" not in key or keys.count(key) > 1 for key in images)


def open_shards(
    files: dict[str, Path], folder: Path, columns: dict[str, str], where: str
) -> tuple[PlacesTree, Originals]:
    """The samples of all shards; `files` are their paths by name, `folder` may hold the names of
    the classes. Raises `UserError`."""
    splits = split_files(files, where)
    order = [(split, name) for split, group in splits.items() for name in group]
    places: dict[str, Place] = {}
    paths: dict[str, list[str]] = {split: [] for split in splits}
    labels: dict[str, list[Label]] = {split: [] for split in splits}
    for number, (split, name) in enumerate(order):
        found = _read_shard(files[name], columns.get("label", "label"), f"{where}: {name}")
        for member, (place, label) in found.items():
            path = f"{name}/{member}"
            places[path] = (number, *place)
            paths[split].append(path)
            labels[split].append(label)
    tree = PlacesTree([files[name] for _, name in order], places)
    return tree, labelled("webdataset", paths, labels, _class_names(folder, where), where)


def _read_shard(path: Path, field: str, where: str) -> dict[str, tuple[tuple[int, int], Label]]:
    """The name of each image in a shard -> its place in it, and its label."""
    try:
        data = map_file(path)
        samples = _samples(path, data, where)
    except DAMAGE as error:
        raise UserError(f"{where}: damaged shard ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    found = {}
    for key, members in samples.items():
        images = [extension for extension in members if f".{extension}" in SUFFIXES]
        if len(images) != 1:
            raise UserError(
                f"{where}: sample {printable(key)} has {len(images)} images (jpg, png, webp), not 1"
            )
        label = _label(data, members, field, f"{where}: sample {printable(key)}")
        found[f"{key}.{images[0]}"] = (members[images[0]], label)
    return found


def _samples(path: Path, data: mmap.mmap, where: str) -> Samples:
    samples: Samples = {}
    for name, place in list_members(path, data).items():
        key, extension = _split_name(name)
        if place is None:
            raise UserError(f"{where}: {printable(name)} is a link; pack the files themselves")
        samples.setdefault(key, {})[extension] = place[:2]
    return samples


def _label(data: mmap.mmap, members: dict[str, tuple[int, int]], field: str, where: str) -> Label:
    """Raises `UserError` where the sample has none."""
    kind = next((each for each in ("cls", "json") if each in members), None)
    if kind is None:
        raise UserError(f"{where} has no label: neither cls nor json")
    start, size = members[kind]
    text = data[start : start + size].decode("utf-8", "replace").strip()
    try:
        if kind == "json":
            return json.loads(text)[field]
        return int(text) if text.removeprefix("-").isdecimal() else text
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(
            f"{where}: its json has no field {field!r}; name the one of the label: "
            f"--columns label=FIELD"
        ) from None


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension, as webdataset divides a member's name: at the first point of its file."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return folder + slash + key, extension.lower()


def _class_names(folder: Path, where: str) -> list[str] | None:
    for name in _NAMES:
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
            return [line.strip() for line in lines if line.strip()]
    return None
