"""Damaged inputs, each given to the real command, many in one process.

    python -m tests.faults.inputs BASE CATEGORY SEED FIRST COUNT    # a line of JSON an input

Input number n of a seed is always the same: a line can be looked into alone.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tomli_w
from PIL import Image, ImageOps

from tests.faults import mutations
from tests.faults.outcomes import CLEAR, Tally, judge
from tests.packages import has
from tests.trainings import command, metrics, weights

ROOT = Path(__file__).parents[2]
_SECONDS = 120  # an input may take; nearly all take a fraction of a second
_BATCH = 100  # inputs a process
_PIXELS = 64_000_000


def call(arguments: list[str]) -> tuple[int, str]:
    """Exit status and standard error of ``fastlab ARGUMENTS``, here; 70 for a traceback."""
    from fastlab.cli import main

    if "accelerate" in sys.modules:  # it keeps the precision that a process first asked for
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
        except BaseException:
            return 70, traceback.format_exc()
    return code, errors.getvalue()


def nothing() -> str:
    return ""


# Images


def images(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    kinds = [*mutations.BYTES, *mutations.IMAGES]
    kind = kinds[random.integers(len(kinds))]
    data = mutations.image_file(kind, random)
    source, out = scratch / "source", scratch / "out"
    shutil.copytree(base / "folder", source)
    bad = source / "train" / "b" / "0.jpg"
    bad.write_bytes(data)

    def correct() -> str:
        found = np.load(out / "array" / "train-images.npy")[4]
        expected = _by_pillow(data)
        if expected is None:
            return "Pillow cannot read it"
        return "" if np.array_equal(found, expected) else "other pixels than Pillow's"

    def unharmed() -> str:
        return _left(scratch, {"source"}) or _skipped(source, scratch / "skipped")

    convert = ["convert", str(source), "--workers", "1"]
    outcome = judge(*call([*convert, str(out)]), correct, unharmed)
    return f"image: {kind}", outcome


def _by_pillow(data: bytes) -> np.ndarray | None:
    """uint8 [64, 64, 3] as Pillow decodes and fits it; None where it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > _PIXELS:
                    return None
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):
                    grey = np.rint(np.asarray(image, dtype=np.float64) / 257)
                    image = Image.fromarray(grey.astype(np.uint8))
                image = image.convert("RGB")
                if image.size != (64, 64):
                    image = ImageOps.fit(image, (64, 64), Image.Resampling.BICUBIC)
                return np.asarray(image)
    except Exception:
        return None


def _skipped(source: Path, out: Path) -> str:
    """What is wrong with converting without the one corrupt image."""
    convert = ["convert", str(source), str(out), "--workers", "1", "--on-corrupt", "skip"]
    code, errors = call(convert)
    if code:
        return f"--on-corrupt skip: {code} {errors}"
    manifest = json.loads((out / "manifest.json").read_text())
    named = list(manifest["skipped"]) == ["train/b/0.jpg"]
    return "" if named and manifest["splits"]["train"]["images"] == 7 else "skipped otherwise"


def _left(folder: Path, expected: set[str]) -> str:
    found = set(os.listdir(folder)) - expected
    return f"left behind: {sorted(found)}" if found else ""


# Archives


