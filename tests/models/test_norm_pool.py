"""The fused dropout, norm, ReLU and pool against PyTorch's layers in float64, by Triton's
interpreter on a CPU; and its kernels as an H100 would get them."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastlab.models import norm_pool
from fastlab.models.dropout import kept
from fastlab.models.norm_pool import dropout_norm_relu_pool, supported, traffic
from tests.models import triton_kernels
from tests.models.triton_kernels import Launch

pytest.importorskip("triton")

EPS = 1e-5


@pytest.fixture(scope="module")
def interpreted() -> SimpleNamespace:
    return triton_kernels.interpreted()


@pytest.fixture
def kernels(interpreted) -> Iterator[SimpleNamespace]:
    """The modules of the kernels, which run in Triton's interpreter until the test is over."""
    with triton_kernels.running(interpreted):
        yield interpreted


@dataclass
class Case:
    """Inputs of the operator and the gradient of its output."""

    x: torch.Tensor
    bias: torch.Tensor | None
    weight: torch.Tensor
    shift: torch.Tensor
    key: torch.Tensor
    gy: torch.Tensor
    p: float
    size: int

    def inputs(self) -> list[torch.Tensor | None]:
        return [self.x, self.bias, self.weight, self.shift]


def make_case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    size: int = 3,
    p: float = 0.15,
    bias: bool = True,
    mean: float = 0.0,
    device: str = "cpu",
) -> Case:
    """Random values; weights of both signs."""
    generator = torch.Generator().manual_seed(sum(shape))
    b, c, h, w = shape

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    x = (random(b, c, h, w) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    pooled = [(n + 2 * (size - 2) - size) // 2 + 1 for n in (h, w)]
    gy = random(b, c, *pooled).to(dtype)
    vectors = [random(c), random(c), random(c) + 0.5]
    key = torch.tensor([123456789, -987654321], dtype=torch.int32)
    x, gy, key, *vectors = (tensor.to(device) for tensor in (x, gy, key, *vectors))
    return Case(x, vectors[0] if bias else None, *vectors[1:], key, gy, p, size)


def reference(x, bias, weight, shift, key, p, eps, size, padding):
    """What the operator computes, by the layers that it replaces."""
    z = x if bias is None else x + bias[:, None, None]
    if p > 0:
        z = torch.where(kept(x.shape, key, p, x.device), z / (1 - p), 0)
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    normal = F.batch_norm(z, None, None, weight, shift, training=True, eps=eps)
    return F.max_pool2d(F.relu(normal), size, 2, padding), mean, var


def run(case: Case, function=dropout_norm_relu_pool, dtype=None) -> dict[str, torch.Tensor]:
    """Outputs and gradients, in `dtype` if given."""
    inputs = [None if t is None else t.detach().to(dtype or t.dtype) for t in case.inputs()]
    given = [t.requires_grad_() for t in inputs if t is not None]
    y, mean, var = function(*inputs, case.key, case.p, EPS, case.size, case.size - 2)
    gradients = torch.autograd.grad(y, given, case.gy.to(y.dtype))
    names = ["dx", "weight", "shift"] if case.bias is None else ["dx", "bias", "weight", "shift"]
    found = {"y": y.detach(), "mean": mean, "var": var}
    return found | dict(zip(names, gradients, strict=True))


def assert_right(case: Case, limit: float = 1e-5) -> dict[str, torch.Tensor]:
    """Tensors of x's dtype are right to its rounding, and all to `limit` of their largest value."""
    found, expected = run(case), run(case, reference, torch.float64)
    rounding = torch.finfo(case.x.dtype).eps / 2
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        images = name in ("y", "dx")
        # The gradient of the bias is a sum of gradients that nearly cancel.
        largest = expected["dx" if name == "bias" else name].abs().max().item()
        assert tensor.dtype == (case.x.dtype if images else torch.float32), name
        torch.testing.assert_close(
            tensor.double(),
            expected[name],
            rtol=max(limit, rounding * 1.01) if images else limit,
            atol=limit * max(largest, 1e-3),
            msg=lambda text, name=name: f"{name}: {text}",
        )
    layout = torch.channels_last
    assert found["y"].is_contiguous(memory_format=layout)
    assert found["dx"].is_contiguous(memory_format=layout)
    return found


def assert_same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("p", [0.0, 0.15])
@pytest.mark.parametrize("bias", [False, True])
def test_single_precision_is_that_of_the_layers(kernels, bias, p, size):
    assert_right(make_case((2, 3, 5, 6), size=size, p=p, bias=bias))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_what_it_stores(kernels, dtype, size):
    assert_right(make_case((2, 64, 4, 5), dtype, size=size))


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (2, (3, 1, 3, 3)),
        (3, (3, 1, 3, 3)),
        (3, (1, 2, 2, 2)),
        (3, (2, 1, 1, 6)),
        (2, (1, 3, 3, 131)),
        (3, (1, 3, 2, 131)),
        (3, (1, 5, 19, 3)),
        (2, (2, 96, 4, 4)),
        (3, (2, 96, 4, 4)),
    ],
)
def test_any_sizes_and_channels(kernels, size, shape):
    assert_right(make_case(shape, size=size))


