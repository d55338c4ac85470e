"""The group in one process: puts the parts of the engine together, and keeps what lives with the process."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

import msgspec

from hagroup.config.logging import get_logger
from hagroup.config.model import GroupConfig
from hagroup.core.calls import Ckr, Handle
from hagroup.core.ckr import CKR
from hagroup.core.clock import Clock
from hagroup.core.records import GroupRecord, Membership, ObjectRecord
from hagroup.engine.access import Access
from hagroup.engine.api import MemberSlot, VirtualToken
from hagroup.engine.calls import Caller
from hagroup.engine.change import Changer
from hagroup.engine.create import Maker
from hagroup.engine.domain import reseal
from hagroup.engine.envelope import generation
from hagroup.engine.login import CKU_SO
from hagroup.engine.member import Life
from hagroup.engine.objects import Repairs, SessionObject, TokenObject
from hagroup.engine.replicate import Replicator
from hagroup.engine.replication import Replication
from hagroup.engine.roster import Roster, thread_pool
from hagroup.engine.session import VirtualSession
from hagroup.engine.supervisor import Supervisor
from hagroup.engine.view import ObjectView, View
from hagroup.errors import GroupUnavailable, JournalUnavailable
from hagroup.journal.api import Journal
from hagroup.journal.mirror import Mirror
from hagroup.members.api import MechanismInfo

log = get_logger(__name__)

CKF_RNG, CKF_LOGIN_REQUIRED, CKF_USER_PIN_INITIALIZED = 0x1, 0x4, 0x8
CKF_RESTORE_KEY_NOT_NEEDED, CKF_TOKEN_INITIALIZED = 0x20, 0x400
_ALWAYS = CKF_RNG | CKF_LOGIN_REQUIRED | CKF_USER_PIN_INITIALIZED | CKF_TOKEN_INITIALIZED | CKF_RESTORE_KEY_NOT_NEEDED
_NEVER = 0x10000 | 0x20000 | 0x40000 | 0x80000 | 0x100000 | 0x200000 | 0x400000 | 0x800000 | 0x100
"""PIN counters are each member's own affair; there is no protected authentication path through a group."""

_groups: weakref.WeakSet[GroupEngine] = weakref.WeakSet()


