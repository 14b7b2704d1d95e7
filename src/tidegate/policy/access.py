"""Who is allowed or denied before anything is counted: the tables `[[access]]` of a policy.

An entry names networks, attributes, a customer or an API key. Within networks the longest prefix decides, and of two entries with
the same prefix the one that denies; everywhere else an entry that denies wins over one that allows. So what an operator blocks is
blocked, whatever else allows it, and an address can still be excepted from a wider network. The order of entries has no meaning.

An allowed check is charged to no limit. It must have a valid API key or token all the same, if it has one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Final

from tidegate.errors import PolicyError
from tidegate.policy.access_entries import AccessAction, AccessEntry
from tidegate.policy.attributes import MAX_ATTRIBUTES, MAX_VALUE, match_of
from tidegate.policy.fields import member_of, short
from tidegate.policy.match_index import MatchIndex
from tidegate.policy.networks import NEVER, Network, NetworkTable, parse_network

MAX_ENTRIES: Final = 1_000
MAX_NETWORKS: Final = 10_000
"""Most networks of one policy, over all its entries."""
MAX_CUSTOMER: Final = 64
KEY_ID_LENGTH: Final = 24
_HEX: Final = frozenset("0123456789abcdef")


def access_entry(
    action: object,
    networks: object = None,
    match: object = None,
    customer: object = None,
    api_key_id: object = None,
) -> AccessEntry:
    """Validate an entry.

    Args:
        action: allow or deny.
        networks: a list of networks and addresses, see `parse_network`; None for an entry that names something else.
        match: patterns by attribute, or None.
        customer: name, or None.
        api_key_id: 24 hex digits, or None.

    Raises:
        PolicyError: naming the field, its value and the remedy.
    """
    chosen = member_of(AccessAction, action, "action")
    if sum(given is not None for given in (networks, match, customer, api_key_id)) != 1:
        raise PolicyError(
            "an access entry names exactly one of 'from', 'match', 'customer' and 'api_key_id': write one [[access]] for each"
        )
    if networks is not None:
        return AccessEntry(chosen, networks=_networks(networks))
    if match is not None:
        conditions = match_of(match)
        if not conditions:
            raise PolicyError('match is empty: name an attribute, such as match = { user = "42" }')
        return AccessEntry(chosen, match=conditions)
    if customer is not None:
        return AccessEntry(chosen, customer=require_customer(customer))
    return AccessEntry(chosen, api_key_id=require_key_id(api_key_id))


def require_customer(name: object) -> str:
    """A customer's name.

    Raises:
        PolicyError: if it cannot be one.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_CUSTOMER or not name.isprintable():
        raise PolicyError(f"customer {short(name)} must be 1 to {MAX_CUSTOMER} printable characters")
    return name


def require_key_id(key_id: object) -> str:
    """The id of an API key.

    Raises:
        PolicyError: if it cannot be one.
    """
    if not isinstance(key_id, str) or len(key_id) != KEY_ID_LENGTH or not _HEX.issuperset(key_id):
        raise PolicyError(
            f"api_key_id {short(key_id)} must be {KEY_ID_LENGTH} lower-case hex digits, as 'tidegate keys list' prints it; never "
            "the key itself"
        )
    return key_id


def require_bounded(entries: Iterable[AccessEntry]) -> None:
    """Refuse more entries or networks than one policy may have.

    Raises:
        PolicyError: naming the number and the remedy.
    """
    listed = tuple(entries)
    if len(listed) > MAX_ENTRIES:
        raise PolicyError(
            f"access has {len(listed)} entries: at most {MAX_ENTRIES} are possible; put networks of one action into one"
        )
    networks = sum(len(entry.networks) for entry in listed)
    if networks > MAX_NETWORKS:
        raise PolicyError(
            f"access names {networks} networks: at most {MAX_NETWORKS} are possible; add the others as blocks of the admin API"
        )


