"""The figures are what docs/figures.py draws now, and docs/api.md names everything that jaxcnn offers."""

import importlib
import inspect
import re
import runpy
from pathlib import Path

import jax

import jaxcnn

DOCS = Path(__file__).parents[2] / "docs"


def test_figures_are_up_to_date(tmp_path):
    with jax.enable_x64(False):
        runpy.run_path(str(DOCS / "figures.py"))["main"](tmp_path)
    drawn = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    kept = {file.name: file.read_text(encoding="utf-8") for file in (DOCS / "figures").iterdir()}
    assert drawn == kept, "run: python docs/figures.py"


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
