"""Every configuration that envoyproxy/ratelimit has itself (README, examples/, test/), and what becomes of it here.

The files are written anew, as short as their structure allows, from the commit in `COMMIT` (Apache-2.0). `theirs` says whether
that program takes them; where Tidegate refuses what it takes, docs/envoy.md says so.
"""

from __future__ import annotations

import msgspec

COMMIT = "f2fb15770f7fd1c88ca6c3a1b58ee513917ace96"


class File(msgspec.Struct, frozen=True):
    """One configuration.

    Args:
        texts: of its files.
        limits: how many it has here; None where it is refused.
        refused: what the error says, where it is refused.
        theirs: whether envoyproxy/ratelimit takes it.
        notes: fields that are ignored.
    """

    texts: tuple[str, ...]
    limits: int | None = None
    refused: str = ""
    theirs: bool = True
    notes: tuple[str, ...] = ()


def _limit(amount: object = 1, unit: str = "minute", more: str = "") -> str:
    return f"rate_limit: {{unit: {unit}, requests_per_unit: {amount}{more}}}"


def _file(domain: str, *descriptors: str) -> str:
    """A file of descriptors that are given without their braces."""
    return f"domain: {domain}\ndescriptors:\n" + "".join(f"  - {{{each}}}\n" for each in descriptors)


def _below(head: str, *descriptors: str) -> str:
    return head + ", descriptors: [" + ", ".join(f"{{{each}}}" for each in descriptors) + "]"


def _taken(limits: int, text: str, *notes: str) -> File:
    return File((text,), limits, notes=notes)


def _refused(refused: str, *texts: str, theirs: bool = False) -> File:
    return File(texts, None, refused, theirs)


_USERS = _file("mongo_cps", f"key: database, value: users, {_limit(500)}", f"key: database, value: default, {_limit(500)}")
_DATABASE = _file("test-domain", f"key: key1, value: value1, {_limit(10)}")
_BASIC = _file(
    "test-domain",
    _below("key: key1, value: value1", f"key: subkey1, {_limit(5)}", f"key: subkey1, value: subvalue1, {_limit(10)}"),
    f"key: key2, {_limit(20)}",
    f"key: key2, value: value2, {_limit(30)}",
    "key: key2, value: value3",
    f"key: key3, {_limit(1, 'hour')}",
    f"key: key4, {_limit(1, 'day', ', name: key4_rate_limit')}",
    _below(f"key: key5, value: value5, {_limit(15, 'day')}", f"key: subkey5, value: subvalue5, {_limit(25, 'day')}"),
    "key: key6, rate_limit: {unlimited: true}",
    f"key: key7, detailed_metric: true, {_limit(70)}",
)
_EXAMPLE = (
    f"key: category, value: account, {_limit(4, more=', replaces: [{name: bkthomps}, {name: fake_name}]')}",
    _below(
        "key: source_cluster, value: proxy",
        f"key: destination_cluster, value: bkthomps, {_limit(2, more=', replaces: [{name: bkthomps}]')}",
        f"key: destination_cluster, value: mock, {_limit(1)}",
        f"key: destination_cluster, value: override, {_limit(2, more=', replaces: [{name: banned_limit}]')}",
        f"key: destination_cluster, value: fake, {_limit(2, more=', name: fake_name')}",
    ),
    _below(
        f"key: foo, {_limit(2)}",
        f"key: bar, {_limit(3)}",
        f"key: bar, value: bkthomps, {_limit(1, more=', name: bkthomps')}",
        f"key: bar, value: banned, {_limit(0, more=', name: banned_limit')}",
        f"key: baz, {_limit(1, 'second')}",
        f"key: baz, value: not-so-shady, {_limit(3)}",
        f"key: baz, value: shady, {_limit(3)}, shadow_mode: true",
        "key: bay, rate_limit: {unlimited: true}",
    ),
    f"key: unspec, detailed_metric: true, {_limit(2)}",
    "key: qux, rate_limit: {unlimited: true}",
)
_QUOTA = tuple(
    f"key: service, value: {name}, quota_mode: true, {_limit(1)}, metadata: {{service_with_quota: {{name: {name}}}}}"
    for name in ("service_1", "service_2")
)
_PROXY = "admin: {access_log_path: /dev/null}\nstatic_resources: {listeners: []}\n"

