"""The lecture's scripts: every statement holds, a wrong rule is noticed, the page stands by itself."""

import functools
import html.parser
import importlib
import inspect
import re
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcnn
from experiments.lecture import __main__ as everything
from experiments.lecture import page, statement
from jaxcnn.ops import signal

SCRIPTS = {name: importlib.import_module(f"experiments.lecture.{name}") for name in everything.SCRIPTS}
QUICK = {  # those that train a net: enough to run, too little to learn
    "s02_network": {"epochs": 3, "examples": 100},
    "s03_sigmoid": {"steps": 12},
    "s09_literal_up": {"steps": 4},
    "s10_same_step": {"steps": 4},
}
LEARNT = ("accuracy", "loss")


@functools.cache
def shown(name):
    with jax.enable_x64(True):
        return SCRIPTS[name].show(**QUICK.get(name, {}))


def failures(result):
    return [check.what for check in result.checks if not check.holds]


def measured(name, what):
    (found,) = [check.measured for check in shown(name).checks if check.what == what]
    return found


# ---- every statement ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_statement_holds(name):
    left = [what for what in failures(shown(name)) if not (name in QUICK and any(word in what for word in LEARNT))]
    assert left == []
    assert len(shown(name).checks) > 1
    assert shown(name).caption.endswith(".")


def test_sections_and_errata_are_all_there():
    sections, errata = set(), set()
    for script in SCRIPTS.values():
        bounds = [list(map(int, part.split("–"))) for part in script.STATEMENT.section.split(", ")]
        sections |= {n for low, *high in bounds for n in range(low, (high or [low])[0] + 1)}
        errata |= {n for n, _ in script.STATEMENT.errata}
    assert sections == set(range(2, 16))
    assert errata == set(range(1, 9))


def test_scripts_of_the_folder_are_all_in_the_list():
    folder = statement.ROOT / "experiments" / "lecture"
    assert sorted(SCRIPTS) == sorted(path.stem for path in folder.glob("s[0-9]*.py"))
    assert all(script.STATEMENT.name == name for name, script in SCRIPTS.items())


def test_every_op_is_differentiated_by_every_input():
    exported = {
        name
        for name, value in vars(jaxcnn).items()
        if inspect.isfunction(value) and value.__module__.startswith("jaxcnn.ops.")
    }
    assert exported <= set(SCRIPTS["s04_differences"].ops())


# ---- the lecture's own numbers ----


def test_the_kronecker_numbers_of_section_7_and_8():
    a, b = jnp.array([[1.0, 2], [3, 4]]), jnp.array([[4.0, 5], [6, 7]])
    printed = [[4, 8, 5, 10], [12, 16, 15, 20], [6, 12, 7, 14], [18, 24, 21, 28]]
    np.testing.assert_array_equal(jaxcnn.kron(b, a), printed)
    assert measured("s07_kronecker", "§7, as printed: kron(B, A)") == str(printed)
    assert measured("s07_kronecker", "§8: kron_up(x, 2)") == "[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]"


def test_24_becomes_12_becomes_24():
    sizes = [check.measured for check in shown("s06_sizes").checks]
    assert sizes[:6] == ["28×28", "24×24", "12×12", "8×8", "12×12", "24×24"]
    assert "(12, 12), (24, 24)" in sizes[6]
    assert sizes[7:9] == ["24×24", "24×24"]


def test_the_peak_is_higher_than_the_hill():
    image, patch = SCRIPTS["s13_triangles"].IMAGE, SCRIPTS["s13_triangles"].PATCH
    hill, peak = np.correlate(image, patch, "full").max(), np.convolve(image, patch).max()
    assert float(measured("s13_triangles", "peak over hill, triangles less their means")) > 2
    np.testing.assert_allclose(float(measured("s13_triangles", "peak over hill")), peak / hill, rtol=1e-3)


