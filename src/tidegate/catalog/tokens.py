"""Tokens of operators: `tga_` and 40 random base62 characters. Only their digests are stored."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Any, Final

import msgspec
from sqlalchemy import insert, select, update

from tidegate.catalog.changes import NONE
from tidegate.catalog.changing import Change, NotThere, now_us
from tidegate.catalog.editing import CatalogEditor
from tidegate.catalog.forms import Form, token_form
from tidegate.catalog.tables import admin_tokens
from tidegate.errors import BadRequest, CatalogError
from tidegate.keys import BASE62

TOKEN_PREFIX: Final = "tga_"
FIRST_TOKEN: Final = "first"
SETTINGS_ACTOR: Final = "settings"
OPERATOR: Final = "operator"
VIEWER: Final = "viewer"

_FORM: Final = re.compile(r"tga_[0-9A-Za-z]{40}", re.ASCII)


class Principal(msgspec.Struct, frozen=True):
    """Who asks the control plane.

    Args:
        name: the token's name, as the audit log writes it.
        role: operator or viewer.
        subject: whom requests are counted for; unique for each token.
    """

    name: str
    role: str
    subject: str


class TokenCheck:
    """Tells whose a bearer token is.

    Args:
        editor: of the catalog that holds the tokens.
        settings_token: of the operator that the settings name; None where they name none.
    """

    def __init__(self, editor: CatalogEditor, settings_token: str | None) -> None:
        self._editor = editor
        self._settings_sha256 = None if settings_token is None else _digest(settings_token)

    async def principal(self, token: str) -> Principal | None:
        """Whose token that is.

        Args:
            token: as it came.

        Returns:
            Its principal; None where it is unknown, expired or revoked.

        Raises:
            CatalogUnavailable: if the database does not answer.
        """
        sha256 = _digest(token)
        if self._settings_sha256 is not None and hmac.compare_digest(sha256, self._settings_sha256):
            return Principal(SETTINGS_ACTOR, OPERATOR, SETTINGS_ACTOR)
        if _FORM.fullmatch(token) is None:
            return None
        async with self._editor.reading() as connection:
            row = (await connection.execute(select(admin_tokens).where(admin_tokens.c.sha256 == sha256))).mappings().first()
        if row is None or not hmac.compare_digest(sha256, row["sha256"]) or row["revoked_at_us"] is not None:
            return None
        if row["expires_at_us"] is not None and row["expires_at_us"] <= now_us():
            return None
        return Principal(row["name"], row["role"], f"token {row['id']}")


async def create_token(
    editor: CatalogEditor, actor: str, name: str, role: str, expires_at_us: int | None = None
) -> tuple[str, Form]:
    """Make a token.

    Args:
        editor: of the catalog.
        actor: who asks.
        name: of whoever will use it, as the audit log writes it: 1 to 200 characters, of no other live token.
        role: operator or viewer.
        expires_at_us: µs since the epoch, None for never.

    Returns:
        The token itself, this once, and its form.

    Raises:
        BadRequest: if its time would be over already.
        CatalogError: if a token of that name is in use: the audit log could not tell the two apart.
        CatalogUnavailable: if the database does not answer.
    """
    if expires_at_us is not None and expires_at_us <= now_us():
        raise BadRequest("expires_at is past: give a moment to come, or leave it out for a token without end", field="expires_at")
    async with editor.changing(actor) as change:
        # No index finds a name, and none is worth it: operators are few, and make tokens seldom. Each request asks by digest.
        live = select(admin_tokens.c.id).where(admin_tokens.c.name == name, admin_tokens.c.revoked_at_us.is_(None))
        other = await change.one(live)
        if other is not None or name == SETTINGS_ACTOR:
            taken = "the settings' token" if other is None else f"the token {other['id']}"
            raise CatalogError(f"{taken} is named {name[:60]!r} already: take another name")
        return await _insert_token(change, name, role, expires_at_us)


async def revoke_token(editor: CatalogEditor, actor: str, token_id: int) -> Form:
    """Revoke a token. Its record stays, for the audit log's sake.

    Args:
        editor: of the catalog.
        actor: who asks.
        token_id: its id.

    Returns:
        The token's form.

    Raises:
        NotThere: if there is no such token.
        CatalogError: if it is revoked already.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as change:
        row = await change.one(select(admin_tokens).where(admin_tokens.c.id == token_id))
        if row is None:
            raise NotThere(f"there is no token {token_id}: see GET /admin/v1/tokens")
        if row["revoked_at_us"] is not None:
            raise CatalogError(f"the token {token_id} is revoked already")
        change.touch(NONE)
        values = {"revoked_at_us": now_us()}
        await change.connection.execute(update(admin_tokens).where(admin_tokens.c.id == token_id).values(values))
        form = token_form({**row, **values})
        await change.audit("revoke", "token", str(token_id), token_form(row), form)
        return form


async def first_token(editor: CatalogEditor) -> str | None:
    """Make the token of the first operator, where there never was any token.

    Args:
        editor: of the catalog.

    Returns:
        The token itself, this once; None where there is or was one.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    any_token = select(admin_tokens.c.id).limit(1)
    async with editor.reading() as connection:
        if (await connection.execute(any_token)).first() is not None:
            return None
    async with editor.changing(SETTINGS_ACTOR) as change:
        # Another instance may have made one while this one waited for its turn.
        if await change.one(any_token) is not None:
            return None
        return (await _insert_token(change, FIRST_TOKEN, OPERATOR, None))[0]


async def _insert_token(change: Change, name: str, role: str, expires_at_us: int | None) -> tuple[str, Form]:
    change.touch(NONE)
    token = TOKEN_PREFIX + "".join(secrets.choice(BASE62) for _ in range(40))
    values: dict[str, Any] = {
        "name": name,
        "sha256": _digest(token),
        "role": role,
        "created_at_us": now_us(),
        "expires_at_us": expires_at_us,
    }
    token_id = (await change.connection.execute(insert(admin_tokens).values(values).returning(admin_tokens.c.id))).scalar_one()
    form = token_form({**values, "id": token_id, "revoked_at_us": None})
    await change.audit("create", "token", str(token_id), None, form)
    return token, form


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
