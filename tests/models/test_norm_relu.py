"""The fused dropout, norm and ReLU against PyTorch's layers in float64, in Triton's interpreter on
a CPU; and its kernels, compiled for an H100."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastlab.models import norm_relu as operator
from fastlab.models.dropout import kept
from fastlab.models.norm_relu import Other, norm_relu, supported, traffic
from tests.models import triton_kernels
from tests.models.triton_kernels import Launch, assert_same_bits

pytest.importorskip("triton")

EPS = 1e-5
# relu(norm(dropout(x + bias))), relu(dropout(norm(x) + norm(other))),
# relu(dropout(norm(x) + residual)), relu(dropout(norm(x))).
FORMS = ("conv", "other", "residual", "end")
IMAGES = ("y", "x", "other", "residual")


@dataclass
class Case:
    """The inputs of the operator by name, None where its form has no such input; and the gradient
    of its output."""

    inputs: dict[str, torch.Tensor | None]
    key: torch.Tensor
    gy: torch.Tensor
    p: float
    drop_after: bool

    @property
    def x(self) -> torch.Tensor:
        return self.inputs["x"]


def make_case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    form: str = "conv",
    *,
    p: float = 0.2,
    bias: bool = True,
    mean: float = 0.0,
    device: str = "cpu",
) -> Case:
    """Random values, with weights of both signs."""
    generator = torch.Generator().manual_seed(sum(shape))

    def image(mean: float = 0.0) -> torch.Tensor:
        values = (torch.randn(shape, generator=generator) + mean).to(dtype)
        return values.to(device).contiguous(memory_format=torch.channels_last)

    def vector(mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape[1], generator=generator) + mean).to(device)

    other, conv = form == "other", form == "conv"
    inputs = {
        "x": image(mean),
        "bias": vector() if conv and bias else None,
        "weight": vector(),
        "shift": vector(0.5),
        "other": image(-mean) if other else None,
        "weight2": vector() if other else None,
        "shift2": vector() if other else None,
        "residual": image() if form == "residual" else None,
    }
    key = torch.tensor([123456789, -987654321], dtype=torch.int32, device=device)
    return Case(inputs, key, image(), p, not conv)


def fused(x, bias, weight, shift, other, weight2, shift2, residual, key, p, drop_after):
    """`norm_relu`, called with the inputs of a `Case`."""
    others = None if other is None else Other(other, weight2, shift2)
    settings = {"drop_after": drop_after, "other": others, "residual": residual}
    return norm_relu(x, bias, weight, shift, key, p, EPS, **settings)


def layers(x, bias, weight, shift, other, weight2, shift2, residual, key, p, drop_after):
    """What `fused` computes, by the layers that it replaces."""

    def dropout(z):
        return torch.where(kept(z.shape, key, p, z.device), z / (1 - p), 0) if p > 0 else z

    def norm(z, weight, shift):
        var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
        return F.batch_norm(z, None, None, weight, shift, training=True, eps=EPS), mean, var

    z = x if bias is None else x + bias[:, None, None]
    y, *statistics = norm(z if drop_after else dropout(z), weight, shift)
    if other is not None:
        normal, *others = norm(other, weight2, shift2)
        y, statistics = y + normal, statistics + others
    if residual is not None:
        y = y + residual
    return F.relu(dropout(y) if drop_after else y), *statistics


def run(case: Case, function=fused, dtype=None) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name, computed in `dtype` if given."""
    inputs = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
        for name, t in case.inputs.items()
    }
    y, *statistics = function(**inputs, key=case.key, p=case.p, drop_after=case.drop_after)
    leaves = {name: t for name, t in inputs.items() if t is not None}
    gradients = torch.autograd.grad(y, list(leaves.values()), case.gy.to(y.dtype))
    names = ("mean", "var", "mean2", "var2")
    outputs = {"y": y.detach(), **dict(zip(names, statistics, strict=False))}
    return outputs | dict(zip(leaves, gradients, strict=True))


