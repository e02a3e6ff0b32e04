"""Properties of the augmentations: shapes, dtypes, ranges, the same draws for the same key, labels mixed as images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import augmentation

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(1, 256, (16, 8, 10, 3)).astype(np.uint8)
LABELS = np.arange(16, dtype=np.int32) % 4


def changed(name: str, key, images):
    if name == "mixup":
        return augmentation.mixup(key, images, LABELS, 4)[0]
    return augmentation.AUGMENTATIONS[name](key, images)


@pytest.mark.parametrize("name", augmentation.AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_shape_dtype_range_and_determinism(name, dtype):
    images = IMAGES if dtype == np.uint8 else IMAGES / np.float32(255)
    result = np.asarray(changed(name, KEY, images))
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    assert result.max() <= images.max()
    assert result.min() >= 0
    np.testing.assert_array_equal(result, changed(name, KEY, images))
    assert (result != np.asarray(changed(name, jax.random.key(1), images))).any()
    assert (result != images).any()


def test_crop_moves_every_image_by_at_most_the_padding():
    result = np.asarray(augmentation.crop(KEY, IMAGES, padding=2))
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = []
    for image, source in zip(result, padded, strict=True):
        windows = {(i, j): source[i : i + 8, j : j + 10] for i in range(5) for j in range(5)}
        places += [place for place, window in windows.items() if (window == image).all()]
    assert len(places) == len(IMAGES)
    assert len(set(places)) > 5


def test_flip_mirrors_about_half_of_the_images():
    result = np.asarray(augmentation.flip(KEY, np.tile(IMAGES, (8, 1, 1, 1))))
    same = (result == np.tile(IMAGES, (8, 1, 1, 1))).all((1, 2, 3))
    mirrored = (result == np.tile(IMAGES, (8, 1, 1, 1))[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 40 < mirrored.sum() < 88


def test_cutout_clears_one_rectangle():
    result = np.asarray(augmentation.cutout(KEY, IMAGES, side=4))  # the images have no zeros
    cleared = (result == 0).all(-1)
    np.testing.assert_array_equal(result[~cleared], IMAGES[~cleared])
    for mask in cleared:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns)
        assert 2 <= len(rows) <= 4
        assert 2 <= len(columns) <= 4
    assert cleared.sum((1, 2)).max() == 16


def test_mixup_mixes_labels_as_images():
    """Each image is constant, of a value that is its class, so the mixed value is the mean of the mixed target."""
    images = np.broadcast_to(LABELS[:, None, None, None], (16, 4, 4, 1)).astype(np.float32)
    mixed, targets = augmentation.mixup(KEY, images, LABELS, 4)
    assert (targets.shape, targets.dtype) == ((16, 4), jnp.float32)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(mixed[:, 0, 0, 0], targets @ np.arange(4), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mixed, np.broadcast_to(mixed[:, :1, :1], mixed.shape))
    assert (np.asarray(targets)[np.arange(16), LABELS] >= 0.5 - 1e-6).all()
    assert ((targets > 0).sum(-1) == 2).any()


@pytest.mark.slow("compiles each augmentation")
def test_the_draws_of_a_step_depend_on_seed_and_step_alone():
    def draw(seed=3, step=7, names=("flip", "crop")):
        return np.asarray(augmentation.augmented(names, seed, step, (IMAGES, LABELS), 4)[0])

    np.testing.assert_array_equal(draw(), draw())
    np.testing.assert_array_equal(draw(), draw(names=("crop", "flip")))
    for other in (draw(seed=4), draw(step=8), draw(names=("crop",))):
        assert (draw() != other).any()
    images, labels = augmentation.augmented(("flip",), 3, 7, (IMAGES, LABELS), 4)
    np.testing.assert_array_equal(labels, LABELS)
    assert augmentation.augmented(("mixup", "flip"), 3, 7, (images, LABELS), 4)[1].shape == (16, 4)
