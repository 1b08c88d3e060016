"""Options that several commands share, and those of commands that have many. Needs no torch."""

import argparse
from pathlib import Path


def add_set_option(parser: argparse.ArgumentParser, help: str) -> None:
    """``--set``: a list of ``section.key=value`` in `overrides`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help=help,
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fastlab train` and of fastlab/train.py."""
    add = parser.add_argument
    add("--config", type=Path, help="a configuration, such as configs/demo.toml")
    add_set_option(parser, "override one value; may be repeated")
    out = "run directory (default: runs/<config name>)"
    add("--out", type=Path, help=out)
    overwrite = "start anew in the directory of another run, whose files are replaced"
    add("--overwrite", action="store_true", help=overwrite)
    init = "start from the best weights of a run, or from a .safetensors file"
    add("--init", default="", metavar="WEIGHTS", help=init)
    resume = "continue a run; --set may change what its checkpoint does not depend on"
    add("--resume", type=Path, metavar="RUN", help=resume)
    add("--profile", action="store_true", help="record a trace ([profile])")


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fastlab convert`."""
    add = parser.add_argument
    archives = ".zip, .tar, .tar.xz, .txz, .tar.gz, .tgz, .tar.bz2"
    source = (
        f"an image folder or Tiny ImageNet (a directory, {archives}), WebDataset shards, Parquet, "
        f"a dataset of Hugging Face, CIFAR, ImageNet; a path or a URL (s3, gs, hf, https)"
    )
    add("source", help=source)
    add("out", type=Path, help="dataset directory to write")
    formats = "array, ffcv, tar; separated by commas (default: array)"
    add("--formats", default="array", help=formats)
    encoding = "raw (decoded pixels) or jpeg (the original bytes)"
    add("--ffcv-encoding", default="raw", help=encoding)
    add("--shard-images", type=int, default=10_000, metavar="N", help="images per tar shard")
    add("--workers", type=int, default=0, metavar="N", help="default: one for each core")
    add("--classes", default="", help="the first N classes, or ids separated by commas")
    add("--limit-per-class", type=int, default=0, metavar="N", help="at most N images per class")
    add("--image-size", type=int, default=64, metavar="S", help="side in pixels")
    holdout = "move N images per class from train to val; the official val becomes test"
    add("--holdout", type=int, default=0, metavar="N", help=holdout)
    fraction = "make val of this share of each class, for a source without validation images"
    add("--val-fraction", type=float, default=0.0, metavar="F", help=fraction)
    add("--seed", type=int, default=0, help="decides which images these two move")
    columns = "image=COLUMN,label=COLUMN: which to take of a table that has several"
    add("--columns", default="", metavar="CHOICE", help=columns)
    fit = "images of another size: crop the centre (default), squash both sides, or pad with black"
    add("--fit", default="crop", metavar="crop|squash|pad", help=fit)
    corrupt = "skip: leave corrupt images out; the manifest and reports name and count them"
    add("--on-corrupt", default="error", metavar="error|skip", help=corrupt)
    undecoded = (
        "with --formats tar: copy the originals at the speed of the disk and read their headers "
        "alone; the training that decodes a damaged image then names it"
    )
    add("--undecoded", action="store_true", help=undecoded)
    add("--force", action="store_true", help="replace another dataset")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which weights of a run to use, and where its dataset lies."""
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="which weights to use"
    )
    add_data_option(parser)


def add_data_option(parser: argparse.ArgumentParser) -> None:
    data = "the run's dataset, where it does not lie at data.path of the run"
    parser.add_argument("--data", metavar="DIR", help=data)


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fastlab export`."""
    add = parser.add_argument
    add("run", type=Path, help="run directory")
    to = "an ONNX graph, a torch.export program, or weights alone"
    add("--to", choices=("onnx", "torch", "safetensors"), required=True, help=to)
    out = "default: the run's name with .onnx, .pt2 or .safetensors, in the working directory"
    add("--out", type=Path, metavar="FILE", help=out)
    normalise = "take pixels, uint8 [b, S, S, 3], and normalise them in the graph"
    add("--normalise", action="store_true", help=normalise)
    batch = "take any number of images (default: one)"
    add("--dynamic-batch", action="store_true", help=batch)
    add_model_options(parser)
    add("--force", action="store_true", help="replace an existing file")


def add_push_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fastlab push`."""
    add = parser.add_argument
    add("run", type=Path, help="run directory")
    add("repository", metavar="OWNER/NAME", help="repository of the Hugging Face Hub")
    add("--dry-run", type=Path, metavar="DIR", help="write the files to DIR, send nothing")
    add("--private", action="store_true", help="make a new repository private")
    licence = "of the weights, as the Hub abbreviates it, such as apache-2.0"
    add("--license", default="", help=licence)
    add("--data-license", default="", help="of the data, where fastlab does not know it")
    also = "a run with another seed, whose figures the card gives too; may be repeated"
    add("--also", type=Path, action="append", default=[], metavar="RUN", help=also)
    add_data_option(parser)
