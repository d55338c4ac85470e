"""Who is alive: each process's registration, and each worker, holds an flock for its life; free means dead.

The files lie in ``.<journal name>.locks`` beside the journal. The kernel drops a lock with the last descriptor of its
open file, however the process ends, and no number is reused (as process numbers are).

A worker's file also tells whether a call that changes its token is inside the module (``hagroup.members.lock``). Where
its holder died in one, the file stays until that token was swept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import re
import secrets
from collections.abc import Callable, Collection
from pathlib import Path

from hagroup.core.worker_lock import CHANGING, RESTING

_WORKER = ".worker"
_CLEAN_AT_MOST = 200


def folder_of(journal: Path) -> Path:
    return journal.parent / f".{journal.name}.locks"


class Registration:
    """An owner of this process, alive until :meth:`release`, or until the process ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        folder.mkdir(mode=0o700, exist_ok=True)
        while True:
            self.owner = secrets.token_hex(8)
            path = folder / self.owner
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:
                    break
            except BlockingIOError:
                pass  # somebody just asks whether it is held (and may have been forked in that, or stopped)
            os.close(descriptor)  # or tidied it away before it was locked
        self._descriptor = descriptor

    def release(self) -> None:
        """The owner is dead from here on."""
        self.drop_inherited()

    def drop_inherited(self) -> None:
        """In a forked child: the descriptor is a second one of the parent's open file, so the parent would look alive
        as long as we live. Closing it leaves the parent's lock alone (LOCK_UN would not)."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def worker_lock(self, member: str) -> tuple[str, str]:
        """A fresh name and file for a worker of this owner to lock."""
        name = f"{self.owner}-{next(self._numbers)}-{_readable(member)}{_WORKER}"
        path = self._folder / name
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return name, str(path)


def _readable(member: str) -> str:
    """Names that look alike stay apart: what is forgotten of one member must not be forgotten of another."""
    readable = re.sub(r"[^A-Za-z0-9_]", "_", member)[:32]
    return f"{readable}.{hashlib.sha256(member.encode()).hexdigest()[:8]}"


def is_held(folder: Path, name: str) -> bool | None:
    """Whether the lock is held by a living process; None: there is no such file."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who ask at once do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def clean(folder: Path, referenced: Callable[[Collection[str]], Collection[str]]) -> list[str]:
    """Remove files of the dead that nothing refers to any more; returns their names. A bounded number each time.

    ``referenced`` tells which of the given names still stand in some row.
    """
    dead = []
    with os.scandir(folder) as entries:
        for entry in itertools.islice(entries, _CLEAN_AT_MOST):
            # A worker's file is made before the worker runs and locks it: it counts as alive with its owner.
            owner = entry.name.partition("-")[0]
            if not (is_held(folder, owner) or is_held(folder, entry.name) or _is_changing(folder, entry.name)):
                dead.append(entry.name)
    kept = set(referenced(dead)) if dead else set()
    removed = [name for name in dead if name not in kept]
    for name in removed:
        (folder / name).unlink(missing_ok=True)
    return removed


def being_changed(folder: Path, member: str) -> bool:
    """Whether a worker of this host is inside a call that changes the member's token."""
    return any(is_held(folder, name) for name in _changing(folder, member))


def cut_off(folder: Path, member: str) -> list[str]:
    """Workers that ended inside of such a call, and are not forgotten."""
    return [name for name in _changing(folder, member) if is_held(folder, name) is False]


def forget_cut_off(folder: Path, workers: Collection[str]) -> None:
    """What they left on the token was looked for. (Where that cannot be written it is looked for once more.)"""
    for name in workers:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(descriptor, RESTING, 0)
            finally:
                os.close(descriptor)


def _changing(folder: Path, member: str) -> list[str]:
    end = f"-{_readable(member)}{_WORKER}"
    try:
        names = os.listdir(folder)
    except OSError:
        return []  # the journal is away
    return [name for name in names if name.endswith(end) and _is_changing(folder, name)]


def _is_changing(folder: Path, name: str) -> bool:
    try:
        with open(folder / name, "rb", buffering=0) as file:
            return file.read(1) == CHANGING
    except OSError:
        return False
