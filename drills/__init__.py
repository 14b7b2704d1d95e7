"""Failures and growth on real processes. Each drill prints its figures; `python -m drills` runs them all, `--smoke` at their smallest."""
