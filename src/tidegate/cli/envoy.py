"""`tidegate envoy …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.common import JsonOption, print_json
from tidegate.errors import PolicyError, SettingsError
from tidegate.tools.charts import clean
from tidegate.tools.terminal import say

app = typer.Typer(help="Move from envoyproxy/ratelimit to Tidegate.", no_args_is_help=True)


@app.command("check")
def check_file(
    path: Annotated[Path, typer.Argument(help="Configuration of envoyproxy/ratelimit: a file, or a directory of them.")],
    as_json: JsonOption = False,
) -> int:
    """Validate a configuration of envoyproxy/ratelimit exactly as the setting envoy.config does.

    Exit code 0 if it would, 2 if it is refused, with file, line and reason.
    """
    try:
        from tidegate.doors.grpc.ratelimit_file import load_ratelimit
    except ModuleNotFoundError as error:
        raise SettingsError(f"this needs {error.name}: pip install 'tidegate[envoy]'") from None
    try:
        read = load_ratelimit(path)
    except PolicyError as error:
        if not as_json:
            raise
        print_json({"valid": False, "file": error.file, "line": error.line, "reason": error.reason, "domains": [], "notes": []})
        return 2
    notes = [note for each in read for note in each.notes]
    if as_json:
        domains = [{"domain": each.domain, "limits": each.limits} for each in read]
        print_json({"valid": True, "file": str(path), "line": None, "reason": None, "domains": domains, "notes": notes})
        return 0
    for each in read:
        say(f"{path}: valid: domain {clean(each.domain)}, {each.limits} limits")
    for note in notes:
        say(f"note: {clean(note)}", err=True)
    return 0
