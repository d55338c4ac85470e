"""An opened etcd journal: its transactions, their outcome, and this process's registration as an owner."""

from __future__ import annotations

import atexit
import base64
import contextlib
import os
import random
import secrets
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from hagroup.config.model import JournalSection
from hagroup.core.clock import Clock
from hagroup.core.records import Intent, LoginState, OwedRow
from hagroup.errors import JournalOutcomeUnknown, JournalUnavailable
from hagroup.journal import owners
from hagroup.journal.clock import boot_time
from hagroup.journal.etcd_client import EtcdClient, Json, Unanswered, b64, pair, range_of
from hagroup.journal.etcd_keys import Document, KeptLogin, KeptOwner, KeptPassed, Keys, encode
from hagroup.journal.etcd_mirror import TTL, Mirror
from hagroup.journal.etcd_swap import Conflict, OwnerLost
from hagroup.journal.etcd_times import SeenTimes
from hagroup.journal.etcd_transaction import EtcdTransaction
from hagroup.journal.transaction import Writer

T = TypeVar("T")

_PATIENCE = 15.0
"""Seconds that a change is tried again while others change the same."""
_HISTORY = 86_400
_TRANSACTIONS = 3_600
"""Seconds that the outcome of an intent, and of a transaction, can be asked for."""

_decode = msgspec.msgpack.decode

_opened: weakref.WeakSet[EtcdOpened] = weakref.WeakSet()


