"""§14: correlation finds a template in an image."""

import math
import sys
from typing import Any

import numpy as np

from experiments.lecture.drawing import RED, figure, gray, signed
from experiments.lecture.numerical import portrait
from experiments.lecture.statement import Result, Statement, at_least, at_most, equal, main, relative
from jaxcnn.ops import signal

STATEMENT = Statement(
    name="s14_matching",
    section="14",
    title="Template matching",
    korean_title="템플릿 매칭",
    korean="correlation은 주로 템플릿매칭이나 유사도를 체크할때 많이 사용된다 … 일치율을 체크할때 correlation이 "
    "적합하다",
    claim="Correlation finds the positions where an image resembles a template, if it is normalized by the brightness "
    "and contrast of each window. The result is 1 at the template itself, and high at similar positions.",
    formula="y[o] = Σ<sub>k</sub> (x[o + k] − m[o])·t[k] / √(s[o]·T),  where m[o] is the mean of the window at o, t "
    "the template minus its mean, s[o] = Σ<sub>k</sub> (x[o + k] − m[o])², T = Σ<sub>k</sub> t[k]²",
    functions=("jaxcnn/ops/signal.py: match_template", "jaxcnn/ops/signal.py: correlate"),
    test="tests/ops/test_signal.py",
)

AT, SIZE = (44, 0), (52, 42)
"""Position and size of a star of the flag."""
THRESHOLD = 0.75
"""Smallest height of a match."""
FLAG = (320, 140)
"""Size of the part of the image that contains all stars, from the upper left corner."""


def show(match_template: Any = signal.match_template) -> Result:
    """Find the positions similar to a star, first in an image, then in a darker one with less contrast."""
    image = portrait()
    template = image[AT[0] : AT[0] + SIZE[0], AT[1] : AT[1] + SIZE[1]]
    y = np.asarray(match_template(image, template))
    matches = peaks(y, THRESHOLD)
    low_contrast = match_template(0.3 * image + 0.5, template)
    plain_sums = np.asarray(signal.correlate(image, template, "valid"))
    best_sum = tuple(int(i) for i in np.unravel_index(plain_sums.argmax(), plain_sums.shape))
    in_flag = [p[0] < FLAG[0] and p[1] < FLAG[1] for p in matches]
    checks = (
        equal("position of the best match, where the template was cut out", np.array(matches[0]), np.array(AT)),
        at_most("height of the best match: distance from 1", abs(float(y.max()) - 1), 1e-10),
        at_least(f"further matches above {THRESHOLD} in the flag, where the stars are", sum(in_flag) - 1, 3),
        equal(f"matches above {THRESHOLD} elsewhere", len(matches) - sum(in_flag), 0),
        at_most("relative change of y for the image × 0.3 + 0.5", relative(low_contrast, y), 1e-9),
        at_least(
            "plain correlation: distance of its maximum from the template, in pixels", math.dist(best_sum, AT), SIZE[0]
        ),
    )
    caption = (
        f"The template is a star of the flag. The {len(matches) - 1} other matches are stars as well. Plain "
        "correlation, without normalization, has its maximum in a bright region (cross)."
    )
    return Result(checks, draw(image, template, y, matches, best_sum), caption)


def peaks(y: np.ndarray, least: float) -> list[tuple[int, int]]:
    """Return the positions with y ≥ `least`, highest first, none within half a template of a higher one."""
    rest, matches = y.copy(), []
    while rest.max() >= least:
        i, j = (int(n) for n in np.unravel_index(rest.argmax(), rest.shape))
        matches.append((i, j))
        rest[max(0, i - SIZE[0] // 2) : i + SIZE[0] // 2, max(0, j - SIZE[1] // 2) : j + SIZE[1] // 2] = -1
    return matches


def draw(image: Any, template: Any, y: Any, matches: Any, best_sum: Any) -> Any:
    """Draw the image with the matches, the template, and y."""
    from matplotlib.patches import Rectangle

    fig = figure(10.2, 5.2)
    left, middle, right = fig.subplots(1, 3, width_ratios=(1, 0.3, 1))
    gray(left, image, "the image and the matches of the template", "")
    for n, (i, j) in enumerate(matches):
        left.add_patch(Rectangle((j, i), SIZE[1], SIZE[0], fill=False, edgecolor=RED, linewidth=2.4 if n == 0 else 1.2))
        left.text(j + SIZE[1] / 2, i - 4, f"{y[i, j]:.2f}", color="white", fontsize=8, ha="center", va="bottom")
    center = best_sum[1] + SIZE[1] / 2, best_sum[0] + SIZE[0] / 2
    left.plot(*center, "x", color="#ffd21f", markersize=9, markeredgewidth=2)
    left.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    gray(middle, template, "the template", lowest=None)
    signed(right, y, "match_template: red similar, blue opposite", "", limit=1)
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
