"""`tidegate keys …`."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import TypeAdapter, ValidationError

from tidegate.admin.key_import import MAX_KEYS, KeyImport, KeyImportRequest, KeyImportResult
from tidegate.admin.models import KeyCreate, KeyRead, KeyRotated, LimitOverride, Name, Reason, RevokeRequest, TierName
from tidegate.admin.models.customers import CustomerName
from tidegate.cli.client_tls import CaOption, CertKeyOption, CertOption, ClientTls
from tidegate.cli.common import ConfigOption, JsonOption, print_json, print_rows
from tidegate.cli.control_plane import one_line
from tidegate.cli.key_access import ApiKeys, KeyFilter, collect, find, with_keys
from tidegate.cli.key_files import BATCH_SIZE, in_batches, read_key_file
from tidegate.cli.key_limits import limit
from tidegate.cli.options import KeyArgument, TokenFileOption, UrlOption
from tidegate.timestamps import US_PER_S, format_timestamp, now_us
from tidegate.tools.terminal import say

app = typer.Typer(
    help="Make, list, show, revoke, rotate and delete API keys: in the database, or with --url over the admin API.",
    no_args_is_help=True,
)

_LIFETIME: Final = re.compile(r"([0-9]{1,6})([smhd])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_ID_PART: Final = re.compile(r"[0-9a-f]{1,24}", re.ASCII)
MAX_GRACE_S: Final = 365 * 86_400


class Status(enum.StrEnum):
    """Status of an API key."""

    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


@app.command("create")
def create(
    tier: Annotated[str | None, typer.Option("--tier", help="The key's tier; default: that of its customer.")] = None,
    customer: Annotated[str | None, typer.Option("--customer", help="The customer that owns the key.")] = None,
    name: Annotated[str, typer.Option("--name", help="A label for people.")] = "",
    expires_in: Annotated[
        str | None, typer.Option("--expires-in", help="Lifetime, such as 90d or 12h; by default it does not expire.")
    ] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create an API key and print it, only once: only its digest is stored."""
    if tier is None and customer is None:
        raise typer.BadParameter("name a tier, or with --customer a customer that has one", param_hint="--tier")
    request = KeyCreate(
        tier=None if tier is None else checked(TierName, tier, "--tier"),
        customer=None if customer is None else checked(CustomerName, customer, "--customer"),
        name=checked(Name, name, "--name"),
        expires_at=None if expires_in is None else format_timestamp(now_us() + lifetime_s(expires_in, "--expires-in") * US_PER_S),
    )
    made = with_keys(config, url, token_file, ClientTls(ca, cert, cert_key), lambda keys: keys.create(request))
    if as_json:
        print_json(_json(made))
        return
    say(one_line(made.api_key))
    say(f"id {one_line(made.id)}, tier {one_line(made.tier)}. It is shown only once: store it now.", err=True)


