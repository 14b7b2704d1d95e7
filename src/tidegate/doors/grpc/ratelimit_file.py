"""Reads the YAML configuration of envoyproxy/ratelimit; an invalid file is refused as a whole.

The format is that of its README: one domain per file, descriptors nested by key and value. Unsupported fields are refused, with
file and line; fields that do not affect counting (statistics, metadata) are ignored, with a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec
import yaml

from tidegate.doors.grpc.descriptor_tree import MAX_SIMILAR_WILDCARDS, FileLimit, Node
from tidegate.doors.grpc.units import window_limit
from tidegate.errors import PolicyError
from tidegate.policy.fields import short
from tidegate.policy.limits import MAX_AMOUNT

MAX_FILE_BYTES: Final = 10_000_000
MAX_DESCRIPTORS: Final = 100_000
MAX_DEPTH: Final = 32

_UNIT_NAMES: Final[Mapping[str, int]] = {
    name: number for number, name in enumerate(("second", "minute", "hour", "day", "month", "year", "week"), start=1)
}
_ROOT_FIELDS: Final = ("domain", "descriptors")
_DESCRIPTOR_FIELDS: Final = (
    "key",
    "value",
    "rate_limit",
    "descriptors",
    "shadow_mode",
    "share_threshold",
    "quota_mode",
    "detailed_metric",
    "value_to_metric",
    "metadata",
)
_LIMIT_FIELDS: Final = ("unit", "requests_per_unit", "unlimited", "name", "replaces")
_IGNORED_FIELDS: Final[Mapping[str, str]] = {
    "detailed_metric": "only affects the statistics of envoyproxy/ratelimit",
    "value_to_metric": "only affects the statistics of envoyproxy/ratelimit",
    "metadata": "is not passed on to Envoy as dynamic metadata",
}
_MERGE: Final = "tag:yaml.org,2002:merge"
_TRUE: Final = frozenset(("true", "yes", "on", "y"))
_FALSE: Final = frozenset(("false", "no", "off", "n"))
_WHOLE: Final = re.compile(r"\+?(?:0[xX][0-9A-Fa-f]{1,16}|0[bB][01]{1,64}|0[oO]?[0-7]{1,22}|[1-9][0-9]{0,18}|0)", re.ASCII)
_ENDINGS: Final = (".yaml", ".yml")


class RateLimitFile(msgspec.Struct, frozen=True):
    """The content of one file.

    Args:
        root: its descriptors.
        limits: number of its `rate_limit` blocks.
        notes: one sentence for each field that was ignored.
    """

    domain: str
    root: Node
    limits: int
    notes: tuple[str, ...] = ()


def load_ratelimit(path: Path) -> list[RateLimitFile]:
    """Read a file, or all `.yaml` and `.yml` files of a directory, in the order of their names; domains are unique.

    Raises:
        PolicyError: with file, line and reason.
    """
    return parse_ratelimit(read_ratelimit(path))


def ratelimit_files(path: Path) -> list[Path]:
    """The file itself, or the sorted `.yaml` and `.yml` files of a directory.

    Raises:
        PolicyError: if there is none in the directory.
        OSError: if the directory cannot be read.
    """
    if not path.is_dir():
        return [path]
    files = sorted(each for each in path.iterdir() if each.suffix in _ENDINGS)
    if not files:
        raise PolicyError("no .yaml or .yml file in this directory; add one, or remove [envoy] config", str(path))
    return files


def read_ratelimit(path: Path) -> list[tuple[str, str]]:
    """Path and text of each file, sorted by path.

    Raises:
        PolicyError: if one cannot be read, or there is none.
    """
    try:
        return [(str(each), _text(each)) for each in ratelimit_files(path)]
    except OSError as error:
        raise PolicyError(
            f"the configuration cannot be read: {error.strerror or error}; check [envoy] config", str(path)
        ) from None


def parse_ratelimit(texts: list[tuple[str, str]]) -> list[RateLimitFile]:
    """Parse the files, given as path and text; domains are unique.

    Raises:
        PolicyError: with file, line and reason.
    """
    files = [_Reader(file).read(text) for file, text in texts]
    first: dict[str, str] = {}
    for (file, _), parsed in zip(texts, files, strict=True):
        if parsed.domain in first:
            raise PolicyError(
                f"domain {short(parsed.domain)} is also defined in {first[parsed.domain]}; merge the two files", file
            )
        first[parsed.domain] = file
    return files


def _text(file: Path) -> str:
    with file.open("rb") as opened:
        raw = opened.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise PolicyError(f"the file has more than {MAX_FILE_BYTES} bytes; split it by domain", str(file))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PolicyError("the file is not valid UTF-8 here", str(file), raw[: error.start].count(b"\n") + 1) from None


class _Reader:
    """Reads one file from its YAML nodes, which have line numbers."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._limits = 0
        self._descriptors = 0
        self._notes: dict[str, int] = {}
        # Mappings with their merge keys resolved, by the identity of the node; None while one is being merged.
        self._merged: dict[int, dict[str, tuple[yaml.Node, yaml.Node]] | None] = {}

    def read(self, text: str) -> RateLimitFile:
        try:
            documents = list(yaml.compose_all(text, yaml.SafeLoader))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = None if mark is None else mark.line + 1
            raise PolicyError(f"invalid YAML: {error.problem or error.context}", self._file, line) from None
        except (yaml.YAMLError, RecursionError) as error:
            raise PolicyError(f"unreadable YAML: {str(error)[:200]}", self._file, 1) from None
        if len(documents) != 1 or documents[0] is None:
            raise PolicyError(f"the file has {len(documents)} YAML documents; write one domain per file", self._file, 1)
        fields = self._fields(documents[0], _ROOT_FIELDS, "the file")
        if "domain" not in fields:
            raise self._error("'domain' is missing; set it to the domain of Envoy's filter", documents[0])
        domain = self._name(fields["domain"], "domain")
        root = Node()
        if "descriptors" in fields:
            self._children(root, fields["descriptors"], (), 1)
        notes = tuple(f"{self._file}:{line}: {name!r} {_IGNORED_FIELDS[name]}, ignored" for name, line in self._notes.items())
        return RateLimitFile(domain, root, self._limits, notes)

    def _children(self, parent: Node, listed: yaml.Node, above: tuple[str, ...], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(f"descriptors are nested more than {MAX_DEPTH} deep", listed)
        for item in self._items(listed, "descriptors"):
            self._descriptors += 1
            # Counted while traversing: each use of an alias counts all that it contains.
            if self._descriptors > MAX_DESCRIPTORS:
                raise self._error(f"more than {MAX_DESCRIPTORS} descriptors; use wildcards, or keys without a value", item)
            fields = self._fields(item, _DESCRIPTOR_FIELDS, "a descriptor")
            self._check_ignored(fields)
            if "key" not in fields:
                raise self._error("'key' is missing in this descriptor", item)
            key = self._name(fields["key"], "key")
            value = self._scalar(fields["value"], "value") if "value" in fields else ""
            path = (*above, f"{_escaped(key)}={_escaped(value)}" if value else _escaped(key))
            if "*" in key:
                raise self._error(
                    f"key {short(key)} has a '*', which is supported in values only, as in 'value: \"foo*\"'", fields["key"]
                )
            node = Node()
            if self._flag(fields, "share_threshold"):
                if "*" not in value:
                    raise self._error("share_threshold requires a value with a '*'", fields["share_threshold"])
                node.shared = value
            shadow, quota = self._flag(fields, "shadow_mode"), self._flag(fields, "quota_mode")
            if "rate_limit" in fields:
                node.rate_limit = self._rate_limit(fields["rate_limit"], "/".join(path), shadow, quota)
                self._limits += 1
            self._place(parent, key, value, node, item)
            if "descriptors" in fields:
                self._children(node, fields["descriptors"], path, depth + 1)

    def _check_ignored(self, fields: Mapping[str, yaml.Node]) -> None:
        """Validate the fields that do not affect counting, and note those that are ignored."""
        for name in _IGNORED_FIELDS.keys() & fields.keys():
            node = fields[name]
            if name != "metadata":
                self._flag(fields, name)
            elif not isinstance(node, yaml.MappingNode) and not _is_null(node):
                raise self._error("metadata must be a mapping", node)
            self._notes.setdefault(name, node.start_mark.line + 1)

    def _place(self, parent: Node, key: str, value: str, node: Node, item: yaml.Node) -> None:
        added = parent.add(key, value, node)
        if added is None:
            raise self._error(
                f"key {short(key)}"
                + (f" with value {short(value)}" if value else " without a value")
                + " is defined twice here; remove one",
                item,
            )
        if added > MAX_SIMILAR_WILDCARDS:
            raise self._error(
                f"key {short(key)} has more than {MAX_SIMILAR_WILDCARDS} wildcards with the same prefix and suffix as "
                f"{short(value)}; use different prefixes or suffixes",
                item,
            )

    def _rate_limit(self, node: yaml.Node, path: str, shadow: bool, quota: bool) -> FileLimit:
        fields = self._fields(node, _LIMIT_FIELDS, "rate_limit")
        name = self._scalar(fields["name"], "name") if "name" in fields else ""
        replaces = []
        for item in self._items(fields["replaces"], "replaces") if "replaces" in fields else ():
            inner = self._fields(item, ("name",), "replaces")
            if "name" not in inner:
                raise self._error("'name' is missing in replaces", item)
            replaced = self._name(inner["name"], "name")
            if replaced == name:
                raise self._error(f"the limit {short(name)} replaces itself; name another limit", inner["name"])
            replaces.append(replaced)
        if self._flag(fields, "unlimited"):
            if "unit" in fields:
                raise self._error("an unlimited rate_limit cannot have a unit; remove one of the two", fields["unit"])
            return FileLimit(None, path, name, tuple(replaces), shadow, quota)
        for needed in ("unit", "requests_per_unit"):
            if needed not in fields:
                remedy = "0 denies every request" if needed == "requests_per_unit" else f"one of {', '.join(_UNIT_NAMES)}"
                raise self._error(f"{needed!r} is missing in rate_limit; {remedy}", node)
        unit = self._scalar(fields["unit"], "unit")
        if unit.lower() not in _UNIT_NAMES:
            raise self._error(f"unit {short(unit)} is not valid; use one of {', '.join(_UNIT_NAMES)}", fields["unit"])
        amount = self._whole(fields["requests_per_unit"], "requests_per_unit")
        return FileLimit(window_limit(amount, _UNIT_NAMES[unit.lower()]), path, name, tuple(replaces), shadow, quota)

    def _fields(self, node: yaml.Node, known: tuple[str, ...], what: str) -> dict[str, yaml.Node]:
        fields: dict[str, yaml.Node] = {}
        for name, (key, value) in self._pairs(node, f"{what} must be a mapping of {', '.join(known)}").items():
            if name not in known:
                raise self._error(f"unknown field {short(name)} in {what}; known fields are {', '.join(known)}", key)
            fields[name] = value
        return fields

    def _pairs(self, node: yaml.Node, remedy: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The keys and values of a mapping; its own take precedence over those merged by `<<`."""
        if not isinstance(node, yaml.MappingNode):
            raise self._error(remedy, node)
        # Once per mapping, so that nested aliases take time linear in the text.
        if id(node) in self._merged:
            merged = self._merged[id(node)]
            if merged is None:
                raise self._error("'<<' merges a mapping into itself; remove it", node)
            return merged
        self._merged[id(node)] = None
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        sources: list[yaml.Node] = []
        for key, value in node.value:
            if key.tag == _MERGE:
                sources += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in pairs:
                raise self._error(f"{name!r} is defined twice here; remove one", key)
            pairs[name] = (key, value)
        for source in sources:
            for name, pair in self._pairs(source, "'<<' requires a mapping or a list of mappings").items():
                pairs.setdefault(name, pair)
        self._merged[id(node)] = pairs
        return pairs

    def _items(self, node: yaml.Node, what: str) -> Iterator[yaml.Node]:
        if _is_null(node):
            return
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(f"{what} must be a list; begin each item with '- '", node)
        yield from node.value

    def _scalar(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(f"{what} must be a text", node)
        return "" if _is_null(node) else str(node.value)

    def _name(self, node: yaml.Node, what: str) -> str:
        text = self._scalar(node, what)
        if not text:
            raise self._error(f"{what} is empty", node)
        return text

    def _flag(self, fields: Mapping[str, yaml.Node], name: str) -> bool:
        node = fields.get(name)
        if node is None or _is_null(node):
            return False
        text = node.value.lower() if isinstance(node, yaml.ScalarNode) and node.style is None else ""
        if text not in _TRUE | _FALSE:
            raise self._error(f"{name} must be true or false, without quotes", node)
        return text in _TRUE

    def _whole(self, node: yaml.Node, what: str) -> int:
        text = self._scalar(node, what)
        plain = text.replace("_", "") if node.tag == "tag:yaml.org,2002:int" else ""
        number = _whole(plain) if _WHOLE.fullmatch(plain) else None
        if number is None or number > MAX_AMOUNT:
            raise self._error(f"{what} {short(text)} must be a whole number from 0 to {MAX_AMOUNT}, without quotes", node)
        return number

    def _error(self, reason: str, node: yaml.Node) -> PolicyError:
        return PolicyError(reason, self._file, node.start_mark.line + 1)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _escaped(text: str) -> str:
    """A key or value with its '=' and '/' escaped, because these separate keys and values in a path."""
    return text.replace("%", "%25").replace("=", "%3D").replace("/", "%2F")


def _whole(text: str) -> int:
    """A number in the notation of YAML 1.1 and Go: a leading 0 means octal."""
    digits = text.removeprefix("+").lower()
    return int(digits, 8) if digits[0] == "0" and digits.isdecimal() else int(digits, 0)