def assert_correct(case: Case, limit: float = 1e-5) -> dict[str, torch.Tensor]:
    """Outputs and gradients equal those of the layers: images up to their rounding, and all up to
    `limit` of their largest value. Returns them."""
    results, expected = run(case), run(case, layers, torch.float64)
    rounding = torch.finfo(case.x.dtype).eps / 2
    assert results.keys() == expected.keys()
    for name, tensor in results.items():
        image = name in IMAGES
        # The gradient of the bias is a sum of gradients that nearly cancel each other.
        largest = expected["x" if name == "bias" else name].abs().max().item()
        slack = limit
        if "residual" in results and name == "x":
            slack += rounding  # it is computed from the rounded gradient of the residual
        assert tensor.dtype == (case.x.dtype if image else torch.float32), name
        torch.testing.assert_close(
            tensor.double(),
            expected[name],
            rtol=max(limit, rounding * 1.01) if image else limit,
            atol=slack * max(largest, 1e-3),
            msg=lambda text, name=name: f"{name}: {text}",
        )
        assert not image or tensor.is_contiguous(memory_format=torch.channels_last)
    return results


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("form", FORMS)
def test_single_precision_equals_that_of_the_layers(kernels, form, p):
    assert_correct(make_case((2, 3, 5, 6), form=form, p=p))


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_without_a_bias_dropout_still_comes_before_the_norm(kernels, p):
    assert_correct(make_case((2, 3, 5, 6), bias=False, p=p))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_what_it_stores(kernels, dtype, form):
    assert_correct(make_case((2, 64, 4, 5), dtype, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 1, 3, 3), (1, 5, 19, 3), (2, 96, 3, 3), (5, 256, 1, 1)])
