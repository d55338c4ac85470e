"""Several clients of one group in one test process: each has its own journal registration and workers, so they are as
apart as processes are, and a test can stop one of them at any point and let another act."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from hagroup import bootstrap
from hagroup.core.attributes import CKA, CKK, CKM, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Template
from hagroup.engine.group import GroupEngine
from hagroup.engine.session import VirtualSession
from tests.support import plain
from tests.support.groups import PIN, GroupFixture, wait_until

TIMEOUT = 60.0
AES_ECB = 0x1081


class Client:
    """One client: an engine, logged in, with a read-write session."""

    def __init__(self, group: GroupFixture) -> None:
        self.group = group
        self.engine: GroupEngine = bootstrap.open_group(group.toml, one_first=False)
        self.session: VirtualSession = self.engine.open_session(rw=True)
        self.session.login(1, PIN.encode())

    def wait_serving(self, *names: str) -> None:
        wanted = set(names or self.group.members)

        def serving() -> bool:
            for member in self.engine.roster.members.values():
                member.next_attempt = 0.0
            self.engine.supervisor.wake()
            return {member.name for member in self.engine.roster.serving()} >= wanted

        wait_until(serving, f"{wanted} in service", TIMEOUT)

    @property
    def journal(self) -> Any:
        return self.engine.journal

    def connection(self, member: str) -> Any:
        life = self.engine.roster.members[member].life
        assert life is not None
        return life.connection

    def aes(self, label: str, **more: bool) -> bytes:
        template: Template = [
            (CKA.CLASS, pack_ulong(CKO.SECRET_KEY)),
            (CKA.KEY_TYPE, pack_ulong(CKK.AES)),
            (CKA.TOKEN, pack_bool(more.get("token", True))),
            (CKA.LABEL, label.encode()),
            (CKA.VALUE_LEN, pack_ulong(16)),
            (CKA.SIGN, pack_bool(more.get("sign", True))),
            (CKA.ENCRYPT, pack_bool(True)),
        ]
        return self.session.generate((CKM.AES_KEY_GEN, None), template, assign_id=True)

    def certificate(self, label: str, value: bytes) -> bytes:
        template: Template = [
            (CKA.CLASS, pack_ulong(CKO.CERTIFICATE)),
            (CKA.CERTIFICATE_TYPE, pack_ulong(0)),
            (CKA.TOKEN, pack_bool(True)),
            (CKA.PRIVATE, pack_bool(False)),
            (CKA.LABEL, label.encode()),
            (CKA.ID, b"certificate"),
            (CKA.SUBJECT, b"0\x00"),
            (CKA.VALUE, value),
        ]
        return self.session.create(template, assign_id=False)

    def rename(self, uid: bytes, label: str) -> None:
        self.session.set(uid, [(CKA.LABEL, label.encode())])

    def use(self, uid: bytes) -> bytes:
        return self.session.encrypt((AES_ECB, None), uid, bytes(16))

    def sync(self) -> None:
        """Until nothing is owed any more and no intent is open, while all clients go on living."""

        def settled() -> bool:
            self.engine.supervisor.wake()
            return not self.journal.owed() and not self.journal.intents()

        try:
            wait_until(settled, "the end of all that is owed", TIMEOUT)
        except AssertionError as error:
            rows = "\n".join(map(repr, [*self.journal.owed(), *self.journal.intents()]))
            raise AssertionError(f"{error}:\n{rows}") from None

    def close(self) -> None:
        self.engine.close()


@contextlib.contextmanager
def clients(group: GroupFixture, count: int = 2) -> Iterator[list[Client]]:
    opened: list[Client] = []
    try:
        opened.extend(Client(group) for _ in range(count))
        for client in opened:
            client.wait_serving()
        yield opened
    finally:
        for client in opened:
            client.close()


@contextlib.contextmanager
def two_clients(group: GroupFixture) -> Iterator[tuple[Client, Client]]:
    """Two clients; afterwards nothing is owed, and the tokens are emptied by one of them."""
    with clients(group) as (a, b):
        yield a, b
        a.sync()
        for record in list(a.journal.objects()):
            a.session.destroy(record.uid)
        a.sync()
        everywhere(group)


class Gate:
    """Stops the first call of a method (``every``: all of them), before or after it was carried out, until the test
    lets it go on."""

    def __init__(
        self,
        owner: object,
        method: str,
        *,
        after: bool = False,
        every: bool = False,
        when: Callable[..., bool] = lambda *a, **k: True,
    ) -> None:
        self.reached = threading.Event()
        self._go = threading.Event()
        self._used = False
        self._lock = threading.Lock()
        original = getattr(owner, method)

        def gated(*arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                mine = (every or not self._used) and when(*arguments, **keywords)
                self._used = self._used or mine
            if mine and not after:
                self._wait()
            try:
                return original(*arguments, **keywords)
            finally:
                if mine and after:
                    self._wait()

        setattr(owner, method, gated)

    def _wait(self) -> None:
        self.reached.set()
        assert self._go.wait(TIMEOUT)

    def wait(self) -> None:
        assert self.reached.wait(TIMEOUT), "the client did not come to the gate"

    def open(self) -> None:
        self._go.set()


class Running:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "the call did not come to its end"

    def end(self) -> Any:
        self.wait()
        if self.error is not None:
            raise self.error
        return self.result


def on_tokens(group: GroupFixture) -> dict[str, list[str]]:
    """Labels on each token, with ``record`` for each record object of ours; manifests and domain keys aside."""
    found = {}
    for name, member in group.members.items():
        labels = [item["label"] for item in plain.objects(member, own=True)]
        labels = ["record" if label.startswith("hagroup:object:") else label for label in labels]
        found[name] = sorted(label for label in labels if not label.startswith("hagroup"))
    return found


def everywhere(group: GroupFixture, *labels: str) -> None:
    """Each token has exactly these, and as many records."""
    wanted = sorted([*labels, *["record"] * len(labels)])
    assert on_tokens(group) == dict.fromkeys(group.members, wanted)
