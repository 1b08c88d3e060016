"""Batch norm over two processes against `BatchNorm2d` on the whole batch."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastlab.config import ModelConfig
from fastlab.models import build
from fastlab.models.sync_norm import synchronise

CPU = torch.device("cpu")
WORLD, STEPS, EACH, CHANNELS = 2, 3, 4, 6
SHAPE = (STEPS, WORLD * EACH, CHANNELS, 5, 7)


class Wrapped(nn.Module):
    """A norm inside a module, as in any model, whose state is not the initial one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)
        with torch.no_grad():
            for i, tensor in enumerate(self.state_dict().values()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.linspace(0.5, 1.5 + i, CHANNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def values(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, whose statistics differ between steps, channels and images; output gradients."""
    generator = torch.Generator().manual_seed(3)
    x, grads = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    ramps = [torch.linspace(0.5, 2, n, dtype=torch.float64) for n in SHAPE[:3]]
    scale = torch.einsum("s,b,c->sbc", *ramps)[..., None, None]
    return (x * scale + scale).to(dtype), grads.to(dtype)


def trace(model: nn.Module, x: torch.Tensor, grads: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs and input gradients of every step, summed parameter gradients, statistics."""
    model.to(x.dtype).train()
    x = x.clone().requires_grad_()
    outputs = torch.stack([model(part) for part in x])
    outputs.backward(grads)
    norm = model.norm
    results = {"outputs": outputs.detach(), "inputs": x.grad}
    results |= {"weight": norm.weight.grad, "bias": norm.bias.grad}
    return results | {name: buffer.clone() for name, buffer in norm.named_buffers()}


def work(rank: int, folder: Path) -> None:
    """Run one of the processes: save its results on its share of each batch."""
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=WORLD)
    share = slice(rank * EACH, (rank + 1) * EACH)
    results = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, grads = values(dtype)
        model = synchronise(Wrapped(), CPU)
        if dtype == torch.bfloat16:  # as under autocast, the weights stay in float32
            out = model.train()(x[0, share])
            results[str(dtype)] = {"outputs": out.detach()}
            continue
        results[str(dtype)] = trace(model, x[:, share], grads[:, share])
        results[str(dtype)]["evaluated"] = model.eval()(x[0, share]).detach()
    torch.save(results, folder / f"results-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """The results of each process."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(WORLD)]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_two_processes_equal_one_on_the_whole_batch(processes, dtype, limit):
    x, grads = values(dtype)
    model = Wrapped()
    expected = trace(model, x, grads)
    expected["evaluated"] = model.eval()(x[0]).detach()
    results = [process[str(dtype)] for process in processes]
    both = {
        name: torch.cat([result[name] for result in results], dim=dim)
        for name, dim in (("outputs", 1), ("inputs", 1), ("evaluated", 0))
    }
    both |= {name: sum(result[name] for result in results) for name in ("weight", "bias")}
    both |= {name: results[0][name] for name in ("running_mean", "running_var")}
    for name, tensor in both.items():
        assert tensor.dtype == dtype
        atol = limit * max(1, expected[name].abs().max().item())  # sums grow with their terms
        torch.testing.assert_close(tensor, expected[name], rtol=limit, atol=atol, msg=name)


@pytest.mark.multiprocess
def test_both_processes_keep_the_same_statistics(processes):
    first, second = (process[str(torch.float32)] for process in processes)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(first[name], second[name])
    assert first["num_batches_tracked"] == STEPS


@pytest.mark.multiprocess
def test_bfloat16_outputs_are_bfloat16_with_statistics_in_full_precision(processes):
    outputs = torch.cat([process[str(torch.bfloat16)]["outputs"] for process in processes])
    expected = Wrapped().train()(values(torch.bfloat16)[0][0].float()).bfloat16()
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, expected, rtol=2**-7, atol=1e-6)


def test_one_process_equals_plain_batch_norm():
    x, grads = values(torch.float32)
    expected = trace(Wrapped(), x, grads)
    for name, tensor in trace(synchronise(Wrapped(), CPU), x, grads).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # neither needs the device itself
@pytest.mark.parametrize("name", ["resnet11", "resnet18", "cnn8"])
def test_conversion_reaches_every_norm_and_keeps_names_and_values(name, device):
    model = build(ModelConfig(name=name, width=8), 5)
    before = copy.deepcopy(model.state_dict())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    converted = synchronise(model, torch.device(device))
    after = converted.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
    synchronised = [
        m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    assert len(synchronised) == norms > 0


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
