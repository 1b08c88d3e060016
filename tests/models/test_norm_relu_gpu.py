"""The fused dropout, norm and ReLU on a CUDA device, against PyTorch's layers in float64."""

import pytest
import torch

from fastlab.models import norm_relu as operator
from fastlab.models.norm_relu import supported
from tests.models.test_norm_relu import (
    FORMS,
    Case,
    arguments,
    assert_correct,
    fused,
    make_case,
    run,
)
from tests.models.triton_kernels import assert_replays, assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch and Triton warn of different things on different machines.
    pytest.mark.filterwarnings("ignore"),
]

HALF = torch.bfloat16
# The limit for sums of half a million terms, which the reference adds in another order.
SUMS = 1e-4


def cuda_case(shape: tuple[int, ...], form: str, dtype: torch.dtype = HALF, **settings) -> Case:
    case = make_case(shape, dtype, form, device="cuda", **settings)
    assert supported(case.x)
    return case


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(128, 64, 32, 32), (128, 256, 8, 8), (8, 512, 8, 8)])
def test_batches_of_the_usual_size_are_correct_and_two_runs_agree_to_the_bit(shape, form, p):
    case = cuda_case(shape, form, p=p)
    assert_same_bits(assert_correct(case, SUMS), run(case))


# One type per shape: each pair compiles all kernels again, and a rented GPU costs by the minute.
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
def test_odd_sizes_and_other_types_are_correct(shape, form, dtype):
    assert_correct(cuda_case(shape, form, dtype), SUMS)


@pytest.mark.parametrize("form", FORMS)
def test_single_precision_far_from_zero_is_correct(form):
    assert_correct(cuda_case((16, 64, 32, 32), form, torch.float32, mean=100.0), SUMS)


@pytest.mark.parametrize("form", FORMS)
def test_nan_shows_in_its_channel_only(form):
    case = cuda_case((2, 64, 16, 16), form)
    case.x[1, 2] = float("nan")
    y = run(case)["y"]
    assert y[:, 2].isnan().any()
    assert y[:, :2].isfinite().all() and y[:, 3:].isfinite().all()


def doubled(x, **others):
    """The operator on a product, for which the compiler may choose any layout."""
    return fused(x * 2, **others)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_code_gives_the_same_bits(form):
    case = cuda_case((8, 64, 32, 32), form)
    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True)
    assert_same_bits(run(case, compiled), run(case, doubled))


@pytest.mark.parametrize("form", FORMS)
def test_a_captured_graph_replays_the_same_bits_and_follows_its_inputs(form):
    case = cuda_case((8, 64, 32, 32), form)
    assert_replays(run, case)


@pytest.mark.parametrize("form", FORMS)
def test_the_operators_pass_opcheck(form):
    case = cuda_case((2, 64, 8, 8), form)
    case.inputs = {
        name: None if t is None else t.clone().requires_grad_() for name, t in case.inputs.items()
    }
    torch.library.opcheck(operator._forward, arguments(case))
