"""Errors as clients see them: that a component does not answer, without its address. The log has the details."""

from __future__ import annotations

import logging
import time
from typing import Final

from tidegate.errors import TidegateError

logger = logging.getLogger(__name__)

LOG_EVERY_S: Final = 1.0
_GENERIC: Final = {
    "STORE_UNAVAILABLE": "the counter store does not answer, and the rule denies requests until it does: try again in a moment",
    "CATALOG_UNAVAILABLE": "the catalog does not answer: try again in a moment",
}
_logged_at: Final[dict[str, float]] = {}


def outward(error: TidegateError) -> tuple[str, dict[str, object]]:
    """The message and details of an error for a client.

    An error of a store or the catalog names hosts, ports and what they said: it is logged, once a second for each kind.

    Returns:
        Message and details.
    """
    generic = _GENERIC.get(error.code)
    if generic is None:
        return error.message, error.details
    now = time.monotonic()
    if now - _logged_at.get(error.code, -LOG_EVERY_S) >= LOG_EVERY_S:
        _logged_at[error.code] = now
        logger.warning("%s", error.message, extra={"ecs": {"error.code": error.code}})
    return generic, {name: value for name, value in error.details.items() if name == "reason"}
