"""What a support person is sent: checks, status, events and the configuration, without a secret (G8).

Members' PIN sources are named, never read; object labels and identifiers are an application's own affair and stay out.
"""

from __future__ import annotations

import io
import json
import re
import time
import tomllib
from pathlib import Path

import msgspec

from hagroup.config.load import load
from hagroup.config.model import GroupSection, JournalSection, MemberConfig, Timeouts, WatchdogSection
from hagroup.core.clock import Clock
from hagroup.engine import doctor, status
from hagroup.errors import HAError
from hagroup.journal import open_journal

_EVENTS = 2000
_HIDDEN = "(left out)"
_PIN_SOURCES = ("file", "env")
"""What a PIN source may name; the words of a command may be anything."""
_SHOWN = {
    "group": GroupSection.__struct_fields__,
    "journal": JournalSection.__struct_fields__,
    "timeouts": Timeouts.__struct_fields__,
    "member": tuple(field for field in MemberConfig.__struct_fields__ if field != "init_args"),
    "watchdog": tuple(field for field in WatchdogSection.__struct_fields__ if field not in ("hook", "webhook")),
}
"""Keys whose values are no secret; everything else is left out, what nobody knows too."""
_USER_PART = re.compile(r"(\w+://)[^/@\s\"']+@")


def make(path: Path, clock: Clock) -> bytes:
    """The archive (tar.gz). What cannot be had is said in it; nothing stops it."""
    files = {"doctor.json": _encoded(list(doctor.examine(path, clock)))}
    try:
        files["hagroup.toml"] = redacted(path.read_text(), path.absolute().parent).encode()
    except (OSError, ValueError) as error:  # also what is no TOML, or no text
        files["hagroup.toml.txt"] = f"cannot be read: {type(error).__name__}\n".encode()
    try:
        config = load(path)
        journal = open_journal(config.journal, clock=clock)
        try:
            files["status.json"] = _encoded(status.gather(config, journal))
            files["members.json"] = _encoded(
                [msgspec.structs.replace(member, transport=b"") for member in journal.members()]
            )
            files["counts.json"] = _encoded(journal.counts())
            files["events.json"] = _encoded(
                [
                    {"number": one.number, "time": one.time, "kind": one.kind, "member": one.member, "text": one.text}
                    for one in journal.events(limit=_EVENTS)
                ]
            )
        finally:
            journal.close()
    except HAError as error:
        files["journal.txt"] = f"{error}\n".encode()
    return _archive(files)


def redacted(text: str, folder: Path) -> str:
    """hagroup.toml without what may hold a secret: written anew from what was read, value by value.

    :param folder: what relative paths in it are relative to.
    :raises ValueError: it is not TOML, so that nobody can tell what in it is a secret.
    """
    lines: list[str] = []
    for name, section in tomllib.loads(text).items():
        for table in section if isinstance(section, list) else [section]:
            if isinstance(table, dict):
                lines.append(f"[[{name}]]" if isinstance(section, list) else f"[{name}]")
                lines += [f"{_value(key)} = {_value(_shown(name, key, one, folder))}" for key, one in table.items()]
                lines.append("")
    return "\n".join(lines)


def _shown(section: str, key: str, value: object, folder: Path) -> object:
    if key not in _SHOWN.get(section, ()):
        return _HIDDEN
    if key == "pin":
        sources = value if isinstance(value, dict) else {"": value}
        return {kind: source if kind in _PIN_SOURCES else _HIDDEN for kind, source in sources.items()}
    if key == "env":
        variables = value if isinstance(value, dict) else {"": value}
        return {name: one if _is_path(one, folder) else _HIDDEN for name, one in variables.items()}
    return _USER_PART.sub(rf"\1{_HIDDEN}@", value) if isinstance(value, str) else value


def _is_path(value: object, folder: Path) -> bool:
    try:
        return isinstance(value, str) and "/" in value and (folder / value).exists()
    except (OSError, ValueError):
        return False


def _value(value: object) -> str:
    """As TOML has it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_value(key)} = {_value(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else str(value)


def _encoded(document: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def _archive(files: dict[str, bytes]) -> bytes:
    import tarfile  # only for this

    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"hagroup-doctor/{name}")
            entry.size, entry.mode, entry.mtime = len(content), 0o600, int(time.time())
            archive.addfile(entry, io.BytesIO(content))
    return written.getvalue()
