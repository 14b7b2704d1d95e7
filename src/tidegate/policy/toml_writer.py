"""A policy written as its file is: what `parse_policy` reads back as the same policy."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tidegate.policy.access_entries import AccessEntry
from tidegate.policy.attributes import OnMissing
from tidegate.policy.failures import FailureCount
from tidegate.policy.jwt_policy import DEFAULT_ALGORITHMS, DEFAULT_HEADER, DEFAULT_LEEWAY_S, JwtPolicy
from tidegate.policy.key_hash import key_hash_in_use
from tidegate.policy.limits import Algorithm, Limit, OnFailure
from tidegate.policy.model import ApiKey, KeyStatus, Policy, Tier
from tidegate.policy.namespaces import Namespace
from tidegate.policy.overrides import Override, SubjectOverride
from tidegate.policy.rules import Mode, Rule, Subject
from tidegate.policy.toml_customers import customer_fields
from tidegate.policy.toml_notify import notify_lines
from tidegate.timestamps import format_timestamp


def policy_text(policy: Policy) -> str:
    """Write a policy.

    Args:
        policy: the policy; each tier of a key or for anonymous checks is in it.

    Returns:
        TOML, with the digests of API keys.
    """
    lines: list[str] = []
    if policy.attributes:
        lines += ["[attributes]", *(f"{source.name} = {_string(source.text)}" for source in policy.attributes), ""]
    if policy.callers is not None:
        lines.append("[callers]")
        if policy.callers.tier_from:
            lines.append(f"tier_from = {_string(policy.callers.tier_from)}")
        if policy.callers.default_tier:
            lines.append(f"default_tier = {_string(policy.callers.default_tier)}")
        lines.append("")
    if policy.jwt is not None:
        lines += _jwt_lines(policy.jwt)
    for entry in policy.access:
        lines += _access_lines(entry)
    for tier in policy.tiers:
        lines += _tier_lines(tier)
    for customer in policy.customers:
        lines += [*customer_fields(customer), *_override_lines("customers", customer.overrides), ""]
    for api_key in policy.api_keys:
        lines += _key_lines(api_key)
    for namespace in policy.namespaces:
        lines += _namespace_lines(namespace)
    for target in policy.notify:
        lines += notify_lines(target)
    if policy.anonymous_tier is not None:
        lines += ["[anonymous]", f"tier = {_string(policy.anonymous_tier)}", ""]
    return "\n".join(lines)


def _tier_lines(tier: Tier) -> list[str]:
    lines = ["[[tiers]]", f"name = {_string(tier.name)}"]
    if tier.limits:
        lines.append(f"limits = {_limits(tier.limits)}")
    lines += _quota_lines(tier)
    for rule in tier.rules:
        lines += ["", *(f"  {line}" for line in _rule_lines(rule))]
    for override in tier.overrides:
        lines += ["", *(f"  {line}" for line in _subject_override_lines(override))]
    return [*lines, ""]


def _subject_override_lines(override: SubjectOverride) -> list[str]:
    subject = ", ".join(f"{name} = {_string(value)}" for name, value in override.subject)
    lines = ["[[tiers.overrides]]", f"rule = {_string(override.rule)}", f"subject = {{ {subject} }}"]
    lines.append(f"limits = {_limits(override.limits)}")
    return lines if override.until_us is None else [*lines, f"until = {format_timestamp(override.until_us)}"]


def _quota_lines(record: Tier | Rule) -> list[str]:
    if not record.quotas:
        return []
    lines = [f"quotas = [{', '.join(_string(quota.text) for quota in record.quotas)}]"]
    if record.overage is not None:
        value = record.overage.value
        lines.append("overage = true" if value is True else f"overage = {{ up_to = {_string(value['up_to'])} }}")  # type: ignore[index]
    return lines


def _jwt_lines(jwt: JwtPolicy) -> list[str]:
    lines = ["[jwt]", f"jwks = {_string(jwt.jwks)}"]
    if jwt.issuer:
        lines.append(f"issuer = {_string(jwt.issuer)}")
    if jwt.audience:
        lines.append(f"audience = [{', '.join(map(_string, jwt.audience))}]")
    if jwt.header != DEFAULT_HEADER:
        lines.append(f"header = {_string(jwt.header)}")
    if jwt.algorithms != DEFAULT_ALGORITHMS:
        lines.append(f"algorithms = [{', '.join(map(_string, jwt.algorithms))}]")
    if jwt.leeway_s != DEFAULT_LEEWAY_S:
        lines.append(f"leeway_s = {jwt.leeway_s}")
    return [*lines, ""]


def _access_lines(entry: AccessEntry) -> list[str]:
    lines = ["[[access]]", f"action = {_string(entry.action)}"]
    if entry.networks:
        lines.append(f"from = [{', '.join(map(_string, entry.networks))}]")
    if entry.match:
        lines.append(f"match = {{ {', '.join(f'{name} = {_string(pattern)}' for name, pattern in entry.match)} }}")
    if entry.customer:
        lines.append(f"customer = {_string(entry.customer)}")
    if entry.api_key_id:
        lines.append(f"api_key_id = {_string(entry.api_key_id)}")
    return [*lines, ""]


def _namespace_lines(namespace: Namespace) -> list[str]:
    lines = ["[[namespaces]]", f"name = {_string(namespace.name)}"]
    if namespace.limits:
        lines.append(f"limits = {_limits(namespace.limits)}")
    if namespace.algorithm is not Algorithm.SLIDING_WINDOW:
        lines.append(f"algorithm = {_string(namespace.algorithm)}")
    if namespace.on_failure is not OnFailure.DEFAULT:
        lines.append(f"on_failure = {_string(namespace.on_failure)}")
    for override in namespace.overrides:
        lines += [
            "  [[namespaces.overrides]]",
            f"  subject = {_string(override.subject)}",
            f"  limits = {_limits(override.limits)}",
        ]
    return [*lines, ""]


def _rule_lines(rule: Rule) -> list[str]:
    lines = ["[[tiers.rules]]", f"endpoint = {_string(rule.endpoint)}"]
    if rule.methods:
        lines.append(f"methods = [{', '.join(map(_string, rule.methods))}]")
    if rule.algorithm is not Algorithm.SLIDING_WINDOW:
        lines.append(f"algorithm = {_string(rule.algorithm)}")
    if rule.limits:
        lines.append(f"limits = {_limits(rule.limits)}")
    if rule.action is not None:
        lines.append(f"action = {_string(rule.action)}")
    lines += _quota_lines(rule)
    if rule.match:
        lines.append(f"match = {{ {', '.join(f'{name} = {_string(pattern)}' for name, pattern in rule.match)} }}")
    if rule.subject is not Subject.API_KEY:
        value = rule.subject_value
        named = _string(value) if isinstance(value, str) else f"[{', '.join(map(_string, value))}]"
        lines.append(f"subject = {named}")
    if rule.on_missing is not OnMissing.IP:
        lines.append(f"on_missing = {_string(rule.on_missing)}")
    if rule.priority:
        lines.append(f"priority = {rule.priority}")
    if rule.mode is not Mode.ENFORCE:
        lines.append(f"mode = {_string(rule.mode)}")
    if rule.on_failure is not OnFailure.DEFAULT:
        lines.append(f"on_failure = {_string(rule.on_failure)}")
    if not rule.leases:
        lines.append("leases = false")
    if rule.failures is not None:
        lines += _failure_lines(rule.failures)
    return [*lines, f"name = {_string(rule.name)}"]


def _failure_lines(failures: FailureCount) -> list[str]:
    lines = ['count = "failures"', f"statuses = [{', '.join(map(str, failures.statuses))}]"]
    if failures.clear_on_success:
        lines.append("clear_on_success = true")
    if failures.penalty_s:
        lines.append(f"penalty = [{', '.join(map(_string, failures.penalty))}]")
    return lines


def _key_lines(api_key: ApiKey) -> list[str]:
    lines = ["[[api_keys]]", f"{key_hash_in_use().field} = {_string(api_key.sha256)}"]
    if api_key.customer:
        lines.append(f"customer = {_string(api_key.customer)}")
    if not api_key.inherits_tier:
        lines.append(f"tier = {_string(api_key.tier)}")
    if api_key.name:
        lines.append(f"name = {_string(api_key.name)}")
    if api_key.status is not KeyStatus.ACTIVE:
        lines.append(f"status = {_string(api_key.status)}")
    if api_key.expires_at_us is not None:
        lines.append(f"expires_at = {format_timestamp(api_key.expires_at_us)}")
    # The permanent limits first: a key below a table's header would belong to that table.
    return [*lines, *_override_lines("api_keys", api_key.overrides), ""]


def _override_lines(table: str, overrides: Iterable[Override]) -> list[str]:
    lines: list[str] = []
    for override in sorted(overrides, key=lambda each: bool(each.rule) or each.until_us is not None):
        if override.quotas:
            what = f"quotas = [{', '.join(_string(quota.text) for quota in override.quotas)}]"
        else:
            what = f"limits = {_limits(override.limits)}"
        if not override.rule and override.until_us is None:
            lines.append(what)
            continue
        lines += ["", f"  [[{table}.overrides]]"]
        if override.rule:
            lines.append(f"  rule = {_string(override.rule)}")
        lines.append(f"  {what}")
        if override.until_us is not None:
            lines.append(f"  until = {format_timestamp(override.until_us)}")
    return lines


def _limits(limits: Iterable[Limit]) -> str:
    return f"[{', '.join(_string(limit.text) for limit in limits)}]"


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML does not take as it is.
    return json.dumps(str(text), ensure_ascii=False).replace("\x7f", "\\u007f")
