"""Limits in the request: a back end names a namespace, a subject and, unless the policy has them, the limits.

The back end is trusted to name its own limits, so their work is bounded: 16 limits a request, and compiled limits are kept for
`MAX_COMPILED` distinct combinations per process; beyond it the least recently used are compiled again (about 15 µs).
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import msgspec

from tidegate.counters import Charge, ChargeOutcome, CounterStore
from tidegate.decision import MAX_COST, Decision
from tidegate.errors import BadRequest, PolicyError, StoreUnavailable, TidegateError, clip
from tidegate.gate.access import AccessControl
from tidegate.gate.windows import with_windows
from tidegate.observation import Observation
from tidegate.policy.fields import member_of
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.namespaces import MAX_SUBJECT, CompiledNamespace, limit_set, require_name

MAX_COMPILED: Final = 10_000
MAX_LIMITS: Final = 16
_MAX_PLAIN: Final = 128
"""Longer subjects are counted by their digest: a counter's key must not grow with what a client sends."""


class LimitCheck(msgspec.Struct, frozen=True, gc=False):
    """A check that names its own limits. Make it with `RequestLimits.read`, which validates.

    Args:
        limits: to be charged.
        subject: of the counter, unambiguous in its namespace.
        cost: 0 (peek) to 1,000,000,000.
        exempt: whether it is allowed without being counted.
    """

    limits: LimitSet
    subject: str
    cost: int = 1
    exempt: bool = False


class RequestLimits:
    """Decides checks that name their own limits. One event loop.

    Args:
        counters: what was consumed.
        load_namespaces: gives those of the policy by name, as they are now.
        observe: callback run for every check; must not raise.
        access: denies and exempts checks; None for none.
    """

    def __init__(
        self,
        counters: CounterStore,
        load_namespaces: Callable[[], Awaitable[Mapping[str, CompiledNamespace]]],
        observe: Callable[[Observation], None] | None = None,
        access: AccessControl | None = None,
        *,
        all_windows: bool = False,
    ) -> None:
        self._all_windows = all_windows
        self._counters = counters
        self.namespaces = load_namespaces
        self._observe = observe
        self._access = access
        self._compiled: OrderedDict[tuple[str, str, tuple[str, ...]], LimitSet] = OrderedDict()

    def read(
        self,
        namespaces: Mapping[str, CompiledNamespace],
        namespace: object,
        subject: object,
        limits: object = (),
        algorithm: object = None,
        cost: object = 1,
    ) -> LimitCheck:
        """Validate a request.

        Args:
            namespaces: of the policy, as `namespaces` gives them.
            namespace: 1 to 64 of `[A-Za-z0-9_.-]`; need not be in the policy if `limits` come.
            subject: 1 to 256 characters of any kind.
            limits: texts such as `10/minute`, at most 16; ignored where the policy has limits for the subject.
            algorithm: name; that of the namespace, else sliding_window, where not given.
            cost: whole number.

        Raises:
            BadRequest: naming the field, its value and the remedy.
            Blocked: the policy or an operator denies the subject: to `[[access]]` and blocks, `namespace` and `subject` are
                attributes of the check.
        """
        if type(cost) is not int or not 0 <= cost <= MAX_COST:
            raise BadRequest(f"cost {clip(cost)} must be a whole number from 0 to {MAX_COST}", field="cost")
        if type(subject) is not str or not 0 < len(subject) <= MAX_SUBJECT:
            raise BadRequest(f"subject {clip(subject)} must be a text of 1 to {MAX_SUBJECT} characters", field="subject")
        known = namespaces.get(namespace) if type(namespace) is str else None
        found = None if known is None else known.limits_of(subject)
        if found is None:
            default = Algorithm.SLIDING_WINDOW if known is None else known.namespace.algorithm
            found = self._compile(namespace, default if algorithm is None else algorithm, limits)
        access = self._access
        exempt = (
            access is not None and access.lists.active and access.admit(None, {"namespace": str(namespace), "subject": subject})
        )
        return LimitCheck(found, counter_subject(subject), cost, exempt)

    def _compile(self, namespace: object, algorithm: object, limits: object) -> LimitSet:
        """Limits of a request, compiled; the last `MAX_COMPILED` are kept."""
        if isinstance(limits, str) or not isinstance(limits, Sequence) or not all(type(limit) is str for limit in limits):
            raise BadRequest("limits must be a list of texts such as ['10/minute']", field="limits")
        if not 0 < len(limits) <= MAX_LIMITS:
            raise BadRequest(
                f"the request has {len(limits)} limits: send 1 to {MAX_LIMITS}, or add limits for namespace {clip(namespace)} "
                "to the policy",
                field="limits",
            )
        key = (str(namespace), str(algorithm), tuple(limits))
        compiled = self._compiled.get(key)
        if compiled is not None:
            self._compiled.move_to_end(key)
            return compiled
        field = "namespace"
        try:
            require_name(namespace)
            field = "algorithm"
            chosen = member_of(Algorithm, algorithm, "algorithm")
            field = "limits"
            compiled = limit_set(key[0], chosen, [Limit.parse(limit) for limit in limits])
        except PolicyError as error:
            raise BadRequest(error.reason, field=field) from None
        self._compiled[key] = compiled
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return compiled

    async def check(self, check: LimitCheck) -> Decision:
        """Decide one check, and charge it if it passes.

        Raises:
            StoreUnavailable: if the counter store fails and the namespace says deny.
        """
        [outcome] = await self.check_many([check])
        if isinstance(outcome, TidegateError):
            raise outcome
        if self._all_windows and not check.exempt:
            [outcome] = await with_windows(self._counters, ((outcome, ((check.limits, check.subject),)),))
        return outcome

    async def check_many(self, checks: Sequence[LimitCheck]) -> list[ChargeOutcome]:
        """Decide checks each on its own, in order, with one call to the counter store."""
        started_ns = time.perf_counter_ns()
        charges = [Charge(((each.limits, each.subject),), each.cost) for each in checks if not each.exempt]
        charged = iter(await self._counters.charge(charges)) if charges else iter(())
        outcomes = [Decision(True) if each.exempt else next(charged) for each in checks]
        if self._observe is not None and checks:
            latency_ns = (time.perf_counter_ns() - started_ns) // len(checks)
            for each, outcome in zip(checks, outcomes, strict=True):
                self._observe(_observation(each, outcome, latency_ns))
        return outcomes

    async def reset(self, namespace: str, subject: str) -> None:
        """Reset what a subject of a namespace consumed, whatever the limits and algorithms of its requests.

        Raises:
            BadRequest: if a name is not valid.
            StoreUnavailable: if the store does not answer.
        """
        counted = self.read({}, namespace, subject, ("1/second",)).subject
        one = Limit.parse("1/second")
        await self._counters.reset([(limit_set(namespace, algorithm, [one]), counted) for algorithm in Algorithm])


def counter_subject(subject: str) -> str:
    """The subject of a counter: `n:` and the text, or `N:` and a digest of a long text; no two subjects share one."""
    if len(subject) <= _MAX_PLAIN:
        return "n:" + subject
    return "N:" + hashlib.blake2b(subject.encode(errors="surrogatepass"), digest_size=32).hexdigest()


def _observation(check: LimitCheck, outcome: ChargeOutcome, latency_ns: int) -> Observation:
    if isinstance(outcome, StoreUnavailable):
        return Observation(None, outcome.code, latency_ns)
    denied_by = None if outcome.allowed else check.limits
    return Observation(outcome, None, latency_ns, (), check.subject, denied_by, check.cost)
