"""Namespaces as `policy_state.namespaces` has them: a JSON list, each with its owner and its revision.

An entry without these two was written before operators could change namespaces: the policy file owns it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from tidegate.errors import CatalogError
from tidegate.policy.namespaces import Namespace

NamespaceRow: TypeAlias = dict[str, Any]
_FIELDS: Final = ("name", "limits", "algorithm", "on_failure", "overrides")


def namespace_of(row: Mapping[str, Any]) -> Namespace:
    """The namespace in an entry."""
    fields = {name: row[name] for name in _FIELDS}
    return Namespace.make(**{**fields, "overrides": [(each["subject"], each["limits"]) for each in row["overrides"]]})


def namespace_fields(namespace: Namespace) -> NamespaceRow:
    """A namespace as an entry without owner and revision."""
    return {
        "name": namespace.name,
        "limits": [limit.text for limit in namespace.limits],
        "algorithm": namespace.algorithm.value,
        "on_failure": namespace.on_failure.value,
        "overrides": [
            {"subject": override.subject, "limits": [limit.text for limit in override.limits]} for override in namespace.overrides
        ],
    }


def entries_of(stored: Sequence[Mapping[str, Any]] | None) -> list[NamespaceRow]:
    """The entries of a stored list, by name; None is none."""
    entries = ({"managed_by_file": True, "revision": 1, **entry} for entry in stored or ())
    return sorted(entries, key=lambda entry: str(entry["name"]))


def changed_entry(existing: Mapping[str, Any] | None, namespace: Namespace, managed_by_file: bool) -> NamespaceRow:
    """The entry of a namespace that was made or changed; one that did not change keeps its revision."""
    fields = namespace_fields(namespace)
    revision = 1
    if existing is not None:
        changed = any(existing[name] != value for name, value in fields.items())
        revision = existing["revision"] + (changed or existing["managed_by_file"] != managed_by_file)
    return {**fields, "managed_by_file": managed_by_file, "revision": revision}


def with_file(stored: Sequence[Mapping[str, Any]] | None, namespaces: Iterable[Namespace]) -> list[NamespaceRow] | None:
    """What a policy file leaves: its namespaces, and those that operators made.

    Raises:
        CatalogError: if the file names one that operators made or changed.
    """
    existing = {entry["name"]: entry for entry in entries_of(stored)}
    kept = {name: entry for name, entry in existing.items() if not entry["managed_by_file"]}
    for namespace in namespaces:
        if namespace.name in kept:
            raise CatalogError(
                f"namespace {namespace.name!r} of the policy file belongs to the catalog, where it was created or last changed: "
                "rename one of the two, or delete the other"
            )
        existing[namespace.name] = changed_entry(existing.get(namespace.name), namespace, True)
        kept[namespace.name] = existing[namespace.name]
    return list(kept.values()) or None


def with_import(stored: Sequence[Mapping[str, Any]] | None, namespaces: Iterable[Namespace]) -> list[NamespaceRow] | None:
    """What an import leaves: exactly these namespaces; the changed ones belong to the catalog."""
    existing = {entry["name"]: entry for entry in entries_of(stored)}
    entries = []
    for namespace in namespaces:
        before = existing.get(namespace.name)
        if before is not None and namespace_of(before) == namespace:
            entries.append(before)
        else:
            entries.append(changed_entry(before, namespace, False))
    return entries or None
