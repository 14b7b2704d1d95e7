"""Arguments of `limit`, checked when it is made: a mistake fails at import, with the function, the file and the line."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

import msgspec

from tidegate.decision import MAX_COST
from tidegate.errors import PolicyError, SettingsError, clip
from tidegate.policy.fields import short
from tidegate.policy.limits import Algorithm, ConcurrencyAlgorithm, Limit, LimitSet, OnFailure, fit_limits, split_limits

_REQUEST_NAMES: Final = frozenset(("request", "websocket", "connection", "req"))
_REQUEST_TYPES: Final = frozenset(("Request", "WebSocket", "HTTPConnection", "HttpRequest", "ASGIRequest", "WSGIRequest"))
_RESULT_NAMES: Final = frozenset(("result", "response"))
_SEPARATORS: Final = re.compile(r"[;,|]")
_METHOD: Final = re.compile(r"[A-Za-z]{1,20}", re.ASCII)


class Place(msgspec.Struct, frozen=True):
    """Where a limit is in the user's code.

    Args:
        file: path.
        line: 1-based.
        function: qualified name of the limited function; empty before there is one.
    """

    file: str
    line: int
    function: str = ""

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors from within name this place."""
        try:
            yield
        except (PolicyError, SettingsError) as error:
            where = f"limit of {self.function}" if self.function else "limit"
            raise PolicyError(f"{where}: {error.message}", self.file, self.line) from None


def caller_place(depth: int) -> Place:
    """The place that called.

    Args:
        depth: frames between it and this function.
    """
    frame = sys._getframe(depth + 1)
    return Place(frame.f_code.co_filename, frame.f_lineno)


def function_place(function: Callable[..., Any], fallback: Place) -> Place:
    """The place of a function.

    Args:
        function: that is limited.
        fallback: where it has no code of its own.
    """
    code = getattr(function, "__code__", None)
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return Place(fallback.file, fallback.line, name) if code is None else Place(code.co_filename, code.co_firstlineno, name)