def test_any_size_and_number_of_channels_is_correct(kernels, shape, form):
    assert_correct(make_case(shape, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_a_mean_far_from_zero_costs_no_precision(kernels, form):
    assert_correct(make_case((2, 64, 8, 8), form=form, mean=100.0), limit=3e-5)


@pytest.mark.parametrize("form", FORMS)
def test_many_parts_and_tiles_add_up(kernels, monkeypatch, form):
    """Small tiles make loops iterate as often as they would for large batches."""
    for name, value in {"TILE": 64, "PARTS": 5, "PARTS_TILE": 2}.items():
        monkeypatch.setattr(kernels.norm_kernels, name, value)
    monkeypatch.setattr(kernels.norm_relu_kernels, "ROWS_TILE", 64)
    assert_correct(make_case((2, 12, 9, 7), form=form))


@pytest.mark.parametrize("form", FORMS)
def test_a_channel_that_relu_kills_gets_no_gradient(kernels, form):
    case = make_case((1, 4, 4, 4), form=form)
    case.inputs["shift"][1] = -100.0
    results = assert_correct(case)
    for name in IMAGES:
        assert name not in results or not results[name][:, 1].any()
    assert all(results[name][1] == 0 for name in results if name.startswith(("weight", "shift")))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("form", FORMS)
def test_nan_shows_in_its_channel_only(kernels, form):
    case = make_case((2, 3, 4, 4), form=form, p=0.0)
    case.x[1, 2, 1, 2] = float("nan")
    y = run(case)["y"]
    assert y[:, 2].isnan().all()
    assert y[:, :2].isfinite().all()


def test_a_bias_gets_no_gradient_without_dropout(kernels):
    assert not run(make_case((2, 3, 6, 6), p=0.0))["bias"].any()


@pytest.mark.parametrize("form", FORMS)
def test_the_key_determines_which_elements_are_dropped(kernels, form):
    case = make_case((1, 8, 4, 4), form=form)
    first, again = run(case), run(case)
    assert_same_bits(first, again)
    for place in range(2):
        case.key[place] += 1
        assert not torch.equal(assert_correct(case)["y"], first["y"])


@pytest.mark.parametrize("form", FORMS)
def test_images_in_another_layout_give_the_same_bits(kernels, form):
    case = make_case((2, 3, 4, 6), form=form)
    expected = run(case)
    strided = {
        name: t.contiguous() if name in IMAGES and t is not None else t
        for name, t in case.inputs.items()
    }
    results = run(dataclasses.replace(case, inputs=strided, gy=case.gy.contiguous()))
    assert_same_bits(results, expected)


def test_statistics_have_no_gradient(kernels):
    case = make_case((2, 3, 6, 6), form="other")
    case.x.requires_grad_()
    y, *statistics = fused(**case.inputs, key=case.key, p=case.p, drop_after=True)
    assert y.requires_grad
    assert len(statistics) == 4 and not any(t.requires_grad for t in statistics)


def arguments(case: Case) -> tuple:
    """The arguments of `fastlab::norm_relu`, in its order."""
    x, bias, weight, shift, *others = case.inputs.values()
    return x, bias, weight, shift, case.key, case.p, EPS, case.drop_after, *others


@pytest.mark.parametrize("form", FORMS)
def test_the_operators_pass_opcheck(kernels, form):
    case = make_case((1, 3, 2, 4), form=form)
    inputs = {n: None if t is None else t.clone() for n, t in case.inputs.items()}
    for tensor in inputs.values():
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(operator._forward, arguments(dataclasses.replace(case, inputs=inputs)))
    with torch.no_grad():
        _, *statistics = operator._forward(*arguments(case))
        tensors = (case.gy, *arguments(case)[:5], *arguments(case)[8:], *statistics)
        torch.library.opcheck(operator._backward, (*tensors, case.p, EPS, case.drop_after))


@pytest.mark.parametrize("form", FORMS)
def test_compiled_code_gives_the_same_bits(kernels, form):
    case = make_case((1, 8, 4, 4), torch.bfloat16, form)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same_bits(run(case, compiled), run(case))


def test_cpu_tensors_are_not_supported():
    assert not supported(make_case((1, 1, 4, 4)).x)


def test_traffic_counts_the_images_read_and_written():
    image = 2 * 64 * 8 * 8 * 2
    shape = (2, 64, 8, 8)
    assert traffic(shape, 2) == (3 * image, 5 * image, 3, 3)
    assert traffic(shape, 2, other=True) == (5 * image, 8 * image, 3, 3)
    assert traffic(shape, 2, residual=True) == (4 * image, 7 * image, 3, 3)


def launches_of(monkeypatch, loaded: SimpleNamespace, case: Case) -> list[Launch]:
    """The launches of a forward and a backward pass, whose kernels do not run."""
    kernels = loaded.norm_relu_kernels
    launched = triton_kernels.record_launches(monkeypatch, kernels)
    with torch.no_grad(), triton_kernels.running(loaded):
        y, *statistics = operator._forward(*arguments(case))
        tensors = (y, *arguments(case)[:5], *arguments(case)[8:], *statistics)
        operator._backward(*tensors, case.p, EPS, case.drop_after)
    return launched


@pytest.mark.parametrize("form", FORMS)
def test_traffic_counts_the_kernels_that_run(interpreted, monkeypatch, form):
    case = make_case((2, 3, 6, 6), form=form)
    *_, forward, backward = traffic(case.x.shape, 4)
    assert len(launches_of(monkeypatch, interpreted, case)) == forward + backward


@pytest.mark.parametrize(("form", "p"), [("conv", 0.2), ("other", 0.2), ("residual", 0.0)])
def test_kernels_compiled_for_an_h100_spill_nothing_and_load_vectors(
    monkeypatch, tmp_path, form, p
):
    """They take at most 128 registers, and load 16 bytes at a time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    case = make_case((128, 64, 8, 8), torch.bfloat16, form, p=p)
    for launch in launches_of(monkeypatch, triton_kernels.fresh(), case):
        assert triton_kernels.registers(launch, tmp_path) <= 128, launch.kernel
        if any(value is case.x for value in launch.args):
            assert "ld.global.v4" in triton_kernels.compiled(launch)["ptx"], launch.kernel
