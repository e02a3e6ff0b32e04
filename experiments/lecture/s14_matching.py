"""§14: correlation finds a template in an image."""

import math
import sys
from typing import Any

import numpy as np

from experiments.lecture.drawing import RED, figure, grey, signed
from experiments.lecture.numerical import portrait
from experiments.lecture.statement import Shown, Statement, at_least, at_most, equal, main, relative
from jaxcnn.ops import signal

STATEMENT = Statement(
    name="s14_matching",
    section="14",
    title="Template matching",
    korean_title="템플릿 매칭",
    korean="correlation은 주로 템플릿매칭이나 유사도를 체크할때 많이 사용된다 … 일치율을 체크할때 correlation이 "
    "적합하다",
    claim="Correlation tells where a picture looks like a template, if brightness and contrast of each place are taken "
    "out of it; then it is 1 at the template itself, and high at what looks like it.",
    formula="y[o] = Σ<sub>k</sub> (x[o + k] − m[o])·t[k] / √(s[o]·T),  where m[o] is the mean of the window at o, t "
    "the template less its mean, s[o] = Σ<sub>k</sub> (x[o + k] − m[o])², T = Σ<sub>k</sub> t[k]²",
    functions=("jaxcnn/ops/signal.py: match_template", "jaxcnn/ops/signal.py: correlate"),
    test="tests/ops/test_signal.py",
)

AT, SIZE = (44, 0), (52, 42)
"""Where a star of the flag stands, and how large it is."""
LEAST = 0.75
"""From this height on a place counts as found."""
FLAG = (320, 140)
"""The part of the picture, from its upper left corner, in which all the stars are."""


def show(match_template: Any = signal.match_template) -> Shown:
    """Find the positions similar to a star, first in an image, then in a darker one with less contrast."""
    picture = portrait()
    template = picture[AT[0] : AT[0] + SIZE[0], AT[1] : AT[1] + SIZE[1]]
    y = np.asarray(match_template(picture, template))
    found = peaks(y, LEAST)
    flatter = match_template(0.3 * picture + 0.5, template)
    plain_sums = np.asarray(signal.correlate(picture, template, "valid"))
    best_sum = tuple(int(i) for i in np.unravel_index(plain_sums.argmax(), plain_sums.shape))
    in_flag = [p[0] < FLAG[0] and p[1] < FLAG[1] for p in found]
    checks = (
        equal("the best match is where the template was cut", np.array(found[0]), np.array(AT)),
        at_most("its height: distance from 1", abs(float(y.max()) - 1), 1e-10),
        at_least(f"further places above {LEAST} in the flag, where the stars are", sum(in_flag) - 1, 3),
        equal(f"places above {LEAST} elsewhere", len(found) - sum(in_flag), 0),
        at_most("relative change of all heights with the picture × 0.3 + 0.5", relative(flatter, y), 1e-9),
        at_least(
            "plain correlation: distance of its best match from there, in pixels", math.dist(best_sum, AT), SIZE[0]
        ),
    )
    caption = (
        f"A star of the flag is the template; {len(found) - 1} more places look like it, and all are stars. Plain "
        "correlation without normalisation is largest wherever the picture is bright (cross)."
    )
    return Shown(checks, draw(picture, template, y, found, best_sum), caption)


def peaks(y: np.ndarray, least: float) -> list[tuple[int, int]]:
    """Return the positions where y is at least `least`, highest first, none within half a template of a higher one."""
    left, found = y.copy(), []
    while left.max() >= least:
        i, j = (int(n) for n in np.unravel_index(left.argmax(), left.shape))
        found.append((i, j))
        left[max(0, i - SIZE[0] // 2) : i + SIZE[0] // 2, max(0, j - SIZE[1] // 2) : j + SIZE[1] // 2] = -1
    return found


def draw(picture: Any, template: Any, y: Any, found: Any, best_sum: Any) -> Any:
    """Draw the image with the matches, the template, and the heights."""
    from matplotlib.patches import Rectangle

    fig = figure(10.2, 5.2)
    left, middle, right = fig.subplots(1, 3, width_ratios=(1, 0.3, 1))
    grey(left, picture, "the picture, and where it looks like the template", "")
    for n, (i, j) in enumerate(found):
        left.add_patch(Rectangle((j, i), SIZE[1], SIZE[0], fill=False, edgecolor=RED, linewidth=2.4 if n == 0 else 1.2))
        left.text(j + SIZE[1] / 2, i - 4, f"{y[i, j]:.2f}", color="white", fontsize=8, ha="center", va="bottom")
    centre = best_sum[1] + SIZE[1] / 2, best_sum[0] + SIZE[0] / 2
    left.plot(*centre, "x", color="#ffd21f", markersize=9, markeredgewidth=2)
    left.set(xlim=(-0.5, picture.shape[1] - 0.5), ylim=(picture.shape[0] - 0.5, -0.5))
    grey(middle, template, "the template", lowest=None)
    signed(right, y, "match_template: red is alike, blue its negative", "", limit=1)
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
