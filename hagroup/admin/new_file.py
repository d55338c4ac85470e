"""Files that a command makes."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from hagroup.errors import ConfigurationError


def new_file(file: Path, data: bytes) -> None:
    """Whole or not at all, readable by its owner only, and over no other file.

    :raises ConfigurationError: it cannot be made.
    """
    try:
        _make(file, data)
    except FileExistsError:
        raise ConfigurationError(f"{file} exists already and is not overwritten") from None
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror}") from None


def _make(file: Path, data: bytes) -> None:
    temporary = file.absolute().with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as opened_file:
            opened_file.write(data)
            opened_file.flush()
            os.fsync(opened_file.fileno())
        os.link(temporary, file)  # unlike rename, refuses to overwrite
    finally:
        temporary.unlink(missing_ok=True)
