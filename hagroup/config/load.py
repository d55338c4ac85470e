"""Reads ``hagroup.toml``: everything is checked before anything is used, and the first thing that is wrong becomes
one sentence with file, line and key (:class:`hagroup.errors.ConfigurationError`).
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any, get_args

from hagroup.config import permissions
from hagroup.config.lines import Lines
from hagroup.config.members import read_members
from hagroup.config.model import (
    MIB,
    Allowed,
    Endpoint,
    GroupConfig,
    GroupSection,
    JournalSection,
    LogStyle,
    MemberConfig,
    RecoveryMode,
    SqliteUrl,
    Timeouts,
    WatchdogSection,
    Webhook,
)
from hagroup.config.table import Source, Table, shown_key, suggestion
from hagroup.config.urls import BadUrl, parse_endpoint, parse_journal_url, parse_webhook_url
from hagroup.core.records import Role
from hagroup.errors import ConfigurationError

SECTIONS = ("group", "journal", "timeouts", "member", "watchdog")
_NO_LIMIT = 2**31 - 1
_SIZE = re.compile(r"(\d{1,12}) ?(B|KiB|MiB|GiB)")
_UNITS = {"B": 1, "KiB": 1024, "MiB": MIB, "GiB": 1024 * MIB}
_LABEL = re.compile(r"(?=.*\S$)[^\x00-\x1f\x7f]+")
_GROUP_SERIAL = re.compile(r"[0-9A-Za-z]{1,16}")


def load(path: str | os.PathLike[str]) -> GroupConfig:
    """The configuration in the file ``path``, with all files it names looked at. Raises ConfigurationError."""
    file = Path(os.path.abspath(path))
    try:
        with open(permissions.open_file(file), "rb") as opened:
            content = opened.read()
        permissions.check_folder_of(file)
    except permissions.Unsafe as unsafe:
        raise ConfigurationError(f"configuration file {unsafe}") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{file}, line {line}: the text is not UTF-8") from None
    return load_text(text, file, check_files=True)


def load_text(text: str, path: str | os.PathLike[str], check_files: bool = False) -> GroupConfig:
    """The configuration in ``text``, as if it stood in ``path``; ``check_files``: look at the files it names."""
    path = Path(os.path.abspath(path))
    text = text.replace("\r\n", "\n")  # as tomllib does, so that positions agree
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(path, text, str(error)) from None
    except (ValueError, RecursionError):
        raise ConfigurationError(f"{path}: a number is too long or a value too deeply nested to be read") from None
    source = Source(path, Lines(text))
    config = _read(source, values)
    if check_files:
        _check_files(source, config)
    return config


def _syntax_error(path: Path, text: str, message: str) -> ConfigurationError:
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if match is None:
        return ConfigurationError(f"{path}: this is not TOML: {message}")
    problem, line, column = match.groups()
    where = f"column {column}" if column else "end of file"
    number = int(line) if line else max(1, len(text.splitlines()))
    return ConfigurationError(f"{path}, line {number}: this is not TOML: {problem} ({where})")


def _read(source: Source, values: dict[str, Any]) -> GroupConfig:
    for key in values:
        if key not in SECTIONS:
            kind = "section" if isinstance(values[key], dict | list) else "key outside all sections"
            raise source.error((key,), f"{shown_key(key)} is not a known {kind} ({suggestion(key, SECTIONS)})")
    group = _section(source, values, "group", GroupSection.__struct_fields__)
    journal = _section(source, values, "journal", JournalSection.__struct_fields__)
    timeouts = _read_timeouts(_section(source, values, "timeouts", Timeouts.__struct_fields__))
    members = read_members(source, values.get("member"))
    return GroupConfig(
        path=source.path,
        group=_read_group(group, members),
        journal=_read_journal(journal),
        timeouts=timeouts,
        members=members,
        watchdog=_read_watchdog(_section(source, values, "watchdog", WatchdogSection.__struct_fields__), timeouts),
    )


def _section(source: Source, values: dict[str, Any], name: str, known: tuple[str, ...]) -> Table:
    """The section; an empty one where the file has none."""
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise source.error((name,), f"[{name}] must be a section with one such header")
    return Table(source, section, (name,), f"[{name}] ", known)


def _read_group(table: Table, members: tuple[MemberConfig, ...]) -> GroupSection:
    label = table.required("label", table.text("label", "a text without control characters", _LABEL))
    if len(label.encode()) > 32:
        table.refuse("label", "at most 32 bytes long (CK_TOKEN_INFO)")
    holders = sum(member.role is not Role.BACKUP for member in members)
    if holders == 0:
        raise table.source.error(("member",), "at least one [[member]] must have the role active or standby")
    default = min(GroupSection(label=label).min_replicas, holders)
    replicas = table.whole("min_replicas", default, 1, _NO_LIMIT)
    if replicas > holders:
        table.refuse("min_replicas", f"at most {holders}, the number of members that are active or standby")
    return GroupSection(
        label=label,
        serial=table.text("serial", "made of 1 to 16 letters and digits", _GROUP_SERIAL),
        min_replicas=replicas,
        degraded=table.choice("degraded", get_args(Allowed), "allow"),
        ha_only=table.flag("ha_only", True),
        recovery_mode=table.choice("recovery_mode", get_args(RecoveryMode), "enhanced"),
        replay_limit=_read_size(table, "replay_limit", GroupSection(label=label).replay_limit),
        site=table.name("site"),
    )


def _read_size(table: Table, key: str, default: int) -> int:
    value = table.raw(key)
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        value = int(match[1]) * _UNITS[match[2]]
    elif value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2**40:
        table.refuse(key, 'a number of bytes from 0 to 1024 GiB such as 1048576 or "16MiB"')
    return value


def _read_journal(table: Table) -> JournalSection:
    try:
        url = parse_journal_url(table.text("url") or "sqlite:journal.db", table.source.path.parent)
    except BadUrl as bad:
        table.refuse("url", str(bad), show=bad.harmless)
    mirror = table.path("mirror")
    if isinstance(url, SqliteUrl):
        for key in ("ca", "cert", "key", "user", "password_file"):
            if key in table:
                raise table.error(key, "is only for an etcd:// journal")
        if mirror == url.path:
            table.refuse("mirror", "another place than the journal itself")
    elif mirror is not None:
        why = "is only for a sqlite: journal: what other hosts make and destroy would not be in this host's file"
        raise table.error("mirror", why)
    for one, other in (("cert", "key"), ("key", "cert"), ("user", "password_file"), ("password_file", "user")):
        if one in table and other not in table:
            raise table.error(one, f"needs {other} beside it")
    return JournalSection(
        url=url,
        mirror=mirror,
        offline_serving=table.choice("offline_serving", get_args(Allowed), "allow"),
        ca=table.path("ca"),
        cert=table.path("cert"),
        key=table.path("key"),
        user=table.text("user"),
        password_file=table.path("password_file"),
    )


def _read_timeouts(table: Table) -> Timeouts:
    default = Timeouts()
    timeouts = Timeouts(
        call=table.seconds("call", default.call),
        generate=table.seconds("generate", default.generate),
        probe=table.seconds("probe", default.probe),
    )
    for shorter, longer in (("probe", "call"), ("call", "generate")):
        least, most = getattr(timeouts, shorter), getattr(timeouts, longer)
        if least > most:
            if shorter in table:
                raise table.error(shorter, f"({least:g}) must not be greater than {longer} ({most:g})")
            raise table.error(longer, f"({most:g}) must not be less than {shorter} ({least:g}, the default)")
    return timeouts


def _read_watchdog(table: Table, timeouts: Timeouts) -> WatchdogSection:
    default = WatchdogSection()
    interval = table.seconds("interval", default.interval)
    if interval <= timeouts.probe:
        if "interval" in table:
            problem = f"({interval:g}) must be greater than [timeouts] probe ({timeouts.probe:g})"
            raise table.error("interval", problem)
        problem = f"({timeouts.probe:g}) must be less than [watchdog] interval ({interval:g}, the default)"
        raise table.source.error(("timeouts", "probe"), f"[timeouts] probe {problem}")
    return WatchdogSection(
        interval=interval,
        threshold=table.whole("threshold", default.threshold, 1, _NO_LIMIT),
        retry=table.whole("retry", default.retry, -1, _NO_LIMIT),
        retry_interval=table.seconds("retry_interval", default.retry_interval),
        verify_rate=table.number("verify_rate", default.verify_rate, "a number of objects per second", zero=True),
        listen=_read_listen(table),
        log_style=table.choice("log_style", get_args(LogStyle), default.log_style),
        hook=table.words("hook"),
        webhook=_read_webhook(table),
    )


def _read_listen(table: Table) -> Endpoint | None:
    value = table.text("listen")
    if value in (None, "off"):
        return None
    try:
        return parse_endpoint(str(value))
    except BadUrl:
        table.refuse("listen", 'an address with a port such as "127.0.0.1:9464", or "off"')


def _read_webhook(table: Table) -> Webhook | None:
    webhook = table.table("webhook", Webhook.__struct_fields__, 'a table such as { url = "https://…" }')
    if webhook is None:
        return None
    url = webhook.required("url", webhook.text("url", show=False))
    try:
        parse_webhook_url(url)
    except BadUrl as bad:
        webhook.refuse("url", str(bad), show=bad.harmless)
    return Webhook(url=url, secret_file=webhook.path("secret_file"))


def _check_files(source: Source, config: GroupConfig) -> None:
    """All files that the configuration names exist and are ours alone to write, and secrets ours alone to read."""

    def check(path: Path | None, title: str, *where: str | int, secret: bool = False) -> None:
        if path is None:
            return
        try:
            permissions.check_file(path, secret=secret)
        except permissions.Unsafe as unsafe:
            raise source.error(where, f"{title} {unsafe}") from None

    def check_command(command: tuple[str, ...] | None, title: str, *where: str | int) -> None:
        if command is None:
            return
        if "/" in command[0]:
            check(Path(command[0]), title, *where)
        if shutil.which(command[0]) is None:
            raise source.error(where, f"{title} names a command that cannot be run: {command[0]}")

    for index, member in enumerate(config.members):
        title = f'[[member]] "{member.name}"'
        check(member.module, f"{title} module", "member", index, "module")
        if member.pin is not None:
            check(member.pin.file, f"{title} pin.file", "member", index, "pin", "file", secret=True)
            check_command(member.pin.command, f"{title} pin.command", "member", index, "pin", "command")
        for key, value in member.env.items():
            _check_env_value(source, index, f"{title} env.{key}", key, value)
    check(config.journal.ca, "[journal] ca", "journal", "ca")
    check(config.journal.cert, "[journal] cert", "journal", "cert")
    check(config.journal.key, "[journal] key", "journal", "key", secret=True)
    check(config.journal.password_file, "[journal] password_file", "journal", "password_file", secret=True)
    check_command(config.watchdog.hook, "[watchdog] hook", "watchdog", "hook")
    if config.watchdog.webhook is not None:
        secret_file = config.watchdog.webhook.secret_file
        check(secret_file, "[watchdog] webhook.secret_file", "watchdog", "webhook", "secret_file", secret=True)


def _check_env_value(source: Source, index: int, title: str, key: str, value: str) -> None:
    """A bare file name is not taken as a path (see ``members``), but was surely meant as one if that file is there."""
    if "/" not in value and "." in value.strip(".") and (source.path.parent / value).is_file():
        raise source.error(
            ("member", index, "env", key),
            f'{title} must be written "./{value}" if it means the file beside {source.path.name}',
        )
