"""The fused dropout, norm and ReLU on a CUDA device, against PyTorch's layers in float64."""

import pytest
import torch

from fastlab.models import norm_relu as operator
from fastlab.models.norm_relu import supported
from tests.models.test_norm_relu import (
    FORMS,
    Case,
    arguments,
    assert_right,
    assert_same_bits,
    fused,
    make_case,
    run,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What torch and Triton warn of on one machine or another is no failure of fastlab's.
    pytest.mark.filterwarnings("ignore"),
]

HALF = torch.bfloat16
# Sums of half a million terms, whose order is not the reference's.
SUMS = 1e-4


def cuda_case(shape: tuple[int, ...], form: str, dtype: torch.dtype = HALF, **settings) -> Case:
    case = make_case(shape, dtype, form, device="cuda", **settings)
    assert supported(case.x)
    return case


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(128, 64, 32, 32), (128, 256, 8, 8), (8, 512, 8, 8)])
def test_batches_of_the_usual_size_are_right_and_repeated_to_the_bit(shape, form, p):
    case = cuda_case(shape, form, p=p)
    assert_same_bits(assert_right(case, SUMS), run(case))


# One type a shape: each pair compiles all kernels anew, and a rented GPU is paid by the minute.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 3, 33, 17), torch.bfloat16),
        ((2, 1, 7, 7), torch.float32),
        ((3, 96, 19, 30), torch.float16),
        ((300, 520, 1, 1), torch.float32),
    ],
)
def test_odd_sizes_and_other_types_are_right(shape, form, dtype):
    assert_right(cuda_case(shape, form, dtype), SUMS)


@pytest.mark.parametrize("form", FORMS)
def test_single_precision_far_from_zero_is_right(form):
    assert_right(cuda_case((16, 64, 32, 32), form, torch.float32, mean=100.0), SUMS)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_a_number_shows_in_its_channel(form):
    case = cuda_case((2, 64, 16, 16), form)
    case.x[1, 2] = float("nan")
    y = run(case)["y"]
    assert y[:, 2].isnan().any()
    assert y[:, :2].isfinite().all() and y[:, 3:].isfinite().all()


def doubled(x, **others):
    """The operator, fed by a product that a compiler may lay out as it likes."""
    return fused(x * 2, **others)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_code_gets_the_same_bits(form):
    case = cuda_case((8, 64, 32, 32), form)
    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True)
    assert_same_bits(run(case, compiled), run(case, doubled))


@pytest.mark.parametrize("form", FORMS)
def test_a_captured_graph_replays_the_same_bits_and_follows_its_inputs(form):
    case = cuda_case((8, 64, 32, 32), form)
    expected = run(case)
    others = [key.to("cuda") for key in torch.tensor([[1, 2], [-3, 4]], dtype=torch.int32)]

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
    for key in others:
        case.key.copy_(key)
        graph.replay()
        assert not torch.equal(captured["y"], expected["y"])
        assert_same_bits(captured, run(case))


@pytest.mark.parametrize("form", FORMS)
def test_the_operators_keep_what_they_promise_to_the_compiler(form):
    case = cuda_case((2, 64, 8, 8), form)
    case.inputs = {
        name: None if t is None else t.clone().requires_grad_() for name, t in case.inputs.items()
    }
    torch.library.opcheck(operator._forward, arguments(case))
