"""Client of the control plane for commands: bearer token, the control plane's models, and each error as one sentence.

The token is sent to the configured address only. Messages never contain the token or an API key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec

from tidegate.cli.client_tls import NO_FILES, ClientTls
from tidegate.cli.common import read_settings
from tidegate.cli.data_plane import HttpResponse, NoResponse, send_request
from tidegate.errors import SettingsError, TidegateError
from tidegate.server_url import Server

if TYPE_CHECKING:
    # Commands of the data plane, which need neither, start in half the time without them.
    from tidegate.admin.models import RequestModel, ResponseModel

TIMEOUT_S: Final = 10.0
PREFIX: Final = "/admin/v1"

_MAX_TOKEN: Final = 8_192
_MAX_LINE: Final = 1_000
# Only the data plane sends this header.
_DATA_PLANE_HEADER: Final = "x-tidegate-error"
_OF_EVERY_LISTENER: Final = frozenset({"CLIENT_NOT_ALLOWED", "REQUEST_TIMEOUT", "TOO_MANY_CONNECTIONS"})
_GATEWAY: Final = frozenset({502, 503, 504})
_SETTINGS_TOKEN: Final = "TIDEGATE_ADMIN__TOKEN or [admin] token"

_Model = TypeVar("_Model", bound="ResponseModel")


class ControlPlaneError(TidegateError):
    """The control plane rejected a request, or did not answer."""

    code = "CONTROL_PLANE"


class _Problem(msgspec.Struct, frozen=True):
    code: str
    message: str


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Problem


class ControlPlane:
    """Client of the control plane at an address.

    Args:
        source: where the token was read, for messages.
        tls: certificates for https.
        command: group of commands that lists what is changed, for messages.
    """

    def __init__(self, server: Server, token: str, source: str, tls: ClientTls = NO_FILES, command: str = "keys") -> None:
        self._command = command
        self._tls = tls
        self._server = server
        self._token = token
        self._source = source

    @classmethod
    def at(
        cls, url: str, token_file: Path | None, config: Path | None, tls: ClientTls = NO_FILES, command: str = "keys"
    ) -> ControlPlane:
        """A client for a URL; nothing is sent yet.

        Args:
            token_file: file that contains only the token; None for the token of the settings.
            config: settings file, read only without a token file.
            tls: certificates for https.
            command: see `ControlPlane`.

        Raises:
            SettingsError: if the URL is not valid, or the token is missing or not valid.
        """
        server = Server.at(url.rstrip("/").removesuffix(PREFIX))
        if token_file is None:
            token = read_settings(config).admin.token
            source = _SETTINGS_TOKEN
            if not token:
                raise SettingsError(
                    "the control plane needs a token: set TIDEGATE_ADMIN__TOKEN, or name its file with --token-file"
                )
        else:
            token, source = read_token(token_file), str(token_file)
        require_sendable(token, source)
        return cls(server, token, source, tls, command)

    def read(self, path: str, query: Mapping[str, str | int | None], model: type[_Model]) -> _Model:
        """Send a GET request.

        Args:
            path: path without `/admin/v1`.
            query: parameters; None omits one.

        Raises:
            ControlPlaneError: with the reason and the remedy.
        """
        encoded = urlencode([(name, value) for name, value in query.items() if value is not None])
        return self._send_for("GET", f"{path}?{encoded}" if encoded else path, None, model)

    def download(self, path: str, query: Mapping[str, str | int | None]) -> HttpResponse:
        """Send a GET request whose response is not JSON; arguments as for `read`.

        Raises:
            ControlPlaneError: with the reason and the remedy.
        """
        encoded = urlencode([(name, value) for name, value in query.items() if value is not None])
        return self._send("GET", f"{path}?{encoded}")

    def post(self, path: str, body: RequestModel, model: type[_Model]) -> _Model:
        """Send a POST request.

        Raises:
            ControlPlaneError: with the reason and the remedy.
        """
        return self._send_for("POST", path, body.model_dump_json(exclude_unset=True).encode(), model)

    def replace(self, path: str, body: RequestModel, revision: int, model: type[_Model], method: str = "PUT") -> _Model:
        """Send a PUT or PATCH request for a resource with this revision.

        Raises:
            ControlPlaneError: with the reason and the remedy.
        """
        headers = {"If-Match": f'"{revision}"'}
        return self._send_for(method, path, body.model_dump_json(exclude_unset=True).encode(), model, headers)

    def delete(self, path: str, revision: int) -> None:
        """Send a DELETE request for a resource with this revision.

        Raises:
            ControlPlaneError: with the reason and the remedy.
        """
        self._send("DELETE", path, headers={"If-Match": f'"{revision}"'})

    def revoke(self, path: str, model: type[_Model]) -> _Model:
        """Send a DELETE request for a resource whose record stays.

        Raises:
            ControlPlaneError: with the reason and the remedy.
        """
        return self._send_for("DELETE", path, None, model)

    def _send(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> HttpResponse:
        with_token = {"Authorization": f"Bearer {self._token}", **(headers or {})}
        try:
            answer = send_request(
                self._server, method, PREFIX + path, timeout_s=TIMEOUT_S, body=body, headers=with_token, tls=self._tls
            )
        except NoResponse as error:
            remedy = error.remedy or (
                "start it with 'tidegate serve', or use the address of [server] admin, by default 127.0.0.1:8082"
            )
            unknown = self._unknown(method) if error.sent else ""
            raise ControlPlaneError(f"no control plane answers at {self._url}: {error.reason}: {remedy}{unknown}") from None
        if not 200 <= answer.status < 300:
            raise ControlPlaneError(self._error_text(method, answer))
        return answer

    @property
    def _url(self) -> str:
        return self._server.url

    def _send_for(
        self, method: str, path: str, body: bytes | None, model: type[_Model], headers: Mapping[str, str] | None = None
    ) -> _Model:
        answer = self._send(method, path, body, headers)
        try:
            return model.model_validate_json(answer.body)
        except ValueError:  # what pydantic raises is one
            why = self._unexpected("its response does not match this version")
            raise ControlPlaneError(why + self._unknown(method)) from None

    def _error_text(self, method: str, answer: HttpResponse) -> str:
        if _DATA_PLANE_HEADER in answer.headers and answer.headers[_DATA_PLANE_HEADER] not in _OF_EVERY_LISTENER:
            return f"{self._url} is the data plane: the control plane has a separate port, [server] admin, by default 8082"
        if 300 <= answer.status < 400:
            return (
                f"{self._url} redirects{_origin(answer.headers.get('location', ''))}, and the token is not sent to other "
                "addresses: set the control plane's own address with --url"
            )
        retry_after = answer.headers.get("retry-after", "")
        retry = f"try again in {retry_after} s" if re.fullmatch(r"[0-9]{1,9}", retry_after, re.ASCII) else "try again later"
        try:
            problem = msgspec.json.decode(answer.body, type=_ErrorBody).error
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return self._foreign_error(method, answer.status, retry)
        message = f"{one_line(problem.code)}: {one_line(problem.message)}"
        if answer.status == 401:
            return f"{message} (the token of {self._source})"
        if answer.status == 429 and retry not in message:
            return f"{message}: {retry}"
        if answer.status == 503:
            return f"{message}: {retry}; if this continues, run 'tidegate doctor' on the server's machine"
        return message

    def _foreign_error(self, method: str, status: int, retry: str) -> str:
        """The message for an error response that is not from the control plane."""
        if status in _GATEWAY:
            return (
                f"the proxy in front of the control plane at {self._url} answers {status}: check that 'tidegate serve' "
                f"runs behind it, and {retry}{self._unknown(method)}"
            )
        if status == 429:
            return f"the proxy in front of the control plane at {self._url} answers 429, too many requests: {retry}"
        return self._unexpected(f"it answers {status} in another format")

    def _unknown(self, method: str) -> str:
        # Nobody knows a key whose response was lost: it must be revoked.
        return "" if method == "GET" else f"; the change may have been made: check with 'tidegate {self._command} list'"

    def _unexpected(self, why: str) -> str:
        return (
            f"the server at {self._url} is not a control plane of Tidegate, {why}: use the address of [server] admin, by default "
            "127.0.0.1:8082"
        )


def one_line(text: str) -> str:
    """Make a text from a server safe for a terminal.

    Returns:
        The text in one line, without control characters, at most 1,000 characters.
    """
    return "".join(character if character.isprintable() else " " for character in text[:_MAX_LINE])


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
        SettingsError: naming its source.
    """
    if not re.fullmatch(r"[!-~]+", token):
        raise SettingsError(f"the token of {source} has invalid characters, such as spaces: set the token and nothing else")


def read_token(file: Path) -> str:
    """Read the token in a file that contains nothing else.

    Raises:
        SettingsError: naming the file and what is wrong with it.
    """
    try:
        with file.open(encoding="utf-8-sig") as opened:
            token = opened.read(_MAX_TOKEN + 1).strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"the token file {file} cannot be read: {why}") from None
    if not token or len(token) > _MAX_TOKEN:
        raise SettingsError(f"the token file {file} does not contain a token: write the token into it and nothing else")
    return token
