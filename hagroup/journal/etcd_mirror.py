"""The group's view in memory: loaded once, then kept up to date by a watch (DESIGN.md 4.5).

One thread does it, and keeps this process's registration alive. A watch hangs silently when its node dies, is cut off,
or compacts; so it is ended after a second of silence, the endpoint is asked for a linearizable answer, and the watch
goes on from the last revision seen; where that is not kept any more, everything is read anew.
"""

from __future__ import annotations

import base64
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

import msgspec

from hagroup.core.records import Changes, MemberRecord, Seal
from hagroup.errors import JournalUnavailable
from hagroup.journal.clock import boot_time
from hagroup.journal.etcd_client import TIMEOUT, Compacted, EtcdClient, Pair, after_all, b64, pair, range_of
from hagroup.journal.etcd_keys import Document, Head, Keys
from hagroup.journal.etcd_snapshot import member_records, only_listed
from hagroup.journal.etcd_times import SeenTimes

SILENCE = 1.0
"""Seconds without news after which the endpoint is asked whether it still belongs to a quorum."""
ELECTION = 4.0
"""Seconds without a quorum after which changes are refused at once; until then they wait: it may be an election."""
TTL = 10
"""Seconds that a client's registration outlives its last sign of life."""
_KEEP_ALIVE = 2.5
_PAGE = 500
_LISTED = 10_000
_decode = msgspec.msgpack.decode


