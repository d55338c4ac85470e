"""Writes ``hagroup.toml``: a new one with its explanations, or one key in an existing one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from hagroup.config import permissions
from hagroup.config.lines import Lines
from hagroup.config.load import load_text
from hagroup.config.members import CKR_PREFIX, absolute_env_value
from hagroup.config.model import (
    MIB,
    GroupConfig,
    JournalSection,
    MemberConfig,
    PinSource,
    SqliteUrl,
    WatchdogSection,
    is_softhsm,
)
from hagroup.core import ckr
from hagroup.core.records import Role
from hagroup.errors import ConfigurationError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def render(config: GroupConfig) -> str:
    """``config`` as the text of ``config.path``; :func:`hagroup.config.load.load_text` gives an equal value back."""
    group, timeouts = config.group, config.timeouts
    sections = [
        "# A group of HSMs in place of one. Relative paths are relative to this file.\n"
        "# Nobody but its owner may write this file and its folder; PIN files are readable by their owner only.\n",
        _section(
            "[group]",
            ("label", _text(group.label), "virtual token label"),
            ("serial", group.serial and _text(group.serial), "written by ha-admin group create"),
            ("min_replicas", str(group.min_replicas), "members that hold a new key before the call returns"),
            ("degraded", _text(group.degraded), "fewer usable than that: allow (all that are usable) or refuse"),
            ("ha_only", _flag(group.ha_only), "show the virtual slot alone"),
            (
                "recovery_mode",
                _text(group.recovery_mode),
                "enhanced: log in again by itself; basic: do not keep the PIN",
            ),
            ("replay_limit", _size(group.replay_limit), "multi-part input kept for a replay on another member"),
            ("site", group.site and _text(group.site), "where this host is"),
        ),
        journal_section(config.journal, config.folder),
        _section(
            "[timeouts]  # seconds",
            ("call", repr(timeouts.call), "any single operation on one member"),
            ("generate", repr(timeouts.generate), "key and parameter generation, other changing calls"),
            ("probe", repr(timeouts.probe), ""),
        ),
        *(_member(member, config.folder) for member in config.members),
        _watchdog(config.watchdog, config.folder),
    ]
    return "\n".join(section for section in sections if section)


_NOWHERE = Path("/dev/null/hagroup.toml")
"""Nothing can be below its folder, so no path is written as a relative one."""


def portable(config: GroupConfig) -> str:
    """``config`` as text for other hosts: whole paths, and without what is this host's own affair: its site, PIN
    sources, and whom its watchdog tells."""
    return render(
        msgspec.structs.replace(
            config,
            path=_NOWHERE,
            group=msgspec.structs.replace(config.group, site=None),
            members=tuple(msgspec.structs.replace(member, pin=None) for member in config.members),
            watchdog=msgspec.structs.replace(config.watchdog, listen=None, hook=None, webhook=None),
        )
    )


def write_new(config: GroupConfig, *, mode: int = 0o644) -> None:
    """Writes ``config`` to ``config.path``, where nothing may be yet."""
    refuse_present(config.path)
    _replace(config.path, render(config), mode)


def refuse_present(path: Path) -> None:
    """:raises ConfigurationError: something is at ``path``, where a new file is to be."""
    if os.path.lexists(path):
        raise ConfigurationError(f"{path} exists already and is not overwritten")


def check_new(config: GroupConfig, *, check_files: bool = True) -> GroupConfig:
    """The configuration as it is read once it is written.

    :param check_files: the files that it names are looked at, too.
    :raises ConfigurationError: it could not be read; the text names no line, since the file is not there yet.
    """
    text = render(config)
    try:
        return load_text(text, config.path, check_files=check_files)
    except ConfigurationError as error:
        raise _without_line(error, config.path) from None


def _without_line(error: ConfigurationError, path: Path) -> ConfigurationError:
    return ConfigurationError(re.sub(rf"^{re.escape(str(path))}(, line \d+)?: ", "", str(error)))


def append_member(path: str | os.PathLike[str], member: MemberConfig) -> GroupConfig:
    """Adds a ``[[member]]`` at the end of the file; all else in it stays as it is."""
    before, text = _read(path)
    end = "" if text.endswith("\n") else "\n"
    expected = msgspec.structs.replace(before, members=(*before.members, member))
    return _rewrite(before, f"{text}{end}\n{_member(member, before.folder)}", expected)


def check_new_member(path: str | os.PathLike[str], member: MemberConfig) -> None:
    """:raises ConfigurationError: the file could not be read any more with that ``[[member]]`` at its end."""
    before, text = _read(path)
    try:
        load_text(f"{text}\n\n{_member(member, before.folder)}", before.path)
    except ConfigurationError as error:
        raise _without_line(error, before.path) from None  # no line of the file has it


def remove_member(path: str | os.PathLike[str], name: str) -> GroupConfig:
    """Takes the ``[[member]]`` of that name out of the file; a comment above the section after it stays with that."""
    before, text = _read(path)
    index = _index(before, name)
    start = Lines(text).place(("member", index))
    assert start is not None
    expected = msgspec.structs.replace(
        before, members=tuple(member for member in before.members if member.name != name)
    )
    ends = [match.start() for match in re.finditer(r"(?:^[ \t]*#[^\n]*\n)*^[ \t]*\[", text, re.MULTILINE)]
    for end in [*(end for end in ends if end > start.key_start), len(text)]:  # a line of an array may look like one
        changed = text[: start.key_start] + text[end:]
        try:
            if load_text(changed, before.path) == expected:
                return _rewrite(before, changed.rstrip("\n") + "\n", expected)
        except ConfigurationError:
            continue
    raise _by_hand(before)


def set_member_role(path: str | os.PathLike[str], name: str, role: Role) -> GroupConfig:
    """Sets ``role`` of one ``[[member]]``; all else in the file stays as it is."""
    before, text = _read(path)
    index = _index(before, name)
    lines = Lines(text)
    if place := lines.place(("member", index, "role")):
        changed = text[: place.value_start] + _text(role) + text[place.value_end :]
    else:
        named = lines.place(("member", index, "name"))
        assert named is not None
        line = text.rfind("\n", 0, named.key_start) + 1
        changed = f"{text[:line]}{text[line : named.key_start]}role = {_text(role)}\n{text[line:]}"
    members = tuple(
        msgspec.structs.replace(member, role=role) if member.name == name else member for member in before.members
    )
    return _rewrite(before, changed, msgspec.structs.replace(before, members=members))


def _index(config: GroupConfig, name: str) -> int:
    for index, member in enumerate(config.members):
        if member.name == name:
            return index
    raise ConfigurationError(f"{config.path} has no member {name!r}")


def _by_hand(before: GroupConfig) -> ConfigurationError:
    return ConfigurationError(f"{before.path} is written in a way that cannot be changed safely: edit it by hand")


def set_group_serial(path: str | os.PathLike[str], serial: str) -> GroupConfig:
    """Sets ``[group] serial`` in the file; all else in it, comments too, stays as it is."""
    before, text = _read(path)
    lines = Lines(text)
    if place := lines.place(("group", "serial")):
        changed = text[: place.value_start] + _text(serial) + text[place.value_end :]
    else:
        changed = _with_serial_after_label(text, lines, serial)
    expected = msgspec.structs.replace(before, group=msgspec.structs.replace(before.group, serial=serial))
    return _rewrite(before, changed, expected)


def drop_group_serial(path: str | os.PathLike[str]) -> GroupConfig:
    """Takes ``[group] serial`` out: the group was deleted, and may be created anew."""
    before, text = _read(path)
    place = Lines(text).place(("group", "serial"))
    if place is None:
        return before
    start, end = place.key_start, place.value_end
    if text[end:].lstrip(" \t").startswith(","):  # an inline table
        end = text.index(",", end) + 1
    else:
        line = text.rfind("\n", 0, start) + 1
        behind = text.find("\n", end)
        if not text[line:start].strip():
            start, end = line, len(text) if behind < 0 else behind + 1
    expected = msgspec.structs.replace(before, group=msgspec.structs.replace(before.group, serial=None))
    return _rewrite(before, text[:start] + text[end:], expected)


def _with_serial_after_label(text: str, lines: Lines, serial: str) -> str:
    """The new key stands after ``label``, which every file has, written in the same way."""
    label, group = lines.place(("group", "label")), lines.place(("group",))
    assert label is not None
    assert group is not None
    if text[group.value_start : group.value_end].startswith("{"):
        return f"{text[: label.value_end]}, serial = {_text(serial)}{text[label.value_end :]}"
    written = text[label.key_start : label.value_start]  # with "=" and the spaces that align it; group.label if dotted
    width = len(written.rstrip("= \t")) if "=" in written else 0
    key = re.sub(r"label[\"']?$", "serial", written[:width])
    key = re.sub(r"[\"']serial$", "serial", key)
    equals = written[width:]
    pad = max(0, len(equals) - len(equals.lstrip(" \t")) - (len(key) - width))
    end = text.find("\n", label.value_end)
    end = len(text) if end < 0 else end
    newline = "\r\n" if text[end - 1] == "\r" else "\n"
    end -= len(newline) - 1
    indent = text[text.rfind("\n", 0, label.key_start) + 1 : label.key_start]
    return f"{text[:end]}{newline}{indent}{key}{' ' * max(1, pad)}= {_text(serial)}{text[end:]}"


def _read(path: str | os.PathLike[str]) -> tuple[GroupConfig, str]:
    """The configuration that is there and its text, newlines as ``\\n``."""
    file = Path(os.path.abspath(path))
    try:
        with open(permissions.open_file(file), encoding="utf-8", newline="") as opened:
            text = opened.read()
    except permissions.Unsafe as unsafe:
        raise ConfigurationError(f"configuration file {unsafe}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file}: the text is not UTF-8") from None
    return load_text(text, file), text


def _rewrite(before: GroupConfig, text: str, expected: GroupConfig) -> GroupConfig:
    """Replaces the file, once it is proved that the new text means what was wanted and nothing else."""
    after = load_text(text, before.path)
    if after != expected:
        raise _by_hand(before)
    _replace(before.path, text, None)
    return after


def _replace(path: Path, text: str, mode: int | None) -> None:
    """All or nothing, also if the machine stops. ``mode`` None: mode and owner of the file that is there are kept."""
    path = path.resolve()  # a link stays one
    status = path.stat() if mode is None else None
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as opened:
            opened.write(text)
            opened.flush()
            if status is not None and (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, status.st_uid, status.st_gid)
            os.fchmod(descriptor, (status.st_mode & 0o7777) if status is not None else mode or 0)
            os.fsync(descriptor)
        if status is None:
            os.link(temporary, path)  # unlike rename, refuses to overwrite
            os.unlink(temporary)
        else:
            os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# -- rendering


def _section(header: str, *keys: tuple[str, str | None, str]) -> str:
    """Keys with their values (None: left out) and comments, aligned."""
    present = [(key, value, comment) for key, value, comment in keys if value is not None]
    key_width = max((len(key) for key, _, _ in present), default=0)
    width = max((len(value) for _, value, comment in present if comment), default=0)
    lines = [header]
    for key, value, comment in present:
        lines.append(f"{key:{key_width}} = {value:{width}}  # {comment}" if comment else f"{key:{key_width}} = {value}")
    return "\n".join(lines) + "\n"


def journal_section(journal: JournalSection, folder: Path) -> str:
    """``[journal]`` as it stands in a file in ``folder``."""
    url = journal.url
    shown = f"sqlite:{_relative(url.path, folder)}" if isinstance(url, SqliteUrl) else str(url)
    return _section(
        "[journal]",
        ("url", _text(shown), "sqlite:FILE for one host, etcd://HOST:PORT,…/NAME for several"),
        ("mirror", _path(journal.mirror, folder), "second place for envelopes"),
        ("offline_serving", _text(journal.offline_serving), "operations while the journal cannot be reached"),
        ("ca", _path(journal.ca, folder), ""),
        ("cert", _path(journal.cert, folder), ""),
        ("key", _path(journal.key, folder), ""),
        ("user", journal.user and _text(journal.user), ""),
        ("password_file", _path(journal.password_file, folder), ""),
    )


def _member(member: MemberConfig, folder: Path) -> str:
    default = MemberConfig(name="", module=member.module, local=is_softhsm(member.module))

    def changed(key: str, shown: str) -> str | None:
        return shown if getattr(member, key) != getattr(default, key) else None

    errors = {_error_name(number): verdict for number, verdict in member.errors.items()}
    env = {name: _env_value(value, folder) for name, value in member.env.items()}
    return _section(
        "[[member]]",
        ("name", _text(member.name), ""),
        ("module", _path(member.module, folder), ""),
        ("token_serial", member.token_serial and _text(member.token_serial), ""),
        ("token_label", member.token_label and _text(member.token_label), ""),
        ("role", _text(member.role), ""),
        ("site", member.site and _text(member.site), ""),
        ("priority", changed("priority", str(member.priority)), "lower first"),
        ("isolation", _text(member.isolation), ""),
        ("env", changed("env", _mapping(env)), ""),
        ("pin", _pin_source(member.pin, folder) if member.pin else None, ""),
        ("init_args", member.init_args and _text(member.init_args), ""),
        ("wrap_mechanism", changed("wrap_mechanism", f"0x{member.wrap_mechanism:04X}"), "RFC 5649 on this module"),
        ("oaep_hash", changed("oaep_hash", _text(member.oaep_hash)), ""),
        ("late_window", changed("late_window", repr(member.late_window)), "seconds"),
        ("local", changed("local", _flag(member.local)), "the module works in this host"),
        ("errors", changed("errors", _mapping(errors)), ""),
    )


def _watchdog(watchdog: WatchdogSection, folder: Path) -> str:
    if watchdog == WatchdogSection():
        return ""
    webhook = None
    if watchdog.webhook is not None:
        secret_file = watchdog.webhook.secret_file
        secret = {"secret_file": _relative(secret_file, folder)} if secret_file else {}
        webhook = _mapping({"url": watchdog.webhook.url, **secret})
    return _section(
        "[watchdog]",
        ("interval", repr(watchdog.interval), "seconds between heartbeats"),
        ("threshold", str(watchdog.threshold), "missed heartbeats that make a failure"),
        ("retry", str(watchdog.retry), "recovery attempts; -1: without end"),
        ("retry_interval", repr(watchdog.retry_interval), "seconds between them"),
        ("verify_rate", repr(watchdog.verify_rate), "objects proved per second; 0: none"),
        ("listen", _text(str(watchdog.listen) if watchdog.listen else "off"), "metrics and status page"),
        ("log_style", _text(watchdog.log_style), "json, console or luna"),
        ("hook", _words(watchdog.hook, folder) if watchdog.hook else None, "called with each alarm"),
        ("webhook", webhook, ""),
    )


def _text(value: str) -> str:
    """A basic string. JSON's escapes are TOML's; U+007F needs one in TOML only."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{value!a} is not text and cannot stand in hagroup.toml") from None
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _size(value: int) -> str:
    return _text(f"{value // MIB}MiB") if value and value % MIB == 0 else str(value)


