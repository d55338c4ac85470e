"""What a command does with the journal, the members and files, one after the other; and Ctrl-C at a place among these.

Counted is what its main thread does: that is where Ctrl-C arrives, and what comes in the same order each time.

As a program (FOLDER INTERACTION ARGUMENT...) it is ha-admin, and says FROZEN before the first interaction of that name,
where it waits for a signal.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

BEFORE, AFTER = "before", "after"
FROZEN = "frozen"

_LEASES = ("acquire_lease", "renew_lease", "release_lease", "_register", "close")
"""Changes of the journal that change nothing of the group."""
_MAKE = ("create", "copy", "unwrap", "generate", "generate_pair", "derive")
_TOKEN = (0x1, b"\1")
"""CKA_TOKEN: of a session object nothing stays."""


class Interaction(msgspec.Struct, frozen=True):
    """One of them."""

    name: str
    changes: bool
    """Something of the group, and for longer than the program lives."""


class Interactions:
    """Watches this program from now on."""

    def __init__(
        self, folder: str, at: int | str = 0, when: str = BEFORE, stop: Callable[[], None] | None = None
    ) -> None:
        """
        :param folder: files in it are watched.
        :param at: name of the interaction, or its number, counted from 1, at which ``stop`` is called; 0: none.
        :param when: before that interaction, or when it is over and its result was not seen yet.
        :param stop: in place of Ctrl-C.
        """
        self.seen: list[Interaction] = []
        self.stopped_at = ""
        """Where it was, for people."""
        self._folder, self._at, self._when, self._stop = folder, at, when, stop or _ctrl_c
        self._watch_journal()
        self._watch_members()
        self._watch_files()

    @contextmanager
    def _met(self, name: str, changes: bool) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread() or self.stopped_at:
            yield
            return
        self.seen.append(Interaction(name, changes))
        here = self._at in (len(self.seen), name)
        if here and self._when == BEFORE:
            self._end(name)
        yield
        if here and not self.stopped_at:
            self._end(name)

    def _end(self, name: str) -> None:
        places = [frame for frame in traceback.extract_stack() if "/hagroup/" in frame.filename]
        self.stopped_at = f"{self._when} {name}: {' > '.join(f'{one.name}:{one.lineno}' for one in places[-7:])}"
        self._stop()

    def _watch_journal(self) -> None:
        from hagroup.journal import SqliteJournal
        from hagroup.journal.opened import Opened

        read, write = Opened._read, Opened._write

        def reading(journal: Opened, query: Any) -> Any:
            with self._met(f"journal {sys._getframe(1).f_code.co_name}", False):
                return read(journal, query)

        def writing(journal: Opened) -> Any:
            return self._transaction(write(journal), sys._getframe(1).f_code.co_name)

        Opened._read, Opened._write = reading, writing  # type: ignore[method-assign]
        for name in ("create", "adopt_file"):
            true = getattr(SqliteJournal, name)

            def making(*arguments: Any, true: Any = true, name: str = name, **more: Any) -> Any:
                with self._met(f"journal {name}", True):
                    return true(*arguments, **more)

            setattr(SqliteJournal, name, staticmethod(making))

    @contextmanager
    def _transaction(self, write: Any, name: str) -> Iterator[Any]:
        with self._met(f"journal {name}", name not in _LEASES), write as transaction:
            yield transaction

    def _watch_members(self) -> None:
        from hagroup.members.inline import InlineConnection
        from hagroup.members.process import ProcessConnection

        for kind in (InlineConnection, ProcessConnection):
            true = kind._call

            def calling(
                connection: Any, operation: str, generation: int, arguments: list[Any], timeout: float, true: Any = true
            ) -> Any:
                changes = operation in ("destroy", "set", "init_pin", "set_pin") or (
                    operation in _MAKE and _on_the_token(arguments)
                )
                with self._met(f"member {operation}", changes):
                    return true(connection, operation, generation, arguments, timeout)

            kind._call = calling  # type: ignore[method-assign]

    def _watch_files(self) -> None:
        for name in ("link", "rename", "replace", "unlink", "mkdir", "rmdir", "open"):
            true = getattr(os, name)

            def touching(first: Any, *more: Any, true: Any = true, name: str = name, **others: Any) -> Any:
                path = os.fspath(first) if isinstance(first, str | os.PathLike) else ""
                makes = name != "open" or bool(more and more[0] & os.O_CREAT)
                if not makes or not str(path).startswith(self._folder) or ".locks" in str(path):
                    return true(first, *more, **others)
                with self._met(f"file {name}", name in ("link", "rename", "replace")):
                    return true(first, *more, **others)

            setattr(os, name, touching)


def _on_the_token(arguments: list[Any]) -> bool:
    return any(
        isinstance(one, list) and any(tuple(pair) == _TOKEN for pair in one if isinstance(pair, tuple | list))
        for one in arguments
    )


def _ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def _freeze() -> None:
    """Until a signal came, whichever thread the system gave it to."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    print(FROZEN, flush=True)
    select.select([reading], [], [])
    signal.set_wakeup_fd(-1)


if __name__ == "__main__":
    from hagroup.admin import cli

    Interactions(sys.argv[1], sys.argv[2], stop=_freeze)
    sys.argv = ["ha-admin", *sys.argv[3:]]
    cli.main()
