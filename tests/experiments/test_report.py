"""report.html: every figure is there, in the file and in a browser, and the numbers are those of the run."""

import base64
import html.parser
import io
import json
import math
import re
import shutil
import subprocess
import types

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import report, report_figures, report_page, train
from experiments.restore import restore
from jaxcnn import Conv, Dense, Flatten, Relu, residual, serial

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHARTS = ("loss", "accuracy", "confusion", "delta-norms", "gradient-norms", "update-norms", "speed")
SECTIONS = (
    *("curves", "confusion", "mistakes", "filters", "deltas", "layers", "norms", "timings", "command", "config"),
)


@pytest.fixture(scope="module", autouse=True)
def reports():
    """Write reports, unlike the other tests."""


class Page(html.parser.HTMLParser):
    """Collects tags and text by section; fails for tags that are not closed in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.section = [], ""
        self.tags, self.text, self.rows = {}, {}, {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "section":
            self.section = attributes["id"]
        self.tags.setdefault(self.section, []).append((tag, attributes))
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.setdefault(self.section, []).append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + data
        if self.open and ("td" in self.open or "th" in self.open):
            self.rows[self.section][-1][-1] += data

    def named(self, section, tag):
        return [attributes for name, attributes in self.tags[section] if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mlp"
    options = ["--model", "mlp", "--data", "digits", "--epochs", "2", "--norms-every", "7", "--seed", "3"]
    assert train.main([*options, "--out", str(folder)]) == 0
    text = (folder / "report.html").read_text("utf-8")
    trained = restore(folder)
    config = json.loads((folder / "config.json").read_text())
    return types.SimpleNamespace(folder=folder, text=text, page=Page(text), trained=trained, config=config)


@pytest.mark.slow("trains")
def test_every_figure_is_in_the_file(run):
    page = run.page
    assert tuple(page.tags)[1:] == SECTIONS
    charts = [a for section in SECTIONS for a in page.named(section, "svg")]
    assert len(charts) == len(CHARTS)
    for name, attributes in zip(CHARTS, charts, strict=True):
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 20
        assert f'id="{name}-' in run.text
    for attributes in [a for section in SECTIONS for a in page.named(section, "img")]:
        assert attributes["alt"]
        image = Image.open(io.BytesIO(base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))))
        assert min(image.size) >= 1
    assert len(page.named("filters", "img")) == 1
    assert len(page.named("deltas", "img")) == 2 * (1 + 2 * 6)  # two images; six layers, each with a and δ
    # Self-contained: no address but those within the page and the namespaces of SVG, and no script.
    targets = [
        a[key] for tags in page.tags.values() for _, a in tags for key in ("src", "href", "xlink:href") if key in a
    ]
    targets += re.findall(r"url\(([^)]*)", run.text)
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert set(re.findall(r"https?://[^\s\"']+", run.text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/1998/Math/MathML",
    }
    assert "<script" not in run.text
    for color in report_figures.VARIABLES:
        assert color not in run.text


@pytest.mark.slow("trains")
def test_the_numbers_are_those_of_the_run(run):
    page, config, dataset = run.page, run.config, run.trained.dataset
    head = " ".join(page.text[""].split())
    assert f"mlp on {dataset.name} finished" in head
    assert f"The run finished after {config['steps']} steps (2 of 2 epochs)." in head
    assert f"{100 * config['test_accuracy']:.2f} % of the {len(dataset.test_labels)} test images" in head
    predicted = np.asarray(run.trained.net.apply(run.trained.params, dataset.test_images)).argmax(1)
    wrong = int((predicted != dataset.test_labels).sum())
    assert wrong > 0
    assert f"The predictions of {wrong} of {len(dataset.test_labels)} test images are wrong" in page.text["mistakes"]
    assert len(page.named("mistakes", "img")) == min(wrong, report.MISTAKES)
    shares = {row[0]: row[2] for row in page.rows["confusion"][1:]}
    for label, name in enumerate(dataset.class_names):
        mine = dataset.test_labels == label
        assert shares[name] == f"{100 * (predicted[mine] == label).mean():.1f} %"
    layers = [row[0] for row in page.rows["layers"]]
    assert layers == ["layer", "input", *(name for name, _ in run.trained.net.walk()), "total"]
    assert len(page.rows["timings"]) == 1 + 2
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["command"] in html.unescape(page.text["command"])
    facts = dict(page.rows["config"])
    assert (facts["seed"], facts["norms every"], facts["model"]) == ("3", "7", "mlp")


@pytest.mark.slow("trains")
def test_again_and_for_a_run_that_has_not_finished(run, tmp_path, capsys):
    again = tmp_path / "copy"
    shutil.copytree(run.folder, again)
    (again / "report.html").unlink()
    (again / "curves.png").unlink()
    assert report.main([str(again)]) == 0
    assert (again / "curves.png").exists()
    assert capsys.readouterr().out.strip() == str(again / "report.html")
    # The report of the same files is the same, but for the name of the folder.
    assert (again / "report.html").read_text().replace("copy", "mlp") == run.text.replace("copy", "mlp")
    killed = {key: value for key, value in run.config.items() if not key.startswith(("end", "test_", "best", "steps"))}
    (again / "config.json").write_text(json.dumps(killed))
    (again / "environment.json").unlink()
    (again / "metrics.jsonl").write_text('{"step": 1, "loss": "nan", "accuracy": 0.5}\n{"step": 2, "lo')
    assert report.main([str(again)]) == 0
    page = Page((again / "report.html").read_text())
    assert "killed" in page.text[""]
    assert "The test set was not evaluated, because the run has not finished." in page.text[""]
    assert "validation images are wrong" in page.text["mistakes"]
    assert "environment.json is missing" in page.text["command"]
    assert "metrics.jsonl has no norms" in page.text["norms"]
    (again / "config.json").write_text(json.dumps({**killed, "validation": 0.0}))
    assert report.main([str(again)]) == 0
    page = Page((again / "report.html").read_text())
    assert all("has no validation images" in page.text[name] for name in ("confusion", "mistakes", "deltas"))


def test_folders_without_a_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path, expected in [
        (tmp_path / "none", "none: must be the folder of a run, got no such folder"),
        (tmp_path / "file", "file: must be the folder of a run, got a file"),
        (tmp_path, "config.json: must be the config of a run, got No such file"),
    ]:
        assert report.main([str(path)]) == 1
        assert expected in capsys.readouterr().err


MEASURE = """<script>
addEventListener("load", () => {
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.right, r.width, r.height]; };
  const letters = [...document.querySelectorAll("svg text")];
  parent.document.title = JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    ground: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(letters[0]).fill,
    svg: [...document.querySelectorAll("svg")].map(box),
    letter: Math.min(...letters.map((e) => e.getBoundingClientRect().height)),
    img: [...document.querySelectorAll("img")].map((e) => [...box(e), e.complete, e.naturalWidth])});
});
</script>"""
# The smallest window of Chromium is wider than a phone.
FRAME = """<!doctype html><title></title><style>:root {{ color-scheme: light dark }}</style>
<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{text}"></iframe>"""


