"""How Sphinx builds these pages: sphinx-build -W -b html docs docs/_build."""

import dataclasses
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes

import jaxcnn

DOCS = Path(__file__).parent

project = "jaxcnn"
author = "the jaxcnn authors"
release = importlib.metadata.version("jaxcnn")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "jaxcnn"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["pages.css"]

# In docstrings, `name` is a link if the name is documented, and code otherwise.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and dtypes
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

myst_heading_anchors = 3


def setup(app: Any) -> None:
    """Connect the handlers below; Sphinx calls this function."""
    app.connect("doctree-read", open_sources, priority=400)  # before Sphinx copies linked files to _downloads
    app.connect("html-collect-pages", source_pages)
    app.connect("autodoc-process-docstring", keep_formulas, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", name_defaults)


SOURCES: dict[str, Path] = {}
"""Source files that the pages link to, by page name, such as source/tests/test_lecture."""


def open_sources(app: Any, doctree: nodes.document) -> None:
    """Make a link to a Python file open a page; Sphinx would make it a download.

    The link of a documented name, such as `jaxcnn.conv`, opens the reference. Any other link opens a page with the
    source of the file, at the line that defines the name.
    """
    public = {f"jaxcnn.{name}" for name in vars(jaxcnn)}
    for link in list(doctree.findall(addnodes.download_reference)):
        name, target = link.astext(), link["reftarget"]
        file = (DOCS / target).resolve()
        if file.suffix != ".py":
            continue
        break_at_words(link)
        if name in public or name.startswith("jaxcnn.ops."):
            reference = addnodes.pending_xref(
                "",
                *link.children,
                refdomain="py",
                reftype="obj",
                reftarget=name,
                refdoc=app.env.docname,
                refexplicit=True,
            )
        else:
            page = f"source/{file.relative_to(DOCS.parent).with_suffix('').as_posix()}"
            SOURCES[page] = file
            lines = file.read_text("utf-8").splitlines()
            defined = re.compile(rf"(def|class) {re.escape(name)}\b")
            line = next((n for n, text in enumerate(lines, 1) if defined.match(text)), 1)
            uri = app.builder.get_relative_uri(app.env.docname, page)
            reference = nodes.reference("", "", *link.children, refuri=f"{uri}#line-{line}", internal=True)
        link.replace_self(reference)


def break_at_words(link: nodes.Node) -> None:
    """Allow line breaks in a long name only after its underscores and dots."""
    for text in list(link.findall(nodes.Text)):
        text.parent.replace(text, nodes.Text(re.sub(r"(?<=[._])(?=\w)", "\u200b", text)))


def source_pages(app: Any) -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield a page for each file in SOURCES."""
    for page, file in sorted(SOURCES.items()):
        code = app.builder.highlighter.highlight_block(
            file.read_text("utf-8"), "python", lineanchors="line", linespans=None
        )
        title = file.relative_to(DOCS.parent).as_posix()
        yield page, {"title": title, "body": f"<h1>{title}</h1>{code}"}, "page.html"


def keep_formulas(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Mark indented formulas in docstrings as literal blocks; Sphinx would make them quotations.

    A formula is an indented block after a blank line. The blocks that napoleon reads have no blank line before them.
    """
    result: list[str] = []
    for line in lines:
        if line.startswith("    ") and result and not result[-1]:
            last = next((k for k in reversed(result) if k), "")
            if last and not last.startswith((" ", ">>>", "- ")) and not last.endswith("::"):
                result += ["::", ""]
        result.append(line)
    # In the first line of an attribute, napoleon would read the text before a colon as its type; ".." is a comment.
    lines[:] = ["..", "", *result] if what in ("attribute", "property") else result


def name_defaults(
    app: Any, what: str, name: str, obj: Any, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """In the signature of a dataclass, show a default that is a function by its name: init_weight=he_normal."""
    if what != "class" or not signature or not dataclasses.is_dataclass(obj):
        return signature, returns
    names = {id(value): key for key, value in vars(sys.modules[obj.__module__]).items()}
    for field in dataclasses.fields(obj):
        if callable(field.default):
            signature = re.sub(rf"\b{field.name}=<.*?>(?=[,)])", f"{field.name}={names[id(field.default)]}", signature)
    return signature, returns
