"""What one call of a limited function, or one request, goes through: whether it counts, for whom, how much, and what was decided.

One body for `def` and `async def`: the steps are a generator that yields what is to be decided, and a driver of either kind
decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast

import msgspec

from tidegate.counters import Counters, CounterStore
from tidegate.counters.factory import embedded_leases
from tidegate.decision import Decision
from tidegate.doors.call_holds import STEPS, CallHold, OpenHold
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.exceeded import RateLimitExceeded, loaded, starlette_error
from tidegate.doors.limit_arguments import (
    CallLimits,
    Place,
    UserFunction,
    call_limits,
    caller_place,
    checked_key,
    checked_methods,
    checked_number,
    limit_texts,
    optional_function,
    parsed_limits,
)
from tidegate.doors.limit_call import LimitCall, Steps, charged, response_of, settled_decision
from tidegate.doors.limited_subject import fit_subject
from tidegate.doors.python_requests import client_ip
from tidegate.doors.request_view import RequestView, stricter
from tidegate.doors.stores import SWITCHES, SharedStore, shared_store
from tidegate.doors.wsgi_requests import DjangoRequest
from tidegate.errors import BadRequest, PolicyError, SettingsError, clip
from tidegate.policy.fields import member_of
from tidegate.policy.limits import Algorithm, LimitSet, OnFailure

_MAX_SETS: Final = 4096
_MAX_CLIENTS: Final = 4096


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
        leases: bool | None = None,
        place: Place | None = None,
    ) -> None:
        self._place: Place = place or caller_place(2)
        with self._place.named():
            self._algorithm = member_of(Algorithm, algorithm, "algorithm")
            self._on_failure = member_of(OnFailure, on_failure, "on_failure")
            self._texts = None if callable(limits) else limit_texts(limits)
            rates, slots = (True, None) if self._texts is None else parsed_limits(self._texts, self._algorithm)
            self._has_slots = slots is not None
            self._limits_of = UserFunction(limits, "limits") if callable(limits) else None
            self._key = checked_key(key)
            self._cost = cost if callable(cost) else checked_number(cost)
            self._cost_of = UserFunction(cost, "cost") if callable(cost) else None
            self._methods = checked_methods(methods)
            self._exempt_when = optional_function(exempt_when, "exempt_when")
            self._deduct_when = optional_function(deduct_when, "deduct_when")
            self._on_exceeded = optional_function(on_exceeded, "on_exceeded")
            self._message = error_message if isinstance(error_message, str) else None
            self._message_of = None if isinstance(error_message, str) else optional_function(error_message, "error_message")
            self._scope = scope
            if scope is not None and (not isinstance(scope, str) or not scope):
                raise SettingsError(f"scope {clip(scope)} must be a non-empty text such as 'search'")
            self._leases = embedded_leases(leases).enabled
            self._store: SharedStore = shared_store(counters)
            if slots is not None:
                self._require_slots(slots.text)
                if not rates and self.charges_after:
                    raise SettingsError(
                        f"limits have only {slots.text!r}: deduct_when, and cost of the response, have no effect on it"
                    )
            self._trusted = TrustedProxies(trusted_proxies, "trusted_proxies")
        self._block = block
        self._known: dict[str, CallLimits] = {}
        """By name of the limit, where the limits are always the same."""
        self._sets: dict[tuple[str, tuple[str, ...]], CallLimits] = {}
        self._clients: dict[str, str] = {}
        """By address of a peer that is no trusted proxy: how it is counted."""
        functions = (self._limits_of, self._cost_of, self._exempt_when, self._deduct_when)
        self._plain = not (self._has_slots or any(functions) or (isinstance(self._key, UserFunction) and self._key.is_async))
        """Whether the steps up to the decision need no function of the user that may be awaited, and charge once."""

    @property
    def charges_after(self) -> bool:
        """Whether the response has to be known before a request is charged."""
        return self._deduct_when is not None or self._costs_by_result

    @property
    def needs_end(self) -> bool:
        """Whether the end of a request has to be known."""
        return self.charges_after or self._has_slots or self._texts is None

    @property
    def _costs_by_result(self) -> bool:
        return self._cost_of is not None and self._cost_of.of_result

    def _require_slots(self, text: str) -> None:
        """Refuse a concurrency limit where the store cannot count slots."""
        if self._store.needs_loop:
            raise SettingsError(f"limit {text!r} counts calls in progress, which needs the URL of a store as counters")

    # The steps of a call.

    def _skips(self, call: LimitCall) -> bool:
        """Whether a call is not limited at all."""
        view = call.view
        if not SWITCHES.enforced or (view is not None and not view.enabled):
            return True
        return self._methods is not None and view is not None and view.method not in self._methods

    def _plain_limits(self, call: LimitCall) -> LimitSet | None:
        """The limits of a call where nothing has to be awaited to know them and the subject, which it gets; None for none."""
        if self._skips(call):
            return None
        assert self._texts is not None
        call.rates = rates = (self._known.get(call.name) or self._limits_of_call(call.name, self._texts)).rates
        call.subject = self._counted(self._value(call), call)
        return rates

    def _decided(self, call: LimitCall, decision: Decision) -> None:
        """Note the decision of a call."""
        call.decision = call.kept = decision
        call.denied = not decision.allowed
        view = call.view
        if view is not None:
            call.kept = view.keep(decision)
            if type(view) is DjangoRequest:
                view.native.limited = call.denied or getattr(view.native, "limited", False)
        if not self._block:
            call.denied = False

    def _before(self, call: LimitCall) -> Steps:
        """Decide whether a call may run."""
        if self._skips(call):
            return
        if self._exempt_when is not None and (yield from self._ask(self._exempt_when, call)):
            return
        limits = self._known.get(call.name)
        if limits is None:
            limits = yield from self._limit_set(call)
            if limits is None:
                return
        call.rates = limits.rates
        call.subject = yield from self._subject(call)
        cost = self._cost
        if self._cost_of is not None:
            cost = 1 if self._cost_of.of_result else charged(self._place, (yield from self._ask(self._cost_of, call)))
        call.cost = cast("int", cost)
        if limits.slots is not None and not call.ends:
            raise PolicyError(
                f"limit {limits.slots.limits[0].text!r} counts requests until their end, which is not known here: use it as a "
                "decorator of the endpoint, or in a middleware",
                self._place.file,
                self._place.line,
            )
        holds = self._deduct_when is not None and not self._costs_by_result and self._store.keeps_holds
        decision = None
        if limits.rates is not None and not (holds or (limits.slots is not None and not self._costs_by_result)):
            decision = yield from self._decide_rates(call, limits.rates)
        if holds or (limits.slots is not None and (decision is None or decision.allowed or not self._block)):
            held = yield from self._open_hold(call, limits)
            decision = held if decision is None else stricter(decision, held)
        assert decision is not None
        self._decided(call, decision)

    def _decide_rates(self, call: LimitCall, rates: LimitSet) -> Steps:
        """Charge a call, or look whether it may be charged when it has run."""
        if not self.charges_after:
            return (yield (rates, call.subject, call.cost))
        decision = yield (rates, call.subject, 0)
        if decision.remaining < call.cost:
            # For the time of the retry. Should it pass, because a unit came back just now, it has been charged.
            return (yield (rates, call.subject, call.cost))
        call.pending = True
        return decision

    def _open_hold(self, call: LimitCall, limits: CallLimits) -> Steps:
        """Take a slot, and reserve the cost where it is known before the call."""
        rates = None if self._costs_by_result else limits.rates
        counters: Counters = tuple((each, call.subject) for each in (rates, limits.slots) if each is not None)
        decision, handle = yield OpenHold(counters, call.cost)
        if handle is not None:
            call.hold = CallHold(self._store, handle, rates, call.cost, limits.slots is not None)
        else:
            call.pending = False
        binding = decision.binding
        if handle is None or self._deduct_when is None or rates is None or binding is None or binding.concurrent:
            return decision
        # Headers say what is left after the outcome: before it, that nothing was charged.
        return msgspec.structs.replace(decision, remaining=decision.remaining + call.cost)

    def _finish(self, call: LimitCall, result: Any, function: Callable[..., Any] | None = None) -> Steps:
        """Charge and settle a call that has run.

        Args:
            result: what it returned.
            function: that has run; None where `result` is the response of the framework.
        """
        hold, pending = call.hold, call.pending
        call.pending = False
        if pending:
            yield from self._charge_after(call, result)
        elif self._deduct_when is not None and hold is not None:
            wanted = yield from self._wants(result)
            hold.used = hold.cost if wanted else 0
        if hold is None:
            return
        if hold.has_slot and call.view is not None and call.view.on_close(result, hold.close, function):
            return
        settlement = yield hold
        if hold.limits is not None and self._deduct_when is not None and settlement is not None:
            self._keep(call, settled_decision(hold.limits, settlement, call.decision))

    def _abandon(self, call: LimitCall, error: BaseException) -> Steps:
        """Charge a call that raised."""
        response = response_of(error)
        hold, pending = call.hold, call.pending
        call.pending = False
        if pending and response is not None:
            yield from self._charge_after(call, response)
        elif self._deduct_when is not None and hold is not None:
            hold.used = 0
            if response is not None and (yield from self._wants(response)):
                hold.used = hold.cost

    def _wants(self, result: Any) -> Steps:
        """Whether a result is to be charged."""
        assert self._deduct_when is not None
        wanted = self._deduct_when.function(result)
        return (yield wanted) if self._deduct_when.is_async else wanted

    def _charge_after(self, call: LimitCall, result: Any) -> Steps:
        """Charge a call that has run."""
        if self._deduct_when is not None and not (yield from self._wants(result)):
            return
        cost = call.cost
        if self._cost_of is not None and self._cost_of.of_result:
            counted = self._cost_of.function(result)
            cost = charged(self._place, (yield counted) if self._cost_of.is_async else counted)
        decision = yield (call.rates, call.subject, cost)
        if not decision.allowed and decision.remaining:
            decision = yield (call.rates, call.subject, min(cost, decision.remaining))
        self._keep(call, decision)

    def _keep(self, call: LimitCall, decision: Decision) -> None:
        """Have a response say what is left after it."""
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
        return self._limits_of_call(call.name, texts)

    def _limits_of_call(self, name: str, texts: tuple[str, ...]) -> CallLimits:
        known = self._sets.get((name, texts))
        if known is None:
            known = call_limits(name, texts, self._algorithm, self._on_failure, self._leases)
            if known.slots is not None:
                self._require_slots(known.slots.limits[0].text)
            if len(self._sets) >= _MAX_SETS:
                self._sets.clear()
            self._sets[(name, texts)] = known
        if self._limits_of is None:
            if len(self._known) >= _MAX_SETS:
                self._known.clear()
            self._known[name] = known
        return known

    def _subject(self, call: LimitCall) -> Steps:
        value = self._value(call)
        if isinstance(self._key, UserFunction) and self._key.is_async:
            value = yield value
        return self._counted(value, call)

    def _value(self, call: LimitCall) -> Any:
        """What the key gives for a call, or an awaitable of it; None where the address is counted."""
        key = self._key
        if key is None or key == "ip":
            return None
        if isinstance(key, UserFunction):
            return call.ask(key)
        if key == "api_key":
            return None if call.view is None else call.view.header("x-api-key")
        return self._named_value(key, call)

    def _counted(self, value: object, call: LimitCall) -> str:
        """The subject of a call.

        Args:
            value: what the key gave.
        """
        if value is not None and value != "":
            # An API key by its digest: it is a secret.
            return fit_subject(f"h:{value}" if self._key == "api_key" else f"={value}")
        if call.view is not None:
            return self._client(call.view)
        if self._key == "ip":
            raise BadRequest(f"key 'ip': no request among the arguments of {call.name}", field="key")
        return "*"

    def _client(self, view: RequestView) -> str:
        peer = view.peer()
        known = self._clients.get(peer)
        if known is None:
            known = f"i:{client_ip(view, self._trusted)}"
            if not self._trusted.trusts(peer):
                if len(self._clients) >= _MAX_CLIENTS:
                    self._clients.clear()
                self._clients[peer] = known
        return known

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

    def _decide(self, call: LimitCall) -> None:
        """Decide whether a call may run, from a thread."""
        if not self._plain:
            self._run(self._before(call))
            return
        limits = self._plain_limits(call)
        if limits is not None:
            self._decided(call, self._store.decide(limits, call.subject, cast("int", self._cost)))

    async def _decide_async(self, call: LimitCall) -> None:
        """Decide whether a call may run, from an event loop."""
        if not self._plain:
            await self._run_async(self._before(call))
            return
        limits = self._plain_limits(call)
        if limits is None:
            return
        cost, store = cast("int", self._cost), self._store
        if store.memory is not None:
            decision = store.memory.charge_one(limits, call.subject, cost)
        else:
            leased = store.take(limits, call.subject, cost)
            decision = leased if leased is not None else await store.decide_async(limits, call.subject, cost)
        self._decided(call, decision)

    def _end_failed(self, call: LimitCall, error: BaseException) -> None:
        """Charge and settle a call that raised, from a thread."""
        try:
            self._run(self._abandon(call, error))
        finally:
            if call.hold is not None:
                call.hold.run(self._store)

    async def _end_failed_async(self, call: LimitCall, error: BaseException) -> None:
        """Charge and settle a call that raised or was cancelled, from an event loop."""
        try:
            await self._run_async(self._abandon(call, error))
        finally:
            if call.hold is not None:
                await call.hold.run_async(self._store)

    def _run(self, steps: Steps) -> Any:
        store = self._store
        try:
            step = next(steps)
            while True:
                step = steps.send(store.decide(*step) if type(step) is tuple else step.run(store))
        except StopIteration as finished:
            return finished.value

    async def _run_async(self, steps: Steps) -> Any:
        store = self._store
        memory = store.memory
        try:
            step = next(steps)
            while True:
                if type(step) is not tuple:
                    answer = await (step.run_async(store) if type(step) in STEPS else step)
                elif memory is not None:
                    answer = memory.charge_one(*step)
                else:
                    answer = await store.decide_async(*step)
                step = steps.send(answer)
        except StopIteration as finished:
            return finished.value