@pytest.mark.parametrize("p", [0.0, 0.15])
def test_a_mean_far_from_zero_takes_no_precision(kernels, p):
    found = assert_right(make_case((2, 64, 8, 8), p=p, mean=100.0), limit=2e-5)
    if p == 0:
        assert found["var"].max() < 2


def test_a_first_image_unlike_all_others_takes_no_precision(kernels, monkeypatch):
    monkeypatch.setattr(kernels.norm_kernels, "TILE", 64)
    monkeypatch.setattr(kernels.norm_kernels, "PARTS", 2)
    case = make_case((4, 4, 6, 6), p=0.0, bias=False)
    case.x[0] = 300.0
    assert_right(case)


def test_many_parts_tiles_and_strips_add_up(kernels, monkeypatch):
    """Loops that only large batches would go through more than once."""
    for name, value in {"TILE": 64, "PARTS": 5, "PARTS_TILE": 2}.items():
        monkeypatch.setattr(kernels.norm_kernels, name, value)
    for name, value in {"TILE": 64, "GRADIENT_PARTS": 4}.items():
        monkeypatch.setattr(kernels.norm_pool_backward, name, value)
    for name, value in {"WINDOW_TILE": 32, "STRIP": 2}.items():
        monkeypatch.setattr(kernels.norm_pool_forward, name, value)
    assert_right(make_case((2, 12, 9, 7)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_of_equal_values_the_first_is_chosen_as_by_max_pool2d(kernels, size, sign):
    case = make_case((2, 4, 5, 6), size=size, p=0.3, bias=False)
    case.x.copy_(case.x.round().clamp(-1, 1))
    case.weight.fill_(sign)
    assert_right(case)


def test_a_channel_that_relu_kills_gets_no_gradient(kernels):
    case = make_case((1, 4, 4, 4))
    case.shift[1] = -100.0
    found = assert_right(case)
    assert not found["y"][:, 1].any()
    assert not found["dx"][:, 1].any()
    assert found["weight"][1] == found["shift"][1] == found["bias"][1] == 0


def test_a_weight_of_zero_passes_the_shift_on_and_no_gradient_back(kernels):
    case = make_case((1, 2, 4, 4))
    case.weight.zero_()
    case.shift.copy_(torch.tensor([0.5, -0.5]))
    found, expected = run(case), run(case, reference, torch.float64)
    for name in ("y", "dx", "shift"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_shows_in_its_channel(kernels, size, value):
    case = make_case((2, 3, 4, 4), size=size, p=0.0)
    case.x[1, 2, 1, 2] = value
    y = run(case)["y"]
    assert y[:, 2].isnan().all()
    assert y[:, :2].isfinite().all()


def test_the_bias_of_a_norm_without_dropout_gets_no_gradient(kernels):
    assert not run(make_case((2, 3, 6, 6), p=0.0))["bias"].any()


def test_the_key_tells_which_elements_are_dropped(kernels):
    case = make_case((1, 8, 4, 4))
    first, again = run(case), run(case)
    assert_same_bits(first, again)
    for place in range(2):
        case.key[place] += 1
        assert not torch.equal(assert_right(case)["y"], first["y"])


def test_a_gradient_of_another_layout_is_the_same(kernels):
    case = make_case((1, 3, 4, 6))
    expected = run(case)
    case.gy = case.gy.contiguous(memory_format=torch.channels_last)
    assert_same_bits(run(case), expected)


def test_statistics_have_no_gradient(kernels):
    case = make_case((2, 3, 6, 6))
    case.x.requires_grad_()
    y, mean, var = dropout_norm_relu_pool(*case.inputs(), case.key, case.p, EPS, 3, 1)
    assert y.requires_grad
    assert not mean.requires_grad and not var.requires_grad


@pytest.mark.parametrize("bias", [False, True])
def test_the_operators_keep_what_they_promise_to_the_compiler(kernels, bias):
    case = make_case((1, 3, 2, 4), bias=bias)
    inputs = [None if t is None else t.clone().requires_grad_() for t in case.inputs()]
    torch.library.opcheck(norm_pool._forward, (*inputs, case.key, case.p, EPS, case.size))
    with torch.no_grad():
        arguments = (*case.inputs(), case.key, case.p, EPS, case.size)
        _, *saved = norm_pool._forward(*arguments)
        gradient = (case.gy, case.x, case.bias, case.weight, case.key, *saved)
        torch.library.opcheck(norm_pool._backward, (*gradient, case.p, EPS, case.size))


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_code_gets_the_same_bits(kernels, bias):
    case = make_case((1, 8, 4, 4), torch.bfloat16, bias=bias)
    compiled = torch.compile(dropout_norm_relu_pool, backend="aot_eager", fullgraph=True)
    assert_same_bits(run(case, compiled), run(case))


@pytest.mark.parametrize(("size", "padding"), [(2, 1), (3, 0), (4, 1)])
def test_other_pools_are_refused(size, padding):
    case = make_case((1, 1, 8, 8))
    with pytest.raises(ValueError, match=f"size {size} with padding {padding}"):
        dropout_norm_relu_pool(*case.inputs(), case.key, 0.0, EPS, size, padding)


def test_tensors_of_a_cpu_are_not_supported():
    assert not supported(make_case((1, 1, 4, 4)).x)


def test_traffic_counts_two_reads_and_then_a_read_and_a_write_of_the_input():
    image, pooled = 64 * 64 * 64 * 2, 64 * 32 * 32
    forward, backward, *kernels = traffic((1, 64, 64, 64), 2, 3, 1, bias=True)
    assert forward == 2 * image + 5 * pooled
    assert backward == 2 * image + (5 + 3) * pooled
    assert kernels == [3, 4]
    assert traffic((1, 64, 64, 64), 2, 2, 0, bias=False) == (forward, backward, 3, 3)
    assert traffic((1, 1, 5, 5), 2, 2, 0, bias=False)[0] == 2 * 50 + 5 * 4


@pytest.mark.parametrize("bias", [False, True])
def test_traffic_counts_the_kernels_that_run(kernels, monkeypatch, bias):
    case = make_case((2, 3, 6, 6), bias=bias)
    launched = launches_of(monkeypatch, kernels, case)
    *_, forward, backward = traffic(case.x.shape, 4, case.size, case.size - 2, bias)
    assert len(launched) == forward + backward


def launches_of(monkeypatch, loaded: SimpleNamespace, case: Case) -> list[Launch]:
    """Of a forward and a backward pass. No kernel runs."""
    launched = triton_kernels.record_launches(monkeypatch, loaded.norm_pool_backward)
    inputs = case.inputs()
    outputs = norm_pool._forward_outputs(case.x, case.size)
    settings = (case.p, EPS, case.size)
    loaded.norm_pool_forward.forward(*inputs, case.key, *settings, outputs)
    gradients = norm_pool._backward_outputs(case.x, case.bias)
    saved = outputs[1:]
    backward = loaded.norm_pool_backward.backward
    backward(outputs[0], *inputs[:3], case.key, saved, *settings, gradients)
    return launched


@pytest.mark.parametrize(("size", "p", "gradient_parts"), [(3, 0.15, 2048), (2, 0.0, 2)])
def test_kernels_compile_for_an_h100_without_spilling_registers(
    monkeypatch, tmp_path, size, p, gradient_parts
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    loaded = triton_kernels.fresh()
    monkeypatch.setattr(loaded.norm_pool_backward, "GRADIENT_PARTS", gradient_parts)
    case = make_case((1, 64, 64, 64), torch.bfloat16, size=size, p=p)
    for launch in launches_of(monkeypatch, loaded, case):
        assert triton_kernels.registers(launch, tmp_path) <= 128, launch.kernel
