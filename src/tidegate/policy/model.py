"""What may pass: `Limit`, `Rule`, `Tier`, `ApiKey`, `Policy`. Frozen records, parsed and validated here and nowhere else.

A rule's limits are read in `limits`, an API key's form in `keys`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.access_entries import AccessAction, AccessEntry
from tidegate.policy.attributes import AttributeSource, CallerPolicy, CallerRules, OnMissing, match_of, subject_parts
from tidegate.policy.customers import Customer, customer_attributes
from tidegate.policy.descriptors import PREFIX as DESCRIPTOR
from tidegate.policy.descriptors import canonical_descriptor, descriptor_entries, entries_text
from tidegate.policy.failures import FailureCount, require_countable
from tidegate.policy.globs import Glob
from tidegate.policy.jwt_policy import JwtPolicy
from tidegate.policy.key_format import FORM, MAX_KEY, MIN_WRITTEN_KEY, hash_api_key, is_mistyped
from tidegate.policy.key_hash import HMAC_SHA256, PLAIN, KeyHash, key_hash_as_set, key_hash_in_use
from tidegate.policy.limits import (
    Algorithm,
    AnyAlgorithm,
    FailureAlgorithm,
    Limit,
    OnFailure,
    fit_limits,
    is_zero,
    member_of,
    short,
    split_limits,
)
from tidegate.policy.namespaces import Namespace
from tidegate.policy.notify import NotifyTarget
from tidegate.policy.overrides import Override, SubjectOverride
from tidegate.policy.paths import PathRules, canonical_path
from tidegate.policy.quotas import Overage, Quota, fit_quotas, require_quotas

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_MAX_RULE_NAME: Final = 256
_RULE_NAME: Final = re.compile(r"[\x20-\x7e]{1,256}", re.ASCII)
_METHOD: Final = re.compile(r"[A-Z][A-Z0-9_-]{0,31}", re.ASCII)
# A pattern may have encoded slashes, whether or not the setting paths.encoded_slashes lets such paths through.
_PATTERN_PATHS: Final = PathRules((Glob("*"),))
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_EMPTY: Final = (b"", b"\n")
"""What a shell hashes if the variable for the key was empty."""


class Subject(enum.StrEnum):
    """Whom a rule counts."""

    API_KEY = "api_key"
    IP = "ip"
    TIER = "tier"
    CUSTOMER = "customer"
    """All API keys and attribute values of a customer together; without a customer, the API key, or else the address."""
    ATTRIBUTES = "attributes"
    """The values of `Rule.subject_parts`; a policy names those."""


class Mode(enum.StrEnum):
    """Whether a rule blocks, only watches, or answers and reports what is above its limits."""

    ENFORCE = "enforce"
    SHADOW = "shadow"
    SOFT = "soft"


class KeyStatus(enum.StrEnum):
    """Whether an API key is let in."""

    ACTIVE = "active"
    REVOKED = "revoked"


class Rule(msgspec.Struct, frozen=True, gc=False):
    """What a tier may do at the endpoints of one pattern.

    Args:
        endpoint: literal path; `*` matches any run of characters, `{id}` one whole segment. Or a descriptor, see `descriptors`.
        limits: all must pass.
        methods: upper-case HTTP methods; empty means every method.
        algorithm: how the limits count.
        subject: whom the rule counts.
        priority: higher is preferred; −1,000,000 to 1,000,000.
        mode: whether it blocks.
        on_failure: what it answers while the counter store is unavailable.
        name: unique in its tier, at most 256 characters; made from methods, endpoint and match where not given.
        match: names of attributes and patterns that their values must match, sorted by name; `*` matches any run of characters.
        subject_parts: for the subject ATTRIBUTES, whose combinations are counted: attributes, `api_key`, `ip`.
        on_missing: what it does with a check without an attribute of `subject_parts`.
        quotas: what it allows in fixed periods, the shortest first; a rule has limits, quotas or both.
        overage: what passes above its quotas; None for nothing.
        leases: whether instances may lease units of its limits.
        action: what it does in place of limits and quotas: allow without counting, or deny; None for a rule that counts.
        failures: how it counts failures; None where it counts requests.
    """

    endpoint: str
    limits: tuple[Limit, ...]
    methods: tuple[str, ...] = ()
    algorithm: Algorithm = Algorithm.SLIDING_WINDOW
    subject: Subject = Subject.API_KEY
    priority: int = 0
    mode: Mode = Mode.ENFORCE
    on_failure: OnFailure = OnFailure.DEFAULT
    name: str = ""
    match: tuple[tuple[str, str], ...] = ()
    subject_parts: tuple[str, ...] = ()
    on_missing: OnMissing = OnMissing.IP
    quotas: tuple[Quota, ...] = ()
    overage: Overage | None = None
    leases: bool = True
    action: AccessAction | None = None
    failures: FailureCount | None = None

    @classmethod
    def make(
        cls,
        endpoint: str,
        limits: Iterable[Limit | str] = (),
        methods: Iterable[str] = (),
        algorithm: str = Algorithm.SLIDING_WINDOW,
        subject: str | Iterable[str] = Subject.API_KEY,
        priority: int = 0,
        mode: str = Mode.ENFORCE,
        on_failure: str = OnFailure.DEFAULT,
        name: str = "",
        match: Mapping[str, str] | None = None,
        on_missing: str = OnMissing.IP,
        quotas: Iterable[Quota | str] = (),
        overage: object = None,
        leases: object = True,
        action: str | None = None,
        count: object = "requests",
        statuses: object = None,
        clear_on_success: object = None,
        penalty: object = None,
    ) -> Rule:
        """Validate and normalise a rule.

        Args:
            endpoint: see the class; so are all others.
            limits: limits or their texts.
            methods: any case.
            subject: api_key, ip, tier, customer, the name of an attribute, or a list of such names without tier and customer.
            priority: see the class.
            name: empty for the one made from methods, endpoint and match.
            match: patterns by attribute; None for none.
            quotas: quotas or their texts.
            overage: an `Overage`, or what `Overage.parse` reads.
            leases: true or false.
            action: allow or deny, in place of limits and quotas; a limit of 0, such as `0/day`, means deny.
            count: requests, or failures; the following are for failures, see `FailureCount.make`.
            statuses: of responses that are failures.
            clear_on_success: true or false.
            penalty: durations.

        Returns:
            The rule.

        Raises:
            PolicyError: naming the field, its value and the remedy.
        """
        chosen = member_of(Algorithm, algorithm, "algorithm")
        given = tuple(limits)
        acts = None if action is None else member_of(AccessAction, action, "action")
        if acts is None and any(map(is_zero, given)):
            acts, given = AccessAction.DENY, ()
        parsed = tuple(limit if isinstance(limit, Limit) else Limit.parse(limit) for limit in given)
        sold = fit_quotas(quotas)
        failures = FailureCount.make(count, statuses, clear_on_success, penalty)
        if failures is not None:
            rates, _ = split_limits(parsed)
            require_countable(rates, mode, sold, acts, chosen)
            fit_limits(FailureAlgorithm.FAILURES, rates)
        elif acts is not None:
            _require_action_alone(acts, parsed, sold, mode)
        else:
            rates, slots = split_limits(parsed)
            if rates or not (sold or slots):
                fit_limits(chosen, rates)
            if slots is not None and mode == Mode.SOFT:
                raise PolicyError(
                    f"limit {slots.text!r} cannot be soft, as slots that are not there cannot be taken: use enforce"
                )
        above = overage if isinstance(overage, Overage) else Overage.parse(overage)
        require_quotas(above, sold)
        upper = tuple(sorted({_method(method) for method in methods}))
        pattern = canonical_pattern(endpoint)
        kind, parts = _subject(subject)
        conditions = () if match is None else match_of(match)
        if pattern.startswith(DESCRIPTOR):
            _require_for_descriptor(upper, kind, conditions)
        missing = member_of(OnMissing, on_missing, "on_missing")
        if missing is not OnMissing.IP and not set(parts) - {"api_key", "ip"}:
            raise PolicyError(f"on_missing {missing.value!r} is for a subject with an attribute: name one, or leave it out")
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 1_000_000:
            raise PolicyError(f"priority {short(priority)} must be a whole number from -1000000 to 1000000")
        if not isinstance(leases, bool):
            raise PolicyError(f"leases {short(leases)} must be true or false")
        if name and not _RULE_NAME.fullmatch(name):
            raise PolicyError(f"rule name {short(name)} must be 1 to {_MAX_RULE_NAME} printable ASCII characters")
        rule = cls(
            endpoint=pattern,
            limits=parsed,
            methods=upper,
            algorithm=chosen,
            subject=kind,
            priority=priority,
            mode=member_of(Mode, mode, "mode"),
            on_failure=member_of(OnFailure, on_failure, "on_failure"),
            name=name,
            match=conditions,
            subject_parts=parts,
            on_missing=missing,
            quotas=sold,
            overage=above,
            leases=leases,
            action=acts,
            failures=failures,
        )
        if name:
            return rule
        if len(rule.default_name) > _MAX_RULE_NAME:
            raise PolicyError(
                f"endpoint {short(endpoint)} needs a 'name' for its rule: the one made from methods, endpoint and match has "
                f"{len(rule.default_name)} characters, and at most {_MAX_RULE_NAME} are kept"
            )
        return msgspec.structs.replace(rule, name=rule.default_name)

    @property
    def counting(self) -> AnyAlgorithm:
        """How its limits per window count."""
        return self.algorithm if self.failures is None else FailureAlgorithm.FAILURES

    @property
    def descriptor(self) -> tuple[tuple[str, str], ...]:
        """Keys and values of the descriptors that it is for; none where it is for paths."""
        return descriptor_entries(self.endpoint)

    @property
    def default_name(self) -> str:
        """The name that is made from methods, endpoint, match and mode, whatever the rule is called."""
        return self.enforced_name + ("" if self.mode is Mode.ENFORCE else f" {self.mode}")

    @property
    def enforced_name(self) -> str:
        """The name that is made from methods, endpoint and match if the mode is `enforce`."""
        methods = ",".join(self.methods) + " " if self.methods else ""
        match = " " + entries_text(self.match) if self.match else ""
        return methods + self.endpoint + match

    @property
    def subject_value(self) -> str | list[str]:
        """The subject as a policy names it: one name, or a list."""
        if self.subject is not Subject.ATTRIBUTES:
            return self.subject.value
        return self.subject_parts[0] if len(self.subject_parts) == 1 else list(self.subject_parts)

    @property
    def required_entries(self) -> tuple[tuple[str, str], ...]:
        """All that the attributes of a check must match: `match`, and any value of a subject that is not to be missing."""
        if self.on_missing is not OnMissing.SKIP:
            return self.match
        named = {name for name, _ in self.match}
        needed = (part for part in self.subject_parts if part not in named and part not in ("api_key", "ip"))
        return (*self.match, *((part, "*") for part in needed))


class Tier(msgspec.Struct, frozen=True, gc=False):
    """A class of callers and its rules.

    Args:
        name: 1 to 64 of `[A-Za-z0-9_.-]`.
        rules: in the order of the policy; names unique.
        limits: over all endpoints of the tier, counted for each caller with sliding_window, charged with the rule's.
        managed_by_file: whether the policy file owns it.
        quotas: over all endpoints, in fixed periods, charged with the rule's limits by every check; the shortest first.
        overage: what passes above its quotas; None for nothing.
        overrides: other limits for some subjects of its rules; rules and subjects unique together.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    limits: tuple[Limit, ...] = ()
    managed_by_file: bool = False
    quotas: tuple[Quota, ...] = ()
    overage: Overage | None = None
    overrides: tuple[SubjectOverride, ...] = ()

    @classmethod
    def make(
        cls,
        name: str,
        rules: Iterable[Rule] = (),
        limits: Iterable[Limit | str] = (),
        quotas: Iterable[Quota | str] = (),
        overage: object = None,
    ) -> Tier:
        """Validate a tier.

        Args:
            name: see the class; so are all others.
            rules: validated rules.
            limits: limits or their texts.
            quotas: quotas or their texts.
            overage: an `Overage`, or what `Overage.parse` reads.

        Returns:
            The tier.

        Raises:
            PolicyError: naming what is wrong and the remedy.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PolicyError(f"tier name {short(name)} must be 1 to 64 of letters, digits, '_', '.', '-'")
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
        sold = fit_quotas(quotas)
        above = overage if isinstance(overage, Overage) else Overage.parse(overage)
        require_quotas(above, sold)
        return cls(name=name, rules=ordered, limits=parsed, quotas=sold, overage=above)


class ApiKey(msgspec.Struct, frozen=True, gc=False):
    """An API key as the catalog knows it: never the key itself.

    Args:
        sha256: lower-case hex digest of the key.
        status: active or revoked.
        name: a label for people.
        expires_at_us: µs since the epoch (UTC) from which the key is refused; None for never.
        overrides: other limits for this key.
        managed_by_file: whether the policy file owns it.
        counts_as: id of the key that it replaced, whose counters it goes on with; empty where it replaced none.
        customer: name of the customer that owns it; empty for none.
        inherits_tier: whether its tier is that of its customer, also when that changes.
    """

    sha256: str
    tier: str
    status: KeyStatus = KeyStatus.ACTIVE
    name: str = ""
    expires_at_us: int | None = None
    overrides: tuple[Override, ...] = ()
    managed_by_file: bool = False
    counts_as: str = ""
    customer: str = ""
    inherits_tier: bool = False

    @property
    def id(self) -> str:
        """The key's public name: the first 24 hex digits of its digest. Logs use it."""
        return self.sha256[:24]

    @property
    def owner(self) -> str:
        """The id that counters use: that of the first key of its owner, however often it was rotated since."""
        return self.counts_as or self.id