def _mapping(values: Mapping[str, str]) -> str:
    pairs = (f"{key if _BARE_KEY.fullmatch(key) else _text(key)} = {_text(value)}" for key, value in values.items())
    return f"{{ {', '.join(pairs)} }}"


def _list(words: Iterable[str]) -> str:
    return f"[{', '.join(map(_text, words))}]"


def _words(words: tuple[str, ...], folder: Path) -> str:
    """A command; its first word is a path only if it has a ``/``."""
    command = words[0]
    if "/" in command and os.path.join(folder, short := _below(command, folder)) == command:
        command = short if "/" in short else command
    return _list((command, *words[1:]))


def _pin_source(pin: PinSource, folder: Path) -> str:
    if pin.file is not None:
        return _mapping({"file": _relative(pin.file, folder)})
    if pin.env is not None:
        return _mapping({"env": pin.env})
    return f"{{ command = {_words(pin.command or (), folder)} }}"


def _error_name(number: int) -> str:
    name = ckr.name(number)
    return name if name.startswith(CKR_PREFIX) else f"0x{number:08x}"


def _path(path: Path | None, folder: Path) -> str | None:
    return None if path is None else _text(_relative(path, folder))


def _below(path: str, folder: Path) -> str:
    """What follows ``folder/`` in ``path``; ``path`` itself where it is not below."""
    return path.removeprefix(os.path.join(folder, ""))


def _relative(path: Path, folder: Path) -> str:
    """``path`` as short as it is still read as the same one."""
    short = _below(str(path), folder)
    return short if short and not short.startswith(("~", "/", ":")) and folder / short == path else str(path)


def _env_value(value: str, folder: Path) -> str:
    short = _below(value, folder)
    for form in (short, f"./{short}"):
        if short != value and absolute_env_value(form, folder) == value:
            return form
    return value
