"""A member in the calling process (isolation ``none``): the lowest latency, for local modules that are trusted.

Timeouts cannot be enforced: a module that hangs, hangs its caller, and one that crashes takes the process with it. Each
connection loads its own *copy* of the module's file, since a library is loaded once per file and process: two members
on one file would silently be the same token.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hagroup.core.calls import Ckr, DeadlinePassed, MemberGone, StaleGeneration, WorkerFault
from hagroup.members.api import MechanismInfo, ModuleInfo
from hagroup.members.connection import MessageConnection
from hagroup.members.cryptoki import Cryptoki
from hagroup.members.executor import Executor
from hagroup.members.lock import WorkerLock
from hagroup.members.module import ConnectionSettings, Module, ModuleProblem, load
from hagroup.members.worker import where

_CLOSE = 5.0
_environment = threading.Lock()
_parked: dict[tuple[object, ...], list[Cryptoki]] = {}
"""Copies whose module was finalized: the next connection of the same member takes one, instead of loading yet another
copy (a library can be unloaded only at a risk, so each would stay)."""


def _after_fork() -> None:
    global _environment
    _environment = threading.Lock()  # another thread of the parent may have held it
    _parked.clear()  # what a module does in a forked process is undefined until it is loaded anew


os.register_at_fork(after_in_child=_after_fork)


def _identity(settings: ConnectionSettings) -> tuple[object, ...]:
    """What a parked copy must have in common with its next use: the very file, and all that it was started with."""
    try:
        status = os.stat(settings.module)
    except OSError:
        return (settings.module,)
    file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return (settings.module, file, settings.init_args, *sorted(settings.env.items()))


@contextmanager
def _with_environment(variables: dict[str, str]) -> Iterator[None]:
    """The member's environment, for as long as its module reads it. Other threads see it meanwhile."""
    with _environment:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _load_copy(path: str, name: str) -> Cryptoki:
    """Loads a private copy of the module, whose file is gone as soon as it is mapped."""
    if not os.path.isfile(path):
        return load(path, name)  # says what is wrong
    problem: ModuleProblem | None = None
    # Where programs may be mapped from differs: /tmp is often mounted noexec, /dev/shm sometimes.
    for folder in dict.fromkeys([tempfile.gettempdir(), "/dev/shm", os.environ.get("XDG_RUNTIME_DIR") or "/tmp"]):
        try:
            descriptor, copy = tempfile.mkstemp(prefix="hagroup-", suffix=".so", dir=folder)
        except OSError:
            continue
        try:
            with open(path, "rb") as source, os.fdopen(descriptor, "wb") as target:
                shutil.copyfileobj(source, target)
            return load(copy, name)
        except ModuleProblem as error:
            problem = ModuleProblem(str(error).replace(copy, path))
        finally:
            os.unlink(copy)
    raise problem or ModuleProblem(f"member {name}: no folder for a copy of {path} can be written")


class InlineConnection(MessageConnection):
    """One life of one copy of a module in this process."""

    def __init__(self, settings: ConnectionSettings, *, generation: int) -> None:
        self._name = settings.name
        self._ended = False
        self._abandoned = False
        self._lock: WorkerLock | None = None
        if settings.lock_file is not None:
            try:
                self._lock = WorkerLock(settings.lock_file)
            except OSError as error:
                text = f"member {self._name}: the lock {settings.lock_file} cannot be had: {error.strerror}"
                raise MemberGone(text, sent=False) from None
        try:
            self._identity = _identity(settings)
            with _with_environment(settings.env):
                parked = _parked.get(self._identity)
                self._cryptoki = parked.pop() if parked else _load_copy(settings.module, settings.name)
                module = Module(self._cryptoki, settings)
            try:
                self._executor = Executor(module, generation, self._lock)
            except BaseException:
                module.finalize()
                raise
        except BaseException:
            self._release_lock()
            raise

    @property
    def generation(self) -> int:
        return self._executor.generation

    @property
    def alive(self) -> bool:
        return not self._ended

    @property
    def module_info(self) -> ModuleInfo:
        return self._executor.module_info

    def mechanisms(self, *, timeout: float) -> dict[int, MechanismInfo]:
        return dict(self._executor.mechanisms)

    def outstanding(self) -> list[float]:
        """None: a call in this process has no deadline that could be kept."""
        return []

    def _call(self, operation: str, generation: int, arguments: list[Any], timeout: float) -> Any:
        if self._ended:
            raise MemberGone(f"member {self._name}: the connection is closed", sent=False)
        try:
            return self._executor.operations[operation](generation, *arguments)
        except (Ckr, StaleGeneration, DeadlinePassed):
            raise
        except Exception as error:
            raise WorkerFault(f"member {self._name}: {operation}: {where(error)}") from None

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            if self._executor.finish(_CLOSE):
                with _environment:
                    _parked.setdefault(self._identity, []).append(self._cryptoki)
            self._release_lock()

    def take_no_more(self) -> None:
        self._ended = True

    def let_go(self) -> None:
        self.kill()

    def kill(self) -> None:
        """The module is left as it is: nothing can stop a call that is inside."""
        self._ended = True
        self._release_lock()

    def abandon_after_fork(self) -> None:
        """In a forked child: the module's state is a copy of the parent's and must not be touched."""
        self._abandoned = self._ended = True
        if self._lock is not None:
            self._lock.release_inherited()
