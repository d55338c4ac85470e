"""A member's own process: it alone loads the vendor's module, and answers one caller on each channel.

The main thread never enters the module. It watches the control socket and the process that started it: on the first
come new channels, the end of either ends this one, after the calls in progress. One thread serves each channel.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import socket
import threading
import time
from typing import Any

import msgspec

from hagroup.core.calls import Ckr, DeadlinePassed, StaleGeneration
from hagroup.members.api import MechanismInfo, ModuleInfo, TokenInfo
from hagroup.members.executor import Executor
from hagroup.members.frames import BULK, CKR_RETURNED, DEADLINE, FAULT, OK, STALE, Channel
from hagroup.members.lock import WorkerLock
from hagroup.members.module import ConnectionSettings, Module, ModuleProblem, Slots, load
from hagroup.members.window import Answer, WorkerWindow

CONTROL_MESSAGE = 1 << 20
NEW_CHANNEL, FINISH = b"c", b"f"

_LAST_CALLS = 60.0  # seconds that calls in progress get when nobody is left to receive their answers
_FINALIZE = 5.0
_PR_SET_DUMPABLE, _PR_SET_NAME = 4, 15


class Start(msgspec.Struct):
    """First message on the control socket, to the worker."""

    settings: ConnectionSettings
    generation: int
    parent: int
    look: bool = False
    """Only the tokens in the module's slots are asked for."""


class Hello(msgspec.Struct, tag=True):
    """The answer: the module is ready."""

    module: ModuleInfo
    token: TokenInfo
    mechanisms: dict[int, MechanismInfo]


class Found(msgspec.Struct, tag=True):
    """The answer where only the tokens were asked for."""

    tokens: list[TokenInfo]


class StartFailed(msgspec.Struct, tag=True):
    """The answer: it is not. ``rv`` if the module said so, ``problem`` if a person must put something right."""

    text: str
    problem: bool
    rv: int | None = None


def where(error: BaseException) -> str:
    """Kind and place of a fault of our own; never its text, which may hold what was passed in."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None:
        return type(error).__name__
    code = step.tb_frame.f_code
    return f"{type(error).__name__} in {code.co_name} ({os.path.basename(code.co_filename)}:{step.tb_lineno})"


class Worker:
    """State of the process."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._executor: Executor | None = None
        self._busy: set[Channel] = set()  # between the receipt of a request and its reply
        self._finishing = False
        self._loaded = threading.Event()

    def run(self) -> None:
        start = msgspec.msgpack.decode(self._control.recv(CONTROL_MESSAGE), type=Start)
        parent = os.pidfd_open(start.parent)
        if os.getppid() != start.parent:  # gone before it could be watched
            return
        _name_process(start.settings.name)
        threading.Thread(target=self._start, args=(start,), daemon=True).start()
        poll = select.poll()
        poll.register(parent, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if parent in ready or not self._control_message():
                break
        self._finish()

    # -- start

    def _start(self, start: Start) -> None:
        try:
            answer: Hello | Found | StartFailed = self._load(start)
        except ModuleProblem as error:
            answer = StartFailed(str(error), problem=True)
        except Ckr as error:
            answer = StartFailed(error.function, problem=False, rv=error.rv)
        except BaseException as error:
            answer = StartFailed(where(error), problem=False)
        self._loaded.set()
        try:
            self._control.send(msgspec.msgpack.encode(answer))
        except OSError:
            pass  # the main thread sees that nobody listens any more
        gc.collect()
        gc.freeze()  # what is here now stays: no later collection has to look at it

    def _load(self, start: Start) -> Hello | Found | StartFailed:
        settings = start.settings
        if start.look:
            slots = Slots(load(settings.module, settings.name), settings)
            try:
                return Found([token for _, token in slots.tokens()[0]])
            finally:
                slots.finalize()
        lock = None
        if settings.lock_file is not None:
            try:
                lock = WorkerLock(settings.lock_file)
            except OSError as error:
                text = f"the lock {settings.lock_file} cannot be had: {error.strerror}"
                return StartFailed(text, problem=False)
        module = Module(load(settings.module, settings.name), settings)
        executor = Executor(module, start.generation, lock)
        self._executor = executor
        return Hello(module.info, module.token_info(), executor.mechanisms)

    # -- channels

    def _control_message(self) -> bool:
        """Whether to go on."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, 16, 4)
        except OSError:
            return False
        if descriptors:
            threading.Thread(target=self._serve, args=descriptors, daemon=True).start()
        return message == NEW_CHANNEL

    def _serve(self, descriptor: int, shared: int = -1) -> None:
        """One caller's requests, one after the other, until it hangs up."""
        channel = Channel(socket.socket(fileno=descriptor), WorkerWindow(shared) if shared >= 0 else None)
        executor = self._executor
        try:
            while executor is not None:
                number, operation, generation, arguments = channel.receive()
                self._busy.add(channel)
                if self._finishing:
                    return
                reply = self._answer(executor, number, operation, generation, arguments)
                payload = reply[2]
                try:
                    if type(payload) is bytes and len(payload) >= BULK:
                        reply[2] = b""
                        channel.send(reply, payload)
                    elif type(payload) is Answer:
                        reply[2] = b""
                        channel.send_placed(reply, payload.length)
                    else:
                        channel.send(reply)
                except OSError:
                    if reply[1] == OK:
                        executor.undelivered(operation, payload)
                    raise
                # Held no longer than needed: the next request may be hours away.
                del arguments, reply, payload
                self._busy.discard(channel)
        except (EOFError, OSError):
            pass
        finally:
            self._busy.discard(channel)
            channel.close()

    @staticmethod
    def _answer(executor: Executor, number: int, operation: str, generation: int, arguments: list[Any]) -> list[Any]:
        try:
            return [number, OK, executor.operations[operation](generation, *arguments)]
        except Ckr as error:
            return [number, CKR_RETURNED, [error.rv, error.function, executor.generation]]
        except StaleGeneration:
            return [number, STALE, executor.generation]
        except DeadlinePassed as error:
            return [number, DEADLINE, str(error)]
        except BaseException as error:
            return [number, FAULT, where(error)]

    # -- the end

    def _finish(self) -> None:
        """The calls in progress are finished, then C_Finalize; in bounded time, whatever the module does."""
        self._finishing = True
        deadline = time.monotonic() + _LAST_CALLS
        while (self._busy or not self._loaded.is_set()) and time.monotonic() < deadline:
            time.sleep(0.005)
        executor = self._executor
        if executor is not None and not self._busy:
            last = threading.Thread(target=executor.finish, args=(0.1,), daemon=True)
            last.start()
            last.join(_FINALIZE)


def _protect() -> None:
    """PINs and keys pass through this process: no core dump, no debugger, nothing in /proc for other processes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _name_process(member: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"ha {member}".encode()[:15], 0, 0, 0)


def run(control: int) -> None:
    # The process that started this one decides how long it lives. A service manager sends SIGTERM to all processes of
    # a service at once: the application's last calls still need their member.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _protect()
    try:
        Worker(socket.socket(fileno=control)).run()
    finally:
        # Not exit(): threads may be inside the vendor's library, and its destructors would run beneath them.
        os._exit(0)
