"""Exhausted memory, a full disk and dead processes, as one line for the user."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from fastlab.config import Config
from fastlab.console import UserError, first_line
from fastlab.runs import RunDir


def is_out_of_memory(error: Exception) -> bool:
    """Includes the allocator of the host, which has no exception type for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def data_fits(cfg: Config) -> Generator[None]:
    """Images that do not fit into memory become a `UserError`."""
    advice = f'data.placement = "{cfg.data.placement}": the images do not fit into memory'
    with _memory_suffices(f'{advice}; set it to "stream"'):
        yield


@contextmanager
def model_fits(cfg: Config) -> Generator[None]:
    """A model that does not fit into memory becomes a `UserError`."""
    size = f"width = {cfg.model.width}" if cfg.model.built_in else f'name = "{cfg.model.name}"'
    advice = f"model.{size}: the model does not fit into memory"
    with _memory_suffices(f"{advice}; take a smaller one"):
        yield


@contextmanager
def _memory_suffices(advice: str) -> Generator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # "Overflowed": a size of more bytes than 64 bits count.
        if not is_out_of_memory(error) and "size calculation overflowed" not in str(error):
            raise
        raise UserError(advice) from None


@contextmanager
def batch_fits(cfg: Config, model: nn.Module, accelerator: Accelerator) -> Generator[None]:
    """A batch of training or evaluation that does not fit into memory becomes a `UserError`."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        key = "batch_size" if model.training else "eval_batch_size"
        size, world = getattr(cfg.train, key), accelerator.num_processes
        half = size // 2 // world * world
        problem = f"out of memory on {accelerator.device} with train.{key} = {size}"
        if not half:
            smaller = "model.width" if cfg.model.built_in else "model"
            raise UserError(f"{problem}: take a smaller {smaller}, or another device") from None
        raise UserError(f"{problem}: try half of it, --set train.{key}={half}") from None


@contextmanager
def failures_explained(run: RunDir) -> Generator[None]:
    """A full disk or another process of the training that died becomes a `UserError` that says how
    to resume; so does a model that several processes, or deterministic algorithms, cannot train."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(
            f"{run.path}: cannot be written ({error.strerror or error}); fix that, then "
            f"{run.resume_hint()}"
        ) from None
    except RuntimeError as error:
        if "not have a deterministic implementation" in str(error):
            raise UserError(
                f"train.deterministic = true: {first_line(error)}; set it to false, or change the "
                f"model"
            ) from None
        if "Expected to have finished reduction" in str(error):
            raise UserError(
                f"{run.path}: some layers of the model take no part in some steps, and several "
                f"processes cannot train it; train it in one"
            ) from None
        if "gloo/transport" not in str(error):
            raise
        raise UserError(f"another process of this training ended; {run.resume_hint()}") from None
