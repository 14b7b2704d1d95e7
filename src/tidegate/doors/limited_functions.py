"""What `limit` does to the functions that it decorates: their marks, names, signatures, and the answers to denied calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin

from tidegate.doors.exceeded import RateLimitExceeded, loaded
from tidegate.doors.limit_arguments import parameters_of, request_parameters
from tidegate.doors.limit_call import LimitCall
from tidegate.errors import PolicyError, TidegateError

F = TypeVar("F", bound=Callable[..., Any])

EXEMPT: Final = "__tidegate_exempt__"
LIMITS: Final = "__tidegate_limits__"
"""Attributes of functions: whether default limits leave them out, and the limits of their own."""
RESPONSE: Final = "tidegate_response"
TOO_MANY_REQUESTS: Final[dict[str, Any]] = {
    "description": "Too Many Requests: a rate limit is exceeded",
    "headers": {
        name: {"description": text, "schema": {"type": kind}}
        for name, text, kind in (
            ("Retry-After", "Seconds until the same request passes.", "integer"),
            ("RateLimit", "Name of the limit, what is left of it, and seconds until it is replenished.", "string"),
            ("RateLimit-Policy", "All limits that apply.", "string"),
        )
    },
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "error": {
                        "type": "object",
                        "properties": {
                            "code": {"type": "string", "const": "RATE_LIMIT_EXCEEDED"},
                            "message": {"type": "string"},
                            "details": {"type": "object"},
                        },
                    }
                },
            }
        }
    },
}
"""The response of a denied request, for OpenAPI."""


def exempt(function: F) -> F:
    """Leave a function out of default limits: those of a middleware or extension, and of a FastAPI app's `dependencies`.

        @app.get("/health")
        @exempt
        def health(): ...

    Args:
        function: the endpoint or view.

    Returns:
        The same function.
    """
    setattr(function, EXEMPT, True)
    return function


def answered(call: LimitCall, error: TidegateError) -> Any:
    """What a view returns for an error where its framework has no exception for it; else the error is raised.

    What a function of the user gave wrongly, a limit or a cost, is no client's mistake: the framework answers and logs it as any
    exception of the view.
    """
    if call.view is None or isinstance(error, PolicyError):
        raise error
    answer = call.view.answer(error)
    if answer is None:
        raise error if isinstance(error, RateLimitExceeded) else call.view.failure(error) from error
    return answer


def endpoint_name(connection: Any, label: str) -> str:
    """A name for the limit of an endpoint: the same in every process, also after other code was changed."""
    scope = getattr(connection, "scope", None) or {}
    endpoint = scope.get("endpoint")
    match = getattr(connection, "resolver_match", None)
    if endpoint is None and match is not None:
        endpoint = match.func
    if endpoint is None:
        return f"all|{label}"
    return f"{endpoint.__module__}.{getattr(endpoint, '__qualname__', type(endpoint).__name__)}|{label}"


def takes_any(function: Callable[..., Any]) -> bool:
    """Whether a function takes arguments that its signature does not name, among which a request may be."""
    return any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters_of(function).values())


def _endpoint_signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a function that may be an endpoint of FastAPI; None for others."""
    if loaded("fastapi") is None or not request_parameters(function):
        return None
    try:
        signature = inspect.signature(function, eval_str=True)
    except (AttributeError, NameError, SyntaxError, TypeError, ValueError):
        return None  # annotations that cannot be evaluated, such as imports for type checkers alone: not an endpoint of FastAPI
    if any(str(getattr(each.annotation, "__module__", "")).startswith("litestar") for each in signature.parameters.values()):
        return None  # an endpoint of Litestar in a program that uses both
    return signature


def own_response(function: Callable[..., Any]) -> str | None:
    """The parameter of an endpoint of FastAPI that takes its response: FastAPI fills one such parameter alone, the last."""
    signature = _endpoint_signature(function)
    if signature is None:
        return None
    from starlette.responses import Response

    found = None
    for name, each in signature.parameters.items():
        annotation = get_args(each.annotation)[0] if get_origin(each.annotation) is Annotated else each.annotation
        if name != RESPONSE and isinstance(annotation, type) and issubclass(annotation, Response):
            found = name
    return found


def take_response(wrapper: Any, function: Callable[..., Any]) -> None:
    """Have FastAPI hand the response of an endpoint to the wrapper, which puts the limit headers on it.

    Not where the endpoint takes it itself: see `own_response`.
    """
    signature = _endpoint_signature(function)
    if signature is None or RESPONSE in signature.parameters:  # of another limit of the same endpoint
        return
    from starlette.responses import Response

    parameters = list(signature.parameters.values())
    added = inspect.Parameter(RESPONSE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Response)
    place = next((i for i, each in enumerate(parameters) if each.kind is each.VAR_KEYWORD), len(parameters))
    parameters.insert(place, added)
    wrapper.__signature__ = signature.replace(parameters=parameters)
