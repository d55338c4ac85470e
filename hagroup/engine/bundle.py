"""What a support person is sent: checks, status, events and the configuration, without a secret (G8).

Members' PIN sources are named, never read; object labels and identifiers are an application's own affair and stay out.
"""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import msgspec

from hagroup.config.load import load
from hagroup.core.clock import Clock
from hagroup.engine import doctor, status
from hagroup.errors import HAError
from hagroup.journal import open_journal

_EVENTS = 2000
_HIDDEN = "(left out)"
_SECRET_KEYS = re.compile(r"\b(init_args|command|webhook|url)\b(\s*=\s*)(\"[^\"]*\"|'[^']*'|\[[^\]]*\])")
_USER_PART = re.compile(r"(\w+://)[^/@\s\"']+@")


def make(path: Path, clock: Clock) -> bytes:
    """The archive (tar.gz). What cannot be had is said in it; nothing stops it."""
    files = {"doctor.json": _encoded(list(doctor.examine(path, clock)))}
    try:
        files["hagroup.toml"] = redacted(path.read_text()).encode()
    except (OSError, UnicodeDecodeError) as error:
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


def redacted(text: str) -> str:
    """hagroup.toml without what may hold a secret: init_args, commands, addresses of webhooks, users in addresses."""

    def hide(found: re.Match[str]) -> str:
        keep = found[1] == "url" and re.match(r"[\"'](sqlite|etcd):", found[3])
        return found[0] if keep else f'{found[1]}{found[2]}"{_HIDDEN}"'

    return _USER_PART.sub(rf"\1{_HIDDEN}@", _SECRET_KEYS.sub(hide, text))


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
