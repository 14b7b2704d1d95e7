"""What every check is compared with before anything is counted: `[[access]]` of the policy, and blocks.

`CachedCatalog` keeps it up to date. A policy that is known to be replaced is not used while the catalog answers; while it does
not, the policy read last goes on holding, without end.
"""

from __future__ import annotations

from collections.abc import Callable

from tidegate.catalog.blocks import BlockIndex
from tidegate.policy.access import CompiledAccess
from tidegate.policy.access_entries import AccessEntry

NOTHING = CompiledAccess()


class AccessLists:
    """The lists of one process.

    Attributes:
        active: whether checks have to be compared with anything; the only thing that a check reads where there is nothing.
        policy: entries of the policy; None while they have to be loaded.
        last: entries of the policy that was loaded last; None if none was.
        blocks: those that hold.
        ipv4: `NetworkTable.first_bits` and `NetworkTable.find` of each table of IPv4 networks that has any.
        find_ipv6: the same of IPv6 networks.
        names_attributes: whether attributes have to be compared.
        names_callers: whether API keys or customers have to be compared.
    """

    __slots__ = (
        "_entries",
        "active",
        "blocks",
        "find_ipv6",
        "ipv4",
        "last",
        "names_attributes",
        "names_callers",
        "policy",
    )

    def __init__(self) -> None:
        self.policy: CompiledAccess | None = None
        self.last: CompiledAccess | None = None
        self.blocks = BlockIndex()
        self.active = True
        self.ipv4: tuple[tuple[bytearray, Callable[[int], int]], ...] = ()
        self.find_ipv6: tuple[Callable[[int], int], ...] = ()
        self.names_attributes = self.names_callers = False
        self._entries: tuple[AccessEntry, ...] = ()

    def replace_policy(self, entries: tuple[AccessEntry, ...]) -> None:
        """Use these entries of a policy."""
        if self.last is None or entries != self._entries:
            self.last = CompiledAccess(entries) if entries else NOTHING
            self._entries = entries
        self.policy = self.last
        self._note()

    def forget_policy(self) -> None:
        """The policy was replaced, or is too old: the next check loads it."""
        self.policy = None
        self.active = True

    def replace_blocks(self, blocks: BlockIndex) -> None:
        """Use these blocks; also called when they were changed."""
        self.blocks = blocks
        self._note()

    def _note(self) -> None:
        policy, blocks = self.last or NOTHING, self.blocks
        named = (blocks.named, policy.denied, policy.allowed)
        self.ipv4 = tuple((each.ipv4.first_bits, each.ipv4.find) for each in named if each.ipv4)
        self.find_ipv6 = tuple(each.ipv6.find for each in named if each.ipv6)
        self.names_attributes = bool(blocks.attributes) or any(each.patterns for each in named)
        self.names_callers = any(each.api_keys or each.customers for each in named)
        self.active = self.policy is None or policy.active or bool(blocks)