README: dict[str, File] = {
    "the form itself": _refused(
        "invalid YAML", "domain: <id>\ndescriptors:\n  - key: <k>\n    rate_limit: (optional)\n      name: n\n"
    ),
    "the rate limit itself": _refused(
        "unknown field 'rate_limit'", "rate_limit:\n  unit: <second>\n  requests_per_unit: <uint>\n"
    ),
    "example 1": _taken(2, _USERS),
    "example 2": _taken(
        2,
        _file(
            "messaging",
            _below("key: message_type, value: marketing", f"key: to_number, {_limit(5, 'day')}"),
            f"key: to_number, {_limit(100, 'day')}",
        ),
    ),
    "example 3": _taken(
        2, _file("edge", f"key: remote_address, {_limit(10)}", f"key: remote_address, value: 50.0.0.5, {_limit(0)}")
    ),
    "example 4, one level": _taken(1, _file("example4", f"key: key, value: value, {_limit(300)}")),
    "example 4, two levels": _taken(1, _file("example4", _below("key: key, value: value", f"key: subkey, {_limit(300)}"))),
    "example 5": _taken(2, _file("internal", "key: ldap, rate_limit: {unlimited: true}", f"key: azure, {_limit(100)}")),
    "example 6": _taken(
        2,
        _file(
            "example6",
            _below(
                "key: service",
                f"key: user, value: user-a, {_limit(10)}, shadow_mode: true",
                f"key: user, value: user-b, {_limit(20)}",
            ),
        ),
    ),
    "example 7": _taken(
        2,
        _file(
            "example7",
            _below("key: key_1, value: value_1", f"key: user, value: bkthomps, {_limit(5, more=', name: specific_limit')}"),
            _below(
                "key: key_2, value: value_2",
                f"key: user, value: bkthomps, {_limit(10, more=', replaces: [{name: specific_limit}]')}",
            ),
        ),
    ),
    "example 8": _taken(
        2,
        _file("example8", f"key: key1, detailed_metric: true, {_limit(10)}", f"key: key1, value: value1, {_limit(20)}"),
        "detailed_metric",
    ),
    "example 9, at the end": _taken(1, _file("example9", f"key: key1, value: value*, {_limit(20)}")),
    "example 9, in the middle": _taken(1, _file("example9", f"key: path, value: /api/*/action, {_limit(20)}")),
    "example 9, several": _taken(1, _file("example9", f"key: route, value: /api/*/resource/*/action, {_limit(20)}")),
    "example 10": _taken(
        1,
        _file(
            "example10",
            _below(
                "key: route, value_to_metric: true",
                _below("key: http_method, value_to_metric: true", f"key: subject_id, {_limit(60)}"),
            ),
        ),
        "value_to_metric",
    ),
    "example 10, wildcard": _taken(
        1,
        _file(
            "example10_wildcard",
            _below(
                "key: user, value_to_metric: true",
                _below("key: action, value: read*, value_to_metric: true", f"key: resource, {_limit(100)}"),
            ),
        ),
        "value_to_metric",
    ),
    "example 11": _taken(
        2,
        _file(
            "example11",
            f"key: files, value: files/*, share_threshold: true, {_limit(10, 'hour')}",
            f"key: files_no_share, value: files_no_share/*, share_threshold: false, {_limit(10, 'hour')}",
        ),
    ),
    "example 11, metrics": _taken(
        1,
        _file(
            "example11_metrics",
            _below("key: route, value: api/*, share_threshold: true, value_to_metric: true", f"key: method, {_limit(60)}"),
        ),
        "value_to_metric",
    ),
}

EXAMPLES: dict[str, File] = {
    "ratelimit/config/config.yaml": _taken(2, _USERS),
    "ratelimit/config/example.yaml": _taken(17, _file("rl", *_EXAMPLE, *_QUOTA), "detailed_metric", "metadata"),
    "envoy/proxy.yaml": _refused("unknown field 'admin'", _PROXY),
    "envoy/mock.yaml": _refused("unknown field 'static_resources'", "\n".join(reversed(_PROXY.splitlines())) + "\n"),
}

_SHARED = (
    "key: files, value: files/*",
    "key: route, value: api/*",
    "key: service, value: svc/*",
    "key: midpath, value: /api*v1",
    "key: multiroute, value: svc*ep*rpc",
    "key: midroute, value: /api*v2",
    "key: tenant, value: t*prod",
)

