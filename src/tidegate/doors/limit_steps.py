"""What one call of a limited function, or one request, goes through: whether it counts, for whom, how much, and what was decided.

One body for `def` and `async def`: the steps are a generator that yields what is to be decided, and a driver of either kind
decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Final, cast

from tidegate.counters import CounterStore
from tidegate.decision import MAX_COST, Decision, clip
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.exceeded import RateLimitExceeded, loaded, starlette_error
from tidegate.doors.limit_arguments import (
    Place,
    UserFunction,
    caller_place,
    checked_methods,
    checked_number,
    limit_texts,
    parsed_limits,
)
from tidegate.doors.limiter import fit_subject
from tidegate.doors.python_requests import DjangoRequest, RequestView, client_ip
from tidegate.doors.stores import SWITCHES, SharedStore, shared_store
from tidegate.errors import BadRequest, SettingsError
from tidegate.policy.limits import Algorithm, LimitSet, OnFailure, member_of

Steps = Generator[Any, Any, Any]
"""Yields (limits, subject, cost) to be decided, or something to be awaited; receives the decision or the result."""
_MAX_SETS: Final = 4096


class LimitCall:
    """One call of a limited function, or one request of a dependency."""

    __slots__ = ("args", "cost", "decision", "denied", "kwargs", "limits", "name", "parameter", "pending", "subject", "view")

    def __init__(
        self,
        name: str,
        view: RequestView | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parameter: tuple[int, Any] | None = None,
    ) -> None:
        self.name = name
        self.view = view
        self.args = args
        self.kwargs = kwargs
        self.parameter = parameter
        self.limits: LimitSet | None = None
        self.subject = ""
        self.cost = 1
        self.pending = False
        self.denied = False
        self.decision: Decision | None = None

    def ask(self, function: UserFunction) -> Any:
        """Call a function of the user."""
        return function.call(None if self.view is None else self.view.native, self.args, self.kwargs)


class LimitSteps:
    """The arguments of a limit, and the steps of its calls. Parameters: see `limit`."""

    def __init__(
        self,
        limits: str | Sequence[str] | Callable[..., Any],
        *,
        key: str | Callable[..., Any] | None = None,
        cost: int | Callable[..., Any] = 1,
        methods: str | Iterable[str] | None = None,
        exempt_when: Callable[..., Any] | None = None,
        deduct_when: Callable[[Any], Any] | None = None,
        scope: str | None = None,
        algorithm: str = Algorithm.SLIDING_WINDOW,
        counters: str | CounterStore | None = None,
        on_failure: str = OnFailure.LOCAL,
        on_exceeded: Callable[..., Any] | None = None,
        error_message: str | Callable[..., Any] | None = None,
        trusted_proxies: Iterable[str] = (),
        block: bool = True,
        place: Place | None = None,
    ) -> None:
        self._place: Place = place or caller_place(2)
        with self._place.named():
            self._algorithm = member_of(Algorithm, algorithm, "algorithm")
            self._on_failure = member_of(OnFailure, on_failure, "on_failure")
            self._texts = None if callable(limits) else limit_texts(limits)
            if self._texts is not None:
                parsed_limits(self._texts, self._algorithm)
            self._limits_of = UserFunction(limits, "limits") if callable(limits) else None
            self._key = _checked_key(key)
            self._cost = cost if callable(cost) else checked_number(cost)
            self._cost_of = UserFunction(cost, "cost") if callable(cost) else None
            self._methods = checked_methods(methods)
            self._exempt_when = _optional(exempt_when, "exempt_when")
            self._deduct_when = _optional(deduct_when, "deduct_when")
            self._on_exceeded = _optional(on_exceeded, "on_exceeded")
            self._message = error_message if isinstance(error_message, str) else None
            self._message_of = None if isinstance(error_message, str) else _optional(error_message, "error_message")
            self._scope = scope
            if scope is not None and (not isinstance(scope, str) or not scope):
                raise SettingsError(f"scope {clip(scope)} must be a non-empty text such as 'search'")
            self._store: SharedStore = shared_store(counters)
            self._trusted = TrustedProxies(trusted_proxies, "trusted_proxies")
        self._block = block
        self._known: dict[str, LimitSet] = {}
        """By name of the limit, where the limits are always the same."""
        self._sets: dict[tuple[str, tuple[str, ...]], LimitSet] = {}

    # The steps of a call.

    def _before(self, call: LimitCall) -> Steps:
        """Decide whether a call may run."""
        view = call.view
        if not SWITCHES.enforced or (view is not None and not view.enabled):
            return
        if self._methods is not None and view is not None and view.method not in self._methods:
            return
        if self._exempt_when is not None and (yield from self._ask(self._exempt_when, call)):
            return
        limits = self._known.get(call.name)
        if limits is None:
            limits = yield from self._limit_set(call)
            if limits is None:
                return
        call.limits = limits
        call.subject = yield from self._subject(call)
        cost = self._cost
        after = self._deduct_when is not None
        if self._cost_of is not None:
            after = after or self._cost_of.of_result
            cost = 1 if self._cost_of.of_result else _charged(self._place, (yield from self._ask(self._cost_of, call)))
        call.cost = cast("int", cost)
        if after:
            decision = yield (limits, call.subject, 0)
            if decision.remaining < call.cost:
                # For the time of the retry. Should it pass, because a unit came back just now, it has been charged.
                decision = yield (limits, call.subject, call.cost)
            else:
                call.pending = True
        else:
            decision = yield (limits, call.subject, call.cost)
        call.decision = decision
        call.denied = not decision.allowed
        if view is not None:
            view.keep(decision)
            if type(view) is DjangoRequest:
                view.native.limited = call.denied or getattr(view.native, "limited", False)
        if not self._block:
            call.denied = False

    def _after(self, call: LimitCall, result: Any) -> Steps:
        """Charge a call that has run."""
        assert call.limits is not None
        if self._deduct_when is not None:
            wanted = self._deduct_when.function(result)
            if self._deduct_when.is_async:
                wanted = yield wanted
            if not wanted:
                return
        cost = call.cost
        if self._cost_of is not None and self._cost_of.of_result:
            counted = self._cost_of.function(result)
            cost = _charged(self._place, (yield counted) if self._cost_of.is_async else counted)
        decision = yield (call.limits, call.subject, cost)
        if not decision.allowed and decision.remaining:
            decision = yield (call.limits, call.subject, min(cost, decision.remaining))
        call.decision = decision
        if call.view is not None:
            call.view.keep(decision)

    def _deny(self, call: LimitCall) -> Steps:
        """What a denied call results in: what `on_exceeded` returns, else the error."""
        assert call.decision is not None
        if self._on_exceeded is not None:
            given = self._on_exceeded.function
            arguments: tuple[Any, ...] = (call.decision,)
            if self._on_exceeded.takes > 1:
                arguments = (None if call.view is None else call.view.native, call.decision)
            answer = given(*arguments)
            if self._on_exceeded.is_async:
                answer = yield answer
            if answer is not None:
                return answer
        message = self._message
        if self._message_of is not None:
            message = str((yield from self._ask(self._message_of, call)))
        if call.view is None:
            # An endpoint that takes no request: Starlette and FastAPI answer 429 all the same.
            made = RateLimitExceeded if loaded("starlette") is None else starlette_error
            raise made(call.decision, message, call.name)
        raise call.view.denied(call.decision, message, call.name)

    def _limit_set(self, call: LimitCall) -> Steps:
        texts = self._texts
        if self._limits_of is not None:
            given = yield from self._ask(self._limits_of, call)
            if given is None:
                return None
            with self._place.named():
                texts = limit_texts(given)
                parsed_limits(texts, self._algorithm)
        assert texts is not None
        known = self._sets.get((call.name, texts))
        if known is None:
            if len(self._sets) >= _MAX_SETS:
                self._sets.clear()
            known = self._sets[(call.name, texts)] = LimitSet(
                f"limit/{call.name}", self._algorithm, parsed_limits(texts, self._algorithm), self._on_failure, rule=call.name
            )
        if self._limits_of is None:
            if len(self._known) >= _MAX_SETS:
                self._known.clear()
            self._known[call.name] = known
        return known

    def _subject(self, call: LimitCall) -> Steps:
        key, view = self._key, call.view
        value: object = None
        if isinstance(key, UserFunction):
            value = yield from self._ask(key, call)
        elif key == "api_key":
            value = None if view is None else view.header("x-api-key")
            if value:
                return fit_subject(f"h:{value}")  # by its digest: a key is a secret
        elif key is not None and key != "ip":
            value = self._named_value(key, call)
        if value is not None and value != "":
            return fit_subject(f"={value}")
        if view is not None:
            return f"i:{client_ip(view, self._trusted)}"
        if key == "ip":
            raise BadRequest(f"key 'ip': no request among the arguments of {call.name}", field="key")
        return "*"

    def _named_value(self, key: str, call: LimitCall) -> object:
        """The value of a header, of a parameter of the function, or of an attribute of the request."""
        view = call.view
        if key.startswith("header:"):
            return None if view is None else view.header(key.removeprefix("header:").lower())
        place = call.parameter
        if key in call.kwargs:
            return call.kwargs[key]
        if place is not None:
            return call.args[place[0]] if place[0] < len(call.args) else place[1]
        return None if view is None else view.attribute(key)

    def _ask(self, function: UserFunction, call: LimitCall) -> Steps:
        answer = call.ask(function)
        return (yield answer) if function.is_async else answer

    # Drivers.

    def _run(self, steps: Steps) -> Any:
        decide = self._store.decide
        try:
            step = next(steps)
            while True:
                step = steps.send(decide(*step))
        except StopIteration as finished:
            return finished.value

    async def _run_async(self, steps: Steps) -> Any:
        store = self._store
        memory = store.memory
        try:
            step = next(steps)
            while True:
                if type(step) is not tuple:
                    answer = await step
                elif memory is not None:
                    answer = memory.charge_one(*step)
                else:
                    answer = await store.decide_async(*step)
                step = steps.send(answer)
        except StopIteration as finished:
            return finished.value


def _charged(place: Place, cost: Any) -> int:
    """A cost that a function gave."""
    if type(cost) is not int or not 0 <= cost <= MAX_COST:
        raise BadRequest(
            f"{place.file}:{place.line}: the function given as cost returned {clip(cost)}; "
            f"it must return a whole number from 0 to {MAX_COST}",
            field="cost",
        )
    return cost


def _checked_key(key: str | Callable[..., Any] | None) -> str | UserFunction | None:
    if key is None or (isinstance(key, str) and key.removeprefix("header:")):
        return key
    return _function(key, "key", "'ip', 'api_key', 'header:NAME', the name of a parameter or attribute, or a function")


def _optional(function: object, argument: str) -> UserFunction | None:
    return None if function is None else _function(function, argument, "a function")


def _function(function: object, argument: str, expected: str) -> UserFunction:
    if not callable(function):
        raise SettingsError(f"{argument} {clip(function)} is not valid: give {expected}")
    return UserFunction(function, argument)
