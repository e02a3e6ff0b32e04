"""The figures match the output of docs/figures.py, and docs/api.md lists all public names of jaxcnn."""

import importlib
import inspect
import re
import runpy
import types
from pathlib import Path

import jax
import pytest

import jaxcnn

DOCS = Path(__file__).parents[2] / "docs"


def test_figures_are_up_to_date(tmp_path):
    with jax.enable_x64(False):
        runpy.run_path(str(DOCS / "figures.py"))["main"](tmp_path)
    drawn = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    saved = {file.name: file.read_text(encoding="utf-8") for file in (DOCS / "figures").iterdir()}
    assert drawn == saved, "run: python docs/figures.py"


LINKS = [
    ("jaxcnn.conv", "../jaxcnn/ops/convolution.py", ("py", "jaxcnn.conv")),
    ("jaxcnn.ops.convolution.input_grad", "../jaxcnn/ops/convolution.py", ("py", "jaxcnn.ops.convolution.input_grad")),
    ("test_convolution", "../tests/test_lecture.py", ("source/tests/test_lecture.html", "def test_convolution")),
    ("lecture.s11_flip", "../experiments/lecture/s11_flip.py", ("source/experiments/lecture/s11_flip.html", None)),
]


@pytest.mark.parametrize(("name", "target", "expected"), LINKS)
def test_a_link_to_a_source_file_opens_a_page(name, target, expected):
    """Without this, Sphinx would make it a download."""
    pytest.importorskip("sphinx")
    from docutils import nodes
    from docutils.utils import new_document
    from sphinx import addnodes

    conf = runpy.run_path(str(DOCS / "conf.py"))
    document = new_document("x")
    document += addnodes.download_reference("", "", nodes.literal("", name), reftarget=target)
    builder = types.SimpleNamespace(get_relative_uri=lambda page, to: f"{to}.html")
    conf["open_sources"](types.SimpleNamespace(env=types.SimpleNamespace(docname="page"), builder=builder), document)
    (link,) = document.children
    assert link.astext().replace("\u200b", "") == name
    if isinstance(link, addnodes.pending_xref):
        assert (link["refdomain"], link["reftarget"]) == expected
    else:
        page, _, line = link["refuri"].partition("#line-")
        text = (DOCS / target).read_text("utf-8").splitlines()[int(line) - 1]
        assert page == expected[0]
        assert text.startswith(expected[1]) if expected[1] else line == "1"
        assert list(conf["SOURCES"]) == [page.removesuffix(".html")]


def test_long_names_may_break_between_words_only():
    pytest.importorskip("sphinx")
    from docutils import nodes

    link = nodes.literal("", "jaxcnn.ops.kron_up")
    runpy.run_path(str(DOCS / "conf.py"))["break_at_words"](link)
    assert link.astext().split("\u200b") == ["jaxcnn.", "ops.", "kron_", "up"]


def test_the_index_leads_to_every_page():
    text = (DOCS / "index.md").read_text("utf-8")
    pages = [page.stem for page in DOCS.glob("*.md") if page.stem != "index"]
    assert sorted(re.findall(r"^\| \[.*\]\((.*)\.md\) \|", text, re.MULTILINE)) == sorted(pages)
    assert sorted(re.search(r":hidden:\n\n([a-z\n-]+)```", text)[1].split()) == sorted(pages)


def test_the_reference_has_every_public_name_once_and_no_other():
    module, listed = "", []
    for directive, argument in re.findall(
        r"^\.\. (\w+):: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE
    ):
        if directive in ("currentmodule", "automodule"):
            module = argument
            assert importlib.import_module(module).__doc__
        else:
            documented = getattr(importlib.import_module(module), argument)
            assert documented.__doc__, f"{module}.{argument}"
            listed.append(f"{module}.{argument}")
    assert len(listed) == len(set(listed))
    public = {name for name, value in vars(jaxcnn).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert {name.removeprefix("jaxcnn.") for name in listed if name.count(".") == 1} == public