class GroupEngine:
    """Implements :class:`hagroup.engine.api.Group`."""

    def __init__(
        self,
        config: GroupConfig,
        journal: Journal,
        clock: Clock,
        *,
        workers: Callable[[], Executor] = thread_pool,
        supervised: bool = True,
        one_first: bool = False,
    ) -> None:
        """:param workers: makes the pool that does the work; a test's may do it at once, in the calling thread.
        :param supervised: have a thread look after the members; else somebody calls ``supervisor.tick``.
        :param one_first: connect one member before the others, for a quick first call.
        """
        self._supervised = supervised
        self.config = config
        self.journal = journal
        self.clock = clock
        self.view = View(journal, serve_offline=config.journal.offline_serving == "allow")
        self.roster = Roster(config, journal, self.view, clock, workers, one_first=one_first)
        self.caller = Caller(self.roster)
        self.mirror = None if config.journal.mirror is None else Mirror(config.journal.mirror)
        self.replicator = Replicator(self.roster, self.view, journal, self.mirror)
        self.supervisor = Supervisor(self.roster, self.view, journal, self.replicator, clock, self.close)
        self.access = Access(self.roster, self._logged_out)
        self.replication = Replication(self)
        self.maker = Maker(self)
        self.changer = Changer(self)
        self._repairs = self._report_to(self.supervisor)
        self._timeout = config.timeouts.call
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._sessions: dict[int, VirtualSession] = {}
        self._session_objects: dict[bytes, SessionObject] = {}
        self._pid = os.getpid()
        self._closed = False
        self._unusable: str | None = None
        """Why this process, forked from the one that opened the group, cannot use it."""
        self.roster.wake = self.supervisor.wake
        self.roster.keys.on_new_keys = self._seal_session_objects_anew
        _groups.add(self)
        if supervised:
            self.supervisor.start()

    # -- what it is ----------------------------------------------------------------------------------------
    @property
    def label(self) -> str:
        return self.view.group.label

    @property
    def serial(self) -> str:
        return self.view.group.serial

    def _lives(self) -> list[Life]:
        """Connected active members; waits, within a call's bound, for the first one."""
        self.follow()
        lives = self._serving_lives()
        if not lives:
            self.supervisor.wake()
            self.roster.wait_for_change(
                self._timeout * 2, lambda: bool(self._serving_lives()) or not self.roster.may_come()
            )
            lives = self._serving_lives()
        return lives

    def _serving_lives(self) -> list[Life]:
        members = [member for member in self.roster.serving() if member.life is not None]
        active = [member for member in members if not member.standby] or members
        return [member.life for member in active if member.life is not None]

    def token(self) -> VirtualToken:
        lives = self._lives()
        flags = -1
        for life in lives:
            flags &= life.token.flags
        flags = _ALWAYS | (flags & ~_NEVER if lives else 0)
        return VirtualToken(
            label=self.label,
            serial=self.serial,
            manufacturer="hagroup",
            model="HA group",
            flags=flags,
            hardware_version=(1, 0),
            firmware_version=(1, 0),
        )

    def mechanisms(self) -> Mapping[int, MechanismInfo]:
        self.roster.all_had_a_turn()
        lives = self._lives()
        if not lives:
            raise GroupUnavailable("no member is connected: the group's mechanisms are not known now")
        common = set.intersection(*(set(life.mechanisms) for life in lives))
        result = {}
        for number in common:
            infos = [life.mechanisms[number] for life in lives]
            flags = -1
            for info in infos:
                flags &= info.flags
            result[number] = MechanismInfo(
                max(info.min_key for info in infos), min(info.max_key for info in infos), flags
            )
        return result

    def member_slots(self) -> Sequence[MemberSlot]:
        if self.config.group.ha_only:
            return []
        self.follow()
        self.roster.wait_for_change(self._timeout * 2, lambda: not self.roster.may_come())
        return [self._member_slot(config.name) for config in self.config.members]

    def _member_slot(self, name: str) -> MemberSlot:
        member = self.roster.members.get(name)
        life = None if member is None else member.life
        if life is None:
            return MemberSlot(name=name, token=None, mechanisms={})
        token = VirtualToken(
            label=life.token.label,
            serial=life.token.serial,
            manufacturer=life.token.manufacturer,
            model=life.token.model,
            flags=life.token.flags,
            hardware_version=life.token.hardware_version,
            firmware_version=life.token.firmware_version,
        )
        return MemberSlot(name=name, token=token, mechanisms=life.mechanisms)

    def follow(self) -> None:
        """Before every operation: drop what others changed (DESIGN.md 4.5)."""
        if self._unusable is not None:
            raise JournalUnavailable(self._unusable)
        self.view.refresh()
        if self.roster.followed != self.view.moved:
            self.roster.follow_journal()

    # -- sessions and objects ------------------------------------------------------------------------------
    def open_session(self, *, rw: bool) -> VirtualSession:
        if not rw and self.access.who == CKU_SO:
            raise Ckr(CKR.SESSION_READ_WRITE_SO_EXISTS, "C_OpenSession")
        session = VirtualSession(self, next(self._numbers), rw=rw)
        with self._lock:
            self._sessions[session.id] = session
        return session

    def sessions(self) -> list[VirtualSession]:
        return list(self._sessions.values())

    def login_state(self) -> int | None:
        return self.access.who

    def _report_to(self, supervisor: Supervisor) -> Repairs:
        return Repairs(missing=supervisor.report_missing, prove=supervisor.report_doubtful, again=self._look_again)

    def _look_again(self, uid: bytes) -> ObjectView | None:
        self.follow()
        return self.view.object(uid)

    def object(self, uid: bytes) -> TokenObject | SessionObject | None:
        item = self._session_objects.get(uid)
        if item is not None:
            return item
        found = self.view.object(uid)
        return None if found is None else TokenObject(found, self._repairs, self._timeout)

    def session_objects(self) -> list[SessionObject]:
        return list(self._session_objects.values())

    def keep_session_object(self, item: SessionObject) -> None:
        with self._lock:
            self._session_objects[item.uid] = item

    def end_session_object(self, item: SessionObject) -> None:
        with self._lock:
            self._session_objects.pop(item.uid, None)
        self.roster.submit(item.end)

    def sealed_under(self, group: GroupRecord, record: ObjectRecord) -> ObjectRecord:
        """The record with its envelope under the domain's keys as the group record names them."""
        envelope = record.envelope
        if envelope is None or generation(envelope) == (group.domain_key_id, group.partition_key_id):
            return record

        def seal_again(life: Life, _: list[Handle]) -> bytes:
            assert life.keys is not None
            return reseal(
                life.connection,
                life.keys,
                envelope,
                old=record,
                uid=record.uid,
                revision=record.revision,
                attributes=record.attributes,
                timeout=self.config.timeouts.generate,
            )

        sealed = self.caller.run([], seal_again, logged_in=self.access.user, need_keys=True)
        return msgspec.structs.replace(record, envelope=sealed)

    def _seal_session_objects_anew(self) -> None:
        """The domain's keys were changed: while members have both pairs, what is kept in memory goes over too."""
        for item in self.session_objects():
            before = item.record
            try:
                after = self.sealed_under(self.view.group, before)
            except GroupUnavailable:
                return  # no member has the new keys yet: this is called again when one has
            if after is not before and after.envelope is not None:
                item.sealed_anew(before, after.envelope)

    def session_closed(self, session: VirtualSession) -> None:
        with self._lock:
            self._sessions.pop(session.id, None)
        for item in self.session_objects():
            if item.owner == session.id:
                self.end_session_object(item)

    def _logged_out(self) -> None:
        for item in self.session_objects():
            if item.private:
                self.end_session_object(item)

    # -- life ----------------------------------------------------------------------------------------------
    def degraded(self) -> bool:
        admitted = [m for m in self.view.members.values() if m.membership is Membership.ADMITTED]
        return len(self.roster.serving()) < len(admitted)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.supervisor.stop()
        self.roster.close()
        self.journal.close()
        _groups.discard(self)

    def renew_after_fork(self) -> None:
        """In the child: the parent's workers, sockets, journal connection and locks are not ours (DESIGN.md 3)."""
        if self._closed:
            return
        for member in self.roster.members.values():
            if member.life is not None:
                with contextlib.suppress(Exception):
                    member.life.connection.abandon_after_fork()
        self._lock = threading.Lock()
        self.roster.renew_after_fork()
        self.replicator.in_flight.renew_after_fork()
        self.access.renew_after_fork()
        for item in self._session_objects.values():
            item.renew_after_fork()
        self.supervisor = Supervisor(self.roster, self.view, self.journal, self.replicator, self.clock, self.close)
        self._repairs = self._report_to(self.supervisor)
        self.roster.wake = self.supervisor.wake
        self.journal.reopen_after_fork()
        self.view.renew_after_fork()
        if self._supervised:
            self.supervisor.start()

    def unusable_after_fork(self, why: BaseException) -> None:
        """Whoever uses it here is told so; the parent's threads and connections that it may still have are not ours."""
        cause = str(why) or type(why).__name__
        self._unusable = (
            f"this process was forked, and the group could not be taken up in it ({cause}): when that is mended, "
            "call the library's reinitialize()"
        )
        log.warning("group.unusable-after-fork", error=self._unusable)


def _child() -> None:
    for group in list(_groups):
        try:
            group.renew_after_fork()
        except BaseException as error:  # whatever it is (Ctrl-C), the other groups of this process are not held up
            group.unusable_after_fork(error)


os.register_at_fork(after_in_child=_child)
