"""The time to 66 % validation top-1.

    python -m benchmarks.records.sixty_six --data data/tiny-imagenet --out sixty-six.json

The recipe is `configs/resnet18.toml`, shortened: fewer epochs of a larger batch.
"""

from benchmarks.records import clock

TARGET = 0.66
RECIPE = {
    "train.epochs": 60,
    "train.batch_size": 512,
}

if __name__ == "__main__":
    raise SystemExit(clock.main("sixty_six", TARGET, RECIPE, "configs/resnet18.toml"))