class Mirror:
    """Reads are of the last revision that the watch brought."""

    def __init__(
        self,
        client: EtcdClient,
        keys: Keys,
        times: SeenTimes,
        *,
        registered: float,
        keep_alive: Callable[[], bool],
        seen: Callable[[int], None],
    ) -> None:
        """
        :param registered: when (boot time) the registration was asked for.
        :param keep_alive: called every few seconds: renews the registration; False: it had run out, and is a new one.
        :param seen: called with the revision up to which objects were changed or destroyed, once nobody here
            gets the old ones any more.
        """
        self._client, self._keys, self._times = client, keys, times
        self._keep_alive, self._told = keep_alive, seen
        self._news = threading.Condition()
        self._stop = False
        self._number = 0
        self._untold = 0
        self._ahead: dict[bytes, int] = {}
        """Objects that this process changed, at revisions that the watch has not brought yet."""
        self.revision = 0
        self._documents: dict[bytes, Document] = {}
        self._sorted: list[Document] | None = None
        self._raw_members: dict[str, Pair] = {}
        self._announced: dict[str, Pair] = {}
        self.head: Head
        self.seal: Seal | None = None
        self._log: deque[tuple[int, bytes]] = deque(maxlen=_LISTED)
        self._log_from = 0
        self._members_moved = 0
        self._answered = time.monotonic()
        self._kept_alive = self._renewed = registered
        self._load()
        self._thread = threading.Thread(target=self._run, name="journal watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop = True
        with self._news:
            self._news.notify_all()

    # -- reading -------------------------------------------------------------------------------------------------

    def documents(self) -> list[Document]:
        """All, in order of creation, as kept: with leftovers of members that were removed. Not to be changed."""
        with self._news:
            if self._sorted is None:
                self._sorted = sorted(self._documents.values(), key=lambda one: one.created)
            return self._sorted

    def document(self, uid: bytes) -> Document:
        """
        :raises JournalUnavailable: what this process itself changed since is not known here yet.
        """
        with self._news:
            if self._ahead.get(uid, 0) > self.revision:
                raise self._client.unavailable("its watch brings no news")
            found = self._documents.get(uid, Document(uid=uid))
            return only_listed(self._times.localised(found), self.head.members)

    def members(self) -> list[MemberRecord]:
        with self._news:
            return list(member_records(self._keys, self.head, self._raw_members.values(), self._announced.values()))

    def changes(self, since: int, epoch: str) -> Changes:
        """
        :raises JournalUnavailable: for longer than a registration lasts nothing was heard.
        """
        with self._news:
            # Woken from a freeze: a moment, until everything was read anew. Cut off: it is known that there is nothing.
            if not self._news.wait_for(lambda: not self.lapsed or not self._client.available, TIMEOUT) or self.lapsed:
                raise self._client.unavailable(f"nothing was heard of it for more than {TTL} s")
            upto = max(since, self.revision)
            if epoch != self.head.epoch or since < self._log_from:
                return Changes(change=upto, uids=frozenset(), members=True, everything=True)
            uids = frozenset(uid for change, uid in self._log if change > since)
            return Changes(change=upto, uids=uids, members=self._members_moved > since)

    @property
    def number(self) -> int:
        """The view number; one that nobody has seen while nothing is known."""
        return -1 if self.lapsed else self._number

    @property
    def lapsed(self) -> bool:
        """Whether others no longer count on this process: counted from when its registration was asked to be kept."""
        return boot_time() - self._kept_alive > TTL

    def wait_for(self, revision: int, *, patience: float = 2.0) -> bool:
        """Until the watch brought it."""
        with self._news:
            return self._news.wait_for(lambda: self.revision >= revision or self._stop, patience)

    def written(self, revision: int, uids: Collection[bytes]) -> None:
        """This process committed a change: it is in the mirror when this returns. Or, where the watch brings no news
        (an election), the old is at least not used any more: the view number moves, the objects are listed."""
        if self.wait_for(revision):
            return
        with self._news:
            self._ahead = {uid: at for uid, at in self._ahead.items() if at > self.revision}
            for uid in uids:
                self._ahead[uid] = revision
                self._list(revision, uid)
            self._members_moved = max(self._members_moved, revision)
            self._number += 1

    def _list(self, revision: int, uid: bytes) -> None:
        if len(self._log) == _LISTED:
            self._log_from = max(self._log_from, self._log[0][0])
        self._log.append((revision, uid))

    # -- keeping up ----------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Everything, as of one revision."""
        revision, start, found = 0, self._keys.view, list[Pair]()
        while True:
            asked = range_of(start, after_all(self._keys.view), revision=revision, limit=_PAGE)
            answer = self._client.call("/kv/range", asked, always=True)
            revision = revision or int(answer["header"]["revision"])
            found += (pair(one) for one in answer.get("kvs", []))
            if not self._renew():  # nobody waited for what was seen so far
                revision, start, found = 0, self._keys.view, []
                continue
            if not answer.get("more"):
                break
            start = found[-1].key + "\0"
        if not any(one.key == self._keys.group for one in found):
            raise JournalUnavailable(
                f"the journal {self._client.url} does not exist: run `ha-admin group create`, or correct [journal] url"
            )
        with self._news:
            self._documents, self._raw_members, self._announced, self._sorted = {}, {}, {}, None
            self.seal = None
            for one in found:
                self._take(one)
            self._log.clear()
            self.revision = self._log_from = self._members_moved = revision
            self._kept_alive = self._renewed
            self._number += 1
            self._news.notify_all()

    def _take(self, one: Pair) -> None:
        keys = self._keys
        if one.key.startswith(keys.objects):
            document = _decode(one.value, type=Document)
            self._documents[document.uid] = document
            self._sorted = None
        elif one.key == keys.group:
            self.head = _decode(one.value, type=Head)
        elif one.key == keys.seal:
            self.seal = _decode(one.value, type=Seal)
        elif one.key.startswith(keys.members):
            self._raw_members[one.key] = one
        elif one.key.startswith(keys.announced):
            self._announced[one.key] = one

    def _run(self) -> None:
        while not self._stop:
            try:
                # Linearizable: only a node that belongs to a quorum answers.
                self._client.call("/kv/range", range_of(self._keys.group, keys_only=True), patience=0, always=True)
                # At once: whatever follows is refused before it is asked as long as nobody is known to answer.
                self._answered, self._client.available = time.monotonic(), True
                self._stay_registered()
                if self._untold:
                    self._tell(self._untold)
                self._follow()
            except Compacted:
                self._reload()
            except JournalUnavailable:
                self._silent()

    def _stay_registered(self) -> None:
        if not self._renew() or self.lapsed:
            self._load()
            self._tell(self.revision)
        self._kept_alive = self._renewed

    def _renew(self) -> bool:
        """Every few seconds, also while all is being read, which may take longer than a registration lasts. False: it
        had run out, and is a new one: until everything was read anew nothing is known."""
        asked = boot_time()
        if asked - self._renewed <= _KEEP_ALIVE:
            return True
        kept = self._keep_alive()
        self._renewed = asked
        if not kept:
            self._kept_alive = -math.inf
        return kept

    def _tell(self, revision: int) -> None:
        """Again at the next opportunity where it cannot be told now: others wait for it."""
        self._untold = revision
        self._told(revision)
        self._untold = 0

    def _reload(self) -> None:
        try:
            self._load()
            self._tell(self.revision)
        except (JournalUnavailable, Compacted):
            self._silent()

    def _silent(self) -> None:
        if time.monotonic() - self._answered > ELECTION:
            self._client.available = False
        with self._news:
            self._news.wait_for(lambda: self._stop, 0.1)

    def _follow(self) -> None:
        end = time.monotonic() + _KEEP_ALIVE / 2
        watched = {"key": b64(self._keys.view), "range_end": b64(after_all(self._keys.view))}
        asked = {"create_request": {**watched, "start_revision": str(self.revision + 1)}}
        for answer in self._client.stream("/watch", asked, silence=SILENCE):
            if answer.get("canceled"):
                raise Compacted("the watch was ended")
            if answer.get("events"):
                self._apply(answer["events"])
            if self._stop or time.monotonic() > end:
                return

    def _apply(self, events: Iterable[dict[str, object]]) -> None:
        keys, superseded, noticed, last = self._keys, False, False, self.revision
        with self._news:
            for event in events:
                kv = event["kv"]
                assert isinstance(kv, dict)
                key, modified = base64.b64decode(kv["key"]).decode(), int(kv["mod_revision"])
                last = max(last, modified)
                if modified <= self.revision or key == keys.sync:
                    continue
                noticed = True
                uid = b""
                if key.startswith(keys.objects):
                    uid = bytes.fromhex(key.removeprefix(keys.objects))
                    self._list(modified, uid)
                elif key == keys.all:
                    self._log.clear()
                    self._log_from = self._members_moved = modified
                elif key != keys.notice:
                    self._members_moved = modified
                known = _revision(self._documents.get(uid))
                if event.get("type") == "DELETE":
                    self._drop(key)
                else:
                    self._take(pair(kv))
                superseded = superseded or known not in (None, _revision(self._documents.get(uid)))
            self.revision = last
            if noticed:
                self._number += 1
            self._news.notify_all()
        if superseded:
            self._tell(last)

    def _drop(self, key: str) -> None:
        if key.startswith(self._keys.objects):
            uid = bytes.fromhex(key.removeprefix(self._keys.objects))
            self._documents.pop(uid, None)
            self._sorted = None
            self._times.forget([uid])
        self._raw_members.pop(key, None)
        self._announced.pop(key, None)


def _revision(document: Document | None) -> int | None:
    """Also of one that is not live yet: it may be destroyed, and whoever does that waits for all."""
    record = None if document is None else document.record
    return None if record is None else record.revision
