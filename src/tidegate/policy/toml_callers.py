"""Reads what a policy file says of callers without an API key, of namespaces and of access lists, for `toml_reader`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Final

from tidegate.policy.access import MAX_ENTRIES, access_entry, require_bounded
from tidegate.policy.access_entries import AccessEntry
from tidegate.policy.attributes import AttributeSource, CallerRules, SourceKind, require_attribute_name
from tidegate.policy.fields import short
from tidegate.policy.jwt_policy import JwtPolicy
from tidegate.policy.model import Tier
from tidegate.policy.namespaces import Namespace, require_name
from tidegate.policy.toml_lines import Path as KeyPath
from tidegate.policy.toml_tables import TableReader, nearest

MAX_SOURCES: Final = 64
"""Most attributes in `[attributes]`: each costs a look at every request of a gateway."""
MAX_NAMESPACES: Final = 1_000

_JWT_FIELDS: Final = ("jwks", "issuer", "audience", "header", "algorithms", "leeway_s")
_NAMESPACE_FIELDS: Final = ("name", "limits", "algorithm", "on_failure", "overrides")
_NAMESPACE_OVERRIDE_FIELDS: Final = ("subject", "limits")
_ACCESS_FIELDS: Final = ("action", "from", "match", "customer", "api_key_id")
_CALLER_FIELDS: Final = ("tier_from", "default_tier")


def read_anonymous(reader: TableReader, raw: Mapping[str, Any], tiers: Mapping[str, Tier]) -> str | None:
    """The tier of callers without an API key; None where the file names none.

    Raises:
        PolicyError: with file, line and reason.
    """
    if "anonymous" not in raw:
        return None
    table = raw["anonymous"]
    at: KeyPath = ("anonymous",)
    if not isinstance(table, dict):
        raise reader.error('anonymous is a table: write [anonymous] and tier = "…" below it', at)
    reader.known(table, ("tier",), at)
    reader.required(table, ("tier",), at)
    name = table["tier"]
    if not isinstance(name, str) or name not in tiers:
        raise reader.error(f"tier {short(name)} is not in this policy{nearest(name, tiers)}", (*at, "tier"))
    return name


def read_attributes(reader: TableReader, raw: Mapping[str, Any]) -> tuple[AttributeSource, ...]:
    """`[attributes]`: where gateways' requests carry them.

    Raises:
        PolicyError: with file, line and reason.
    """
    table = reader.table(raw, "attributes", 'user = "header:X-User-Id"')
    at: KeyPath = ("attributes",)
    if len(table) > MAX_SOURCES:
        raise reader.error(f"{len(table)} attributes: at most {MAX_SOURCES} are taken; remove some", at)
    found = []
    for name, text in table.items():
        source = reader.placed(lambda name=name, text=text: AttributeSource.make(name, text), (*at, name))  # type: ignore[misc]
        if source.kind is SourceKind.JWT and "jwt" not in raw:
            raise reader.error(
                f"attribute {name!r} comes from a bearer token ({short(text)}), but the policy has no [jwt]: add the table "
                "with 'jwks', the URL or file of the issuer's public keys",
                (*at, name),
            )
        found.append(source)
    return tuple(found)


def read_callers(reader: TableReader, raw: Mapping[str, Any], tiers: Mapping[str, Tier]) -> CallerRules | None:
    """`[callers]`; None where the file has none.

    Raises:
        PolicyError: with file, line and reason.
    """
    if "callers" not in raw:
        return None
    table = reader.table(raw, "callers", 'tier_from = "plan"')
    at: KeyPath = ("callers",)
    reader.known(table, _CALLER_FIELDS, at)
    if not table:
        raise reader.error("callers names neither tier_from nor default_tier: give one, or leave the table out", at)
    if "tier_from" in table:
        reader.placed(lambda: require_attribute_name(table["tier_from"]), (*at, "tier_from"))
    default = table.get("default_tier", "")
    if "default_tier" in table and (not isinstance(default, str) or default not in tiers):
        raise reader.error(f"tier {short(default)} is not in this policy{nearest(default, tiers)}", (*at, "default_tier"))
    return CallerRules(table.get("tier_from", ""), default)


def read_jwt(reader: TableReader, raw: Mapping[str, Any]) -> JwtPolicy | None:
    """`[jwt]`; None where the file has none.

    Raises:
        PolicyError: with file, line and reason.
    """
    if "jwt" not in raw:
        return None
    table = reader.table(raw, "jwt", 'jwks = "https://issuer.example/jwks.json"')
    at: KeyPath = ("jwt",)
    reader.known(table, _JWT_FIELDS, at)
    reader.required(table, ("jwks",), at)
    if importlib.util.find_spec("jwt") is None:
        raise reader.error("[jwt] needs PyJWT, which is not installed: pip install 'tidegate[jwt]'", at)
    return reader.placed(lambda: JwtPolicy.make(**table), at, table)


def read_namespaces(reader: TableReader, raw: Mapping[str, Any]) -> tuple[Namespace, ...]:
    """`[[namespaces]]`.

    Raises:
        PolicyError: with file, line and reason.
    """
    found: dict[str, Namespace] = {}
    for at, table in reader.tables(raw, "namespaces", (), MAX_NAMESPACES):
        reader.known(table, _NAMESPACE_FIELDS, at)
        reader.required(table, ("name",), at)
        reader.placed(lambda name=table["name"]: require_name(name), (*at, "name"), table)  # type: ignore[misc]
        if table["name"] in found:
            raise reader.error(f"namespace {table['name']!r} is defined twice: merge the two, or rename one", (*at, "name"))
        limits = reader.limits(table.get("limits", []), (*at, "limits"))
        overrides = []
        for override_at, override in reader.tables(table, "overrides", at):
            reader.known(override, _NAMESPACE_OVERRIDE_FIELDS, override_at)
            reader.required(override, _NAMESPACE_OVERRIDE_FIELDS, override_at)
            overrides.append((override["subject"], reader.limits(override["limits"], (*override_at, "limits"))))
        given = {**table, "limits": limits, "overrides": overrides}
        found[table["name"]] = reader.placed(lambda given=given: Namespace.make(**given), at, table)  # type: ignore[misc]
    return tuple(found.values())


def read_access(reader: TableReader, raw: Mapping[str, Any]) -> tuple[AccessEntry, ...]:
    """`[[access]]`.

    Raises:
        PolicyError: with file, line and reason.
    """
    found = []
    for at, table in reader.tables(raw, "access", (), MAX_ENTRIES):
        reader.known(table, _ACCESS_FIELDS, at)
        reader.required(table, ("action",), at)
        given = {"networks" if field == "from" else field: value for field, value in table.items()}
        found.append(reader.placed(lambda given=given: access_entry(**given), at, table))  # type: ignore[misc]
    reader.placed(lambda: require_bounded(found), ("access",))
    return tuple(found)
