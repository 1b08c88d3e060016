"""Augmentation: both implementations against each other and against plain numpy."""

from functools import partial

import numba
import numpy as np
import pytest
import torch

from fastlab.config import AugmentConfig
from fastlab.console import UserError
from pipelines.augment import augment_on_device, device_augmenter, epoch_key, make_augmenter
from pipelines.augment_cpu import augment_on_cpu
from pipelines.kernels import kernel

SIDE = 16
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
CONFIGS = [
    AugmentConfig(),
    AugmentConfig(flip=True),
    AugmentConfig(translate=4),
    AugmentConfig(translate=4, padding="mean", flip=True),
    AugmentConfig(cutout=5),
    AugmentConfig(crop_scale=0.3),
    AugmentConfig(flip=True, translate=3, cutout=7, crop_scale=0.5),
    AugmentConfig(erasing=0.5),
    AugmentConfig(mixup=0.3),
    AugmentConfig(cutmix=1.0),
]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), dtype=np.uint8)


def on_cpu(config, images, rows, key=7, dtype=torch.float32, raw=False):
    augmenter = make_augmenter(config, SIDE, MEAN, STD, dtype)
    return augment_on_cpu(augmenter, images, rows, rows, key, raw=raw)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_implementations_give_the_same_bits(config, dtype, images):
    rows = np.random.default_rng(1).permutation(len(images))
    augmenter = make_augmenter(config, SIDE, MEAN, STD, dtype)
    host = augment_on_cpu(augmenter, images, rows, rows, 7)
    row_tensor = torch.from_numpy(rows)
    device = augment_on_device(
        augmenter, torch.from_numpy(images), row_tensor, row_tensor, torch.tensor(7)
    )
    assert host.dtype == dtype and torch.equal(host, device)
    assert host.is_contiguous(memory_format=torch.channels_last)


def assert_same_bits(apply, config, side, key, count=12):
    """`apply` and `augment_on_cpu` agree, for image numbers up to the largest int32."""
    generator = np.random.default_rng(side)
    images = generator.integers(0, 256, (5, side, side, 3), dtype=np.uint8)
    rows = generator.integers(0, len(images), count)
    ids = np.append(generator.integers(0, 2**31, count - 1), 2**31 - 1)
    augmenter = make_augmenter(config, side, MEAN, STD, torch.bfloat16)
    host = augment_on_cpu(augmenter, images, rows, ids, key)
    tensors = (torch.from_numpy(values) for values in (images, rows, ids))
    assert torch.equal(host, apply(augmenter, *tensors, torch.tensor(key)))


STRONG = [
    AugmentConfig(flip=True, translate=3, padding=padding, cutout=5, crop_scale=crop_scale, **more)
    for padding, more in (("reflect", {}), ("mean", dict(mixup=0.5, cutmix=1.0, erasing=0.6)))
    for crop_scale in (1.0, 0.3)
]


@pytest.mark.parametrize("config", STRONG)
@pytest.mark.parametrize("side", [8, 15, 17, 48, 64, 97])
@pytest.mark.parametrize("key", [0, epoch_key(3, 1), 2**31, 2**32 - 1])
def test_the_bits_are_the_same_for_any_side_and_key(config, side, key):
    assert_same_bits(augment_on_device, config, side, key)


def test_int32_holds_crops_of_images_of_2048_pixels():
    assert_same_bits(augment_on_device, AugmentConfig(crop_scale=0.999), 2048, 7, count=1)


def test_the_compiled_function_gives_the_same_bits_on_a_cpu():
    assert_same_bits(device_augmenter(compile=True), STRONG[-1], 15, 2**32 - 1)


