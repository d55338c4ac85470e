"""Whether a journal's file is where it belongs, ours alone to write, and not a copy of one."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

import msgspec

from hagroup.config.permissions import Unsafe, check_folder_of
from hagroup.errors import JournalMismatch, JournalUnavailable

MACHINE_ID = Path("/etc/machine-id")


class Place(msgspec.Struct, frozen=True):
    """Machine and file. The device number may differ after a restart; it is kept for people."""

    machine: str
    inode: int
    device: int


def place_of(path: Path) -> Place:
    """Raises OSError where there is no such file."""
    try:
        machine = MACHINE_ID.read_text(encoding="ascii").strip()
    except OSError:
        machine = ""  # a container without one: the inode still tells
    status = os.stat(path)
    return Place(machine, status.st_ino, status.st_dev)


def check_safe(path: Path) -> None:
    """Raises :class:`JournalUnavailable` where there is no such file, or others may write it or its folder.

    By name only: opening the file and closing it again would drop every lock that SQLite holds on it in this process
    (POSIX: locks go with *any* descriptor of the file).
    """
    try:
        status = os.stat(path)
        check_folder_of(path)
    except FileNotFoundError:
        raise JournalUnavailable(
            f"{path} does not exist: run `ha-admin group create`, or correct [journal] url; if it was lost, run "
            "`ha-admin journal rebuild`"
        ) from None
    except OSError as error:
        raise JournalUnavailable(f"{path} cannot be reached ({error.strerror}): look at its folder") from None
    except Unsafe as error:
        raise JournalUnavailable(f"{error}; the journal was not opened") from None
    if not stat.S_ISREG(status.st_mode):
        raise JournalUnavailable(f"{path} is not a file: correct [journal] url")
    if status.st_uid not in (0, os.geteuid()):
        raise JournalUnavailable(
            f"{path} belongs to user number {status.st_uid}, who is neither root nor the user who runs this: run "
            f"chown {os.geteuid()} {shlex.quote(str(path))}; the journal was not opened"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise JournalUnavailable(
            f"{path} may be written by others (mode {stat.S_IMODE(status.st_mode):04o}): run chmod go-w "
            f"{shlex.quote(str(path))}; the journal was not opened"
        )


def check_bound(path: Path, recorded: Place) -> None:
    """Raises :class:`JournalMismatch` for a copy, or what came back from a backup."""
    found = place_of(path)
    if found.machine != recorded.machine:
        what = "was made on another machine"
    elif found.inode != recorded.inode:
        what = "is not the file that was made here"
    else:
        return
    raise JournalMismatch(
        f"{path} {what}, so it is a copy or was restored, and may be behind the group: if it shall be the journal from "
        "now on, stop every user of the other one and run `ha-admin journal adopt`"
    )
