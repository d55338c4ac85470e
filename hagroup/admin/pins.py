"""Where commands take PINs from: a file, a variable or a prompt; never an argument (G8)."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

from hagroup.config.model import PinSource
from hagroup.config.pins import Pin, read_pin_stamped
from hagroup.errors import ConfigurationError


def read(what: str, *, file: Path | None, variable: str | None) -> Pin:
    """The PIN called ``what`` from ``--…-pin-file``, ``--…-pin-env``, or a prompt on the terminal.

    :raises ConfigurationError: none of them gives one.
    """
    if file is not None and variable is not None:
        raise ConfigurationError(f"the {what} comes from a file or from a variable, not from both")
    if file is not None:
        return read_pin_stamped(PinSource(file=file.absolute()))[0]
    if variable is not None:
        return read_pin_stamped(PinSource(env=variable))[0]
    if not sys.stdin.isatty():
        option = "--so-pin" if "SO" in what else "--pin"
        raise ConfigurationError(f"the {what} is needed: give {option}-file or {option}-env, or run this on a terminal")
    try:
        return Pin(getpass.getpass(f"{what}: ").encode())
    except (EOFError, KeyboardInterrupt):
        raise ConfigurationError(f"no {what} was given; nothing was changed") from None


def default_config() -> str | None:
    """HAGROUP_CONFIG, as ``hagroup.lib()`` reads it."""
    return os.environ.get("HAGROUP_CONFIG")