def test_a_second_shape_is_compiled_separately(images, monkeypatch):
    """Validation follows training with other shapes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    apply = device_augmenter(compile=True)
    augmenter = make_augmenter(AugmentConfig(flip=True), SIDE, MEAN, STD, torch.float32)
    for count, batch in ((40, 8), (30, 10)):
        rows = torch.arange(batch)
        apply(augmenter, torch.from_numpy(images[:count]), rows, rows, torch.tensor(7))
    assert len(graphs) == 2
    assert all(isinstance(value, torch.Tensor) for inputs in graphs for value in inputs)


def test_without_augmentation_it_is_plain_normalisation(images):
    normalised = on_cpu(AugmentConfig(), images, np.arange(40)).double()
    plain = (torch.from_numpy(images).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(normalised, plain.permute(0, 3, 1, 2), atol=1e-6)


def test_flip_and_translation_equal_numpys_padding(images):
    config = AugmentConfig(flip=True, translate=3)
    augmented = on_cpu(config, images, np.arange(40), raw=True).permute(0, 2, 3, 1).numpy()
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="reflect")
    seen = set()
    for image, source, plain in zip(augmented, padded, images, strict=True):
        mirrored = np.pad(plain[:, ::-1], ((3, 3), (3, 3), (0, 0)), mode="reflect")
        matches = [
            (flip, dy, dx)
            for flip, base in ((False, source), (True, mirrored))
            for dy in range(7)
            for dx in range(7)
            if np.array_equal(base[dy : dy + SIDE, dx : dx + SIDE], image)
        ] + [
            (True, dy, dx)
            for dy in range(7)
            for dx in range(7)
            if np.array_equal(source[dy : dy + SIDE, dx : dx + SIDE][:, ::-1], image)
        ]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 15  # of 98 possible: forty images do not share a few


def test_cutout_sets_a_square_to_the_mean(images):
    augmented = on_cpu(AugmentConfig(cutout=5), images, np.arange(40), raw=True)
    augmented = augmented.permute(0, 2, 3, 1).numpy()
    changed = (augmented != images).any(axis=-1)
    for image, where in zip(augmented, changed, strict=True):
        ys, xs = np.nonzero(where)
        assert len(ys) and np.ptp(ys) < 5 and np.ptp(xs) < 5
        assert (image[where] == np.rint(np.array(MEAN) * 255)).all()


def test_a_crop_of_one_colour_keeps_it_and_a_crop_of_a_ramp_is_stretched(images):
    constant = np.full((8, SIDE, SIDE, 3), 77, dtype=np.uint8)
    cropped = on_cpu(AugmentConfig(crop_scale=0.2), constant, np.arange(8), raw=True)
    assert (cropped == 77).all()
    ramp = np.broadcast_to(np.arange(SIDE, dtype=np.uint8)[:, None, None] * 10, images.shape[1:])
    ramps = np.ascontiguousarray(np.broadcast_to(ramp, (40, SIDE, SIDE, 3)))
    rows = on_cpu(AugmentConfig(crop_scale=0.2), ramps, np.arange(40), raw=True)[:, 0, :, 0].int()
    assert (rows.diff(dim=1) >= 0).all()
    assert (rows[:, -1] - rows[:, 0] < 150).any()


def test_draws_depend_on_seed_epoch_and_image_alone(images):
    config = CONFIGS[6]
    rows = np.arange(40)
    whole = on_cpu(config, images, rows)
    parts = torch.cat([on_cpu(config, images, part) for part in np.split(rows[::-1].copy(), 8)])
    assert torch.equal(whole, parts.flip(0))
    keys = {epoch_key(seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(keys) == 900
    assert not torch.equal(whole, on_cpu(config, images, rows, key=8))


def test_flips_are_fair():
    ramp = np.zeros((4000, SIDE, SIDE, 3), dtype=np.uint8)
    ramp[:, :, -1] = 255
    flipped = on_cpu(AugmentConfig(flip=True), ramp, np.arange(4000), raw=True)
    share = (flipped[:, 0, 0, 0] == 255).double().mean().item()
    assert abs(share - 0.5) < 0.04  # five standard deviations


def test_a_translation_of_half_the_image_is_refused():
    with pytest.raises(UserError, match="less than half"):
        make_augmenter(AugmentConfig(translate=8), SIDE, MEAN, STD, torch.float32)


def test_kernels_compile_where_numba_finds_no_place_for_its_cache(monkeypatch):
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])

    def twice(x):
        return 2 * x

    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(twice)
    assert kernel(twice)(21) == 42


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_torn_file_in_the_cache_of_numba_is_replaced(suffix, kept, tmp_path, monkeypatch):
    """Python writes whole files, but a loss of power or a copy may tear them."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def twice(x):
        return 2 * x

    assert kernel(twice)(21) == 42
    (torn,) = tmp_path.rglob(f"*.{suffix}")
    whole = torn.read_bytes()
    torn.write_bytes(whole[: int(kept * len(whole))])
    assert kernel(twice)(21) == 42 and torn.stat().st_size == len(whole)
