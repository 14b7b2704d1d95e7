"""Signatures of Standard Webhooks (https://github.com/standard-webhooks/standard-webhooks, specification 1.0.0)."""

from __future__ import annotations

import base64
import hashlib
import hmac


def signature(key: bytes, message_id: str, timestamp_s: int, body: bytes) -> str:
    """The value of the header `webhook-signature`.

    Args:
        key: the secret.
        message_id: value of `webhook-id`.
        timestamp_s: value of `webhook-timestamp`, s since the epoch.
        body: as it is sent.

    Returns:
        `v1,` and the base64 of HMAC-SHA256 over id, timestamp and body, separated by dots.
    """
    signed = b"%b.%d.%b" % (message_id.encode(), timestamp_s, body)
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
