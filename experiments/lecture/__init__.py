"""The lecture, statement by statement: `python -m experiments.lecture` runs them all and writes one page."""
