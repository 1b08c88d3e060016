"""The `fastlab` command: arguments in, calls out. What a command needs is imported when it runs,
so that ``--help`` is instant."""

import argparse
import sys
from pathlib import Path

import fastlab
from fastlab.console import UserError, run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastlab", description=fastlab.__doc__)
    parser.add_argument("--version", action="version", version=f"fastlab {fastlab.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_download,
        _add_synth,
        _add_convert,
        _add_inspect,
        _add_train,
        _add_evaluate,
        _add_predict,
        _add_report,
        _add_trace,
        _add_doctor,
    ):
        add(commands)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.unknown = unknown[0]
        return run_command(_refuse, args)
    return run_command(args.call, args)


def _refuse(args: argparse.Namespace) -> None:
    """In a line, where argparse would give the usage of all commands."""
    hint = f"see fastlab {args.command} --help"
    if args.command == "train" and not args.unknown.startswith("-"):
        hint = f"give it as --config {args.unknown}"
    raise UserError(f"{args.command}: unexpected argument {args.unknown!r}; {hint}")


def _add_download(commands) -> None:
    parser = commands.add_parser("download", help="fetch the official Tiny ImageNet archive")
    parser.add_argument("out", help="a directory, or the file to write")
    parser.add_argument("--url", help="another address")
    parser.add_argument("--sha256", help="checksum of what is at --url")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.set_defaults(call=_download)


def _download(args: argparse.Namespace) -> None:
    from fastlab.dataset.download import TINY_IMAGENET, download

    download(args.out, args.url or TINY_IMAGENET.url, args.sha256, force=args.force)


