"""Command-line scripts: training, prediction, the lecture's figures and the benchmarks."""

import sys

from experiments.errors import one_line_for_scripts

if sys.argv[:1] == ["-m"]:  # `python -m experiments.…` imports this package before argv contains the script's file
    one_line_for_scripts()
