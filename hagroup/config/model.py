"""The configuration of one group as immutable values. All paths are absolute; every check is made in ``load``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from hagroup.core.classify import Verdict
from hagroup.core.records import Role

MIB = 1024 * 1024
AES_KEY_WRAP_PAD = 0x210A
"""CKM_AES_KEY_WRAP_PAD: RFC 5649 on SoftHSM; other modules have it under another number (DESIGN.md 5)."""

ETCD_PORT = 2379
OAEP_HASHES = ("SHA-1", "SHA-224", "SHA-256", "SHA-384", "SHA-512")

Allowed: TypeAlias = Literal["allow", "refuse"]
RecoveryMode: TypeAlias = Literal["enhanced", "basic"]
Isolation: TypeAlias = Literal["process", "none"]
LogStyle: TypeAlias = Literal["json", "console", "luna"]


class Endpoint(msgspec.Struct, frozen=True):
    """Where to connect or to listen. An IPv6 address is without its brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class SqliteUrl(msgspec.Struct, frozen=True):
    """``sqlite:PATH``: a journal on this host."""

    path: Path

    def __str__(self) -> str:
        return f"sqlite:{self.path}"


class EtcdUrl(msgspec.Struct, frozen=True):
    """``etcd://HOST[:PORT][,HOST[:PORT]]…/NAME``: a journal for several hosts, under ``NAME``."""

    endpoints: tuple[Endpoint, ...]
    name: str

    def __str__(self) -> str:
        return f"etcd://{','.join(map(str, self.endpoints))}/{self.name}"


class GroupSection(msgspec.Struct, frozen=True, kw_only=True):
    """``[group]``"""

    label: str
    serial: str | None = None
    """None: not created yet (``ha-admin group create`` writes it)."""
    min_replicas: int = 2
    degraded: Allowed = "allow"
    ha_only: bool = True
    recovery_mode: RecoveryMode = "enhanced"
    replay_limit: int = 16 * MIB
    """Bytes of multi-part input kept so that it can be replayed on another member; what came out for it is kept too."""
    site: str | None = None
    """Where this host is: the word of a watchdog of the same site is enough for its applications."""


class JournalSection(msgspec.Struct, frozen=True, kw_only=True):
    """``[journal]``. From ``ca`` on only for etcd; TLS is used where ``ca`` or ``cert`` is given."""

    url: SqliteUrl | EtcdUrl
    mirror: Path | None = None
    offline_serving: Allowed = "allow"
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str | None = None
    password_file: Path | None = None


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """``[timeouts]``, in seconds: ``probe <= call <= generate``."""

    call: float = 5.0
    generate: float = 60.0
    probe: float = 1.0


class PinSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where a member's PIN comes from: exactly one of the three is set."""

    file: Path | None = None
    env: str | None = None
    command: tuple[str, ...] | None = None


class MemberConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One ``[[member]]``; exactly one of ``token_serial`` and ``token_label`` is set."""

    name: str
    module: Path
    token_serial: str | None = None
    token_label: str | None = None
    role: Role = Role.ACTIVE
    site: str | None = None
    priority: int = 0
    isolation: Isolation = "process"
    env: Mapping[str, str] = {}
    pin: PinSource | None = None
    init_args: str | None = None
    wrap_mechanism: int = AES_KEY_WRAP_PAD
    oaep_hash: str = "SHA-1"
    late_window: float = 600.0
    """Seconds for which a call without a reply may still execute on the member (DESIGN.md 4.1)."""
    local: bool = False
    """The module works in this host: a call dies with its worker. True for SoftHSM unless the file says otherwise."""
    errors: Mapping[int, Verdict] = {}
    """This member's own classification of return values, over that of ``core.classify``."""


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """``[watchdog] webhook``: where alarms are posted; ``secret_file`` holds the key that authenticates them."""

    url: str
    secret_file: Path | None = None


class WatchdogSection(msgspec.Struct, frozen=True, kw_only=True):
    """``[watchdog]``. A failure is noticed within ``interval * threshold`` seconds."""

    interval: float = 5.0
    threshold: int = 2
    retry: int = -1
    """Recovery attempts for a failed member; -1: without end."""
    retry_interval: float = 10.0
    verify_rate: float = 5.0
    """Objects proved in the background per second; 0: none."""
    listen: Endpoint | None = None
    """Metrics and status page; None: no port is opened."""
    log_style: LogStyle = "json"
    hook: tuple[str, ...] | None = None
    webhook: Webhook | None = None


class GroupConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that ``hagroup.toml`` says."""

    path: Path
    group: GroupSection
    journal: JournalSection
    timeouts: Timeouts
    members: tuple[MemberConfig, ...]
    watchdog: WatchdogSection = WatchdogSection()

    @property
    def folder(self) -> Path:
        """What relative paths in the file are relative to."""
        return self.path.parent


def is_softhsm(module: Path) -> bool:
    """Whether the module's file name is SoftHSM's."""
    return module.name.lower().startswith("libsofthsm")
