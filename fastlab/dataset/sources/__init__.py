"""`open_source`: the images and labels of whatever `fastlab convert` is given.

The first of these that fits is read: a Hugging Face name or URL; a folder saved by Hugging Face
datasets; a folder of ImageNet's own archives; Parquet files; WebDataset shards; CIFAR's batches,
also in an archive; Tiny ImageNet and image folders, also in archives.
"""

from dataclasses import replace
from pathlib import Path

from fastlab.dataset.archives import FolderTree, Tree, open_tree
from fastlab.dataset.manifest import Manifest
from fastlab.dataset.originals import Originals, completed, read_originals
from fastlab.dataset.remote import is_remote
from fastlab.dataset.request import Options, fetched_dataset
from fastlab.dataset.sources import cifar, hf, imagenet, parquet, webdataset
from fastlab.dataset.sources.fetching import fetch, list_remote
from fastlab.dataset.sources.labels import SPLITS, parse_columns

_FOLDERS = (*SPLITS, "data")


def open_source(source: Path | str, scratch: Path, options: Options) -> tuple[Tree, Originals]:
    """The images of `source`, a path or a URL, and their classes, splits and labels.

    What lies behind a URL is fetched into `scratch`, a new directory that the images need for as
    long as they are read. Raises `UserError` where `source` is of no known kind or unusable.
    """
    scratch.mkdir()
    where, columns, listing = str(source), parse_columns(options.columns), ""
    found: FolderTree | tuple[Tree, Originals]
    if name := hf.hub_name(where):
        found = hf.open_hub(name, columns, where)
    elif is_remote(source):
        path, listing = fetch(where, scratch)
        found = _open(path, scratch, columns, where)
    else:
        found = _open(Path(source), scratch, columns, where)
    if isinstance(found, FolderTree):
        tree = found
        originals = read_originals(tree, where, options.val_fraction, options.seed)
    else:
        tree, originals = found
        originals = completed(originals, where, options.val_fraction, options.seed)
    return tree, replace(originals, listing=listing)


def unchanged(source: Path | str, out: Path, options: Options) -> Manifest | None:
    """The manifest of `out`, where it is known without fetching `source`, which is behind a URL,
    that it would be made again. Raises `UserError`."""
    if not is_remote(source) or hf.hub_name(str(source)):
        return None
    return fetched_dataset(out, list_remote(str(source)), options)


def _open(
    path: Path, scratch: Path, columns: dict[str, str], where: str
) -> FolderTree | tuple[Tree, Originals]:
    """The images and their classes and splits; of what no reader knows, the folders."""
    if hf.is_saved(path):
        return hf.open_saved(path, columns, where)
    if imagenet.is_imagenet(path):
        return imagenet.open_imagenet(path, scratch, where)
    if tables := _files(path, ".parquet"):
        return parquet.open_parquet(tables, scratch, columns, where)
    shards = _files(path, ".tar")
    if shards and webdataset.is_shard(min(shards.values())):
        return webdataset.open_shards(shards, path, columns, where)
    tree = open_tree(path, scratch, where)
    return cifar.open_cifar(tree, where) or tree


def _files(path: Path, suffix: str) -> dict[str, Path]:
    """The files that end in `suffix`, by their paths below `path`: `path` itself, those in it, and
    in the folder of a split. None where training images lie in folders of classes."""
    if path.is_file():
        return {path.name: path} if path.suffix == suffix else {}
    if any(each.is_dir() for each in path.glob("train/*")):
        return {}
    folders = [path, *(path / name for name in _FOLDERS)]
    found = sorted(each for folder in folders for each in folder.glob(f"*{suffix}"))
    return {str(each.relative_to(path)): each for each in found if each.name[0] != "."}