def _add_synth(commands) -> None:
    parser = commands.add_parser("synth", help="write a generated, learnable dataset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=100, help="training images a class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace an existing directory")
    parser.set_defaults(call=_synth)


def _synth(args: argparse.Namespace) -> None:
    from fastlab.dataset.synth import synthesise

    synthesise(args.out, args.classes, args.per_class, args.seed, args.force)
    print(f"{args.out}: {args.classes} classes of {args.per_class} training images")


def _add_convert(commands) -> None:
    parser = commands.add_parser("convert", help="originals to a dataset directory, decoded once")
    parser.add_argument(
        "source",
        type=Path,
        help="Tiny ImageNet (directory, .zip, .tar, .tar.xz, .txz, .tar.gz, .tgz, .tar.bz2) "
        "or an image folder",
    )
    parser.add_argument("out", type=Path, help="dataset directory to write")
    parser.add_argument(
        "--formats", default="array", help="array, ffcv, tar; separated by commas (default: array)"
    )
    parser.add_argument(
        "--ffcv-encoding", default="raw", help="raw (decoded pixels) or jpeg (the original bytes)"
    )
    parser.add_argument(
        "--shard-images", type=int, default=10_000, metavar="N", help="images a tar shard"
    )
    parser.add_argument("--workers", type=int, default=0, help="default: one for each core")
    parser.add_argument("--classes", default="", help="the first N classes, or ids with commas")
    parser.add_argument("--limit-per-class", type=int, default=0, metavar="N")
    parser.add_argument("--image-size", type=int, default=64, metavar="S", help="side, pixels")
    parser.add_argument(
        "--holdout",
        type=int,
        default=0,
        metavar="N",
        help="take N images a class out of train as val; the official val becomes test",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the held-out choice")
    parser.add_argument(
        "--on-corrupt",
        default="error",
        metavar="error|skip",
        help="skip: leave corrupt images out; the manifest and reports say which and how many",
    )
    parser.add_argument("--force", action="store_true", help="replace another dataset")
    parser.set_defaults(call=_convert)


def _convert(args: argparse.Namespace) -> None:
    from fastlab.dataset.convert import Options, convert
    from fastlab.dataset.formats import Settings
    from fastlab.dataset.manifest import table

    options = Options(
        formats=tuple(args.formats.split(",")),
        settings=Settings(args.ffcv_encoding, args.shard_images),
        workers=args.workers,
        classes=args.classes,
        limit_per_class=args.limit_per_class,
        image_size=args.image_size,
        holdout=args.holdout,
        seed=args.seed,
        on_corrupt=args.on_corrupt,
        force=args.force,
    )
    manifest, written = convert(args.source, args.out, options)
    if not written:
        print(f"{args.out}: holds this already, nothing to do")
    print(table(manifest))


_SHOW = "draw training images, and below each the same one augmented: flip, shift, cutout, crop"


def _add_inspect(commands) -> None:
    parser = commands.add_parser("inspect", help="say what a dataset directory holds")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--json", action="store_true", help="print the manifest")
    parser.add_argument("--verify", action="store_true", help="read every file, check its hash")
    parser.add_argument("--show", type=Path, metavar="FILE.png", help=_SHOW)
    parser.set_defaults(call=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    from fastlab.dataset.manifest import check_hashes, check_sizes, read_manifest, table

    manifest = read_manifest(args.directory)
    check_sizes(args.directory, manifest)
    verified = check_hashes(args.directory, manifest) if args.verify else 0
    print(manifest.to_json() if args.json else table(manifest))
    if args.verify:
        print(f"verified: {verified} files agree with their hashes", file=sys.stderr)
    if args.show:
        from pipelines.samples import draw_samples  # imports torch and numba, which take seconds

        draw_samples(args.directory, manifest, args.show)
        print(f"samples: {args.show}", file=sys.stderr)


def _add_train(commands) -> None:
    parser = commands.add_parser("train", help="train a model, or go on with a run")
    # fastlab.train's own arguments, without its imports.
    parser.add_argument("--config", type=Path, help="a configuration, such as configs/demo.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides"
    )
    parser.add_argument("--out", type=Path, help="run directory (default: runs/<config name>)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with an unfinished run")
    parser.add_argument("--profile", action="store_true", help="record a trace ([profile])")
    parser.set_defaults(call=_train)


def _train(args: argparse.Namespace) -> int:
    from fastlab.train import run

    return run(args)


def _add_evaluate(commands) -> None:
    parser = commands.add_parser("evaluate", help="loss, top-1 and top-5 of a run on a split")
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(call=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from fastlab.predict import evaluate_run

    print(evaluate_run(args.run, args.split, args.checkpoint, args.json))


def _add_predict(commands) -> None:
    parser = commands.add_parser("predict", help="the five best classes of each image")
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.set_defaults(call=_predict)


def _predict(args: argparse.Namespace) -> None:
    from fastlab.predict import predict_images

    found = predict_images(args.run, args.images, args.checkpoint)
    for path, best in zip(args.images, found, strict=True):
        print(path)
        for name, probability in best:
            print(f"  {probability:7.2%}  {name}")


def _add_report(commands) -> None:
    parser = commands.add_parser("report", help="curves and tables of runs as one page")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.set_defaults(call=_report)


def _report(args: argparse.Namespace) -> None:
    from fastlab.report.page import write_report

    write_report(args.runs, args.out)
    print(f"report: {args.out}")


def _add_trace(commands) -> None:
    parser = commands.add_parser("trace", help="what a recorded trace says, and what to try next")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, or .pt.trace.json")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="set another beside it")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write (default: RUN/traces/review.html)"
    )
    parser.add_argument("--tensorboard", action="store_true", help="open TensorBoard instead")
    parser.add_argument("--port", type=int, default=6006, help="of TensorBoard, on localhost")
    parser.set_defaults(call=_trace)


def _trace(args: argparse.Namespace) -> None:
    from fastlab.traces.page import run

    run(args)


def _add_doctor(commands) -> None:
    parser = commands.add_parser(
        "doctor", help="what of fastlab works on this machine, and why not"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(call=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    from fastlab.machine import examine, table

    found = examine()
    if args.json:
        import json

        print(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        print(table(found))


if __name__ == "__main__":
    raise SystemExit(main())
