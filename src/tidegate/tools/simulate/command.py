"""`tidegate simulate`: the command around a simulation."""

from __future__ import annotations

import json
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
from tidegate.policy.paths import PathRules
from tidegate.policy.toml_reader import load_policy
from tidegate.tools.charts import clean
from tidegate.tools.simulate.log_clients import DEFAULT_TRUSTED, Clients
from tidegate.tools.simulate.log_formats import FIELDS, FORMATS, Directive, NoAddress, Parse, csv_columns, detect, parser_of
from tidegate.tools.simulate.log_lines import LogError, LogLines, log_size
from tidegate.tools.simulate.log_times import Malformed
from tidegate.tools.simulate.page import render_page
from tidegate.tools.simulate.replay import EXAMPLES_SHOWN, Replay
from tidegate.tools.simulate.report import Report, as_json, make_report, print_report
from tidegate.tools.simulate.time_order import TimeOrder

DETECTED_WITHIN: Final = 1000
_PROGRESS_LINES: Final = 20_000
_SPAN: Final = re.compile(r"([0-9]{1,6})([smh]?)", re.ASCII)


class Simulation:
    """Reads logs and decides their requests.

    Args:
        replay: decides.
        order: puts requests in order and hands them to `replay`.
        log_format: one of `FORMATS`, or None to tell it by the first lines.
        subject: ip, user, or the name of a field.
        key_field: field with the API key, or None.
        fields: other names for keys of `FIELDS`.
        clients: finds the client in what is logged for it.
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

    def read(self, log: LogLines) -> Iterator[int]:
        """Read one log.

        Args:
            log: its lines.

        Yields:
            Bytes of the file read so far, now and then.

        Raises:
            LogError: if the log cannot be read or its format cannot be told.
        """
        parse: Parse | None = None
        undecided: list[tuple[int, str]] = []
        add = self._order.add
        number = 0
        for line in log:
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
                for place, earlier in undecided:
                    self._count_malformed(log, earlier, place, "before the first line of the log's format")
                if is_header:
                    continue
            try:
                add(parse(line))
                self.lines += 1
            except NoAddress as reason:
                self._count_no_address(log, line, number, str(reason))
            except Malformed as reason:
                if line.strip():
                    self._count_malformed(log, line, number, str(reason))
            except Directive:
                pass
            if number % _PROGRESS_LINES == 0:
                self._require_addresses()
                yield log.position()
        self._require_addresses()
        if parse is None and undecided:
            raise LogError(
                f"{log.source}: none of the first {len(undecided)} lines is of a format that is known: give --format "
                f"({', '.join(FORMATS)}); the first is '{clean(undecided[0][1].strip()[:80])}'"
            )
        if log.broken is not None:
            self.broken.append(log.broken)

    def finish(self) -> Report:
        """Decide what is held back, and sum up.

        Returns:
            The report.
        """
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
        )

    def _parser(self, line: str) -> tuple[Parse | None, bool]:
        """The parser that a line calls for, and whether the line was a header."""
        name = self._format or detect(line)
        if name is None:
            return None, False
        header = csv_columns(line) if name == "csv" else ()
        return parser_of(name, self._subject, self._key_field, self._fields, header, self._clients), name == "csv"

    def _require_addresses(self) -> None:
        """Stop where most lines name a client that the live door would refuse: it is surely not the client that stands there."""
        requests = self.lines - self.malformed
        if self.no_address * 2 > requests:
            raise LogError(
                f"{self.no_address / requests:.0%} of {requests:,} lines have a client that is not an IPv4 or IPv6 address, "
                "which the live door answers with 400: name the field that has it (--field ip=NAME), count by another one "
                f"(--subject user, or a field), or give --format; the first is {clean(self.no_address_examples[0])}"
            )

    def _count_no_address(self, log: LogLines, line: str, number: int, reason: str) -> None:
        self.lines += 1
        self.no_address += 1
        if len(self.no_address_examples) < EXAMPLES_SHOWN:
            self.no_address_examples.append(f"{log.source}:{number}: {reason}: {line.strip()[:100]}")

    def _count_malformed(self, log: LogLines, line: str, number: int, reason: str) -> None:
        self.lines += 1
        self.malformed += 1
        if len(self.examples) < EXAMPLES_SHOWN:
            self.examples.append(f"{log.source}:{number}: {reason}: {line.strip()[:100]}")


def simulate(
    logs: Annotated[
        list[str],
        typer.Argument(
            metavar="LOG...",
            help="Access logs, plain or compressed (gzip, bzip2, xz); - reads standard input.",
            show_default=False,
        ),
    ],
    policy: Annotated[Path, typer.Option("--policy", "-p", help="The policy file to try.", show_default=False)],
    tier: Annotated[
        str | None,
        typer.Option(
            "--tier", help="Tier of callers whose API key the policy does not know; the anonymous tier, or the only one."
        ),
    ] = None,
    subject: Annotated[str, typer.Option("--subject", help="What names a caller: ip, user, or a field of the log.")] = "ip",
    key_field: Annotated[
        str | None, typer.Option("--key-field", help="Field with the API key, for keys that the policy knows.")
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            "--field",
            metavar="NAME=FIELD",
            help=f"What a JSON, CSV or W3C log calls one of {', '.join(FIELDS)}: ip=cf_ip, path=req.uri. Repeatable.",
            show_default=False,
        ),
    ] = None,
    log_format: Annotated[
        str | None, typer.Option("--format", help=f"One of {', '.join(FORMATS)}; told by the first lines where not given.")
    ] = None,
    trusted_proxies: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-proxies",
            metavar="NETWORKS",
            help="Proxies of yours, as server.trusted_proxies: of a chain of addresses the last other one is the client.",
            show_default=False,
        ),
    ] = None,
    reorder: Annotated[str, typer.Option("--reorder", help="How much out of order the log may be: 120s, 5m, 1h.")] = "120s",
    reorder_max: Annotated[
        int, typer.Option("--reorder-max", min=1, help="Most requests held back to put them in order.")
    ] = 500_000,
    max_subjects: Annotated[
        int, typer.Option("--max-subjects", min=1, help="Most counters held; each takes about 200 bytes.")
    ] = DEFAULT_MAX_SUBJECTS,
    encoded_slashes: Annotated[
        list[str] | None,
        typer.Option(
            "--encoded-slashes",
            metavar="PATTERN",
            help="As the setting paths.encoded_slashes: paths that may have %2F. May be given several times.",
            show_default=False,
        ),
    ] = None,
    decode_unreserved: Annotated[
        bool, typer.Option("--decode-unreserved", help="As the setting paths.decode_unreserved: %7E is read as ~.")
    ] = False,
    as_json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with charts here too.", show_default=False)] = None,
) -> int:
    """What would this policy have done to yesterday's traffic?

    Reads access logs (combined and common, JSON lines and arrays, CSV, IIS and CloudFront, Envoy, HAProxy, AWS load balancers; in
    what syslog, Kubernetes and docker compose put around them), puts the requests in time order, and decides
    them in the log's own time by the rules and counters of live traffic. Tells for each rule what it would have allowed and
    blocked, who would have been blocked most, and the worst minute.

    \b
      tidegate simulate access.log --policy tidegate.policy.toml
      zcat old/*.gz | tidegate simulate - -p new.toml --html report.html

    Exit code 0: done, malformed lines are counted and the first shown. 2: a log or the policy cannot be read. 130:
    interrupted; what was decided is told.
    """
    if log_format is not None and log_format not in FORMATS:
        raise SettingsError(f"--format {log_format!r} is not known: use one of {', '.join(FORMATS)}")
    if html is not None and not html.absolute().parent.is_dir():
        raise SettingsError(f"--html {html}: the directory is not there: make it first")
    paths = PathRules.of(encoded_slashes or (), decode_unreserved)
    replay = Replay(load_policy(policy), tier, by_ip=subject.lower() == "ip", max_subjects=max_subjects, paths=paths)
    order = TimeOrder(replay.decide, _span_s(reorder), reorder_max)
    networks = [each for given in trusted_proxies or DEFAULT_TRUSTED for each in given.split(",") if each.strip()]
    simulation = Simulation(replay, order, log_format, subject, key_field, _named_fields(field or []), Clients(networks))
    sizes = [log_size(source) for source in logs]
    interrupted = False
    try:
        with _progress(sizes) as tell:
            done = 0
            for source, size in zip(logs, sizes, strict=True):
                with LogLines(source) as log:
                    for position in simulation.read(log):
                        tell(done + position)
                done += size or 0
                tell(done)
    except KeyboardInterrupt:
        interrupted = True
    report = simulation.finish()
    if report.lines == report.malformed and not interrupted:
        named = ", ".join(logs)
        if not report.lines:
            raise LogError(
                f"no line in {named}: give a log with at least one request" + "".join(f"; {each}" for each in report.broken)
            )
        shown = "".join(f"\n  {clean(example)}" for example in report.malformed_examples)
        raise LogError(f"no request in {named}: all {report.lines:,} lines are malformed{shown}")
    if html is not None:
        try:
            html.write_text(render_page(report, str(policy), logs), encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"--html {html} cannot be written: {error.strerror or error}") from None
    if as_json_:
        typer.echo(json.dumps(as_json(report), indent=2))
    else:
        print_report(report, str(policy))
    if interrupted:
        typer.echo("interrupted: this is what was decided until then", err=True)
        return 130
    return 0


@contextmanager
def _progress(sizes: list[int | None]) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal; yields what takes the bytes read."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    total = None if None in sizes else sum(size or 0 for size in sizes)
    columns = (TextColumn("simulating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda read: progress.update(task, completed=read)


def _span_s(text: str) -> int:
    found = _SPAN.fullmatch(text.strip())
    if found is None:
        raise SettingsError(f"--reorder {text!r} is no span of time: write 120s, 5m or 1h")
    return int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _named_fields(given: Sequence[str]) -> dict[str, str]:
    fields = {}
    for each in given:
        name, _, field = each.partition("=")
        name = name.lower()
        if name not in FIELDS or not field:
            raise SettingsError(f"--field {each!r} is not understood: write NAME=FIELD, where NAME is one of {', '.join(FIELDS)}")
        fields[name] = field
    return fields
