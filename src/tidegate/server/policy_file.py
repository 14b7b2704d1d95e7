"""The policy file of an instance: applied to its catalog at start and on every change, or refused with its reason kept."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.doors.responses import encode
from tidegate.errors import CatalogError, PolicyError
from tidegate.policy.file_watcher import watch_policy
from tidegate.policy.model import Policy
from tidegate.policy.notify import require_secrets
from tidegate.policy.toml_reader import load_policy
from tidegate.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


class PolicyFile:
    """Applies the file to the catalog.

    Args:
        catalog: it is applied to.
        metrics: count what was applied and refused.
    """

    def __init__(self, path: Path, catalog: SqlCatalog, metrics: Metrics) -> None:
        self._path = path
        self._catalog = catalog
        self._metrics = metrics
        self._error: str | None = None
        self._refused_at_start: str | None = None

    async def apply_first(self) -> None:
        """Apply the file; if it is invalid and the catalog has a policy, keep that instead of failing.

        Raises:
            PolicyError: if the file is refused and the catalog holds no tier.
            CatalogError: if the catalog refuses it and holds no tier.
        """
        try:
            policy = load_policy(self._path)
            require_secrets(policy.notify)
            await self._catalog.apply_policy(policy, _digest(policy))
        except (PolicyError, CatalogError) as error:
            if not await self._catalog.tier_names():
                raise
            refusal = error if isinstance(error, PolicyError) else PolicyError(error.message, str(self._path))
            self._refused(refusal)
            self._refused_at_start = str(refusal)

    async def watch(self, cached: CachedCatalog, poll: Callable[[], Awaitable[object]], again: asyncio.Event) -> None:
        """Apply the file whenever it changes, until cancelled.

        Args:
            cached: reports the active version.
            poll: makes a change active in this process.
            again: set to read the file even if it looks unchanged.
        """

        async def apply(policy: Policy) -> None:
            await self.apply(policy, cached, poll)

        await watch_policy(self._path, apply, self._refused, again=again)

    async def apply(self, policy: Policy, cached: CachedCatalog, poll: Callable[[], Awaitable[object]]) -> None:
        """Apply a policy that was read from the file.

        Raises:
            CatalogError: if the catalog refuses it.
            PolicyError: if a secret that it names is not there.
        """
        require_secrets(policy.notify)
        changed = await self._catalog.apply_policy(policy, _digest(policy))
        self._metrics.policy_valid = True
        self._error = None
        if changed:
            await poll()
            self._metrics.policy_reloads += 1
            logger.info("policy file applied, catalog version %d", cached.version)
        else:
            logger.info("policy file unchanged, catalog version %d", cached.version)

    def _refused(self, error: PolicyError) -> None:
        self._metrics.policy_valid = False
        self._error = str(error)
        refused_at_start, self._refused_at_start = self._refused_at_start, None
        # The watcher first reads the file that was already refused at start: do not report it twice.
        if self._error != refused_at_start:
            self._metrics.policy_reload_errors += 1
            logger.error("policy file refused, the last valid policy in the catalog stays active: %s", error)

    async def ping(self) -> None:
        """For `/health`.

        Raises:
            PolicyError: if the file is refused as it is now.
        """
        if self._error is not None:
            raise PolicyError(f"file refused, the last valid policy in the catalog stays active: {self._error}")


def _digest(policy: Policy) -> str:
    return hashlib.sha256(encode(policy)).hexdigest()