@app.command("import")
def import_file(
    file: Annotated[
        Path,
        typer.Argument(
            help="CSV with a header line, or JSON lines (.jsonl): key, sha256 or hmac_sha256, tier, customer, name, expires_at."
        ),
    ],
    tier: Annotated[str | None, typer.Option("--tier", help="The tier of rows that name none.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report what would be imported; change nothing.")] = False,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import keys that another system issued. Keys are hashed here; only their digests are sent and stored.

    Rows that are invalid, or conflict with an existing key, are listed and left out (exit code 1). To resume after an
    interruption, run the same command again: keys that exist already are counted as unchanged.
    """
    if tier is not None:
        checked(TierName, tier, "--tier")

    async def work(keys: ApiKeys) -> ImportSummary:
        summary = ImportSummary()
        for batch in in_batches(read_key_file(file, tier), MAX_KEYS if url is None else BATCH_SIZE):
            summary.add_invalid((row.line, row.key) for row in batch if isinstance(row.key, str))
            valid = [(row.line, row.key) for row in batch if isinstance(row.key, KeyImport)]
            if valid:
                request = KeyImportRequest(keys=[key for _, key in valid], dry_run=dry_run)
                summary.add(await keys.import_batch(request), [line for line, _ in valid])
            if not as_json:
                say(f"{summary.rows:,} rows read, {summary.imported:,} new", err=True)
        return summary

    summary = with_keys(config, url, token_file, ClientTls(ca, cert, cert_key), work)
    if as_json:
        print_json(summary.as_json(dry_run))
    else:
        for line, message in summary.problems:
            say(f"line {line}: {one_line(message)}", err=True)
        if summary.unlisted:
            say(f"{summary.unlisted:,} more rows have problems", err=True)
        verb = "would be imported" if dry_run else "imported"
        say(f"{summary.imported:,} {verb}, {summary.unchanged:,} unchanged, {summary.refused:,} with problems")
    if summary.refused:
        raise typer.Exit(1)


@app.command("list")
def list_keys(
    tier: Annotated[str | None, typer.Option("--tier", help="Only the keys of this tier.")] = None,
    customer: Annotated[str | None, typer.Option("--customer", help="Only the keys of this customer.")] = None,
    status: Annotated[Status | None, typer.Option("--status", help="Only keys with this status.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Only keys whose name contains this, in any case.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Maximum number of entries.")] = 100,
    after: Annotated[str | None, typer.Option("--after", help="Continue after this id.")] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List API keys by id, without the keys themselves."""
    if tier is not None:
        checked(TierName, tier, "--tier")
    if name is not None:
        checked(Name, name, "--name")
    if after is not None and not _ID_PART.fullmatch(after):
        raise typer.BadParameter("not a valid id; use the last id of the previous list", param_hint="--after")
    if customer is not None:
        checked(CustomerName, customer, "--customer")
    wanted = KeyFilter(tier, None if status is None else status.value, name, customer=customer)
    page = with_keys(config, url, token_file, ClientTls(ca, cert, cert_key), lambda keys: collect(keys, wanted, limit, after))
    if as_json:
        print_json([_json(record) for record in page.items])
    else:
        print_rows(
            ("id", "tier", "name", "status", "created_at", "expires_at", "revoked_reason", "from"),
            (
                (
                    record.id,
                    one_line(record.tier),
                    one_line(record.name),
                    record.status,
                    to_seconds(record.created_at),
                    to_seconds(record.expires_at),
                    None if record.revoked_reason is None else one_line(record.revoked_reason),
                    _origin(record),
                )
                for record in page.items
            ),
            False,
            "no keys" if wanted != KeyFilter() or after else "no keys: make one with 'tidegate keys create --tier NAME'",
        )
    if page.next is not None:
        say(f"there are more: continue with --after {one_line(page.next)}", err=True)


@app.command("show")
def show(
    key: KeyArgument,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the record of an API key: tier, status, times and its own limits."""
    record = with_keys(config, url, token_file, ClientTls(ca, cert, cert_key), lambda keys: find(keys, key))
    if as_json:
        print_json(_json(record))
        return
    for field, value in (
        ("id", record.id),
        ("tier", record.tier + (" (of the customer)" if record.inherits_tier else "")),
        *([("customer", record.customer)] if record.customer is not None else []),
        ("name", record.name),
        ("status", record.status),
        ("created at", to_seconds(record.created_at)),
        ("expires at", to_seconds(record.expires_at)),
        ("revoked at", to_seconds(record.revoked_at)),
        ("revoked reason", record.revoked_reason),
        ("limits", None if record.limits is None else ", ".join(record.limits)),
        *(
            (_override_name(override, what), ", ".join(texts))
            for override in record.overrides
            for what, texts in (("limits", override.limits), ("quotas", override.quotas))
            if texts
        ),
        ("from", _origin(record)),
    ):
        say(f"{one_line(field):<15} {one_line(value) if value else '-'}")


@app.command("revoke")
def revoke(
    key: KeyArgument,
    reason: Annotated[str, typer.Option("--reason", help="Reason, for the audit log.")],
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke an API key permanently. Running servers reject it within a second."""
    request = RevokeRequest(reason=checked(Reason, reason, "--reason"))

    async def work(keys: ApiKeys) -> KeyRead:
        return await keys.revoke(await find(keys, key), request)

    record = with_keys(config, url, token_file, ClientTls(ca, cert, cert_key), work)
    if as_json:
        print_json(_json(record))
    else:
        say(f"revoked {one_line(record.id)} of tier {one_line(record.tier)}")


@app.command("rotate")
def rotate(
    key: KeyArgument,
    grace: Annotated[
        str | None,
        typer.Option("--grace", help="How long the old key still works, such as 1h or 7d; default: it is revoked now."),
    ] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replace an API key by a new one with the same tier, name, expiry and limits, and print it, only once."""
    grace_s = 0 if grace is None else lifetime_s(grace, "--grace")
    if grace_s > MAX_GRACE_S:
        raise typer.BadParameter(f"{grace!r} is too long: at most 365d", param_hint="--grace")

    async def work(keys: ApiKeys) -> KeyRotated:
        return await keys.rotate(await find(keys, key), grace_s)

    made = with_keys(config, url, token_file, ClientTls(ca, cert, cert_key), work)
    if as_json:
        print_json({**_json(made), "replaces": _json(made.replaces)})
        return
    old = made.replaces
    say(one_line(made.api_key))
    end = "is revoked" if old.status == Status.REVOKED else f"works until {to_seconds(old.expires_at)}"
    say(
        f"id {one_line(made.id)}, tier {one_line(made.tier)}, in place of {one_line(old.id)}, which {end}. "
        "It is shown only once: store it now.",
        err=True,
    )


@app.command("delete")
def delete(
    key: KeyArgument,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete the record of a revoked or expired API key; the audit log keeps it."""

    async def work(keys: ApiKeys) -> KeyRead:
        record = await find(keys, key)
        await keys.delete(record)
        return record

    record = with_keys(config, url, token_file, ClientTls(ca, cert, cert_key), work)
    if as_json:
        print_json(_json(record))
    else:
        say(f"deleted {one_line(record.id)} of tier {one_line(record.tier)}")


app.command("limit")(limit)


def _override_name(override: LimitOverride, what: str) -> str:
    name = what if override.rule is None else f"{what} of {override.rule}"
    return name if override.until is None else f"{name} until {to_seconds(override.until)}"


class ImportSummary:
    """What became of a file of keys; of rows with problems the first `MAX_LISTED` are kept."""

    MAX_LISTED: Final = 100

    def __init__(self) -> None:
        self.imported = self.unchanged = self.refused = self.unlisted = 0
        self.problems: list[tuple[int, str]] = []

    @property
    def rows(self) -> int:
        """All rows read."""
        return self.imported + self.unchanged + self.refused

    def add(self, result: KeyImportResult, lines: list[int]) -> None:
        """Add what became of a batch, whose rows are in these lines of the file."""
        self.imported += result.imported
        self.unchanged += result.unchanged
        self.add_invalid((lines[problem.row], problem.message) for problem in result.problems)

    def add_invalid(self, problems: Iterable[tuple[int, str]]) -> None:
        """Add rows that were not imported, each with its line and the reason."""
        for problem in problems:
            self.refused += 1
            if len(self.problems) < self.MAX_LISTED:
                self.problems.append(problem)
            else:
                self.unlisted += 1

    def as_json(self, dry_run: bool) -> dict[str, Any]:
        """As --json prints it."""
        return {
            "imported": self.imported,
            "unchanged": self.unchanged,
            "refused": self.refused,
            "dry_run": dry_run,
            "problems": [{"line": line, "message": message} for line, message in self.problems],
        }


def lifetime_s(text: str, option: str) -> int:
    """Read a time such as `90d`, s."""
    match = _LIFETIME.fullmatch(text)
    if match is None or int(match.group(1)) == 0:
        raise typer.BadParameter(f"{text[:60]!r} is not a valid duration; expected e.g. 90d, 12h, 30m or 45s", param_hint=option)
    return int(match.group(1)) * _SECONDS[match.group(2)]


def checked(field: Any, text: str, option: str) -> str:
    """A text that is valid for a field of a request; commands reject the same texts with and without --url."""
    if field is not Name and not text.strip():
        raise typer.BadParameter("it must not be blank", param_hint=option)
    try:
        valid: str = TypeAdapter(field).validate_python(text, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if problem["type"] == "string_too_long":
            most = problem["ctx"]["max_length"]
            raise typer.BadParameter(f"it has {len(text)} characters: at most {most} are allowed", param_hint=option) from None
        # An argument that is not UTF-8 contains surrogates.
        raise typer.BadParameter("it must not have control characters, and must be UTF-8", param_hint=option) from None
    return valid


def _json(record: KeyRead) -> dict[str, Any]:
    """A record for --json: the fields of the admin API, and its owner."""
    return {**record.model_dump(exclude={"managed_by_file", "warnings"}), "from": _origin(record)}


def _origin(record: KeyRead) -> str:
    return "file" if record.managed_by_file else "api"


def to_seconds(moment: str | None) -> str | None:
    """A timestamp of the admin API without fractions of a second."""
    return None if moment is None else re.sub(r"\.[0-9]+Z$", "Z", one_line(moment))
