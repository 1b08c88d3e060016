"""Checkpoints on disk: whole or absent, with all that a training needs to resume bit for bit.

``checkpoints/step-00001234/`` holds `model.safetensors`, `state.pt` (optimizer, schedule, sums,
position, settings, number of processes) and a `rank-N.pt` for each process (running statistics). It
is written under another name and renamed when it is complete. ``checkpoints/best.safetensors``
holds the weights with the best validation top-1; new ones are written into the checkpoint and moved
there after it was renamed, so that the two always agree. Checkpoints hold no state of a random
generator: what a step draws is a function of the seed, the rank and the number of the step.

Every file carries checksums, which are compared when it is read: no damaged byte gets into a
training. A checksum does not show who wrote a file, so `conforming` also compares every value with
what the run expects, before any is loaded: a fused optimizer that gets a tensor of another shape
writes beyond its end.
"""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn
from xxhash import xxh3_128

from fastlab.config import SECTIONS, Config
from fastlab.console import UserError, first_line
from fastlab.fields import checked, field_types
from fastlab.files import write_atomically

_HASH = "xxh128"  # a key of the metadata in a safetensors file
_BEST = "best.safetensors"
# The settings without which a checkpoint means something else. All others may change when a run is
# resumed.
_FIXED = (
    *("model.name", "model.width", "model.batch_norm", "model.shortcuts", "optim.name"),
    *("schedule.name", "train.batch_size", "train.seed", "train.precision"),
)
_SWITCH = "train.ema"  # may change, but not to or from 0: the average exists or it does not


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    state: dict[str, Any],
    accelerator: Any,
    rank_tensors: Sequence[torch.Tensor] = (),
    best: dict[str, torch.Tensor] | None = None,
) -> None:
    """Collective: write the checkpoint of `step` and remove older ones. The main process's `state`
    is written, each rank's `rank_tensors`, and the main process's `best` weights where they are
    newer than the last checkpoint.

    Raises OSError where it cannot be written; the checkpoint before it stays.
    """
    partial, target = folder / "partial", folder / f"step-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    _write(_rank_state(model, rank_tensors), partial / f"rank-{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        save_weights(model.state_dict(), partial / "model.safetensors")
        _write({**state, "processes": accelerator.num_processes}, partial / "state.pt")
        if best:
            save_weights(best, partial / _BEST)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():  # a stop right after a checkpoint within an epoch
            target.rename(f"{target}-before")
        partial.rename(target)
        promote_best(target)
        for other in folder.glob("step-*"):
            if other != target:
                other.rename(partial)  # a kill must not leave a half-deleted directory of this name
                shutil.rmtree(partial)


def promote_best(path: Path) -> None:
    """Move the best weights that came with the checkpoint at `path` to their place. After a kill
    they may still lie in it."""
    with suppress(FileNotFoundError):
        os.replace(path / _BEST, path.parent / _BEST)


def _write(state: dict[str, Any], path: Path) -> None:
    """Write through memory: torch's own writer reports a full disk without saying so."""
    stream = io.BytesIO()
    torch.save(state, stream)
    path.write_bytes(stream.getbuffer())


def _read(path: Path) -> dict[str, Any]:
    # torch.load does not check the checksums of the zip file that it reads.
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} does not match its checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with a checksum, atomically. Raises OSError."""
    write_atomically(path, weights_file(weights))


def weights_file(weights: dict[str, torch.Tensor]) -> bytes:
    """The content of a safetensors file with a checksum."""
    # Copies: the format refuses tied weights, which share their memory.
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in weights.items()
    }
    return safetensors_bytes(tensors, {_HASH: _digest(tensors)})


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of `save_weights`. Raises `UserError` where it is missing, damaged or of another
    model."""
    model.load_state_dict(_fitting_weights(path, model))


