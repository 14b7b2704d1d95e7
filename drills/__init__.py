"""Failures and growth on real processes. Each drill prints its figures."""
