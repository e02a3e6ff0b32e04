"""The tutorial runs as a script with a few training steps, and its printed claims hold."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow("trains")
def test_runs_as_a_script_from_any_folder(tmp_path):
    environment = {**os.environ, "JAXCNN_TUTORIAL_STEPS": "20", "PYTHONPATH": str(ROOT), "MPLBACKEND": ""}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.tutorial"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr

    figures = sorted((tmp_path / "runs" / "tutorial").iterdir())
    assert [figure.name for figure in figures] == ["hidden-layer.png", "maps.png"]
    assert all(figure.read_bytes().startswith(PNG) for figure in figures)

    for text in ("24) result", "δ_l by hand (24, 24)", "∂E/∂w by hand (5, 5)", "after 20 steps", "guided"):
        assert text in done.stdout
    cosines = [float(c) for c in re.findall(r"cosine with the true δ_l (-?[\d.]+)", done.stdout)]
    assert len(cosines) == 2
    assert max(cosines) < 0.9


def test_is_a_notebook_without_magics():
    text = (ROOT / "experiments" / "tutorial.py").read_text(encoding="utf-8")
    cells = re.split(r"^# %%", text, flags=re.MULTILINE)
    assert sum(cell.startswith(" [markdown]") for cell in cells) >= 6
    assert "get_ipython" not in text
    for cell in cells[1:]:
        if cell.startswith(" [markdown]"):
            assert all(line.startswith("#") or not line for line in cell.splitlines()[1:])
