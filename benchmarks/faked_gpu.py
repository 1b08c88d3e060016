"""The code that torch.compile generates for a GPU, and its launches, without a GPU.

`generate` compiles a module's forward and backward for a faked H100, up to the text of the code,
which calls kernels in Triton. `run` runs that code on tensors that have shapes and no data: the
size of what a kernel is given is that of its tensor, not read from the text, and no kernel is
compiled. Both rest on internals of torch; 2.11 and 2.14 are tried.
"""

import ast
import re
from collections.abc import Callable, Iterator, Sequence
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
    """Of one generated kernel."""

    kernel: str
    bytes: int
    """Of its arguments: each once for being read and once for being written."""


class Call(NamedTuple):
    """Of an operator that Inductor did not generate: a library's, or one of the project."""

    operator: str  # such as "aten::convolution"
    args: tuple[Any, ...]  # its tensors have no data
    kwargs: dict[str, Any]


class CountError(Exception):
    """Generated code is not of the form that is counted here: the count would be wrong."""


@contextmanager
def faked_gpu() -> Iterator[None]:
    """Within it, torch believes that there is one H100. Only tensors without data can be on it.

    Call it in a process of its own: torch remembers some of its answers, and the guard stays.
    """
    torch._C._ensureCUDADeviceGuardSet()  # else operators, in C++, ask the driver
    with ExitStack() as stack:
        for place, name, value in _answers():
            stack.enter_context(mock.patch.object(place, name, value, create=True))
        yield


def _answers() -> list[tuple[Any, str, Any]]:
    """(Place, name, what stands there instead)."""
    cuda = torch.cuda
    return [
        (cuda, "is_available", lambda: True),
        (cuda, "device_count", lambda: 1),
        (cuda, "current_device", lambda: 0),
        (cuda, "_lazy_init", lambda: None),
        (cuda, "_get_device_properties", lambda device: _H100),
        (cuda, "_exchange_device", lambda device: 0),
        (cuda, "_maybe_exchange_device", lambda device: 0),
        (cuda, "set_device", lambda device: None),
        (cuda, "is_current_stream_capturing", lambda: False),
        (cuda, "get_rng_state", lambda *device: torch.zeros(16, dtype=torch.uint8)),
        # Dynamo would ask it for the current stream.
        (torch.accelerator, "is_available", lambda *check: False),
        (_triton, "triton_hash_with_backend", lambda: ""),
        (fake_tensor, "init_gpu_context", lambda device: None),
        # cuDNN's choice for channels-last weights.
        (torch._C, "_conv_determine_backend_memory_format", lambda *args: torch.channels_last),
        # Autograd is traced on a CPU (below), and decomposes as on a GPU.
        (decomposition, "is_gpu", lambda device: True),
    ]


def generate(model: nn.Module, *inputs: torch.Tensor) -> list[Generated]:
    """Forward and backward of `model` (the forward alone where nothing needs a gradient) as
    `torch.compile` generates them under the present autocast. The model and its inputs are on the
    CPU, and the model is moved to the faked GPU, within which this is called."""
    mode, lowering = FakeTensorMode(allow_non_fake_inputs=True), _Lowering()
    with mode:
        model.to_empty(device="cuda")
        inputs = tuple(torch.empty_like(value, device="cuda") for value in inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lowering.backend, fullgraph=True, dynamic=False)
    with _compiler_settings(), suppress(_Lowered):
        compiled(*inputs)
    return lowering.graphs


@contextmanager
def _compiler_settings() -> Iterator[None]:
    """The backward is lowered with the forward, and no cache is asked for either."""
    with (
        functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False, compile_threads=1),
    ):
        yield


class _Lowered(Exception):
    """In place of running what was generated."""


class _Lowering:
    """Dynamo sees tensors on the faked GPU, so that the model takes its branches for one; so does
    Inductor. In between autograd is traced on the CPU, since its engine, in C++, asks the driver
    about any GPU that it meets."""

    def __init__(self) -> None:
        self.graphs: list[Generated] = []

    def backend(self, graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        to_cpu = _mover("cpu", inputs)
        _move(graph, to_cpu)
        kind, on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cpu", kind, enabled=on):
            return compile_fx.compile_fx(graph, tree_map(to_cpu, inputs), inner_compile=self._inner)

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
    """What gives a tensor's like on `device`, and `device` for any other."""
    mode = detect_fake_mode(inputs)

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
    """What the code launches and calls, in order of each.

    Raises `CountError` for a kernel of unknown arguments.
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


# Of the code's global names: Inductor's, in C++, are for real tensors.
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
    """Notes what runs within it; operators only compute the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.calls: list[Call] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not operator.is_view and operator is not torch.ops.aten.empty_strided.default:
            self.calls.append(Call(operator._schema.name, args, kwargs))
        return operator(*args, **kwargs)

    @contextmanager
    def in_place_of_triton(self) -> Iterator[None]:
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
    """Name of each argument of a kernel -> its type, such as "*bf16"."""
    return ast.literal_eval(re.search(r"'signature': (\{.*?\})", source)[1])


def _bytes(kernel: str, signature: dict[str, str], args: tuple[Any, ...]) -> int:
    pointers = {name: kind for name, kind in signature.items() if kind.startswith("*")}
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    if [_type_of(value.dtype) for value in tensors] != list(pointers.values()):
        raise CountError(f"{kernel}: takes {pointers}, was given {args}")
    return sum(
        _passes(kernel, name) * value.numel() * value.element_size()
        for name, value in zip(pointers, tensors, strict=True)
    )


def _passes(kernel: str, argument: str) -> int:
    """How often the kernel goes over the argument."""
    match = re.fullmatch(r"(in|out|in_out)_ptr\d+", argument)
    if not match:
        raise CountError(f"{kernel}: neither read nor written: {argument}")
    return 2 if match[1] == "in_out" else 1
