"""Files of API keys to be imported: CSV with a header line, or JSON lines. Keys are hashed here; only digests go on."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from pydantic import ValidationError

from tidegate.admin.key_import import KeyImport
from tidegate.errors import PolicyError, TidegateError
from tidegate.policy.key_format import hash_api_key, is_possible_key, require_digest, why_impossible
from tidegate.policy.key_hash import key_hash_in_use

DIGESTS: Final = ("sha256", "hmac_sha256")
COLUMNS: Final = ("key", *DIGESTS, "tier", "customer", "name", "expires_at")
MAX_LINE: Final = 16_384
BATCH_SIZE: Final = 500
"""Keys of one request over the admin API: with the longest names it is half of what the admin API reads."""


class FileUnreadable(TidegateError):
    """A file of API keys cannot be read; nothing of it was imported."""

    code = "KEY_FILE_UNREADABLE"


class FileRow(NamedTuple):
    """One API key of a file.

    Args:
        line: 1-based, for messages.
        key: what is imported, or what is wrong with the row.
    """

    line: int
    key: KeyImport | str


def read_key_file(path: Path, tier: str | None) -> Iterator[FileRow]:
    """Read a file row by row, in constant memory.

    Args:
        path: CSV, or JSON lines if its name ends with `.jsonl`, `.ndjson` or `.json`.
        tier: of rows without one; None if each row must have one.

    Yields:
        The rows. A row that is invalid is yielded with the reason, which never contains the key.

    Raises:
        FileUnreadable: if the file cannot be read, or is neither form.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            is_json = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
            yield from (_row(line, fields, tier) for line, fields in (_json_lines(file) if is_json else _csv_rows(path, file)))
    except OSError as error:
        raise FileUnreadable(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise FileUnreadable(f"{path} is not UTF-8: convert it, for example with iconv") from None


def _csv_rows(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any] | str]]:
    csv.field_size_limit(MAX_LINE)
    rows = csv.reader(file)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        unknown = [name for name in header if name not in COLUMNS]
        if unknown or not {"key", *DIGESTS} & set(header) or len(set(header)) < len(header):
            # The line may hold a key, where the header is missing: it is not repeated.
            raise FileUnreadable(
                f"the first line of {path} must name the columns, some of {', '.join(COLUMNS)}, each once, with key or a digest"
            )
        for fields in rows:
            if not any(fields):
                continue
            if len(fields) != len(header):
                yield rows.line_num, f"the row has {len(fields)} fields; the header has {len(header)}"
            else:
                yield rows.line_num, {name: value for name, value in zip(header, fields, strict=True) if value != ""}
    except csv.Error as error:
        raise FileUnreadable(f"{path} is not CSV in line {rows.line_num}: {error}") from None


def _json_lines(file: TextIO) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number in itertools.count(1):
        line = file.readline(MAX_LINE)
        if not line:
            return
        if len(line) == MAX_LINE:
            raise FileUnreadable(f"line {number} is longer than {MAX_LINE} characters: write one JSON object per line")
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            yield number, "it is not a JSON object on one line"
            continue
        yield number, fields if isinstance(fields, dict) else "it is not a JSON object"


def _row(line: int, fields: dict[str, Any] | str, tier: str | None) -> FileRow:
    if isinstance(fields, str):
        return FileRow(line, fields)
    unknown = [str(name)[:60] for name in fields if name not in COLUMNS]
    if unknown:
        return FileRow(line, f"unknown field {unknown[0]!r}: the fields are {', '.join(COLUMNS)}")
    given = {name: value for name, value in fields.items() if value is not None}
    given.setdefault("tier", tier)
    if given["tier"] is None and given.get("customer") is None:
        return FileRow(line, "the tier is missing: add the field, or give --tier")
    key = given.pop("key", None)
    if key is not None and (not isinstance(key, str) or not is_possible_key(key)):
        return FileRow(line, why_impossible(key) if isinstance(key, str) else "the key is not a text")
    if (key is not None) + sum(field in given for field in DIGESTS) != 1:
        return FileRow(line, f"the row needs exactly one of key, {', '.join(DIGESTS)}")
    if key is not None:
        given[key_hash_in_use().field] = hash_api_key(key)
    try:
        # Whether the server hashes keys like that, it says itself.
        digests = {field: require_digest(field, given[field]) for field in DIGESTS if field in given}
        return FileRow(line, KeyImport.model_validate({**given, **digests}))
    except PolicyError as error:
        return FileRow(line, error.reason)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        return FileRow(line, f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}")


def in_batches(rows: Iterable[FileRow], size: int) -> Iterator[list[FileRow]]:
    """Rows in lists of at most `size`."""
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
