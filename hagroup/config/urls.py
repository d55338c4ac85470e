"""The URLs in ``hagroup.toml``: where the journal is, where to listen, where alarms go."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from hagroup.config.model import ETCD_PORT, Endpoint, EtcdUrl, SqliteUrl
from hagroup.config.table import NAME

_ENDPOINT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::(\d{1,5}))?")


class BadUrl(Exception):
    """The text completes "must be …"."""

    def __init__(self, expected: str, *, harmless: bool = True) -> None:
        super().__init__(expected)
        self.harmless = harmless
        """False: it holds a password and is not to be shown."""


def parse_journal_url(text: str, folder: Path) -> SqliteUrl | EtcdUrl:
    """``sqlite:PATH`` (relative to ``folder``) or ``etcd://HOST[:PORT],…/NAME``."""
    scheme, _, rest = text.partition(":")
    if scheme == "sqlite":
        return SqliteUrl(path=folder / _sqlite_path(rest))
    if scheme == "etcd":
        return _parse_etcd(rest)
    raise BadUrl('"sqlite:FILE" or "etcd://HOST:PORT,…/NAME"', harmless="@" not in text)


def _sqlite_path(rest: str) -> str:
    path = rest[2:] if rest.startswith("///") else rest  # sqlite:///var/x is /var/x
    if path.startswith("//"):
        raise BadUrl('"sqlite:FILE" without a host; a whole path is written "sqlite:/FILE"')
    if path in ("", "/", ".") or path.endswith("/"):
        raise BadUrl('"sqlite:FILE" with the name of a file')
    if path == ":memory:":
        raise BadUrl("a file (the journal must outlive this process)")
    if path.startswith("~") or re.search(r"[\x00-\x1f\x7f]", path):
        raise BadUrl("a whole path (~ has no meaning here) without control characters")
    return path


def _parse_etcd(rest: str) -> EtcdUrl:
    if "@" in rest:
        raise BadUrl("without user and password; they belong into user and password_file", harmless=False)
    hosts, slash, name = rest.removeprefix("//").partition("/")
    if not rest.startswith("//") or not slash or not NAME.fullmatch(name):
        raise BadUrl('"etcd://HOST:PORT,…/NAME" with one name of letters, digits, ".", "_" or "-"')
    endpoints = tuple(parse_endpoint(host, ETCD_PORT) for host in hosts.split(","))
    if len(set(endpoints)) < len(endpoints):
        raise BadUrl("a list of different hosts")
    return EtcdUrl(endpoints=endpoints, name=name)


def parse_endpoint(text: str, default_port: int | None = None) -> Endpoint:
    match = _ENDPOINT.fullmatch(text)
    if match is None:
        raise BadUrl('made of hosts written "HOST:PORT"')
    port = int(match[3]) if match[3] else default_port
    if port is None or not 1 <= port <= 65535:
        raise BadUrl('made of hosts written "HOST:PORT" with ports from 1 to 65535')
    return Endpoint(host=match[1] or match[2], port=port)


def parse_webhook_url(text: str) -> None:
    """Only checks."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not text.isprintable() or " " in text:
        raise BadUrl("an address that begins with https:// or http://", harmless=False)
    if "@" in parts.netloc:
        raise BadUrl("without user and password (secret_file authenticates what is posted)", harmless=False)