class EtcdOpened(Writer):
    """What the parts of :class:`EtcdJournal` share."""

    def __init__(
        self, section: JournalSection, clock: Clock, *, read_only: bool = False, for_moving: bool = False
    ) -> None:
        self._client = EtcdClient(section)
        self._keys = Keys(self._client.url.name)
        self._clock = clock
        self._read_only, self._for_moving = read_only, for_moving
        self._closed = self._forked = False
        self.owner = ""
        _opened.add(self)

    def _start(self) -> None:
        self._local = threading.local()
        self._long: dict[int, tuple[int, float]] = {}
        self._unsettled: dict[str, Json] = {}
        self._registration: owners.Registration | None = None
        self._leaving = False
        self.former_owners = frozenset()
        self._heard_of: frozenset[str] = frozenset()
        """Of those, the ones of which it is known that nobody counts them as passed over."""
        self._lease = 0
        self._times = SeenTimes(self._clock)
        registered = boot_time()
        if not self._read_only:
            self._register()
        try:
            self._mirror = Mirror(
                self._client,
                self._keys,
                self._times,
                registered=registered,
                keep_alive=self._keep_alive,
                seen=self._acknowledge,
            )
        except BaseException:
            self._leave()
            raise
        if self._mirror.head.sealed is not None and not self._for_moving:
            self._mirror.stop()
            self._leave()
            raise self._mirror.head.sealed.refusal_to_open(self._client.url)
        if not self._read_only:
            self._tidy()

    # -- owners --------------------------------------------------------------------------------------------------

    def _register(self) -> None:
        """A new owner, alive while its lease is kept."""
        try:
            registration = owners.Registration(_locks(self._client.url.name))
        except OSError as error:
            raise JournalUnavailable(
                f"the journal {self._client.url} cannot be used: the folder for workers' locks cannot be written "
                f"({error})"
            ) from error
        lease = self._client.grant(TTL)
        here = self._clock.boot_id()
        told = KeptOwner(socket.gethostname(), os.getpid(), self._clock.wall(), here, tuple(self._former()))
        put = {"key": b64(f"{self._keys.owners}{registration.owner}"), "value": b64(encode(told)), "lease": str(lease)}
        self._client.call("/kv/put", put)
        earlier, self._registration = self._registration, registration
        if earlier is not None:
            self.former_owners |= {earlier.owner}
            earlier.release()
        self._lease, self.owner = lease, registration.owner
        with contextlib.suppress(JournalUnavailable):  # it is registered, and who asks now has to hear that
            for one in self._client.prefix(self._keys.passed):
                if self._has_ended(_last(one.key), _decode(one.value, type=KeptPassed).owner):
                    self._client.call("/kv/deleterange", {"key": b64(one.key)})

    def _former(self) -> set[str]:
        """What this process was, and will have been when it is registered anew."""
        return {*self.former_owners, *([] if self._registration is None else [self._registration.owner])}

    def _has_ended(self, owner: str, kept: KeptOwner) -> bool:
        """Proved by its lock, which only its own host has."""
        folder = _locks(self._client.url.name)
        return kept.boot == self._clock.boot_id() and owners.is_held(folder, owner) is False

    def _tidy(self) -> None:
        """Files of this host's dead, of whom no row tells any more: every program leaves some."""

        def referenced(names: Collection[str]) -> Collection[str]:
            rows = (row for document in self._mirror.documents() for row in document.owed.values())
            workers = {one.worker for row in rows for one in row.attempts if one.worker is not None}
            # Whoever is passed over, or may be yet: its file proves that it has ended.
            listed = [*self._client.prefix(self._keys.owners), *self._client.prefix(self._keys.passed)]
            return (workers | {_last(one.key) for one in listed}) & set(names)

        with contextlib.suppress(OSError, JournalUnavailable):
            owners.clean(_locks(self._client.url.name), referenced)

    def _keep_alive(self) -> bool:
        """By the mirror's thread, every few seconds. False: it was frozen or cut off for so long that it is a new owner
        now, and what it had begun is others' to finish."""
        if self._read_only:
            return True
        owner = range_of(f"{self._keys.owners}{self.owner}", keys_only=True)
        kept = self._client.keep_alive(self._lease, patience=0, always=True) and bool(
            self._client.call("/kv/range", owner).get("kvs")  # gone where the journal was made anew
        )
        if not kept and not self._leaving:
            self._register()
        with contextlib.suppress(JournalUnavailable):  # the next time
            self._settle_later()
        return kept

    def _acknowledge(self, revision: int) -> None:
        """Tell those who wait in ``destroy`` that nobody here uses the old view any more."""
        if self._read_only or not self.owner:
            return
        put = {"key": b64(f"{self._keys.acks}{self.owner}"), "value": b64(str(revision)), "lease": str(self._lease)}
        self._client.call("/kv/put", put, patience=0, always=True)
        for former in self.former_owners - self._heard_of:  # it was passed over, perhaps: now it knows all
            self._client.call("/kv/deleterange", {"key": b64(f"{self._keys.passed}{former}")}, patience=0, always=True)
            self._heard_of |= {former}

    def _everybody_saw(self, revision: int) -> dict[str, KeptOwner]:
        """Wait until each registered client acknowledged the view, or its lease ran out. Those passed over."""
        deadline = time.monotonic() + TTL + 2
        waiting: set[str] | None = None
        known: dict[str, KeptOwner] = {}
        while True:
            # Cut off from it, too: those who stop without it have stopped when their registrations ran out.
            with contextlib.suppress(JournalUnavailable):
                registered = [one for one in self._client.prefix(self._keys.owners) if one.created < revision]
                known |= {_last(one.key): _decode(one.value, type=KeptOwner) for one in registered}
                living = {_last(one.key) for one in registered}
                told = self._client.prefix(self._keys.acks)
                acknowledged = {_last(one.key) for one in told if int(one.value) >= revision}
                waiting = (living - {self.owner} if waiting is None else waiting) - acknowledged
                if not waiting & living:
                    break
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        return {owner: known[owner] for owner in sorted(waiting or ())}

    def _seen_here(self, document: Document) -> Document:
        """With times that mean something here. What this process asked for before its registration ran out is still
        its own where nobody found out that it had: it can tell what came of it."""
        document = self._times.localised(document)
        former = self.former_owners
        if not former or not document.owed:
            return document
        return replace(document, owed={name: _renamed(row, former, self.owner) for name, row in document.owed.items()})

    def owner_alive(self, owner: str) -> bool:
        """Whether that owner's registration is kept."""
        self._check_usable()
        return owner == self.owner or self._client.get(f"{self._keys.owners}{owner}") is not None

    def worker_lock(self, member: str) -> tuple[str, str]:
        if self._registration is None:
            raise JournalUnavailable(f"the journal {self._client.url} was opened for reading only, or was closed")
        try:
            return self._registration.worker_lock(member)
        except OSError as error:
            raise JournalUnavailable(f"no lock for a worker of {member} can be made ({error})") from error

    def worker_dead(self, worker: str) -> bool:
        """Only what ran on this host can be proved dead: elsewhere there is no such file."""
        return owners.is_held(_locks(self._client.url.name), worker) is False

    def being_changed(self, member: str) -> bool:
        return owners.being_changed(_locks(self._client.url.name), member)

    def cut_off(self, member: str) -> list[str]:
        return owners.cut_off(_locks(self._client.url.name), member)

    def forget_cut_off(self, workers: Collection[str]) -> None:
        owners.forget_cut_off(_locks(self._client.url.name), workers)

    # -- transactions --------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._closed:
            raise JournalUnavailable(f"the journal {self._client.url} was closed in this process: open it again")
        if self._forked:
            raise JournalUnavailable(
                f"the journal {self._client.url} was opened before this process was forked: call reopen_after_fork() "
                "first"
            )

    @contextmanager
    def _write(self) -> Iterator[EtcdTransaction]:
        """Committed when the block was left. Raises :class:`Conflict` there: run the block again."""
        self._check_usable()
        if self._read_only:
            raise JournalUnavailable(f"the journal {self._client.url} was opened for reading only: nothing was changed")
        transaction = EtcdTransaction(
            self._client,
            self._keys,
            owner=self.owner,
            now=self._clock.boot(),
            wall=self._clock.wall(),
            boot=self._clock.boot_id(),
            history=lambda: self._long_lease(_HISTORY),
            owner_lease=self._lease,
            localised=self._seen_here,
        )
        if transaction.sealed is not None and not self._for_moving:
            raise transaction.sealed.refusal(self._client.url)
        yield transaction
        self._commit(transaction)

    def _commit(self, transaction: EtcdTransaction) -> None:
        id_ = secrets.token_hex(12)
        request = transaction.request(id_, self._long_lease(_TRANSACTIONS))
        self._local.revision = 0
        if request is None:
            return
        self._local.revision = self._swap(id_, request)
        if transaction.shows:
            self._mirror.written(self._local.revision, transaction.changed)

    def _swap(self, id_: str, request: Json) -> int:
        """The revision at which it was committed. An error is not a no: the transaction's own key tells.

        :raises Conflict, OwnerLost: it was not, and never will be.
        """
        unanswered: list[str] = []
        try:
            answer = self._client.call("/kv/txn", request, unanswered=unanswered)
        except Unanswered as error:
            if not unanswered:
                raise
            return self._find_out(id_, request, error)
        if answer.get("succeeded"):
            return int(answer["header"]["revision"])
        tx, owner = (one.get("response_range", {}).get("kvs", []) for one in answer["responses"])
        if tx and pair(tx[0]).value == b"done":
            return pair(tx[0]).modified
        if unanswered:  # an earlier try may still be on its way
            done = self._abort(id_)
            if done is not None:
                return done
        if not owner:
            raise OwnerLost
        raise Conflict

    def _find_out(self, id_: str, request: Json, error: JournalUnavailable) -> int:
        try:
            done = self._abort(id_)
        except JournalUnavailable:
            self._unsettled[id_] = request
            raise JournalOutcomeUnknown(
                f"{error}; whether this change was recorded will be known when it answers, and it is then taken back "
                "or finished"
            ) from error
        if done is None:
            raise error
        return done

    def _abort(self, id_: str) -> int | None:
        """See to it that the transaction never takes effect: None. Or the revision at which it did."""
        key = f"{self._keys.tx}{id_}"
        lease = str(self._long_lease(_TRANSACTIONS))
        answer = self._client.call(
            "/kv/txn",
            {
                "compare": [{"key": b64(key), "target": "MOD", "result": "EQUAL", "mod_revision": "0"}],
                "success": [{"request_put": {"key": b64(key), "value": b64("aborted"), "lease": lease}}],
                "failure": [{"request_range": range_of(key)}],
            },
        )
        if answer.get("succeeded"):
            return None
        found = pair(answer["responses"][0]["response_range"]["kvs"][0])
        return found.modified if found.value == b"done" else None

    def _settle_later(self) -> None:
        """What nobody knew the outcome of: taken back; or its intent, which nobody works on, left to be adopted."""
        for id_, request in list(self._unsettled.items()):
            if self._abort(id_) is not None:
                self._disown(request)
            del self._unsettled[id_]

    def _disown(self, request: Json) -> None:
        """An intent, or a login, that it opened: nobody works on it."""
        for one in request["success"]:
            put = one.get("request_put")
            key = "" if put is None else base64.b64decode(put["key"]).decode()
            kind = next((kind for prefix, kind in self._owned().items() if key.startswith(prefix)), None)
            kept = None if kind is None else self._client.get(key)
            if kind is None or kept is None:
                continue
            left = kind(kept.value, base64.b64decode(put["value"]))
            if left is not None:
                same = {"key": put["key"], "target": "MOD", "result": "EQUAL", "mod_revision": str(kept.modified)}
                written = {"request_put": {"key": put["key"], "value": b64(left)}}
                self._client.call("/kv/txn", {"compare": [same], "success": [written]})

    def _owned(self) -> dict[str, Callable[[bytes, bytes], bytes | None]]:
        """By the beginning of their keys: what has an owner who finishes it; with another owner, who is none."""
        return {self._keys.intents: _ownerless_intent, self._keys.logins: _ownerless_login}

    def _carry_out(self, attempt: Callable[[], T]) -> T:
        deadline = time.monotonic() + _PATIENCE
        pause = 0.002
        while True:
            try:
                return attempt()
            except (Conflict, OwnerLost) as error:
                if time.monotonic() > deadline:
                    raise JournalUnavailable(
                        f"the journal {self._client.url}: the same was being changed by others for {_PATIENCE:g} s: "
                        "nothing was changed; try again"
                    ) from error
            time.sleep(pause * (0.5 + random.random()))
            pause = min(pause * 1.7, 0.2)

    def _long_lease(self, ttl: int) -> int:
        """A lease that is not kept alive, for keys that are to go by themselves; each has at least half of it left."""
        lease, granted = self._long.get(ttl, (0, 0.0))
        if not lease or boot_time() - granted > ttl / 2:
            lease = self._client.grant(ttl)
            self._long[ttl] = (lease, boot_time())
        return lease

    # -- life ----------------------------------------------------------------------------------------------------

    def view_number(self) -> int:
        return self._mirror.number

    def reopen_after_fork(self) -> None:
        """In a forked child, before anything else: a registration of its own, and connections of its own."""
        self._client.renew_after_fork()
        self._forked = False
        self._start()

    def after_fork_in_child(self) -> None:
        """The parent must not look alive because of us; its watch does not run here."""
        self._forked = True
        if getattr(self, "_registration", None) is not None:
            assert self._registration is not None
            self._registration.drop_inherited()

    def leave_at_exit(self) -> None:
        """Whoever destroys something would wait for this process until its registration has run out."""
        if not (self._closed or self._forked) and self._client.available and hasattr(self, "_mirror"):
            self._mirror.stop()
            self._leave()

    def _leave(self) -> None:
        self._leaving = True
        registration, self._registration = self._registration, None
        if registration is not None:
            try:
                self._client.revoke(self._lease)
            except JournalUnavailable:
                pass  # it runs out by itself
            registration.release()

    def close(self) -> None:
        """Idempotent. The owner is dead from here on: what it has open may be adopted."""
        if self._closed:
            return
        self._closed = True
        if not self._forked:
            self._mirror.stop()
            self._leave()
            self._client.close()
        _opened.discard(self)


