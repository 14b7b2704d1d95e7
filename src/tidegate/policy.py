"""What may pass: `Limit`, `Rule`, `Tier`, `ApiKey`, `Policy`. Frozen records, parsed and validated here and nowhere else.

`LimitSet` is a rule's limits made ready to be counted; it is what the gate hands to a counter store.
"""

from __future__ import annotations

import enum
import hashlib
import math
import re
import secrets
import zlib
from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

import msgspec

from tidegate.errors import PolicyError
from tidegate.paths import canonical_path

US_PER_S: Final = 1_000_000
MAX_AMOUNT: Final = 1_000_000_000
MAX_LOG_AMOUNT: Final = 100_000
MAX_WINDOW_US: Final = 366 * 86_400 * US_PER_S
MONTH_US: Final = 31 * 86_400 * US_PER_S
MAX_EXACT: Final = 2**53
"""Doubles hold integers exactly up to here; Lua counts in doubles, so no state may need more."""

_UNITS_US: Final[Mapping[str, int]] = {
    unit: seconds * US_PER_S
    for seconds, units in (
        (1, ("s", "sec", "second", "seconds")),
        (60, ("m", "min", "minute", "minutes")),
        (3_600, ("h", "hour", "hours")),
        (86_400, ("d", "day", "days")),
    )
    for unit in units
}
_MONTHS: Final = ("month", "months")
_LIMIT: Final = re.compile(r"\s*([0-9_]+)\s*/\s*([0-9]*)\s*([A-Za-z]+)(?:\s+burst\s+([0-9_]+))?\s*", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_RULE_NAME: Final = re.compile(r"[\x20-\x7e]{1,256}", re.ASCII)
_METHOD: Final = re.compile(r"[A-Z][A-Z0-9_-]{0,31}", re.ASCII)
_FILE_KEY: Final = re.compile(r"[A-Za-z0-9_-]{16,128}", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


_E = TypeVar("_E", bound=enum.StrEnum)


class Algorithm(enum.StrEnum):
    """How a limit counts; what each promises stands in `tidegate.algorithms`."""

    FIXED_WINDOW = "fixed_window"
    SLIDING_WINDOW = "sliding_window"
    SLIDING_LOG = "sliding_log"
    TOKEN_BUCKET = "token_bucket"
    LEAKY_BUCKET = "leaky_bucket"

    @property
    def is_bucket(self) -> bool:
        """Whether the algorithm takes a burst."""
        return self in (Algorithm.TOKEN_BUCKET, Algorithm.LEAKY_BUCKET)


class Subject(enum.StrEnum):
    """Whom a rule counts."""

    API_KEY = "api_key"
    IP = "ip"
    TIER = "tier"


class Mode(enum.StrEnum):
    """Whether a rule blocks or only watches."""

    ENFORCE = "enforce"
    SHADOW = "shadow"


class OnFailure(enum.StrEnum):
    """What a rule answers while the counter store is unwell."""

    LOCAL = "local"
    ALLOW = "allow"
    DENY = "deny"


class KeyStatus(enum.StrEnum):
    """Whether an API key is let in."""

    ACTIVE = "active"
    REVOKED = "revoked"


class Limit(msgspec.Struct, frozen=True, gc=False):
    """`amount` units of cost per window.

    Args:
        amount: 1 to 1,000,000,000.
        window_us: length of the window in µs, 1 s to 366 days; for a calendar month 31 days, the longest one
            (algorithms that do not align to the calendar count it so, and thus never admit too much in any month).
        calendar_month: whether the window is the UTC calendar month.
        burst: capacity of a bucket, 1 to 1,000,000,000; None where the algorithm's default holds.
        label: what the limit is called in answers; its text where empty.
    """

    amount: int
    window_us: int
    calendar_month: bool = False
    burst: int | None = None
    label: str = ""

    @classmethod
    def parse(cls, text: object) -> Limit:
        """Read `100/minute`, `30/90s`, `1000/month` or `100/minute burst 20`.

        Args:
            text: the limit as it stands in a policy.

        Returns:
            The limit.

        Raises:
            PolicyError: naming the text and the forms that are understood.
        """
        match = _LIMIT.fullmatch(text) if isinstance(text, str) and len(text) <= 80 else None
        if match is None:
            raise PolicyError(
                f"limit {_short(text)} is not understood: "
                "write '100/minute', '30/90s', '1000/month' or '100/minute burst 20'"
            )
        amount_text, count_text, unit, burst_text = match.groups()
        amount = _whole(amount_text, "amount", str(text))
        burst = None if burst_text is None else _whole(burst_text, "burst", str(text))
        count = int(count_text) if count_text else 1
        if unit.lower() in _MONTHS:
            if count != 1:
                raise PolicyError(f"limit {text!r}: a month is the calendar month, one at a time: write '{amount}/month'")
            return cls(amount, MONTH_US, True, burst)
        if unit.lower() not in _UNITS_US:
            raise PolicyError(
                f"limit {text!r} has the unknown unit {unit!r}: use second, minute, hour, day or month (or s, m, h, d)"
            )
        window_us = count * _UNITS_US[unit.lower()]
        if not US_PER_S <= window_us <= MAX_WINDOW_US:
            raise PolicyError(f"limit {text!r}: the window must be between 1 second and 366 days")
        return cls(amount, window_us, False, burst)

    @property
    def capacity(self) -> int:
        """The most that can be had at once: the burst of a bucket, else the amount."""
        return self.amount if self.burst is None else self.burst

    @property
    def window_name(self) -> str:
        """Which window this is, whatever its amount: `month` or its length like `60s`."""
        return "month" if self.calendar_month else f"{self.window_us // US_PER_S}s"

    @property
    def text(self) -> str:
        """The limit in the form that `parse` reads, shortest unit form first."""
        unit = "month" if self.calendar_month else _window_text(self.window_us // US_PER_S)
        return f"{self.amount}/{unit}" + ("" if self.burst is None else f" burst {self.burst}")

    def __str__(self) -> str:
        return self.text


class LimitSet:
    """The limits that are counted together under one name, ready for a counter store.

    Two sets of the same name share their counters, whatever their amounts: that is how a changed limit keeps what
    has been consumed. Compared by identity, because stores remember what they prepared for each.

    Args:
        name: the counter's name: unambiguous, stable across restarts and instances.
        algorithm: how all of `limits` count.
        limits: 1 to 16, no two of the same window; sorted by window, bursts filled in.
        on_failure: what to answer while the store is unwell.
        rule: the rule's name for answers, None for a tier's own limits.
        tier: the tier's name for answers.
        quotas: the value of the `RateLimit-Policy` header; of these limits alone where None.

    Raises:
        PolicyError: if the limits do not fit the algorithm or each other.
    """

    __slots__ = ("algorithm", "limits", "name", "on_failure", "quotas", "rule", "tier")

    def __init__(
        self,
        name: str,
        algorithm: Algorithm,
        limits: Iterable[Limit],
        on_failure: OnFailure = OnFailure.LOCAL,
        *,
        rule: str | None = None,
        tier: str | None = None,
        quotas: str | None = None,
    ) -> None:
        self.name = name
        self.algorithm = algorithm
        self.limits = fit_limits(algorithm, limits)
        self.on_failure = on_failure
        self.rule = rule
        self.tier = tier
        self.quotas = quotas or ", ".join(quota_text(limit) for limit in self.limits)

    def __repr__(self) -> str:
        return f"LimitSet({self.name!r}, {self.algorithm}, {[limit.text for limit in self.limits]})"


def quota_text(limit: Limit) -> str:
    """One quota of the `RateLimit-Policy` header (draft-ietf-httpapi-ratelimit-headers-10, section 3)."""
    return f'"{limit.label or limit.text}";q={limit.capacity};w={limit.window_us // US_PER_S}'


def fit_limits(algorithm: Algorithm, limits: Iterable[Limit]) -> tuple[Limit, ...]:
    """Check that limits suit an algorithm and each other; fill in bursts; sort by window.

    Args:
        algorithm: how they will count.
        limits: 1 to 16 of them.

    Returns:
        The limits as they will be counted, the shortest window first.

    Raises:
        PolicyError: naming the limit that does not fit, and why.
    """
    fitted: dict[str, Limit] = {}
    for limit in limits:
        if limit.burst is not None and not algorithm.is_bucket:
            raise PolicyError(
                f"limit {limit.text!r} has a burst, which {algorithm} cannot give: "
                "drop the burst or use token_bucket or leaky_bucket"
            )
        if algorithm is Algorithm.SLIDING_LOG and limit.amount > MAX_LOG_AMOUNT:
            raise PolicyError(
                f"limit {limit.text!r}: sliding_log keeps every request, so at most {MAX_LOG_AMOUNT}: use sliding_window"
            )
        if algorithm.is_bucket:
            burst = limit.burst or (limit.amount if algorithm is Algorithm.TOKEN_BUCKET else 1)
            limit = msgspec.structs.replace(limit, burst=burst)
            if burst * (limit.window_us // math.gcd(limit.amount, limit.window_us)) > MAX_EXACT:
                raise PolicyError(
                    f"limit {limit.text!r} cannot be counted exactly in integers: use a rounder amount or a smaller burst"
                )
        if limit.window_name in fitted:
            raise PolicyError(
                f"limits {fitted[limit.window_name].text!r} and {limit.text!r} have the same window: keep the one meant"
            )
        fitted[limit.window_name] = limit
    if not 1 <= len(fitted) <= 16:
        raise PolicyError(f"{len(fitted)} limits given: a rule takes 1 to 16, for example limits = [\"100/minute\"]")
    return tuple(sorted(fitted.values(), key=lambda each: each.window_us))


class Rule(msgspec.Struct, frozen=True, gc=False):
    """What a tier may do at the endpoints of one pattern.

    Args:
        endpoint: literal path; `*` matches any run of characters, `{id}` one whole segment.
        limits: all must pass.
        methods: upper-case HTTP methods; empty means every method.
        algorithm: how the limits count.
        subject: whom the rule counts.
        priority: higher is preferred; −1,000,000 to 1,000,000.
        mode: whether it blocks.
        on_failure: what it answers while the counter store is unwell.
        name: unique in its tier; made from methods and endpoint where not given.
    """

    endpoint: str
    limits: tuple[Limit, ...]
    methods: tuple[str, ...] = ()
    algorithm: Algorithm = Algorithm.SLIDING_WINDOW
    subject: Subject = Subject.API_KEY
    priority: int = 0
    mode: Mode = Mode.ENFORCE
    on_failure: OnFailure = OnFailure.LOCAL
    name: str = ""

    @classmethod
    def make(
        cls,
        endpoint: str,
        limits: Iterable[Limit | str],
        methods: Iterable[str] = (),
        algorithm: str = Algorithm.SLIDING_WINDOW,
        subject: str = Subject.API_KEY,
        priority: int = 0,
        mode: str = Mode.ENFORCE,
        on_failure: str = OnFailure.LOCAL,
        name: str = "",
    ) -> Rule:
        """Validate and normalise a rule.

        Args:
            endpoint: see the class; so are all others.
            limits: limits or their texts.
            methods: any case.
            algorithm: its name.
            subject: its name.
            priority: see the class.
            mode: its name.
            on_failure: its name.
            name: empty for the one made from methods and endpoint.

        Returns:
            The rule.

        Raises:
            PolicyError: naming the field, its value and the remedy.
        """
        chosen = _member(Algorithm, algorithm, "algorithm")
        parsed = tuple(limit if isinstance(limit, Limit) else Limit.parse(limit) for limit in limits)
        fit_limits(chosen, parsed)
        upper = tuple(sorted({_method(method) for method in methods}))
        pattern = canonical_pattern(endpoint)
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 1_000_000:
            raise PolicyError(f"priority {_short(priority)} must be a whole number from -1000000 to 1000000")
        shadow = _member(Mode, mode, "mode")
        default = (",".join(upper) + " " if upper else "") + pattern + (" shadow" if shadow is Mode.SHADOW else "")
        if name and not _RULE_NAME.fullmatch(name):
            raise PolicyError(f"rule name {_short(name)} must be 1 to 256 printable ASCII characters")
        return cls(
            endpoint=pattern,
            limits=parsed,
            methods=upper,
            algorithm=chosen,
            subject=_member(Subject, subject, "subject"),
            priority=priority,
            mode=shadow,
            on_failure=_member(OnFailure, on_failure, "on_failure"),
            name=name or default,
        )


class Tier(msgspec.Struct, frozen=True, gc=False):
    """A class of callers and its rules.

    Args:
        name: 1 to 64 of `[A-Za-z0-9_.-]`.
        rules: in the order of the policy; names unique.
        limits: over all endpoints of the tier, counted for each caller with sliding_window, charged with the rule's.
        managed_by_file: whether the policy file owns it.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    limits: tuple[Limit, ...] = ()
    managed_by_file: bool = False

    @classmethod
    def make(cls, name: str, rules: Iterable[Rule] = (), limits: Iterable[Limit | str] = ()) -> Tier:
        """Validate a tier.

        Args:
            name: see the class; so are all others.
            rules: validated rules.
            limits: limits or their texts.

        Returns:
            The tier.

        Raises:
            PolicyError: naming what is wrong and the remedy.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PolicyError(f"tier name {_short(name)} must be 1 to 64 of letters, digits, '_', '.', '-'")
        seen: dict[str, Rule] = {}
        ordered = tuple(rules)
        for rule in ordered:
            if rule.name in seen:
                raise PolicyError(
                    f"tier {name!r} has two rules named {rule.name!r}: "
                    "remove one, or give the second a 'name' and other 'methods' or 'mode'"
                )
            seen[rule.name] = rule
        parsed = tuple(limit if isinstance(limit, Limit) else Limit.parse(limit) for limit in limits)
        if parsed:
            fit_limits(Algorithm.SLIDING_WINDOW, parsed)
        return cls(name=name, rules=ordered, limits=parsed)


class Override(msgspec.Struct, frozen=True, gc=False):
    """Other limits for one key.

    Args:
        rule: name of the rule in the key's tier; empty for the tier's own limits.
        limits: what holds instead.
    """

    rule: str
    limits: tuple[Limit, ...]


class ApiKey(msgspec.Struct, frozen=True, gc=False):
    """An API key as the catalog knows it: never the key itself.

    Args:
        sha256: lower-case hex digest of the key.
        tier: name of its tier.
        status: active or revoked.
        name: a label for people.
        expires_at_us: µs since the epoch (UTC) from which the key is refused; None for never.
        overrides: other limits for this key.
        managed_by_file: whether the policy file owns it.
    """

    sha256: str
    tier: str
    status: KeyStatus = KeyStatus.ACTIVE
    name: str = ""
    expires_at_us: int | None = None
    overrides: tuple[Override, ...] = ()
    managed_by_file: bool = False

    @property
    def id(self) -> str:
        """The key's public name: the first 24 hex digits of its digest. Counters and logs use it."""
        return self.sha256[:24]


class Policy(msgspec.Struct, frozen=True, gc=False):
    """A whole policy, valid in itself.

    Args:
        tiers: names unique.
        api_keys: digests unique; each tier exists.
        anonymous_tier: tier of checks that bring no key; None refuses them.
    """

    tiers: tuple[Tier, ...]
    api_keys: tuple[ApiKey, ...] = ()
    anonymous_tier: str | None = None


def canonical_pattern(endpoint: object) -> str:
    """Validate an endpoint pattern and spell it as checked paths are spelled.

    Args:
        endpoint: literal path with `*` and `{name}` in it.

    Returns:
        The pattern; every `{name}` as it was written.

    Raises:
        PolicyError: naming the pattern and the remedy.
    """
    if not isinstance(endpoint, str) or not endpoint.startswith("/") or len(endpoint) > 1024:
        raise PolicyError(f"endpoint {_short(endpoint)} must begin with '/' and have at most 1024 characters")
    segments = []
    for segment in endpoint.split("/")[1:]:
        if "{" in segment or "}" in segment:
            if not re.fullmatch(r"\{[A-Za-z0-9_]*\}", segment):
                raise PolicyError(
                    f"endpoint {endpoint!r}: '{{id}}' stands for one whole segment, not for part of {segment!r}: use '*' there"
                )
            segments.append("x")
        else:
            segments.append(segment)
    probe = "/" + "/".join(segments)
    canonical, remedy = canonical_path(probe)
    if canonical is None:
        raise PolicyError(f"endpoint {endpoint!r}: {remedy}")
    if canonical != probe:
        raise PolicyError(f"endpoint {endpoint!r} is not spelled as requests arrive: write it as {canonical!r}")
    return endpoint


BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KEY_PREFIX: Final = "tg_"
_MADE_KEY: Final = re.compile(r"tg_[0-9A-Za-z]{38}", re.ASCII)


def make_api_key() -> str:
    """Make a new API key: `tg_`, 32 random base62 characters (190 bits), 6 check characters.

    Returns:
        The key, to be shown once.
    """
    body = "".join(secrets.choice(BASE62) for _ in range(32))
    return KEY_PREFIX + body + _check_characters(body)


def is_mistyped(api_key: str) -> bool:
    """Whether a key has our prefix but cannot be one of ours: refused without a look-up.

    Args:
        api_key: as it came.

    Returns:
        True if it begins with `tg_` and its form or its check characters are wrong.
    """
    if not api_key.startswith(KEY_PREFIX):
        return False
    return _MADE_KEY.fullmatch(api_key) is None or _check_characters(api_key[3:35]) != api_key[35:]


def is_possible_key(api_key: str) -> bool:
    """Whether a key has a form that any key of ours can have: 16 to 128 of `[A-Za-z0-9_-]`, not mistyped."""
    return _FILE_KEY.fullmatch(api_key) is not None and not is_mistyped(api_key)


def hash_api_key(api_key: str) -> str:
    """The digest under which a key is stored. Keys are random, so a plain SHA-256 needs no salt.

    Args:
        api_key: the key itself, ASCII.

    Returns:
        64 lower-case hex digits.
    """
    return hashlib.sha256(api_key.encode()).hexdigest()


def parse_key_digest(api_key: object = None, sha256: object = None) -> str:
    """The digest of a policy's key, given as itself or as its digest.

    Args:
        api_key: the key, or None.
        sha256: its digest in hex, or None; exactly one of the two.

    Returns:
        64 lower-case hex digits.

    Raises:
        PolicyError: saying what is wrong, without repeating the key.
    """
    if (api_key is None) == (sha256 is None):
        raise PolicyError("an API key needs exactly one of 'key' and 'sha256'")
    if sha256 is not None:
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256.lower()):
            raise PolicyError(f"sha256 {_short(sha256)} must be 64 hex digits: printf %s KEY | sha256sum")
        return sha256.lower()
    if not isinstance(api_key, str) or not _FILE_KEY.fullmatch(api_key):
        raise PolicyError("a 'key' must be 16 to 128 of letters, digits, '_' and '-'")
    if is_mistyped(api_key):
        raise PolicyError(
            f"the key that begins {api_key[:6]!r} has Tidegate's prefix but wrong check characters: "
            "it is mistyped; make one with 'tidegate keys create' or use another prefix"
        )
    return hash_api_key(api_key)


def _check_characters(body: str) -> str:
    value = zlib.crc32(body.encode())
    characters = []
    for _ in range(6):
        value, digit = divmod(value, 62)
        characters.append(BASE62[digit])
    return "".join(reversed(characters))


def _member(kind: type[_E], value: object, field: str) -> _E:
    try:
        return kind(str(value))
    except ValueError:
        choices = ", ".join(member.value for member in kind)
        raise PolicyError(f"{field} {_short(value)} is not known: use one of {choices}") from None


def _method(value: object) -> str:
    if not isinstance(value, str) or not _METHOD.fullmatch(value.upper()):
        raise PolicyError(f"method {_short(value)} is not an HTTP method: for example GET")
    return value.upper()


def _whole(text: str, what: str, limit: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MAX_AMOUNT:
        raise PolicyError(f"limit {limit!r}: the {what} must be a whole number from 1 to {MAX_AMOUNT}")
    return value


def _window_text(seconds: int) -> str:
    for length, unit, short in ((86_400, "day", "d"), (3_600, "hour", "h"), (60, "minute", "m"), (1, "second", "s")):
        if seconds == length:
            return unit
        if seconds % length == 0:
            return f"{seconds // length}{short}"
    raise AssertionError(seconds)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
