"""PINs: reading them from where the configuration says, and holding them without showing them.

A source that a member refused is recorded by *identity* and *stamp* and not tried again until the stamp changes
(DESIGN.md 4.7). Neither may tell anything of the PIN: no hash, and not the size of its file either. Where nothing
shows a change reliably the stamp is always ``""``, so that only a person clears it (``ha-admin member resume``): for
``env`` and ``command``, and for systemd's credentials, which are made anew at every start of the service, so that a
service restarting in a loop would spend an attempt each time.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import signal
import subprocess
from pathlib import Path
from typing import NoReturn, SupportsIndex

from hagroup.config import permissions
from hagroup.config.model import PinSource
from hagroup.errors import ConfigurationError

COMMAND_TIMEOUT = 10.0
MAX_PIN_LENGTH = 1024
"""Longer than any token's ulMaxPinLen; what is longer was not meant as a PIN."""

_MASK = "***"
_CREDENTIALS = Path("/run/credentials")


class Pin:
    """A PIN in memory. Shown nowhere: not by repr, str or format, not pickled, copied or hashed."""

    __slots__ = ("_held",)

    def __init__(self, pin: bytes) -> None:
        self._held: bytearray | None = bytearray(pin)

    def reveal(self) -> bytes:
        """The PIN itself, to be given to C_Login and kept nowhere."""
        if self._held is None:
            raise ValueError("this PIN was wiped")
        return bytes(self._held)

    def wipe(self) -> None:
        """Overwrites it. Best effort: copies that :meth:`reveal` gave out are not ours. Idempotent."""
        if self._held is not None:
            self._held[:] = bytes(len(self._held))
            self._held = None

    @property
    def wiped(self) -> bool:
        return self._held is None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pin):
            return NotImplemented
        if self._held is None or other._held is None:
            return False
        return hmac.compare_digest(self._held, other._held)

    __hash__ = None  # type: ignore[assignment]  # a hash would tell something of it

    def __repr__(self) -> str:
        return f"Pin({_MASK})"

    def __str__(self) -> str:
        return _MASK

    def __format__(self, format_spec: str) -> str:
        return _MASK

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a Pin is not pickled or copied")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # __init__ failed
            self.wipe()


def read_pin(source: PinSource) -> bytes:
    """The PIN that ``source`` gives now. Raises ConfigurationError, which names the source and never what it gave."""
    pin, _ = read_pin_stamped(source)
    return pin.reveal()


def read_pin_stamped(source: PinSource) -> tuple[Pin, str]:
    """The PIN and the stamp of the source that it was read from.

    The stamp is taken from the opened file after it was read. If the file is changed meanwhile, the new one may be
    taken for the refused one (a person resumes the member), but a refused PIN is never taken for a new one.
    """
    if source.file is not None:
        return _read_file(source.file)
    if source.env is not None:
        value = os.environb.get(os.fsencode(source.env))
        if value is None:
            raise ConfigurationError(f"PIN source {pin_source_identity(source)}: the variable is not set")
        return _checked(value, source), ""
    return _checked(_run(source), source), ""


def pin_source_identity(source: PinSource) -> str:
    """What names the source in the journal: ``file:/path``, ``env:NAME``, ``command:/path/of/program``.

    A command's arguments are left out, in case that somebody put a secret there.
    """
    if source.file is not None:
        return f"file:{source.file}"
    if source.env is not None:
        return f"env:{source.env}"
    return f"command:{(source.command or ('',))[0]}"


def pin_source_stamp(source: PinSource) -> str:
    """What changes when the source is changed; ``""`` where that cannot be seen, ``"absent"`` for a missing file."""
    if source.file is None:
        return ""
    try:
        return _stamp(source.file, os.stat(source.file))
    except OSError:
        return "absent"


def _stamp(path: Path, status: os.stat_result) -> str:
    if _is_systemd_credential(path):
        return ""
    return f"{status.st_mtime_ns}:{status.st_dev}:{status.st_ino}"


def _is_systemd_credential(path: Path) -> bool:
    own = os.environ.get("CREDENTIALS_DIRECTORY")
    return path.is_relative_to(_CREDENTIALS) or bool(own and path.is_relative_to(own))


def _read_file(path: Path) -> tuple[Pin, str]:
    try:
        descriptor = permissions.open_file(path, secret=True)
    except permissions.Unsafe as unsafe:
        raise ConfigurationError(f"PIN file {unsafe}") from None
    with open(descriptor, "rb", buffering=0) as opened:
        content = opened.read(MAX_PIN_LENGTH + 3) or b""
        stamp = _stamp(path, os.fstat(descriptor))
    return _checked(content, PinSource(file=path)), stamp


def _run(source: PinSource) -> bytes:
    """Output of the command. It has a session of its own, so that all it started can be ended with it."""
    assert source.command is not None
    identity = pin_source_identity(source)
    try:
        process = subprocess.Popen(
            source.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it may repeat the PIN
            start_new_session=True,
        )
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigurationError(f"PIN source {identity}: the command cannot be started ({reason})") from None
    with contextlib.closing(process.stdout or open(os.devnull, "rb")):
        output: bytes | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=COMMAND_TIMEOUT)
        if output is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # Raised here and not where it was noticed: TimeoutExpired holds the output, and would hang on as __context__.
    if output is None:
        raise ConfigurationError(f"PIN source {identity}: the command did not end within {COMMAND_TIMEOUT:g} seconds")
    if process.returncode != 0:
        raise ConfigurationError(f"PIN source {identity}: the command failed with status {process.returncode}")
    return output


def _checked(content: bytes, source: PinSource) -> Pin:
    """The PIN without the newline after it. What is surely no PIN is refused here: on a member it costs an attempt."""
    pin = content.removesuffix(b"\n").removesuffix(b"\r") if content.endswith(b"\n") else content
    problem = None
    if not pin:
        problem = "it is empty"
    elif len(pin) > MAX_PIN_LENGTH:
        problem = f"it is longer than {MAX_PIN_LENGTH} bytes"
    elif b"\n" in pin:
        problem = "it has more than one line"
    elif b"\0" in pin or pin.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        problem = "it is not plain text (it has a NUL byte or a byte order mark)"
    if problem is not None:
        raise ConfigurationError(f"PIN source {pin_source_identity(source)}: {problem}")
    return Pin(pin)