class Policy(msgspec.Struct, frozen=True, gc=False):
    """A whole policy, valid in itself.

    Args:
        tiers: names unique.
        api_keys: digests unique; each tier exists.
        anonymous_tier: tier of checks that bring no key; None refuses them.
        attributes: where gateways' requests carry attributes; names unique.
        callers: who a caller without an API key is; None where only `anonymous_tier` says it.
        jwt: which bearer tokens of other issuers are accepted; None for none.
        namespaces: names unique.
        access: who is allowed or denied before anything is counted.
        customers: names, external ids and attribute values unique; each tier exists.
        notify: who is notified of thresholds, API keys and blocks; one secret for each URL.
    """

    tiers: tuple[Tier, ...]
    api_keys: tuple[ApiKey, ...] = ()
    anonymous_tier: str | None = None
    attributes: tuple[AttributeSource, ...] = ()
    callers: CallerRules | None = None
    jwt: JwtPolicy | None = None
    namespaces: tuple[Namespace, ...] = ()
    access: tuple[AccessEntry, ...] = ()
    customers: tuple[Customer, ...] = ()
    notify: tuple[NotifyTarget, ...] = ()

    @property
    def caller_policy(self) -> CallerPolicy:
        """What it says of callers without an API key."""
        owned = customer_attributes(self.customers)
        return CallerPolicy(
            self.anonymous_tier, self.callers, self.attributes, self.jwt, self.namespaces, self.access, owned, self.notify
        )


