"""The lecture's scripts: every statement holds, wrong rules are detected, and the page is self-contained.

Most tests in this file use one run of `python -m experiments.lecture`. A script trains each net once per process, so a
planted error causes no second training.
"""

import base64
import contextlib
import functools
import html
import html.parser
import importlib
import inspect
import io
import itertools
import re
import types
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
STATEMENTS = [script.STATEMENT for script in SCRIPTS.values()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run all scripts, and return status, printed text, the page's folder and text, and each script's result."""
    out, found = tmp_path_factory.mktemp("lecture") / "runs", {}

    def record(made, show, folder):
        found[made.name] = statement.run(made, show, folder)
        return found[made.name]

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(everything, "run", record)
        status = everything.main(["--out", str(out)])
    text = (out / "lecture.html").read_text("utf-8")
    return types.SimpleNamespace(status=status, printed=printed.getvalue(), out=out, page=text, found=found)


def show(name, **planted):
    with jax.enable_x64(True):  # as in `statement.run`
        return SCRIPTS[name].show(**planted)


def failures(result):
    return [check.what for check in result.checks if not check.holds]


@pytest.fixture
def measured(whole):
    """Return a function that gives the value measured by a script's check."""

    def find(name, what):
        (found,) = [check.measured for check in whole.found[name].checks if check.what == what]
        return found

    return find


# ---- every statement ----


def test_all_statements_hold(whole):
    assert whole.status == 0
    assert list(whole.found) == list(SCRIPTS)
    assert f"{len(SCRIPTS)} of {len(SCRIPTS)} statements hold" in whole.printed
    assert whole.printed.count("  verdict: holds (") == len(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_statement_holds(name, whole):
    result = whole.found[name]
    assert failures(result) == []
    assert len(result.checks) > 1
    assert result.caption.endswith(".")
    assert statement.report(SCRIPTS[name].STATEMENT, result) in whole.printed
    assert (whole.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_check_states_the_required_value(whole):
    """A check states the required value itself, whether it holds or not."""
    for shown in whole.found.values():
        for check in shown.checks:
            assert check.required == "an error" or re.match(r"[=≤≥] \S", check.required), check
    assert "as expected" not in whole.page
    assert statement.equal("size", (24, 24), (24, 24)).required == "= 24×24"
    assert statement.equal("size", (24, 23), (24, 24)).required == "= 24×24"


def test_every_op_has_a_readable_row(whole):
    """At full page width, no label is smaller than the other labels of the figure, in points."""
    figure = whole.found["s04_differences"].figure
    table = SCRIPTS["s04_differences"]
    axes = max(figure.axes, key=lambda axes: len(axes.get_yticklabels()))
    labels = axes.get_yticklabels()
    with jax.enable_x64(True):
        ops = table.ops()
    assert len(labels) == len(ops)
    assert [text.get_text().split(": ")[1].split(", ") for text in labels] == [list(given) for _, given in ops.values()]
    assert min(text.get_fontsize() for text in labels) >= 8.5
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in labels]
    assert not any(one.overlaps(two) for one, two in itertools.pairwise(boxes))


def test_no_sum_of_the_flip_is_emphasized(whole):
    """The row entirely inside has a frame and a label, and its number looks like all others."""
    for axes in whole.found["s11_flip"].figure.axes:
        sums = [text for text in axes.texts if text.get_text().isdigit() and text.get_position()[0] > 8]
        assert len(sums) == 7
        assert len({(text.get_fontweight(), text.get_fontsize(), text.get_color()) for text in sums}) == 1
        assert [text.get_text() for text in axes.texts].count("entirely\ninside") == 1


def sections(made):
    """Return the section numbers, {4, 5} for "4–5"."""
    low, *high = map(int, made.section.split("–"))
    return set(range(low, (high or [low])[0] + 1))


def test_sections_are_in_the_lectures_order():
    assert [min(sections(made)) for made in STATEMENTS] == sorted(min(sections(made)) for made in STATEMENTS)
    assert [max(sections(made)) for made in STATEMENTS] == sorted(max(sections(made)) for made in STATEMENTS)


def test_sections_and_errata_are_all_there():
    assert set().union(*map(sections, STATEMENTS)) == set(range(2, 16))
    assert {n for made in STATEMENTS for n, _ in made.errata} == set(range(1, 9))


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
    with jax.enable_x64(True):
        assert exported <= set(SCRIPTS["s04_differences"].ops())


# ---- the lecture's own numbers ----


def test_the_kronecker_numbers_of_section_7_and_8(measured):
    a, b = jnp.array([[1.0, 2], [3, 4]]), jnp.array([[4.0, 5], [6, 7]])
    printed = [[4, 8, 5, 10], [12, 16, 15, 20], [6, 12, 7, 14], [18, 24, 21, 28]]
    np.testing.assert_array_equal(jaxcnn.kron(b, a), printed)
    assert measured("s07_kronecker", "§7, as printed: kron(B, A)") == str(printed)
    assert measured("s07_kronecker", "§8: kron_up(x, 2)") == "[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]"


def test_24_becomes_12_becomes_24(whole):
    sizes = [check.measured for check in whole.found["s06_sizes"].checks]
    assert sizes[:6] == ["28×28", "24×24", "12×12", "8×8", "12×12", "24×24"]
    assert "(12, 12), (24, 24)" in sizes[6]
    assert sizes[7:9] == ["24×24", "24×24"]


def test_the_peak_of_the_triangles_is_higher_than_the_hill(measured):
    image, kernel = SCRIPTS["s13_triangles"].IMAGE, SCRIPTS["s13_triangles"].KERNEL
    hill, peak = np.correlate(image, kernel, "full").max(), np.convolve(image, kernel).max()
    assert float(measured("s13_triangles", "peak / hill with the means subtracted")) > 2
    np.testing.assert_allclose(float(measured("s13_triangles", "peak / hill")), peak / hill, rtol=1e-3)


def test_the_sums_of_5_6_7_8_and_1_2_3_4(measured):
    assert measured("s11_flip", "not flipped: correlate(5 6 7 8, 1 2 3 4)") == "[20, 39, 56, 70, 44, 23, 8]"
    assert measured("s11_flip", "flipped: convolve(5 6 7 8, 1 2 3 4)") == "[5, 16, 34, 60, 61, 52, 32]"


# ---- a wrong rule, op or name is detected ----


def passes_all(call, delta):
    """A rule= of an activation without g'."""
    return (delta,)


def halved(call, delta):
    return tuple(cotangent / 2 for cotangent in call.exact(delta))


def unflipped(call, delta):
    """A rule= of conv without the flip."""
    x, w, _ = call.inputs
    _, grad_w, grad_b = call.exact(delta)
    _, pull = jax.vjp(lambda x: jaxcnn.conv(x, w[::-1, ::-1], padding=call.static.window.padding), x)
    return (*pull(delta), grad_w, grad_b)


def tiled(x, factor):
    """A wrong `up` that repeats the whole image."""
    return jnp.tile(x, (1, factor, factor, 1))


def exact(call, delta):
    return call.exact(delta)


def conv_alone(rule):
    op, inputs = SCRIPTS["s04_differences"].ops()["conv"]
    return {"conv": (functools.partial(op, rule=rule), inputs)}


PLANTED = {
    "s02_network": [{"hidden_layer": functools.partial(jaxcnn.hidden_layer, rule=halved)}],
    "s02_order": [{"max_pool": jaxcnn.avg_pool}],
    "s03_sigmoid": [{"sigmoid": functools.partial(jaxcnn.sigmoid, rule=passes_all)}],
    "s04_differences": [{"table": unflipped}, {"table": halved}],
    "s06_relu": [{"relu": functools.partial(jaxcnn.relu, rule=passes_all)}],
    "s06_sizes": [{"kron_up": tiled}],
    "s07_kronecker": [
        {"kron": lambda a, b: jaxcnn.kron(b, a)},
        {"kron": functools.partial(jaxcnn.kron, rule=halved)},
        {"kron_up": functools.partial(jaxcnn.kron_up, rule=halved)},
        {"kron_up": tiled},
    ],
    "s09_delta": [{"hidden_layer": functools.partial(jaxcnn.hidden_layer, rule=halved)}],
    "s09_literal_up": [{"rule": exact}],
    "s10_same_step": [{"conv": functools.partial(jaxcnn.conv, rule=unflipped)}],
    "s11_flip": [{"correlate": signal.convolve}, {"convolve": signal.correlate}],
    "s13_triangles": [{"convolve": signal.correlate}, {"correlate": signal.convolve}],
    "s14_matching": [{"match_template": lambda image, template: signal.correlate(image, template, "valid")}],
    "s14_autocorrelation": [{"autocorrelate": lambda a: signal.convolve(a, a)}],
    "s15_flipped": [{"right": SCRIPTS["s15_flipped"].unflipped}, {"wrong": SCRIPTS["s15_flipped"].flipped}],
}


#: Scripts that train nets.
TRAINING = ("s02_network", "s03_sigmoid", "s09_literal_up", "s10_same_step")


def test_every_script_has_an_error_planted():
    assert list(PLANTED) == list(SCRIPTS)


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        pytest.param(name, planted, marks=[pytest.mark.slow("trains")] if name in TRAINING else [])
        for name, row in PLANTED.items()
        for planted in row
    ],
)
def test_a_planted_error_is_detected(name, planted):
    if name == "s04_differences":
        with jax.enable_x64(True):
            planted = {"table": conv_alone(planted["table"])}
    assert failures(show(name, **planted))


