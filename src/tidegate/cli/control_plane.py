"""The control plane as a command asks it: with a bearer token, in its own forms, and every refusal as one sentence.

The token goes to the address that was given and nowhere else. It is never part of a message, and no API key is either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec
from pydantic import ValidationError

from tidegate.admin.models import RequestModel, ResponseModel
from tidegate.cli.client_tls import NO_FILES, ClientTls
from tidegate.cli.common import read_settings
from tidegate.cli.data_plane import HttpResponse, NoResponse, send_request
from tidegate.errors import SettingsError, TidegateError
from tidegate.server_url import Server

TIMEOUT_S: Final = 10.0
PREFIX: Final = "/admin/v1"

_MAX_TOKEN: Final = 4_096
_MAX_SAID: Final = 1_000
# Only the data plane sends it.
_DATA_PLANES_OWN: Final = "x-tidegate-error"
_OF_EVERY_LISTENER: Final = frozenset({"CLIENT_NOT_ALLOWED", "REQUEST_TIMEOUT", "TOO_MANY_CONNECTIONS"})
_GATEWAY: Final = frozenset({502, 503, 504})
_SETTINGS_TOKEN: Final = "TIDEGATE_ADMIN__TOKEN or [admin] token"

_Model = TypeVar("_Model", bound=ResponseModel)


class ControlPlaneError(TidegateError):
    """The control plane refused what was asked, or did not answer."""

    code = "CONTROL_PLANE"


class _Problem(msgspec.Struct, frozen=True):
    code: str
    message: str


class _Refusal(msgspec.Struct, frozen=True):
    error: _Problem


class ControlPlane:
    """The control plane at an address.

    Args:
        server: where it is.
        token: bearer token.
        source: where the token came from, for messages.
        tls: certificates for https.
        command: group of commands that lists what is changed here, for messages.
    """

    def __init__(self, server: Server, token: str, source: str, tls: ClientTls = NO_FILES, command: str = "keys") -> None:
        self._tls = tls
        self._command = command
        self._server = server
        self._token = token
        self._source = source

    @classmethod
    def at(
        cls, url: str, token_file: Path | None, config: Path | None, tls: ClientTls = NO_FILES, command: str = "keys"
    ) -> ControlPlane:
        """The control plane at a URL; it is not asked yet.

        Args:
            url: such as `http://127.0.0.1:8082`.
            token_file: a file with the token and nothing else; None for the token of the settings.
            config: the settings file, read only where no token file is given.
            tls: certificates for https.
            command: see `ControlPlane`.

        Returns:
            The control plane.

        Raises:
            SettingsError: if the URL names no server, or there is no token, or none that can be sent.
        """
        server = Server.at(url.rstrip("/").removesuffix(PREFIX))
        if token_file is None:
            token = read_settings(config).admin.token
            source = _SETTINGS_TOKEN
            if not token:
                raise SettingsError(
                    "the control plane wants a token: set TIDEGATE_ADMIN__TOKEN, or give a file that holds one with --token-file"
                )
        else:
            token, source = read_token(token_file), str(token_file)
        require_sendable(token, source)
        return cls(server, token, source, tls, command)

    def read(self, path: str, query: Mapping[str, str | int | None], model: type[_Model]) -> _Model:
        """GET something.

        Args:
            path: behind `/admin/v1`.
            query: parameters; those that are None are left out.
            model: of the expected answer.

        Returns:
            What was answered.

        Raises:
            ControlPlaneError: saying what was wrong and what to do.
        """
        asked = urlencode([(name, value) for name, value in query.items() if value is not None])
        return self._told("GET", f"{path}?{asked}" if asked else path, None, model)

    def post(self, path: str, body: RequestModel, model: type[_Model]) -> _Model:
        """POST something.

        Args:
            path: behind `/admin/v1`.
            body: what to send.
            model: of the expected answer.

        Returns:
            What was answered.

        Raises:
            ControlPlaneError: saying what was wrong and what to do.
        """
        return self._told("POST", path, body.model_dump_json(exclude_unset=True).encode(), model)

    def delete(self, path: str, revision: int) -> None:
        """DELETE something, if it is as it was read.

        Args:
            path: behind `/admin/v1`.
            revision: that was read.

        Raises:
            ControlPlaneError: saying what was wrong and what to do.
        """
        self._send("DELETE", path, headers={"If-Match": f'"{revision}"'})

    def revoke(self, path: str, model: type[_Model]) -> _Model:
        """DELETE something whose record stays.

        Args:
            path: behind `/admin/v1`.
            model: of the record.

        Raises:
            ControlPlaneError: saying what was wrong and what to do.
        """
        return self._told("DELETE", path, None, model)

    def _send(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> HttpResponse:
        with_token = {"Authorization": f"Bearer {self._token}", **(headers or {})}
        try:
            answer = send_request(
                self._server, method, PREFIX + path, timeout_s=TIMEOUT_S, body=body, headers=with_token, tls=self._tls
            )
        except NoResponse as error:
            remedy = error.remedy or (
                "start it with 'tidegate serve', or give the address of [server] admin, which is 127.0.0.1:8082 unless set"
            )
            unknown = self._unknown(method) if error.sent else ""
            raise ControlPlaneError(f"no control plane answers at {self._url}: {error.reason}: {remedy}{unknown}") from None
        if not 200 <= answer.status < 300:
            raise ControlPlaneError(self._refusal(method, answer))
        return answer

    @property
    def _url(self) -> str:
        return self._server.url

    def _told(self, method: str, path: str, body: bytes | None, model: type[_Model]) -> _Model:
        answer = self._send(method, path, body)
        try:
            return model.model_validate_json(answer.body)
        except ValidationError:
            why = self._no_control_plane("what it answers is not in the form of this version")
            raise ControlPlaneError(why + self._unknown(method)) from None

    def _refusal(self, method: str, answer: HttpResponse) -> str:
        if _DATA_PLANES_OWN in answer.headers and answer.headers[_DATA_PLANES_OWN] not in _OF_EVERY_LISTENER:
            return (
                f"{self._url} is the data plane, where requests are checked: the control plane has a port of its own, "
                "[server] admin, which is 8082 unless set"
            )
        if 300 <= answer.status < 400:
            return (
                f"{self._url} redirects{_origin(answer.headers.get('location', ''))}, and the token is not sent on from there: "
                "give the control plane's own address with --url"
            )
        retry_after = answer.headers.get("retry-after", "")
        again = f"try again in {retry_after} s" if re.fullmatch(r"[0-9]{1,9}", retry_after, re.ASCII) else "try again later"
        try:
            problem = msgspec.json.decode(answer.body, type=_Refusal).error
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return self._foreign(method, answer.status, again)
        said = f"{one_line(problem.code)}: {one_line(problem.message)}"
        if answer.status == 401:
            return f"{said} (the token came from {self._source})"
        if answer.status == 429 and again not in said:
            return f"{said}: {again}"
        if answer.status == 503:
            return f"{said}: {again}; where that does not help, 'tidegate doctor' says more on the server's machine"
        return said

    def _foreign(self, method: str, status: int, again: str) -> str:
        """What an answer means that is not in the control plane's form."""
        if status in _GATEWAY:
            return (
                f"what stands before the control plane at {self._url} answers {status}: see whether 'tidegate serve' runs "
                f"behind it, and {again}{self._unknown(method)}"
            )
        if status == 429:
            return f"what stands before the control plane at {self._url} answers 429, too many requests: {again}"
        return self._no_control_plane(f"it answers {status}, and not in its form")

    def _unknown(self, method: str) -> str:
        # A key that was made without its answer is known to nobody, and is to be revoked.
        return "" if method == "GET" else f"; whether the change was made is not known, 'tidegate {self._command} list' shows it"

    def _no_control_plane(self, why: str) -> str:
        return (
            f"what is at {self._url} is no control plane of Tidegate, {why}: give the address of [server] admin, which is "
            "127.0.0.1:8082 unless set"
        )


