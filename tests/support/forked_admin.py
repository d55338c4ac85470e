"""``ha-admin`` in processes forked from one that has it imported already: a fifth of the time. Each may be killed
before any of its changes to files of one folder, or to an etcd journal; or gets Ctrl-C at any of its interactions.

Run as a program it is that process: requests on standard input, one JSON document a line, answers on standard output.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import networks
from tests.support.interactions import Interactions

ROOT = Path(__file__).resolve().parents[2]
_CHANGES = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "sqlite3.connect"}


@dataclass
class Done:
    """Like subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str
    steps: int = 0
    """Changes to what was watched; 0 where it was killed."""
    interactions: list[tuple[str, bool]] = field(default_factory=list)
    """Name, and whether it changes anything; where these were watched."""
    stopped_at: str = ""


class ForkedAdmin:
    """One such process. It runs one command at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.support.forked_admin"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True
        )

    def run(
        self,
        *arguments: str,
        timeout: float = 120,
        environment: dict[str, str] | None = None,
        watch: Path | None = None,
        kill_before: int = 0,
        stop: tuple[int, str] | None = None,
    ) -> Done:
        """In this process's working directory and environment, without a terminal.

        :param environment: further variables.
        :param kill_before: kill it before its nth change to a file in ``watch`` (to an etcd journal, where that is not
            given), counted from 1; 0: count them.
        :param stop: Ctrl-C at this interaction, see :class:`tests.support.interactions.Interactions`, with files in
            ``watch``; number 0: count them.
        """
        variables = {**os.environ, **(environment or {})}
        asked = [list(arguments), os.getcwd(), variables, None if watch is None else str(watch), kill_before, stop]
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(["ha-admin", *arguments], timeout)
        return Done(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)


_idle: dict[int, list[ForkedAdmin]] = {}
"""By the network namespace in which they are."""


def close_idle(namespace: int) -> None:
    for one in _idle.pop(namespace, []):
        one.close()


atexit.register(lambda: [close_idle(namespace) for namespace in list(_idle)])


def run(*arguments: str, **more: Any) -> Done:
    """See :meth:`ForkedAdmin.run`, in this thread's network; several threads may have commands running at once."""
    idle = _idle.setdefault(networks.number_here(), [])
    try:
        admin = idle.pop()
    except IndexError:
        admin = ForkedAdmin()
    done = admin.run(*arguments, **more)
    idle.append(admin)
    return done


# -- the process ---------------------------------------------------------------------------------------------------


def _watch(folder: str, kill_before: int) -> list[int]:
    steps = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES:
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        name = arguments[0]
        if isinstance(name, str | os.PathLike) and folder in os.fspath(name):
            steps[0] += 1
            if steps[0] == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return steps


def _watch_etcd(kill_before: int) -> list[int]:
    """What is done in the background is not counted: it comes at any time."""
    from hagroup.journal.etcd_client import EtcdClient

    steps, ask = [0], EtcdClient._ask

    def counted(self: EtcdClient, index: int, path: str, body: dict[str, Any], **more: Any) -> Any:
        changes = path in ("/kv/put", "/kv/deleterange") or (path == "/kv/txn" and "compare" in body)
        if changes and threading.current_thread() is threading.main_thread():
            steps[0] += 1
            if steps[0] == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
        return ask(self, index, path, body, **more)

    EtcdClient._ask = counted  # type: ignore[method-assign]
    return steps


def _child(asked: list[Any], out: int, err: int, told: int) -> None:
    from hagroup.admin import cli

    arguments, folder, environment, watch, kill_before, stop = asked
    os.chdir(folder)
    os.environ.clear()
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0)  # noqa: SIM115
    os.environ.update(environment)
    sys.argv = ["ha-admin", *arguments]
    steps, seen = [0], None
    if stop is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        seen = Interactions(watch, *stop)
    else:
        steps = _watch(watch, kill_before) if watch else _watch_etcd(kill_before)
    status: Any = 1
    try:
        cli.main()
    except SystemExit as ended:
        status = ended.code
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    met = [] if seen is None else [(one.name, one.changes) for one in seen.seen]
    with open(told, "w", closefd=False) as file:
        json.dump([steps[0], met, "" if seen is None else seen.stopped_at], file)
    os._exit(status if isinstance(status, int) else 1)


def _answer(asked: list[Any]) -> list[Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as told:
        pid = os.fork()
        if pid == 0:
            try:
                _child(asked, out.fileno(), err.fileno(), told.fileno())
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(70)
        _, status = os.waitpid(pid, 0)
        texts = []
        for file in (out, err, told):
            file.seek(0)
            texts.append(file.read().decode())
        return [os.waitstatus_to_exitcode(status), texts[0], texts[1], *json.loads(texts[2] or "[0]")]


def _prepare() -> None:
    """All that a command imports before it does anything is imported here, once."""
    from hagroup.admin import cli, options
    from hagroup.config import logging
    from hagroup.errors import ConfigurationError
    from hagroup.journal import etcd_client

    assert etcd_client
    logging.prepare()
    with contextlib.suppress(ConfigurationError):
        cli.app(["--config", "/dev/null/none.toml", "status"], standalone_mode=False)
    options._chosen.clear()
    gc.collect()
    gc.freeze()  # else a collection in a child copies all of it


if __name__ == "__main__":
    _prepare()
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
