"""The time to 60 % validation top-1.

    python -m benchmarks.records.sixty --data data/tiny-imagenet --out sixty.json

The recipe is `configs/resnet11-modern.toml`, shortened: fewer epochs of a somewhat larger batch.
"""

from benchmarks.records import clock

TARGET = 0.60
RECIPE = {
    "train.epochs": 30,
    "train.batch_size": 512,
}

if __name__ == "__main__":
    raise SystemExit(clock.main("sixty", TARGET, RECIPE, "configs/resnet11-modern.toml"))
