"""The model of errors."""

from __future__ import annotations

from typing import Any

from tidegate.admin.models.base import ResponseModel


class Problem(ResponseModel):
    """An error: a code for programs, a message for people."""

    code: str
    message: str
    details: dict[str, Any]


class ProblemRead(ResponseModel):
    """The body of every error response."""

    error: Problem
