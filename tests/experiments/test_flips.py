"""`--flip-test`: probabilities averaged over an image and its mirror image."""

import json

import jax
import numpy as np
import pytest

import jaxcnn
from experiments import predict, report, train
from experiments.dataset import IGNORED
from experiments.flips import averaged_over_flips
from experiments.own_nets import build
from experiments.restore import restore
from experiments.tasks import TASKS
from jaxcnn import Conv, Dense, Flatten, Relu, serial

SHAPE, CLASSES = (4, 6, 2), 3
OUTPUTS = {"classification": (CLASSES,), "segmentation": (*SHAPE[:2], CLASSES)}
OWN = {"classification": "tests.other_nets:Linen", "segmentation": "tests.other_nets:image_to_image"}


def make_net(task):
    if task == "segmentation":
        return serial(Conv(4, (3, 2), padding="SAME"), Relu(), Conv(CLASSES, 1))
    return serial(Conv(4, (3, 2)), Relu(), Flatten(), Dense(CLASSES))


def make_images(count=5):
    return np.random.default_rng(0).normal(size=(count, *SHAPE)).astype(np.float32)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def expected_probabilities(net, params, x, task):
    """Return the mean of the two softmaxes, image by image."""
    rows = []
    for image in x:
        plain, mirrored = (softmax(np.asarray(net.apply(params, a[None]))[0]) for a in (image, np.fliplr(image).copy()))
        rows.append((plain + (mirrored if task == "classification" else mirrored[:, ::-1])) / 2)
    return np.stack(rows)


@pytest.mark.parametrize("task", TASKS)
def test_the_outputs_are_logarithms_of_averaged_probabilities(task):
    net, x = make_net(task), make_images()
    params = net.init(jax.random.key(0), SHAPE)
    averaged = averaged_over_flips(net, TASKS[task])
    y = np.asarray(averaged.apply(params, x))
    np.testing.assert_allclose(np.exp(y), expected_probabilities(net, params, x, task), rtol=1e-5)
    mirrored = np.asarray(averaged.apply(params, x[:, :, ::-1]))
    np.testing.assert_allclose(mirrored if task == "classification" else mirrored[:, :, ::-1], y, rtol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_the_metrics_are_those_of_the_averaged_probabilities(task):
    rng, net, x = np.random.default_rng(1), make_net(task), make_images(8)
    params = net.init(jax.random.key(1), SHAPE)
    labels = rng.integers(0, CLASSES, (8, *OUTPUTS[task][:-1]))
    if task == "segmentation":
        labels = labels.astype(np.uint8)
        labels[0, 0, :3] = IGNORED
    evaluate = TASKS[task].evaluator(averaged_over_flips(net, TASKS[task]))
    metrics = evaluate(params, [(x[:4], labels[:4]), (x[4:], labels[4:])])
    p = expected_probabilities(net, params, x, task)
    labeled = labels != IGNORED
    assert metrics["accuracy"] == pytest.approx((p.argmax(-1) == labels)[labeled].mean(), abs=1e-12)
    of_labels = np.take_along_axis(p, np.where(labeled, labels, 0)[..., None].astype(int), -1)[..., 0]
    losses = np.where(labeled, -np.log(of_labels), 0).reshape(8, -1).sum(1) / labeled.reshape(8, -1).sum(1)
    assert metrics["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_the_parameters_are_those_of_the_net():
    net, x = make_net("classification"), make_images()
    params = net.init(jax.random.key(0), SHAPE)
    averaged = averaged_over_flips(net, TASKS["classification"])
    assert jax.tree.structure(averaged.init(jax.random.key(0), SHAPE)) == jax.tree.structure(params)
    loss = jaxcnn.softmax_cross_entropy_with_integer_labels
    got = jaxcnn.evaluate(averaged, loss, params, [(x, np.zeros(5, int))])["loss"]
    assert got != pytest.approx(jaxcnn.evaluate(net, loss, params, [(x, np.zeros(5, int))])["loss"], rel=1e-3)


@pytest.mark.slow("trains")
def test_training_report_and_prediction_average(tmp_path, capsys):
    options = ["--model", "mlp", "--data", "digits", "--max-steps", "30", "--batch-size", "16", "--seed", "1"]
    for name, flags in (("plain", []), ("averaged", ["--flip-test"])):
        assert train.main([*options, *flags, "--no-report", "--out", str(tmp_path / name)]) == 0
    plain, averaged = restore(tmp_path / "plain"), restore(tmp_path / "averaged")
    # One epoch is not over, so both have the weights of the last step, which evaluation does not change.
    jax.tree.map(np.testing.assert_array_equal, plain.params, averaged.params)
    images, labels = plain.dataset.test_pixels, plain.dataset.test_labels
    both = [report.probabilities(plain, x) for x in (images, np.ascontiguousarray(images[:, :, ::-1]))]
    p = report.probabilities(averaged, images)
    np.testing.assert_allclose(p, sum(both) / 2, rtol=1e-4, atol=1e-6)
    for folder, rows in (("plain", both[0]), ("averaged", p)):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["test_accuracy"] == pytest.approx((rows.argmax(1) == labels).mean(), abs=1e-6)
    assert (both[0].argmax(1) != p.argmax(1)).any()
    capsys.readouterr()
    assert predict.main(["--run", str(tmp_path / "averaged"), "--images", "0"]) == 0
    assert f"{p[0].max():.3f}" in capsys.readouterr().out


@pytest.mark.slow("compiles nets of other libraries")
@pytest.mark.parametrize("task", TASKS)
def test_nets_of_other_libraries(task):
    net = build(OWN[task], CLASSES, SHAPE, OUTPUTS[task])
    params = net.init(jax.random.key(0), SHAPE)
    x = make_images()
    y = averaged_over_flips(net, TASKS[task]).apply(params, x)
    np.testing.assert_allclose(np.exp(y), expected_probabilities(net, params, x, task), rtol=1e-4)
