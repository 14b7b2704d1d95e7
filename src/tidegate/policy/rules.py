"""What a tier may do at the endpoints of one pattern: `Rule`, validated here and nowhere else. `limits` reads its limits."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.access_entries import AccessAction
from tidegate.policy.attributes import OnMissing, match_of, subject_parts
from tidegate.policy.descriptors import PREFIX as DESCRIPTOR
from tidegate.policy.descriptors import canonical_descriptor, descriptor_entries, entries_text
from tidegate.policy.failures import FailureCount, require_countable
from tidegate.policy.fields import member_of, short
from tidegate.policy.globs import Glob
from tidegate.policy.limits import Algorithm, AnyAlgorithm, FailureAlgorithm, Limit, OnFailure, fit_limits, is_zero, split_limits
from tidegate.policy.paths import PathRules, canonical_path
from tidegate.policy.quotas import Overage, Quota, fit_quotas, require_quotas

_MAX_RULE_NAME: Final = 256
_RULE_NAME: Final = re.compile(r"[\x20-\x7e]{1,256}", re.ASCII)
_METHOD: Final = re.compile(r"[A-Z][A-Z0-9_-]{0,31}", re.ASCII)
# A pattern may have encoded slashes, whether or not the setting paths.encoded_slashes lets such paths through.
_PATTERN_PATHS: Final = PathRules((Glob("*"),))


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
            limits: limits or their texts; for what is not listed here see the class.
            methods: any case.
            subject: api_key, ip, tier, customer, the name of an attribute, or a list of such names without tier and customer.
            name: empty for the one made from methods, endpoint and match.
            match: patterns by attribute; None for none.
            quotas: quotas or their texts.
            overage: an `Overage`, or what `Overage.parse` reads.
            action: allow or deny, in place of limits and quotas; a limit of 0, such as `0/day`, means deny.
            count: requests, or failures; the following are for failures, see `FailureCount.make`.
            statuses: of responses that are failures.

        Raises:
            PolicyError: naming the field, its value and the remedy.
        """
        chosen = member_of(Algorithm, algorithm, "algorithm")
        acts, parsed = _action_and_limits(action, limits)
        sold = fit_quotas(quotas)
        failures = FailureCount.make(count, statuses, clear_on_success, penalty)
        _require_one_way(chosen, acts, parsed, sold, mode, failures)
        above = overage if isinstance(overage, Overage) else Overage.parse(overage)
        require_quotas(above, sold)
        upper = tuple(sorted({_method(method) for method in methods}))
        pattern = canonical_pattern(endpoint)
        kind, parts = _subject(subject)
        conditions = () if match is None else match_of(match)
        if pattern.startswith(DESCRIPTOR):
            _require_for_descriptor(upper, kind, conditions)
        missing = member_of(OnMissing, on_missing, "on_missing")
        _require_fields(missing, parts, priority)
        if not isinstance(leases, bool):
            raise PolicyError(f"leases {short(leases)} must be true or false")
        rule = cls(
            endpoint=pattern,
            limits=parsed,
            methods=upper,
            algorithm=chosen,
            subject=kind,
            priority=priority,
            mode=member_of(Mode, mode, "mode"),
            on_failure=member_of(OnFailure, on_failure, "on_failure"),
            match=conditions,
            subject_parts=parts,
            on_missing=missing,
            quotas=sold,
            overage=above,
            leases=leases,
            action=acts,
            failures=failures,
        )
        return msgspec.structs.replace(rule, name=_rule_name(rule, name, endpoint))

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


def subject_text(rule: Rule) -> str:
    """The subject of a rule as one text, for messages and answers: names joined by commas."""
    value = rule.subject_value
    return value if isinstance(value, str) else ",".join(value)


def _action_and_limits(action: str | None, limits: Iterable[Limit | str]) -> tuple[AccessAction | None, tuple[Limit, ...]]:
    """What a rule does in place of limits, and its limits; one of 0, such as `0/day`, denies."""
    given = tuple(limits)
    acts = None if action is None else member_of(AccessAction, action, "action")
    if acts is None and any(map(is_zero, given)):
        return AccessAction.DENY, ()
    return acts, tuple(limit if isinstance(limit, Limit) else Limit.parse(limit) for limit in given)


def _require_one_way(
    algorithm: Algorithm,
    action: AccessAction | None,
    limits: tuple[Limit, ...],
    quotas: tuple[Quota, ...],
    mode: str,
    failures: FailureCount | None,
) -> None:
    """Check that a rule counts failures, or has an action, or counts requests; and that its limits suit that."""
    if failures is not None:
        rates, _ = split_limits(limits)
        require_countable(rates, mode, quotas, action, algorithm)
        fit_limits(FailureAlgorithm.FAILURES, rates)
        return
    if action is not None:
        _require_action_alone(action, limits, quotas, mode)
        return
    rates, slots = split_limits(limits)
    if rates or not (quotas or slots):
        fit_limits(algorithm, rates)
    if slots is not None and mode == Mode.SOFT:
        raise PolicyError(f"limit {slots.text!r} cannot be soft, as slots that are not there cannot be taken: use enforce")


def _require_fields(on_missing: OnMissing, parts: tuple[str, ...], priority: object) -> None:
    if on_missing is not OnMissing.IP and not set(parts) - {"api_key", "ip"}:
        raise PolicyError(f"on_missing {on_missing.value!r} is for a subject with an attribute: name one, or leave it out")
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 1_000_000:
        raise PolicyError(f"priority {short(priority)} must be a whole number from -1000000 to 1000000")


def _rule_name(rule: Rule, name: str, endpoint: str) -> str:
    """The name given to a rule, or the one made from its fields."""
    if name:
        if not _RULE_NAME.fullmatch(name):
            raise PolicyError(f"rule name {short(name)} must be 1 to {_MAX_RULE_NAME} printable ASCII characters")
        return name
    made = rule.default_name
    if len(made) > _MAX_RULE_NAME:
        raise PolicyError(
            f"endpoint {short(endpoint)} needs a 'name' for its rule: the one made from methods, endpoint and match has "
            f"{len(made)} characters, and at most {_MAX_RULE_NAME} are kept"
        )
    return made


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
