"""Progressive resizing: its schedule, its means and its errors."""

import pytest
import torch

from fastlab import train as training
from fastlab.cli import main
from fastlab.config import TrainConfig
from fastlab.training.resizing import image_side, resized, schedule_text
from tests.trainings import command


@pytest.mark.parametrize(
    ("stages", "epochs", "sides"),
    [
        ((), 3, [64, 64, 64]),
        (((0.5, 32),), 4, [32, 32, 64, 64]),
        # 0.7 of ten is 7 although 0.7 * 10 is a little above; half an epoch counts as a whole one.
        (((0.4, 32), (0.7, 48)), 10, [32] * 4 + [48] * 3 + [64] * 3),
        (((0.3, 16), (1.0, 24)), 5, [16, 16, 24, 24, 24]),
    ],
)
def test_each_epoch_has_the_side_of_its_stage(stages, epochs, sides):
    config = TrainConfig(image_size=stages, epochs=epochs)
    assert [image_side(config, epoch, 64) for epoch in range(epochs)] == sides


def test_the_schedule_is_told_to_the_user():
    config = TrainConfig(image_size=((0.3, 16), (0.9, 24)), epochs=5)
    expected = "training images: 16 pixels a side to epoch 2, 24 pixels a side to epoch 5"
    assert schedule_text(config) == expected
    config = TrainConfig(image_size=((0.5, 32),), epochs=4)
    assert schedule_text(config).endswith("32 pixels a side to epoch 2, then whole")


def test_a_pixel_becomes_the_mean_of_those_that_it_touches():
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    halves = resized(images, 4)
    expected = images.view(2, 3, 4, 2, 4, 2).mean(dim=(3, 5))
    torch.testing.assert_close(halves, expected)
    assert halves.is_contiguous(memory_format=torch.channels_last)
    # Six from eight: pixel 1 covers 1.33 to 2.67, so it touches the pixels 1 and 2.
    torch.testing.assert_close(resized(images, 6)[:, :, 1, 1], images[:, :, 1:3, 1:3].mean((2, 3)))
    assert resized(images, 8) is images


def test_training_takes_the_sides_of_the_stages_and_validation_whole_images(
    synth_dataset, tmp_path, monkeypatch, capsys
):
    sides, train_step = [], training.train_step

    def recording_step(trainer, batch):
        trainer.net.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
        monkeypatch.setattr(training, "train_step", train_step)
        return train_step(trainer, batch)

    monkeypatch.setattr(training, "train_step", recording_step)
    sets = ("train.image_size=[[0.3,16],[0.6,24]]", "train.eval_batch_size=1000")
    assert main(["train", *command(synth_dataset, tmp_path / "run", *sets)]) == 0
    # Five steps and one validation in each of the three epochs.
    assert sides == [16] * 5 + [64] + [24] * 5 + [64] + [64] * 5 + [64]
    assert "training images: 16 pixels a side to epoch 1, 24" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "side"), [("resnet11", 65), ("cnn8", 8)])
def test_sides_that_the_dataset_or_the_model_does_not_have_are_refused(
    model, side, synth_dataset, tmp_path, capsys
):
    sets = (f"train.image_size=[[0.5,{side}]]", f"model.name={model}")
    assert main(["train", *command(synth_dataset, tmp_path / "run", *sets)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"train.image_size: {side} pixels; expected" in line
    assert not (tmp_path / "run").exists()
