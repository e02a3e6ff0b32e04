"""How Sphinx builds these pages: sphinx-build -W -b html docs docs/_build."""

import importlib.metadata
import inspect

project = "jaxcnn"
author = "the jaxcnn authors"
release = importlib.metadata.version("jaxcnn")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = "jaxcnn"
html_show_copyright = False

# Docstrings: `name` is a link where the name is documented, and code everywhere else.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures as the source has them; the docstrings say shapes and dtypes
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

myst_heading_anchors = 3
