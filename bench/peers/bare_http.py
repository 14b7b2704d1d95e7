"""The least that HTTP costs in Python: an asyncio protocol with httptools that answers every request with the same bytes."""

from __future__ import annotations

import asyncio
import sys

import httptools
import uvloop

_ANSWER = (
    b"HTTP/1.1 204 No Content\r\n"
    b'ratelimit-policy: "100000000/minute";q=100000000;w=60, "tier 900000000/day";q=900000000;w=86400\r\n'
    b'ratelimit: "100000000/minute";r=99999999;t=41\r\n'
    b"x-ratelimit-limit: 100000000\r\n"
    b"x-ratelimit-remaining: 99999999\r\n"
    b"x-ratelimit-reset: 1795527651\r\n"
    b"cache-control: no-store\r\n\r\n"
)


class Bare(asyncio.Protocol):
    """Reads what a check needs from a request, and decides nothing."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)
        self._headers: dict[bytes, bytes] = {}

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_message_complete(self) -> None:
        headers, self._headers = self._headers, {}
        headers.get(b"x-api-key")
        headers.get(b"x-original-uri")
        self._transport.write(_ANSWER)  # type: ignore[attr-defined]


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Bare, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
