"""Watching the policy file, and other files: every change of their content is applied or refused, once.

A file is looked at five times a second: its identity, size and time, and only where one of them changed its content. That
follows every way in which files change (written in place, renamed over, a link to a directory swapped as Kubernetes does), on
every kind of mount; file system events are lost on network mounts and have to be set up anew after each swap. A change counts
once two looks in a row see the same content, so a file that is being written is not refused by halves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from tidegate.errors import PolicyError, TidegateError
from tidegate.policy.model import Policy
from tidegate.policy.toml_reader import parse_policy, read_policy_text

POLL_S: Final = 0.2
_TIME_RESOLUTION_S: Final = 2.0
"""A file changed so recently is read again whatever its time says: file systems keep times to 2 s (FAT) or finer."""


class Look(msgspec.Struct, frozen=True):
    """What one look saw.

    Args:
        identity: of the files, without reading them; None if they have to be read.
        content: what they hold, to be compared; None where they cannot be read.
        refusal: why they cannot.
    """

    identity: tuple[object, ...] | None = None
    content: object = None
    refusal: PolicyError | None = None


async def watch(
    look: Callable[[Look], Look],
    apply: Callable[[Any], Awaitable[None]],
    refused: Callable[[PolicyError], None],
    poll_s: float = POLL_S,
    again: asyncio.Event | None = None,
) -> None:
    """Watch files until cancelled.

    The content at the start counts as a change: what happened between its first reading and now is not missed.
    `apply` must therefore be idempotent.

    Args:
        look: given what the last look saw, looks again; runs in a thread.
        apply: applies content; a `PolicyError` refuses it.
        refused: callback run with the reason why content is not applied; once for each.
        poll_s: time between two looks, s.
        again: set to have the present content read and judged once more, whether it changed or not.
    """
    judged = last = Look()
    while True:
        if again is not None and again.is_set():
            again.clear()
            judged = last = Look()
        # In a thread: on a network mount that hangs, this must not stop the checks.
        now = await asyncio.to_thread(look, last)
        settled = (now.identity, *_content_of(now)) == (last.identity, *_content_of(last))
        if settled and _content_of(now) != _content_of(judged) and await _judge(now, apply, refused):
            judged = now
        last = now
        await asyncio.sleep(poll_s)


async def watch_policy(
    path: Path,
    apply: Callable[[Policy], Awaitable[None]],
    refused: Callable[[PolicyError], None],
    poll_s: float = POLL_S,
    again: asyncio.Event | None = None,
) -> None:
    """Watch the policy file until cancelled; see `watch`.

    Args:
        path: the policy file, or a link to it.
        apply: applies a policy.
        refused: callback run with the reason why a file is not applied; once for each content.
        poll_s: time between two looks, s.
        again: see `watch`.
    """

    async def take(text: str) -> None:
        try:
            # In a thread as well: the checks go on while a long file is read.
            await apply(await asyncio.to_thread(parse_policy, text, str(path)))
        except PolicyError:
            raise
        except TidegateError as error:
            refusal = PolicyError(error.message, str(path))
            # A catalog that does not answer is not the file's fault: the same content is tried again.
            raise (_NotNow(refusal) if error.status == 503 else refusal) from None

    await watch(lambda last: _look(path, last), take, refused, poll_s, again)


class _NotNow(Exception):
    """Content that cannot be applied now, and may be later."""

    def __init__(self, refusal: PolicyError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


async def _judge(look: Look, apply: Callable[[Any], Awaitable[None]], refused: Callable[[PolicyError], None]) -> bool:
    """Apply content, or refuse it. Returns whether that is final for this content."""
    if look.refusal is not None:
        refused(look.refusal)
        return True
    try:
        await apply(look.content)
    except PolicyError as error:
        refused(error)
    except _NotNow as later:
        refused(later.refusal)
        return False
    return True


def _content_of(look: Look) -> tuple[object, str | None]:
    return look.content, None if look.refusal is None else look.refusal.message


def _look(path: Path, last: Look) -> Look:
    try:
        identity, changed_s = identity_of(path)
        if identity == last.identity and is_old(changed_s):
            return last
        return Look(identity, read_policy_text(path))
    except PolicyError as error:
        return Look(None, None, error)
    except OSError as error:
        return Look(None, None, PolicyError(f"the policy file cannot be read: {error.strerror or error}", str(path)))


def identity_of(path: Path) -> tuple[tuple[int, ...], float]:
    """The identity of a file, which differs from that of a replacement, and when it changed last.

    Args:
        path: the file, or a link to it.

    Returns:
        The identity, and s since the epoch.

    Raises:
        OSError: if it cannot be looked at.
    """
    status = path.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return identity, max(status.st_mtime, status.st_ctime)


def is_old(changed_s: float) -> bool:
    """Whether a file that changed then would show another time by now, had it changed again.

    Args:
        changed_s: s since the epoch.

    Returns:
        Whether its time can be trusted.
    """
    return time.time() - changed_s > _TIME_RESOLUTION_S