@pytest.mark.slow("trains, and starts a browser")
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_chromium(run, tmp_path, width, scheme):
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', run.text)[0]
    text = run.text.replace(policy, "").replace("</body>", f"{MEASURE}</body>")
    path = tmp_path / "frame.html"
    path.write_text(FRAME.format(width=width, text=html.escape(text)), "utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}", "--window-size=1400,1000", path.as_uri()]
    command += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert len(seen["svg"]) == len(CHARTS)
    for left, right, wide, high in seen["svg"]:
        assert left >= 0
        assert right <= width
        assert wide > 250
        assert high > 150
    assert seen["letter"] > 9
    assert len(seen["img"]) > 20
    for left, right, wide, high, complete, natural in seen["img"]:
        assert complete
        assert min(natural, wide, high, left) > 0
        assert right <= width
    dark, light = ("rgb(21, 24, 28)", "rgb(228, 231, 234)"), ("rgb(252, 252, 251)", "rgb(31, 35, 40)")
    assert seen["ground"] == (dark if scheme == "dark" else light)[0]
    assert seen["ink"] != seen["ground"]


# ---- figures ----


def test_the_first_layer_is_that_of_the_net_and_not_of_the_alphabet():
    net = serial(serial(Conv(5, 3), Relu()), Conv(2, 1), residual(Conv(2, 1)), Flatten(), Dense(3))
    params = net.init(jax.random.key(0), (8, 8, 1))
    by_name = {name: dict(sorted(params[name].items())) for name in sorted(params)}
    assert next(iter(by_name)) == "conv1"
    shapes = [a.shape for a in report_page.weights_in_order(net, by_name)]
    assert shapes == [(3, 3, 1, 5), (1, 1, 5, 2), (1, 1, 2, 2), (72, 3)]


