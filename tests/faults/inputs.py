"""Damaged inputs, each given to the real command, many in one process.

    python -m tests.faults.inputs BASE CATEGORY SEED FIRST COUNT SCRATCH

prints a line of JSON for each input. Input n of a seed is always the same, so each can be tried
alone.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image, ImageOps

from tests.faults import mutations
from tests.faults.outcomes import (
    CLEAR,
    Tally,
    any_result,
    call,
    judge,
    left_behind,
    same_images,
    same_run,
)
from tests.packages import has
from tests.trainings import ROOT, checkpoints

_SECONDS = 120  # that one input may take; nearly all take a fraction of a second
_BATCH = 100  # inputs that one process tries
_PIXELS = 64_000_000  # the converter refuses images with more


# Images


def images(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """An image of an image folder: it is converted as Pillow decodes it, or named as corrupt."""
    kinds = [*mutations.BYTES, *mutations.IMAGES]
    kind = kinds[random.integers(len(kinds))]
    data = mutations.image_file(kind, random)
    source, out = scratch / "source", scratch / "out"
    shutil.copytree(base / "folder", source)
    bad = source / "train" / "b" / "0.jpg"
    bad.write_bytes(data)

    def correct() -> str:
        converted = np.load(out / "array" / "train-images.npy")[4]
        expected, allowed = _by_pillow(data)
        if expected is None:
            return "Pillow cannot read it"
        difference = np.abs(converted.astype(np.int64) - expected).max()
        return "" if difference <= allowed else "other pixels than Pillow's"

    def unharmed() -> str:
        return left_behind(scratch, {"source"}) or _skipped(source, scratch / "skipped")

    convert = ["convert", str(source), "--workers", "1"]
    outcome = judge(*call([*convert, str(out)]), correct, unharmed)
    return f"image: {kind}", outcome


def _by_pillow(data: bytes) -> tuple[np.ndarray | None, int]:
    """The image as Pillow decodes it, uint8 [64, 64, 3], and how far the converter's may be from
    it: two levels where both resize the central square. None where Pillow refuses it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > _PIXELS:
                    return None, 0
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):
                    grey = np.rint(np.asarray(image, dtype=np.float64) / 257)
                    image = Image.fromarray(grey.astype(np.uint8))
                image = image.convert("RGB")
                if image.size == (64, 64):
                    return np.asarray(image), 0
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                image = image.crop((left, top, left + side, top + side))
                return np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)), 2
    except Exception:
        return None, 0


def _skipped(source: Path, out: Path) -> str:
    """What is wrong with a conversion with ``--on-corrupt skip``."""
    convert = ["convert", str(source), str(out), "--workers", "1", "--on-corrupt", "skip"]
    code, errors = call(convert)
    if code:
        return f"--on-corrupt skip: {code} {errors}"
    manifest = json.loads((out / "manifest.json").read_text())
    named = list(manifest["skipped"]) == ["train/b/0.jpg"]
    right = named and manifest["splits"]["train"]["images"] == 7
    return "" if right else "--on-corrupt skip: other images were skipped"


# Archives