TESTS: dict[str, File] = {
    "bad_limit_unit": _refused("unit 'foo' is not valid", _file("test-domain", f"key: key1, value: value1, {_limit(5, 'foo')}")),
    "bad_yaml": _refused("invalid YAML", "'''\n"),
    "basic_config": _taken(10, _BASIC, "detailed_metric"),
    "duplicate_domain": _taken(0, "domain: test-domain\ndescriptors:\n"),
    "duplicate_domain with basic_config": _refused(
        "domain 'test-domain' is also defined in", _BASIC, "domain: test-domain\ndescriptors:\n"
    ),
    "duplicate_key": _refused("is defined twice", _file("test-domain", "key: key1, value: value1", "key: key1, value: value1")),
    "empty_domain": _refused("'domain' is missing", "descriptors:\n"),
    "empty_key": _refused("'key' is missing", _file("test-domain", "value: value1")),
    "merge_domain_key1": _taken(1, _DATABASE),
    "merge_domain_key2": _taken(1, _DATABASE.replace("1", "2")),
    "merge_domain_key1 with merge_domain_key2": _refused(
        "domain 'test-domain' is also defined in", _DATABASE, _DATABASE.replace("1", "2")
    ),
    "metadata": _taken(
        3,
        _file(
            "test-domain",
            _below(
                "key: key1, value: value1",
                f"key: subkey1, {_limit(5)}, metadata: {{name: service_1}}",
                f"key: subkey1, value: subvalue1, {_limit(10)}",
            ),
            f"key: key2, {_limit(20)}, metadata: {{service_with_quota: {{name: service_2}}}}",
        ),
        "metadata",
    ),
    "misspelled_key": _refused(
        "unknown field 'ratelimit'", _file("test-domain", "key: key1, ratelimit: {unit: day, requests_per_unit: 5}")
    ),
    "misspelled_key2": _refused(
        "unknown field 'requestsperunit'", _file("test-domain", "key: key1, rate_limit: {unit: day, requestsperunit: 5}")
    ),
    "non_map_list": _refused("a descriptor must be a mapping", "domain: test-domain\ndescriptors: [a, b, c]\n"),
    "non_string_key": _refused("unknown field '0.25'", "0.25: test-domain\ndescriptors: []\n"),
    "replaces_empty": _refused("name is empty", _file("test-domain", f"key: key1, {_limit(5, more=', replaces: [{name: }]')}")),
    "replaces_self": _refused(
        "replaces itself", _file("test-domain", f"key: key1, {_limit(5, more=', name: self, replaces: [{name: self}]')}")
    ),
    "shadowmode_config": _taken(
        4,
        _file(
            "test-domain",
            _below(
                "key: key1, value: value1",
                f"key: subkey1, {_limit(5)}",
                f"key: subkey1, value: subvalue1, {_limit(10)}, shadow_mode: true",
            ),
            f"key: key2, {_limit(20)}, shadow_mode: true",
            f"key: key2, value: value2, {_limit(30)}",
        ),
    ),
    "share_threshold": _taken(
        10,
        _file(
            "test-domain",
            *(f"{each}, share_threshold: true, {_limit(100)}" for each in _SHARED),
            f"key: file, value: test1, {_limit(50)}",
            f"key: file, value: test*, share_threshold: true, {_limit(100)}",
            _below(
                "key: user, value: user/*, share_threshold: true",
                _below("key: resource, value: res*v2, share_threshold: false", f"key: action, {_limit(150)}"),
            ),
        ),
    ),
    "unlimited_with_unit": _refused(
        "cannot have a unit", _file("test-domain", "key: foo, rate_limit: {unlimited: true, unit: day, requests_per_unit: 25}")
    ),
    "wildcard": _taken(
        6,
        _file(
            "test-domain",
            f"key: wild, value: foo*, {_limit(20)}",
            f"key: noWild, value: foo, {_limit(20)}",
            f"key: noVal, {_limit(20)}",
            f"key: midWild, value: bar*b, {_limit(20)}",
            f"key: multiWild, value: foo*bar*baz, {_limit(10)}",
            _below("key: nestedWild, value: val1", f"key: wild, value: goo*, {_limit(20)}"),
        ),
    ),
    "runtime: another": _taken(2, _file("another", f"key: key2, {_limit(20)}", f"key: key3_local, {_limit(10, 'hour')}")),
    "runtime: basic": _taken(2, _file("basic", f"key: key1, {_limit(50, 'second')}", f"key: one_per_minute, {_limit(1)}")),
    "runtime: share_threshold": _taken(
        2,
        _file(
            "share-threshold-test",
            f"key: files, value: files/*, share_threshold: true, {_limit(10, 'hour')}",
            f"key: files_no_share, value: files_no_share/*, {_limit(10, 'hour')}",
        ),
    ),
    "runtime: reload": _taken(2, _file("reload", f"key: key1, {_limit(50, 'second')}", f"key: block, {_limit(0, 'second')}")),
}

