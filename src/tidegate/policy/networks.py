"""Networks (CIDR), and tables of many of them in which an address is found in about constant time.

A table has one dictionary for each prefix length. Trying all of them would cost up to 33 look-ups for an IPv4 address and 129 for
an IPv6 address. So networks longer than `HEAD_BITS` are grouped by their first bits: an address is compared only with the prefix
lengths that occur among networks with the same beginning, one or two of them in usual lists. For IPv4 a byte for each /20 comes
before that, the number of networks in it or around it: it answers for most addresses, from 1 MB that stays in the processor's
cache.
"""

from __future__ import annotations

import ipaddress
from typing import Final, TypeAlias

from tidegate.errors import PolicyError
from tidegate.policy.fields import short
from tidegate.timestamps import now_us

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

NEVER: Final = (1 << 63) - 1
"""The end of an entry without an end, µs since the epoch."""
NOT_FOUND: Final = -1
CLIENT_BITS: Final = 64
"""Prefix length that an IPv6 address without one gets: what limits count as one client."""

# A number that has reached 255 stays there: it is not known any more.
_ONE_MORE: Final = bytes(min(number + 1, 255) for number in range(256))
_ONE_LESS: Final = bytes(number if number in (0, 255) else number - 1 for number in range(256))
_MAX_TEXT: Final = 64
_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")


def parse_network(text: object) -> Network:
    """Read a network or an address.

    Args:
        text: `203.0.113.0/24`, `203.0.113.7`, `2001:db8::/48`; an IPv6 address without a prefix length is its /64, as limits
            count it. An IPv4 network mapped into IPv6 becomes IPv4.

    Raises:
        PolicyError: naming the text and the remedy.
    """
    if not isinstance(text, str) or len(text) > _MAX_TEXT or "%" in text:
        raise PolicyError(f"network {short(text)} is not valid: write 203.0.113.0/24, 2001:db8::/48 or an address")
    address, slash, _ = text.partition("/")
    try:
        if not slash and ":" in text:
            address_alone = ipaddress.IPv6Network(text)
            is_mapped = address_alone.subnet_of(_MAPPED)
            network: Network = address_alone if is_mapped else address_alone.supernet(new_prefix=CLIENT_BITS)
        else:
            network = ipaddress.ip_network(text)
    except ValueError:
        try:
            wide = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise PolicyError(f"network {short(text)} is not valid: write 203.0.113.0/24, 2001:db8::/48 or an address") from None
        raise PolicyError(
            f"network {short(text)} has bits of the address after its prefix: write {wide} for the network, or {address} for the "
            "address"
        ) from None
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        return ipaddress.IPv4Network((int(network.network_address) & 0xFFFF_FFFF, network.prefixlen - 96))
    return network


class NetworkTable:
    """Networks of one address family, each with the time at which it ends.

    Args:
        bits: of an address: 32 or 128.
    """

    HEAD_BITS: Final = {32: 16, 128: 32}

    FILTER_BITS: Final = 20
    FILTER_SHIFT: Final = 32 - FILTER_BITS

    __slots__ = ("_bits", "_counts", "_filter", "_filter_shift", "_head_shift", "_heads", "_lists", "_short", "_tables")

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._head_shift = bits - self.HEAD_BITS[bits]
        # Bits of the host part → network without them → end.
        self._tables: dict[int, dict[int, int]] = {}
        # The tables of networks that are shorter than a head, the longest prefix first.
        self._short: tuple[tuple[int, dict[int, int]], ...] = ()
        # First bits of an address → the tables with longer networks that begin so, the longest prefix first. Most heads share
        # one list with many others.
        self._heads: dict[int, tuple[tuple[int, dict[int, int]], ...]] = {}
        self._lists: dict[tuple[int, ...], tuple[tuple[int, dict[int, int]], ...]] = {}
        # Number of networks by head and bits of the host part.
        self._counts: dict[int, int] = {}
        # Numbers of networks, up to 255, by the first bits of an address; made with the first network. None for IPv6: too many.
        self._filter: bytearray | None = None
        self._filter_shift = bits - self.FILTER_BITS

    def __len__(self) -> int:
        """Number of networks."""
        return sum(map(len, self._tables.values()))

    def __bool__(self) -> bool:
        """Whether there are networks."""
        return bool(self._heads or self._short)

    @property
    def first_bits(self) -> bytearray:
        """By the first `FILTER_BITS` of an IPv4 address: 0 where no network contains it. The same object for the table's life."""
        if self._filter is None:
            self._filter = bytearray(1 << self.FILTER_BITS)
        return self._filter

    def add(self, network: int, prefix: int, until_us: int = NEVER) -> None:
        """Add a network, or give it another end.

        Args:
            network: its address.
            prefix: its prefix length.
            until_us: end, µs since the epoch.
        """
        shift = self._bits - prefix
        table = self._tables.setdefault(shift, {})
        known = network >> shift in table
        table[network >> shift] = until_us
        if known:
            return
        self._count(network, prefix, _ONE_MORE)
        if shift > self._head_shift:
            if len(table) == 1:
                self._list_short()
            return
        head = network >> self._head_shift
        key = head << 8 | shift
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] == 1:
            self._list_head(head, {*(each for each, _ in self._heads.get(head, ())), shift})

    def remove(self, network: int, prefix: int) -> None:
        """Remove a network; nothing happens if it is not in the table."""
        shift = self._bits - prefix
        table = self._tables.get(shift)
        if table is None or table.pop(network >> shift, None) is None:
            return
        self._count(network, prefix, _ONE_LESS)
        if shift > self._head_shift:
            if not table:
                self._list_short()
            return
        head = network >> self._head_shift
        key = head << 8 | shift
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key]
            self._list_head(head, {each for each, _ in self._heads[head] if each != shift})

    def end_of(self, network: int, prefix: int) -> int | None:
        """The end of exactly this network; None if it is not in the table."""
        shift = self._bits - prefix
        return self._tables.get(shift, {}).get(network >> shift)

    def find(self, address: int) -> int:
        """The prefix length of the longest network that contains an address and has not ended; `NOT_FOUND` if there is none.

        Costs 0.1 to 0.4 µs, however many networks there are.
        """
        if self._filter is not None and not self._filter[address >> self._filter_shift]:
            return NOT_FOUND
        listed = self._heads.get(address >> self._head_shift)
        if listed is not None:
            for shift, table in listed:
                until_us = table.get(address >> shift)
                if until_us is not None and (until_us == NEVER or until_us > now_us()):
                    return self._bits - shift
        for shift, table in self._short:
            until_us = table.get(address >> shift)
            if until_us is not None and (until_us == NEVER or until_us > now_us()):
                return self._bits - shift
        return NOT_FOUND

    def _count(self, network: int, prefix: int, change: bytes) -> None:
        """Change the numbers of networks by one, for all first bits that a network has."""
        if self._bits != 32:
            return
        begin = network >> self._filter_shift
        end = begin + (1 << max(self.FILTER_BITS - prefix, 0))
        numbers = self.first_bits
        numbers[begin:end] = numbers[begin:end].translate(change)

    def _list_short(self) -> None:
        self._short = tuple((shift, table) for shift, table in sorted(self._tables.items()) if shift > self._head_shift and table)

    def _list_head(self, head: int, shifts: set[int]) -> None:
        if not shifts:
            del self._heads[head]
            return
        key = tuple(sorted(shifts))
        listed = self._lists.get(key)
        if listed is None:
            listed = self._lists[key] = tuple((shift, self._tables[shift]) for shift in key)
        self._heads[head] = listed