def test_long_names_of_layers_keep_their_ends():
    figure = report_figures.norms({"a/b": ([1], [1.0]), "serial1/" * 9 + "conv1": ([1], [2.0])}, "2-norm")
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == ["a/b", "…/serial1/conv1"]


def test_first_layers():
    rng = np.random.default_rng(0)
    tiles, text = report_figures.filters(rng.standard_normal((3, 3, 1, 5)), (8, 8, 1))
    assert [tile.shape for tile in tiles] == [(3, 3, 3)] * 5
    assert text.startswith("5 kernels, 3×3; red > 0")
    color, text = report_figures.filters(rng.standard_normal((3, 3, 3, 4)), (8, 8, 3))
    assert "red, green and blue" in text
    weight = rng.standard_normal((64, 100))
    tiles, text = report_figures.filters(weight, (8, 8, 1))
    assert text.startswith("the 32 largest of 100 units, in the shape of an image, 8×8")
    largest = np.abs(weight).sum(0).argmax()
    red = tiles[0].astype(int)[..., 0] - tiles[0].astype(int)[..., 2]
    assert (np.sign(red) == np.sign(weight[:, largest].reshape(8, 8)))[np.abs(red) > 10].all()
    assert report_figures.filters(weight, (9, 9, 1)) is None
    assert report_figures.filters(weight[0], (8, 8, 1)) is None
    assert report_figures.filters(rng.standard_normal((1, 1, 16, 4)), (8, 8, 1)) is None
    board = report_figures.mosaic(color, 3)
    assert board.shape == (2 * 3 + 1, 3 * 3 + 2, 4)
    assert board[3, :, 3].tolist() == [0] * 11  # the gap
    np.testing.assert_array_equal(board[4:, :3, :3], color[3])


def test_signed_colors_and_means_of_long_lines():
    red, white, blue = report_figures.signed(np.array([2.0, 0.0, -2.0])).astype(int)
    assert red[0] > red[2] + 50
    assert blue[2] > blue[0] + 50
    assert white.min() > 240
    x, y = report_figures.averaged(range(1000), [math.sqrt(2)] * 1000)
    assert len(x) == report_figures.MAX_POINTS
    np.testing.assert_allclose(y, math.sqrt(2))
    assert x[0] == 1.5


def test_confusion_and_mistakes():
    p = np.array([[0.9, 0.1, 0], [0.2, 0.7, 0.1], [0.6, 0.4, 0], [0.8, 0.1, 0.1]])
    examples = report.Examples("test images", np.zeros((4, 2, 2, 1)), 255, np.array([0, 1, 1, 2]), p)
    assert examples.confusion().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert examples.mistakes().tolist() == [3, 2]


@pytest.mark.parametrize("seconds", [(3.21, "3.2 s"), (61, "1 min 1 s"), (3700, "1 h 1 min")])
def test_durations(seconds):
    assert report_page.duration(seconds[0]) == seconds[1]
