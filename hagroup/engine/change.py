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
from hagroup.journal.api import Busy, NoLongerLive

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
                [uid],
                lambda asking, revision: self._journal.begin_set(
                    uid,
                    revision=old.revision,
                    new_attributes=new,
                    new_envelope=after.envelope,
                    asking=asking,
                    membership_revision=revision,
                ),
                # Those that owe something for it already are left alone: what they are asked for may come to be late.
                usable=lambda member: member.name in found.members,
            )
        except Busy as busy:
            if not self._journal.owner_alive(busy.intent.owner):
                self._group.supervisor.recover_now()
            self._group.view.refresh()
            raise
        try:
            if self._group.mirror is not None:
                self._group.mirror.put([after])
            self._conclude(intent, old, after, self._ask_all(targets, old, after, intent))
        except BaseException:
            self._group.supervisor.unresolved(intent.id)
            raise
        finally:
            for member, _ in targets:
                self._group.replication.ended(member, [uid])

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
        self, targets: Sequence[tuple[Member, Life]], old: ObjectRecord, after: ObjectRecord, intent: Intent
    ) -> list[tuple[Member, Life, Result]]:
        asked = [(member, life) for member, life in targets if member.name in intent.asked]

        def ask(member: Member, life: Life) -> Result:
            try:
                return self._group.replicator.set(member, life, old, after, intent.change)
            except Exception as error:
                log.warning("replica.failed", member=member.name, error=str(error))
                return Result(member.name, Outcome.UNKNOWN, error)

        futures = [self._roster.run(ask, member, life) for member, life in asked]
        wait(futures)
        return [(member, life, future.result()) for (member, life), future in zip(asked, futures, strict=True)]

    def _conclude(
        self, intent: Intent, old: ObjectRecord, after: ObjectRecord, answers: list[tuple[Member, Life, Result]]
    ) -> None:
        """Accepted by any: only forward. Refused by all, none unknown: back. Else: whoever comes next finds out."""
        results = [result for _, _, result in answers]
        accepted = [(member, life) for member, life, result in answers if result.outcome is Outcome.CONFIRMED]
        refused = [result for result in results if result.outcome is Outcome.REFUSED]
        if accepted:
            try:
                self._journal.commit_set(intent.id)
            finally:  # also where it was destroyed meanwhile: they did what nobody wants any more, and undo it
                for member, life in accepted:
                    self._group.replicator.confirm_set(member, life, old, after)
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
        uid = record.uid
        try:
            (tombstone, rows), targets = self._group.replication.begin(
                [uid],
                lambda asking, revision: self._journal.destroy(uid, asking=asking, membership_revision=revision),
            )
        except NoLongerLive as error:
            raise Ckr(CKR.OBJECT_HANDLE_INVALID, "C_DestroyObject") from error
        owed = {row.member: row for row in rows}

        def ask(member: Member, life: Life) -> None:
            try:
                if member.name in owed:
                    self._group.replicator.destroy(
                        member,
                        life,
                        uid,
                        owed[member.name].locators,
                        tombstone.fingerprint,
                        record.attributes,
                        tombstone.change,
                    )
            finally:
                self._group.replication.ended(member, [uid])

        wait([self._roster.submit(ask, member, life) for member, life in targets])
        if self._group.mirror is not None:
            self._group.mirror.drop(record.uid)
        log.info("object.destroyed", label=record.attributes.get(CKA.LABEL, b"").decode(errors="replace"))
