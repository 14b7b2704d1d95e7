"""The client's one body, for blocking code and asyncio alike: whom to ask, how often, and what an answer means. No I/O here."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Final, Literal, TypeVar, get_args

import msgspec

from tidegate._version import __version__
from tidegate.breaker import Breaker, BreakerOptions, BreakerState
from tidegate.client.answer import Answer
from tidegate.client.server_url import Server
from tidegate.client.steps import HttpRequest, Pause, Reply, Steps, TransportFailure
from tidegate.decision import Check, canonical_ip, clip
from tidegate.errors import (
    ApiKeyExpired,
    ApiKeyRevoked,
    BadRequest,
    CatalogUnavailable,
    InvalidApiKey,
    LimiterUnavailable,
    MissingApiKey,
    RequestTooLarge,
    SettingsError,
    StoreUnavailable,
    TidegateError,
    TooManyUnknownKeys,
)
from tidegate.wire import MAX_BATCH, MAX_BATCH_BYTES, CheckRequest, DecisionBody, UsageBody

logger = logging.getLogger("tidegate.client")

OnFailure = Literal["allow", "deny", "raise"]
"""What holds for a check when no server was heard."""

BREAKER: Final = BreakerOptions(failures=5, window_s=10.0, open_s=5.0)

_LIMIT_HEADERS: Final = frozenset(
    (b"ratelimit", b"ratelimit-policy", b"retry-after", b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset")
)
_ERRORS: Final[dict[str, type[TidegateError]]] = {
    "HEADERS_TOO_LARGE": BadRequest,
    **{
        error.code: error
        for error in (
            *(BadRequest, RequestTooLarge, MissingApiKey, InvalidApiKey),
            *(ApiKeyRevoked, ApiKeyExpired, TooManyUnknownKeys, StoreUnavailable, CatalogUnavailable),
        )
    },
}
"""What a server decided, or refused to: of these the caller is told. All other errors are as no answer at all."""


class _ErrorFields(msgspec.Struct, frozen=True):
    code: str
    message: str = ""
    details: dict[str, object] = {}


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _ErrorFields


class _BatchBody(msgspec.Struct, frozen=True):
    decisions: list[msgspec.Raw]


T = TypeVar("T")

_encode: Final = msgspec.json.Encoder().encode
_DECISION: Final = msgspec.json.Decoder(DecisionBody)
_USAGE: Final = msgspec.json.Decoder(UsageBody)
_ERROR: Final = msgspec.json.Decoder(_ErrorBody)
_BATCH: Final = msgspec.json.Decoder(_BatchBody)


class _Asked:
    """One server, and how it did so far."""

    def __init__(self, url: str, breaker: BreakerOptions) -> None:
        self.server = Server.at(url)
        self.breaker = Breaker(breaker)
        self.failure = ""
        netloc = f"[{self.server.host}]" if ":" in self.server.host else self.server.host
        usual = 443 if self.server.tls else 80
        self.host = (netloc if self.server.port == usual else f"{netloc}:{self.server.port}").encode()


class Asking:
    """Makes the steps of each call. Any number of threads may run steps at once: what they share is behind a lock.

    Args:
        urls: of servers, in the order in which they are asked.
        deadline_s: for one call, s, all its servers together.
        on_failure: what holds for checks when no server is heard.
        breaker: when a server that fails is left alone.
        most: connections at once.

    Raises:
        SettingsError: naming the value and the remedy.
    """

    def __init__(
        self, urls: str | Sequence[str], deadline_s: float, on_failure: OnFailure, breaker: BreakerOptions, most: int
    ) -> None:
        listed = [urls] if isinstance(urls, str) else list(urls)
        if not listed:
            raise SettingsError("the client needs the URL of a server: give 'http://127.0.0.1:8080'")
        if not 0.001 <= deadline_s <= 3600:
            raise SettingsError(f"deadline_s {clip(deadline_s)} must be from 0.001 to 3600 seconds: 0.25 is usual")
        if on_failure not in get_args(OnFailure):
            raise SettingsError(f"on_failure {clip(on_failure)} is unknown: write 'allow', 'deny' or 'raise'")
        if most < 1:
            raise SettingsError(f"max_connections {clip(most)} must be 1 or more: 100 is usual")
        if breaker.failures < 1 or not breaker.window_s > 0 or not breaker.open_s > 0:
            raise SettingsError(f"breaker {breaker} must have 1 failure or more, and times above 0 seconds")
        self._asked = [_Asked(url, breaker) for url in listed]
        self._deadline_s = deadline_s
        self._on_failure = on_failure
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        states = ", ".join(f"{one.server.url} {one.breaker.state}" for one in self._asked)
        return f"{states}; deadline {self._deadline_s:g} s, on_failure {self._on_failure}"

    @property
    def tls(self) -> bool:
        """Whether any server is asked over TLS."""
        return any(one.server.tls for one in self._asked)

    def check(self, check: Check) -> Steps[Answer]:
        """Steps of one check; see `Client.check`."""
        told = yield from self._ask(b"POST", "/v1/check", _read_check, _body_of(check), repeatable=check.cost == 0)
        answer = self._unheard(told.reason) if isinstance(told, TransportFailure) else told
        if isinstance(answer, TidegateError):
            raise answer
        return answer

    def check_many(self, checks: Sequence[Check]) -> Steps[list[Answer | TidegateError]]:
        """Steps of several checks; see `Client.check_many`."""
        answers: list[Answer | TidegateError] = []
        for body, count, only_looks in _batches(checks):
            told = yield from self._ask(b"POST", "/v1/check/batch", _reader_of(count), body, repeatable=only_looks)
            if isinstance(told, list):
                answers += [self._unheard(one.reason) if isinstance(one, TransportFailure) else one for one in told]
            else:
                answers += [self._unheard(told.reason) if isinstance(told, TransportFailure) else told] * count
        return answers

    def usage(self, api_key: str | None, ip: str | None) -> Steps[UsageBody]:
        """Steps of a look at what is left; see `Client.usage`."""
        headers = []
        if api_key:
            if not (api_key.isascii() and api_key.isprintable()) or api_key != api_key.strip():
                raise InvalidApiKey("the API key has characters that no header can carry: copy it again")
            headers.append((b"X-API-Key", api_key.encode()))
        if ip is not None:
            headers.append((b"X-Real-IP", canonical_ip(ip).encode()))
        told = yield from self._ask(b"GET", "/v1/usage", _read_usage, b"", headers, repeatable=True)
        if isinstance(told, TransportFailure):
            raise _unavailable(told.reason)
        if isinstance(told, TidegateError):
            raise told
        return told

    def wait(self, check: Check, at_most_s: float) -> Steps[Answer]:
        """Steps of a check that is repeated until it passes; see `Client.wait`."""
        if not at_most_s >= 0:
            raise BadRequest(f"at_most_s {clip(at_most_s)} must be 0 or more seconds: 30 is usual", field="at_most_s")
        give_up_at = monotonic() + at_most_s
        while True:
            answer = yield from self.check(check)
            if answer.allowed or answer.retry_after is None:
                return answer
            left = give_up_at - monotonic()
            if answer.retry_after > left:
                return answer
            # All who were denied together would come back together.
            jitter_s = random.uniform(0.0, min(0.01 + answer.retry_after / 4, 1.0))
            yield Pause(min(answer.retry_after + jitter_s, left))

    def _ask(
        self,
        method: bytes,
        path: str,
        read: Callable[[Reply], T],
        body: bytes,
        more: Sequence[tuple[bytes, bytes]] = (),
        *,
        repeatable: bool,
    ) -> Steps[T | TidegateError | TransportFailure]:
        """Ask one server after the other, until one gives an answer that is Tidegate's.

        The next is asked only where the question cannot have been counted, or may be asked twice because it counts nothing.

        Args:
            method: of HTTP.
            path: of the data plane.
            read: reads an answer of 200 or 429; raises ValueError or MsgspecError where it is none of Tidegate's.
            body: JSON, or empty.
            more: headers besides the usual ones.
            repeatable: whether the question counts nothing.

        Returns:
            What was read, what the server refused, or why nobody was heard.
        """
        answer_by = monotonic() + self._deadline_s
        unheard: list[str] = []
        for place, one in enumerate(self._asked):
            now = monotonic()
            if now >= answer_by:
                break
            with self._lock:
                admitted = one.breaker.admits(now)
            if not admitted:
                unheard.append(f"{one.server.url} {one.failure}, and is left alone for a while")
                continue
            headers = [(b"Host", one.host), (b"User-Agent", _AGENT), (b"Accept", b"application/json"), *more]
            if body:
                headers += [(b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(body))]
            target = (one.server.path + path).encode("ascii")
            # A server that takes no connection may use its share of the time, so that there is some left for the next.
            connect_by = now + (answer_by - now) / (len(self._asked) - place)
            reply = yield HttpRequest(one.server, method, target, headers, body, connect_by, answer_by)
            assert reply is not None
            told = reply if isinstance(reply, TransportFailure) else _understood(reply, read)
            self._note(one, told if isinstance(told, TransportFailure) else None)
            if isinstance(told, CatalogUnavailable):
                # It charged nothing, and another server may know the key.
                told = TransportFailure(f"answered {told.code}: {told.message}", sent=False)
            if not isinstance(told, TransportFailure):
                return told
            unheard.append(f"{one.server.url} {told.reason}")
            if told.sent and not repeatable:
                break
        return TransportFailure("; ".join(unheard) or f"no answer within {self._deadline_s:g} s", sent=True)

    def _note(self, one: _Asked, failure: TransportFailure | None) -> None:
        """Tell the breaker, and the log when that changes whether the server is asked."""
        if failure is not None and not failure.its_fault:
            return
        breaker = one.breaker
        if failure is None and breaker.state is BreakerState.CLOSED:
            return
        with self._lock:
            before = breaker.state
            if failure is None:
                breaker.succeeded()
            else:
                one.failure = failure.reason
                breaker.failed(monotonic())
            after = breaker.state
        if before is BreakerState.CLOSED and after is BreakerState.OPEN:
            logger.warning(
                "%s %s: it is asked again every %g s, and where no other server answers, on_failure=%r holds",
                one.server.url,
                one.failure,
                breaker.options.open_s,
                self._on_failure,
            )
        elif before is not BreakerState.CLOSED and after is BreakerState.CLOSED:
            logger.info("%s answers again", one.server.url)

    def _unheard(self, reason: str) -> Answer | TidegateError:
        if self._on_failure == "raise":
            return _unavailable(reason)
        allowed = self._on_failure == "allow"
        return Answer(allowed, None, None, None, 0.0 if allowed else 1.0, None, None, True, failure=reason)


_AGENT: Final = f"tidegate-client/{__version__}".encode()


def _body_of(check: Check) -> bytes:
    """The check as the body of `POST /v1/check`."""
    body = CheckRequest(check.path, check.method, check.api_key, check.ip, check.cost)
    try:
        return _encode(body)
    except UnicodeEncodeError:
        # Half of a character that takes two: such a key is none, and that is the server's to say.
        key = (check.api_key or "").encode(errors="replace").decode()
        return _encode(msgspec.structs.replace(body, api_key=key))


def _batches(checks: Sequence[Check]) -> Iterator[tuple[bytes, int, bool]]:
    """Bodies that a server takes, how many checks are in each, and whether these count nothing."""
    pieces: list[bytes] = []
    size = 0
    only_looks = True
    for check in checks:
        piece = _body_of(check)
        if pieces and (len(pieces) == MAX_BATCH or size + len(piece) + 1 > MAX_BATCH_BYTES - 64):
            yield b'{"checks":[' + b",".join(pieces) + b"]}", len(pieces), only_looks
            pieces, size, only_looks = [], 0, True
        pieces.append(piece)
        size += len(piece) + 1
        only_looks = only_looks and check.cost == 0
    if pieces:
        yield b'{"checks":[' + b",".join(pieces) + b"]}", len(pieces), only_looks


def _understood(reply: Reply, read: Callable[[Reply], T]) -> T | TidegateError | TransportFailure:
    """What an answer says: what was read, what was refused, or why it is none of Tidegate's."""
    try:
        if reply.status == 200 or (reply.status == 429 and not reply.body.startswith(b'{"error":')):
            return read(reply)
        told = _error(_ERROR.decode(reply.body))
    except (msgspec.MsgspecError, ValueError):
        return TransportFailure(f"answered {reply.status} with a body that Tidegate does not send: check the URL", sent=True)
    return TransportFailure(f"answered {reply.status}: {told}", sent=True) if isinstance(told, str) else told


