"""Scripts a person runs: training, prediction, the lecture's pictures and the benchmarks."""

import sys

from experiments.errors import one_line_for_scripts

if sys.argv[:1] == ["-m"]:  # `python -m experiments.…` imports this package before it knows its script's file
    one_line_for_scripts()
