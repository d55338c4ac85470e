"""Places on a network: each in a network namespace of its own where the system allows it, and a switch in another one.

Nothing has a name in the system, and nothing is left in it: a namespace lives as long as this process has it open, or a
process is in it; its links and addresses go with it, also after a kill. Where there are no namespaces for us (not root,
no ``ip``), all places are this machine's loopback, and none can be cut off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LOOPBACK = "127.0.0.1"
SAID = "network"
"""The property of a test's report that says which it was."""
_NEWNET = 0x4000_0000
_PLACES = range(1, 31)
_libc = ctypes.CDLL(None, use_errno=True)


class Place:
    """Where programs run."""

    def __init__(self, address: str = LOOPBACK) -> None:
        """
        :param address: under which the others reach what listens here.
        """
        self.address = address

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What this thread starts meanwhile is there, and so is the thread."""
        yield

    @contextmanager
    def cut_off(self) -> Iterator[bool]:
        """Whether it is: what is sent from here or to here is lost without a word, until the block is left."""
        yield False


class Loopback:
    """A network of this machine alone."""

    separate = False

    def place(self) -> Place:
        return Place()

    def close(self) -> None:
        pass

    def __str__(self) -> str:
        return f"all hosts on loopback ({why_not()})"


class Switch:
    """A network of places that reach each other, and nothing else."""

    separate = True

    def __init__(self) -> None:
        self._numbers = iter(_PLACES)
        self._namespaces = [_namespace()]
        self.ip("link add switch type bridge", "link set switch up")

    def ip(self, *commands: str) -> None:
        with _inside(self._namespaces[0]):
            _ip(*commands)

    def place(self) -> Place:
        number = next(self._numbers)
        self._namespaces.append(_namespace())
        return _Separate(self, number, self._namespaces[-1])

    def close(self) -> None:
        while self._namespaces:
            os.close(self._namespaces.pop())

    def __str__(self) -> str:
        return "each host in a network namespace of its own"


class _Separate(Place):
    def __init__(self, switch: Switch, number: int, namespace: int) -> None:
        super().__init__(_address(number))
        self._switch, self._port, self._namespace = switch, f"port{number}", namespace
        there = f"/proc/{os.getpid()}/fd/{namespace}"
        switch.ip(
            f"link add {self._port} type veth peer name eth0 address {_hardware(number)} netns {there}",
            f"link set {self._port} master switch up",
        )
        with self.inside():
            # Everybody is known beforehand: who is cut off is not told after three seconds that he reaches nobody.
            known = (
                f"neigh replace {_address(n)} lladdr {_hardware(n)} dev eth0 nud permanent"
                for n in _PLACES
                if n != number
            )
            _ip("link set lo up", f"address add {self.address}/24 dev eth0", "link set eth0 up", *known)

    @contextmanager
    def inside(self) -> Iterator[None]:
        with _inside(self._namespace):
            yield

    @contextmanager
    def cut_off(self) -> Iterator[bool]:
        self._switch.ip(f"link set {self._port} nomaster")
        try:
            yield True
        finally:
            self._switch.ip(f"link set {self._port} master switch")


Network = Loopback | Switch


def make() -> Network:
    return Switch() if why_not() is None else Loopback()


@functools.cache
def why_not() -> str | None:
    """Why this system has no namespaces for us; None: it has."""
    if os.environ.get("HAGROUP_TEST_LOOPBACK"):
        return "HAGROUP_TEST_LOOPBACK is set"
    if shutil.which("ip") is None:
        return "there is no ip: install iproute2"
    try:
        made = Switch()
    except OSError as error:
        return f"no network namespace can be made: {error.strerror}"
    except subprocess.CalledProcessError as error:
        return f"no network can be made in a namespace: {error.stderr.strip()}"
    try:
        made.place()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no link between network namespaces can be made: {error}"
    finally:
        made.close()
    return None


def _address(number: int) -> str:
    return f"10.83.0.{number}"


def _hardware(number: int) -> str:
    return f"02:00:0a:53:00:{number:02x}"


def _ip(*commands: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands) + "\n", text=True, check=True, capture_output=True)


def number_here() -> int:
    """Of the namespace of this thread."""
    return os.stat("/proc/thread-self/ns/net").st_ino


def _here() -> int:
    """The namespace of this thread, open."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _namespace() -> int:
    """A new one, open. Made by a thread of its own: who makes one is in it."""
    made: list[int | OSError] = []

    def make_one() -> None:
        try:
            _check(_libc.unshare(_NEWNET))
            made.append(_here())
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=make_one)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


@contextmanager
def _inside(namespace: int) -> Iterator[None]:
    before = _here()
    with contextlib.ExitStack() as back:
        back.callback(os.close, before)
        _check(_libc.setns(namespace, _NEWNET))
        back.callback(lambda: _check(_libc.setns(before, _NEWNET)))
        yield


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
