"""Placeholder while the command is being written."""


def simulate() -> None:
    """Not here yet."""
