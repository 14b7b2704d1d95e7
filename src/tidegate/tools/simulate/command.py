"""`tidegate simulate`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tidegate.counters.memory_storage import DEFAULT_MAX_SUBJECTS
from tidegate.errors import SettingsError
from tidegate.policy.attributes import MAX_ATTRIBUTES, RESERVED
from tidegate.policy.model import Policy
from tidegate.policy.paths import PathRules
from tidegate.policy.toml_reader import load_policy
from tidegate.tools.charts import clean, write_page
from tidegate.tools.simulate.log_clients import DEFAULT_TRUSTED, Clients
from tidegate.tools.simulate.log_csv import csv_records
from tidegate.tools.simulate.log_durations import LOGGED_AT, UNITS, Durations
from tidegate.tools.simulate.log_formats import FIELDS, FORMATS, Directive, NoAddress, Parse, csv_columns, detect, parser_of
from tidegate.tools.simulate.log_lines import LogError, LogLines, log_size
from tidegate.tools.simulate.log_times import Malformed
from tidegate.tools.simulate.page import render_page
from tidegate.tools.simulate.replay import MAX_EXAMPLES, Replay
from tidegate.tools.simulate.report import Report, as_json, make_report, print_report
from tidegate.tools.simulate.time_order import TimeOrder

DETECTED_WITHIN: Final = 1000
_PROGRESS_LINES: Final = 20_000
_SPAN: Final = re.compile(r"([0-9]{1,6})([smh]?)", re.ASCII)


class Simulation:
    """Reads logs and decides their requests.

    Args:
        replay: decides the requests.
        order: puts requests in order and passes them to `replay`.
        log_format: one of `FORMATS`, or None to detect it from the first lines.
        subject: ip, user, or the name of a field.
        key_field: field with the API key, or None.
        fields: other names for keys of `FIELDS`.
        clients: parses the client address.
        attributes: the field of each attribute.
        cost_field: field with the units of a request; None if each costs 1.
        durations: where the duration of a request is; None if it is not needed.
    """

    def __init__(
        self,
        replay: Replay,
        order: TimeOrder,
        log_format: str | None = None,
        subject: str = "ip",
        key_field: str | None = None,
        fields: Mapping[str, str] | None = None,
        clients: Clients | None = None,
        attributes: Sequence[str] = (),
        cost_field: str | None = None,
        durations: Durations | None = None,
    ) -> None:
        self.lines = 0
        self.malformed = 0
        self.no_address = 0
        self.no_address_examples: list[str] = []
        self.examples: list[str] = []
        self.broken: list[str] = []
        self._replay = replay
        self._order = order
        self._format = log_format
        self._subject = subject
        self._key_field = key_field
        self._fields = fields
        self._clients = clients or Clients()
        self._attributes = attributes
        self._cost_field = cost_field
        self._durations = durations

    def read(self, log: LogLines) -> Iterator[int]:
        """Read one log; yields the bytes of the file read so far, at intervals.

        Raises:
            LogError: if the log cannot be read or its format is not recognized.
        """
        parse: Parse | None = None
        undecided: list[tuple[int, str]] = []
        add = self._order.add
        number = breaks = 0
        lines, is_csv = iter(log), False
        while (line := next(lines, None)) is not None:
            number += 1
            if parse is None:
                if not line.strip():
                    continue
                parse, is_header = self._parser(line)
                if parse is None:
                    undecided.append((number, line))
                    if len(undecided) >= DETECTED_WITHIN:
                        break
                    continue
                for line_number, earlier in undecided:
                    self._count_malformed(log, earlier, line_number, "before the first line of the log's format")
                if is_header:
                    lines, is_csv = csv_records(lines, len(csv_columns(line))), True
                    continue
            try:
                add(parse(line))
                self.lines += 1
            except NoAddress as reason:
                self._count_no_address(log, line, number + breaks, str(reason))
            except Malformed as reason:
                if line.strip():
                    self._count_malformed(log, line, number + breaks, str(reason))
            except Directive:
                pass
            if is_csv:
                breaks += line.count("\n", 0, -1)  # within the record
            if number % _PROGRESS_LINES == 0:
                self._require_addresses()
                yield log.position()
        self._require_addresses()
        if parse is None and undecided:
            raise LogError(
                f"{log.source}: none of the first {len(undecided)} lines has a known format: give --format "
                f"({', '.join(FORMATS)}); the first line is '{clean(undecided[0][1].strip()[:80])}'"
            )
        if log.broken is not None:
            self.broken.append(log.broken)

    def finish(self) -> Report:
        """Decide the remaining requests and return the report."""
        self._order.finish()
        self._replay.finish()
        return make_report(
            self._replay,
            self._order,
            lines=self.lines,
            malformed=self.malformed,
            examples=self.examples,
            broken=self.broken,
            no_address=self.no_address,
            untrusted_chains=self._clients.untrusted_chains,
            no_address_examples=self.no_address_examples,
            with_costs=self._cost_field is not None,
        )

    def _parser(self, line: str) -> tuple[Parse | None, bool]:
        """The parser for a line, and whether the line was a header."""
        name = self._format or detect(line)
        if name is None:
            return None, False
        header = csv_columns(line) if name == "csv" else ()
        subject, key_field, clients = self._subject, self._key_field, self._clients
        further = (self._attributes, self._cost_field, self._durations)
        return parser_of(name, subject, key_field, self._fields, header, clients, *further), name == "csv"

    def _require_addresses(self) -> None:
        """Stop if most lines have a client that is not an address: the field is probably not the client's."""
        requests = self.lines - self.malformed
        if self.no_address * 2 > requests:
            raise LogError(
                f"{self.no_address / requests:.0%} of {requests:,} lines have a client that is not an IPv4 or IPv6 address, "
                "which a live check rejects with 400: name the field with the address (--field ip=NAME), count by another field "
                f"(--subject user, or a field), or give --format; the first line is {clean(self.no_address_examples[0])}"
            )

    def _count_no_address(self, log: LogLines, line: str, number: int, reason: str) -> None:
        self.lines += 1
        self.no_address += 1
        if len(self.no_address_examples) < MAX_EXAMPLES:
            self.no_address_examples.append(f"{log.source}:{number}: {reason}: {line.strip()[:100]}")

    def _count_malformed(self, log: LogLines, line: str, number: int, reason: str) -> None:
        self.lines += 1
        self.malformed += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{log.source}:{number}: {reason}: {line.strip()[:100]}")


