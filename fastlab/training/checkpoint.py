"""Checkpoints on disk: whole or absent, with all that a training needs to resume bit for bit.

``checkpoints/step-00001234/`` holds `model.safetensors`, `state.pt` (optimizer, schedule, sums,
position, number of processes) and a `rank-N.pt` for each process (running statistics). It is
written under another name and renamed when it is complete. ``best.safetensors`` holds the weights
with the best validation top-1. Every file carries checksums, which are compared when it is read:
no damaged byte gets into a training. Checkpoints hold no state of a random generator, since no part
of a training draws from one.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn
from xxhash import xxh3_128

from fastlab.console import UserError
from fastlab.files import write_atomically

_HASH = "xxh128"  # a key of the metadata in a safetensors file


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    state: dict[str, Any],
    accelerator: Any,
    rank_tensors: Sequence[torch.Tensor] = (),
) -> None:
    """Collective: write the checkpoint of `step` and remove older ones. The main process's `state`
    is written, and each rank's `rank_tensors`.

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
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():  # a stop right after a checkpoint within an epoch
            target.rename(f"{target}-before")
        partial.rename(target)
        for other in folder.glob("step-*"):
            if other != target:
                other.rename(partial)  # a kill must not leave a half-deleted directory of this name
                shutil.rmtree(partial)


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
    tensors = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
    return safetensors_bytes(tensors, {_HASH: _digest(tensors)})


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of `save_weights`. Raises `UserError` where it is missing, damaged or of another
    model."""
    tensors = read_weights(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise UserError(f"{path}: holds weights of another model") from None


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


def load(path: Path, model: nn.Module, rank: int) -> tuple[dict[str, Any], Sequence[torch.Tensor]]:
    """Restore weights and running statistics. Returns the main process's state, and this rank's
    `rank_tensors`, all on the CPU: `load_state_dict` puts them where they belong.

    Where more ranks resume than wrote the checkpoint, those without a file keep the main process's
    statistics and get no `rank_tensors`. Raises `UserError` for a damaged checkpoint.
    """
    load_weights(model, path / "model.safetensors")
    state = load_state(path)
    files = [path / f"rank-{n}.pt" for n in range(state["processes"])]
    if missing := [file.name for file in files if not file.exists()]:
        raise UserError(f"{path}: damaged checkpoint ({missing[0]} is missing)")
    file = path / f"rank-{rank}.pt"
    if not file.exists():
        return state, ()
    with _damage_reported(path):
        return state, _restore_rank(model, _read(file))


def load_state(path: Path) -> dict[str, Any]:
    """The main process's state, tensors on the CPU. Raises `UserError` where it is damaged."""
    with _damage_reported(path):
        return _read(path / "state.pt")


@contextmanager
def _damage_reported(path: Path) -> Generator[None]:
    try:
        yield
    except Exception as error:  # torch.load raises many kinds on damaged bytes
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: damaged checkpoint ({reason})") from None


def _rank_state(model: nn.Module, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    return {"buffers": _statistics(model), "own": list(tensors)}


def _restore_rank(model: nn.Module, state: dict[str, Any]) -> list[torch.Tensor]:
    for name, buffer in _statistics(model).items():
        buffer.copy_(state["buffers"][name])
    return state["own"]


def _statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return {name: t for name, t in model.state_dict().items() if name not in parameters}
