"""A member in a process of its own (isolation ``process``): whatever its module does, a call ends at its deadline.

Channels are taken from a pool, last in, first out: a lone caller always meets the same, warm thread of the worker,
threads that come and go leave nothing behind, and a call made while another one is interrupted (a signal handler, a
finalizer) takes a channel of its own instead of the other's reply.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import msgspec

from hagroup.core.calls import Ckr, DeadlinePassed, MemberGone, StaleGeneration, WorkerFault
from hagroup.members import bounded, launch, window
from hagroup.members.api import MechanismInfo, ModuleInfo, TokenInfo
from hagroup.members.connection import MessageConnection
from hagroup.members.frames import BULK, CKR_RETURNED, DEADLINE, OK, STALE, Channel
from hagroup.members.module import ConnectionSettings, ModuleProblem
from hagroup.members.window import Window
from hagroup.members.worker import CONTROL_MESSAGE, FINISH, NEW_CHANNEL, Found, Hello, Start, StartFailed

_IDLE_CHANNELS = 64  # more are closed when they come back from a burst of calls
_CLOSE = 5.0  # seconds that an orderly end may take beyond the deadlines of the calls in progress
_STEPS = frozenset({"stream_update", "stream_final", "stream_cancel"})
_LEAST = 0.001  # a timeout of zero would mean "do not wait at all" to a socket


def python() -> str:
    """An interpreter to start workers with; ``sys.executable`` is another program where Python is embedded."""
    if os.path.basename(sys.executable or "").startswith(("python", "pypy")):
        return sys.executable
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in (f"python{version}", "python3"):
        candidate = os.path.join(sys.exec_prefix, "bin", name)
        if os.path.exists(candidate):
            return candidate
    found = shutil.which(f"python{version}")
    if found is None:
        raise MemberGone("no Python interpreter to start a worker with", sent=False)
    return found


def _spawn(settings: ConnectionSettings, control: socket.socket) -> subprocess.Popen[bytes]:
    """Starts the worker by exec; it inherits the control socket and nothing else."""
    environment = os.environ | settings.env
    environment["HAGROUP_WORKER_CONTROL"] = str(control.fileno())
    environment["HAGROUP_WORKER_PATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    try:
        return subprocess.Popen(
            [python(), "-I", "-S", os.path.abspath(launch.__file__), settings.name],
            env=environment,
            pass_fds=[control.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("HAGROUP_WORKER_STDERR") else subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise MemberGone(f"the worker of {settings.name} cannot be started: {error}", sent=False) from None


def _asked(control: socket.socket, start: Start, timeout: float) -> Hello | Found:
    """What the worker answers to its first message."""
    name = start.settings.name
    control.settimeout(max(timeout, _LEAST))
    try:
        control.send(msgspec.msgpack.encode(start), socket.MSG_NOSIGNAL)
        answer = control.recv(CONTROL_MESSAGE)
    except TimeoutError:
        raise MemberGone(f"member {name} did not start within {timeout:g} s", sent=False) from None
    except OSError:
        answer = b""
    if not answer:
        raise MemberGone(f"the worker of {name} ended while it started", sent=False)
    hello = msgspec.msgpack.decode(answer, type=Hello | Found | StartFailed)
    if isinstance(hello, StartFailed):
        if hello.rv is not None:
            raise Ckr(hello.rv, hello.text)
        if hello.problem:
            raise ModuleProblem(hello.text)
        raise MemberGone(f"the worker of {name} could not start: {hello.text}", sent=False)
    return hello


def tokens_in(settings: ConnectionSettings, *, timeout: float) -> list[TokenInfo]:
    """The tokens in a module's slots, those too that are not initialised; the process that looks ends with the call.

    :param settings: of the module; which token they name counts for nothing.
    :raises ModuleProblem: a person must put something right. :raises Ckr: the module refused.
    :raises MemberGone: it did not answer within ``timeout`` seconds.
    """
    ours, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with control:
            process = _spawn(settings, control)
        try:
            found = _asked(ours, Start(settings, 0, os.getpid(), look=True), timeout)
        finally:
            process.kill()
            process.wait()
    assert isinstance(found, Found)
    return found.tokens


class ProcessConnection(MessageConnection):
    """One life of one worker process."""

    def __init__(self, settings: ConnectionSettings, *, generation: int, timeout: float) -> None:
        self._name = settings.name
        self._generation = generation
        self._idle: list[Channel] = []
        self._channels: set[Channel] = set()  # all that are open
        self._lock = threading.Lock()  # over the control socket and `_channels`; never held during a call
        self._ended = False
        self._gone = False  # a channel broke off: no worker does that while it lives
        self._abandoned = False
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with control:
            try:
                self._process = _spawn(settings, control)
            except BaseException:
                self._control.close()
                raise
        self.pid = self._process.pid
        # The process may be reaped by others (os.wait), and its number given away: signals go by descriptor.
        self._pidfd = os.pidfd_open(self.pid)
        try:
            hello = _asked(self._control, Start(settings, self._generation, os.getpid()), timeout)
            assert isinstance(hello, Hello)
        except BaseException:
            self.kill()
            raise
        self._module_info = hello.module
        self._mechanisms = hello.mechanisms

    # -- what is known without asking

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def module_info(self) -> ModuleInfo:
        return self._module_info

    def mechanisms(self, *, timeout: float) -> dict[int, MechanismInfo]:
        return dict(self._mechanisms)

    @property
    def alive(self) -> bool:
        if self._ended:
            return False
        if self._gone or self._exited(0):
            self._process.poll()
            return False
        return True

    def outstanding(self) -> list[float]:
        """The deadlines (monotonic time) of the calls in progress."""
        with self._lock:
            channels = list(self._channels)
        return [deadline for channel in channels if (deadline := channel.deadline)]

    # -- one exchange

    def _call(self, operation: str, generation: int, arguments: list[Any], timeout: float) -> Any:
        if self._ended:
            raise MemberGone(f"member {self._name}: the connection is closed", sent=False)
        timeout = bounded.left(timeout)
        if timeout <= 0:
            raise DeadlinePassed(f"member {self._name}: no time is left for {operation}")
        channel = self._channel(timeout)
        message = [channel.number, operation, generation, arguments]
        bulk: bytes | None = None
        sent = False
        try:
            channel.limit(max(timeout, _LEAST))
            if self._ended:  # whoever ends it looks for deadlines after that
                raise MemberGone(f"member {self._name}: the connection is closed", sent=False)
            last = arguments[-1] if arguments else None
            if type(last) is bytes and len(last) >= BULK:
                arguments[-1], bulk = b"", last
            channel.send(message, bulk)
            sent = True
            number, status, payload = channel.receive()
            if number != channel.number:
                raise WorkerFault(f"member {self._name}: the reply to another request")
        except BaseException as error:
            # Whatever it was: the next one on this channel would read the reply to this request.
            self._discard(channel)
            if isinstance(error, TimeoutError):
                raise DeadlinePassed(f"member {self._name}: {operation} took more than {timeout:g} s") from None
            if isinstance(error, (OSError, EOFError)):
                # The worker acts on complete requests only, and a failed send has not sent all. Where it left some of
                # a request unread when it ended, the system resets the connection.
                self._gone = True
                sent = sent and not isinstance(error, ConnectionResetError)
                raise MemberGone(f"member {self._name}: connection lost in {operation}", sent=sent) from None
            if sent and isinstance(error, Exception) and not isinstance(error, WorkerFault):
                raise WorkerFault(f"member {self._name}: unreadable reply ({type(error).__name__})") from None
            raise
        channel.number += 1
        channel.deadline = 0.0
        if operation not in _STEPS:
            if channel.holds:
                channel.wipe()
        elif operation != "stream_update" or status != OK:
            self._wipe_after_stream(channel)
        self._put_back(channel)
        if status == OK:
            if operation == "logout":
                self._moved(payload)
            return payload
        raise self._failure(operation, status, payload)

    def _wipe_after_stream(self, last: Channel) -> None:
        """Nothing of it stays in memory that is shared with the worker, whichever channels its parts took."""
        if last.holds:
            last.wipe()
        for channel in [channel for channel in self._idle if channel.holds]:
            try:
                self._idle.remove(channel)
            except ValueError:
                continue  # somebody took it meanwhile, and wipes it
            channel.wipe()
            self._put_back(channel)

    def _put_back(self, channel: Channel) -> None:
        if len(self._idle) < _IDLE_CHANNELS and not self._ended:
            self._idle.append(channel)
        else:
            self._discard(channel)

    def _failure(self, operation: str, status: int, payload: Any) -> Exception:
        if status == CKR_RETURNED:
            rv, function, generation = payload
            self._moved(generation)
            return Ckr(rv, function)
        if status == STALE:
            self._moved(payload)
            return StaleGeneration(f"member {self._name}: {operation} for a generation that is over")
        if status == DEADLINE:
            return DeadlinePassed(f"member {self._name}: {operation}: {payload}")
        return WorkerFault(f"member {self._name}: {operation}: {payload}")

    def _moved(self, generation: int) -> None:
        with self._lock:  # replies may overtake each other
            self._generation = max(self._generation, generation)

    def _channel(self, timeout: float) -> Channel:
        try:
            return self._idle.pop()
        except IndexError:
            pass
        if not self._lock.acquire(timeout=max(timeout, _LEAST)):
            raise DeadlinePassed(f"member {self._name}: no new channel within {timeout:g} s")
        try:
            return self._new_channel(timeout)
        finally:
            self._lock.release()

    def _new_channel(self, timeout: float) -> Channel:
        ours, theirs = socket.socketpair()
        memory: Window | None = None
        descriptors = [theirs.fileno()]
        try:
            memory, descriptor = window.create()
            descriptors.append(descriptor)
        except (OSError, AttributeError):
            pass  # the system gives none, or Python was built without it: all goes through the socket
        channel = Channel(ours, memory)
        try:
            self._control.settimeout(max(timeout, _LEAST))
            socket.send_fds(self._control, [NEW_CHANNEL], descriptors, socket.MSG_NOSIGNAL)
        except TimeoutError:
            channel.close()
            raise DeadlinePassed(f"member {self._name}: no new channel within {timeout:g} s") from None
        except OSError:
            channel.close()
            self._gone = True
            raise MemberGone(f"member {self._name}: its worker is gone", sent=False) from None
        finally:
            theirs.close()
            for descriptor in descriptors[1:]:
                os.close(descriptor)
        self._channels.add(channel)
        return channel

    def _discard(self, channel: Channel) -> None:
        channel.close()
        if not self._abandoned:
            with self._lock:
                self._channels.discard(channel)

    # -- the end

    def _exited(self, wait: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(wait * 1000))

    def close(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._finish()

    def take_no_more(self) -> None:
        self._ended = True

    def let_go(self) -> None:
        if not self._ended:
            self._ended = True
            threading.Thread(target=self._finish, name=f"hagroup let go {self._name}", daemon=True).start()

    def _finish(self) -> None:
        deadlines = self.outstanding()
        until = max([time.monotonic(), *deadlines]) + _CLOSE
        try:
            self._control.settimeout(_CLOSE)
            self._control.send(FINISH, socket.MSG_NOSIGNAL)
        except OSError:
            pass
        self._exited(max(0.0, until - time.monotonic()))
        self._put_to_end()

    def kill(self) -> None:
        if self._abandoned:
            return
        self._ended = True
        self._put_to_end()

    def _put_to_end(self) -> None:
        """SIGKILL (nothing for a worker that left by itself), and nothing of it stays behind."""
        with self._lock:
            if self._pidfd < 0:
                return
            pidfd, self._pidfd = self._pidfd, -1
            channels = list(self._channels)
            idle, self._idle = self._idle, []
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.close(pidfd)
        self._control.close()
        for channel in channels:
            channel.shutdown()  # those in a call close theirs themselves
        for channel in idle:
            self._discard(channel)
        # SIGKILL takes effect when the kernel can: a worker in an uninterruptible call must not hold up the caller.
        threading.Thread(target=self._process.wait, name=f"hagroup reap {self._name}", daemon=True).start()

    def abandon_after_fork(self) -> None:
        """In a forked child: the copies of the sockets are closed, the worker stays the parent's.

        Takes no lock: another thread of the parent may have held it at the fork.
        """
        self._abandoned = self._ended = True
        self._lock = threading.Lock()
        self._process.returncode = 0  # not this process's child: nobody here waits for it
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        self._control.close()
        for channel in list(self._channels):
            channel.close()
        self._idle = []
        self._channels = set()