def zips(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """A zip of originals: nothing but its intact images is converted, no file leaves the target."""
    return _archive(base, scratch, random, "zip", mutations.ZIPS, mutations.zip_file)


def tars(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """As `zips`, with a tar."""
    return _archive(base, scratch, random, "tar", mutations.TARS, mutations.tar_file)


def _archive(
    base: Path,
    scratch: Path,
    random: np.random.Generator,
    suffix: str,
    kinds: tuple[str, ...],
    pack: Callable,
) -> tuple[str, str]:
    kind = kinds[random.integers(len(kinds))]
    files = mutations.tree_files(base / "tiny")
    path, out = scratch / f"tiny.{suffix}", scratch / "out"
    path.write_bytes(pack(files, kind, random))

    def correct() -> str:
        return same_images(out, base / "dataset")

    def unharmed() -> str:
        return left_behind(scratch, {path.name})

    outcome = judge(*call(["convert", str(path), str(out), "--workers", "1"]), correct, unharmed)
    if Path("/tmp/fastlab-was-here").exists() or set(os.listdir(scratch)) - {path.name, "out"}:
        outcome = "a file outside the target"
    return f"{suffix}: {kind}", outcome


def sources(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """A file of another source. Bits that change in a shard or a batch of CIFAR, which have no
    checksums, may give other images or labels."""
    kinds = sorted(path.name for path in (base / "converted").iterdir())
    source = kinds[random.integers(len(kinds))]
    copy, out = scratch / source, scratch / "out"
    shutil.copytree(base / "sources" / source, copy)
    files = sorted(copy.iterdir())
    path = files[random.integers(len(files))]
    kind = list(mutations.BYTES)[random.integers(len(mutations.BYTES))]
    path.write_bytes(mutations.BYTES[kind](path.read_bytes(), random))
    checked = source == "parquet" or kind == "truncated"

    def correct() -> str:
        return same_images(out, base / "converted" / source) if checked else ""

    convert = ["convert", str(copy), str(out), "--workers", "1", "--val-fraction", "0.3"]
    outcome = judge(*call(convert), correct, partial(left_behind, scratch, {source}))
    return f"{source}: {kind}", outcome


# Dataset directories


def manifests(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """A dataset's manifest: any change of its content is refused. Where its checksum fits, so is
    whatever would be wrong without a word in `inspect` or an epoch."""
    data = scratch / "dataset"
    shutil.copytree(base / "dataset", data)
    path = data / "manifest.json"
    before = path.read_text()
    kinds = ("a value changed", "bits flipped", "truncated", "a value, its checksum fits")
    kind = kinds[random.integers(len(kinds))]
    if kind == "a value changed":
        path.write_text(mutations.json_damaged(before, random))
    elif kind == kinds[-1]:
        path.write_text(mutations.manifest_damaged(before, random))
    else:
        path.write_bytes(mutations.BYTES[kind](before.encode(), random))

    def correct() -> str:
        if kind == kinds[-1]:
            return _read_through(data, "array")
        after = json.loads(path.read_bytes())
        return "" if after == json.loads(before) else "a changed manifest was accepted"

    return f"manifest: {kind}", judge(*call(["inspect", str(data)]), correct, any_result)


def stored(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """A file of a format: `inspect --verify` notices any change, and no engine crashes on it."""
    data = scratch / "dataset"
    shutil.copytree(base / "dataset", data)
    names = sorted(str(p.relative_to(data)) for p in data.glob("*/*"))
    name = names[random.integers(len(names))]
    kind = list(mutations.BYTES)[random.integers(len(mutations.BYTES))]
    before = (data / name).read_bytes()
    (data / name).write_bytes(mutations.BYTES[kind](before, random))
    fault = f"{name.partition('/')[0]}: {kind}"

    def correct() -> str:
        return "" if (data / name).read_bytes() == before else "--verify did not notice"

    outcome = judge(*call(["inspect", str(data), "--verify"]), correct, any_result)
    if outcome != CLEAR:
        return fault, outcome
    return fault, _read_through(data, name) or outcome


def _read_through(data: Path, name: str) -> str:
    """What goes wrong in an epoch over a damaged file; a one-line error is right."""
    import torch

    from fastlab.config import DataConfig
    from fastlab.console import UserError
    from fastlab.dataset.manifest import read_manifest
    from pipelines import PipelineSpec, make_pipeline

    engines: dict[str, tuple[Any, ...]] = {
        "array": ("resident",),
        "ffcv": ("ffcv",),
        "tar": ("torchvision", "stream", "dali"),
    }
    manifest = read_manifest(data)
    split = "val" if "val" in name else "train"
    for engine in engines[name.partition("/")[0]]:
        if engine == "dali" and not has("nvidia.dali"):
            continue
        try:
            spec = PipelineSpec(
                DataConfig(path=str(data), pipeline=engine, workers=1),
                None,
                manifest,
                split,
                batch_size=8,
                device=torch.device("cpu"),
                dtype=torch.float32,
            )
            pipeline = make_pipeline(spec)
            images = sum(int(batch.mask.sum()) for batch in pipeline.epoch(0))
        except UserError as error:
            if "\n" in str(error):
                return f"{engine}: not one line: {error}"
        except Exception as error:
            return f"{engine}: {error!r}"
        else:
            if images != manifest.splits[split].images:
                return f"{engine}: {images} images"
    return ""


# Configurations


def configurations(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """A configuration, or an override of one: it is refused in one line, and no run is begun."""
    text = (ROOT / "configs" / "demo.toml").read_text()
    kinds = (*mutations.BYTES, "a value", "an unknown key", "an override", "a long dotted key")
    kind = kinds[random.integers(len(kinds))]
    path, extra = scratch / "config.toml", []
    if kind in mutations.BYTES:
        path.write_bytes(mutations.BYTES[kind](text.encode(), random))
    elif kind == "a long dotted key":
        path.write_text(text + "a." * int(random.integers(33_000, 200_000)) + "a = 1\n")
    else:
        extra = _odd_setting(path, tomllib.loads(text), kind, random)
    # Where the configuration is still valid, the missing dataset is what is refused.
    sets = [part for value in extra for part in ("--set", value)]
    arguments = ["train", "--config", str(path), *sets, "--set", f"data.path={scratch / 'none'}"]
    out = scratch / "run"

    def unharmed() -> str:
        return left_behind(scratch, {"config.toml"})

    result = call([*arguments, "--out", str(out)])
    return f"configuration: {kind}", judge(*result, any_result, unharmed)


def _odd_setting(path: Path, tables: dict, kind: str, random: np.random.Generator) -> list[str]:
    """Write `tables` to `path` with one odd value or key. Returns an odd override, if `kind` asks
    for one instead."""
    odd = [v for v in mutations.ODD_VALUES if v is not None and v not in (2**63, 2**70)]
    section = list(tables)[random.integers(len(tables))]
    key = list(tables[section])[random.integers(len(tables[section]))]
    value = odd[random.integers(len(odd))]
    if kind == "an unknown key":
        tables[section][f"{key}_"] = tables[section].pop(key)
    elif kind == "a value":
        tables[section][key] = value
    path.write_text(tomli_w.dumps(tables))
    if kind != "an override":
        return []
    texts = [f"{section}.{key}={value}", f"{section}{key}={value}", f".{key}={value}", str(value)]
    return [texts[random.integers(len(texts))]]


# Runs


def stopped_runs(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """A file of a checkpoint: the resumed run ends as the undisturbed one did, or is refused."""
    run = scratch / "run"
    shutil.copytree(base / "stopped", run)
    files = sorted(file for folder in checkpoints(run) for file in folder.iterdir())
    path = files[random.integers(len(files))]
    kind = list(mutations.BYTES)[random.integers(len(mutations.BYTES))]
    path.write_bytes(damaged := mutations.BYTES[kind](path.read_bytes(), random))

    def correct() -> str:
        return same_run(run, base / "whole")

    def unharmed() -> str:
        return "" if path.read_bytes() == damaged else "the checkpoint was changed"

    outcome = judge(*call(["train", "--resume", str(run)]), correct, unharmed)
    return f"checkpoint: {kind}", outcome


def states(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """A value of a checkpoint, with checksums that fit: where another leads to another result, or a
    missing one to none, it is refused."""
    import torch

    run = scratch / "run"
    shutil.copytree(base / "stopped", run)
    path = checkpoints(run)[-1] / ("state.pt", "rank-0.pt")[random.integers(2)]
    state = torch.load(path, weights_only=True)
    kind = mutations.state_damaged(state, random)
    torch.save(state, path)
    damaged = path.read_bytes()

    def correct() -> str:
        return same_run(run, base / "whole")

    def unharmed() -> str:
        return "" if path.read_bytes() == damaged else "the checkpoint was changed"

    outcome = judge(*call(["train", "--resume", str(run)]), correct, unharmed)
    return f"state of a checkpoint: {kind}", outcome


def runs(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """A file that `report` or `evaluate` reads: changed weights are refused."""
    run, out = scratch / "run", scratch / "report.html"
    shutil.copytree(base / "whole", run)
    names = ("config.toml", "environment.json", "metrics.jsonl", "predictions.json")
    names += ("summary.json", "errors.json", "checkpoints/best.safetensors")
    path = run / names[random.integers(len(names))]
    kind = list(mutations.BYTES)[random.integers(len(mutations.BYTES))]
    before = path.read_bytes()
    path.write_bytes(mutations.BYTES[kind](before, random))
    if path.suffix != ".safetensors":
        result = call(["report", str(run), "--out", str(out)])
        unharmed = partial(left_behind, scratch, {"run"})
        return f"run: {kind}", judge(*result, any_result, unharmed)

    def correct() -> str:
        return "" if path.read_bytes() == before else "changed weights were accepted"

    return f"run: {kind}", judge(*call(["evaluate", str(run)]), correct, any_result)


def predictions(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """An image, or a run's record of its dataset, which is not there: what was not changed is
    predicted, a changed record is refused."""
    run, image = scratch / "run", scratch / "image"
    shutil.copytree(base / "whole", run)
    config = tomllib.loads((run / "config.toml").read_text())
    config["data"]["path"] = "none"
    (run / "config.toml").write_text(tomli_w.dumps(config))
    kind = list(mutations.BYTES)[random.integers(len(mutations.BYTES))]
    name = (*mutations.FORMATS, "record")[random.integers(len(mutations.FORMATS) + 1)]
    saved = mutations.FORMATS.get(name, mutations.FORMATS["PNG"])
    data = saved(Image.fromarray(mutations.picture(random)), random)
    image.write_bytes(data if name == "record" else mutations.BYTES[kind](data, random))
    record = (run / "dataset.json").read_bytes()
    if name == "record":
        (run / "dataset.json").write_bytes(mutations.BYTES[kind](record, random))

    def correct() -> str:
        after = json.loads((run / "dataset.json").read_bytes())
        return "" if after == json.loads(record) else "a changed record was accepted"

    outcome = judge(*call(["predict", str(run), str(image)]), correct, any_result)
    return f"prediction: {name}, {kind}", outcome


CATEGORIES: dict[str, Callable[[Path, Path, np.random.Generator], tuple[str, str]]] = {
    "images": images,
    "zips": zips,
    "tars": tars,
    "manifests": manifests,
    "stored": stored,
    "configurations": configurations,
    "checkpoints": stopped_runs,
    "runs": runs,
    "predictions": predictions,
    "states": states,
    "sources": sources,
}


def try_all(
    base: Path, scratch: Path, category: str, seed: int, first: int, count: int
) -> Iterator[str]:
    """A line of JSON before and after each input, so that one that ends the process is known."""
    for number in range(first, first + count):
        yield json.dumps({"number": number})
        random = np.random.default_rng([seed, list(CATEGORIES).index(category), number])
        scratch.mkdir()
        fault, outcome = CATEGORIES[category](base, scratch, random)
        shutil.rmtree(scratch)
        yield json.dumps({"number": number, "fault": fault, "outcome": outcome})


def run(tally: Tally, base: Path, scratch: Path, category: str, seed: int, count: int) -> None:
    """Try the first `count` inputs of a category, in processes that may crash or hang."""
    first = 0
    while first < count:
        size = min(_BATCH, count - first)
        lines, failure = _in_process(base, scratch, category, seed, first, size)
        for line in lines:
            if "fault" in line:
                where = f"({category} {seed} {line['number']})"
                tally.add(line["fault"], line["outcome"], where)
        begun = lines[-1]["number"] if lines else first
        if failure:
            tally.add(category, failure, f"({category} {seed} {begun})")
        first = begun + 1
        shutil.rmtree(scratch, ignore_errors=True)


def _in_process(
    base: Path, scratch: Path, category: str, seed: int, first: int, count: int
) -> tuple[list[dict], str]:
    """The lines of a process that tries `count` inputs, and how it ended where it was too early."""
    arguments = [base, category, seed, first, count, scratch]
    started = [sys.executable, "-m", "tests.faults.inputs", *map(str, arguments)]
    log = scratch.with_name(f"{scratch.name}.log")
    with log.open("w") as out:
        process = subprocess.Popen(started, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=_SECONDS + 5 * count)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            errors = "hung"
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    complete = sum("fault" in line for line in lines) == count
    return lines, "" if complete else f"ended by {process.returncode}: {errors.strip()[-400:]}"


def main() -> None:
    base, category, seed, first, count, scratch = sys.argv[1:7]
    numbers = (int(seed), int(first), int(count))
    for line in try_all(Path(base), Path(scratch), category, *numbers):
        print(line, flush=True)


if __name__ == "__main__":
    main()
