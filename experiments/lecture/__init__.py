"""The lecture, one script per statement; `python -m experiments.lecture` runs all scripts and writes one page."""
