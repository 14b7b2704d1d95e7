"""Sessions of the console: signing in with a token of an operator or a viewer, and signing out.

A session has a random secret, which the browser keeps in a cookie; only its digest is stored, beside the digest of the token. A
revoked or expired token ends its sessions at once. All instances of a catalog accept them.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from typing import Final

import msgspec
from sqlalchemy import delete, insert, or_, select, update

from tidegate.admin.rules import CatalogEditor
from tidegate.admin.tokens import KnownDigests, Principal, TokenCheck, digest_of
from tidegate.catalog.sql.tables import console_sessions
from tidegate.errors import CatalogUnavailable
from tidegate.timestamps import US_PER_S, now_us

logger = logging.getLogger(__name__)

MAX_SESSIONS: Final = 1_000
"""Maximum number of sessions of one catalog; beyond it the oldest one ends."""
LIFE_S: Final = 12 * 3600
"""How long a session lasts at most, s."""

OUTAGE_S: Final = 300
"""How long a session is accepted for reading while the database does not answer, after the last time when it did, s."""

_USED_STEP_US: Final = 60 * US_PER_S
_FORM: Final = re.compile(r"tgs_[0-9A-Za-z_-]{43}", re.ASCII)


class Session(msgspec.Struct, frozen=True):
    """A session.

    Args:
        secret: the value of the cookie.
        csrf_token: what the page sends with each change, in a header that pages of other sites cannot set.
    """

    secret: str
    csrf_token: str


class Sessions:
    """The sessions of a catalog.

    Args:
        tokens: authenticates the tokens that sign in.
        idle_s: how long a session lasts without use, s.
    """

    def __init__(self, editor: CatalogEditor, tokens: TokenCheck, idle_s: float) -> None:
        self._editor = editor
        self._tokens = tokens
        self._idle_us = round(idle_s * US_PER_S)
        self._valid: dict[str, tuple[Principal, int]] = {}
        self._live = KnownDigests(editor, lambda: select(console_sessions.c.sha256).limit(MAX_SESSIONS))

    async def create(self, token: str) -> Session:
        """Start a session for a token that was authenticated.

        Raises:
            CatalogUnavailable: if the database rejects it.
        """
        secret = "tgs_" + secrets.token_urlsafe(32)
        now = now_us()
        c = console_sessions.c
        over = or_(c.used_at_us <= now - self._idle_us, c.created_at_us <= now - LIFE_S * US_PER_S)
        surplus = select(c.sha256).order_by(c.used_at_us.desc(), c.sha256).offset(MAX_SESSIONS - 1)
        values = {"sha256": digest_of(secret), "token_sha256": digest_of(token), "created_at_us": now, "used_at_us": now}
        async with self._editor.catalog.database.transaction() as connection:
            await connection.execute(delete(console_sessions).where(over))
            oldest = (await connection.execute(surplus)).scalars().all()
            if oldest:
                await connection.execute(delete(console_sessions).where(c.sha256.in_(oldest)))
            await connection.execute(insert(console_sessions).values(values))
        return Session(secret, csrf_token(secret))

    async def principal(self, secret: str, *, used: bool, reading: bool = True) -> Principal | None:
        """The principal of a session.

        Args:
            used: whether a person caused the request, so that the session lasts longer.
            reading: whether it changes nothing: then a session that was valid in the last `OUTAGE_S` seconds is accepted while
                the database does not answer, so that the console shows the outage.

        Returns:
            The principal of its token; None if the session is unknown or over.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        if _FORM.fullmatch(secret) is None:
            return None
        sha256, now = digest_of(secret), now_us()
        try:
            principal = await self._load(sha256, now, used=used)
        except CatalogUnavailable:
            valid = self._valid.get(sha256)
            if not reading or valid is None or valid[1] <= now - OUTAGE_S * US_PER_S:
                raise
            return valid[0]
        self._valid.pop(sha256, None)
        if principal is not None:
            self._valid[sha256] = principal, now
            if len(self._valid) > MAX_SESSIONS:
                del self._valid[next(iter(self._valid))]  # the one whose last use is the oldest
        return principal

    async def _load(self, sha256: str, now: int, *, used: bool) -> Principal | None:
        async with self._editor.reading() as connection:
            query = select(console_sessions).where(console_sessions.c.sha256 == sha256)
            row = (await connection.execute(query)).mappings().first()
        if row is None or row["used_at_us"] <= now - self._idle_us or row["created_at_us"] <= now - LIFE_S * US_PER_S:
            return None
        principal = await self._tokens.principal_of_digest(row["token_sha256"])
        if principal is not None and used and row["used_at_us"] <= now - min(_USED_STEP_US, self._idle_us // 4):
            await self._note_use(sha256, now)
        return principal

    async def is_known(self, secret: str) -> bool:
        """Whether a session exists, with at most one concurrent query; see `TokenCheck.is_known`."""
        return _FORM.fullmatch(secret) is not None and await self._live.have(digest_of(secret))

    async def end(self, secret: str) -> None:
        """End a session.

        Raises:
            CatalogUnavailable: if the database rejects it.
        """
        async with self._editor.catalog.database.transaction() as connection:
            await connection.execute(delete(console_sessions).where(console_sessions.c.sha256 == digest_of(secret)))
        self._valid.pop(digest_of(secret), None)

    async def _note_use(self, sha256: str, now: int) -> None:
        try:
            async with self._editor.catalog.database.transaction() as connection:
                statement = update(console_sessions).where(console_sessions.c.sha256 == sha256).values(used_at_us=now)
                await connection.execute(statement)
        except CatalogUnavailable as error:
            # Reading goes on while the database cannot be written; the session then ends earlier.
            logger.warning("the use of a console session was not recorded: %s", error)


def csrf_token(secret: str) -> str:
    """The CSRF token of a session: derived from its secret, which no page can read."""
    return hmac.new(secret.encode(), b"csrf", hashlib.sha256).hexdigest()
