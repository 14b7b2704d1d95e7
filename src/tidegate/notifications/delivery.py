"""Sends one notification: certificates are verified, redirections are not followed, the response's body is not read."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from tidegate._version import __version__
from tidegate.notifications.signature import signature

_T = TypeVar("_T")
_MAX_ERROR: Final = 300
GONE: Final = 410


class Attempt(msgspec.Struct, frozen=True):
    """The result of one attempt.

    Args:
        answer: status code of the receiver; None without an answer.
        error: why it was not accepted; empty if it was.
    """

    answer: int | None
    error: str = ""

    @property
    def delivered(self) -> bool:
        """Whether the receiver accepted it."""
        return not self.error


def post(url: str, key: bytes, message_id: str, timestamp_s: int, body: bytes, timeout_s: float) -> Attempt:
    """Sign a body and send it. Blocks.

    Args:
        url: of the receiver.
        key: the secret.
        message_id: value of `webhook-id`, the same for every attempt.
        timestamp_s: of this attempt, s since the epoch.
        timeout_s: of connecting, and of each read and write, s.

    Returns:
        The result; accepted are the status codes 200 to 299.
    """
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"tidegate/{__version__}",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": signature(key, message_id, timestamp_s, body),
    }
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with _opener().open(request, timeout=timeout_s) as response:
            return Attempt(response.status)
    except urllib.error.HTTPError as error:
        with error:
            moved = ", and redirections are not followed" if 300 <= error.code < 400 else ""
            return Attempt(error.code, f"the receiver answered {error.code}{moved}")
    except urllib.error.URLError as error:
        return Attempt(None, _reason(error.reason))
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Attempt(None, _reason(error))


async def in_daemon_thread(work: Callable[[], _T]) -> _T:
    """Run blocking work in a thread that does not delay the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised again where the result is awaited
            failure = error
        # The loop may be closed: then no task waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="webhook", daemon=True).start()
    return await future


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """A redirection could reach internal addresses, or send the body to someone else."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    # Reading the certificates of the system takes milliseconds: once.
    return urllib.request.build_opener(_NoRedirection(), urllib.request.HTTPSHandler(context=ssl.create_default_context()))


def _reason(error: object) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        text = f"the certificate is not valid: {error.verify_message}"
    elif isinstance(error, TimeoutError):
        text = "the receiver did not answer in time"
    elif isinstance(error, OSError) and error.strerror:
        text = f"cannot connect: {error.strerror}"
    else:
        text = f"cannot connect: {type(error).__name__}"
    return text[:_MAX_ERROR]