def simulate(
    logs: Annotated[
        list[str],
        typer.Argument(
            metavar="LOG...",
            help="Access logs, plain or compressed (gzip, bzip2, xz); - for standard input.",
            show_default=False,
        ),
    ],
    policy: Annotated[Path, typer.Option("--policy", "-p", help="The policy file to simulate.", show_default=False)],
    tier: Annotated[
        str | None,
        typer.Option(
            "--tier", help="Tier of callers without an API key of the policy; default: the anonymous tier, or the only tier."
        ),
    ] = None,
    subject: Annotated[str, typer.Option("--subject", help="Identifies a caller: ip, user, or a field of the log.")] = "ip",
    key_field: Annotated[str | None, typer.Option("--key-field", help="Field with the API key, for keys in the policy.")] = None,
    cost_field: Annotated[
        str | None,
        typer.Option(
            "--cost-field",
            help="Field with the units of a request in a JSON, CSV or W3C log, such as usage.total_tokens; default: 1 each.",
            show_default=False,
        ),
    ] = None,
    duration_field: Annotated[
        str | None,
        typer.Option(
            "--duration-field",
            help='Field with the duration of a request, such as request_time, for limits like "20 concurrent"; in logs of Envoy, '
            "HAProxy and AWS load balancers: duration.",
            show_default=False,
        ),
    ] = None,
    duration_unit: Annotated[
        str | None,
        typer.Option("--duration-unit", help=f"Its unit: {', '.join(UNITS)}; default: s.", show_default=False),
    ] = None,
    logged_at: Annotated[
        str | None,
        typer.Option(
            "--logged-at",
            help="Whether the times in the log are of the start or the end of requests; default: by format and field.",
            show_default=False,
        ),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            "--field",
            metavar="NAME=FIELD",
            help=f"Field with one of {', '.join(FIELDS)} in a JSON, CSV or W3C log: ip=cf_ip, path=req.uri; or with any other "
            "attribute that rules read: user=claims.sub, plan=x_plan. Repeatable.",
            show_default=False,
        ),
    ] = None,
    log_format: Annotated[
        str | None, typer.Option("--format", help=f"One of {', '.join(FORMATS)}; default: detected from the first lines.")
    ] = None,
    trusted_proxies: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-proxies",
            metavar="NETWORKS",
            help="Your proxies, as in server.trusted_proxies: the client is the last other address of a chain.",
            show_default=False,
        ),
    ] = None,
    reorder: Annotated[str, typer.Option("--reorder", help="How far out of order the log may be: 120s, 5m, 1h.")] = "120s",
    reorder_max: Annotated[
        int, typer.Option("--reorder-max", min=1, help="Maximum number of requests buffered for sorting.")
    ] = 500_000,
    max_subjects: Annotated[
        int, typer.Option("--max-subjects", min=1, help="Maximum number of counters; each takes about 200 bytes.")
    ] = DEFAULT_MAX_SUBJECTS,
    encoded_slashes: Annotated[
        list[str] | None,
        typer.Option(
            "--encoded-slashes",
            metavar="PATTERN",
            help="As the setting paths.encoded_slashes: paths that may contain %2F. Repeatable.",
            show_default=False,
        ),
    ] = None,
    decode_unreserved: Annotated[
        bool, typer.Option("--decode-unreserved", help="As the setting paths.decode_unreserved: %7E is decoded to ~.")
    ] = False,
    as_json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    background: Annotated[bool, typer.Option("--background", hidden=True)] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Also write the report to this file as an HTML page with charts.", show_default=False),
    ] = None,
) -> int:
    """Replay access logs under a policy: which requests would have been blocked?

    Reads access logs (combined and common, JSON lines and arrays, CSV, IIS and CloudFront, Envoy, HAProxy, AWS load balancers;
    also with the prefixes of syslog, Kubernetes and docker compose), sorts the requests by time, and decides them in
    the log's own time with the rules and counters of live traffic. Reports for each rule how many requests it would have
    allowed and blocked, which callers would have been blocked most, and the worst minute.

    \b
      tidegate simulate access.log --policy tidegate.policy.toml
      zcat old/*.gz | tidegate simulate - -p new.toml --html report.html

    Exit code 0: done; malformed lines are counted and the first ones printed. 2: a log or the policy cannot be read.
    130: interrupted; the report covers the requests decided until then.
    """
    if log_format is not None and log_format not in FORMATS:
        raise SettingsError(f"--format {log_format!r} is not valid; expected one of {', '.join(FORMATS)}")
    if html is not None and not html.absolute().parent.is_dir():
        raise SettingsError(f"--html {html}: the directory does not exist: create it first")
    durations = _durations(duration_field, duration_unit, logged_at)
    paths = PathRules.of(encoded_slashes or (), decode_unreserved)
    loaded = load_policy(policy)
    roles, attributes = _named_fields(field or [], loaded)
    replay = Replay(
        loaded,
        tier,
        by_ip=subject.lower() == "ip",
        max_subjects=max_subjects,
        paths=paths,
        attributes=tuple(attributes),
        durations=durations is not None,
    )
    order = TimeOrder(replay.decide, _span_s(reorder), reorder_max)
    networks = [each for text in trusted_proxies or DEFAULT_TRUSTED for each in text.split(",") if each.strip()]
    clients = Clients(networks)
    read = tuple(attributes.values())
    simulation = Simulation(replay, order, log_format, subject, key_field, roles, clients, read, cost_field, durations)
    sizes = [log_size(source) for source in logs]
    interrupted = False
    try:
        with _reported(sizes) if background else _progress(sizes) as update:
            _read_logs(simulation, logs, sizes, update)
    except KeyboardInterrupt:
        interrupted = True
    report = simulation.finish()
    if report.lines == report.malformed and not interrupted:
        raise _no_request(report, logs)
    if html is not None:
        write_page(html, render_page(report, str(policy), logs))
    if as_json_:
        typer.echo(json.dumps(as_json(report), indent=2))
    else:
        print_report(report, str(policy))
    if interrupted:
        typer.echo("interrupted: the report covers the requests decided until then", err=True)
        return 130
    return 0


