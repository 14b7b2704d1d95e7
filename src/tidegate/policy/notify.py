"""`[[notify]]` of a policy: who is notified of crossed thresholds, expired and revoked API keys, and blocks."""

from __future__ import annotations

import base64
import binascii
import enum
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.fields import member_of, short
from tidegate.policy.limits import Algorithm, Limit, LimitSet

MAX_TARGETS: Final = 32
"""Most tables `[[notify]]` of one policy: each event is compared with all of them."""
MAX_FILTER: Final = 100
"""Most tiers or rules that one table names."""
MAX_URL: Final = 1_000
MIN_SECRET: Final = 16
"""Shortest secret, bytes; Standard Webhooks recommends 24 to 64."""
DEFAULT_MIN_WINDOW_S: Final = 60

_MAX_WINDOW_S: Final = 366 * 86_400
_REFERENCE: Final = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]{0,127})", re.ASCII)
_MAX_NAME: Final = 256
_SECRET_HELP: Final = 'name the environment variable that contains the secret: secret = "env:TIDEGATE_WEBHOOK_SECRET"'
_PREFIX: Final = "whsec_"


class EventType(enum.StrEnum):
    """What a notification is about."""

    THRESHOLD = "threshold"
    KEY_EXPIRED = "key_expired"
    KEY_REVOKED = "key_revoked"
    BLOCKED = "blocked"


class NotifyTarget(msgspec.Struct, frozen=True, gc=False):
    """One table `[[notify]]`.

    Args:
        url: receives events by POST.
        secret: where the secret of the signature is: `env:` and the name of an environment variable.
        at: percent of a limit or quota, 1 to 100, ascending; empty where it is not for thresholds.
        events: which events are sent.
        tiers: only events of these tiers; empty for all. Blocks have no tier.
        rules: only thresholds of the limits and quotas of these rules; empty for all, and those of tiers.
        min_window_s: only thresholds of windows that are at least this long, s.
    """

    url: str
    secret: str
    at: tuple[int, ...] = ()
    events: tuple[EventType, ...] = (EventType.THRESHOLD,)
    tiers: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    min_window_s: int = DEFAULT_MIN_WINDOW_S

    @classmethod
    def make(
        cls,
        url: object,
        secret: object,
        at: object = (),
        events: object = None,
        tiers: object = (),
        rules: object = (),
        min_window_s: object = DEFAULT_MIN_WINDOW_S,
    ) -> NotifyTarget:
        """Validate a table `[[notify]]`.

        Args:
            url: see the class; so are all others.

        Raises:
            PolicyError: naming the field, its value and the remedy.
        """
        percents = _percents(at)
        chosen = _events(events)
        if EventType.THRESHOLD in chosen and not percents:
            raise PolicyError("at names no percentage: write at = [80, 100], or events without 'threshold'")
        if percents and EventType.THRESHOLD not in chosen:
            raise PolicyError("at is for the event 'threshold', which events does not name: add it, or leave 'at' out")
        if isinstance(min_window_s, bool) or not isinstance(min_window_s, int) or not 1 <= min_window_s <= _MAX_WINDOW_S:
            raise PolicyError(f"min_window_s {short(min_window_s)} must be a whole number of seconds from 1 to {_MAX_WINDOW_S}")
        return cls(
            _url(url),
            _reference(secret),
            percents,
            chosen,
            _names("tiers", tiers),
            _names("rules", rules),
            min_window_s,
        )

    @property
    def fields(self) -> dict[str, Any]:
        """The fields as a policy has them, without those that have their default."""
        default = NotifyTarget(self.url, self.secret)
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {
            name: [str(each) if isinstance(each, str) else each for each in value] if isinstance(value, tuple) else value
            for name, value in values.items()
            if name in ("url", "secret") or value != getattr(default, name)
        }

    def wants(self, event: EventType, tier: str | None = None) -> bool:
        """Whether an event is sent.

        Args:
            event: its type.
            tier: name of the tier that it is about; None where it is about none.
        """
        return event in self.events and (tier is None or not self.tiers or tier in self.tiers)

    def percents_of(self, limits: LimitSet, limit: Limit) -> tuple[int, ...]:
        """The percentages of a limit at which this target is notified."""
        tier, rule = limits.tier, limits.rule
        if tier is None or limits.shadow or limits.algorithm is Algorithm.LEAKY_BUCKET:
            return ()
        if not self.wants(EventType.THRESHOLD, tier) or (self.rules and (rule or "") not in self.rules):
            return ()
        return self.at if limit.window_us >= self.min_window_s * 1_000_000 else ()


def target_of(fields: Mapping[str, Any]) -> NotifyTarget:
    """A target of its `fields`, as they are stored in the catalog."""
    return NotifyTarget.make(**fields)