def test_the_sums_of_5_6_7_8_and_1_2_3_4():
    assert measured("s11_flip", "not flipped: correlate(5 6 7 8, 1 2 3 4)") == "[20, 39, 56, 70, 44, 23, 8]"
    assert measured("s11_flip", "flipped: convolve(5 6 7 8, 1 2 3 4)") == "[5, 16, 34, 60, 61, 52, 32]"


# ---- a wrong rule, op or name is noticed ----


def passes_all(call, delta):
    """As rule= of an activation: g' forgotten."""
    return (delta,)


def halved(call, delta):
    return tuple(cotangent / 2 for cotangent in call.exact(delta))


def unturned(call, delta):
    """As rule= of conv: the flip left out."""
    x, w, _ = call.inputs
    _, grad_w, grad_b = call.exact(delta)
    _, pull = jax.vjp(lambda x: jaxcnn.conv(x, w[::-1, ::-1], padding=call.geometry.window.padding), x)
    return (*pull(delta), grad_w, grad_b)


def tiled(x, factor):
    """In the place of up: the picture repeated as a whole."""
    return jnp.tile(x, (1, factor, factor, 1))


def exact(call, delta):
    return call.exact(delta)


def conv_alone(rule):
    op, inputs = SCRIPTS["s04_differences"].ops()["conv"]
    return {"conv": (functools.partial(op, rule=rule), inputs)}


PLANTED = {
    "s02_network": [{"hidden_layer": functools.partial(jaxcnn.hidden_layer, rule=halved), **QUICK["s02_network"]}],
    "s02_order": [{"max_pool": jaxcnn.avg_pool}],
    "s03_sigmoid": [{"sigmoid": functools.partial(jaxcnn.sigmoid, rule=passes_all), **QUICK["s03_sigmoid"]}],
    "s04_differences": [{"table": "unturned"}, {"table": "halved"}],
    "s06_relu": [{"relu": functools.partial(jaxcnn.relu, rule=passes_all)}],
    "s06_sizes": [{"kron_up": tiled}],
    "s07_kronecker": [
        {"kron": lambda a, b: jaxcnn.kron(b, a)},
        {"kron": functools.partial(jaxcnn.kron, rule=halved)},
        {"kron_up": functools.partial(jaxcnn.kron_up, rule=halved)},
        {"kron_up": tiled},
    ],
    "s09_delta": [{"hidden_layer": functools.partial(jaxcnn.hidden_layer, rule=halved)}],
    "s09_literal_up": [{"rule": exact, **QUICK["s09_literal_up"]}],
    "s10_same_step": [{"conv": functools.partial(jaxcnn.conv, rule=unturned), **QUICK["s10_same_step"]}],
    "s11_flip": [{"correlate": signal.convolve}, {"convolve": signal.correlate}],
    "s13_triangles": [{"convolve": signal.correlate}, {"correlate": signal.convolve}],
    "s14_matching": [{"match_template": lambda image, template: signal.correlate(image, template, "valid")}],
    "s14_autocorrelation": [{"autocorrelate": lambda a: signal.convolve(a, a)}],
    "s15_turned": [{"right": SCRIPTS["s15_turned"].unturned}, {"wrong": SCRIPTS["s15_turned"].turned}],
}


def test_every_script_has_an_error_planted():
    assert list(PLANTED) == list(SCRIPTS)


@pytest.mark.parametrize(("name", "planted"), [(name, planted) for name, row in PLANTED.items() for planted in row])
def test_a_planted_error_is_noticed(name, planted):
    if name == "s04_differences":
        planted = {"table": conv_alone({"unturned": unturned, "halved": halved}[planted["table"]])}
    found = failures(SCRIPTS[name].show(**planted))
    assert set(found) - set(failures(shown(name)))


# ---- the command line ----