# ---- the command line ----


def test_a_script_prints_its_verdict_and_saves_its_figure(tmp_path, capsys):
    script = SCRIPTS["s11_flip"]
    assert statement.main(script.STATEMENT, script.show, ["--out", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert "§11–12  Convolution, correlation, and the flip; auto-correlation" in text
    assert "verdict: holds (6 checks)" in text
    assert (tmp_path / "new" / "s11_flip.png").read_bytes().startswith(b"\x89PNG")


def test_a_statement_that_does_not_hold_ends_with_status_1(tmp_path, capsys):
    script = SCRIPTS["s11_flip"]
    wrong = functools.partial(script.show, correlate=signal.convolve)
    assert statement.main(script.STATEMENT, wrong, ["--out", str(tmp_path)]) == 1
    assert re.search(r"NO  not flipped: .*\n(.*\n)*.*does not hold \(\d of 6 checks failed\)", capsys.readouterr().out)


def test_out_that_is_a_file_is_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert everything.main(["--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.endswith("file: must be a folder, got a file\n")


def test_one_that_does_not_hold_fails_the_run_and_is_marked_on_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(everything, "SCRIPTS", ("s11_flip", "s13_triangles"))
    wrong = functools.partial(SCRIPTS["s13_triangles"].show, convolve=signal.correlate)
    monkeypatch.setattr(SCRIPTS["s13_triangles"], "show", wrong)
    assert everything.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 statements hold" in printed
    assert "these do not: §13 s13_triangles" in printed
    text = (tmp_path / "lecture.html").read_text("utf-8")
    assert '<span class="fails">1 of 2 statements hold.</span>' in text
    flip, triangles = re.findall(r"<section id=\"s.*?</section>", text, re.DOTALL)
    assert 'class="fails"' not in flip
    assert 'Verdict: <span class="fails">does not hold' in triangles


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
    assert statement.raises("", lambda: jnp.zeros(2) + jnp.zeros(3)).holds
    assert not statement.raises("", lambda: jnp.zeros(2) + jnp.zeros(2)).holds


def test_relative_distance():
    assert statement.relative([3.0, 4.0], [3.0, 4.0]) == 0
    assert statement.relative(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == 0.2
    assert statement.relative(np.ones(2), np.zeros(2)) == np.inf
    assert np.isnan(statement.relative(np.array([np.nan]), np.ones(1)))


class Tags(html.parser.HTMLParser):
    """All tags of a page: their nesting, their links, and what they load."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.used, self.ids, self.links, self.sources = [], set(), [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.used.add(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.sources += [value for name, value in attrs.items() if name in ("src", "srcset", "data", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def section_of(whole, made):
    """Return the part of the page for a statement."""
    (found,) = re.findall(rf'<section id="{made.name}">(.*?)</section>', whole.page, re.DOTALL)
    return found


def test_the_page_loads_nothing(whole):
    tags = Tags(whole.page)
    assert tags.open == []
    assert not tags.used & {"script", "link", "iframe", "object", "embed", "audio", "video", "base"}
    assert len(tags.sources) == len(SCRIPTS)
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    written = re.sub(r"base64,[^\"]*", "", whole.page)
    assert not re.search(r"https?:|//|@import|url\(", written)


def test_the_links_of_the_page_have_targets(whole):
    tags = Tags(whole.page)
    assert len(tags.ids) == len(set(tags.ids))
    for target in tags.links:
        if target.startswith("#"):
            assert target[1:] in tags.ids
        else:
            assert (whole.out / urllib.parse.unquote(target)).resolve().is_file(), target


def test_the_page_has_every_statement_in_the_lectures_order(whole):
    tags = Tags(whole.page)
    assert [name for name in tags.ids if name in SCRIPTS] == list(SCRIPTS)
    assert [link[1:] for link in tags.links if link[1:] in SCRIPTS] == list(SCRIPTS)
    assert f'<span class="holds">{len(SCRIPTS)} of {len(SCRIPTS)} statements hold.</span>' in whole.page
    assert 'class="fails"' not in whole.page


@pytest.mark.parametrize("made", STATEMENTS, ids=lambda made: made.name)
def test_the_page_shows_all_of_a_statement(made, whole):
    shown, found = whole.found[made.name], section_of(whole, made)
    image = base64.b64encode((whole.out / f"{made.name}.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{image}"' in found
    assert f'Verdict: <span class="holds">holds ({len(shown.checks)} checks)</span>' in found
    for words in (f"§{made.section}", made.title, made.claim, *made.formula.split(",  ")):
        assert words in found
    for words in (shown.caption, made.korean, made.korean_title, *(check.measured for check in shown.checks)):
        assert html.escape(words) in found
    assert [int(n) for n in re.findall(r'<p class="erratum"><b>Erratum (\d)\.</b>', found)] == [
        n for n, _ in made.errata
    ]


def test_errata_are_marked_in_the_contents(whole):
    (contents,) = re.findall(r"<nav.*?</nav>", whole.page, re.DOTALL)
    for made, line in zip(STATEMENTS, re.findall(r"<li>(.*?)</li>", contents), strict=True):
        marked = re.findall(r'<span class="badge">errat(?:um|a) (.*?)</span>', line)
        assert marked == ([", ".join(str(n) for n, _ in made.errata)] if made.errata else [])


def test_korean_is_only_in_the_korean_fields():
    hangul = re.compile("[가-힣]")
    for made in STATEMENTS:
        assert hangul.search(made.korean)
        assert hangul.search(made.korean_title)
        assert not hangul.search(made.title + made.claim + made.formula + "".join(text for _, text in made.errata))


def test_the_terms_are_korean_and_english(whole):
    (terms,) = re.findall(r'<section id="terms">(.*?)</section>', whole.page, re.DOTALL)
    for english, korean in page.TERMS:
        assert f'<dt>{english}</dt><dd lang="ko">{korean}</dd>' in terms
    words = {english.split(" (")[0] for english, _ in page.TERMS}
    assert words >= {
        "back propagation",
        "convolution",
        "correlation",
        "Kronecker product",
        "pooling",
        "patch",
        "weight",
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_named_by_a_statement_exist(name):
    for where in SCRIPTS[name].STATEMENT.functions:
        path, function = where.split(": ")
        assert (statement.ROOT / path).is_file()
        assert hasattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function)
