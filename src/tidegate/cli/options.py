"""Options of the commands that work in the database or over the admin API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="URL of the control plane, such as http://127.0.0.1:8082 ([server] admin) or https://…; "
        "default: work in the database ([catalog] url).",
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help="For --url: file with the token; default: TIDEGATE_ADMIN__TOKEN ([admin] token). "
        "There is no option for the token itself: everyone on the machine would see it in the list of processes.",
    ),
]
KeyArgument = Annotated[
    str,
    typer.Argument(
        metavar="KEY",
        help="The key's id, the beginning of it (6 hex digits or more), or the key itself: it is hashed here and not sent.",
    ),
]