# What its YAML reader takes beyond what its own files show.
YAML: dict[str, File] = {
    "merge keys": _taken(
        3,
        "domain: d\ndescriptors:\n  - &a {key: a, rate_limit: &l {unit: hour, requests_per_unit: 1}}\n"
        "  - {<<: *a, key: b}\n  - {key: c, rate_limit: {<<: *l, unit: day}}\n",
    ),
    "a list of merge keys": _taken(
        2,
        "domain: d\ndescriptors:\n  - &a {key: a, shadow_mode: true}\n"
        "  - &b {key: b, rate_limit: {unit: hour, requests_per_unit: 1}}\n"
        "  - {<<: [*a, *b], value: c}\n",
    ),
    "underscores": _taken(1, _file("d", f"key: a, {_limit('1_000')}")),
    "hexadecimal": _taken(1, _file("d", f"key: a, {_limit('0x10')}")),
    "octal": _taken(1, _file("d", f"key: a, {_limit('010')}")),
    "a number in quotes": _refused("without quotes", _file("d", f"key: a, {_limit(chr(34) + '5' + chr(34))}")),
    "a fraction": _refused("whole number", _file("d", f"key: a, {_limit('1.5')}")),
    "an exponent": _refused("whole number", _file("d", f"key: a, {_limit('1e3')}")),
    "a negative number": _refused("whole number", _file("d", f"key: a, {_limit('-1')}")),
    "yes": _taken(1, _file("d", f"key: a, shadow_mode: yes, {_limit(1)}")),
    "yes in quotes": _refused("true or false", _file("d", f"key: a, shadow_mode: 'yes', {_limit(1)}")),
    "no truth": _taken(1, _file("d", f"key: a, shadow_mode: , {_limit(1)}")),
    "a truth that is none": _refused("true or false", _file("d", f"key: a, detailed_metric: perhaps, {_limit(1)}")),
    "a number as value": _taken(1, _file("d", f"key: a, value: 42, {_limit(1)}")),
    "metadata that is no mapping": _refused("metadata must be a mapping", _file("d", f"key: a, metadata: [b], {_limit(1)}")),
    "share_threshold without a wildcard": _refused(
        "requires a value with a '*'", _file("d", "key: a, value: b, share_threshold: true")
    ),
    "a wildcard twice": _refused("is defined twice", _file("d", "key: a, value: b*c", "key: a, value: b*c")),
    # Refused here alone; each is documented in docs/envoy.md.
    "a wildcard in a key": _refused("supported in values only", _file("d", f"key: a*, {_limit(1)}"), theirs=True),
    "a wildcard in a key that has a value": _refused(
        "supported in values only", _file("d", f"key: a*, value: b, {_limit(1)}"), theirs=True
    ),
    "no amount": _refused("'requests_per_unit' is missing", _file("d", "key: a, rate_limit: {unit: day}"), theirs=True),
    "a field at another place": _refused("unknown field 'unit'", _file("d", "key: a, unit: day"), theirs=True),
    "a field twice": _refused("is defined twice", "domain: d\ndomain: e\n", theirs=True),
    "a second document": _refused("2 YAML documents", "domain: d\n---\ndomain: e\n", theirs=True),
    "unlimited with a unit that is none": _refused(
        "cannot have a unit", _file("d", "key: a, rate_limit: {unlimited: true, unit: eon}"), theirs=True
    ),
    "too many": _refused("from 0 to 1000000000", _file("d", f"key: a, {_limit(4_000_000_000)}"), theirs=True),
}

FILES: dict[str, File] = {
    f"{where}: {name}": file
    for where, files in (("README", README), ("examples", EXAMPLES), ("test", TESTS), ("YAML", YAML))
    for name, file in files.items()
}
