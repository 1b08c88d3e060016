"""The code that torch.compile generates for a GPU, and its launches, without a GPU.

`generate` compiles a module's forward and backward for a faked H100, up to the text of the code,
which calls kernels in Triton. `run` runs that code on tensors that have shapes and no data: the
sizes of a kernel's arguments are those of its tensors, not read from the text, and no kernel is
compiled. Both rely on internals of torch and were tried with 2.11 and 2.14.
"""

import ast
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, decomposition
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import _type_of
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# From torch.cuda.get_device_properties on an H100 SXM. Inductor asks for them to size its blocks.
_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
    uuid="",
)


class Generated(NamedTuple):
    """What Inductor made of one graph, a forward or a backward pass."""

    code: str
    inputs: list[torch.Tensor]
    """Without data, on a faked GPU, in the order in which the code takes them."""


class Launch(NamedTuple):
    """The launch of one generated kernel."""

    kernel: str
    bytes: int
    """The sizes of its arguments, each once for being read and once for being written."""


class Call(NamedTuple):
    """The call of an operator that Inductor did not generate: a library's, or the project's."""

    operator: str
    """Such as "aten::convolution"."""
    arguments: dict[str, Any]
    """The arguments by name, without those left to their defaults. Tensors have no data."""


class CountError(Exception):
    """Generated code has a form that is not handled here: the count would be wrong."""


@contextmanager
def faked_gpu() -> Generator[None]:
    """Let torch believe that there is one H100. Only tensors without data can be on it.

    Use a process of its own: torch keeps some of the answers, and the device guard stays set.
    """
    torch._C._ensureCUDADeviceGuardSet()  # otherwise operators, in C++, ask the driver
    with ExitStack() as stack:
        for place, answers in _ANSWERS.items():
            stack.enter_context(mock.patch.multiple(place, create=True, **answers))
        yield


# By module, what stands there while a GPU is faked.
_ANSWERS: dict[Any, dict[str, Any]] = {
    torch.cuda: {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "_get_device_properties": lambda device: _H100,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "set_device": lambda device: None,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *device: torch.zeros(16, dtype=torch.uint8),
    },
    # Dynamo would ask the accelerator for its current stream.
    torch.accelerator: {"is_available": lambda *check: False},
    _triton: {"triton_hash_with_backend": lambda: ""},
    fake_tensor: {"init_gpu_context": lambda device: None},
    # cuDNN's choice for channels-last weights.
    torch._C: {"_conv_determine_backend_memory_format": lambda *args: torch.channels_last},
    # Autograd is traced on a CPU (below), and decomposes as on a GPU.
    decomposition: {"is_gpu": lambda device: True},
}


def generate(model: nn.Module, *inputs: torch.Tensor) -> list[Generated]:
    """Forward and backward of `model` (the forward alone where nothing needs a gradient) as
    `torch.compile` generates them under the current autocast. Call it within `faked_gpu`, with the
    model and its inputs on the CPU; it moves the model to the faked GPU."""
    mode, lowering = FakeTensorMode(allow_non_fake_inputs=True), _Lowering()
    with mode:
        model.to_empty(device="cuda")
        on_gpu = [torch.empty_like(value, device="cuda") for value in inputs]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lowering.backend, fullgraph=True, dynamic=False)
    with (
        # Lower the backward together with the forward, and use no cache for either.
        functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False, compile_threads=1),
        suppress(_Lowered),
    ):
        compiled(*on_gpu)
    return lowering.graphs


class _Lowered(Exception):
    """Raised instead of running the generated code."""


