"""Leaky bucket: paces. Requests pass one by one, `window / amount` apart; a burst lets that many pass at once first.

Guarantee: in no span of time t is more than `burst + amount × t / window` admitted; with the default burst of 1, no two
requests are closer than `window / amount`.
As a meter it is the token bucket's arithmetic with another default burst (1, filled in by `LimitSet`), so it is the token
bucket's
code: what is level there is water here. A cost above the burst never passes.
"""

from __future__ import annotations

from tidegate.algorithms.token_bucket import decide, expires_at, merge

__all__ = ["decide", "expires_at", "merge"]
