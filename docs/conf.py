"""How Sphinx builds these pages: sphinx-build -W -b html docs docs/_build."""

import dataclasses
import importlib.metadata
import re
import sys
from typing import Any

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

# Docstrings: `name` is a link where that name is documented, and code everywhere else.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and dtypes
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

myst_heading_anchors = 3


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", keep_formulas, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", name_defaults)


def keep_formulas(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Mark indented formulas in docstrings as such, which for Sphinx would be quotations.

    An indented block after a blank line is one; what napoleon reads ("Args:") has no blank line before it.
    """
    kept: list[str] = []
    for line in lines:
        if line.startswith("    ") and kept and not kept[-1]:
            last = next((k for k in reversed(kept) if k), "")
            if last and not last.startswith((" ", ">>>", "- ")) and not last.endswith("::"):
                kept += ["::", ""]
        kept.append(line)
    # Of an attribute, napoleon would take what stands before a colon in the first line for its type; ".." is a comment.
    lines[:] = ["..", "", *kept] if what in ("attribute", "property") else kept


def name_defaults(
    app: Any, what: str, name: str, obj: Any, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """In the signature of a dataclass, write a default that is a function by its name: init_w=he_normal."""
    if what != "class" or not signature or not dataclasses.is_dataclass(obj):
        return signature, returns
    names = {id(value): key for key, value in vars(sys.modules[obj.__module__]).items()}
    for field in dataclasses.fields(obj):
        if callable(field.default):
            signature = re.sub(rf"\b{field.name}=<.*?>(?=[,)])", f"{field.name}={names[id(field.default)]}", signature)
    return signature, returns