def canonical_pattern(endpoint: object) -> str:
    """Validate an endpoint pattern and spell it as checked paths are spelled.

    Args:
        endpoint: literal path with `*` and `{name}` in it.

    Returns:
        The pattern; every `{name}` as it was written.

    Raises:
        PolicyError: naming the pattern and the remedy.
    """
    if isinstance(endpoint, str) and endpoint.startswith(DESCRIPTOR):
        return canonical_descriptor(endpoint)
    if not isinstance(endpoint, str) or not endpoint.startswith("/") or len(endpoint) > 1024:
        raise PolicyError(f"endpoint {short(endpoint)} must begin with '/' and have at most 1024 characters")
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
    canonical, remedy = canonical_path(probe, _PATTERN_PATHS)
    if canonical is None:
        raise PolicyError(f"endpoint {endpoint!r}: {remedy}")
    if canonical != probe:
        raise PolicyError(f"endpoint {endpoint!r} is not spelled as requests arrive: write it as {canonical!r}")
    return endpoint


def parse_key_digest(api_key: object = None, sha256: object = None, hmac_sha256: object = None) -> str:
    """The digest of a policy's key, given as itself or as its digest.

    Args:
        api_key: the key, or None.
        sha256: its digest in hex, or None.
        hmac_sha256: its digest in hex under the pepper, or None; exactly one of the three.

    Returns:
        64 lower-case hex digits.

    Raises:
        PolicyError: saying what is wrong, without repeating the key.
    """
    if sum(given is not None for given in (api_key, sha256, hmac_sha256)) != 1:
        raise PolicyError("an API key needs exactly one of 'key', 'sha256' and 'hmac_sha256'")
    if api_key is None:
        digest = require_digest(
            "sha256" if hmac_sha256 is None else "hmac_sha256", sha256 if hmac_sha256 is None else hmac_sha256
        )
        used = key_hash_as_set()
        if used is not None and (hmac_sha256 is None) == (used.kind == HMAC_SHA256):
            raise PolicyError(
                f"keys.hash is {used.kind!r}: a digest of another kind matches no API key; give {used.field}, or the key itself"
            )
        return digest
    if not isinstance(api_key, str) or len(api_key) < MIN_WRITTEN_KEY or not FORM.fullmatch(api_key):
        raise PolicyError(f"a 'key' must have {MIN_WRITTEN_KEY} to {MAX_KEY} visible ASCII characters and no spaces")
    if is_mistyped(api_key):
        raise PolicyError(
            f"the key that begins {api_key[:6]!r} has Tidegate's prefix but wrong check characters: "
            "it is mistyped; make one with 'tidegate keys create' or use another prefix"
        )
    return hash_api_key(api_key)