class UserFunction:
    """A function of the user that gives a limit, a key, a cost or an answer.

    Args:
        function: takes nothing, the request, or the arguments of the limited function.
        argument: its name, for errors.

    Attributes:
        is_async: whether its result must be awaited.
        takes: how many arguments it must be given.
        of_result: whether it takes what the limited function returned: its parameter is named `result` or `response`.
    """

    __slots__ = ("function", "is_async", "of_result", "takes")

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.function = function
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(type(function), "__call__", None)  # noqa: B004 - of an object with an async __call__
        )
        parameters = list(parameters_of(function).values())
        if not parameters and not _has_signature(function):
            parameters = [inspect.Parameter("value", inspect.Parameter.POSITIONAL_ONLY)]
        positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        self.takes = sum(each.default is each.empty for each in positional)
        takes_any = any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters)
        if not positional and not takes_any and parameters:
            raise SettingsError(f"{argument}: {function!r} has only keyword parameters; give a function of the request")
        if self.takes == 0 and takes_any:
            self.takes = 2
        elif self.takes == 0 and positional and positional[0].name in _REQUEST_NAMES:
            self.takes = 1
        self.of_result = bool(positional) and positional[0].name in _RESULT_NAMES

    def call(self, request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it with the request where there is one and it takes one argument, else with the function's arguments."""
        if self.takes == 0:
            return self.function()
        if request is not None and self.takes == 1:
            return self.function(request)
        return self.function(*args, **kwargs)


def _has_signature(function: Callable[..., Any]) -> bool:
    """Some functions written in C have none: they are taken to need one argument."""
    try:
        inspect.signature(function)
    except (TypeError, ValueError):
        return False
    except NameError:  # of an annotation, from Python 3.14 on
        return True
    return True


def limit_texts(value: object) -> tuple[str, ...]:
    """The limits in a text such as `10/second; 1000/day`, or in a list of texts.

    Raises:
        PolicyError: if it is neither.
    """
    texts: list[str] = []
    parts: Iterable[object] = [value] if isinstance(value, str) else value if isinstance(value, Sequence) else ()
    for part in parts:
        if not isinstance(part, str):
            raise PolicyError(f"limits must be a text such as '100/minute' or a list of such texts, not {short(part)}")
        texts += [each.strip() for each in _SEPARATORS.split(part) if each.strip()]
    if not texts:
        raise PolicyError(f"limits must be a text such as '100/minute' or a list of such texts, not {short(value)}")
    return tuple(texts)


class CallLimits(msgspec.Struct, frozen=True, gc=False, weakref=False):
    """The limits of a call, by how they count.

    Args:
        rates: limits per window; None for none.
        slots: the concurrency limit, how many calls are in progress; None for none.
    """

    rates: LimitSet | None
    slots: LimitSet | None


@lru_cache(maxsize=4096)
def parsed_limits(texts: tuple[str, ...], algorithm: Algorithm) -> tuple[tuple[Limit, ...], Limit | None]:
    """Limits of texts, checked; the last ones are kept, because functions give the same texts again and again.

    Returns:
        The limits per window, and that of calls in progress; None where there is none.

    Raises:
        PolicyError: if they are not valid.
    """
    rates, slots = split_limits(Limit.parse(text) for text in texts)
    return fit_limits(algorithm, rates) if rates or slots is None else (), slots


def call_limits(
    name: str, texts: tuple[str, ...], algorithm: Algorithm, on_failure: OnFailure, leases: bool = True
) -> CallLimits:
    """The limits of a call, ready for a counter store.

    Args:
        name: of the limit.
        texts: as a limit has them.
        leases: whether units may be leased.

    Raises:
        PolicyError: if they are not valid.
    """
    rates, slots = parsed_limits(texts, algorithm)
    return CallLimits(
        LimitSet(f"limit/{name}", algorithm, rates, on_failure, rule=name, leases=leases) if rates else None,
        LimitSet(f"slots/limit/{name}", ConcurrencyAlgorithm.CONCURRENT, (slots,), on_failure, rule=name) if slots else None,
    )


def checked_methods(methods: str | Iterable[str] | None) -> frozenset[str] | None:
    """HTTP methods in upper case.

    Raises:
        SettingsError: naming one that is not valid.
    """
    if methods is None:
        return None
    names = [methods] if isinstance(methods, str) else list(methods)
    for name in names:
        if not isinstance(name, str) or not _METHOD.fullmatch(name):
            raise SettingsError(f"methods has {short(name)}: give HTTP methods such as ['GET', 'POST']")
    if not names:
        raise SettingsError("methods is empty: no request would be limited; leave it out to limit all methods")
    return frozenset(name.upper() for name in names)


def checked_number(cost: object) -> int:
    """A cost that is a number.

    Raises:
        SettingsError: if it cannot be charged.
    """
    if type(cost) is not int or not 1 <= cost <= MAX_COST:
        raise SettingsError(f"cost {short(cost)} must be a whole number from 1 to {MAX_COST}, or a function that gives one")
    return cost


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function; none where it has no signature that can be read.

    Args:
        function: any callable. Its annotations need not be importable.
    """
    try:
        if sys.version_info >= (3, 14):
            from annotationlib import Format

            return inspect.signature(function, annotation_format=Format.FORWARDREF).parameters
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def request_parameters(function: Callable[..., Any]) -> tuple[tuple[str, int], ...]:
    """Name and place of the parameters that take a request, by annotation or name.

    Args:
        function: that is limited.
    """
    found = []
    for place, parameter in enumerate(parameters_of(function).values()):
        annotation = parameter.annotation
        named = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        if parameter.name in _REQUEST_NAMES or named.rpartition(".")[2] in _REQUEST_TYPES:
            found.append((parameter.name, place))
    return tuple(found)


def parameter_place(function: Callable[..., Any], name: str) -> tuple[int, Any] | None:
    """Place and default of a parameter.

    Args:
        function: that is limited.
        name: of the parameter.

    Returns:
        Its place among the positional ones and its default; None where the function has none of that name.
    """
    parameters = parameters_of(function)
    if name not in parameters:
        return None
    return list(parameters).index(name), parameters[name].default


def checked_key(key: str | Callable[..., Any] | None) -> str | UserFunction | None:
    """Whom a limit counts.

    Raises:
        SettingsError: if it is neither a name nor a function.
    """
    if key is None or (isinstance(key, str) and key.removeprefix("header:")):
        return key
    return _function(key, "key", "'ip', 'api_key', 'header:NAME', the name of a parameter or attribute, or a function")


def optional_function(function: object, argument: str) -> UserFunction | None:
    """A function of the user; None where none is given.

    Args:
        argument: its name, for errors.

    Raises:
        SettingsError: if it is no function.
    """
    return None if function is None else _function(function, argument, "a function")


def _function(function: object, argument: str, expected: str) -> UserFunction:
    if not callable(function):
        raise SettingsError(f"{argument} {clip(function)} is not valid: give {expected}")
    return UserFunction(function, argument)
