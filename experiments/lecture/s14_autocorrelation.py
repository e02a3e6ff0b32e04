"""§14: the auto-correlation of white noise and of a periodic signal."""

import sys
from typing import Any

import numpy as np

from experiments.lecture.drawing import BLUE, DARK, GRAY, RED, figure, plain
from experiments.lecture.statement import Result, Statement, at_least, at_most, main, relative
from jaxcnn.ops import signal

STATEMENT = Statement(
    name="s14_autocorrelation",
    section="14",
    title="Auto-correlation: noise, period, variance",
    korean_title="자기상관: 잡음, 주기, 분산",
    korean="균일도 체크나 자기자신의 신호가 불확실성이 있을때, 이럴때 auto correlation을 하면 자기 신호에 대한 "
    "분산도 알 수 있다",
    claim="In an auto-correlation, a signal is correlated with itself. White noise resembles itself only at shift 0, a "
    "periodic signal at every period. The value at shift 0 is the energy: n times the variance if the mean is zero.",
    formula="r[0] = Σ<sub>k</sub> a[k]² = n·variance(a)",
    functions=("jaxcnn/ops/signal.py: autocorrelate",),
    test="tests/ops/test_signal.py",
)

N, PERIOD = 1000, 40


def show(autocorrelate: Any = signal.autocorrelate) -> Result:
    """Compute the auto-correlations of white noise, and of a sine almost hidden in noise."""
    rng = np.random.default_rng(14)
    noise = rng.normal(size=N)
    periodic = np.sin(2 * np.pi * np.arange(N) / PERIOD) + rng.normal(size=N)
    signals = {"white noise": noise - noise.mean(), f"a sine of period {PERIOD} in noise": periodic - periodic.mean()}
    results = {name: np.asarray(autocorrelate(a)) for name, a in signals.items()}
    of_noise, of_period = (r[N - 1 :] / r[N - 1] for r in results.values())  # shifts 0 … N − 1
    first_peak = PERIOD // 2 + int(of_period[PERIOD // 2 : 3 * PERIOD // 2].argmax())
    checks = (
        *(
            at_most(
                f"{name}: r[0] and n × variance, relative difference",
                relative(results[name][N - 1], a.var() * N),
                1e-12,
            )
            for name, a in signals.items()
        ),
        at_most("r and reversed r, relative difference", max(relative(r[::-1], r) for r in results.values()), 1e-12),
        at_most("white noise: maximum |r| at other shifts / r[0]", float(np.abs(of_noise[1:]).max()), 5 / N**0.5),
        at_least("periodic: r at one period / r[0]", float(of_period[PERIOD]), 0.2),
        at_most("periodic: r at half a period / r[0]", float(of_period[PERIOD // 2]), -0.2),
        at_most("periodic: distance of the first peak from the period", abs(first_peak - PERIOD), 2),
    )
    caption = (
        "Left: a part of each signal, in which the period is hard to see. Right: the auto-correlations, which show it. "
        f"The gray band is ±2/√n, which contains most values for {N} numbers of white noise."
    )
    return Result(checks, draw(signals, (of_noise, of_period)), caption)


def draw(signals: Any, correlations: Any) -> Any:
    """Draw one row per signal: the signal, and r over the shift."""
    fig = figure(10, 5)
    grid = fig.subplots(2, 2, width_ratios=(1, 1.2))
    for (left, right), (name, a), r, color in zip(grid, signals.items(), correlations, (GRAY, BLUE), strict=True):
        plain(left, name, "k", "a[k]")
        left.plot(a[:200], color=color, linewidth=1)
        plain(right, f"auto-correlation of {name}", "shift", "r / r[0]")
        right.axhspan(-2 / N**0.5, 2 / N**0.5, color="0.9", linewidth=0)
        for k in range(PERIOD, 200, PERIOD):
            right.axvline(k, color=RED, linewidth=0.7, linestyle=":")
        right.plot(r[:200], color=color, linewidth=1.6)
        right.plot(0, 1, "o", color=DARK, markersize=5)
        right.annotate(f"r[0] = {N}·{a.var():.2f}", (0, 1), (8, -3), textcoords="offset points", fontsize=9,
                       bbox={"color": "white", "pad": 1.5})  # fmt: skip
        right.set_ylim(-0.5, 1.1)
    return fig


if __name__ == "__main__":
    sys.exit(main(STATEMENT, show))