def _renamed(row: OwedRow, former: frozenset[str], owner: str) -> OwedRow:
    attempts = tuple(
        replace(one, owner=owner) if one.doubt_since is None and one.owner in former else one for one in row.attempts
    )
    return replace(row, owner=owner if row.owner in former else row.owner, attempts=attempts)


def _ownerless_intent(kept: bytes, _: bytes) -> bytes:
    intent = msgspec.msgpack.decode(kept, type=Intent)
    return encode(replace(intent, owner=f"{intent.owner} (gave up)"))


def _ownerless_login(kept: bytes, written: bytes) -> bytes | None:
    """As of a process that died in it: unless its end was reported since."""
    login = msgspec.msgpack.decode(kept, type=KeptLogin)
    if kept != written or login.record.state is not LoginState.TRYING:
        return None
    return encode(replace(login, record=replace(login.record, owner=f"{login.record.owner} (gave up)")))


def _last(key: str) -> str:
    return key.rpartition("/")[2]


def _locks(name: str) -> Path:
    """Where this host's workers lock, so that it can be proved that they are dead."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"hagroup-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022 or folder.is_symlink():
        raise PermissionError(f"{folder} is another user's, or others may write it: remove it")
    return folder / name


def _at_exit() -> None:
    for journal in list(_opened):
        journal.leave_at_exit()


atexit.register(_at_exit)


def _after_fork_in_child() -> None:
    for journal in list(_opened):
        journal.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
