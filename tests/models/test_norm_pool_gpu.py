"""The fused dropout, norm, ReLU and pool on a CUDA device, against PyTorch's layers in float64."""

import pytest
import torch

from fastlab.models.norm_pool import dropout_norm_relu_pool, supported
from tests.models.test_norm_pool import (
    EPS,
    Case,
    assert_correct,
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


def cuda_case(shape: tuple[int, ...], dtype: torch.dtype = HALF, **settings) -> Case:
    case = make_case(shape, dtype, device="cuda", **settings)
    assert supported(case.x)
    return case


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("p", [0.0, 0.15])
@pytest.mark.parametrize("shape", [(8, 64, 64, 64), (128, 64, 64, 64)])
def test_batches_of_the_usual_size_are_correct_and_two_runs_agree_to_the_bit(shape, p, size):
    case = cuda_case(shape, size=size, p=p)
    assert_same_bits(assert_correct(case, SUMS), run(case))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
# One type per shape: each pair compiles all kernels again, and a rented GPU costs by the minute.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 3, 33, 17), torch.bfloat16),
        ((2, 1, 7, 7), torch.float32),
        ((3, 96, 19, 30), torch.float16),
        ((2, 512, 9, 8), torch.float32),
    ],
)
def test_odd_sizes_and_other_types_are_correct(shape, bias, dtype, size):
    assert_correct(cuda_case(shape, dtype, size=size, bias=bias), SUMS)


def test_single_precision_far_from_zero_is_correct():
    assert_correct(cuda_case((16, 64, 32, 32), torch.float32, mean=100.0), SUMS)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_first_of_equal_values_is_chosen_as_by_max_pool2d(sign):
    case = cuda_case((4, 64, 33, 32), p=0.3, bias=False)
    case.x.copy_(case.x.round().clamp(-1, 1))
    case.weight.fill_(sign)
    assert_correct(case, SUMS)


def test_programs_that_take_several_tiles_and_strips_are_correct():
    """In this batch, each part of a sum has several tiles, and there are more strips than
    programs."""
    assert_correct(cuda_case((64, 512, 32, 32)), SUMS)


def test_nan_shows_in_its_channel_only():
    case = cuda_case((2, 64, 16, 16))
    case.x[1, 2, 3, 3] = float("nan")
    y = run(case)["y"]
    assert y[:, 2].isnan().all()
    assert y[:, :2].isfinite().all() and y[:, 3:].isfinite().all()


def doubled(x, *others):
    """The operator on a product, for which the compiler may choose any layout."""
    return dropout_norm_relu_pool(x * 2, *others)


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_code_gives_the_same_bits(bias):
    case = cuda_case((8, 64, 64, 64), bias=bias)
    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True)
    assert_same_bits(run(case, compiled), run(case, doubled))


def test_the_output_of_a_compiled_convolution_is_taken_in_any_layout():
    """The compiler chooses the layout of the convolution's output."""
    case = cuda_case((8, 64, 32, 32))
    kernel = torch.randn(64, 64, 3, 3, device="cuda", dtype=HALF) / 24
    kernel = kernel.contiguous(memory_format=torch.channels_last)

    def convolved(x, *others):
        return dropout_norm_relu_pool(torch.conv2d(x, kernel, padding=1), *others)

    torch.compiler.reset()
    results, expected = run(case, torch.compile(convolved, fullgraph=True)), run(case, convolved)
    # The compiler may choose another algorithm for the convolution.
    for name in ("y", "mean", "var", "weight", "shift"):
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(results[name], expected[name], rtol=0.02, atol=0.02 * largest)


def test_a_captured_graph_replays_the_same_bits_and_follows_its_inputs():
    case = cuda_case((8, 64, 64, 64))
    assert_replays(run, case)


def test_the_operators_pass_opcheck():
    from fastlab.models import norm_pool

    case = cuda_case((2, 64, 8, 8))
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs()]
    torch.library.opcheck(norm_pool._forward, (*inputs, case.key, case.p, EPS, case.size))
