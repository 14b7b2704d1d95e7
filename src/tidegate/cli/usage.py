"""`tidegate usage …`; the export: in the database, or with --url over the admin API. Both write the same."""

from __future__ import annotations

import contextlib
import enum
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Final

import typer

from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.cli import subjects
from tidegate.cli.client_tls import CaOption, CertKeyOption, CertOption, ClientTls
from tidegate.cli.common import ConfigOption, with_catalog
from tidegate.cli.control_plane import ControlPlane
from tidegate.cli.options import TokenFileOption, UrlOption
from tidegate.errors import SettingsError
from tidegate.ledger.export import MAX_ROWS, LedgerFilter, read_days, read_ledger, render
from tidegate.tools.charts import clean

app = typer.Typer(
    help="Show the usage of one caller; export the usage ledger: in the database, or with --url over the admin API.",
    no_args_is_help=True,
)
app.command("show")(subjects.show)

_PROGRESS_S: Final = 0.5


class ExportFormat(enum.StrEnum):
    """Of an export."""

    CSV = "csv"
    JSONL = "jsonl"


@app.command("export")
def export(
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="DAY", help="First day (UTC), such as 2026-11-01; default: the month's first."),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="DAY", help="The day after the last one, such as 2026-12-01; default: tomorrow.")
    ] = None,
    form: Annotated[ExportFormat, typer.Option("--format", help="CSV, or one JSON object per line.")] = ExportFormat.CSV,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, complete or not at all; default: stdout.")
    ] = None,
    customer: Annotated[
        str | None, typer.Option("--customer", help="Only this customer; '' for units without a customer.")
    ] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", metavar="ID", help="Only the key with this id.")] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Export units admitted, blocked and over by day, customer, API key and rule."""
    selected = LedgerFilter(*read_days(from_, to), customer, api_key)
    with _opened(output) as stream:
        progress = _Progress(stream, shown=output is not None)
        if url is None:
            with_catalog(config, lambda catalog: _from_catalog(catalog, selected, form, progress.write))
        else:
            plane = ControlPlane.at(url, token_file, config, ClientTls(ca, cert, cert_key), "usage")
            query = {"from": from_, "to": to, "format": form.value, "customer": customer, "api_key": api_key}
            _from_control_plane(plane, query, progress.write)
    if output is not None:
        progress.end(output)


async def _from_catalog(catalog: SqlCatalog, selected: LedgerFilter, form: ExportFormat, write: Callable[[str], None]) -> None:
    after = None
    while True:
        page = await read_ledger(catalog.database, selected, after, MAX_ROWS)
        write(render(page.items, form.value, header=after is None))
        after = page.next
        if after is None:
            return


def _from_control_plane(plane: ControlPlane, query: Mapping[str, str | int | None], write: Callable[[str], None]) -> None:
    after: str | None = None
    while True:
        answer = plane.download("/usage/export", {**query, "limit": MAX_ROWS, "after": after})
        write(answer.body.decode())
        after = answer.headers.get("x-tidegate-next")
        if after is None:
            return


class _Progress:
    """Writes pages, and shows on a terminal how far it is."""

    def __init__(self, stream: IO[str], *, shown: bool) -> None:
        self._stream = stream
        self._shown = shown and sys.stderr.isatty()
        self._rows = 0
        self._shown_at_s = 0.0

    def write(self, text: str) -> None:
        self._stream.write(text)
        self._rows += text.count("\n")
        now_s = time.monotonic()
        if self._shown and now_s - self._shown_at_s >= _PROGRESS_S:
            self._shown_at_s = now_s
            typer.echo(f"\r{self._rows:,} lines", nl=False, err=True)

    def end(self, output: Path) -> None:
        start = "\r" if self._shown else ""
        typer.echo(f"{start}{self._rows:,} lines written to {clean(str(output))}", err=True)


@contextlib.contextmanager
def _opened(output: Path | None) -> Iterator[IO[str]]:
    """The output; a file gets its name when it is complete.

    Raises:
        SettingsError: if it cannot be written.
    """
    if output is None:
        yield sys.stdout
        return
    part = output.with_name(f"{output.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as stream:
            yield stream
        part.replace(output)
    except OSError as error:
        raise SettingsError(f"{clean(str(output))} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