def percents_of(targets: Iterable[NotifyTarget], limits: LimitSet, limit: Limit) -> tuple[int, ...]:
    """The percentages of a limit at which any target is notified, ascending."""
    return tuple(sorted({percent for target in targets for percent in target.percents_of(limits, limit)}))


def secret_of(reference: str, environment: Mapping[str, str] | None = None) -> bytes:
    """The key of a signature.

    Args:
        reference: `env:` and the name of a variable.
        environment: the variables; those of this process where None.

    Returns:
        The bytes: of `whsec_…` those that its base64 encodes, of another text its UTF-8.

    Raises:
        PolicyError: if the variable is not set, or its value cannot be used; without the value.
    """
    name = reference.removeprefix("env:")
    text = (os.environ if environment is None else environment).get(name)
    if not text:
        raise PolicyError(
            f"[[notify]] has the secret {reference!r}, but the environment variable {name} is not set: set it for the server"
        )
    key = text.encode("utf-8", "surrogateescape")
    if text.startswith(_PREFIX):
        try:
            key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            raise PolicyError(
                f"the environment variable {name} begins with {_PREFIX!r}, but the rest is not base64: copy the whole secret"
            ) from None
    if len(key) < MIN_SECRET:
        raise PolicyError(
            f"the secret in the environment variable {name} has {len(key)} bytes: at least {MIN_SECRET} are needed; "
            "make one with: echo whsec_$(openssl rand -base64 32)"
        )
    return key


def require_secrets(targets: Iterable[NotifyTarget]) -> None:
    """Check that the secrets of all targets are there.

    Raises:
        PolicyError: naming the variable and the remedy.
    """
    for target in targets:
        secret_of(target.secret)


def require_distinct_targets(targets: Iterable[NotifyTarget]) -> None:
    """Check that one URL has one secret: an event is sent to a URL once, whichever tables name it.

    Raises:
        PolicyError: naming the URL.
    """
    secrets: dict[str, str] = {}
    for target in targets:
        known = secrets.setdefault(target.url, target.secret)
        if known != target.secret:
            raise PolicyError(
                f"url {short(target.url)} has the secrets {known!r} and {target.secret!r}: an event is sent to a URL once, "
                "so give it one secret"
            )


def _percents(value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise PolicyError(f"at {short(value)} must be a list of percentages such as [80, 100]")
    if len(value) > 100:
        raise PolicyError(f"at has {len(value)} entries: at most 100 percentages are possible")
    for each in value:
        if isinstance(each, bool) or not isinstance(each, int) or not 1 <= each <= 100:
            raise PolicyError(f"at has {short(each)}, which is not a whole percentage from 1 to 100, such as 80")
        if value.count(each) > 1:
            raise PolicyError(f"at has {each} twice: name each percentage once")
    return tuple(sorted(value))


def _events(value: object) -> tuple[EventType, ...]:
    if value is None:
        return (EventType.THRESHOLD,)
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= len(EventType):
        raise PolicyError(f"events {short(value)} must be a list of {', '.join(EventType)}")
    return tuple(dict.fromkeys(member_of(EventType, each, "events") for each in value))


def _names(field: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > MAX_FILTER:
        raise PolicyError(f"{field} {short(value)} must be a list of at most {MAX_FILTER} names")
    for each in value:
        if not isinstance(each, str) or not 1 <= len(each) <= _MAX_NAME:
            raise PolicyError(f"{field} has {short(each)}, which is not a name of 1 to {_MAX_NAME} characters")
    return tuple(dict.fromkeys(value))


def _url(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_URL or not value.isascii() or not value.isprintable():
        raise PolicyError(f"url {short(value)} must be a URL of 1 to {MAX_URL} printable ASCII characters")
    try:
        url = urlsplit(value)
        host = url.hostname
        url.port  # noqa: B018 - raises for a port that is none
    except ValueError as error:
        raise PolicyError(f"url {short(value)} is not a valid URL: {error}") from None
    if url.scheme not in ("https", "http") or not host or " " in value:
        raise PolicyError(f"url {short(value)} must be an https:// or http:// URL, such as https://example.com/hooks")
    if url.username is not None or url.password is not None:
        raise PolicyError("url must not contain a user name or password: receivers verify the signature")
    if url.fragment:
        raise PolicyError(f"url {short(value)} has a fragment, which is never sent: remove it")
    return value


def _reference(value: object) -> str:
    if not isinstance(value, str) or not _REFERENCE.fullmatch(value):
        # Without the value: it may be the secret itself.
        raise PolicyError(f"secret is not a reference: {_SECRET_HELP}")
    return value
