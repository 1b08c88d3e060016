"""The fused dropout, norm, ReLU and pool against PyTorch's layers in float64, in Triton's
interpreter on a CPU; and its kernels, compiled for an H100."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastlab.models import norm_pool
from fastlab.models.dropout import kept
from fastlab.models.norm_pool import dropout_norm_relu_pool, supported, traffic
from tests.models import triton_kernels
from tests.models.triton_kernels import Launch, assert_same_bits

pytest.importorskip("triton")

EPS = 1e-5


@dataclass
class Case:
    """The inputs of the operator and the gradient of its output."""

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
    """Random values, with weights of both signs."""
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
    """Outputs and gradients by name, computed in `dtype` if given."""
    inputs = [None if t is None else t.detach().to(dtype or t.dtype) for t in case.inputs()]
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    y, mean, var = function(*inputs, case.key, case.p, EPS, case.size, case.size - 2)
    gradients = torch.autograd.grad(y, leaves, case.gy.to(y.dtype))
    names = ["dx", "weight", "shift"] if case.bias is None else ["dx", "bias", "weight", "shift"]
    outputs = {"y": y.detach(), "mean": mean, "var": var}
    return outputs | dict(zip(names, gradients, strict=True))


def assert_correct(case: Case, limit: float = 1e-5) -> dict[str, torch.Tensor]:
    """Outputs and gradients equal the reference: images up to the rounding of x's dtype, and all
    up to `limit` of their largest value. Returns them."""
    results, expected = run(case), run(case, reference, torch.float64)
    rounding = torch.finfo(case.x.dtype).eps / 2
    assert results.keys() == expected.keys()
    for name, tensor in results.items():
        image = name in ("y", "dx")
        # The gradient of the bias is a sum of gradients that nearly cancel each other.
        largest = expected["dx" if name == "bias" else name].abs().max().item()
        assert tensor.dtype == (case.x.dtype if image else torch.float32), name
        torch.testing.assert_close(
            tensor.double(),
            expected[name],
            rtol=max(limit, rounding * 1.01) if image else limit,
            atol=limit * max(largest, 1e-3),
            msg=lambda text, name=name: f"{name}: {text}",
        )
    layout = torch.channels_last
    assert results["y"].is_contiguous(memory_format=layout)
    assert results["dx"].is_contiguous(memory_format=layout)
    return results


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("p", [0.0, 0.15])
@pytest.mark.parametrize("bias", [False, True])
def test_single_precision_equals_that_of_the_layers(kernels, bias, p, size):
    assert_correct(make_case((2, 3, 5, 6), size=size, p=p, bias=bias))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_what_it_stores(kernels, dtype, size):
    assert_correct(make_case((2, 64, 4, 5), dtype, size=size))


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
def test_any_size_and_number_of_channels_is_correct(kernels, size, shape):
    assert_correct(make_case(shape, size=size))


@pytest.mark.parametrize("p", [0.0, 0.15])
def test_a_mean_far_from_zero_costs_no_precision(kernels, p):
    results = assert_correct(make_case((2, 64, 8, 8), p=p, mean=100.0), limit=2e-5)
    if p == 0:
        assert results["var"].max() < 2


def test_a_first_image_unlike_all_others_costs_no_precision(kernels, monkeypatch):
    monkeypatch.setattr(kernels.norm_kernels, "TILE", 64)
    monkeypatch.setattr(kernels.norm_kernels, "PARTS", 2)
    case = make_case((4, 4, 6, 6), p=0.0, bias=False)
    case.x[0] = 300.0
    assert_correct(case)


def test_many_parts_tiles_and_strips_add_up(kernels, monkeypatch):
    """Small tiles make loops iterate as often as they would for large batches."""
    for name, value in {"TILE": 64, "PARTS": 5, "PARTS_TILE": 2}.items():
        monkeypatch.setattr(kernels.norm_kernels, name, value)
    for name, value in {"TILE": 64, "GRADIENT_PARTS": 4}.items():
        monkeypatch.setattr(kernels.norm_pool_backward, name, value)
    for name, value in {"WINDOW_TILE": 32, "STRIP": 2}.items():
        monkeypatch.setattr(kernels.norm_pool_forward, name, value)
    assert_correct(make_case((2, 12, 9, 7)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_first_of_equal_values_is_chosen_as_by_max_pool2d(kernels, size, sign):
    case = make_case((2, 4, 5, 6), size=size, p=0.3, bias=False)
    case.x.copy_(case.x.round().clamp(-1, 1))
    case.weight.fill_(sign)
    assert_correct(case)


def test_a_channel_that_relu_kills_gets_no_gradient(kernels):
    case = make_case((1, 4, 4, 4))
    case.shift[1] = -100.0
    results = assert_correct(case)
    assert not results["y"][:, 1].any()
    assert not results["dx"][:, 1].any()
    assert results["weight"][1] == results["shift"][1] == results["bias"][1] == 0


def test_with_a_weight_of_zero_the_shift_passes_and_no_gradient_does(kernels):
    case = make_case((1, 2, 4, 4))
    case.weight.zero_()
    case.shift.copy_(torch.tensor([0.5, -0.5]))
    results, expected = run(case), run(case, reference, torch.float64)
    for name in ("y", "dx", "shift"):
        torch.testing.assert_close(results[name].double(), expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_show_in_their_channel_only(kernels, size, value):
    case = make_case((2, 3, 4, 4), size=size, p=0.0)
    case.x[1, 2, 1, 2] = value
    y = run(case)["y"]
    assert y[:, 2].isnan().all()
    assert y[:, :2].isfinite().all()


def test_a_bias_gets_no_gradient_without_dropout(kernels):
    assert not run(make_case((2, 3, 6, 6), p=0.0))["bias"].any()


def test_the_key_determines_which_elements_are_dropped(kernels):
    case = make_case((1, 8, 4, 4))
    first, again = run(case), run(case)
    assert_same_bits(first, again)
    for place in range(2):
        case.key[place] += 1
        assert not torch.equal(assert_correct(case)["y"], first["y"])


def test_a_gradient_in_another_layout_gives_the_same_bits(kernels):
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
def test_the_operators_pass_opcheck(kernels, bias):
    case = make_case((1, 3, 2, 4), bias=bias)
    inputs = [None if t is None else t.clone().requires_grad_() for t in case.inputs()]
    torch.library.opcheck(norm_pool._forward, (*inputs, case.key, case.p, EPS, case.size))
    with torch.no_grad():
        arguments = (*case.inputs(), case.key, case.p, EPS, case.size)
        _, *saved = norm_pool._forward(*arguments)
        gradient = (case.gy, case.x, case.bias, case.weight, case.key, *saved)
        torch.library.opcheck(norm_pool._backward, (*gradient, case.p, EPS, case.size))


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_code_gives_the_same_bits(kernels, bias):
    case = make_case((1, 8, 4, 4), torch.bfloat16, bias=bias)
    compiled = torch.compile(dropout_norm_relu_pool, backend="aot_eager", fullgraph=True)
    assert_same_bits(run(case, compiled), run(case))


@pytest.mark.parametrize(("size", "padding"), [(2, 1), (3, 0), (4, 1)])
def test_other_pools_are_refused(size, padding):
    case = make_case((1, 1, 8, 8))
    with pytest.raises(ValueError, match=f"size {size} with padding {padding}"):
        dropout_norm_relu_pool(*case.inputs(), case.key, 0.0, EPS, size, padding)


def test_cpu_tensors_are_not_supported():
    assert not supported(make_case((1, 1, 4, 4)).x)


def test_traffic_counts_two_reads_forward_and_a_read_and_a_write_backward():
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
    """The launches of a forward and a backward pass, whose kernels do not run."""
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
