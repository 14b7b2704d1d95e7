"""What every check is compared with before anything is counted: `[[access]]` of the policy, and blocks.

`CachedCatalog` keeps it up to date. A policy that is known to be replaced is not used while the catalog answers; while it does
not, the policy read last goes on holding, without end.
"""

from __future__ import annotations

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
    """

    __slots__ = ("_entries", "active", "blocks", "last", "policy")

    def __init__(self) -> None:
        self.policy: CompiledAccess | None = None
        self.last: CompiledAccess | None = None
        self.blocks = BlockIndex()
        self.active = True
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
        self.active = self.policy is None or self.policy.active or bool(self.blocks)
