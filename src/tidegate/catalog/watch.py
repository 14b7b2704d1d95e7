"""Watching the policy file: every change of its content is taken into force or refused, once.

The file is looked at five times a second: its identity, size and time, and only where one of them changed its content. That
follows every way in which files change (written in place, renamed over, a link to a directory swapped as Kubernetes does), on
every kind of mount; file system events are lost on network mounts and have to be set up anew after each swap. A change counts
once two looks in a row see the same content, so a file that is being written is not refused by halves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from tidegate.catalog.policy_file import parse_policy, read_policy_text
from tidegate.errors import PolicyError, TidegateError
from tidegate.policy import Policy

POLL_S: Final = 0.2
_TIME_RESOLUTION_S: Final = 2.0
"""A file changed so recently is read again whatever its time says: file systems keep times to 2 s (FAT) or finer."""


class _Look(msgspec.Struct, frozen=True):
    """What one look at the file saw: its identity, and its text or why it cannot be read."""

    identity: tuple[int, ...] | None = None
    text: str | None = None
    refusal: str | None = None


async def watch_policy(
    path: Path,
    apply: Callable[[Policy], Awaitable[None]],
    refused: Callable[[PolicyError], None],
    poll_s: float = POLL_S,
) -> None:
    """Watch until cancelled.

    The file as it stands at the start counts as a change: what happened between its first reading and now is not missed.
    `apply` must therefore be idempotent.

    Args:
        path: the policy file, or a link to it.
        apply: takes a policy into force.
        refused: is told why a file is not taken into force; once for each content.
        poll_s: time between two looks, s.
    """
    judged = seen = _Look()
    while True:
        # In a thread: on a network mount that hangs, this must not stop the checks.
        look = await asyncio.to_thread(_look, path, seen)
        settled = look == seen
        if settled and (look.text, look.refusal) != (judged.text, judged.refusal) and await _judge(path, look, apply, refused):
            judged = look
        seen = look
        await asyncio.sleep(poll_s)


async def _judge(
    path: Path, look: _Look, apply: Callable[[Policy], Awaitable[None]], refused: Callable[[PolicyError], None]
) -> bool:
    """Take what was seen into force, or refuse it. Returns whether that was the last word on this content."""
    if look.text is None:
        refused(PolicyError(look.refusal or "", str(path)))
        return True
    try:
        await apply(parse_policy(look.text, str(path)))
    except PolicyError as error:
        refused(error)
    except TidegateError as error:
        refused(PolicyError(error.message, str(path)))
        # A catalog that does not answer is not the file's fault: the same content is tried again.
        return error.status != 503
    return True


def _look(path: Path, last: _Look) -> _Look:
    try:
        status = path.stat()
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if identity == last.identity and time.time() - max(status.st_mtime, status.st_ctime) > _TIME_RESOLUTION_S:
            return last
        return _Look(identity, read_policy_text(path))
    except PolicyError as error:
        return _Look(None, None, error.reason)
    except OSError as error:
        return _Look(None, None, f"the policy file cannot be looked at: {error.strerror or error}")
