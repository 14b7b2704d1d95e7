"""The data plane without a server: requests whose header values are text as UTF-8 with `surrogateescape` decodes bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

from tests.raw_http import RawAnswer


class RsgiHeaders:
    """Headers as the data plane's server hands them over: nothing left out, every occurrence in order."""

    def __init__(self, pairs: Sequence[tuple[str, bytes]]) -> None:
        self.size = sum(len(name) + len(value) for name, value in pairs)
        self._pairs = [(name.lower(), value.decode("utf-8", "surrogateescape")) for name, value in pairs]

    def get(self, key: str, default: Any = None) -> Any:
        values = self.get_all(key)
        return values[0] if values else default

    def get_all(self, key: str) -> list[str]:
        return [value for name, value in self._pairs if name == key]

    def items(self) -> list[tuple[str, str]]:
        return list(self._pairs)

    def __contains__(self, key: str) -> bool:
        return any(name == key for name, _ in self._pairs)


class _Proto:
    """The answering side of one request, which has arrived."""

    complete = True

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.answer = RawAnswer(0, {}, b"")

    async def __call__(self) -> bytes:
        return self._body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._body

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.answer = RawAnswer(status, dict(headers), body)

    def response_empty(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.answer = RawAnswer(status, dict(headers), b"")


async def call(
    app: Any,
    path: str,
    headers: Sequence[tuple[str, bytes]] = (),
    method: str = "GET",
    body: bytes = b"",
    client: str = "127.0.0.1:50000",
    **fields: Any,
) -> RawAnswer:
    """Make one request to an RSGI app.

    Args:
        path: of the scope.
        headers: names and values as bytes.
        method: of the request.
        body: of the request.
        client: address and port of the peer.
        fields: further fields of the scope.
    """
    fields = {"query_string": "", **fields}
    scope = SimpleNamespace(proto="http", method=method, path=path, client=client, headers=RsgiHeaders(headers), **fields)
    proto = _Proto(body)
    await app.__rsgi__(scope, proto)
    return proto.answer
