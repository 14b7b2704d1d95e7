"""`tidegate policy …`, `tidegate tiers`, `tidegate rules`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.common import ConfigOption, JsonOption, print_json, print_rows, with_catalog
from tidegate.errors import PolicyError
from tidegate.policy.model import Tier
from tidegate.policy.rules import Rule
from tidegate.policy.toml_reader import load_policy, policy_warnings
from tidegate.tools.charts import clean
from tidegate.tools.terminal import say

app = typer.Typer(help="Check a policy file, or print one to begin with.", no_args_is_help=True)


def example_policy() -> str:
    """The example policy of the package.

    Returns:
        TOML.
    """
    return resources.files("tidegate").joinpath("example.policy.toml").read_text(encoding="utf-8")


@app.command("check")
def check_file(
    file: Annotated[Path, typer.Argument(help="The policy file.")],
    as_json: JsonOption = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail too.")] = False,
) -> int:
    """Validate a policy file exactly as the server does: for CI and editors.

    Exit code 0 if it would, 2 if it is refused (with file, line and reason) or, with --strict, if there are warnings.
    """
    try:
        policy = load_policy(file)
    except PolicyError as error:
        if not as_json:
            raise
        print_json({"valid": False, "file": error.file, "line": error.line, "reason": error.reason, "warnings": []})
        return 2
    warnings = policy_warnings(policy)
    if as_json:
        print_json({"valid": True, "file": str(file), "line": None, "reason": None, "warnings": warnings})
    else:
        rules = sum(len(tier.rules) for tier in policy.tiers)
        say(f"{file}: valid: {len(policy.tiers)} tiers, {rules} rules, {len(policy.api_keys)} API keys")
        for warning in warnings:
            say(f"{file}: warning: {clean(warning)}", err=True)
    return 2 if strict and warnings else 0


@app.command("example")
def print_example() -> None:
    """Print an example policy: tidegate policy example > tidegate.policy.toml."""
    typer.echo(example_policy(), nl=False)


def tiers(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the active tiers."""
    found = with_catalog(config, lambda catalog: catalog.list_tiers())
    print_rows(
        ("name", "limits", "quotas", "overage", "rules", "from"),
        (
            (
                tier.name,
                [limit.text for limit in tier.limits],
                *_quota_cells(tier),
                len(tier.rules),
                "file" if tier.managed_by_file else "api",
            )
            for tier in found
        ),
        as_json,
        "no tiers: give a policy file ([policy] file), for example the one of 'tidegate policy example'",
    )


def namespaces(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the active namespaces, for POST /v1/limit."""
    _, policy = with_catalog(config, lambda catalog: catalog.caller_policy())
    print_rows(
        ("name", "limits", "algorithm", "on_failure", "overrides"),
        (
            (
                each.name,
                [limit.text for limit in each.limits],
                each.algorithm.value,
                each.on_failure.value,
                [f"{override.subject}: {', '.join(limit.text for limit in override.limits)}" for override in each.overrides],
            )
            for each in policy.namespaces
        ),
        as_json,
        "no namespaces: requests to POST /v1/limit bring their own limits",
    )


def callers(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show who callers without an API key are: [anonymous], [callers], [attributes] and [jwt] of the policy."""
    _, policy = with_catalog(config, lambda catalog: catalog.caller_policy())
    jwt = policy.jwt
    named = {
        "anonymous.tier": policy.anonymous_tier,
        "callers.tier_from": policy.tier_from,
        "callers.default_tier": "" if policy.callers is None else policy.callers.default_tier,
        **{f"attributes.{source.name}": source.text for source in policy.attributes},
    }
    if jwt is not None:
        named |= {"jwt.jwks": jwt.jwks, "jwt.issuer": jwt.issuer, "jwt.audience": ", ".join(jwt.audience)}
        named |= {"jwt.header": jwt.header, "jwt.algorithms": ", ".join(jwt.algorithms), "jwt.leeway_s": str(jwt.leeway_s)}
    print_rows(
        ("setting", "value"),
        ((name, value) for name, value in named.items() if value),
        as_json,
        "callers without an API key are refused: the policy has neither [anonymous] nor [callers]",
    )


def _quota_cells(record: Tier | Rule) -> tuple[list[str], str]:
    """Quotas, and what passes above them: nothing, `+20%` or `no end`."""
    overage = record.overage
    above = "" if overage is None else "no end" if overage.percent is None else f"+{overage.percent}%"
    return [quota.text for quota in record.quotas], above


def rules(
    config: ConfigOption = None,
    tier: Annotated[str | None, typer.Option("--tier", help="Only the rules of this tier.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the active rules."""
    found = with_catalog(config, lambda catalog: catalog.list_tiers())
    if tier is not None and all(each.name != tier for each in found):
        raise typer.BadParameter(f"no tier {tier!r}; there are: {', '.join(each.name for each in found) or 'none'}")
    print_rows(
        (
            "tier",
            "rule",
            "endpoint",
            "methods",
            "algorithm",
            "limits",
            "quotas",
            "overage",
            "subject",
            "priority",
            "mode",
            "on_failure",
        ),
        (
            (
                each.name,
                rule.name,
                rule.endpoint,
                list(rule.methods),
                rule.algorithm.value,
                [limit.text for limit in rule.limits],
                *_quota_cells(rule),
                rule.subject.value,
                rule.priority,
                rule.mode.value,
                rule.on_failure.value,
            )
            for each in found
            if tier is None or each.name == tier
            for rule in each.rules
        ),
        as_json,
        "no rules: give a policy file ([policy] file), for example the one of 'tidegate policy example'",
    )
