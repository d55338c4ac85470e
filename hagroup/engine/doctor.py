"""What a support person would ask for, looked at one by one, with a remedy for what is not well. Needs no PIN."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from hagroup.config import permissions
from hagroup.config.load import load
from hagroup.config.model import GroupConfig, MemberConfig, PinSource, SqliteUrl
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.clock import Clock
from hagroup.core.records import LoginState, Membership
from hagroup.engine import consistency
from hagroup.engine.login import pin_trouble
from hagroup.engine.member import Life
from hagroup.engine.opening import CONNECTION_LOST, open_life
from hagroup.engine.setup import NEEDED
from hagroup.errors import HAError, JournalMismatch
from hagroup.journal import Journal, open_journal
from hagroup.journal.sealed import Incomplete, Moved
from hagroup.members import ModuleProblem

OK, WARNING, BAD = "ok", "warning", "bad"
_PACKAGES = ("hagroup", "python-pkcs11", "msgspec", "cryptography")
_ROOM = 64 * 1024 * 1024
"""Bytes free where the journal is, below which it is time to act."""
_AHEAD = 60.0
_PAST = 1_700_000_000.0
_SLOW_SYNC = 0.1
"""Seconds for one durable write, above which every change of a key is slow."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line; fields are added, never renamed."""

    subject: str
    state: str
    """``ok``, ``warning`` or ``bad``."""
    found: str
    remedy: str = ""


def examine(path: Path, clock: Clock) -> Iterator[Check]:
    """All checks, one after the other; what cannot be looked at is bad, and the rest goes on."""
    yield from _versions()
    try:
        config = load(path)
    except HAError as error:
        yield _bad("configuration", str(error), "correct the file; the line is named")
        return
    yield Check(subject="configuration", state=OK, found=f"{path}: readable, nobody else may write it")
    journal: Journal | None = None
    try:
        journal = open_journal(config.journal, clock=clock)
    except HAError as error:
        yield _bad("journal", str(error), _journal_remedy(config, path, error))
    try:
        if journal is not None:
            yield from _journal(config, journal)
            yield from _clocks(journal, clock)
            yield _watchdog(config, journal)
        for member in config.members:
            yield from _member(config, member, journal)
    finally:
        if journal is not None:
            journal.close()


def _bad(subject: str, found: str, remedy: str) -> Check:
    return Check(subject=subject, state=BAD, found=found, remedy=remedy)


