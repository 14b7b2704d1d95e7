"""The version of Tidegate, in one place."""

__version__ = "0.1.0"