def require_digest(field: str, value: object) -> str:
    """A digest of an API key, whether or not keys are hashed like that.

    Args:
        field: sha256 or hmac_sha256.

    Returns:
        64 lower-case hex digits.

    Raises:
        PolicyError: saying what is wrong.
    """
    used = PLAIN if field == PLAIN.field else key_hash_in_use()
    command = "printf %s KEY | sha256sum" if field == PLAIN.field else "printf %s KEY | openssl dgst -sha256 -hmac PEPPER"
    if not isinstance(value, str) or not _SHA256.fullmatch(value.lower()):
        raise PolicyError(f"{field} {short(value)} must be 64 hex digits: {command}")
    if value.lower() in _digests_of_nothing(used):
        raise PolicyError(f"{field} is the digest of no text at all, so no API key matches it: {command}")
    return value.lower()


@lru_cache(maxsize=8)
def _digests_of_nothing(used: KeyHash) -> frozenset[str]:
    return frozenset(used.start(text).hexdigest() for text in _EMPTY)


def subject_text(rule: Rule) -> str:
    """The subject of a rule as one text, for messages and answers: names joined by commas."""
    value = rule.subject_value
    return value if isinstance(value, str) else ",".join(value)


def _subject(subject: object) -> tuple[Subject, tuple[str, ...]]:
    """The kind of a subject, and its parts where they are attributes."""
    if isinstance(subject, str) and subject in ("api_key", "ip", "tier", "customer"):
        return Subject(subject), ()
    if not isinstance(subject, str) and not isinstance(subject, list | tuple):
        raise PolicyError(f'subject {short(subject)} is not known: write "user", or ["org", "user"] for each combination')
    parts = subject_parts((subject,) if isinstance(subject, str) else subject)
    if len(parts) == 1 and parts[0] in ("api_key", "ip"):
        return Subject(parts[0]), ()
    return Subject.ATTRIBUTES, parts


def _require_for_descriptor(methods: tuple[str, ...], subject: Subject, match: tuple[tuple[str, str], ...]) -> None:
    if match:
        raise PolicyError("match is not for a rule with a descriptor: put its entries into the descriptor")
    if methods:
        raise PolicyError("methods are not for a descriptor, which has no method: put an entry for it into the descriptor")
    if subject == Subject.IP:
        raise PolicyError(
            "subject 'ip' is not for a descriptor: put an entry for the address into it, such as remote_address = \"*\""
        )


def _require_action_alone(action: AccessAction, limits: tuple[Limit, ...], quotas: tuple[Quota, ...], mode: str) -> None:
    if limits or quotas:
        raise PolicyError(f"action {action.value!r} stands in place of limits and quotas: remove them, or the action")
    if mode != Mode.ENFORCE:
        raise PolicyError(f"action {action.value!r} is for rules with mode 'enforce', not {short(mode)}: leave the mode out")


def _method(value: object) -> str:
    if not isinstance(value, str) or not _METHOD.fullmatch(value.upper()):
        raise PolicyError(f"method {short(value)} is not an HTTP method: for example GET")
    return value.upper()
