"""The configuration of envoyproxy/ratelimit: YAML into the limits of its domains, whole or not at all.

The form is that of its README: one domain for each file, descriptors nested by key and value. What Tidegate does not do is
refused by name, with file and line; what only shapes that program's statistics is read and left aside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec
import yaml

from tidegate.doors.grpc.units import window_limit
from tidegate.errors import PolicyError
from tidegate.limits import MAX_AMOUNT, Limit, short

MAX_FILE_BYTES: Final = 10_000_000
MAX_DESCRIPTORS: Final = 100_000
MAX_DEPTH: Final = 32

_UNIT_NAMES: Final[Mapping[str, int]] = {
    name: number for number, name in enumerate(("second", "minute", "hour", "day", "month", "year", "week"), start=1)
}
_ROOT_FIELDS: Final = ("domain", "descriptors")
_DESCRIPTOR_FIELDS: Final = ("key", "value", "rate_limit", "descriptors", "shadow_mode", "share_threshold")
_LIMIT_FIELDS: Final = ("unit", "requests_per_unit", "unlimited", "name", "replaces")
_STATISTICS: Final = ("detailed_metric", "value_to_metric")
_ENDINGS: Final = (".yaml", ".yml")


class FileLimit(msgspec.Struct, frozen=True):
    """A `rate_limit` block, with what its descriptor says of it.

    Args:
        limit: amount and window; an amount of 0 refuses everything; None where it is unlimited.
        path: keys and values that lead to it, for people and for counters: `key=value/key`.
        name: under which others may replace it; empty where none.
        replaces: names of the limits that are left out where this one applies.
        shadow: whether it only watches.
    """

    limit: Limit | None
    path: str
    name: str = ""
    replaces: tuple[str, ...] = ()
    shadow: bool = False


class Node(msgspec.Struct):
    """One level of descriptors.

    Args:
        rate_limit: what holds for descriptors that end here; None where nothing does.
        exact: by key and value.
        wildcards: key, beginning of the value and node, in the file's order.
        any_value: by key, for values that nothing else matches.
        shared: text of the wildcard that counts all its values as one; empty where each value counts for itself.
    """

    rate_limit: FileLimit | None = None
    exact: dict[tuple[str, str], Node] = {}
    wildcards: list[tuple[str, str, Node]] = []
    any_value: dict[str, Node] = {}
    shared: str = ""

    def child(self, key: str, value: str) -> Node | None:
        """The node for one entry: the same value first, then the first wildcard, then the key alone.

        Args:
            key: of the entry.
            value: of the entry.

        Returns:
            The node, or None where nothing matches.
        """
        found = self.exact.get((key, value))
        if found is not None:
            return found
        for name, beginning, node in self.wildcards:
            if name == key and value.startswith(beginning):
                return node
        return self.any_value.get(key)


class RateLimitFile(msgspec.Struct, frozen=True):
    """What stands in one file.

    Args:
        domain: its domain.
        root: its descriptors.
        limits: how many `rate_limit` blocks it has.
        notes: what was read and left aside, one sentence each.
    """

    domain: str
    root: Node
    limits: int
    notes: tuple[str, ...] = ()


def load_ratelimit(path: Path) -> list[RateLimitFile]:
    """Read a file, or all `.yaml` and `.yml` files of a directory.

    Args:
        path: the file or the directory.

    Returns:
        What stands in each, by name of the file; domains are unique.

    Raises:
        PolicyError: with file, line and reason.
    """
    return parse_ratelimit(read_ratelimit(path))


def ratelimit_files(path: Path) -> list[Path]:
    """The file itself, or all `.yaml` and `.yml` files of a directory.

    Args:
        path: the file or the directory.

    Returns:
        The files, sorted.

    Raises:
        PolicyError: if there is none in the directory.
        OSError: if the directory cannot be read.
    """
    if not path.is_dir():
        return [path]
    files = sorted(each for each in path.iterdir() if each.suffix in _ENDINGS)
    if not files:
        raise PolicyError("there is no .yaml file in this directory: put one there, or leave [envoy] config out", str(path))
    return files


def read_ratelimit(path: Path) -> list[tuple[str, str]]:
    """The texts of these files.

    Args:
        path: the file or the directory.

    Returns:
        Path and text of each, sorted by path.

    Raises:
        PolicyError: if one cannot be read, or there is none.
    """
    try:
        return [(str(each), _text(each)) for each in ratelimit_files(path)]
    except OSError as error:
        raise PolicyError(f"the configuration cannot be read: {error.strerror or error}: see [envoy] config", str(path)) from None


def parse_ratelimit(texts: list[tuple[str, str]]) -> list[RateLimitFile]:
    """Read texts of files.

    Args:
        texts: path and text of each.

    Returns:
        What stands in each; domains are unique.

    Raises:
        PolicyError: with file, line and reason.
    """
    read = [_Reader(file).read(text) for file, text in texts]
    first: dict[str, str] = {}
    for (file, _), made in zip(texts, read, strict=True):
        if made.domain in first:
            raise PolicyError(f"domain {short(made.domain)} is that of {first[made.domain]} too: merge the two files", file)
        first[made.domain] = file
    return read


def _text(file: Path) -> str:
    with file.open("rb") as opened:
        raw = opened.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise PolicyError(f"the file has more than {MAX_FILE_BYTES} bytes: split its domains", str(file))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PolicyError("the file is not UTF-8 here", str(file), raw[: error.start].count(b"\n") + 1) from None


class _Reader:
    """Reads one file by its YAML nodes, which know their lines."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._limits = 0
        self._descriptors = 0
        self._notes: dict[str, int] = {}

    def read(self, text: str) -> RateLimitFile:
        try:
            documents = list(yaml.compose_all(text, yaml.SafeLoader))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = None if mark is None else mark.line + 1
            raise PolicyError(f"not YAML: {error.problem or error.context}", self._file, line) from None
        except (yaml.YAMLError, RecursionError) as error:
            raise PolicyError(f"not YAML that can be read: {str(error)[:200]}", self._file, 1) from None
        if len(documents) != 1 or documents[0] is None:
            raise PolicyError(f"the file has {len(documents)} documents: write one domain into each file", self._file, 1)
        fields = self._fields(documents[0], _ROOT_FIELDS, "the file")
        if "domain" not in fields:
            raise self._error("'domain' is missing: Envoy's filter names one with every request", documents[0])
        domain = self._name(fields["domain"], "domain")
        root = Node(exact={}, wildcards=[], any_value={})
        if "descriptors" in fields:
            self._children(root, fields["descriptors"], (), 1)
        notes = tuple(
            f"{self._file}:{line}: {name!r} shapes that program's statistics only: left aside"
            for name, line in self._notes.items()
        )
        return RateLimitFile(domain, root, self._limits, notes)

    def _children(self, parent: Node, listed: yaml.Node, above: tuple[str, ...], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(f"descriptors are nested more than {MAX_DEPTH} deep", listed)
        for item in self._items(listed, "descriptors"):
            self._descriptors += 1
            # Counted as they are walked: an alias stands for all that it names.
            if self._descriptors > MAX_DESCRIPTORS:
                raise self._error(
                    f"there are more than {MAX_DESCRIPTORS} descriptors: use wildcards, or keys without a value", item
                )
            fields = self._fields(item, _DESCRIPTOR_FIELDS, "a descriptor", _STATISTICS)
            if "key" not in fields:
                raise self._error("'key' is missing in this descriptor", item)
            key = self._name(fields["key"], "key")
            value = self._scalar(fields["value"], "value") if "value" in fields else ""
            path = (*above, f"{_escaped(key)}={_escaped(value)}" if value else _escaped(key))
            if not value and key.endswith("*"):
                raise self._error(
                    f"key {short(key)} ends in '*': a wildcard needs a value, as in 'value: \"foo*\"'", fields["key"]
                )
            node = Node(exact={}, wildcards=[], any_value={})
            if self._flag(fields, "share_threshold"):
                if not value.endswith("*"):
                    raise self._error("share_threshold is for values that end in '*'", fields["share_threshold"])
                node.shared = value
            shadow = self._flag(fields, "shadow_mode")
            if "rate_limit" in fields:
                node.rate_limit = self._rate_limit(fields["rate_limit"], "/".join(path), shadow)
                self._limits += 1
            self._place(parent, key, value, node, item)
            if "descriptors" in fields:
                self._children(node, fields["descriptors"], path, depth + 1)

    def _place(self, parent: Node, key: str, value: str, node: Node, item: yaml.Node) -> None:
        twice = (
            f"key {short(key)}"
            + (f" with value {short(value)}" if value else " without a value")
            + " stands twice here: remove one"
        )
        if value.endswith("*"):
            if any((key, value[:-1]) == (name, beginning) for name, beginning, _ in parent.wildcards):
                raise self._error(twice, item)
            parent.wildcards.append((key, value[:-1], node))
        elif value:
            if (key, value) in parent.exact:
                raise self._error(twice, item)
            parent.exact[key, value] = node
        else:
            if key in parent.any_value:
                raise self._error(twice, item)
            parent.any_value[key] = node

    def _rate_limit(self, node: yaml.Node, path: str, shadow: bool) -> FileLimit:
        fields = self._fields(node, _LIMIT_FIELDS, "rate_limit")
        name = self._scalar(fields["name"], "name") if "name" in fields else ""
        replaces = []
        for item in self._items(fields["replaces"], "replaces") if "replaces" in fields else ():
            inner = self._fields(item, ("name",), "replaces")
            if "name" not in inner:
                raise self._error("'name' is missing in replaces", item)
            replaced = self._name(inner["name"], "name")
            if replaced == name:
                raise self._error(f"the limit {short(name)} replaces itself: name another one", inner["name"])
            replaces.append(replaced)
        if self._flag(fields, "unlimited"):
            if "unit" in fields:
                raise self._error("an unlimited rate_limit has no unit: remove one of the two", fields["unit"])
            return FileLimit(None, path, name, tuple(replaces), shadow)
        for needed in ("unit", "requests_per_unit"):
            if needed not in fields:
                remedy = "0 refuses everything" if needed == "requests_per_unit" else f"one of {', '.join(_UNIT_NAMES)}"
                raise self._error(f"{needed!r} is missing in rate_limit: {remedy}", node)
        unit = self._scalar(fields["unit"], "unit")
        if unit.lower() not in _UNIT_NAMES:
            raise self._error(f"unit {short(unit)} is not known: use one of {', '.join(_UNIT_NAMES)}", fields["unit"])
        amount = self._whole(fields["requests_per_unit"], "requests_per_unit")
        return FileLimit(window_limit(amount, _UNIT_NAMES[unit.lower()]), path, name, tuple(replaces), shadow)

    def _fields(
        self, node: yaml.Node, known: tuple[str, ...], what: str, statistics: tuple[str, ...] = ()
    ) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._error(f"{what} is a mapping of {', '.join(known)}", node)
        fields: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in fields:
                raise self._error(f"{name!r} stands twice here: remove one", key)
            if name in statistics:
                self._notes.setdefault(name, key.start_mark.line + 1)
            elif name == "quota_mode":
                raise self._error(
                    "quota_mode is not supported: use shadow_mode, which lets pass and counts what it would deny", key
                )
            elif name not in known:
                raise self._error(f"unknown field {short(name)} in {what}: known are {', '.join((*known, *statistics))}", key)
            fields[name] = value
        return fields

    def _items(self, node: yaml.Node, what: str) -> Iterator[yaml.Node]:
        if _is_null(node):
            return
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(f"{what} is a list: begin each item with '- '", node)
        yield from node.value

    def _scalar(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(f"{what} is a text", node)
        return "" if _is_null(node) else str(node.value)

    def _name(self, node: yaml.Node, what: str) -> str:
        text = self._scalar(node, what)
        if not text:
            raise self._error(f"{what} is empty", node)
        return text

    def _flag(self, fields: Mapping[str, yaml.Node], name: str) -> bool:
        if name not in fields:
            return False
        node = fields[name]
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:bool":
            raise self._error(f"{name} is true or false", node)
        return node.value.lower() in ("true", "yes", "on")

    def _whole(self, node: yaml.Node, what: str) -> int:
        text = self._scalar(node, what)
        if not text.isascii() or not text.isdecimal() or len(text) > 12 or int(text) > MAX_AMOUNT:
            raise self._error(f"{what} {short(text)} must be a whole number from 0 to {MAX_AMOUNT}", node)
        return int(text)

    def _error(self, reason: str, node: yaml.Node) -> PolicyError:
        return PolicyError(reason, self._file, node.start_mark.line + 1)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _escaped(text: str) -> str:
    """A key or value so that '=' and '/' between them can be told from their own."""
    return text.replace("%", "%25").replace("=", "%3D").replace("/", "%2F")
