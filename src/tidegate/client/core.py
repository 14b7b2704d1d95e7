"""The part of the client that blocking code and asyncio share: choice of server and retries. No I/O here."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic
from typing import Final, Literal, TypeVar, get_args

from tidegate._version import __version__
from tidegate.breaker import Breaker, BreakerOptions, BreakerState
from tidegate.client.answer import Answer
from tidegate.client.bodies import batches, check_body, limit_body, usage_query
from tidegate.client.replies import parse_reply, read_check, read_usage, reader_of
from tidegate.client.steps import HttpRequest, Reply, Steps, TransportFailure
from tidegate.decision import Check
from tidegate.errors import (
    BadRequest,
    CatalogUnavailable,
    InvalidApiKey,
    LimiterUnavailable,
    SettingsError,
    TidegateError,
    clip,
)
from tidegate.ip_addresses import canonical_ip
from tidegate.server_url import Server
from tidegate.wire import LimitRequest, UsageBody

logger = logging.getLogger("tidegate.client")

OnFailure = Literal["allow", "deny", "raise"]
"""Decision for a check when no server is available."""

TOKEN_VARIABLE: Final = "TIDEGATE_TOKEN"
TOKEN_HEADER: Final = "X-Tidegate-Token"

_AGENT: Final = f"tidegate-client/{__version__}".encode()
BREAKER: Final = BreakerOptions(failures=5, window_s=10.0, open_s=5.0)

T = TypeVar("T")


class _Endpoint:
    """One server with its circuit breaker and its last failure."""

    def __init__(self, url: str, breaker: BreakerOptions) -> None:
        self.server = Server.at(url)
        self.breaker = Breaker(breaker)
        self.last_failure = ""
        netloc = f"[{self.server.host}]" if ":" in self.server.host else self.server.host
        default_port = 443 if self.server.tls else 80
        self.host = (netloc if self.server.port == default_port else f"{netloc}:{self.server.port}").encode()


class ClientCore:
    """Generates the steps of each call. Thread-safe: shared state is protected by a lock.

    Args:
        urls: servers in order of preference.
        deadline_s: time limit of one call, s, for all servers together.
        on_failure: decision for checks when no server is available.
        breaker: options of each server's circuit breaker.
        max_connections: maximum number of open connections.
        token: of this caller; None for that of the environment variable `TIDEGATE_TOKEN`, if it is set.
        token_header: header that carries it.

    Raises:
        SettingsError: if an argument is invalid.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        deadline_s: float,
        on_failure: OnFailure,
        breaker: BreakerOptions,
        max_connections: int,
        token: str | None = None,
        token_header: str = TOKEN_HEADER,
    ) -> None:
        listed = [urls] if isinstance(urls, str) else list(urls)
        if not listed:
            raise SettingsError("urls is empty; expected at least one URL of a server, e.g. http://127.0.0.1:8080")
        if not 0.001 <= deadline_s <= 3600:
            raise SettingsError(f"deadline_s {clip(deadline_s)} is out of range; expected 0.001 to 3600 seconds, e.g. 0.25")
        if on_failure not in get_args(OnFailure):
            raise SettingsError(f"on_failure {clip(on_failure)} is not valid; expected 'allow', 'deny' or 'raise'")
        if max_connections < 1:
            raise SettingsError(f"max_connections {clip(max_connections)} is out of range; expected 1 or more, e.g. 100")
        if breaker.failures < 1 or not breaker.window_s > 0 or not breaker.open_s > 0:
            raise SettingsError(
                f"{breaker} is not valid; expected failures of at least 1, and window_s and open_s above 0 seconds"
            )
        self._common_headers = [(b"User-Agent", _AGENT), (b"Accept", b"application/json"), *_token_headers(token, token_header)]
        self._endpoints = [_Endpoint(url, breaker) for url in listed]
        self._deadline_s = deadline_s
        self._on_failure = on_failure
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        states = ", ".join(f"{endpoint.server.url} {endpoint.breaker.state}" for endpoint in self._endpoints)
        return f"{states}; deadline {self._deadline_s:g} s, on_failure {self._on_failure}"

    @property
    def tls(self) -> bool:
        """Whether any server is reached over TLS."""
        return any(endpoint.server.tls for endpoint in self._endpoints)

    def check(self, check: Check, bearer: str | None = None) -> Steps[Answer]:
        """Steps of one check; see `Client.check`."""
        return self._decide("/v1/check", check_body(check, bearer), repeatable=check.cost == 0)

    def check_many(self, checks: Sequence[Check]) -> Steps[list[Answer | TidegateError]]:
        """Steps of several checks; see `Client.check_many`."""
        return self._decide_many("/v1/check/batch", ((check_body(check), check.cost == 0) for check in checks))

    def limit(self, request: LimitRequest) -> Steps[Answer]:
        """Steps of one check with limits of its own; see `Client.limit`."""
        return self._decide("/v1/limit", limit_body(request), repeatable=request.cost == 0)

    def limit_many(self, requests: Sequence[LimitRequest]) -> Steps[list[Answer | TidegateError]]:
        """Steps of several checks with limits of their own; see `Client.limit_many`."""
        pieces: list[tuple[bytes, bool]] = []
        errors: dict[int, TidegateError] = {}
        for index, request in enumerate(requests):
            try:
                pieces.append((limit_body(request), request.cost == 0))
            except BadRequest as error:
                errors[index] = error
        answers = iter((yield from self._decide_many("/v1/limit/batch", pieces)))
        return [errors[index] if index in errors else next(answers) for index in range(len(requests))]

    def decide_with(self, path: str, body: bytes, read: Callable[[Reply], Answer]) -> Steps[Answer]:
        """Steps of a request that is decided by `on_failure` while no server is available.

        Args:
            path: path of the data plane.
            read: parses a response of 200 or 429.
        """
        return self._decide(path, body, read, repeatable=False)

    def repeat(self, path: str, body: bytes, read: Callable[[Reply], T]) -> Steps[T]:
        """Steps of a request that may be sent twice.

        Args:
            path: path of the data plane.
            read: parses a response of 200.

        Raises:
            TidegateError: as returned by the server; `LimiterUnavailable` if no server was available.
        """
        result = yield from self._send(b"POST", path, read, body, repeatable=True)
        if isinstance(result, TransportFailure):
            raise _unavailable(result.reason)
        if isinstance(result, TidegateError):
            raise result
        return result

    def _decide(
        self, path: str, body: bytes, read: Callable[[Reply], Answer] | None = None, *, repeatable: bool
    ) -> Steps[Answer]:
        result = yield from self._send(b"POST", path, read or read_check, body, repeatable=repeatable)
        answer = self._decide_failed(result.reason) if isinstance(result, TransportFailure) else result
        if isinstance(answer, TidegateError):
            raise answer
        return answer

    def _decide_many(self, path: str, pieces: Iterable[tuple[bytes, bool]]) -> Steps[list[Answer | TidegateError]]:
        answers: list[Answer | TidegateError] = []
        for body, count, read_only in batches(pieces):
            result = yield from self._send(b"POST", path, reader_of(count), body, repeatable=read_only)
            if isinstance(result, list):
                answers += [self._decide_failed(each.reason) if isinstance(each, TransportFailure) else each for each in result]
            else:
                answers += [self._decide_failed(result.reason) if isinstance(result, TransportFailure) else result] * count
        return answers

    def usage(
        self,
        api_key: str | None,
        ip: str | None,
        attributes: Mapping[str, str] | None = None,
        tier: str | None = None,
    ) -> Steps[UsageBody]:
        """Steps of a usage request; see `Client.usage`."""
        headers = []
        if api_key:
            if not (api_key.isascii() and api_key.isprintable()) or api_key != api_key.strip():
                raise InvalidApiKey("the API key has characters that are not allowed in a header: copy it again")
            headers.append((b"X-API-Key", api_key.encode()))
        if ip is not None:
            headers.append((b"X-Real-IP", canonical_ip(ip).encode()))
        path = "/v1/usage" + usage_query(attributes, tier)
        result = yield from self._send(b"GET", path, read_usage, b"", headers, repeatable=True)
        if isinstance(result, TransportFailure):
            raise _unavailable(result.reason)
        if isinstance(result, TidegateError):
            raise result
        return result

    def _send(
        self,
        method: bytes,
        path: str,
        read: Callable[[Reply], T],
        body: bytes,
        extra_headers: Sequence[tuple[bytes, bytes]] = (),
        *,
        repeatable: bool,
    ) -> Steps[T | TidegateError | TransportFailure]:
        """Send a request to one server after the other, until one gives a valid response.

        The next server is used only if the request cannot have been counted, or if it charges nothing and may be sent twice.

        Args:
            method: HTTP method.
            path: path of the data plane.
            read: parses a response of 200 or 429; raises ValueError or MsgspecError if it is not from Tidegate.
            body: JSON, or empty.
            extra_headers: in addition to the default ones.
            repeatable: whether the request charges nothing.

        Returns:
            The parsed response, an error from the server, or the reason why no server responded.
        """
        deadline = monotonic() + self._deadline_s
        failures: list[str] = []
        for index, endpoint in enumerate(self._endpoints):
            now = monotonic()
            if now >= deadline:
                break
            with self._lock:
                admitted = endpoint.breaker.admits(now)
            if not admitted:
                failures.append(f"{endpoint.server.url} {endpoint.last_failure}, and its circuit breaker is open")
                continue
            headers = [(b"Host", endpoint.host), *self._common_headers, *extra_headers]
            if body:
                headers += [(b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(body))]
            target = (endpoint.server.path + path).encode("ascii")
            # Connecting may take only a share of the time, so that there is some left for the next server.
            connect_deadline = now + (deadline - now) / (len(self._endpoints) - index)
            reply = yield HttpRequest(endpoint.server, method, target, headers, body, connect_deadline, deadline)
            result = reply if isinstance(reply, TransportFailure) else parse_reply(reply, read)
            self._record(endpoint, result if isinstance(result, TransportFailure) else None)
            if isinstance(result, CatalogUnavailable):
                # It charged nothing, and another server may be able to read the key.
                result = TransportFailure(f"answered {result.code}: {result.message}", sent=False)
            if not isinstance(result, TransportFailure):
                return result
            failures.append(f"{endpoint.server.url} {result.reason}")
            if result.sent and not repeatable:
                break
        return TransportFailure("; ".join(failures) or f"no response within {self._deadline_s:g} s", sent=True)

    def _record(self, endpoint: _Endpoint, failure: TransportFailure | None) -> None:
        """Update the circuit breaker, and log when it opens or closes."""
        if failure is not None and not failure.counts_for_breaker:
            return
        breaker = endpoint.breaker
        if failure is None and breaker.state is BreakerState.CLOSED:
            return
        with self._lock:
            before = breaker.state
            if failure is None:
                breaker.succeeded()
            else:
                endpoint.last_failure = failure.reason
                breaker.failed(monotonic())
            after = breaker.state
        if before is BreakerState.CLOSED and after is BreakerState.OPEN:
            logger.warning(
                "%s %s: circuit breaker opened, retrying in %g s; if no other server responds, on_failure=%r decides",
                endpoint.server.url,
                endpoint.last_failure,
                breaker.options.open_s,
                self._on_failure,
            )
        elif before is not BreakerState.CLOSED and after is BreakerState.CLOSED:
            logger.info("%s responds again: circuit breaker closed", endpoint.server.url)

    def _decide_failed(self, reason: str) -> Answer | TidegateError:
        if self._on_failure == "raise":
            return _unavailable(reason)
        allowed = self._on_failure == "allow"
        return Answer(allowed, None, None, None, 0.0 if allowed else 1.0, None, None, True, failure=reason)


def _token_headers(token: str | None, header: str) -> list[tuple[bytes, bytes]]:
    """The header with the token of this caller; none without a token. No message repeats the token."""
    source = "token"
    if token is None:
        token, source = os.environ.get(TOKEN_VARIABLE) or None, TOKEN_VARIABLE
    if token is None:
        return []
    if re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", header, re.ASCII) is None:
        raise SettingsError(f"token_header {clip(header)} is not the name of a header; expected e.g. {TOKEN_HEADER!r}")
    if re.fullmatch(r"(?:Bearer )?[!-~]+", token, re.ASCII) is None:
        raise SettingsError(f"{source} is empty or has characters that no token has: set the token and nothing else")
    is_bare = header.lower() == "authorization" and " " not in token
    return [(header.encode(), f"Bearer {token}".encode() if is_bare else token.encode())]


def _unavailable(reason: str) -> LimiterUnavailable:
    return LimiterUnavailable(f"no Tidegate server is available: {reason}")
