"""Expressions of Prometheus that panels are made of."""

from __future__ import annotations


def rate(metric: str, labels: str = "", by: str = "") -> str:
    """A counter's growth a second.

    Args:
        metric: the counter.
        labels: matchers that its series must fit.
        by: labels to sum by; one sum of all where not given.

    Returns:
        The expression.
    """
    return _sum(f"rate({_series(metric, labels)}[$__rate_interval])", by)


def total(metric: str, labels: str = "", by: str = "") -> str:
    """A gauge's sum.

    Args:
        metric: the gauge.
        labels: matchers that its series must fit.
        by: labels to sum by; one sum of all where not given.

    Returns:
        The expression.
    """
    return _sum(_series(metric, labels), by)


def or_none(expression: str, label: str) -> str:
    """Let an expression that has no series while all is well give one 0.

    Args:
        expression: whose series may not be there.
        label: by which they are told apart; it says `none` then.

    Returns:
        The expression.
    """
    return f'{expression} or on() label_replace(vector(0), "{label}", "none", "", "")'


def _series(metric: str, labels: str) -> str:
    return f"{metric}{{{labels}}}" if labels else metric


def _sum(expression: str, by: str) -> str:
    return f"sum by ({by}) ({expression})" if by else f"sum({expression})"
