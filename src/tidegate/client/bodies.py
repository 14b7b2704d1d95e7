"""Bodies and queries of the client's requests.

They are validated only as far as the server could not name the check at fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final
from urllib.parse import urlencode

import msgspec

from tidegate.decision import MAX_COST, Check
from tidegate.errors import BadRequest, clip
from tidegate.wire import MAX_BATCH, MAX_BATCH_BYTES, CheckRequest, LimitRequest, whole_cost

_encode: Final = msgspec.json.Encoder().encode


def check_body(check: Check, bearer: str | None = None) -> bytes:
    """The body of `POST /v1/check` for a check.

    Raises:
        BadRequest: if a text has no form in JSON.
    """
    if bearer is not None and not bearer.isascii():
        raise BadRequest("bearer has characters that no JSON Web Token has: pass the token as it came", field="bearer")
    attributes: dict[str, str | None] | None = dict(check.attributes) if check.attributes else None
    body = CheckRequest(check.path, check.method, check.api_key, check.ip, check.cost, attributes, check.tier, bearer or None)
    try:
        return _encode(body)
    except UnicodeEncodeError:
        # A lone surrogate: no valid key or tier, which the server reports. In an attribute JSON has no form for it.
        for value in check.attributes.values():
            if not value.isprintable() and value.encode(errors="replace").decode() != value:
                raise BadRequest(
                    "an attribute has a lone surrogate, which is no character: send valid text", field="attributes"
                ) from None
        key, tier = ((text or "").encode(errors="replace").decode() or None for text in (check.api_key, check.tier))
        return _encode(msgspec.structs.replace(body, api_key=key, tier=tier))


def limit_texts(limits: object) -> tuple[str, ...]:
    """Limits of a call as the request has them; one text is one limit.

    Raises:
        BadRequest: if they are not texts.
    """
    listed = (limits,) if isinstance(limits, str) else limits
    if not isinstance(listed, Sequence) or not all(isinstance(limit, str) for limit in listed):
        raise BadRequest(f"limits {clip(limits)} must be texts such as '10/minute'", field="limits")
    return tuple(listed)


def limit_body(request: LimitRequest) -> bytes:
    """The body of `POST /v1/limit`. Bounds of names and limits are the server's to check.

    Raises:
        BadRequest: if a field has a wrong type, which would make a whole batch invalid, or a cost is out of range.
    """
    for field, value in (("namespace", request.namespace), ("subject", request.subject), ("algorithm", request.algorithm)):
        if not isinstance(value, str) and (value is not None or field != "algorithm"):
            raise BadRequest(f"{field} {clip(value)} must be a text", field=field)
    limits, cost = limit_texts(request.limits or ()), whole_cost(request.cost)
    if type(cost) is not int or not 0 <= cost <= MAX_COST:
        raise BadRequest(f"cost {clip(request.cost)} must be a whole number from 0 to {MAX_COST}", field="cost")
    try:
        return _encode(LimitRequest(request.namespace, request.subject, limits, request.algorithm, cost))
    except UnicodeEncodeError:
        raise BadRequest("a text has a lone surrogate, which is no character: send valid text", field="subject") from None


def usage_query(attributes: Mapping[str, str] | None, tier: str | None) -> str:
    """The query of `GET /v1/usage`, from `?` on; empty for a caller without attributes and tier.

    Raises:
        BadRequest: if a text has a lone surrogate.
    """
    fields = [("attribute", f"{name}={value}") for name, value in (attributes or {}).items()]
    if tier is not None:
        fields.append(("tier", tier))
    try:
        return "?" + urlencode(fields) if fields else ""
    except UnicodeEncodeError:
        raise BadRequest(
            "an attribute has a lone surrogate, which is no character: send valid text", field="attributes"
        ) from None


def batches(pieces: Iterable[tuple[bytes, bool]]) -> Iterator[tuple[bytes, int, bool]]:
    """Bodies within the server's limits.

    Args:
        pieces: the body of each check, and whether it charges nothing.

    Returns:
        Bodies, the number of checks in each, and whether all of these charge nothing.
    """
    batch: list[bytes] = []
    size = 0
    all_read_only = True
    for piece, read_only in pieces:
        if batch and (len(batch) == MAX_BATCH or size + len(piece) + 1 > MAX_BATCH_BYTES - 64):
            yield b'{"checks":[' + b",".join(batch) + b"]}", len(batch), all_read_only
            batch, size, all_read_only = [], 0, True
        batch.append(piece)
        size += len(piece) + 1
        all_read_only = all_read_only and read_only
    if batch:
        yield b'{"checks":[' + b",".join(batch) + b"]}", len(batch), all_read_only
