from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread

import jaxcnn
from experiments import attributions, train
from experiments.trained import restore

ALL = [
    "gradient", "gradient × input", "integrated\ngradients", "SmoothGrad", "guided\nbackprop", "deconvnet", "Grad-CAM",
    "occlusion", "LRP\nε, z⁺", "LRP\nε, α2β1", "LRP\nε, γ, zᴮ", "DeepLIFT",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lecture"
    assert train.main(["--max-steps", "20", "--out", str(folder)]) == 0
    return folder


def main(*argv: object) -> int:
    return attributions.main([str(arg) for arg in argv])


@pytest.fixture(scope="module")
def gallery(run, tmp_path_factory) -> tuple[Path, str]:
    """A gallery of three images, and what was printed."""
    from contextlib import redirect_stdout
    from io import StringIO

    out, printed = tmp_path_factory.mktemp("gallery") / "out", StringIO()
    with redirect_stdout(printed):
        assert main("--run", run, "--images", 3, 0, "--out", out) == 0
    return out, printed.getvalue()


def test_a_picture_with_a_row_an_image(gallery):
    out, _ = gallery
    assert [path.name for path in out.iterdir()] == ["attributions.png"]
    height, width, _ = imread(out / "attributions.png").shape
    assert height > 200
    assert width > 13 * 75


def test_what_is_promised_stands_beside_what_was_found(gallery, run):
    """Σ by DeepLIFT is the rise of the logit; zᴮ, ε and γ lose the biases' shares only, which are small so early."""
    _, printed = gallery
    table = printed[printed.index("Σ map  should be       rest") :]
    lines = [line for line in table.splitlines() if "image " in line]
    assert [line.rsplit("image", 1)[0].strip() for line in lines[::2]] == [
        title.replace("\n", " ") for title in ALL if title[:3] in ("int", "LRP", "Dee")
    ]
    trained = restore(run)
    x = trained.dataset.test_images[[3, 0]]
    logits = np.asarray(trained.net.apply(trained.params, x))
    dark = np.asarray(trained.net.apply(trained.params, 0 * x))
    said = logits.argmax(1)
    for i, line in enumerate(lines):
        total, promised, rest = map(float, line.split()[-3:])
        n = i % 2
        full = logits[n, said[n]]
        assert promised == pytest.approx(full if "LRP" in line else full - dark[n, said[n]], abs=1e-4)
        assert rest == pytest.approx(promised - total, abs=2e-4)
        if "DeepLIFT" in line:
            assert abs(rest) < 1e-3 * abs(promised) + 1e-4


def test_the_maps_are_those_of_attribute(run):
    """Each is what `jaxcnn.attribute` gives by hand, summed over channels."""
    trained = restore(run)
    x, target = trained.dataset.test_images[:2], np.array([9, 2])
    found = attributions.maps(trained, x, target, seed=3)
    assert list(found) == ALL
    rules = {jaxcnn.HiddenLayer: jaxcnn.rules.guided_relu}
    net, params = trained.net, trained.params
    by_hand = {
        "gradient": jaxcnn.attribute(net, params, x, target),
        "guided\nbackprop": jaxcnn.attribute(net, params, x, target, method="gradient", rules=rules),
        "LRP\nε, z⁺": jaxcnn.attribute(net, params, x, target, rules=jaxcnn.attribution.epsilon_plus()),
        "SmoothGrad": jaxcnn.attribute(net, params, x, target, method="smooth_grad", key=jax.random.key(3)),
    }
    for title, heat in by_hand.items():
        heat = np.asarray(heat)[..., 0]
        np.testing.assert_allclose(found[title].heat, heat, rtol=1e-3, atol=1e-4 * np.abs(heat).max(), err_msg=title)
        np.testing.assert_allclose(found[title].total, found[title].heat.sum((1, 2)))
    assert found["Grad-CAM"].heat.shape == (2, 4, 4)
    shapes = {of.heat.shape for title, of in found.items() if title != "Grad-CAM"}
    assert shapes == {(2, 28, 28)}
    assert len({of.heat.tobytes() for of in found.values()}) == len(ALL)


def test_methods_that_a_net_has_no_layers_for_are_left_out():
    dense = jaxcnn.serial(jaxcnn.Flatten(), jaxcnn.Dense(5), jaxcnn.Tanh(), jaxcnn.Dense(3))
    left = attributions.methods(dense, (8, 8, 1), 0)
    assert [title for title in ALL if title not in left] == ["guided\nbackprop", "deconvnet", "Grad-CAM"]
    pictures = jaxcnn.serial(jaxcnn.Conv(2, 3), jaxcnn.Relu(), jaxcnn.Flatten(), jaxcnn.Dense(3))
    assert attributions.methods(pictures, (8, 8, 1), 0)["Grad-CAM"][1] == {"layer": "relu1"}


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        (("--images", -1), 2, "--images: expected 0 to 1999, got -1"),
        (("--methods", "all"), 2, "unknown option --methods"),
        (("--epochs", 3), 2, "--epochs: expected without --run, whose net is trained already"),
        (("--run", "nowhere"), 1, "config.json: expected a run's config, got No such file"),
    ],
)
def test_what_it_cannot_do_is_told_in_a_line(run, tmp_path, capsys, argv, status, expected):
    given = argv if argv[0] == "--run" else ("--run", run, *argv)
    assert main(*given, "--out", tmp_path / "out") == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert expected in line
    assert not (tmp_path / "out").exists()
