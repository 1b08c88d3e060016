"""What fastlab's engines give on the images of a user's loader, or why they cannot."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Resize, ToTensor

from fastlab.bottleneck.engines import choose_sample
from fastlab.console import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loader(synth_source) -> DataLoader:
    prepare = Compose([Resize((32, 32)), ToTensor()])
    return DataLoader(ImageFolder(str(synth_source / "train"), prepare), 8)


def test_an_image_folder_is_converted_and_both_engines_are_measured(look, synth_source):
    found = look(f"""
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import ToTensor

        def make():
            return DataLoader(ImageFolder({str(synth_source / "train")!r}, ToTensor()), 8)
        """)
    engines = found["engines"]
    assert (engines["images"], engines["of"], engines["side"]) == (80, 80, 64)
    assert all(min(engines["images_per_second"][name]) > 0 for name in ("resident", "torchvision"))
    assert "fastlab's resident engine gives" in found["verdict"]["line"]


def test_a_subset_is_sampled_from_its_own_images(loader):
    subset = Subset(loader.dataset, [3, 5, 7])
    sample = choose_sample(DataLoader(subset, 8), torch.ones(3, 3, 32, 32))
    assert sample.paths == [loader.dataset.samples[index][0] for index in (3, 5, 7)]
    assert (sample.whole, sample.side) == (3, 32)


@pytest.mark.parametrize(
    ("shape", "text"),
    [((8, 3, 32, 48), "no square RGB images"), ((8, 1, 32, 32), "but [8, 1, 32, 32]")],
)
def test_batches_of_other_shapes_are_no_images_of_a_dataset(shape, text, loader):
    with pytest.raises(UserError, match="square") as refused:
        choose_sample(loader, [torch.ones(shape), torch.ones(8)])
    assert text in str(refused.value)


def test_files_that_cannot_be_converted_are_named(loader):
    loader.dataset.samples.append(("photos/scan.bmp", 0))
    with pytest.raises(UserError, match=r"scan\.bmp"):
        choose_sample(loader, torch.ones(8, 3, 32, 32))


@pytest.mark.multiprocess
def test_the_example_of_the_guide_runs(tmp_path):
    text = (
        (ROOT / "docs" / "profiling.md")
        .read_text(encoding="utf-8")
        .partition("## Find the bottleneck")[2]
    )
    commands = text.partition("```sh\n")[2].partition("```")[0].splitlines()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands:
        program, *arguments = command.partition("#")[0].split()
        assert program == "fastlab"
        short = ["--seconds", "1"] if arguments[0] == "bottleneck" else []
        done = subprocess.run(
            [sys.executable, "-m", "fastlab", *arguments, *short],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert "limits" in done.stdout or "Balanced" in done.stdout
    assert "fastlab's engines, on 512 of the " in done.stdout
