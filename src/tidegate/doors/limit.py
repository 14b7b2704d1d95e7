"""`limit`: a limit as a decorator of functions, and as a dependency of FastAPI."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias, TypeVar, cast, overload

from tidegate.counters import CounterStore
from tidegate.decision import Decision
from tidegate.doors.asgi_request import put_starlette_headers
from tidegate.doors.exceeded import RateLimitExceeded, loaded
from tidegate.doors.limit_arguments import (
    Place,
    UserFunction,
    function_place,
    parameter_place,
    request_parameters,
)
from tidegate.doors.limit_call import LimitCall
from tidegate.doors.limit_steps import LimitSteps
from tidegate.doors.limited_functions import (
    EXEMPT,
    LIMITS,
    RESPONSE,
    TOO_MANY_REQUESTS,
    answered,
    endpoint_name,
    own_response,
    take_response,
    takes_any,
)
from tidegate.doors.python_requests import flask_view, view_of
from tidegate.doors.request_view import RequestView
from tidegate.errors import BadRequest, PolicyError, SettingsError, TidegateError
from tidegate.policy.limits import Algorithm, OnFailure

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])
_Find: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], RequestView | None]

_NOT_FUNCTIONS: Final = (type, staticmethod, classmethod, property)


class limit(LimitSteps):
    """Limits the calls of a function, each caller by itself.

        @limit("100/minute", key="ip")
        async def search(request): ...

        @limit("5/minute; 50/day", key="email")
        def send_mail(email: str) -> None: ...

        @app.get("/items", dependencies=[Depends(limit("100/minute", key=user_id))])

    A denied call does not run the function. It raises `RateLimitExceeded`, which Starlette, FastAPI and Flask answer with 429 as
    JSON; a view of Django returns that answer.

    Functions given here take nothing, the request, or what the limited function takes; in `async def` functions they may be
    `async def` themselves.

    Args:
        limits: a text such as `100/minute`, several separated by `;`, a list of texts, or a function that gives one of these, or
            None for no limit. `20 concurrent` limits calls in progress: those of views of Flask and Django until the response was
            sent, others until they return.
        key: whom to count: `ip`, `api_key` (the X-API-Key header), `header:NAME`, the name of a parameter of the function or of
            an attribute of the request, or a function. Where its value is missing, the address is counted. By default `ip` where
            there is a request; else all calls together.
        cost: units of a call; a number, or a function. One whose parameter is named `result` or `response` gets what the function
            returned; its cost is charged afterwards, at most what is left.
        methods: HTTP methods that are limited; all where not given.
        exempt_when: a function; calls for which it gives true are neither limited nor counted.
        deduct_when: a function of the response; a call is charged only if it gives true, and counts while it is in progress. A
            limit that is used up denies anyway.
        scope: name of the limit; limits of one scope on one store count together. By default the function's name.
        algorithm: fixed_window, sliding_window, sliding_log, token_bucket or leaky_bucket.
        counters: URL or store; by default that of the environment variable `TIDEGATE_COUNTERS__URL`, else `memory://`.
        on_failure: local, allow or deny, while the store is unavailable.
        on_exceeded: a function of the decision, or of request and decision, that is called at a denial; what it returns, unless
            that is None, is the result of the call.
        error_message: text of the error, or a function that gives it.
        trusted_proxies: whose `X-Real-IP` and `X-Forwarded-For` are believed for `ip`.
        block: false to run the function in any case; `request.limited` of Django then says whether it was denied.
        leases: on Redis, whether units of busy subjects are charged in advance, so that most calls need none of Redis; by default
            as the environment variable `TIDEGATE_LEASES__ENABLED` says, else yes.
        place: named in errors, where not the caller's.

    Raises:
        PolicyError: at import, naming the place, if an argument is not valid.
    """

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
        super().__init__(
            limits,
            key=key,
            cost=cost,
            methods=methods,
            exempt_when=exempt_when,
            deduct_when=deduct_when,
            scope=scope,
            algorithm=algorithm,
            counters=counters,
            on_failure=on_failure,
            on_exceeded=on_exceeded,
            error_message=error_message,
            trusted_proxies=trusted_proxies,
            block=block,
            leases=leases,
            place=place,
        )
        # FastAPI looks here whether a dependency is to be awaited; a call uses the method of the class.
        self.__dict__["__call__"] = self._depend

    @property
    def responses(self) -> dict[int | str, dict[str, Any]]:
        """What OpenAPI says of a denial, for `responses=` of FastAPI."""
        return {429: TOO_MANY_REQUESTS}

    def __repr__(self) -> str:
        return f"limit({'; '.join(self._texts) if self._texts else self._limits_of}, scope={self._scope!r})"

    # Decorator.

    @overload
    def __call__(self, function: F, /) -> F: ...

    @overload
    def __call__(self, *, connection: Any, response: Any = None) -> Awaitable[Decision | None]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Decorate a function; as a dependency of FastAPI, decide a request."""
        if kwargs and not args:
            return self._depend(**kwargs)
        if len(args) != 1 or kwargs or not callable(args[0]) or isinstance(args[0], _NOT_FUNCTIONS):
            with self._place.named():
                raise SettingsError(
                    "it decorates functions and methods: write @limit('100/minute') with parentheses, below @staticmethod, "
                    "@classmethod and @property"
                )
        return self._decorate(args[0])

    def _decorate(self, function: F) -> F:
        place = function_place(function, self._place)
        is_async = inspect.iscoroutinefunction(function)
        with place.named():
            if inspect.isasyncgenfunction(function):
                raise SettingsError("async generators cannot be limited: limit the function that starts one")
            if self._has_slots and inspect.isgeneratorfunction(function):
                raise SettingsError("a generator has no known end: limit the function that uses it, or a view that returns it")
            if not is_async:
                self._require_blocking()
            find, parameter = self._finder(function)
        outer = list(getattr(function, LIMITS, ()))
        passes_on = bool(outer) and parameter_place(function, RESPONSE) is not None
        response = own_response(function)
        name = self._scope or place.function + (f"#{len(outer)}" if outer else "")

        wrap = self._wrap_async if is_async else self._wrap_blocking
        wrapper = wrap(function, name, find, parameter, passes_on, response or RESPONSE)
        setattr(wrapper, LIMITS, [*outer, self])
        if response is None:
            take_response(wrapper, function)
        return cast("F", wrapper)

    def _wrap_async(
        self,
        function: Callable[..., Any],
        name: str,
        find: _Find,
        parameter: tuple[int, Any] | None,
        passes_on: bool,
        response_name: str,
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            response = kwargs.pop(RESPONSE, None) if response_name is RESPONSE else kwargs.get(response_name)
            call = LimitCall(name, find(args, kwargs), args, kwargs, parameter)
            try:
                await self._decide_async(call)
                if call.denied:
                    return await self._run_async(self._deny(call))
            except TidegateError as error:
                return answered(call, error)
            if response is not None and call.decision is not None:
                put_starlette_headers(response, call.kept)
            try:
                result = await (function(*args, **kwargs, **{RESPONSE: response}) if passes_on else function(*args, **kwargs))
                if call.unfinished:
                    await self._run_async(self._finish(call, result, function))
            except BaseException as error:
                if call.unfinished:
                    await self._end_failed_async(call, error)
                raise
            if call.decision is not None and call.view is not None:
                call.view.add_headers(result, call.decision)
            return result

        return call_async

    def _wrap_blocking(
        self,
        function: Callable[..., Any],
        name: str,
        find: _Find,
        parameter: tuple[int, Any] | None,
        passes_on: bool,
        response_name: str,
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def call_blocking(*args: Any, **kwargs: Any) -> Any:
            response = kwargs.pop(RESPONSE, None) if response_name is RESPONSE else kwargs.get(response_name)
            call = LimitCall(name, find(args, kwargs), args, kwargs, parameter)
            try:
                self._decide(call)
                if call.denied:
                    return self._run(self._deny(call))
            except TidegateError as error:
                return answered(call, error)
            if response is not None and call.decision is not None:
                put_starlette_headers(response, call.kept)
            try:
                result = function(*args, **kwargs, **{RESPONSE: response}) if passes_on else function(*args, **kwargs)
                if call.unfinished:
                    self._run(self._finish(call, result, function))
            except BaseException as error:
                if call.unfinished:
                    self._end_failed(call, error)
                raise
            if call.decision is not None and call.view is not None:
                call.view.add_headers(result, call.decision)
            return result

        return call_blocking

    def _require_blocking(self) -> None:
        """Refuse what a function without an event loop cannot use."""
        if self._store.needs_loop:
            raise SettingsError("this counter store needs an event loop: give the URL of a store as counters")
        for argument in ("_limits_of", "_cost_of", "_exempt_when", "_deduct_when", "_on_exceeded", "_message_of", "_key"):
            given = getattr(self, argument)
            if isinstance(given, UserFunction) and given.is_async:
                raise SettingsError(f"{argument.strip('_').removesuffix('_of')} is async, but the function is not: make it a def")

    def _finder(self, function: Callable[..., Any]) -> tuple[_Find, tuple[int, Any] | None]:
        """How the request is found among the arguments of a function, and the parameter that the key names."""
        named = request_parameters(function)
        key = self._key
        parameter = parameter_place(function, key) if isinstance(key, str) and key not in ("ip", "api_key") else None
        takes_arguments = bool(named) or loaded("flask") is not None or takes_any(function)
        if isinstance(key, str) and parameter is None and not takes_arguments:
            raise SettingsError(
                f"key {key!r} needs a request, or a parameter of that name; the function has neither: "
                "add one, or give a function as key"
            )

        def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> RequestView | None:
            for name, place in named:
                given = kwargs.get(name)
                if given is None and place < len(args):
                    given = args[place]
                if given is not None and (view := view_of(given)) is not None:
                    return view
            for given in args[:2]:
                if (view := view_of(given)) is not None:
                    return view
            return flask_view()

        return find, parameter

    # Dependency of FastAPI.

    @property
    def __signature__(self) -> inspect.Signature:
        """What FastAPI gives to the dependency; other frameworks do not ask."""
        if loaded("fastapi") is None:
            return inspect.signature(type(self).__call__)
        self.require_cost_before("a dependency")
        if self._has_slots:
            with self._place.named():
                raise SettingsError(
                    "a dependency does not know when its request ends: use 'N concurrent' in a decorator of the endpoint, or in "
                    "RateLimitMiddleware"
                )
        from starlette.requests import HTTPConnection
        from starlette.responses import Response

        keyword = inspect.Parameter.KEYWORD_ONLY
        return inspect.Signature(
            [
                inspect.Parameter("connection", keyword, annotation=HTTPConnection),
                inspect.Parameter("response", keyword, annotation=Response),
            ]
        )

    def require_cost_before(self, who: str) -> None:
        """Refuse what needs the response.

        Args:
            who: runs before there is one, for the error.

        Raises:
            PolicyError: if a call is charged by its response.
        """
        with self._place.named():
            if self.charges_after:
                raise SettingsError(
                    f"{who} runs before the response exists: use deduct_when, and cost of the response, as a decorator of the "
                    "endpoint"
                )

    async def _depend(self, connection: Any, response: Any = None) -> Decision | None:
        scope = connection.scope
        endpoint = scope.get("endpoint")
        if getattr(endpoint, EXEMPT, False):
            return None
        try:
            return await self.check(connection, response=response)
        except (RateLimitExceeded, PolicyError):
            raise
        except TidegateError as error:
            view = view_of(connection)
            raise error if view is None else view.failure(error) from error

    async def check(self, connection: Any, *, name: str | None = None, response: Any = None) -> Decision | None:
        """Decide and charge a request or WebSocket: for messages of a WebSocket, middleware and code of your own.

        Args:
            connection: a request of Starlette, FastAPI or Django.
            name: of the limit; by default its scope, else the endpoint's name.
            response: gets the limit headers.

        Returns:
            The decision; None where the limit does not apply.

        Raises:
            RateLimitExceeded: if it is denied, unless `block` is false.
        """
        call = await self._begin(connection, name, ends=False)
        if response is not None and call.decision is not None:
            put_starlette_headers(response, call.kept)
        return call.decision

    async def begin(self, connection: Any, name: str) -> LimitCall:
        """As `check`, for a request whose end is known: `end` follows it.

        Args:
            connection: as for `check`.
            name: of the limit.

        Raises:
            RateLimitExceeded: as `check`.
        """
        return await self._begin(connection, name, ends=True)

    async def end(self, call: LimitCall) -> None:
        """Free the slot of a request that has ended, where it took one.

        Args:
            call: of `begin`.
        """
        if call.hold is not None:
            await call.hold.run_async(self._store)

    async def _begin(self, connection: Any, name: str | None, *, ends: bool) -> LimitCall:
        if self._deduct_when is not None or self._cost_of is not None:
            self.require_cost_before("check")
        view = view_of(connection)
        if view is None:
            raise BadRequest(f"{type(connection).__name__} is not a request of a framework that Tidegate knows", field="request")
        named = name or self._scope or endpoint_name(connection, self._label)
        call = LimitCall(named, view, (connection,), {}, ends=ends)
        await self._decide_async(call)
        if call.denied:
            await self._run_async(self._deny(call))
        return call

    async def close(self) -> None:
        """Close the connections of its store, which other limits of the same URL share; the next call opens new ones."""
        await self._store.close()

    def check_blocking(self, view: RequestView, name: str) -> Decision | None:
        """As `check`, without an event loop: for middleware.

        Args:
            name: of the limit, unless it has a scope.

        Raises:
            RateLimitExceeded: if it is denied.
        """
        return self._begin_blocking(view, name, ends=False).decision

    def begin_blocking(self, view: RequestView, name: str) -> LimitCall:
        """As `check_blocking`, for a request whose end is known: `end_blocking` or `abandon_blocking` follows it.

        Args:
            name: of the limit, unless it has a scope.

        Raises:
            RateLimitExceeded: if it is denied.
        """
        return self._begin_blocking(view, name, ends=True)

    def _begin_blocking(self, view: RequestView, name: str, *, ends: bool) -> LimitCall:
        call = LimitCall(self._scope or name, view, (view.native,), {}, ends=ends)
        self._decide(call)
        if call.denied:
            self._run(self._deny(call))
        return call

    def end_blocking(self, call: LimitCall, response: Any) -> None:
        """Charge a request by its response, where it is charged so; its slot is free when the response was sent.

        Args:
            call: of `begin_blocking`.
            response: of the framework.
        """
        if not call.unfinished:
            return
        try:
            self._run(self._finish(call, response))
        except TidegateError as error:
            # The app has run: to refuse its response would undo nothing.
            logger.warning("a response of %s was not charged: %s", call.name, error)

    def abandon_blocking(self, call: LimitCall, error: BaseException | None = None) -> None:
        """Free the slot of a request that has no response.

        Args:
            call: of `begin_blocking`.
            error: that the app raised.
        """
        if call.unfinished:
            self._end_failed(call, error or RuntimeError("no response"))

    @functools.cached_property
    def _label(self) -> str:
        """Tells limits of one endpoint apart."""
        key = self._key
        counted = key if isinstance(key, str) else "" if key is None else getattr(key.function, "__qualname__", "")
        methods = ",".join(sorted(self._methods or ()))
        return f"{counted}:{methods}:{self._algorithm}"
