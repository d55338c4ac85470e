"""Changing and destroying token objects (DESIGN.md 4.3): the foreground of an application's call."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import wait
from typing import TYPE_CHECKING

import msgspec
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from hagroup.config.logging import get_logger
from hagroup.core.attributes import CKA
from hagroup.core.calls import Ckr, Handle
from hagroup.core.ckr import CKR
from hagroup.core.records import Intent, ObjectRecord
from hagroup.engine.domain import reseal
from hagroup.engine.member import Life, Member
from hagroup.engine.objects import SessionObject, TokenObject
from hagroup.engine.replicate import Outcome, Result
from hagroup.errors import GroupUnavailable, OutcomeUnknown
from hagroup.journal.api import Asking, Busy, NoLongerLive, StaleMembership

if TYPE_CHECKING:
    from hagroup.engine.group import GroupEngine

log = get_logger(__name__)


class Changer:
    """Attribute changes and destruction of group objects."""

    def __init__(self, group: GroupEngine) -> None:
        self._group = group
        self._journal = group.journal
        self._roster = group.roster
        self._timeout = group.config.timeouts.generate

    # -- set -----------------------------------------------------------------------------------------------
    def set(self, item: TokenObject, new: dict[int, bytes], *, logged_in: bool) -> None:
        """Change attributes of a token object on every member that has it.

        Returns when every member that was asked has answered or was given up: one that did not does not serve the
        object until it has the change (G3).
        """
        waiting = Retrying(
            retry=retry_if_exception_type(Busy),
            wait=wait_fixed(0.01),
            stop=stop_after_delay(self._timeout),
            reraise=True,
        )
        try:
            for attempt in waiting:
                with attempt:
                    self._set_once(item.uid, new, logged_in=logged_in)
        except Busy as error:
            raise GroupUnavailable(
                "another change of this object does not come to an end; nothing was changed"
            ) from error
        except NoLongerLive as error:
            raise Ckr(CKR.OBJECT_HANDLE_INVALID, "C_SetAttributeValue") from error

    def _set_once(self, uid: bytes, new: dict[int, bytes], *, logged_in: bool) -> None:
        found = self._group.view.object(uid)
        if found is None:
            raise Ckr(CKR.OBJECT_HANDLE_INVALID, "C_SetAttributeValue")
        old = found.record
        after = self._changed(old, new, logged_in=logged_in)
        try:
            intent, targets = self._group.replication.begin(
                lambda asking, revision: self._journal.begin_set(
                    uid,
                    revision=old.revision,
                    new_attributes=new,
                    new_envelope=after.envelope,
                    asking=[one for one in asking if one.member in found.members],
                    membership_revision=revision,
                )
            )
        except Busy as busy:
            if not self._journal.owner_alive(busy.intent.owner):
                self._group.supervisor.recover_now()
            self._group.view.refresh()
            raise
        if self._group.mirror is not None:
            self._group.mirror.put([after])
        asked = [(member, life) for member, life in targets if member.name in found.members]
        results = self._ask_all(asked, old, after, intent)
        self._conclude(intent, after, results)

    def _changed(self, old: ObjectRecord, new: dict[int, bytes], *, logged_in: bool) -> ObjectRecord:
        after = msgspec.structs.replace(old, revision=old.revision + 1, attributes={**old.attributes, **new})
        if old.envelope is None:
            return after
        envelope = old.envelope

        def seal_again(life: Life, _: list[Handle]) -> bytes:
            assert life.keys is not None
            return reseal(
                life.connection,
                life.keys,
                envelope,
                old=old,
                uid=after.uid,
                revision=after.revision,
                attributes=after.attributes,
                timeout=self._timeout,
            )

        sealed = self._group.caller.run([], seal_again, logged_in=logged_in, need_keys=True)
        return msgspec.structs.replace(after, envelope=sealed)

    def _ask_all(
        self, asked: Sequence[tuple[Member, Life]], old: ObjectRecord, after: ObjectRecord, intent: Intent
    ) -> list[Result]:
        def ask(member: Member, life: Life) -> Result:
            try:
                return self._group.replicator.set(member, life, old, after, intent.change)
            except Exception as error:
                log.warning("replica.failed", member=member.name, error=str(error))
                return Result(member.name, Outcome.UNKNOWN, error)

        futures = [self._roster.run(ask, member, life) for member, life in asked]
        wait(futures)
        return [future.result() for future in futures]

    def _conclude(self, intent: Intent, after: ObjectRecord, results: list[Result]) -> None:
        """Accepted by any: only forward. Refused by all, none unknown: back. Else: whoever comes next finds out."""
        accepted = [result.member for result in results if result.outcome is Outcome.CONFIRMED]
        refused = [result for result in results if result.outcome is Outcome.REFUSED]
        if accepted:
            self._journal.commit_set(intent.id)
            for member in accepted:
                self._group.replicator.confirm_set(member, after)
            self._group.supervisor.replace(after.uid, [result.member for result in refused])
            return
        if results and len(refused) == len(results):
            self._journal.rollback_set(intent.id)
            error = refused[0].error
            raise error if error is not None else GroupUnavailable("every member refused the change")
        self._group.supervisor.unresolved(intent.id)
        raise OutcomeUnknown(
            "no member answered whether it took the attribute change; it is finished or undone in the background, "
            "and the object is not served meanwhile"
        )

    def set_session_object(self, item: SessionObject, new: dict[int, bytes], *, logged_in: bool) -> None:
        """Session objects: on each member that has it now; elsewhere it is made with the new attributes."""

        def change(life: Life, handles: list[Handle]) -> None:
            life.connection.set(handles[0], list(new.items()), timeout=self._timeout)

        for member in self._roster.serving():
            if any(name == member.name and life is member.life for name, life, _ in item.places()):
                self._group.caller.run([item], change, logged_in=logged_in, only=member)
        if not item.places():
            self._group.caller.run([item], change, logged_in=logged_in)
        before = item.record
        item.record = msgspec.structs.replace(
            self._changed(before, new, logged_in=logged_in), revision=before.revision + 1
        )

    # -- destroy -------------------------------------------------------------------------------------------
    def destroy(self, item: TokenObject) -> None:
        """Tombstone first; then wherever it may be; then return (G2)."""
        record = item.record
        while True:
            self._group.follow()
            self._group.replication.refuse_if_degraded()
            targets = {member.name: (member, life) for member, life in self._group.replication.targets()}
            if not targets:
                raise GroupUnavailable("no member is usable now: nothing was destroyed")
            asking = [Asking(member=name, worker=life.worker) for name, (_, life) in targets.items()]
            try:
                tombstone, rows = self._journal.destroy(
                    record.uid,
                    asking=asking,
                    membership_revision=self._group.view.group.membership_revision,
                )
            except StaleMembership:
                continue
            except NoLongerLive as error:
                raise Ckr(CKR.OBJECT_HANDLE_INVALID, "C_DestroyObject") from error
            break
        futures = [
            self._roster.submit(
                self._group.replicator.destroy,
                *targets[row.member],
                record.uid,
                row.locators,
                tombstone.fingerprint,
                record.attributes,
                tombstone.change,
            )
            for row in rows
            if row.member in targets
        ]
        wait(futures)
        if self._group.mirror is not None:
            self._group.mirror.drop(record.uid)
        log.info("object.destroyed", label=record.attributes.get(CKA.LABEL, b"").decode(errors="replace"))
