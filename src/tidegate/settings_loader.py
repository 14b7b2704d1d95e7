"""Reading the settings: a TOML file, environment variables that override it, and what must hold between settings."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_type_hints

import msgspec

from tidegate.certificate_names import canonical_name
from tidegate.errors import SettingsError
from tidegate.listen_address import is_unix, parse_address
from tidegate.settings import (
    DEFAULT_FILE,
    ENVIRONMENT_PREFIX,
    MIN_TOKEN_LENGTH,
    SIDE_LISTENERS,
    TLS_DOORS,
    Choice,
    KeySettings,
    Range,
    Settings,
    TlsSettings,
    unix_mode,
)

_HEADER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}[a-z0-9]", re.ASCII)
_PEPPER: Final = re.compile(r"[!-~]{32,512}", re.ASCII)
_OTHER_HEADERS: Final = frozenset(
    {
        *("accept", "accept-encoding", "connection", "cookie", "date", "expect", "forwarded", "host", "keep-alive", "te"),
        *("traceparent", "tracestate", "trailer", "transfer-encoding", "upgrade", "user-agent", "via"),
        *("x-api-key", "x-real-ip", "x-request-id", "x-tidegate-denied-status"),
    }
)
"""Headers that a data plane reads for something else, or that proxies change."""


def load_settings(file: Path | None, environment: Mapping[str, str]) -> Settings:
    """Read the settings.

    Args:
        file: the TOML file; None for `tidegate.toml` if that exists.
        environment: variables; those named `TIDEGATE_SECTION__KEY` override the file.

    Raises:
        SettingsError: naming the setting, its value and the remedy.
    """
    if file is None and Path(DEFAULT_FILE).exists():
        file = Path(DEFAULT_FILE)
    raw: dict[str, Any] = {} if file is None else _read(file)
    source = "the environment" if file is None else str(file)
    for section, values in raw.items():
        _check_known(section, values, source)
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or "__" not in variable:
            continue  # Kubernetes sets TIDEGATE_PORT and others for a service named tidegate: they are not settings
        section, _, key = variable[len(ENVIRONMENT_PREFIX) :].lower().partition("__")
        _check_known(section, {key: text}, f"the environment variable {variable}")
        raw.setdefault(section, {})[key] = _from_text(section, key, text)
    try:
        settings = msgspec.convert(raw, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"invalid setting: {error} (in {source}, or in a TIDEGATE_ variable)") from None
    _check_limits(settings)
    for name in ("http", *SIDE_LISTENERS):
        if name == "http" or getattr(settings.server, name):
            parse_address(getattr(settings.server, name), f"server.{name}")
    if is_unix(settings.server.grpc):
        raise SettingsError(
            f"setting server.grpc = {settings.server.grpc[:200]!r}: the gRPC listener cannot use a unix socket; set host:port"
        )
    unix_mode(settings.server)
    _check_tls(settings.tls)
    _check_callers_auth(settings)
    entries = [getattr(settings.envoy, f"{what}_entry") for what in ("api_key", "method", "path", "ip", "forced")]
    if not all(entries) or len(set(entries)) < len(entries):
        raise SettingsError(f"settings envoy.*_entry = {', '.join(entries)}: the names must be distinct and not empty")
    if not settings.envoy.domain:
        raise SettingsError("setting envoy.domain is empty; set it to the domain that Envoy sends")
    if settings.cache.secret and len(settings.cache.secret) < MIN_TOKEN_LENGTH:
        # The message must not contain the secret.
        raise SettingsError(
            f"setting cache.secret has fewer than {MIN_TOKEN_LENGTH} characters; generate one with 'openssl rand -hex 32', "
            "or remove the setting to use one stored in the catalog's database"
        )
    _check_pepper(settings.keys)
    if settings.admin.token and len(settings.admin.token) < MIN_TOKEN_LENGTH:
        # The message must not contain the token.
        raise SettingsError(
            f"setting admin.token has fewer than {MIN_TOKEN_LENGTH} characters; generate one with 'openssl rand -hex 32'"
        )
    return settings


def _check_tls(tls: TlsSettings) -> None:
    """What is wrong with `[tls]` whatever the files hold."""
    for door in tls.doors:
        if door not in TLS_DOORS:
            raise SettingsError(f"setting tls.doors has {door[:60]!r}, which is not a listener; use {', '.join(TLS_DOORS)}")
    if not tls.cert:
        for name in ("key", "client_ca", "client_names"):
            if getattr(tls, name):
                raise SettingsError(
                    f"setting tls.{name} needs tls.cert: set the file of the server's certificate, or remove tls.{name}"
                )
    elif not tls.doors:
        raise SettingsError("setting tls.doors is empty: list the listeners that use TLS, or remove tls.cert to disable TLS")
    if tls.client_names and not tls.client_ca:
        raise SettingsError(
            "setting tls.client_names needs tls.client_ca, the authorities that sign client certificates: "
            "without it clients are not asked for a certificate, and none would have a name"
        )
    for name in tls.client_names:
        if canonical_name(name) is None:
            raise SettingsError(
                f"setting tls.client_names has {name[:200]!r}, which matches no certificate: expected the DNS name, URI or "
                "address of a subject alternative name, e.g. 'gateway.example.com' or 'spiffe://example.com/gateway'"
            )


def _check_callers_auth(settings: Settings) -> None:
    auth, tls = settings.callers_auth, settings.tls
    header = auth.header.lower()
    if not _HEADER_NAME.fullmatch(header):
        raise SettingsError(
            f"setting callers_auth.header = {auth.header[:80]!r} is not the name of a header; use letters, digits and '-', "
            "e.g. 'X-Tidegate-Token'"
        )
    if header in _OTHER_HEADERS or header.startswith(("content-", "x-forwarded-", "x-original-")) or header.endswith("-bin"):
        raise SettingsError(
            f"setting callers_auth.header = {auth.header[:80]!r} has another meaning; use a header of its own, "
            "e.g. 'X-Tidegate-Token', or 'Authorization'"
        )
    for name in auth.names:
        if canonical_name(name) is None or "*" in (name[2:] if name.startswith("*.") else name.removeprefix("*")) or name == "*.":
            raise SettingsError(
                f"setting callers_auth.names has {name[:200]!r}, which matches no certificate: expected a DNS name, a URI or an "
                "address, e.g. 'gateway.example.com', '*.gateways.example.com' or 'spiffe://example.com/gateway'"
            )
    if auth.mode != "mtls":
        if auth.names:
            raise SettingsError(f'setting callers_auth.names needs callers_auth.mode = "mtls"; the mode is {auth.mode!r}')
        return
    if not auth.names:
        raise SettingsError(
            'setting callers_auth.names is empty: list the names of certificates that may call, or ["*"] for every certificate '
            "that tls.client_ca signed"
        )
    if not tls.client_ca:
        raise SettingsError('callers_auth.mode = "mtls" needs tls.client_ca, the authorities that sign callers\' certificates')
    for door in ("http", "grpc"):
        address = getattr(settings.server, door)
        if address and (door not in tls.doors or is_unix(address)):
            raise SettingsError(
                f'callers_auth.mode = "mtls" needs TLS at server.{door} = {address[:200]!r}: add {door!r} to tls.doors and use '
                'host:port, or use mode = "token"'
            )


def _check_pepper(keys: KeySettings) -> None:
    # No message may contain the pepper.
    if keys.hash == "sha256":
        if keys.pepper:
            raise SettingsError('setting keys.pepper needs keys.hash = "hmac-sha256": set that, or remove the pepper')
    elif not _PEPPER.fullmatch(keys.pepper):
        raise SettingsError(
            'keys.hash = "hmac-sha256" needs keys.pepper, a secret of 32 to 512 visible ASCII characters: generate one with '
            "'openssl rand -hex 32' and set it as TIDEGATE_KEYS__PEPPER for all instances and commands"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError(f"the settings file {file} does not exist; set its path with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {file} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"the settings file {file} is not valid TOML: {error}") from None


def _check_known(section: str, values: object, source: str) -> None:
    sections = {field.name: field.type for field in msgspec.structs.fields(Settings)}
    if section not in sections:
        raise SettingsError(f"{source} has the unknown section {section!r}{_suggestion(section, sections)}")
    if not isinstance(values, dict):
        raise SettingsError(f"{source}: {section!r} is a section; write [{section}]")
    keys = {field.name for field in msgspec.structs.fields(sections[section])}
    for key in values:
        if key not in keys:
            raise SettingsError(f"{source} has the unknown setting '{section}.{key}'{_suggestion(key, keys)}")


def _suggestion(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else f": known names are {', '.join(sorted(known))}"


def _from_text(section: str, key: str, text: str) -> Any:
    default = getattr(getattr(Settings(), section), key)
    return [part.strip() for part in text.split(",") if part.strip()] if isinstance(default, tuple) else text


def _check_limits(settings: Settings) -> None:
    for section in msgspec.structs.fields(Settings):
        values = getattr(settings, section.name)
        for key, hint in get_type_hints(section.type, include_extras=True).items():
            name, value = f"{section.name}.{key}", getattr(values, key)
            for limit in getattr(hint, "__metadata__", ()):
                # Negated, so that NaN is refused too.
                if isinstance(limit, Range) and not limit.min <= value <= limit.max:
                    raise SettingsError(f"setting {name} = {value} must be from {limit.min:g} to {limit.max:g}")
                if isinstance(limit, Choice) and value not in limit.values:
                    raise SettingsError(f"setting {name} = {value!r} is not valid; use one of {', '.join(limit.values)}")
