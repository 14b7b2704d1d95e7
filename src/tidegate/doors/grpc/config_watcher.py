"""Watches `[envoy] config`: a valid change is applied within a second; an invalid one is refused, the last one stays active."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tidegate.doors.grpc.domains import FileDomain
from tidegate.doors.grpc.ratelimit_file import RateLimitFile, load_ratelimit, parse_ratelimit, ratelimit_files, read_ratelimit
from tidegate.doors.grpc.service import RateLimitService
from tidegate.errors import PolicyError
from tidegate.policy.file_watcher import Look, identity_of, is_old, watch

logger = logging.getLogger(__name__)


def load_domains(path: Path, policy_domain: str) -> dict[str, FileDomain]:
    """Read the limits of all domains, by domain.

    Args:
        path: file or directory.
        policy_domain: the domain of the policy, which the files must not define.

    Raises:
        PolicyError: with file, line and reason.
    """
    return _domains(load_ratelimit(path), policy_domain, path)


async def watch_domains(
    path: Path,
    policy_domain: str,
    service: RateLimitService,
    refused: Callable[[PolicyError], None],
    applied: Callable[[], None],
    again: asyncio.Event | None = None,
) -> None:
    """Watch the files until cancelled.

    Args:
        path: file or directory.
        policy_domain: the domain of the policy, which the files must not define.
        service: receives the limits.
        refused: called with the reason when a change is refused.
        applied: called after each change that was applied.
        again: see `watch`.
    """
    first = True

    async def take(content: Any) -> None:
        nonlocal first
        read = parse_ratelimit(list(content))
        service.domains = _domains(read, policy_domain, path)
        for note in (note for each in read for note in each.notes):
            logger.warning("%s", note)
        applied()
        if not first:
            logger.info("[envoy] config applied: %s, %d domains", path, len(read))
        first = False

    await watch(lambda last: _look(path, last), take, refused, again=again)


def _domains(read: list[RateLimitFile], policy_domain: str, path: Path) -> dict[str, FileDomain]:
    domains: Mapping[str, FileDomain] = {each.domain: FileDomain(each) for each in read}
    if policy_domain in domains:
        raise PolicyError(
            f"domain {policy_domain!r} is already used by the policy; rename it here or in the setting envoy.domain", str(path)
        )
    return dict(domains)


def _look(path: Path, last: Look) -> Look:
    try:
        files = [(str(file), *identity_of(file)) for file in ratelimit_files(path)]
        identity = tuple((name, each) for name, each, _ in files)
        if identity == last.identity and all(is_old(changed_s) for _, _, changed_s in files):
            return last
        return Look(identity, tuple(read_ratelimit(path)))
    except PolicyError as error:
        return Look(None, None, error)
    except OSError as error:
        return Look(None, None, PolicyError(f"the configuration cannot be read: {error.strerror or error}", str(path)))