def _read_check(reply: Reply) -> Answer:
    headers = tuple(
        (lower.decode("latin-1"), value.decode("latin-1"))
        for name, value in reply.headers
        if (lower := name.lower()) in _LIMIT_HEADERS
    )
    return _answer(_DECISION.decode(reply.body), headers)


def _read_usage(reply: Reply) -> UsageBody:
    return _USAGE.decode(reply.body)


def _reader_of(count: int) -> Callable[[Reply], list[Answer | TidegateError | TransportFailure]]:
    """What reads a batch of that many answers."""

    def read(reply: Reply) -> list[Answer | TidegateError | TransportFailure]:
        decisions = _BATCH.decode(reply.body).decisions
        if len(decisions) != count:
            raise ValueError(f"{len(decisions)} answers to {count} checks")
        return list(map(_read_one, decisions))

    return read


def _read_one(raw: msgspec.Raw) -> Answer | TidegateError | TransportFailure:
    if not bytes(raw).startswith(b'{"error":'):
        return _answer(_DECISION.decode(raw))
    told = _error(_ERROR.decode(raw))
    return TransportFailure(f"the limiter answered {told}", sent=False) if isinstance(told, str | CatalogUnavailable) else told


def _answer(body: DecisionBody, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    return Answer(*msgspec.structs.astuple(body), headers=headers)


def _error(body: _ErrorBody) -> TidegateError | str:
    """The error that a server told; its code and message where it is none of those that callers are told of."""
    told = body.error
    kind = _ERRORS.get(told.code)
    if kind is None:
        return f"{told.code} {told.message}"
    error = kind(told.message)
    error.details = dict(told.details)
    return error


def _unavailable(reason: str) -> LimiterUnavailable:
    return LimiterUnavailable(f"the limiter was not heard: {reason}")
