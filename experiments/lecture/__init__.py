"""The lecture, statement by statement: `python -m experiments.lecture` runs all scripts and writes one page."""