def _versions() -> Iterator[Check]:
    from importlib import metadata  # dear, and only for this

    found = [f"Python {platform.python_version()}", f"SQLite {sqlite3.sqlite_version}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            yield Check(subject="versions", state=WARNING, found=f"{package} is not installed as a package")
    yield Check(subject="versions", state=OK, found=", ".join(found) + f", {platform.platform(terse=True)}")


def _journal_remedy(config: GroupConfig, path: Path, error: HAError) -> str:
    if not config.group.serial:
        return f"run `ha-admin --config {path} group create`"
    match error:
        case Moved():
            files = "" if error.to.startswith("sqlite:") else ", with the files and names that etcd wants"
            return f"write {error.to} into [journal] url of {path}{files}, and start the programs of this host again"
        case Incomplete():
            return "run the command that is named to its end"
        case JournalMismatch():
            return "bring the right one back; if this one shall be it from now on, run `ha-admin journal adopt`"
        case _:
            return "bring its place back"


# -- the journal -------------------------------------------------------------------------------------------------------


def _journal(config: GroupConfig, journal: Journal) -> Iterator[Check]:
    group, members = journal.view()
    if group.serial != config.group.serial:
        yield _bad(
            "journal",
            f"it is group {group.label}'s ({group.serial}), hagroup.toml says {config.group.serial}",
            "correct [journal] url or [group] serial",
        )
    checked = consistency.check(journal)
    for problem in checked.problems:
        yield _bad("journal", problem, "stop changes and ask for help; `ha-admin backup create` now")
    if not checked.problems:
        yield Check(subject="journal", state=OK, found=f"{checked.objects} objects, consistent with itself")
    if isinstance(config.journal.url, SqliteUrl):
        yield from _place(config.journal.url.path)
    configured = {member.name for member in config.members}
    for record in members:
        if record.name not in configured:
            yield _bad(
                f"member {record.name}",
                "the group has it, hagroup.toml of this host does not",
                "add its [[member]] section, or `ha-admin member remove` it",
            )
    for name in sorted(configured - {record.name for record in members}):
        yield Check(
            subject=f"member {name}",
            state=WARNING,
            found="hagroup.toml has it, the group does not",
            remedy=f"complete `ha-admin member add {name}`, or take its section out",
        )


def _place(path: Path) -> Iterator[Check]:
    free = shutil.disk_usage(path.parent).free
    if free < _ROOM:
        yield Check(
            subject="journal",
            state=WARNING,
            found=f"{free // 1024} KiB free where it is",
            remedy="make room: a full disk stops every change of a key",
        )
    trial = path.with_name(f".{path.name}.doctor.{os.getpid()}")
    try:
        started = time.monotonic()
        with open(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(b"x")
            os.fsync(file.fileno())
        took = time.monotonic() - started
    except OSError as error:
        yield _bad("journal", f"nothing can be written where it is: {error.strerror}", "correct disk and permissions")
        return
    finally:
        trial.unlink(missing_ok=True)
    state = WARNING if took > _SLOW_SYNC else OK
    remedy = "put it on a faster disk: each change of a key waits for this" if state == WARNING else ""
    yield Check(subject="journal", state=state, found=f"a durable write takes {took * 1000:.1f} ms", remedy=remedy)


def _clocks(journal: Journal, clock: Clock) -> Iterator[Check]:
    """Leases and late windows count by boot time and do not care; events and `since` are read by people."""
    now = clock.wall()
    newest = max((event.time for event in journal.events(limit=1000)), default=0.0)
    ahead = newest - now
    if ahead > _AHEAD:
        yield Check(
            subject="clocks",
            state=WARNING,
            found=f"the journal has events from {ahead:.0f} s in the future: the clock was set back",
            remedy="set it right (NTP); nothing depends on it but the times that people read",
        )
        return
    if now < _PAST:
        yield Check(subject="clocks", state=WARNING, found="the clock stands in the past", remedy="set it right (NTP)")
        return
    yield Check(
        subject="clocks", state=OK, found=f"wall clock {datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M:%S} UTC"
    )


def _watchdog(config: GroupConfig, journal: Journal) -> Check:
    if journal.lease_held(f"watchdog/{config.group.serial}"):
        return Check(subject="watchdog", state=OK, found="one is watching this group")
    return Check(
        subject="watchdog",
        state=WARNING,
        found="none is watching this group: nobody is told of a failure while no program runs",
        remedy=f"run `ha-watchdog --config {config.path}` (`ha-watchdog install` writes the systemd unit)",
    )


# -- a member ----------------------------------------------------------------------------------------------------------


def _member(config: GroupConfig, member: MemberConfig, journal: Journal | None) -> Iterator[Check]:
    subject = f"member {member.name}"
    if member.pin is not None:
        yield from _pin_source(subject, member.pin)
    record = None
    if journal is not None:
        record = next((one for one in journal.members() if one.name == member.name), None)
        for login in journal.logins():
            if login.member == member.name and login.state is LoginState.REFUSED:
                yield _bad(
                    subject,
                    f"it refused the PIN from {login.source}",
                    f"put the right PIN there; if it is right, `ha-admin member resume {member.name}`",
                )
    if record is not None and record.membership is not Membership.ADMITTED:
        remedy = f"put that right, then `ha-admin member resume {member.name}`"
        if record.membership is not Membership.QUARANTINED:
            remedy = "run `ha-admin sync`"
        yield _bad(subject, f"{record.membership.value}: {record.reason or 'being brought up to date'}", remedy)
    try:
        serial = None if record is None else record.serial
        life = open_life(member, None, generation=1, timeout=config.timeouts.call, serial=serial)
    except (Ckr, DeadlinePassed, ModuleProblem, HAError, *CONNECTION_LOST) as error:
        yield _bad(subject, str(error), "check power, network, module, env and token_serial; `ha-admin recover`")
        return
    try:
        yield from _token(subject, member, life, None if record is None else record.serial)
    finally:
        life.connection.close()


def _pin_source(subject: str, source: PinSource) -> Iterator[Check]:
    """Whether it could be read; the PIN itself is neither read nor tried."""
    if source.file is not None:
        try:
            permissions.check_file(source.file, secret=True)
        except permissions.Unsafe as error:
            yield _bad(subject, f"PIN {error}", f"chmod 600 {source.file}, owned by who runs the application")
            return
        yield Check(subject=subject, state=OK, found=f"PIN file {source.file}: readable by its owner only")
    elif source.env is not None and source.env not in os.environ:
        yield Check(
            subject=subject,
            state=WARNING,
            found=f"the variable {source.env} with its PIN is not set here",
            remedy="set it where applications run",
        )


def _token(subject: str, member: MemberConfig, life: Life, serial: str | None) -> Iterator[Check]:
    module = life.connection.module_info
    version = ".".join(map(str, module.library_version))
    yield Check(
        subject=subject,
        state=OK,
        found=f"{module.manufacturer} {version} ({member.module}), token {life.token.label} ({life.token.serial}), "
        f"firmware {'.'.join(map(str, life.token.firmware_version))}",
    )
    if serial is not None and life.token.serial != serial:
        yield _bad(subject, f"another token is in its place: {life.token.serial}, not {serial}", "put its own back")
    trouble = pin_trouble(life.token.flags)
    if trouble is not None:
        yield _bad(subject, trouble, "log in there with the right PIN by the vendor's tool")
    missing = [int(number) for number in (*NEEDED, member.wrap_mechanism) if number not in life.mechanisms]
    if missing:
        yield _bad(
            subject,
            "lacks mechanisms that replication needs: " + ", ".join(f"0x{number:x}" for number in missing),
            "set wrap_mechanism to the module's number for RFC 5649, or allow them in the HSM's policy",
        )
    else:
        yield Check(subject=subject, state=OK, found=f"{len(life.mechanisms)} mechanisms, all that replication needs")
