"""Where commands take PINs from: a file, a variable or a prompt; never an argument (G8)."""

from __future__ import annotations

import os
import select
import sys
import termios
from pathlib import Path

from hagroup.config.model import PinSource
from hagroup.config.pins import MAX_PIN_LENGTH, Pin, read_pin_stamped
from hagroup.errors import ConfigurationError

_LOOK = 0.2
"""Seconds between looks for Ctrl-C while a person types."""


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
        return Pin(_typed(f"{what}: "))
    except (EOFError, KeyboardInterrupt):
        raise ConfigurationError(f"no {what} was given; nothing was changed") from None


def _typed(prompt: str) -> bytes:
    """A line that is typed on the terminal, and not shown.

    Not getpass: a Ctrl-C that comes between its prompt and its reading is only seen when a line was typed.
    """
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        terminal = os.dup(sys.stdin.fileno())
    try:
        shown = termios.tcgetattr(terminal)
        hidden = [*shown[:3], shown[3] & ~termios.ECHO, *shown[4:]]
        try:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, hidden)
            os.write(terminal, prompt.encode())
            while not select.select([terminal], [], [], _LOOK)[0]:
                pass  # by the way, Python sees signals
            line = os.read(terminal, 2 * MAX_PIN_LENGTH)
        finally:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, shown)
            os.write(terminal, b"\n")
    finally:
        os.close(terminal)
    if not line:
        raise EOFError
    return line.rstrip(b"\r\n")


def default_config() -> str | None:
    """HAGROUP_CONFIG, as ``hagroup.lib()`` reads it."""
    return os.environ.get("HAGROUP_CONFIG")
