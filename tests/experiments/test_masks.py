"""Images with masks: metrics against loops, joint augmentation, files, a training, and each bad input."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from experiments import (
    augmentation,
    data,
    deltas,
    export,
    image_files,
    images,
    mask_files,
    models,
    predict,
    predict_masks,
    report,
    report_masks,
    run_folder,
    tasks,
    terminal,
    train,
)
from experiments.dataset import IGNORED, make_dataset
from experiments.errors import DataError
from experiments.restore import restore
from tests.experiments.test_resume import interrupting

RNG = np.random.default_rng(0)
TASK = tasks.TASKS["segmentation"]
CLASSES = 3
MODEL = "tests.other_nets:image_to_image"


def main(*argv: object) -> int:
    return train.main([str(arg) for arg in argv])


def drawn(count: int, side: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy images whose brightness is their class, and masks with some pixels that are not labeled."""
    rng = np.random.default_rng(seed)
    masks = np.repeat(np.repeat(rng.integers(0, CLASSES, (count, side // 4, side // 4)), 4, 1), 4, 2).astype(np.uint8)
    pixels = (90 * masks + rng.integers(0, 30, masks.shape)).astype(np.uint8)
    masks[:, 0, 0] = IGNORED
    return pixels, masks


def write(folder: Path, count: int, first: int = 0) -> Path:
    """Write images, and masks as gray PNGs and as PNGs with a palette."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for n, (pixels, mask) in enumerate(zip(*drawn(count, seed=first), strict=True), first):
        Image.fromarray(pixels).save(folder / "images" / f"{n:02d}.{'png' if n % 3 else 'PNG'}")
        if n % 2:
            Image.fromarray(mask).save(folder / "masks" / f"{n:02d}.png")
        else:
            predict_masks.save(folder / "masks" / f"{n:02d}.png", mask)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "set", 20)


# ---- metrics and loss ----


def test_metrics_and_loss_are_those_of_a_loop_over_the_labeled_pixels():
    masks = RNG.integers(0, CLASSES, (4, 5, 6)).astype(np.uint8)
    masks[RNG.random(masks.shape) < 0.3] = IGNORED
    masks[3] = IGNORED  # an image without labels
    logits = RNG.standard_normal((4, 5, 6, CLASSES)).astype(np.float32)
    predicted = logits.argmax(-1)
    counts = np.zeros((CLASSES, CLASSES), int)
    losses = np.zeros(4)
    for n in range(4):
        labeled = [(i, j) for i in range(5) for j in range(6) if masks[n, i, j] != IGNORED]
        for i, j in labeled:
            counts[masks[n, i, j], predicted[n, i, j]] += 1
            p = np.exp(logits[n, i, j]) / np.exp(logits[n, i, j]).sum()
            losses[n] -= math.log(p[masks[n, i, j]]) / len(labeled)
    ious = []
    for c in range(CLASSES):
        a, b = masks == c, (predicted == c) & (masks != IGNORED)
        ious.append((a & b).sum() / (a | b).sum())
    np.testing.assert_array_equal(tasks.confusion(masks, predicted, CLASSES), counts)
    np.testing.assert_allclose(tasks.intersection_over_union(counts), ious)
    absent = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    np.testing.assert_allclose(tasks.intersection_over_union(absent), [3 / 4, 2 / 3, math.nan])

    loss = TASK.loss(0.0)
    np.testing.assert_allclose(loss(logits, masks).mean((1, 2)), losses, rtol=1e-5)
    delta = jax.grad(lambda x: loss(x, masks).mean())(logits)
    assert (np.asarray(delta)[masks == IGNORED] == 0).all()
    assert (np.abs(delta).sum(-1) > 0)[masks != IGNORED].all()
    assert np.isfinite(TASK.loss(0.1)(logits, masks)).all()

    class Net:
        def apply(self, params, x):
            return x

    got = TASK.evaluator(Net())(None, [(logits[:3], masks[:3]), (logits[3:], masks[3:])])
    right = np.trace(counts) / counts.sum()
    expected = {"loss": losses.mean(), "accuracy": right, "mean_iou": np.mean(ious)}
    assert got == pytest.approx(expected, rel=1e-5)


def test_crop_and_flip_move_the_mask_with_its_image():
    masks = RNG.integers(1, 250, (16, 8, 10)).astype(np.uint8)
    pixels = masks[..., None] / np.float32(255)
    moved, labels = (np.asarray(a) for a in augmentation.augmented(("crop", "flip"), 0, 3, (pixels, masks), 250))
    assert (labels.shape, labels.dtype) == (masks.shape, np.uint8)
    np.testing.assert_array_equal(labels, np.where(moved[..., 0] == 0, IGNORED, np.round(255 * moved[..., 0])))
    assert (labels == IGNORED).any()
    assert (labels != masks).any((1, 2)).sum() > 8


def test_rows_of_masks_have_a_mean_iou_which_chooses_the_best(tmp_path):
    rows = [run_folder.Epoch(n, n, 1.0, 0.5, 1.0, 0.9 - n / 10, 1.0, 9.0, iou) for n, iou in ((1, 0.3), (2, 0.6))]
    assert run_folder.best(rows) is rows[1]
    run = run_folder.Run.start(tmp_path / "run", {})
    run.save_metrics(rows)
    assert run_folder.read_epochs(run.folder / "metrics.csv") == rows
    history = run_folder.History([run_folder.Epoch(1, 1, 1.0, 0.5, math.nan, math.nan, 1.0, 9.0)])
    (row,) = run_folder.History.from_json(json.loads(json.dumps(history.as_json()))).epochs
    assert math.isnan(row.validation_mean_iou)
    assert row.score_name == "accuracy"
    assert "accuracy 0.7000 mean IoU 0.6000" in terminal.describe_epoch(rows[1], 2)
    tested = {"accuracy": 0.5, "mean_iou": 0.25}
    text = terminal.summarize(rows, 0, 1.0, tested)
    assert text.endswith(
        "\nvalidation mean IoU 0.6000 after epoch 2, the best one\ntest accuracy 0.5000, mean IoU 0.2500"
    )


# ---- files ----


def test_a_folder_with_masks(folder, tmp_path):
    dataset = data.load(str(folder))
    assert (dataset.task, dataset.image_shape, dataset.class_names) == ("segmentation", (8, 8, 1), ("0", "1", "2"))
    assert (dataset.train_labels.shape, dataset.train_labels.dtype) == ((16, 8, 8), np.uint8)
    assert dataset.test_labels.shape == (4, 8, 8)
    labeled = dataset.train_labels != IGNORED
    np.testing.assert_array_equal((dataset.train_pixels[..., 0] // 90)[labeled], dataset.train_labels[labeled])
    training, validation = data.split(train.Config(validation=0.25), dataset, 0)
    assert (len(training), len(validation)) == (12, 4)
    resized = mask_files.load_folder(folder, 16)
    np.testing.assert_array_equal(resized.train_labels[:, ::2, ::2], dataset.train_labels)
    (folder / "classes.txt").write_text("sky\nroad\n\ntree\ncar\n")
    assert data.load(str(folder)).class_names == ("sky", "road", "tree", "car")

    for n, (part, count) in enumerate((("train", 4), ("val", 2), ("test", 3))):
        write(tmp_path / "parts" / part, count, 10 * n)
    dataset = data.load(str(tmp_path / "parts"))
    assert (len(dataset.train_pixels), len(dataset.test_pixels)) == (6, 3)
    assert data.split(train.Config(), dataset, 0)[1].tolist() == [4, 5]


@pytest.mark.parametrize("channel", [False, True])
def test_arrays_with_masks(tmp_path, channel):
    pixels, masks = drawn(6)
    y = masks[..., None].astype(np.int64) if channel else masks
    np.savez(tmp_path / "a.npz", x_train=pixels[:4], y_train=y[:4], x_test=pixels[4:], y_test=y[4:])
    dataset = images.load_path(tmp_path / "a.npz")
    np.testing.assert_array_equal(dataset.train_labels, masks[:4])
    np.testing.assert_array_equal(dataset.test_labels, masks[4:])
    assert dataset.task == "segmentation"
    for y, expected in (
        (masks[4:] * 0 + 3, "y_test: must be a mask of numbers from 0 to 2, or 255, got 3"),
        (masks[4:] * 0 - np.int64(1), "y_test: must be numbers from 0, got -1"),
        (np.arange(2), r"y_train and y_test: must be both labels or both masks, got \(4, 8, 8\) and \(2,\)"),
    ):
        np.savez(tmp_path / "b.npz", x_train=pixels[:4], y_train=masks[:4], x_test=pixels[4:], y_test=y)
        with pytest.raises(DataError, match=expected):
            images.load_path(tmp_path / "b.npz")


def rewrite(path: str, mode: str = "L", value: int = 0, size: tuple[int, int] = (8, 8)):
    return lambda folder: Image.new(mode, size, value).save(folder / path)


def gaps(folder: Path) -> None:
    for n in range(10):  # at least six of them are training images
        rewrite(f"masks/{n:02d}.png", value=7)(folder)


def gone(path: str):
    return lambda folder: (folder / path).unlink()


def text(path: str, content: str):
    return lambda folder: (folder / path).write_text(content)


MASK, ONE_CHANNEL = "masks/04.png", "must be a mask of one channel or with a palette, and 8 bits"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (gone("masks/03.png"), "03.PNG: must be a file with a mask of the same name in .*masks"),
        (gone("images/04.png"), f"{MASK}: must be a file with an image of the same name in .*images"),
        (rewrite("images/04.jpg"), "images/04.png: must be the only file of its name, got 04.jpg as well"),
        (rewrite(MASK, "RGB"), f"{MASK}: {ONE_CHANNEL}, got mode RGB"),
        (rewrite(MASK, "I;16"), f"{MASK}: {ONE_CHANNEL}, got mode I"),
        (rewrite(MASK, size=(9, 8)), rf"{MASK}: must be a mask of size \(8, 8\), as .*images/04.png, got \(8, 9\)"),
        (gaps, "masks: must be masks of at least two classes, .*, got 0, 1, 2, 7"),
        (text("masks/notes.txt", "x"), "notes.txt: must be a PNG or JPEG image, named .*, got another file"),
        (text(MASK, "x"), f"{MASK}: must be a PNG or JPEG image, got something else"),
        (text("classes.txt", "a\na\n"), "classes.txt: must be from 2 to 255 different names, .*, got a, a"),
        (text("classes.txt", "a\nb\n"), "png: must be a mask of numbers from 0 to 1, or 255, got 2"),
    ],
)  # fmt: skip
def test_folders_that_are_not_right(folder, change, expected):
    change(folder)
    with pytest.raises(DataError, match=expected) as caught:
        data.load(str(folder))
    assert "\n" not in str(caught.value)


def test_masks_of_0_and_255_are_not_two_classes(folder):
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.full((8, 8), 255, np.uint8)).save(path)
        rewrite(f"masks/{path.name}")(folder)
    with pytest.raises(DataError, match=r"without gaps \(255: not labeled\), got 0$"):
        data.load(str(folder))


def test_validation_needs_a_labeled_pixel(folder):
    dataset = data.load(str(folder))
    _, validation = data.split(train.Config(), dataset, 0)
    TASK.check(train.Config(), train.Config(), dataset, validation)
    dataset.train_labels[validation] = IGNORED
    expected = "validation images of set: must be masks with at least one pixel that is not 255, got none"
    with pytest.raises(DataError, match=expected):
        TASK.check(train.Config(), train.Config(), dataset, validation)


# ---- the command line ----


@pytest.mark.slow("builds every net for the messages that list them")
def test_what_masks_do_not_have_is_refused_before_anything_is_computed(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("sklearn")
    masks = ["--data", str(folder), "--model", "unet", "--batch-size", "4"]
    small = write(tmp_path / "small", 1) / "images"
    net, subfolders = (
        "--model: must be a net",
        "a folder with at least two subfolders, one per class, or images and masks",
    )
    others = "mlp, small, small-resnet, resnet, resnet-gn, vgg, mobile"
    for argv, expected in (
        ([*masks, "--model", "mlp"], f"{net} for the images and masks of set (unet), got mlp (outputs (N, 3))"),
        (
            ["--model", "unet", "--data", "digits"],
            f"{net} for the images of digits ({others}), got unet (outputs (N, 8, 8, 10))",
        ),
        (
            [*masks, "--size", "12"],
            "images of set: must be images with sides that are multiples of 8 for --model unet, got 12×12; "
            "choose --size",
        ),
        (
            ["--model", "unet"],
            f"(lecture, mlp, lenet5, {others.removeprefix('mlp, ')}), got unet (an output for each pixel)",
        ),
        (
            [*masks, "--model", "tests.other_nets:seven"],
            "must be a net whose outputs are (N, 8, 8, 3) for images 8×8×1, got (N, 7)",
        ),
        ([*masks, "--augment", "flip", "mixup"], "--augment: must be crop or flip for images with masks, got mixup"),
        ([*masks, "--private", "--clip-norm", "1"], "--private: must be omitted for images with masks, got it"),
        ([*masks, "--stream"], "--stream: must be omitted for images with masks, which are read into memory, got it"),
        (["--data", str(small)], f"images: must be {subfolders}, got none"),
    ):
        if "--private" in argv:
            pytest.importorskip("dp_accounting")
        if "--stream" in argv:
            pytest.importorskip("grain")
        assert main(*argv, "--out", tmp_path / "out") in (1, 2)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.rstrip().endswith(expected)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow("compiles a whole net for several sizes")
def test_unet_keeps_the_size_of_any_image_of_its_multiples():
    multiple = models.MULTIPLES["unet"]
    for height, width in ((multiple, 3 * multiple), (2 * multiple, multiple)):
        assert models.unet(5).summary((height, width, 3)).rows[-1].output_shape == (height, width, 5)
    assert models.unet(10, width=32, norm=None).summary((128, 128, 1)).rows[-1].output_shape == (128, 128, 10)


@pytest.mark.parametrize("shape", [(40, 40), (30, 50), (50, 17), (7, 9)])
@pytest.mark.parametrize("stretch", [False, True])
def test_masks_have_the_size_of_their_images(shape, stretch):
    """The left half of an image is bright; so is that of its mask."""
    image = np.zeros((*shape, 3), np.uint8)
    image[:, : shape[1] // 2] = 255
    seen = predict.to_input(image, (32, 32, 1), stretch, False)
    mask = predict_masks.resized((seen[..., 0] > 0.5).astype(np.uint8), shape, stretch)
    assert mask.shape == shape
    assert (mask != image[..., 0] // 255).mean() < 0.1


# ---- end to end ----


@pytest.mark.slow("trains")
def test_several_devices_compute_what_one_computes_for_masks(tmp_path, folder, capsys):
    """Every number of every step, and the metrics of the validation and test images; images have 0 to 64 labels."""
    for n in (3, 4):
        Image.fromarray(np.full((8, 8), IGNORED, np.uint8)).save(folder / "masks" / f"{n:02d}.png")
    found = []
    for name, more in (("one", ()), ("four", ("--devices", 4, "--device", "cpu"))):
        options = ("--data", folder, "--model", MODEL, "--optimizer", "sgd", "--augment", "crop", "--validation", 0.25)
        recipe = ("--batch-size", 4, "--epochs", 2, "--norms-every", 1, "--no-report")
        assert main(*options, *recipe, "--out", tmp_path / name, *more) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows = [dataclasses.asdict(row) for row in run_folder.read_epochs(tmp_path / name / "metrics.csv")]
        config = json.loads((tmp_path / name / "config.json").read_text())
        tested = {key: config[key] for key in ("test_loss", "test_accuracy", "test_mean_iou")}
        numbers = [{column: value for column, value in row.items() if "second" not in column} for row in rows]
        found.append([*map(json.loads, lines), *numbers, tested])
    assert "each batch is split over 4" in capsys.readouterr().out
    assert len(found[0]) > 6
    for one, four in zip(*found, strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(four)
        np.testing.assert_allclose(*map(jax.tree.leaves, (one, four)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow("trains")
def test_a_net_trains_resumes_predicts_and_is_reported(folder, tmp_path, capsys, monkeypatch):
    argv = ("--data", folder, "--model", MODEL, "--batch-size", 4, "--epochs", 20, "--learning-rate", 0.1)
    argv = (*argv, "--augment", "crop", "flip", "--norms-every", 0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(*argv, "--out", whole) == 0
    assert re.search(r"validation loss \S+ accuracy \S+ mean IoU 0\.\d{4}", capsys.readouterr().out)
    with interrupting() as at:
        at(4)
        assert main(*argv, "--out", cut) == 130
    assert main("--resume", cut) == 0
    one, other = (load_file(run / "weights.safetensors") for run in (whole, cut))
    assert {path: a.tobytes() for path, a in one.items()} == {path: a.tobytes() for path, a in other.items()}
    assert (whole / "metrics.jsonl").read_text() == (cut / "metrics.jsonl").read_text()
    config = json.loads((cut / "config.json").read_text())
    assert config["test_mean_iou"] > 0.6  # chance is 0.2
    best = run_folder.best(run_folder.read_epochs(cut / "metrics.csv"))
    assert best.step == config["best_step"]
    assert best.score_name == "mean IoU"

    capsys.readouterr()
    dataset = data.load(str(folder))
    assert predict.main(["--run", str(cut), "--images", "0", "1", "2", "3"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    expected = f"{config['test_accuracy']:.1%} of the pixels correct, mean IoU {config['test_mean_iou']:.3f}"
    assert last == expected
    image, out = folder / "images" / "04.png", tmp_path / "masks"
    assert predict.main([str(image), "--run", str(cut), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    with Image.open(out / "1-04.png") as written:
        assert (written.mode, written.size) == ("P", (8, 8))
        mask = np.asarray(written)
    for label, share in enumerate(np.bincount(mask.ravel(), minlength=3) / 64):
        assert (f"  {label}  {share:.1%}\n" in text) == (share > 0)
    pixels = image_files.read([image], folder, None)
    np.testing.assert_array_equal(mask, report.predicted_classes(restore(cut), pixels)[0])

    monkeypatch.undo()
    page = report_of(cut, monkeypatch)
    for expected in ("Confusion matrix", "labeled pixels of the 4 test images", '<th class="n">IoU</th>', 'id="masks"'):
        assert expected in page
    assert page.count('<div class="masks">') == 1
    assert len(re.findall('alt="Image .*?, its mask, and the predicted mask"', page)) == len(dataset.test_labels)
    assert f"<strong>{100 * config['test_mean_iou']:.2f} %</strong>" in page
    assert export.main([str(cut), "--format", "npz", "stablehlo"]) == 0
    capsys.readouterr()
    for script, given, message in (
        (export, [str(cut), "--format", "pytorch"], "must be the run of a net of jaxcnn for PyTorch and ONNX"),
        (deltas, ["--run", str(cut), "--images", "0"], "--run: must be a run with one label per image, got "),
        (predict, [str(image), "--run", str(cut), "--explain"], "must be omitted for a net that was trained on masks"),
    ):
        assert script.main(given) == 2
        assert message in capsys.readouterr().err


def report_of(run: Path, monkeypatch) -> str:
    """Return the text of a report; the fixture `reports` replaces `report.write`."""
    from experiments import report_page
    from experiments.restore import restore

    return report_page.page(report.collect(run, restore(run)))


def test_examples_are_ordered_by_accuracy():
    pixels, masks = drawn(4)
    predicted = np.where(masks == IGNORED, 0, masks)
    predicted[2] = (predicted[2] + 1) % CLASSES
    examples = report_masks.MaskExamples("test images", pixels[..., None], 255, masks, predicted, CLASSES)
    assert examples.accuracies().tolist() == [1, 1, 0, 1]
    assert examples.confusion().sum() == 4 * 63
    html = report_masks.section(examples, ("a", "b<", "c"))
    assert html.index("Image 2,") < html.index("Image 0,")
    assert "b&lt;" in html
    assert mask_files.palette()[[0, 1, 2, IGNORED]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [224, 224, 192]]


@pytest.mark.slow("compiles a net")
def test_unet_in_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    from experiments import torch_source
    from experiments.restore import TrainedNet

    net = models.unet(CLASSES, depth=1, width=8)
    params = jax.tree.map(np.asarray, net.init(jax.random.key(0), (8, 8, 1)))
    pixels, masks = drawn(4)
    dataset = make_dataset("a", "b", (pixels, masks), (pixels, masks), 255, ("a", "b", "c"))
    trained = TrainedNet("unet", net, params, dataset.inputs, flip_test=False)
    for path in export.WRITERS["pytorch"](tmp_path, trained, {}):
        assert path.exists()  # it was compared with the net
    assert torch_source.convert(net, params, (8, 8, 1), "unet", "abc").entries
    assert torch is not None
    assert jnp.isfinite(net.apply(params, dataset.test_images)).all()
