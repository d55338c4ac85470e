"""Who else could change what we load, or read what only we should: owner and mode of files and folders.

Whoever may write the configuration, a module or the folder that holds it decides which code gets the PIN. Only the
folder that holds the file directly is looked at, not those above it.
"""

from __future__ import annotations

import os
import shlex
import stat
import struct
from pathlib import Path

_ACL = "system.posix_acl_access"
_ACL_ENTRY = struct.Struct(
    "<HHI"
)  # tag, permissions, user or group (linux/posix_acl_xattr.h), after 4 bytes of version
_ACL_USER, _ACL_GROUP_OBJ, _ACL_GROUP = 0x02, 0x04, 0x08


class Unsafe(Exception):
    """The text is a sentence that names the file and the remedy."""


def open_file(path: Path, *, secret: bool = False) -> int:
    """Descriptor of a regular file that nobody else may write (``secret``: nor read). Raises :class:`Unsafe`.

    What is checked is what was opened, so nothing can be put in its place in between.
    """
    try:
        # O_NONBLOCK: a named pipe would otherwise hold us until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Unsafe(_unreadable(path, error)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Unsafe(f"{path} is not a file")
        _check_owner(path, status)
        _check_writers(path, status)
        if secret:
            _check_readers(path, status, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_file(path: Path, *, secret: bool = False) -> None:
    """Raises :class:`Unsafe` unless ``path`` and the folder it is in are ours alone to write."""
    os.close(open_file(path, secret=secret))
    check_folder_of(path)


def check_folder_of(path: Path) -> None:
    """Checks the folder that holds ``path``; where ``path`` is a link, also the one that holds the file itself."""
    for folder in dict.fromkeys((path.parent, path.resolve().parent)):
        try:
            status = os.stat(folder)
        except OSError as error:
            raise Unsafe(_unreadable(folder, error)) from None
        _check_owner(folder, status, of=path)
        _check_writers(folder, status, of=path)


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist"
    return f"{path} cannot be read ({os.strerror(error.errno or 0)})"


def _named(path: Path, of: Path | None) -> str:
    return f"{of} is in the folder {path}, which" if of else str(path)


def _check_owner(path: Path, status: os.stat_result, *, of: Path | None = None) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise Unsafe(
            f"{_named(path, of)} belongs to user number {status.st_uid}, who is neither root nor the user who runs "
            f"this: run chown {os.geteuid()} {shlex.quote(str(path))}"
        )


def _check_writers(path: Path, status: os.stat_result, *, of: Path | None = None) -> None:
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        remedy = f"run chmod go-w {shlex.quote(str(path))}"
        if status.st_mode & stat.S_ISVTX:  # /tmp and the like are meant to be so
            remedy = "move the file into a folder of its own"
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        raise Unsafe(f"{_named(path, of)} may be written by others (mode {mode}): {remedy}")


def _check_readers(path: Path, status: os.stat_result, descriptor: int) -> None:
    others = status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if others and not (others == stat.S_IRGRP and _only_own_acl(descriptor)):
        raise Unsafe(
            f"{path} may be read by others (mode {stat.S_IMODE(status.st_mode):04o}): "
            f"run chmod 600 {shlex.quote(str(path))}"
        )


def _only_own_acl(descriptor: int) -> bool:
    """Whether the group's read bit is only the mask of an access list that names nobody but us.

    systemd hands its credentials to a service's user like this: owned by root, mode 0440, user named in the list.
    """
    try:
        entries = os.getxattr(descriptor, _ACL)[4:]
    except OSError:
        return False
    ours = (0, os.geteuid())
    return not any(
        (tag == _ACL_USER and number not in ours) or (tag in (_ACL_GROUP_OBJ, _ACL_GROUP) and permissions)
        for tag, permissions, number in _ACL_ENTRY.iter_unpack(entries)
    )