class _Lowering:
    """A backend of `torch.compile` that keeps the generated code.

    Dynamo sees tensors on the faked GPU, so that the model takes its branches for a GPU; so does
    Inductor. In between autograd is traced on the CPU, since its engine, in C++, asks the driver
    about any GPU that it meets."""

    def __init__(self) -> None:
        self.graphs: list[Generated] = []

    def backend(self, graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        to_cpu = _mover("cpu", inputs)
        _move(graph, to_cpu)
        kind, on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cpu", kind, enabled=on):
            lower: Any = compile_fx.compile_fx
            return lower(graph, tree_map(to_cpu, inputs), inner_compile=self._inner)

    def _inner(self, graph: fx.GraphModule, inputs: list[torch.Tensor], **options: Any) -> Any:
        to_gpu = _mover("cuda", inputs)
        _move(graph, to_gpu)
        inputs = tree_map(to_gpu, inputs)

        def keep(lowering: GraphLowering) -> SimpleNamespace:
            self.graphs.append(Generated(lowering.codegen()[0].value, inputs))
            return SimpleNamespace(call=_never, __file__="", key="")

        with mock.patch.object(GraphLowering, "compile_to_module", keep):
            return compile_fx.compile_fx_inner(graph, inputs, **options)


def _never(inputs: list[torch.Tensor]) -> None:
    raise _Lowered


def _mover(device: str, inputs: list[torch.Tensor]) -> Callable[[Any], Any]:
    """A function that gives, for a tensor, one like it on `device`, and for a device, `device`."""
    mode = detect_fake_mode(inputs)
    assert mode is not None

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device(device)
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            like = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device
            )
        return like.requires_grad_(value.requires_grad)

    return moved


def _move(graph: fx.GraphModule, moved: Callable[[Any], Any]) -> None:
    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
        if "val" in node.meta:
            node.meta["val"] = tree_map(moved, node.meta["val"])
    graph.recompile()


def run(generated: Generated) -> tuple[list[Launch], list[Call]]:
    """What the code launches, and what it calls, each in order.

    Raises `CountError` for a kernel whose arguments are not understood.
    """
    recorder = _Recorder()
    names: dict[str, Any] = {}
    inputs = [_without_data(t.shape, t.stride(), t.dtype) for t in generated.inputs]
    with recorder, recorder.in_place_of_triton():
        exec(compile(generated.code, "generated code", "exec"), names)
        names.update(_WITHOUT_DATA)
        names["call"](inputs)
    return recorder.launches, recorder.calls


def _without_data(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _nothing(*args: Any) -> None:
    pass


# In place of global names of the code: Inductor's functions, in C++, need tensors with data.
_WITHOUT_DATA = {
    "empty_strided_cuda": _without_data,
    "reinterpret_tensor": torch.as_strided,
    "get_raw_stream": _nothing,
    "copy_if_misaligned": lambda value: value,
    "assert_size_stride": _nothing,
    "assert_size_stride_grouped": _nothing,
    "assert_tensor_metadata": _nothing,
    "assert_alignment": _nothing,
}


class _Recorder(TorchDispatchMode):
    """Records what runs within it; operators only compute the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func.is_view and func is not torch.ops.aten.empty_strided.default:
            names = (argument.name for argument in func._schema.arguments)
            arguments = dict(zip(names, args, strict=False)) | kwargs
            self.calls.append(Call(func._schema.name, arguments))
        return func(*args, **kwargs)

    @contextmanager
    def in_place_of_triton(self) -> Generator[None]:
        def kernel(_: AsyncCompile, name: str, source: str, device_str: str) -> SimpleNamespace:
            return SimpleNamespace(run=partial(self._launch, name, _signature(source)))

        with (
            mock.patch.object(AsyncCompile, "triton", kernel),
            mock.patch.object(AsyncCompile, "wait", _nothing),
        ):
            yield

    def _launch(self, name: str, signature: dict[str, str], *args: Any, stream: None) -> None:
        self.launches.append(Launch(name, _bytes(name, signature, args)))


def _signature(source: str) -> dict[str, str]:
    """The type of each argument of a kernel, such as "*bf16", by its name."""
    match = re.search(r"'signature': (\{.*?\})", source)
    if not match:
        raise CountError(f"a kernel without a signature: {source[:200]}")
    return ast.literal_eval(match[1])


def _bytes(kernel: str, signature: dict[str, str], args: tuple[Any, ...]) -> int:
    pointers = {name: kind for name, kind in signature.items() if kind.startswith("*")}
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    if [_type_of(value.dtype) for value in tensors] != list(pointers.values()):
        raise CountError(f"{kernel}: takes {pointers}, but was given {args}")
    return sum(
        _passes(kernel, name) * value.numel() * value.element_size()
        for name, value in zip(pointers, tensors, strict=True)
    )


def _passes(kernel: str, argument: str) -> int:
    """How often the kernel reads or writes the argument as a whole."""
    match = re.fullmatch(r"(in|out|in_out)_ptr\d+", argument)
    if not match:
        raise CountError(f"{kernel}: {argument} is neither an input nor an output")
    return 2 if match[1] == "in_out" else 1
