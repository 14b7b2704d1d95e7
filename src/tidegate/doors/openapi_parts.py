"""Parts of the OpenAPI description that several operations of the data plane have in common."""

from __future__ import annotations

from typing import Any

from tidegate.counters.handle_text import MAX_ID
from tidegate.decision import MAX_COST
from tidegate.policy.namespaces import MAX_SUBJECT, NAME


def content(schema: str) -> dict[str, Any]:
    """A JSON body of a schema."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def denied_content(schema: str) -> dict[str, Any]:
    """The JSON body of a denial: the decision, or an error."""
    either = [{"$ref": f"#/components/schemas/{name}"} for name in (schema, "Error")]
    return {"application/json": {"schema": {"anyOf": either}}}


def id_parameter(subject: str) -> dict[str, Any]:
    """The id in a path, of a hold or a reservation."""
    return {
        "name": "id",
        "in": "path",
        "required": True,
        "description": f"Id of the {subject}.",
        "schema": {"type": "string", "minLength": 1, "maxLength": MAX_ID, "pattern": "^[A-Za-z0-9_-]+$"},
    }


def describe_check_fields(fields: dict[str, Any], *, path: str, namespace: str, subject: str) -> None:
    """Add what types do not say to the fields of a request that reserves units.

    Args:
        fields: changed.
        path: an example; so are the others.
    """
    fields["cost"].update(minimum=0, maximum=MAX_COST)
    fields["path"].update(pattern="^/", examples=[path])
    fields["namespace"].update(pattern=f"^{NAME.pattern}$", examples=[namespace])
    fields["subject"].update(minLength=1, maxLength=MAX_SUBJECT, examples=[subject])