def zips(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    return _archive(base, scratch, random, "zip", mutations.ZIPS, mutations.zip_file)


def tars(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
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
        whole, found = base / "dataset" / "array", out / "array"
        same = all((found / p.name).read_bytes() == p.read_bytes() for p in whole.iterdir())
        return "" if same else "other images or labels than the intact archive's"

    def unharmed() -> str:
        return _left(scratch, {path.name})

    outcome = judge(*call(["convert", str(path), str(out), "--workers", "1"]), correct, unharmed)
    if Path("/tmp/fastlab-was-here").exists() or set(os.listdir(scratch)) - {path.name, "out"}:
        outcome = "a file outside of the target"
    return f"{suffix}: {kind}", outcome


# Dataset directories


def manifests(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    data = scratch / "dataset"
    shutil.copytree(base / "dataset", data)
    path = data / "manifest.json"
    before = path.read_text()
    kind = ("a value changed", "bits flipped", "truncated")[random.integers(3)]
    if kind == "a value changed":
        path.write_text(mutations.json_damaged(before, random))
    else:
        path.write_bytes(mutations.BYTES[kind](before.encode(), random))

    def correct() -> str:
        found = json.loads(path.read_bytes())
        return "" if found == json.loads(before) else "a changed manifest was taken"

    return f"manifest: {kind}", judge(*call(["inspect", str(data)]), correct, nothing)


def stored(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """A file of a format: `inspect --verify` finds any change, no engine breaks on it."""
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

    outcome = judge(*call(["inspect", str(data), "--verify"]), correct, nothing)
    if outcome != CLEAR:
        return fault, outcome
    return fault, _read_through(data, name) or outcome


def _read_through(data: Path, name: str) -> str:
    """What is wrong with an epoch over a damaged file; a clear error is not."""
    import torch

    from fastlab.config import DataConfig
    from fastlab.console import UserError
    from fastlab.dataset.manifest import read_manifest
    from pipelines import PipelineSpec, make_pipeline

    engines = {"array": ("resident",), "ffcv": ("ffcv",), "tar": ("torchvision", "dali")}
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
    text = (ROOT / "configs" / "demo.toml").read_text()
    kinds = (*mutations.BYTES, "a value", "an unknown key", "an override")
    kind = kinds[random.integers(len(kinds))]
    path, extra = scratch / "config.toml", []
    if kind in mutations.BYTES:
        path.write_bytes(mutations.BYTES[kind](text.encode(), random))
    else:
        extra = _odd_setting(path, tomllib.loads(text), kind, random)
    # A configuration that is valid after all ends at the dataset that is not there.
    sets = [part for value in extra for part in ("--set", value)]
    arguments = ["train", "--config", str(path), *sets, "--set", f"data.path={scratch / 'none'}"]
    out = scratch / "run"

    def unharmed() -> str:
        return _left(scratch, {"config.toml"})

    return f"configuration: {kind}", judge(
        *call([*arguments, "--out", str(out)]), nothing, unharmed
    )


def _odd_setting(path: Path, tables: dict, kind: str, random: np.random.Generator) -> list[str]:
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


def checkpoints(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """A file of the checkpoint: the resumed run ends as the undisturbed one, or is refused."""
    run = scratch / "run"
    shutil.copytree(base / "stopped", run)
    files = sorted((run / "checkpoints").glob("step-*/*"))
    path = files[random.integers(len(files))]
    kind = list(mutations.BYTES)[random.integers(len(mutations.BYTES))]
    path.write_bytes(damaged := mutations.BYTES[kind](path.read_bytes(), random))

    def correct() -> str:
        if metrics(run) != metrics(base / "whole"):
            return "other metrics than the undisturbed run's"
        whole, found = weights(base / "whole"), weights(run)
        same = all(found[name].equal(whole[name]) for name in whole)
        return "" if same else "other weights than the undisturbed run's"

    def unharmed() -> str:
        return "" if path.read_bytes() == damaged else "the checkpoint was touched"

    outcome = judge(*call(["train", "--resume", str(run)]), correct, unharmed)
    return f"checkpoint: {kind}", outcome


def runs(base: Path, scratch: Path, random: np.random.Generator) -> tuple[str, str]:
    """A file that reports and evaluations read."""
    run, out = scratch / "run", scratch / "report.html"
    shutil.copytree(base / "whole", run)
    names = ("config.toml", "environment.json", "metrics.jsonl", "predictions.json")
    names += ("summary.json", "checkpoints/best.safetensors")
    path = run / names[random.integers(len(names))]
    kind = list(mutations.BYTES)[random.integers(len(mutations.BYTES))]
    before = path.read_bytes()
    path.write_bytes(mutations.BYTES[kind](before, random))
    if path.suffix != ".safetensors":
        arguments = ["report", str(run), "--out", str(out)]
        return f"run: {kind}", judge(*call(arguments), nothing, lambda: _left(scratch, {"run"}))

    def correct() -> str:
        return "" if path.read_bytes() == before else "changed weights were taken"

    return f"run: {kind}", judge(*call(["evaluate", str(run)]), correct, nothing)


CATEGORIES: dict[str, Callable[[Path, Path, np.random.Generator], tuple[str, str]]] = {
    "images": images,
    "zips": zips,
    "tars": tars,
    "manifests": manifests,
    "stored": stored,
    "configurations": configurations,
    "checkpoints": checkpoints,
    "runs": runs,
}


def prepare(base: Path) -> None:
    """What all inputs are made from: an image folder, a generated source, its dataset in all
    formats, a run, and the same run as a kill left it. In a process of its own, as the resumed
    runs are: what a process did before may change the last bits of its sums."""
    subprocess.run([sys.executable, "-m", "tests.faults.inputs", str(base)], cwd=ROOT, check=True)


def _prepare(base: Path) -> None:
    from fastlab.dataset.synth import synthesise
    from fastlab.training import checkpoint

    base.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (base / "folder" / split / name).mkdir(parents=True)
            for number in range(4):
                data = mutations.jpeg(mutations.picture(random))
                (base / "folder" / split / name / f"{number}.jpg").write_bytes(data)
    synthesise(base / "tiny", classes=3, per_class=12)
    formats = "array,tar" + (",ffcv" if has("ffcv") else "")
    convert = ["convert", str(base / "tiny"), str(base / "dataset"), "--formats", formats]
    assert call(convert) == (0, "")
    save = checkpoint.save

    def save_and_copy(folder: Path, step: int, *rest) -> None:
        save(folder, step, *rest)
        if step == 3:
            shutil.copytree(base / "whole", base / "stopped")

    checkpoint.save = save_and_copy
    arguments = command(
        base / "dataset", base / "whole", *("train.epochs=2", "train.checkpoint_every=1")
    )
    assert call(["train", *arguments]) == (0, "")
    checkpoint.save = save


def try_all(
    base: Path, scratch: Path, category: str, seed: int, first: int, count: int
) -> Iterator[str]:
    """A line before and after each input; so one that ends the process is known."""
    for number in range(first, first + count):
        yield json.dumps({"number": number})
        random = np.random.default_rng([seed, list(CATEGORIES).index(category), number])
        scratch.mkdir()
        fault, outcome = CATEGORIES[category](base, scratch, random)
        shutil.rmtree(scratch)
        yield json.dumps({"number": number, "fault": fault, "outcome": outcome})


def run(tally: Tally, base: Path, scratch: Path, category: str, seed: int, count: int) -> None:
    """Inputs 0 to `count` of a category, in processes that may crash or hang."""
    first = 0
    while first < count:
        size = min(_BATCH, count - first)
        lines, ended = _in_process(base, scratch, category, seed, first, size)
        for line in lines:
            if "fault" in line:
                where = f"({category} {seed} {line['number']})"
                tally.add(line["fault"], line["outcome"], where)
        begun = lines[-1]["number"] if lines else first
        if ended:
            tally.add(category, ended, f"({category} {seed} {begun})")
        first = begun + 1
        shutil.rmtree(scratch, ignore_errors=True)


def _in_process(
    base: Path, scratch: Path, category: str, seed: int, first: int, count: int
) -> tuple[list[dict], str]:
    """The lines, and how the process ended where it should not have."""
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
    if len(sys.argv) == 2:
        _prepare(Path(sys.argv[1]))
        return
    base, category, seed, first, count, scratch = sys.argv[1:7]
    numbers = (int(seed), int(first), int(count))
    for line in try_all(Path(base), Path(scratch), category, *numbers):
        print(line, flush=True)


if __name__ == "__main__":
    main()
