import functools
import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread

import jaxcnn
from experiments import attributions
from experiments.restore import restore
from tests.cases import compiled
from tests.run_folder import untrained

ALL = [
    "gradient", "gradient × input", "integrated\ngradients", "SmoothGrad", "guided\nbackprop", "deconvnet", "Grad-CAM",
    "occlusion", "LRP\nε, z⁺", "LRP\nε, α2β1", "LRP\nε, γ, zᴮ", "DeepLIFT",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return untrained("lecture", tmp_path_factory.mktemp("runs") / "lecture")


def main(*argv: object) -> int:
    return attributions.main([str(arg) for arg in argv])


@pytest.fixture(scope="module")
def gallery(run, tmp_path_factory) -> tuple[Path, str, dict[str, attributions.Maps]]:
    """Make a gallery of two images, and return its folder, the printed text and the maps."""
    out, printed, drawn = tmp_path_factory.mktemp("gallery") / "out", StringIO(), []
    maps = attributions.maps
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(attributions, "maps", lambda *args: drawn.append(maps(*args)) or drawn[0])
        assert main("--run", run, "--images", 3, 0, "--seed", 3, "--out", out) == 0
    return out, printed.getvalue(), drawn[0]


def test_the_figure_has_one_row_per_image(gallery):
    out, *_ = gallery
    assert [path.name for path in out.iterdir()] == ["attributions.png"]
    height, width, _ = imread(out / "attributions.png").shape
    assert height > 200
    assert width > 13 * 75


def test_the_conserved_quantity_is_printed_next_to_the_sum(gallery, run):
    """The conserved quantity is the logit, or its increase from a black image; DeepLIFT attributes all of it."""
    _, printed, _ = gallery
    table = printed[printed.index("Σ map  conserved difference") :]
    lines = [line for line in table.splitlines() if "image " in line]
    assert [line.rsplit("image", 1)[0].strip() for line in lines[::2]] == [
        title.replace("\n", " ") for title in ALL if title[:3] in ("int", "LRP", "Dee")
    ]
    trained = restore(run)
    x = trained.dataset.test_images[[3, 0]]
    logits, dark = np.split(np.asarray(compiled(trained.net.apply)(trained.params, np.concatenate([x, 0 * x]))), 2)
    predicted = logits.argmax(1)
    for i, line in enumerate(lines):
        total, conserved, rest = map(float, line.split()[-3:])
        n = i % 2
        full = logits[n, predicted[n]]
        assert conserved == pytest.approx(full if "LRP" in line else full - dark[n, predicted[n]], abs=1e-4)
        assert rest == pytest.approx(conserved - total, abs=2e-4)
        if "DeepLIFT" in line:
            assert abs(rest) < 1e-3 * abs(conserved) + 1e-4


def test_the_maps_are_those_of_attribute(gallery, run):
    """Each map equals the result of `jaxcnn.attribute`, summed over channels."""
    trained, found = restore(run), gallery[2]
    x = trained.dataset.test_images[[3, 0]]
    assert list(found) == ALL
    guided = {jaxcnn.HiddenLayer: jaxcnn.rules.guided_relu}

    @compiled
    def by_hand(params, x):
        target = trained.net.apply(params, x).argmax(1)
        run = functools.partial(jaxcnn.attribute, trained.net, params, x, target)
        return {
            "gradient": run(),
            "guided\nbackprop": run(method="gradient", rules=guided),
            "LRP\nε, z⁺": run(rules=jaxcnn.attribution.epsilon_plus()),
            "SmoothGrad": run(method="smooth_grad", key=jax.random.key(3)),
        }

    for title, heat in by_hand(trained.params, x).items():
        heat = np.asarray(heat)[..., 0]
        np.testing.assert_allclose(found[title].heat, heat, rtol=1e-2, atol=1e-3 * np.abs(heat).max(), err_msg=title)
        np.testing.assert_allclose(found[title].total, found[title].heat.sum((1, 2)))
    assert found["Grad-CAM"].heat.shape == (2, 4, 4)
    shapes = {of.heat.shape for title, of in found.items() if title != "Grad-CAM"}
    assert shapes == {(2, 28, 28)}
    assert len({of.heat.tobytes() for of in found.values()}) == len(ALL)


def test_the_newest_finished_run_is_used(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "one"
    shutil.copytree(run, folder)
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "end": "finished"})
    )
    heat = np.ones((1, 28, 28))
    monkeypatch.setattr(attributions, "maps", lambda *args: {"one": attributions.Maps(heat, heat.sum((1, 2)))})
    assert main("--images", 0, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("lecture from runs/one, the newest finished run; --fresh trains")


def test_methods_that_a_net_does_not_support_are_omitted():
    dense = jaxcnn.serial(jaxcnn.Flatten(), jaxcnn.Dense(5), jaxcnn.Tanh(), jaxcnn.Dense(3))
    left = attributions.methods(dense, (8, 8, 1), 0)
    assert [title for title in ALL if title not in left] == ["guided\nbackprop", "deconvnet", "Grad-CAM"]
    convolutional = jaxcnn.serial(jaxcnn.Conv(2, 3), jaxcnn.Relu(), jaxcnn.Flatten(), jaxcnn.Dense(3))
    assert attributions.methods(convolutional, (8, 8, 1), 0)["Grad-CAM"][1] == {"layer": "relu1"}


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        (("--images", -1), 2, "--images: must be from 0 to 1999, got -1"),
        (("--methods", "all"), 2, "unknown option --methods"),
        (("--epochs", 3), 2, "--epochs: must be omitted with --run, whose net is already trained, got 3"),
        (("--run", "nowhere"), 1, "config.json: must be the config of a run, got No such file"),
    ],
)
def test_an_invalid_option_is_one_line(run, tmp_path, capsys, argv, status, expected):
    options = argv if argv[0] == "--run" else ("--run", run, *argv)
    assert main(*options, "--out", tmp_path / "out") == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert expected in line
    assert not (tmp_path / "out").exists()
