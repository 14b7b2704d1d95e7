"""Heads that are read by one regular expression, because many requests have the same headers in the same order.

The requests that a proxy sends differ in their values alone. Once llhttp has read two such requests in a row on one connection,
the layout of their head is compiled: the request line and each name as they came, and for each value what may be in it. What
matches is exactly one request without a body, which llhttp reads in the same way; every other request is left to llhttp.

The work that clients can cause is bounded: a layout is compiled only if it came twice in a row, at most `MAX_LAYOUTS` are in one
table, and a full table is emptied at most once in `RENEW_S` seconds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

MAX_LAYOUTS: Final = 64
MAX_LAYOUT_HEADERS: Final = 32
MAX_LAYOUT_BYTES: Final = 4096
"""Maximum size of a head that is read by a layout."""
RENEW_S: Final = 60.0

_LINE: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): [!-~]")
_VALUE: Final = rb"(?! )[ -~]*+(?<! )"
"""Printable ASCII without a space at either end, and not empty: the space behind the colon is the only one."""
_KEEP_ALIVE: Final = rb"[Kk]eep-[Aa]live"
"""The one value of `Connection` that says nothing new in HTTP/1.1."""
_CLOSING: Final = frozenset(
    (
        b"content-length",
        b"expect",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""They say how a message or its connection goes on; a request with one of them is left to llhttp."""

Facts = tuple[bytes, ...]


class HeadLayout:
    """The layout of a head.

    Args:
        pattern: matches heads of this layout.
        places: numbers of the groups with the values that are read.
        target: of the request line.

    Attributes:
        match: matches all of a head of this layout, in whose groups `places` are what `read` gives.
    """

    __slots__ = ("match", "places", "target")

    def __init__(self, pattern: re.Pattern[bytes], places: Sequence[int], target: bytes) -> None:
        self.target = target
        self.match = pattern.fullmatch
        self.places = tuple(places)

    def read(self, data: bytes) -> Facts | None:
        """The values that the app reads, empty where there are none; None for everything else than one head of this layout."""
        found = self.match(data)
        return None if found is None else found.group(*self.places)


class HeadLayouts:
    """The layouts of one server.

    Args:
        target: requests for this target are read by layouts.
        patterns: what is read: by name in lower case a regular expression with one group for its values.
        accepts: whether a request with these names, in lower case, can be read by them.
        clock: monotonic time, s.
    """

    def __init__(
        self,
        target: bytes,
        patterns: Mapping[bytes, bytes],
        accepts: Callable[[frozenset[bytes]], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = target
        self._patterns = dict(patterns)
        self._accepts = accepts
        self._clock = clock
        self._known: dict[bytes, HeadLayout | None] = {}
        self._renewable_from = clock()

    def learn(self, data: bytes) -> HeadLayout | None:
        """The layout of a head, compiled if it is new.

        Args:
            data: one whole `GET` request for the target, without a body, without a repeated header, as llhttp has accepted it.

        Returns:
            The layout; None where such heads are not read by layouts, or the table is full.
        """
        if len(data) > MAX_LAYOUT_BYTES:
            return None
        first, *lines = data.split(b"\r\n")
        if first != b"GET " + self.target + b" HTTP/1.1" or lines[-2:] != [b"", b""] or len(lines) > MAX_LAYOUT_HEADERS + 2:
            return None
        names = []
        for line in lines[:-2]:
            found = _LINE.match(line)
            if found is None:
                return None
            names.append(found[1])
        key = b"\n".join(names)
        if key in self._known:
            return self._known[key]
        if len(self._known) >= MAX_LAYOUTS:
            if self._clock() < self._renewable_from:
                return None
            self._known.clear()
        if not self._known:
            self._renewable_from = self._clock() + RENEW_S
        layout = self._known[key] = self._compile(names)
        return layout

    def _compile(self, names: Sequence[bytes]) -> HeadLayout | None:
        lower = [name.lower() for name in names]
        present = frozenset(lower)
        if len(present) < len(lower) or b"host" not in present or not _CLOSING.isdisjoint(present) or not self._accepts(present):
            return None
        read = [name for name in lower if name in self._patterns]
        allowed = {b"connection": _KEEP_ALIVE, **self._patterns}
        lines = [re.escape(name) + b": " + allowed.get(each, _VALUE) + b"\r\n" for name, each in zip(names, lower, strict=True)]
        # The group that is always empty takes the place of headers that do not come.
        pattern = re.compile(b"GET " + re.escape(self.target) + rb" HTTP/1\.1\r\n" + b"".join(lines) + b"\r\n()")
        places = [read.index(name) + 1 if name in read else len(read) + 1 for name in self._patterns]
        return HeadLayout(pattern, places, self.target)


def values_of(data: bytes) -> dict[bytes, bytes]:
    """The headers of a head that a layout has matched, names in lower case."""
    values = {}
    for line in data[:-4].split(b"\r\n")[1:]:
        name, _, value = line.partition(b": ")
        values[name.lower()] = value
    return values