def test_a_script_tells_its_verdict_and_saves_its_picture(tmp_path, capsys):
    script = SCRIPTS["s11_flip"]
    assert statement.main(script.STATEMENT, script.show, ["--out", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert "§11–12  Convolution, correlation, and the flip" in text
    assert "verdict: holds (5 checks)" in text
    assert (tmp_path / "new" / "s11_flip.png").read_bytes().startswith(b"\x89PNG")


def test_a_statement_that_does_not_hold_ends_with_status_1(tmp_path, capsys):
    script = SCRIPTS["s11_flip"]
    wrong = functools.partial(script.show, correlate=signal.convolve)
    assert statement.main(script.STATEMENT, wrong, ["--out", str(tmp_path)]) == 1
    assert re.search(r"NO  not flipped: .*\n(.*\n)*.*does not hold \(\d of 5 checks failed\)", capsys.readouterr().out)


def test_a_place_that_is_a_file_is_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert everything.main(["--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.endswith("file: expected a folder or nothing, got a file\n")


def test_all_of_them_and_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(everything, "SCRIPTS", ("s11_flip", "s13_triangles"))
    assert everything.main(["--out", str(tmp_path)]) == 0
    assert "2 of 2 statements hold" in capsys.readouterr().out
    assert "2 of 2 statements hold" in (tmp_path / "lecture.html").read_text("utf-8")
    wrong = functools.partial(SCRIPTS["s13_triangles"].show, convolve=signal.correlate)
    monkeypatch.setattr(SCRIPTS["s13_triangles"], "show", wrong)
    assert everything.main(["--out", str(tmp_path)]) == 1
    assert "these do not: §13 s13_triangles" in capsys.readouterr().out


# ---- checks and the page ----


def test_checks_can_fail_and_nan_never_holds():
    assert statement.at_most("", 1.0, 1.0).holds
    assert not statement.at_most("", 1.1, 1.0).holds
    assert not statement.at_most("", np.nan, 1.0).holds
    assert statement.at_least("", jnp.array(2.0), 1.0).holds
    assert not statement.at_least("", np.nan, 1.0).holds
    assert statement.equal("", (2, 3), (2, 3)).holds
    assert not statement.equal("", (2, 3), (2, 3, 4)).holds
    assert not statement.equal("", np.zeros((2, 2)), np.zeros(2)).holds
    assert statement.refused("", lambda: jnp.zeros(2) + jnp.zeros(3)).holds
    assert not statement.refused("", lambda: jnp.zeros(2) + jnp.zeros(2)).holds


def test_relative_distance():
    assert statement.relative([3.0, 4.0], [3.0, 4.0]) == 0
    assert statement.relative(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == 0.2
    assert statement.relative(np.ones(2), np.zeros(2)) == np.inf
    assert np.isnan(statement.relative(np.array([np.nan]), np.ones(1)))


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.ids = [], set()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.targets += [attrs[name] for name in ("src", "href") if name in attrs]
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        assert tag not in ("script", "link", "iframe", "object")


def test_the_page_needs_nothing_else_and_its_links_lead_somewhere(tmp_path):
    out = tmp_path / "runs"
    out.mkdir()
    told = [(script.STATEMENT, shown(name)) for name, script in SCRIPTS.items()]
    for made, result in told:
        result.figure.savefig(statement.picture_path(made, out), format="png", dpi=20)
    page.write(out / "lecture.html", told, {"jax": "1"})
    text = (out / "lecture.html").read_text("utf-8")
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "@import" not in text
    links = Links()
    links.feed(text)
    assert links.ids >= set(SCRIPTS)
    for target in links.targets:
        if target.startswith("#"):
            assert target[1:] in links.ids
        elif not target.startswith("data:image/png;base64,"):
            assert (out / urllib.parse.unquote(target)).resolve().is_file(), target


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_named_by_a_statement_exist(name):
    for where in SCRIPTS[name].STATEMENT.functions:
        path, function = where.split(": ")
        assert (statement.ROOT / path).is_file()
        assert hasattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function)
