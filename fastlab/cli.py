"""The `fastlab` command: options in, calls out. `COMMANDS`, at the end, is its table of contents.

What a command needs is imported when it runs, so that ``--help`` takes no time.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import fastlab
from fastlab.console import (
    UserError,
    port_number,
    positive_duration,
    positive_float,
    positive_int,
    printable,
    run_command,
)
from fastlab.options import (
    add_convert_options,
    add_export_options,
    add_model_options,
    add_push_options,
    add_set_option,
    add_training_options,
)
from fastlab.processes import interrupted_by_signals, spin_briefly


class Command(NamedTuple):
    """A command: what it does in a line, its options, and what runs it."""

    help: str
    add_options: Callable[[ArgumentParser], None]
    call: Callable[[Namespace], int | None]


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="fastlab", description=fastlab.__doc__)
    parser.add_argument("--version", action="version", version=f"fastlab {fastlab.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        options = commands.add_parser(name, help=command.help)
        command.add_options(options)
        options.set_defaults(call=command.call)
    spin_briefly()  # here, since the commands import torch
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.unknown, args.call = unknown[0], _refuse
    return run_command(args.call, args)


def _refuse(args: Namespace) -> None:
    """Refuse an argument in one line, where argparse would print the usage of all commands."""
    hint = f"see fastlab {args.command} --help"
    if args.command == "train" and not args.unknown.startswith("-"):
        hint = f"give it as --config {args.unknown}"
    raise UserError(f"{args.command}: unexpected argument {args.unknown!r}; {hint}")


def _download_options(parser: ArgumentParser) -> None:
    parser.add_argument("out", help="a directory, or the file to write")
    parser.add_argument("--url", help="another address than the official one")
    parser.add_argument("--sha256", help="checksum of the file at --url")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def _download(args: Namespace) -> None:
    from fastlab.dataset.download import TINY_IMAGENET_URL, download

    with interrupted_by_signals():
        download(args.out, args.url or TINY_IMAGENET_URL, args.sha256, force=args.force)


def _synth_options(parser: ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--classes", type=int, default=10, metavar="N")
    parser.add_argument(
        "--per-class", type=int, default=100, metavar="N", help="training images per class"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace an existing directory")


def _synth(args: Namespace) -> None:
    from fastlab.dataset.synth import synthesise

    with interrupted_by_signals():
        synthesise(args.out, args.classes, args.per_class, args.seed, args.force)
    print(f"{printable(str(args.out))}: {args.classes} classes of {args.per_class} training images")


def _convert(args: Namespace) -> None:
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
        val_fraction=args.val_fraction,
        columns=args.columns,
        fit=args.fit,
        on_corrupt=args.on_corrupt,
        undecoded=args.undecoded,
        force=args.force,
    )
    with interrupted_by_signals():
        manifest, written = convert(args.source, args.out, options)
    if not written:
        print(f"{printable(str(args.out))}: holds this dataset already, nothing to do")
    print(table(manifest))


def _inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument("directory", help="dataset directory, or its URL")
    parser.add_argument("--json", action="store_true", help="print the manifest")
    parser.add_argument("--verify", action="store_true", help="read every file, check its hash")
    show = "draw training images, and below each the same one augmented: flip, shift, cutout, crop"
    parser.add_argument("--show", type=Path, metavar="FILE.png", help=show)
    config = "draw them as [augment] of this configuration augments them instead"
    parser.add_argument("--config", type=Path, help=config)
    add_set_option(parser, "override one value of the configuration; may be repeated")


def _inspect(args: Namespace) -> None:
    from fastlab.config import load
    from fastlab.dataset.manifest import check_hashes, check_sizes, read_manifest, table
    from fastlab.dataset.remote import is_remote

    configured = args.config or args.overrides
    if configured and not args.show:
        raise UserError("inspect: --config and --set say what --show FILE.png draws; add --show")
    augment = load(args.config, args.overrides).augment if configured else None
    if is_remote(args.directory) and (args.verify or args.show):
        raise UserError(f"{args.directory}: --verify and --show read all files; give a local copy")
    manifest = read_manifest(args.directory)
    check_sizes(args.directory, manifest)
    verified = check_hashes(Path(args.directory), manifest) if args.verify else 0
    print(manifest.to_json() if args.json else table(manifest))
    if args.verify:
        print(f"verified: {verified} files agree with their hashes", file=sys.stderr)
    if args.show:
        from pipelines.samples import draw_samples  # imports torch and numba, which take seconds

        draw_samples(Path(args.directory), manifest, args.show, augment)
        print(f"samples: {printable(str(args.show))}", file=sys.stderr)


def _train(args: Namespace) -> int:
    from fastlab.training.resolve import begun, resolve

    resolved = resolve(args)  # reports a mistake before torch is imported, which takes seconds
    from fastlab.train import run

    return run(*resolved, **begun(args))


def _evaluate_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--split", default="val")
    tta = "average the logits of each image and its mirror image (default: as the run did)"
    parser.add_argument("--tta", choices=("none", "flip"), help=tta)
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _evaluate(args: Namespace) -> None:
    from fastlab.predict import evaluate_run

    evaluation = evaluate_run(args.run, args.split, args.checkpoint, args.data, args.tta)
    print(evaluation.to_json() if args.json else evaluation)


def _predict_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory")
    images = "an image (JPEG, PNG, WebP, BMP, GIF, TIFF), or a folder of images"
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help=images)
    top = "classes of each image (default: 5)"
    parser.add_argument("--top", type=positive_int, default=5, metavar="K", help=top)
    add_model_options(parser)
    form = parser.add_mutually_exclusive_group()
    for name, what in (("json", "a line of JSON for each image"), ("csv", "a row for each class")):
        form.add_argument(f"--{name}", action="store_const", const=name, dest="form", help=what)
    parser.set_defaults(form="text")


def _predict(args: Namespace) -> int:
    from fastlab.predict import predict_images, print_predictions

    results = predict_images(args.run, args.images, args.checkpoint, args.top, args.data)
    return print_predictions(results, args.form)


def _show_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    port = "port of the page, on this machine only; 0 takes one that is free (default: 8000)"
    parser.add_argument("--port", type=port_number, default=8000, help=port)
    add_model_options(parser)


def _show(args: Namespace) -> None:
    from fastlab.show.server import run

    run(args)


def _export(args: Namespace) -> None:
    from fastlab.export import export

    exported = export(
        args.run,
        args.to,
        args.out,
        which=args.checkpoint,
        dynamic_batch=args.dynamic_batch,
        normalise=args.normalise,
        data=args.data,
        force=args.force,
    )
    print(exported)


def _push(args: Namespace) -> None:
    from fastlab.export.push import run

    run(args)


def _report_options(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE")


def _report(args: Namespace) -> None:
    from fastlab.report.page import write_report

    write_report(args.runs, args.out)
    print(f"report: {args.out}")


def _trace_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, trace or folder of traces")
    add("--compare", type=Path, metavar="RUN", help="show another run's trace beside it")
    page = "page to write (default: RUN/traces/review.html)"
    add("--out", type=Path, metavar="FILE", help=page)
    add("--tensorboard", action="store_true", help="open TensorBoard instead")
    add("--port", type=int, default=6006, help="port of TensorBoard, on localhost")


def _trace(args: Namespace) -> None:
    from fastlab.traces.page import run

    run(args)


def _bottleneck_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    loader = "FILE.py:NAME or package.module:NAME, a loader or a function that returns one"
    add("loader", metavar="LOADER", help=loader)
    step = "a function that takes a batch and trains on it, named in the same way"
    add("--step", metavar="STEP", help=step)
    seconds = "time for all measurements, about (default: 30)"
    add("--seconds", type=positive_float, default=30.0, metavar="S", help=seconds)
    timeout = "seconds that a batch or a step may take (default: 120)"
    add("--timeout", type=positive_float, default=120.0, metavar="S", help=timeout)
    add("--json", action="store_true", help="print JSON")


def _bottleneck(args: Namespace) -> None:
    from fastlab.bottleneck.command import run

    run(args)


def _study_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("studies", nargs="+", type=Path, metavar="STUDY.toml", help="study files")
    add("--out", type=Path, required=True, help="directory of runs and report")
    add("--epochs", type=positive_int, default=0, metavar="N", help="epochs of every run")
    seeds = "number of seeds (default: those of the study)"
    add("--seeds", type=positive_int, default=0, metavar="N", help=seeds)
    add("--jobs", type=positive_int, default=1, metavar="N", help="trainings side by side")
    only = "train only the runs of these names, such as '*-dropout-*' or '*-seed0'"
    add("--only", action="append", default=[], metavar="PATTERN", help=only)
    until = "after the planned runs, add seeds one by one to the claims that they decide soonest"
    add("--until-decided", action="store_true", help=until)
    budget = "time for the seeds that --until-decided adds, such as 90m or 2h (default: no limit)"
    add("--budget", type=positive_duration, metavar="TIME", help=budget)
    add_set_option(parser, "change the base configurations; a study's own rows come after")
    add("--dry-run", action="store_true", help="print the plan, train nothing")
    add("--no-calibration", action="store_true", help="estimate from finished runs alone")
    add("--retry", action="store_true", help="try failed runs again")
    add("--report-only", action="store_true", help="report the finished runs, train nothing")
    add("--cluster", choices=("slurm",), help="train the runs as an array of SLURM jobs")
    add(
        "--cluster-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of sbatch, such as time=600 or partition=gpu",
    )


def _study(args: Namespace) -> int:
    from fastlab.study.command import Request, run

    if args.budget and not args.until_decided:
        raise UserError("--budget: limits the seeds that --until-decided adds; give both")
    return run(Request(**{each.name: getattr(args, each.name) for each in fields(Request)}))


def _configs_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    names = "what to copy (default: everything)"
    add("names", nargs="*", metavar="NAME", help=names)
    copy = "copy them there, with the folders that they have in a checkout"
    add("--copy", type=Path, metavar="DIR", help=copy)


def _configs(args: Namespace) -> None:
    from fastlab.shipped import copy, descriptions

    if args.names and not args.copy:
        raise UserError("configs: names say what --copy DIR copies; add --copy DIR")
    if not args.copy:
        found = descriptions()
        width = max(map(len, found))
        print("\n".join(f"{name:{width}}  {description}" for name, description in found.items()))
        return
    written = copy(args.copy, args.names)
    done = f"files copied: {len(written)}" if written else "holds these files already"
    print(f"{printable(str(args.copy))}: {done}")


def _doctor_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _doctor(args: Namespace) -> None:
    from fastlab.machine import examine, table

    findings = examine()
    if args.json:
        import json

        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        print(table(findings))


COMMANDS = {
    "configs": Command("list or copy the configurations", _configs_options, _configs),
    "download": Command("fetch the official Tiny ImageNet archive", _download_options, _download),
    "synth": Command("write a generated, learnable dataset", _synth_options, _synth),
    "convert": Command("decode originals once into a dataset", add_convert_options, _convert),
    "inspect": Command("describe and check a dataset directory", _inspect_options, _inspect),
    "train": Command("train a model, or continue a run", add_training_options, _train),
    "evaluate": Command("loss, top-1 and top-5 of a run on a split", _evaluate_options, _evaluate),
    "predict": Command("the most probable classes of each image", _predict_options, _predict),
    "show": Command("try pictures and browse mistakes in a browser", _show_options, _show),
    "export": Command("a run's model as a file for other programs", add_export_options, _export),
    "push": Command("upload a run's model to the Hugging Face Hub", add_push_options, _push),
    "report": Command("curves and tables of runs as one page", _report_options, _report),
    "trace": Command("review a recorded trace: what to try next", _trace_options, _trace),
    "bottleneck": Command("what limits your loader and step", _bottleneck_options, _bottleneck),
    "study": Command("train every row of ablation studies, and report", _study_options, _study),
    "doctor": Command("what works on this machine, and why not", _doctor_options, _doctor),
}

if __name__ == "__main__":
    raise SystemExit(main())
