"""The project's Triton kernels in tests: run by Triton's interpreter on a CPU, or compiled for an
H100 without one."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from fastlab import models

# In the order of their imports: each imports from those before it.
NAMES = ("norm_kernels", "norm_pool_forward", "norm_pool_backward", "norm_relu_kernels")


def fresh() -> SimpleNamespace:
    """The modules of the kernels, loaded once more: how they run is settled while they load."""
    modules = {name: f"{models.__name__}.{name}" for name in NAMES}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setattr(models, name, None, raising=False)
            patch.setitem(sys.modules, module, None)
            del sys.modules[module]
        return SimpleNamespace(**{n: importlib.import_module(m) for n, m in modules.items()})


def interpreted() -> SimpleNamespace:
    """The modules of the kernels for Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return fresh()


@contextmanager
def running(loaded: SimpleNamespace) -> Iterator[None]:
    """Within it, operators run these kernels, which are `interpreted`."""
    from triton import language
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        # Triton itself was loaded to compile; the interpreter takes no function meant for that.
        patch.setattr(language, "sum", _interpreted_sum)
        patched = _with_index(interpreter._patch_lang_tensor)
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        patch.setattr(interpreter, "_convert_float", _rounded)
        # Each call inside a kernel would prepare the language once more, which takes milliseconds.
        patch.setattr(interpreter.InterpretedFunction, "__call__", _call_prepared)
        for name, module in vars(loaded).items():
            patch.setitem(sys.modules, f"{models.__name__}.{name}", module)
            patch.setattr(models, name, module, raising=False)
        yield


def _interpreted_sum(x, axis):
    from triton import language

    return language.reduce(x, axis, language.standard._sum_combine)


def _call_prepared(function, *args, **settings):
    return function.rewrite()(*args, **settings)


def _with_index(patch_tensor):
    """Triton 3.6 takes an array of one element for a number, as numpy no longer does."""

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    return patched


_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _rounded(values, source, target, rounding):
    """Between float32 and bfloat16 as a GPU does: the interpreter would cut the lower bits off."""
    types = [_TYPES[dtype.name] for dtype in (source, target)]
    tensor = torch.from_numpy(np.ascontiguousarray(values)).view(types[0]).to(types[1])
    return tensor.view(torch.uint16 if target.name == "bf16" else torch.uint32).numpy()


class Launch:
    """A kernel, and what it was launched with."""

    def __init__(self, kernel, args: tuple, settings: dict[str, int]) -> None:
        self.kernel, self.args, self.settings = kernel, args, settings


def record_launches(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Launch]:
    """Launches from now on of kernels of the kind that `module`, one with `partial_sums`, has. None
    of them runs."""
    launched = []

    def record(kernel, *args, grid, warmup, **settings):
        launched.append(Launch(kernel, args, settings))

    monkeypatch.setattr(type(module.partial_sums), "run", record)
    return launched


_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


def compiled(launch: Launch) -> dict[str, str | bytes]:
    """The kernel for an H100, as this launch would have it compiled: its forms by name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    settings = dict(launch.settings)
    options = {"num_warps": settings.pop("num_warps")}
    signature = dict.fromkeys(launch.kernel.arg_names, "constexpr")
    aligned = {}
    for place, value in enumerate(launch.args):
        parameter = launch.kernel.params[place]
        number = isinstance(value, int)
        if value is None or (number and value == 1 and not parameter.do_not_specialize):
            settings[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                aligned[place,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if number else "fp32"
            if number and value % 16 == 0 and not parameter.do_not_specialize:
                aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, settings, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


def registers(launch: Launch, directory: Path) -> int:
    """How many registers a thread of the kernel takes on an H100. It fails where they spill."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton is not NVIDIA's")
    binary = directory / "kernel.cubin"
    binary.write_bytes(compiled(launch)["cubin"])
    usage = subprocess.run(
        [tool, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert found["STACK"] == found["LOCAL"] == 0, launch.kernel
    return found["REG"]
