"""Shares between people and the program: one at a time on the screen or in a file of its own, typed in unseen."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hagroup.engine import shares
from hagroup.engine.one_step import one_step
from hagroup.engine.shares import SECRETS, Scheme
from hagroup.errors import ConfigurationError

_CLEAR = "\x1b[2J\x1b[3J\x1b[H"
_TRIES = 5


def expect_a_place(folder: Path | None) -> None:
    """:raises ConfigurationError: there is nowhere to put shares."""
    if folder is None and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigurationError(
            "shares are shown one by one on a terminal, or written one by one into the files of --shares-folder; "
            "nothing was changed"
        )
    if folder is not None and any((folder / _name(what, 1)).exists() for what in SECRETS):
        raise ConfigurationError(f"{folder} holds shares already; nothing is overwritten, and nothing was changed")


def hand_out(label: str, secrets: Sequence[bytes], how: Scheme, folder: Path | None, written: list[Path]) -> None:
    """Split each secret, and give the shares away one after the other.

    :param written: gets the files that are made.
    """
    for what, secret in zip(SECRETS, secrets, strict=True):
        for number, words in enumerate(shares.split(secret, how), 1):
            title = f"group {label}, {what}, share {number} of {how.of} ({how.needed} are needed)"
            if folder is None:
                _show(title, words)
            else:
                _write(folder, _name(what, number), f"{title}\n{words}\n", written)


def take_back(written: Sequence[Path]) -> None:
    """Files of :func:`hand_out`, of shares that nobody can use."""
    for file in written:
        file.unlink(missing_ok=True)


def _name(what: str, number: int) -> str:
    return f"{what.replace(' ', '-')}-share-{number}"


def _show(title: str, words: str) -> None:
    print(f"{_CLEAR}{title}\n")
    for number, word in enumerate(words.split(), 1):
        print(f"{number:3} {word:12}", end="\n" if number % 4 == 0 else "")
    print("\n\nOnly its holder may see this. Write it down, then press Enter; the screen is cleared.", flush=True)
    sys.stdin.readline()
    print(_CLEAR, end="", flush=True)


def _write(folder: Path, name: str, text: str, written: list[Path]) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with one_step():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        written.append(folder / name)
    with open(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# -- put together ------------------------------------------------------------------------------------------------------


def collect(files: Sequence[Path]) -> tuple[bytes, bytes]:
    """Both secrets, from files of shares or from what their holders type.

    :raises ConfigurationError: they do not go together, or there is nobody to type them.
    """
    if files:
        first, second = (shares.combine(_read(files, what), what) for what in SECRETS)
        return first, second
    if not sys.stdin.isatty():
        raise ConfigurationError("shares are typed on a terminal, or named with --share-file; nothing was changed")
    with _unseen():
        first, second = (shares.combine(_typed(what), what) for what in SECRETS)
    return first, second


@contextmanager
def _unseen() -> Iterator[None]:
    """Echo is off from the first share to the last: what is typed ahead does not show either."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(terminal, termios.TCSAFLUSH, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


def _read(files: Sequence[Path], what: str) -> list[str]:
    found = []
    for file in files:
        try:
            title, _, words = file.read_text(encoding="utf-8").partition("\n")
        except UnicodeDecodeError:
            raise ConfigurationError(f"{file} is no share; nothing was changed") from None
        if f", {what}, " in title:
            found.append(words.strip())
    if not found:
        raise ConfigurationError(f"none of the files is a share of the {what}; nothing was changed")
    return found


def _typed(what: str) -> list[str]:
    """As many as the first one says, each unseen; a mistyped one is asked for again."""
    found: list[str] = []
    wanted: int | None = None
    set_name: int | None = None
    mistakes = 0
    while wanted is None or len(found) < wanted:
        of = "" if wanted is None else f" of {wanted}"
        print(f"{what}, share {len(found) + 1}{of} (not shown): ", end="", flush=True)
        line = sys.stdin.readline()
        print()
        if not line:
            raise ConfigurationError("stopped; nothing was changed")
        words = " ".join(line.lower().split())
        try:
            name, needed = shares.needed_for(words)
            if set_name not in (None, name):
                raise ConfigurationError("this share is of another set than the one before")
            if words in found:
                raise ConfigurationError("this share was typed already")
        except ConfigurationError as error:
            mistakes += 1
            if mistakes >= _TRIES:
                raise
            print(error, file=sys.stderr)
            continue
        set_name, wanted = name, needed
        found.append(words)
    return found