def _read_logs(simulation: Simulation, logs: Sequence[str], sizes: Sequence[int | None], update: Callable[[int], None]) -> None:
    done = 0
    for source, size in zip(logs, sizes, strict=True):
        with LogLines(source) as log:
            for position in simulation.read(log):
                update(done + position)
        done += size or 0
        update(done)


def _no_request(report: Report, logs: Sequence[str]) -> LogError:
    """Why logs without a single request cannot be simulated."""
    named = ", ".join(logs)
    if not report.lines:
        return LogError(
            f"no line in {named}: give a log with at least one request" + "".join(f"; {each}" for each in report.broken)
        )
    shown = "".join(f"\n  {clean(example)}" for example in report.malformed_examples)
    return LogError(f"no request in {named}: all {report.lines:,} lines are malformed{shown}")


@contextmanager
def _progress(sizes: list[int | None]) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr if that is a terminal; yields a callback for the number of bytes read."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    total = None if None in sizes else sum(size or 0 for size in sizes)
    columns = (TextColumn("simulating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda read: progress.update(task, completed=read)


@contextmanager
def _reported(sizes: list[int | None]) -> Iterator[Callable[[int], None]]:
    """For the control plane's what-if: low priority, and the progress as lines on stderr."""
    os.nice(10)
    total = sum(size or 0 for size in sizes) or 1
    yield lambda read: print(f"progress {read / total:.3f}", file=sys.stderr, flush=True)


def _span_s(text: str) -> int:
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"--reorder {text!r} is not a valid duration; expected for example 120s, 5m or 1h")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _durations(field: str | None, unit: str | None, logged_at: str | None) -> Durations | None:
    if unit is not None and unit not in UNITS:
        raise SettingsError(f"--duration-unit {unit!r} is not valid; expected one of {', '.join(UNITS)}")
    if logged_at is not None and logged_at not in LOGGED_AT:
        raise SettingsError(f"--logged-at {logged_at!r} is not valid; expected one of {', '.join(LOGGED_AT)}")
    if field is not None:
        return Durations(field, unit or "s", logged_at)
    if unit is not None or logged_at is not None:
        raise SettingsError("--duration-unit and --logged-at need --duration-field: the field with the duration of a request")
    return None


def _named_fields(texts: Sequence[str], policy: Policy) -> tuple[dict[str, str], dict[str, str]]:
    """Fields by key of `FIELDS`, and by attribute that the policy reads; `user` may be both."""
    rules = [rule for tier in policy.tiers for rule in tier.rules]
    read = {policy.caller_policy.tier_from} | {name for rule in rules for name, _ in rule.match}
    read |= {part for rule in rules for part in rule.subject_parts} - RESERVED
    roles: dict[str, str] = {}
    attributes: dict[str, str] = {}
    for each in texts:
        name, _, field = each.partition("=")
        name = name.lower()
        is_role = name in FIELDS
        if not field or not (is_role or name in read):
            hint = {"tier": ": use --tier", "api_key": ": use --key-field"}.get(name, "")
            raise SettingsError(
                f"--field {each[:80]!r} is not valid; expected NAME=FIELD, where NAME is one of "
                f"{', '.join((*FIELDS, *sorted(read - {''} - set(FIELDS))[:20]))}: the fields of a request, and the attributes "
                f"that the policy reads{hint}"
            )
        if is_role:
            roles[name] = field
        if not is_role or (name == "user" and name in read):
            attributes[name] = field
    if len(attributes) > MAX_ATTRIBUTES:
        raise SettingsError(f"--field names {len(attributes)} attributes; at most {MAX_ATTRIBUTES} are possible, as in a check")
    return roles, attributes
