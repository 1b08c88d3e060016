"""MixUp, CutMix and random erasing, compared with plain numpy, torchvision and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from fastlab.config import AugmentConfig
from fastlab.console import UserError
from pipelines.augment import make_augmenter
from pipelines.augment_cpu import augment_on_cpu
from pipelines.erasing import rectangles
from pipelines.pairs import beta_quantiles, make_pairs, pair_up
from tests.pipelines.specs import pipeline
from tests.pipelines.test_augment import MEAN, SIDE, STD

COUNT = 2000


def augmented(config: AugmentConfig, images: np.ndarray) -> np.ndarray:
    """All `images` before normalisation, uint8 [b, S, S, 3]."""
    augmenter = make_augmenter(config, images.shape[1], MEAN, STD, torch.float32)
    rows = np.arange(len(images))
    pixels = augment_on_cpu(augmenter, images, rows, rows, 7, raw=True)
    return pixels.permute(0, 2, 3, 1).numpy()


def mixed(config: AugmentConfig, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The `augmented` images and their weights, float32 [b]."""
    pairs = make_augmenter(config, images.shape[1], MEAN, STD, torch.float32).pairs
    ids = torch.arange(len(images))
    _, weights = pair_up(pairs, torch.zeros_like(ids), ids, torch.tensor(7))
    return augmented(config, images), weights.numpy()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """In no place do two neighbours have the same value."""
    random = np.random.default_rng(0)
    images = random.integers(0, 128, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    images[1::2] += 128
    return images


def partners_of(images: np.ndarray) -> np.ndarray:
    return images[np.arange(len(images)) ^ 1]


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_is_the_rounded_weighted_mean_of_both_images(alpha, images):
    pixels, weights = mixed(AugmentConfig(mixup=alpha), images)
    share = weights.astype(np.float64)[:, None, None, None]
    expected = np.floor(share * images + (1 - share) * partners_of(images) + 0.5)
    assert np.array_equal(pixels, expected)
    assert len(set(weights.tolist())) > 100


def test_images_are_mixed_after_their_own_augmentation(images):
    """Which does not change, as draws of other numbers decide it."""
    alone = AugmentConfig(flip=True, translate=3, cutout=5, crop_scale=0.4, erasing=0.5)
    before = augmented(alone, images)
    pixels, weights = mixed(replace(alone, mixup=1.0), images)
    share = weights.astype(np.float64)[:, None, None, None]
    expected = np.floor(share * before + (1 - share) * partners_of(before) + 0.5)
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("side", [15, 16])
def test_cutmix_pastes_a_box_and_weighs_the_pixels_that_are_left(side, images):
    images = np.ascontiguousarray(images[:, :side, :side])
    pixels, weights = mixed(AugmentConfig(cutmix=1.0), images)
    pasted = (pixels != images).all(axis=-1)
    kept = side * side - pasted.sum(axis=(1, 2))
    assert np.array_equal(weights, kept.astype(np.float32) / np.float32(side * side))
    expected = np.where(pasted[..., None], partners_of(images), images)
    assert np.array_equal(pixels, expected)
    for box in pasted[pasted.any(axis=(1, 2))]:
        rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
        assert box.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_with_both_each_image_takes_one_with_probability_one_half(images):
    pixels, _ = mixed(AugmentConfig(mixup=1.0, cutmix=1.0), images)
    pure = (pixels == images) | (pixels == partners_of(images))
    cut = pure.all(axis=(1, 2, 3))
    assert abs(cut.mean() - 0.5) < 5 * 0.5 / COUNT**0.5


@pytest.mark.parametrize(
    ("alpha", "distribution"),
    [
        (0.5, lambda t: 2 / np.pi * np.arcsin(np.sqrt(t))),
        (1.0, lambda t: t),
        (2.0, lambda t: 3 * t**2 - 2 * t**3),
        (3.0, lambda t: 10 * t**3 - 15 * t**4 + 6 * t**5),
    ],
)
def test_quantiles_are_those_of_the_distribution_function(alpha, distribution):
    expected = (np.arange(4096) + 0.5) / 4096
    assert np.abs(distribution(beta_quantiles(alpha)) - expected).max() < 1e-6


@pytest.mark.parametrize("alpha", [1e-300, 0.01, 0.2, 7.0, 1e4, 1e300])
def test_quantiles_have_the_variance_of_the_distribution_for_any_alpha(alpha):
    quantiles = beta_quantiles(alpha)
    assert (np.diff(quantiles) >= 0).all() and quantiles[0] >= 0 and quantiles[-1] <= 1
    assert quantiles.mean() == pytest.approx(0.5)
    variance = 1 / (4 * (2 * alpha + 1))
    assert quantiles.var() == pytest.approx(variance, rel=2e-3, abs=1e-10)


def weights_of(config: AugmentConfig) -> np.ndarray:
    """The weights of 100,000 images."""
    pairs, ids = make_pairs(config, SIDE, "cpu"), torch.arange(100_000)
    return pair_up(pairs, ids, ids, torch.tensor(7))[1].numpy()


# A sample of 2,000 is further than this from its distribution once in a thousand times.
LARGEST = 1.95 / COUNT**0.5


def test_weights_of_mixup_are_distributed_as_samples_of_torch():
    torch.manual_seed(0)
    samples = torch.distributions.Beta(0.4, 0.4).sample((COUNT,)).mul(256).round() / 256
    assert kolmogorov(weights_of(AugmentConfig(mixup=0.4)), samples.numpy()) < LARGEST


def test_weights_of_cutmix_are_distributed_as_those_of_torchvision():
    torch.manual_seed(0)
    cutmix, labels = v2.CutMix(alpha=1.0, num_classes=2), torch.tensor([0, 1])
    batch = torch.zeros(2, 3, SIDE, SIDE)
    samples = np.array([cutmix(batch, labels)[1][0, 0].item() for _ in range(COUNT)])
    assert kolmogorov(weights_of(AugmentConfig(cutmix=1.0)), samples) < LARGEST


def kolmogorov(first: np.ndarray, second: np.ndarray) -> float:
    """The largest distance between the distribution functions of two samples."""
    # Equal ratios may differ in the last bit.
    first, second = (np.sort(part.astype(np.float64).round(6)) for part in (first, second))
    at = np.concatenate([first, second])
    below = [np.searchsorted(part, at, side="right") / len(part) for part in (first, second)]
    return np.abs(below[0] - below[1]).max()


@pytest.fixture(scope="module")
def erased() -> np.ndarray:
    """Which pixels of white images of 32 pixels were erased with probability 0.25."""
    white = np.full((COUNT, 32, 32, 3), 255, dtype=np.uint8)
    pixels = augmented(AugmentConfig(erasing=0.25), white)
    mean = np.rint(np.array(MEAN) * 255)
    where = (pixels != 255).all(axis=-1)
    assert (pixels[where] == mean).all() and (pixels[~where] == 255).all()
    return where


def test_a_share_of_images_is_erased_in_one_rectangle(erased):
    hit = erased.any(axis=(1, 2))
    assert abs(hit.mean() - 0.25) < 5 * (0.25 * 0.75 / COUNT) ** 0.5
    for box in erased[hit]:
        rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
        assert box.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_rectangles_are_distributed_as_those_of_torchvision():
    torch.manual_seed(0)
    random_erasing = v2.RandomErasing(p=1.0)
    image = torch.zeros(3, 32, 32)
    samples = [random_erasing.make_params([image]) for _ in range(COUNT)]
    heights, widths = (np.array([each[name] for each in samples]) for name in "hw")
    sizes = rectangles(32)
    assert (
        kolmogorov(sizes.prod(axis=1) / 1024, heights * widths / 1024) < LARGEST + 1 / 64
    )  # the grid has 32 areas and 32 ratios
    assert kolmogorov(sizes[:, 0] / sizes[:, 1], heights / widths) < LARGEST + 1 / 64


def test_rectangles_lie_anywhere_they_fit(erased):
    """Twice the centre of a rectangle is on average the side of the image, 32, and some rectangles
    touch each edge."""
    boxes = erased[erased.any(axis=(1, 2))]
    for lines in (boxes.any(axis=1), boxes.any(axis=2)):
        first, stop = lines.argmax(axis=1), 32 - lines[:, ::-1].argmax(axis=1)
        twice = first + stop
        assert abs(twice.mean() - 32) < 5 * twice.std() / len(twice) ** 0.5
        assert first.min() == 0 and stop.max() == 32


def test_every_image_is_erased_with_probability_1():
    white = np.full((40, SIDE, SIDE, 3), 255, dtype=np.uint8)
    assert (augmented(AugmentConfig(erasing=1.0), white) != 255).any(axis=(1, 2, 3)).all()


def test_the_last_of_an_odd_number_of_pictures_is_shown_as_it_is(images):
    pixels = augmented(AugmentConfig(mixup=1.0), images[:5])
    assert np.array_equal(pixels[4], images[4]) and not np.array_equal(pixels[3], images[3])


MIXING = AugmentConfig(flip=True, mixup=0.5, cutmix=1.0)


def test_two_processes_see_the_pairs_of_one(synth_dataset):
    whole = list(pipeline(synth_dataset, "resident", augment=MIXING).epoch(1))
    halves = [
        list(pipeline(synth_dataset, "resident", augment=MIXING, rank=rank, world=2).epoch(1))
        for rank in range(2)
    ]
    for batch, *shares in zip(whole, *halves, strict=True):
        for name, part in batch._asdict().items():
            both = torch.cat([getattr(share, name) for share in shares])
            assert torch.equal(part, both), name


def test_partners_are_the_labels_of_the_neighbours(synth_dataset):
    (batch, *_) = pipeline(synth_dataset, "resident", augment=MIXING).epoch(0)
    labels = batch.labels.tolist()
    assert batch.partners.tolist() == [labels[position ^ 1] for position in range(16)]
    assert batch.weights.dtype == torch.float32 and len(set(labels)) > 1


@pytest.mark.parametrize(("batch", "world", "multiple"), [(7, 1, 2), (6, 2, 4)])
def test_an_odd_share_cannot_be_mixed(batch, world, multiple, synth_dataset):
    for config in (AugmentConfig(mixup=1.0), AugmentConfig(cutmix=1.0)):
        message = rf"train.batch_size = {batch}: .* multiple of {multiple}"
        with pytest.raises(UserError, match=message):
            pipeline(synth_dataset, "resident", augment=config, batch=batch, world=world)


def test_batches_of_images_that_are_not_mixed_have_no_partners(synth_dataset):
    for split in ("train", "val"):
        batch = next(iter(pipeline(synth_dataset, "resident", split, batch=7).epoch(0)))
        assert batch.partners is None and batch.weights is None