def _fitting_weights(path: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    tensors, expected = read_weights(path), model.state_dict()
    try:
        if others := tensors.keys() - expected.keys():
            raise ValueError(f"has {min(others)}")
        return conforming(tensors, expected)
    except ValueError as error:
        raise UserError(f"{path}: holds no weights of this model ({error})") from None


def read_weights(path: Path, *, foreign: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a file of `save_weights`, on the CPU; with `foreign`, of any safetensors file,
    which may have no checksum. Raises `UserError` where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = (file.metadata() or {}).get(_HASH)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such checkpoint; the run ended before it was written"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: damaged checkpoint ({error})") from None
    if _digest(tensors) != written and not (foreign and written is None):
        raise UserError(f"{path}: damaged checkpoint (does not match its checksum)")
    return tensors


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def last(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return max(folder.glob("step-*"), default=None)


def step_of(path: Path) -> int:
    """The number of steps after which the checkpoint at `path` was written."""
    return int(path.name.split("-")[1])


def load_state(path: Path) -> dict[str, Any]:
    """The main process's state, tensors on the CPU: unchecked, for `conforming`. Raises `UserError`
    where its bytes are damaged."""
    with misfits_reported(path):
        return _read(path / "state.pt")


def load(
    path: Path, model: nn.Module, rank: int, processes: int, rank_tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Restore weights and running statistics. Returns what `rank_tensors` were when this rank saved
    them. `processes` is the number of ranks that wrote the checkpoint.

    Where more ranks resume than wrote the checkpoint, those without a file keep the main process's
    statistics, and nothing is returned. Raises `UserError` for a checkpoint that is damaged or of
    another model, and has loaded nothing then.
    """
    weights = _fitting_weights(path / "model.safetensors", model)
    with misfits_reported(path):
        files = (path / f"rank-{n}.pt" for n in range(processes))
        if missing := next((file.name for file in files if not file.exists()), None):
            raise ValueError(f"{missing} is missing")
        state: Any = {"buffers": {}, "own": []}
        if rank < processes:
            expected = _rank_state(model, rank_tensors)
            state = conforming(_read(path / f"rank-{rank}.pt"), expected)
    model.load_state_dict({**weights, **state["buffers"]})
    return state["own"]


def conforming(value: Any, like: Any, name: str = "") -> Any:
    """The part of `value` that `like` describes, a tensor with the memory layout and device of the
    one in `like`. Raises ValueError, or a `UserError` without a path, where a part is missing or
    another.

    In `like`, a dict stands for the same keys and a list for the same length; a tensor for one of
    its shape and dtype without NaN or infinities; None for nothing; anything else is a type that
    `fastlab.fields.checked` takes.
    """
    if isinstance(like, dict):
        held = value if isinstance(value, dict) else {}
        inner = f"{name}." if name else ""
        return {key: conforming(held.get(key), like[key], f"{inner}{key}") for key in like}
    if isinstance(like, list):
        if not isinstance(value, list) or len(value) != len(like):
            raise ValueError(f"{name}: expected a list of {len(like)}")
        pairs = enumerate(zip(value, like, strict=True))
        return [conforming(*pair, f"{name}.{number}") for number, pair in pairs]
    if isinstance(like, torch.Tensor):
        return _conforming_tensor(value, like, name)
    return None if like is None else checked(name, like, value)


@torch.no_grad()
def _conforming_tensor(value: Any, like: torch.Tensor, name: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: is missing")
    if (value.dtype, value.shape) != (like.dtype, like.shape):
        expected, found = (f"{t.dtype} {list(t.shape)}" for t in (like, value))
        raise ValueError(f"{name}: expected {expected}, got {found}".replace("torch.", ""))
    if not value.isfinite().all():
        raise ValueError(f"{name}: holds a number that is not finite")
    # Fused optimizers read memory from end to end and take its layout to be that of the weights.
    return torch.empty_like(like).copy_(value)


def recorded_settings(cfg: Config) -> dict[str, Any]:
    """What a checkpoint records of the configuration: section.key -> value."""
    names = (name.split(".") for name in (*_FIXED, _SWITCH))
    return {f"{section}.{key}": getattr(getattr(cfg, section), key) for section, key in names}


def settings_kinds() -> dict[str, Any]:
    """The types of `recorded_settings`, as `conforming` takes them."""
    names = (name.split(".") for name in (*_FIXED, _SWITCH))
    return {f"{section}.{key}": field_types(SECTIONS[section])[key] for section, key in names}


def refuse_other_settings(path: Path, saved: dict[str, Any], cfg: Config) -> None:
    """Raises `UserError` where a setting that must not change differs from that in `saved`, the
    `recorded_settings` of the checkpoint at `path`; those of an earlier version have none."""
    now = recorded_settings(cfg)
    differing = [name for name in _FIXED if name in saved and saved[name] != now[name]]
    if _SWITCH in saved and bool(saved[_SWITCH]) != bool(now[_SWITCH]):
        differing.append(_SWITCH)
    if differing:
        name = differing[0]
        raise UserError(
            f"{path}: was written with {name} = {json.dumps(saved[name])}, and the run's "
            f"configuration says {json.dumps(now[name])}; set it back, or start another run"
        )


@contextmanager
def misfits_reported(path: Path, what: str = "damaged checkpoint") -> Generator[None]:
    """Turn whatever reading and checking the checkpoint at `path` can raise into a `UserError` of
    one line."""
    try:
        yield
    except Exception as error:  # torch.load raises many kinds on damaged bytes
        raise UserError(
            f"{path}: {what} ({first_line(error)}); restore it, or start another run"
        ) from None


def _rank_state(model: nn.Module, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    return {"buffers": _statistics(model), "own": list(tensors)}


def _statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return {name: t for name, t in model.state_dict().items() if name not in parameters}