class ExactAttributes:
    """Sets of attributes with exact values, each with the time at which it ends."""

    __slots__ = ("_by_names",)

    def __init__(self) -> None:
        self._by_names: dict[tuple[str, ...], dict[tuple[str | None, ...], int]] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._by_names)

    def __len__(self) -> int:
        """Number of sets."""
        return sum(map(len, self._by_names.values()))

    def add(self, attributes: Mapping[str, str], until_us: int = NEVER) -> None:
        """Add attributes, all of which a check must have; or give them another end."""
        names = tuple(sorted(attributes))
        self._by_names.setdefault(names, {})[tuple(attributes[name] for name in names)] = until_us

    def remove(self, attributes: Mapping[str, str]) -> None:
        """Remove attributes; nothing happens if they are not there."""
        names = tuple(sorted(attributes))
        by_values = self._by_names.get(names)
        if by_values is not None:
            by_values.pop(tuple(attributes[name] for name in names), None)
            if not by_values:
                del self._by_names[names]

    def end_of(self, attributes: Mapping[str, str]) -> int | None:
        """The end of exactly these attributes; None if they are not there."""
        names = tuple(sorted(attributes))
        return self._by_names.get(names, {}).get(tuple(attributes[name] for name in names))

    def find(self, attributes: Mapping[str, str], now_us: int) -> dict[str, str] | None:
        """The attributes added that a check has; None if there are none. Costs 0.3 µs for each different set of names."""
        for names, by_values in self._by_names.items():
            values = tuple([attributes.get(name) for name in names])
            until_us = by_values.get(values)
            if until_us is not None and until_us > now_us:
                return {name: attributes[name] for name in names}
        return None


class AccessSet:
    """What the entries of one action name, ready to be compared with checks.

    Attributes:
        ipv4: networks.
        ipv6: networks.
        api_keys: ends by id of the key.
        customers: ends by name.
        patterns: entries by patterns of attributes.
    """

    __slots__ = ("api_keys", "customers", "ipv4", "ipv6", "patterns")

    def __init__(self, entries: Iterable[AccessEntry] = ()) -> None:
        self.ipv4 = NetworkTable(32)
        self.ipv6 = NetworkTable(128)
        self.api_keys: dict[str, int] = {}
        self.customers: dict[str, int] = {}
        self.patterns: MatchIndex[AccessEntry] = MatchIndex()
        for entry in entries:
            for text in entry.networks:
                network = ipaddress.ip_network(text)
                self.table_of(network).add(int(network.network_address), network.prefixlen)
            if entry.match:
                self.patterns.add(entry.match, entry)
            if entry.customer:
                self.customers[entry.customer] = NEVER
            if entry.api_key_id:
                self.api_keys[entry.api_key_id] = NEVER

    def table_of(self, network: Network) -> NetworkTable:
        """The table for networks of this family."""
        return self.ipv4 if network.version == 4 else self.ipv6

    def __bool__(self) -> bool:
        """Whether anything is named."""
        return bool(self.ipv4 or self.ipv6 or self.api_keys or self.customers or self.patterns)


class CompiledAccess:
    """The entries of a policy, ready to be compared with checks.

    Attributes:
        allowed: what entries that allow name.
        denied: what entries that deny name.
        active: whether there are any.
    """

    __slots__ = ("active", "allowed", "denied")

    def __init__(self, entries: Iterable[AccessEntry] = ()) -> None:
        listed = tuple(entries)
        self.allowed = AccessSet(entry for entry in listed if entry.action is AccessAction.ALLOW)
        self.denied = AccessSet(entry for entry in listed if entry.action is AccessAction.DENY)
        self.active = bool(listed)


def require_exact_attributes(given: Mapping[str, object]) -> dict[str, str]:
    """Validate the attributes of a block: exact values, all of which a check must have.

    Raises:
        PolicyError: naming what is wrong and the remedy.
    """
    if not given:
        raise PolicyError('attribute is empty: name one, such as {"user": "42"}')
    if len(given) > MAX_ATTRIBUTES:
        raise PolicyError(f"attribute has {len(given)} names: at most {MAX_ATTRIBUTES} are possible")
    entries = match_of(given)
    for name, value in entries:
        if "*" in value:
            raise PolicyError(
                f"attribute {name!r} has the value {short(value)}: a block is for one exact value of at most {MAX_VALUE} "
                "characters; for patterns use [[access]] with match in the policy"
            )
    return dict(entries)


def _networks(given: object) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not given:
        raise PolicyError(f'from {short(given)} is not a list of networks: write from = ["203.0.113.0/24"]')
    if len(given) > MAX_NETWORKS:
        raise PolicyError(f"from has {len(given)} networks: at most {MAX_NETWORKS} are possible")
    try:
        # Each once, in the order given.
        return tuple(dict.fromkeys(str(parse_network(text)) for text in given))
    except PolicyError as error:
        raise PolicyError(f"from names a {error.reason}") from None
