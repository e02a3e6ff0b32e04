"""The named sets, the split for validation, and the order of the batches. The readers of files have their own tests."""

from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import augmentation, data, idx_files
from experiments.dataset import batches, make_dataset, scaled
from experiments.errors import DataError

IMAGES = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
LABELS = np.array([0, 1, 2, 9, 4], np.uint8)


def test_the_module_wins_over_the_folder_of_the_same_name():
    assert Path(data.__file__).name == "data.py"
    assert idx_files.SAMPLE_DIR.parent == Path(data.__file__).with_suffix("")


def test_digits_are_gray_8_by_8():
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    assert digits.image_shape == (8, 8, 1)
    assert len(digits.train_images) == len(digits.train_labels) == 1437
    assert len(digits.test_images) == len(digits.test_labels) == 360
    assert digits.train_images.max() == 1
    assert set(digits.test_labels) == set(range(10))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="digits: needs the package scikit-learn, which is not installed") as caught:
        data.load("digits")
    assert "\n" not in str(caught.value)


def test_other_digits_are_refused(monkeypatch):
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    bunch.images[0, 0, 0] += 1
    monkeypatch.setattr(datasets, "load_digits", lambda: bunch)
    with pytest.raises(DataError, match="digits: must be scikit-learn's 1,797 digits, with SHA-256"):
        data.load("digits")


def test_the_hash_sees_one_pixel_and_one_label(tmp_path):
    def sha(images: np.ndarray, labels: np.ndarray) -> str:
        return make_dataset("x", "x", (images, labels), (IMAGES, LABELS), 255, ("a",) * 10).sha256

    other_images, other_labels = IMAGES.copy(), LABELS.copy()
    other_images[0, 0, 0] += 1
    other_labels[0] += 1
    assert len({sha(IMAGES, LABELS), sha(other_images, LABELS), sha(IMAGES, other_labels)}) == 3
    assert sha(IMAGES, LABELS) == sha(IMAGES.copy(), LABELS.copy())


# ---- batches ----


def test_batches_cover_everything_in_order():
    sizes, seen = [], []
    for images, labels in batches(IMAGES, LABELS, 2):
        sizes.append(len(images))
        seen += list(labels)
    assert sizes == [2, 2, 1]
    assert seen == list(LABELS)


def test_shuffled_batches_keep_pairs_and_drop_the_rest():
    numbers = np.arange(103)
    got = list(data.shuffled_batches(numbers * 2, numbers, 10, seed=1, epoch=1))
    assert [len(labels) for _, labels in got] == [10] * 10
    labels = np.concatenate([labels for _, labels in got])
    np.testing.assert_array_equal(np.concatenate([images for images, _ in got]), labels * 2)
    assert len(set(labels)) == 100
    assert list(labels) != sorted(labels)


def test_the_order_is_a_function_of_seed_and_epoch():
    numbers = np.arange(64)

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(np.concatenate([b for b, _ in data.shuffled_batches(numbers, numbers, 8, seed=seed, epoch=epoch)]))

    assert order(0, 1) == order(0, 1)
    assert len({order(0, 1), order(0, 2), order(1, 1), order(1, 2)}) == 4


def test_a_batch_larger_than_the_set_gives_no_training_batch():
    assert list(data.shuffled_batches(IMAGES, LABELS, 6, seed=0, epoch=1)) == []


# ---- validation and the order of the batches ----


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.9])
def test_the_validation_split_is_stratified_and_seeded(fraction):
    labels = np.repeat([0, 1, 2], [100, 40, 2])
    training, validation = data.split_validation(labels, fraction, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate([training, validation])), np.arange(142))
    expected = [round(100 * fraction), round(40 * fraction), min(max(round(2 * fraction), 1), 1) if fraction else 0]
    assert np.bincount(labels[validation], minlength=3).tolist() == expected
    np.testing.assert_array_equal(data.split_validation(labels, fraction, seed=3)[1], validation)
    if fraction:
        assert not np.array_equal(data.split_validation(labels, fraction, seed=4)[1], validation)


def test_a_class_with_one_image_is_trained_on():
    training, validation = data.split_validation(np.array([0, 0, 0, 1]), 0.3, seed=0)
    assert 3 in training
    assert len(validation) == 1


def test_a_batch_is_a_function_of_its_step():
    images, labels = np.arange(23.0), np.arange(23)
    chosen = np.delete(np.arange(23), [4, 7])

    def make(seed=0):
        return data.Batches(images, labels, chosen, 5, seed=seed)

    batches = make()
    assert batches.per_epoch == 4
    forward = [batches(step)[1] for step in range(12)]
    for step in (11, 3, 4, 0, 7):  # in any order, and by another object
        np.testing.assert_array_equal(make()(step)[1], forward[step])
        np.testing.assert_array_equal(batches(step)[0], forward[step])
    epochs = [np.concatenate(forward[first : first + 4]) for first in (0, 4, 8)]
    for epoch in epochs:
        assert len(set(epoch)) == 20
        assert set(epoch) <= set(chosen)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.concatenate([make(seed=1)(step)[1] for step in range(4)]))


@pytest.mark.parametrize("largest", [255, 16])
def test_pixels_stay_uint8_and_are_scaled_alike_everywhere(largest):
    """NumPy, a compiled function and the augmentation give the same bits; floats are not changed."""
    values = np.arange(largest + 1, dtype=np.uint8)
    pixels = np.resize(values, (3, 10, 12))
    dataset = make_dataset("x", "x", (pixels, LABELS[:3]), (pixels, LABELS[:3]), largest, ("a",) * 10)
    assert dataset.train_pixels.dtype == np.uint8
    expected = pixels[..., None] * np.float32(1 / largest)
    assert expected.dtype == np.float32
    assert dataset.train_images.max() == 1
    for got in (
        dataset.test_images,
        jax.jit(lambda x: scaled(x, largest))(dataset.test_pixels),
        augmentation.augmented((), 0, 0, (dataset.train_pixels, LABELS[:3]), 10, largest)[0],
        scaled(expected, largest),
    ):
        assert np.asarray(got).tobytes() == expected.tobytes()
    assert dataset.inputs.border == np.median(
        np.concatenate([a.ravel() for a in (expected[:, 0], expected[:, -1], expected[:, :, 0], expected[:, :, -1])])
    )
