"""Changing and destroying token objects (DESIGN.md 4.3): the foreground of an application's call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.attributes import CKA
from hagroup.core.calls import Ckr, Handle
from hagroup.core.ckr import CKR
from hagroup.core.records import GroupRecord, Intent, ObjectRecord, OwedKind
from hagroup.engine.domain import reseal
from hagroup.engine.envelope import generation
from hagroup.engine.member import Life, Member
from hagroup.engine.objects import SessionObject, TokenObject
from hagroup.engine.replicate import Outcome, Result
from hagroup.errors import GroupUnavailable, HAError, JournalUnavailable, OutcomeUnknown
from hagroup.journal.api import Busy, NoLongerLive
from hagroup.members.bounded import within

if TYPE_CHECKING:
    from hagroup.engine.group import GroupEngine

log = get_logger(__name__)


class _Overtaken(Exception):
    """Another change of the object came first, so this one starts from what that one left."""


def _expect_present_keys(group: GroupRecord, after: ObjectRecord) -> None:
    """What was sealed before the domain's keys were changed is sealed anew."""
    if after.envelope is not None and generation(after.envelope) != (group.domain_key_id, group.partition_key_id):
        raise _Overtaken


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
        from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed  # not in every start

        waiting = Retrying(
            retry=retry_if_exception_type((Busy, _Overtaken)),
            wait=wait_fixed(0.01),
            stop=stop_after_delay(self._timeout),
            reraise=True,
        )
        try:
            for attempt in waiting:
                with attempt:
                    self._set_once(item.uid, new, logged_in=logged_in)
        except (Busy, _Overtaken) as error:
            raise GroupUnavailable(
                "another change of this object does not come to an end; nothing was changed"
            ) from error
        except NoLongerLive as error:
            raise Ckr(CKR.OBJECT_HANDLE_INVALID, "C_SetAttributeValue") from error

    def _set_once(self, uid: bytes, new: dict[int, bytes], *, logged_in: bool) -> None:
        begun = self._roster.clock.boot()
        found = self._group.view.object(uid)
        if found is None:
            raise Ckr(CKR.OBJECT_HANDLE_INVALID, "C_SetAttributeValue")
        old = found.record
        if self._just_changing(uid, found.members):
            self._group.follow()
            raise _Overtaken
        after = self._changed(old, new, logged_in=logged_in)
        try:
            intent, targets = self._group.replication.begin(
                [uid],
                lambda asking, revision, mark: self._journal.begin_set(
                    uid,
                    revision=old.revision,
                    new_attributes=new,
                    new_envelope=after.envelope,
                    asking=asking,
                    membership_revision=revision,
                    mark=mark,
                ),
                prepare=lambda group: _expect_present_keys(group, after),
                # Those that owe something for it already are left alone: what they are asked for may come to be late.
                usable=lambda member: member.name in found.members,
            )
        except Busy as busy:
            if not self._journal.owner_alive(busy.intent.owner):
                self._group.supervisor.recover_now()
            self._group.view.refresh()
            raise
        except NoLongerLive as error:
            self._group.view.refresh(always=True)
            if self._group.view.object(uid) is None:
                raise
            raise _Overtaken from error
        after = intent.outcome(old)
        self._mirror(after, intent, targets)
        try:
            self._conclude(intent, after, self._ask_all(targets, old, after, intent), begun)
        except BaseException:
            self._group.supervisor.unresolved(intent.id)
            raise

    def _just_changing(self, uid: bytes, present: Collection[str]) -> bool:
        """No member is known to have the object in its present state, for somebody is just asking them for it."""
        targets = {member.name for member, _ in self._group.replication.targets()}
        if not targets or not targets.isdisjoint(present):
            return False
        copies, owed = self._journal.placement(uid)
        asked = any(row.owner is not None and self._journal.owner_alive(row.owner) for row in owed.values())
        return asked or not targets.isdisjoint(copies.keys() - owed.keys())

    def _mirror(self, after: ObjectRecord, intent: Intent, targets: Sequence[tuple[Member, Life]]) -> None:
        """Under the intent, so that two changes do not overtake each other there; where it fails, nobody was asked."""
        if self._group.mirror is None:
            return
        try:
            self._group.mirror.put([after])
        except BaseException:
            self._journal.give_up([(name, after.uid) for name in intent.asked], doubt=False, kind=OwedKind.SET)
            self._journal.rollback_set(intent.id)
            for member, _ in targets:
                self._group.replication.ended(member, [after.uid])
            raise

    def _changed(self, old: ObjectRecord, new: dict[int, bytes], *, logged_in: bool) -> ObjectRecord:
        after = msgspec.structs.replace(old, revision=old.revision + 1, attributes={**old.attributes, **new})
        if old.envelope is None:
            return after
        envelope = old.envelope

        def seal_again(life: Life, _: list[Handle]) -> bytes:
            assert life.keys is not None
            with within(self._timeout):
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
    ) -> list[Result]:
        """What each member said; those that are lost meanwhile are not waited for."""

        def ask(member: Member, life: Life) -> Result:
            try:
                if member.name not in intent.asked:
                    return Result(member.name, Outcome.UNKNOWN)
                with within(self._timeout):
                    result = self._group.replicator.set(member, life, old, after, intent.change)
                if result.outcome is Outcome.CONFIRMED:
                    self._accepted(member, life, old, after, intent)
                return result
            except Exception as error:
                log.warning("replica.failed", member=member.name, error=str(error))
                return Result(member.name, Outcome.UNKNOWN, error)
            finally:
                self._group.replication.ended(member, [old.uid])

        futures = {self._roster.run(ask, member, life): (member, life) for member, life in targets}
        self._group.replication.wait_for(futures)
        return [
            future.result() if future.done() else Result(member.name, Outcome.UNKNOWN)
            for future, (member, _) in futures.items()
            if member.name in intent.asked
        ]

    def _accepted(self, member: Member, life: Life, old: ObjectRecord, after: ObjectRecord, intent: Intent) -> None:
        """By one member: from here on only forward. It does not wait for the others to serve the new value."""
        try:
            self._journal.commit_set(intent.id)
        finally:  # also where it was destroyed meanwhile: the member did what nobody wants any more, and it is undone
            self._group.replicator.confirm_set(member, life, old, after)

    def _conclude(self, intent: Intent, after: ObjectRecord, results: list[Result], begun: float) -> None:
        """Accepted by any: only forward. Refused by all, none unknown: back. Else: whoever comes next finds out."""
        refused = [result for result in results if result.outcome is Outcome.REFUSED]
        confirmed = [result.member for result in results if result.outcome is Outcome.CONFIRMED]
        if confirmed:
            self._group.supervisor.replace(after.uid, [result.member for result in refused])
            if len(confirmed) < len(self._group.view.members):
                self._group.supervisor.finish(after.uid, begun)
            return
        for result in results:
            if isinstance(result.error, NoLongerLive):
                raise result.error
        if results and len(refused) == len(results):
            self._journal.rollback_set(intent.id)
            error = next((one.error for one in refused if isinstance(one.error, (Ckr, HAError))), None)
            if error is None:  # connections ended before anything was sent: the members' affair, not the application's
                text = f"no member could be asked for the change, nothing was changed: {refused[0].error}"
                raise GroupUnavailable(text) from refused[0].error
            raise error
        self._group.supervisor.unresolved(intent.id)
        raise OutcomeUnknown(
            "no member answered whether it took the attribute change; it is finished or undone in the background, "
            "and the object is not served meanwhile"
        )

    def set_session_object(self, item: SessionObject, new: dict[int, bytes], *, logged_in: bool) -> None:
        """Session objects: on each member that has it now; elsewhere it is made with the new attributes."""

        def change(life: Life, handles: list[Handle]) -> None:
            life.connection.set(handles[0], list(new.items()), timeout=self._timeout)

        after = self._changed(item.record, new, logged_in=logged_in)
        changed: list[str] = []
        for member in self._roster.serving():
            if any(name == member.name and life is member.life for name, life, _ in item.places()):
                self._group.caller.run([item], change, logged_in=logged_in, only=member)
                changed.append(member.name)
        if not changed:
            changed += [self._change_one(item, change, logged_in=logged_in)]
        item.changed(after, changed)

    def _change_one(self, item: SessionObject, change: Callable[[Life, list[Handle]], None], *, logged_in: bool) -> str:
        """Change it on any one member; returns which."""

        def there(life: Life, handles: list[Handle]) -> Life:
            change(life, handles)
            return life

        used = self._group.caller.run([item], there, logged_in=logged_in)
        return next((name for name, life, _ in item.places() if life is used), "")

    # -- destroy -------------------------------------------------------------------------------------------
    def destroy(self, item: TokenObject) -> None:
        """Tombstone first; then wherever it may be; then return (G2)."""
        begun = self._roster.clock.boot()
        record = item.record
        uid = record.uid
        if self._group.mirror is not None:
            self._group.mirror.put([record])  # changes nothing there; refused before anything is destroyed
        try:
            (tombstone, rows), targets = self._group.replication.begin(
                [uid],
                lambda asking, revision, _: self._journal.destroy(uid, asking=asking, membership_revision=revision),
            )
        except NoLongerLive as error:
            raise Ckr(CKR.OBJECT_HANDLE_INVALID, "C_DestroyObject") from error
        owed = {row.member: row for row in rows}
        not_mirrored: JournalUnavailable | None = None
        if self._group.mirror is not None:
            try:
                self._group.mirror.drop(uid)
            except JournalUnavailable as error:
                not_mirrored = error

        confirmed: list[str] = []

        def ask(member: Member, life: Life) -> None:
            try:
                if member.name in owed:
                    with within(self._timeout):
                        result = self._group.replicator.destroy(
                            member,
                            life,
                            uid,
                            owed[member.name].locators,
                            tombstone.fingerprint,
                            record.attributes,
                            tombstone.change,
                            may_be_hidden=owed[member.name].asked_before,
                        )
                    if result.outcome is Outcome.CONFIRMED:
                        confirmed.append(member.name)
            finally:
                self._group.replication.ended(member, [uid])

        futures = {self._roster.submit(ask, member, life): (member, life) for member, life in targets}
        self._group.replication.wait_for(futures)
        if not owed.keys() <= set(confirmed):
            self._group.supervisor.finish(uid, begun)
        if not_mirrored is not None:
            raise not_mirrored
        log.info("object.destroyed", label=record.attributes.get(CKA.LABEL, b"").decode(errors="replace"))