def one_line(text: str) -> str:
    """A text from outside as a terminal may show it: a message must not move its cursor.

    Args:
        text: any.

    Returns:
        The text in one line, without control characters, at most 1,000 characters of it.
    """
    return "".join(character if character.isprintable() else " " for character in text[:_MAX_SAID])


def _origin(location: str) -> str:
    try:
        parts = urlsplit(location)
        host = parts.hostname
    except ValueError:
        return ""
    return f" to {parts.scheme}://{one_line(host)[:200]}" if host and parts.scheme in ("http", "https") else ""


def require_sendable(token: str, source: str) -> None:
    """Refuse a token that cannot be sent in a header; it is not repeated.

    Raises:
        SettingsError: naming where it came from.
    """
    if not re.fullmatch(r"[!-~]+", token):
        raise SettingsError(
            f"the token of {source} has characters that no token has, such as a space: give the token and nothing else"
        )


def read_token(file: Path) -> str:
    """The token in a file that holds nothing else.

    Raises:
        SettingsError: naming the file and what is wrong with it.
    """
    try:
        with file.open(encoding="utf-8-sig") as opened:
            token = opened.read(_MAX_TOKEN + 1).strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SettingsError(f"the token file {file} cannot be read: {why}") from None
    if not token or len(token) > _MAX_TOKEN:
        raise SettingsError(f"the token file {file} holds no token: write the token into it and nothing else")
    return token
