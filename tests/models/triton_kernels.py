"""Tests run the project's Triton kernels in Triton's interpreter on a CPU, or compile them for an
H100 without having one."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastlab import models

# In the order of their imports: each imports from those before it.
NAMES = ("norm_kernels", "norm_pool_forward", "norm_pool_backward", "norm_relu_kernels")


def fresh() -> SimpleNamespace:
    """Load the modules of the kernels once more: how kernels run is decided while they load."""
    modules = {name: f"{models.__name__}.{name}" for name in NAMES}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setattr(models, name, None, raising=False)
            patch.setitem(sys.modules, module, None)
            del sys.modules[module]
        return SimpleNamespace(**{n: importlib.import_module(m) for n, m in modules.items()})


def interpreted() -> SimpleNamespace:
    """Load the modules of the kernels for Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return fresh()


@contextmanager
def running(loaded: SimpleNamespace) -> Iterator[None]:
    """Within this context, operators run the kernels of `loaded`, which are `interpreted`."""
    from triton import language
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        # Triton's own functions were loaded to be compiled, and the interpreter cannot run those.
        patch.setattr(language, "sum", _interpreted_sum)
        patched = _with_index(interpreter._patch_lang_tensor)
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        patch.setattr(interpreter, "_convert_float", _rounded)
        # Each call inside a kernel would patch the language again, which takes milliseconds.
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
    """Triton 3.6 uses an array of one element as a number, which numpy no longer allows."""

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    return patched


_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _rounded(values, source, target, rounding):
    """Convert between float32 and bfloat16 as a GPU does: the interpreter would truncate."""
    types = [_TYPES[dtype.name] for dtype in (source, target)]
    tensor = torch.from_numpy(np.ascontiguousarray(values)).view(types[0]).to(types[1])
    return tensor.view(torch.uint16 if target.name == "bf16" else torch.uint32).numpy()


class Launch:
    """A kernel and the arguments of its launch."""

    def __init__(self, kernel, args: tuple, settings: dict[str, int]) -> None:
        self.kernel, self.args, self.settings = kernel, args, settings


def record_launches(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Launch]:
    """Record launches from now on, into the list returned, and run none of the kernels. `module`
    has a kernel `partial_sums` of the kind to record: interpreted or compiled."""
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
    """Compile the kernel for an H100 as this launch would; return its code in each form by name,
    such as "ptx"."""
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
    """How many registers a thread of the kernel takes on an H100. Fails if registers spill."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton is not NVIDIA's")
    binary = directory / "kernel.cubin"
    binary.write_bytes(compiled(launch)["cubin"])
    usage = subprocess.run(
        [tool, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    resources = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert resources["STACK"] == resources["LOCAL"] == 0, launch.kernel
    return resources["REG"]


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_replays(run: Callable[[Any], dict[str, torch.Tensor]], case: Any) -> None:
    """`run(case)`, captured in a CUDA graph, gives the same bits as without one, and its replays
    follow changes of `case.key`."""
    expected = run(case)
    other_keys = [key.to("cuda") for key in torch.tensor([[1, 2], [-3, 4]], dtype=torch.int32)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case)
    for _ in range(2):
        graph.replay()
        assert_same_bits(captured, expected)
    for key in other_keys:
        case.key.copy_(key)
        graph.replay()
        assert not torch.equal(captured["y"], expected["y"])
        assert_same_bits(captured, run(case))
