"""What becomes of an owed row: pure decisions, the same for every backend (DESIGN.md 4.1).

An HSM cannot be fenced: a call that everybody gave up may still execute. So a row keeps each time a member was asked
as an *attempt*, and these rules hold:

1. Nobody asks a member before an attempt of his is durable in the row; a row with an attempt is never deleted.
2. A confirmation needs an own attempt that nobody gave up. It ends that attempt; the row ends with it only where no
   other is outstanding. Else the row is *settled*: done as far as is known, in doubt, free.
3. A confirmation that is refused turns its attempt into a ``destroy`` one, because its owner now undoes on the member
   what he did. The row stays until he reports that (``undone``), gives up, or is found dead.
4. However a ``destroy`` attempt on an object that should be there ends, the object may be gone from the member, with
   what others installed meanwhile. So the copy is forgotten, and the row is owed as ``install`` anew.
5. Whenever an attempt ends that did something to the object on the member, all other attempts in the row are *spoiled*:
   nobody knows in which order the two were executed, so their replies show nothing, and are refused (rule 3).

Why 3 and 4: O1 sends an install to M and is slow. O2 takes over, installs, confirms. O1's reply comes, its
confirmation is refused (the row is O2's, or nobody's), O1 destroys what it made: on M that is found by locator and
fingerprint, so it may be what O2 made. Without rule 4 the journal would go on listing a copy that is not there.
Why 5: one thread sets a new label on M and is slow; another makes the object anew there, in its old revision, and
confirms; then the first one's reply comes. Without rule 5 M would count as having the new label.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import msgspec
from msgspec.structs import replace

from hagroup.core.records import (
    Attempt,
    Copy,
    Locator,
    LoginRecord,
    LoginState,
    ObjectRecord,
    OwedKind,
    OwedRow,
)
from hagroup.journal.api import Confirmation


class Situation(msgspec.Struct, frozen=True):
    """What the journal has of the object that a row is about."""

    record: ObjectRecord | None
    """None: destroyed, or never known. It must not be there."""
    pending: int | None = None
    """Revision that an open ``set`` intent would bring."""

    @property
    def wanted(self) -> int:
        """Revision that a member has to reach."""
        assert self.record is not None
        return self.record.revision if self.pending is None else self.pending


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a rule decided; the backend writes it down."""

    row: OwedRow | None
    """None: there is no row any more."""
    accepted: bool = True
    copy: Copy | None = None
    """To be recorded."""
    forget_copy: bool = False


class Asker(msgspec.Struct, frozen=True):
    """Who acts, and when: what goes into an attempt."""

    owner: str
    worker: str | None
    number: int
    now: float


def merged(*locators: Iterable[Locator]) -> tuple[Locator, ...]:
    """Union in order of first appearance."""
    return tuple(dict.fromkeys(one for some in locators for one in some))


def new_row(
    member: str, uid: bytes, kind: OwedKind, change: int, *, revision: int = 0, locators: Iterable[Locator] = ()
) -> OwedRow:
    """Free, never asked."""
    return OwedRow(
        member=member,
        uid=uid,
        kind=kind,
        revision=revision,
        owner=None,
        locators=merged(locators),
        reason=None,
        change=change,
    )


# -- asking ----------------------------------------------------------------------------------------------------


def asked(row: OwedRow, asker: Asker) -> OwedRow:
    """Claimed by the asker, who is about to ask the member."""
    attempt = Attempt(asker.number, asker.owner, asker.worker, row.kind, row.revision, asker.now)
    before = [
        one
        for one in row.attempts
        if row.kind is not OwedKind.DESTROY or one.worker is None or one.worker != asker.worker
    ]
    return replace(
        row,
        owner=asker.owner,
        attempts=(*row.attempts, attempt),
        asked_before=row.asked_before or bool(before),
        settled=False,
    )


def claimed(row: OwedRow, asker: Asker, alive: Callable[[str], bool]) -> OwedRow | None:
    """As :func:`asked`, where the row is free, own, or a dead owner's; None: it is somebody else's."""
    if row.owner is not None and row.owner != asker.owner and alive(row.owner):
        return None
    return asked(with_dead_in_doubt(row, asker.now, alive), asker)


def with_dead_in_doubt(row: OwedRow, now: float, alive: Callable[[str], bool]) -> OwedRow:
    """Nobody waits any more for the replies to attempts of dead owners: their late window begins."""
    attempts = tuple(
        replace(one, doubt_since=now) if one.doubt_since is None and not alive(one.owner) else one
        for one in row.attempts
    )
    return replace(row, attempts=attempts)


# -- answers ---------------------------------------------------------------------------------------------------


def _own(row: OwedRow, owner: str, kinds: Collection[OwedKind] = tuple(OwedKind)) -> Attempt | None:
    """The newest attempt of these kinds for whose reply this owner still waits."""
    for one in reversed(row.attempts):
        if one.owner == owner and one.doubt_since is None and one.kind in kinds:
            return one
    return None


def _without(row: OwedRow, attempts: Collection[Attempt], owner: str | None = None) -> OwedRow:
    """Less these attempts; the claim of ``owner`` is released."""
    left = tuple(one for one in row.attempts if one not in attempts)
    return replace(row, attempts=left, owner=None if row.owner == owner else row.owner)


def waits(row: OwedRow, owner: str) -> bool:
    """Whether this owner asked the member already, and did not give up. Asked to set something again, it could not tell
    by the journal which of the two was answered."""
    return _own(row, owner) is not None


_PRESENT = (OwedKind.INSTALL, OwedKind.SET)


def confirmed(row: OwedRow | None, said: Confirmation, state: Situation, asker: Asker, change: int) -> Outcome:
    """A member replied. See ``Journal.confirm``."""
    if said.kind is OwedKind.DESTROY:
        return _destroy_confirmed(row, said, state, asker, change)
    record = state.record
    mine = None if row is None else _own(row, asker.owner, _PRESENT)
    if (
        row is None
        or record is None
        or mine is None
        or mine.spoiled
        or row.owner not in (None, asker.owner)
        or said.revision > record.revision
    ):
        return _refused(row, mine, said, state, asker, change)
    locator = said.locator or record.locator
    copy = Copy(member=said.member, uid=said.uid, revision=said.revision, locator=locator)
    left = _spoiled(_without(row, (mine,), asker.owner))
    left = replace(left, reason=None, locators=merged(left.locators, (locator,)), asked_before=True)
    if said.revision < state.wanted:  # it is there, but behind by now
        behind = replace(left, kind=OwedKind.SET, revision=state.wanted, settled=False)
        return Outcome(row=behind, copy=copy)
    if left.attempts:
        return Outcome(row=replace(left, settled=True), copy=copy)
    return Outcome(row=None, copy=copy)


def _refused(
    row: OwedRow | None, mine: Attempt | None, said: Confirmation, state: Situation, asker: Asker, change: int
) -> Outcome:
    """Rule 3: until he says otherwise, the caller is undoing what he did."""
    if row is None:
        record = state.record
        kind, revision = (OwedKind.DESTROY, 0) if record is None else (OwedKind.INSTALL, record.revision)
        row = new_row(said.member, said.uid, kind, change, revision=revision)
    if mine is None:  # he asked without having said so: now it is written down
        undoing = Attempt(asker.number, asker.owner, asker.worker, OwedKind.DESTROY, 0, asker.now)
        attempts = (*row.attempts, undoing)
    else:
        undoing = replace(mine, kind=OwedKind.DESTROY)
        attempts = tuple(undoing if one is mine else one for one in row.attempts)
    locators = row.locators if said.locator is None else merged(row.locators, (said.locator,))
    after = replace(row, attempts=attempts, locators=locators, settled=False, asked_before=True)
    return Outcome(row=after, accepted=False)


def _destroy_confirmed(row: OwedRow | None, said: Confirmation, state: Situation, asker: Asker, change: int) -> Outcome:
    record = state.record
    if row is None:
        if record is None:
            return Outcome(row=None, forget_copy=True)
        again = new_row(said.member, said.uid, OwedKind.INSTALL, change, revision=record.revision)
        return Outcome(row=replace(again, asked_before=True), accepted=False, forget_copy=True)
    mine = _own(row, asker.owner, (OwedKind.DESTROY,))
    return _removed(row, mine, record, asker.owner) if mine or record else Outcome(row=row, accepted=False)


def undone(row: OwedRow | None, state: Situation, owner: str) -> Outcome:
    """The caller removed from the member what he did. Nothing of his is outstanding there any more."""
    if row is None:
        return Outcome(row=None)
    mine = _own(row, owner, (OwedKind.DESTROY,)) or _own(row, owner)
    if mine is None:
        return Outcome(row=row)
    return _removed(row, mine, state.record, owner)


def _removed(row: OwedRow, mine: Attempt | None, record: ObjectRecord | None, owner: str) -> Outcome:
    """The owner of attempt ``mine`` saw to it that the object is not there."""
    left = _without(row, () if mine is None else (mine,), owner)
    if record is not None:
        return Outcome(row=_install_anew(left, record), accepted=mine is not None, forget_copy=True)
    if left.attempts:
        return Outcome(row=replace(left, settled=True, asked_before=True), forget_copy=True)
    return Outcome(row=None, forget_copy=True)


def _spoiled(row: OwedRow) -> OwedRow:
    """Rule 5. (A destroy stays what it is: it is believed that the object is gone, and then it is made anew.)"""
    attempts = tuple(one if one.kind is OwedKind.DESTROY else replace(one, spoiled=True) for one in row.attempts)
    return replace(row, attempts=attempts)


def _install_anew(row: OwedRow, record: ObjectRecord) -> OwedRow:
    """Rule 4."""
    return replace(
        _spoiled(row),
        kind=OwedKind.INSTALL,
        revision=record.revision,
        settled=False,
        asked_before=True,
        reason=None,
    )


# -- no answer, or a refusal -----------------------------------------------------------------------------------


def given_up(
    row: OwedRow,
    state: Situation,
    owner: str,
    *,
    doubt: bool,
    reason: str | None,
    kind: OwedKind | None,
    now: float,
) -> Outcome:
    """See ``Journal.give_up``."""
    mine = _own(row, owner, tuple(OwedKind) if kind is None else (kind,))
    if mine is None:
        return Outcome(row=replace(row, owner=None if row.owner == owner else row.owner))
    if doubt:
        attempts = tuple(replace(one, doubt_since=now) if one is mine else one for one in row.attempts)
        released = None if row.owner == owner else row.owner
        return Outcome(row=replace(row, attempts=attempts, owner=released, asked_before=True))
    left = _ended(_without(row, (mine,), owner), (mine,), state)
    kept = left.row
    if kept is not None and reason is not None and (mine.kind is OwedKind.DESTROY) == (kept.kind is OwedKind.DESTROY):
        kept = replace(kept, reason=reason)
    return replace(left, row=kept)


def resolved(row: OwedRow, attempts: Collection[Attempt], state: Situation) -> Outcome:
    """These can no longer execute. See ``Journal.resolve_attempts``."""
    return _ended(_without(row, attempts), attempts, state)


def _ended(left: OwedRow, gone: Collection[Attempt], state: Situation) -> Outcome:
    """Attempts ended otherwise than by a confirmation."""
    if state.record is not None and any(one.kind is OwedKind.DESTROY for one in gone):
        return Outcome(row=_install_anew(left, state.record), forget_copy=True)
    if left.settled and not left.attempts:
        return Outcome(row=None)
    return Outcome(row=replace(left, asked_before=True) if gone else left)


# -- the object changes ----------------------------------------------------------------------------------------


def condemned(
    row: OwedRow, locators: Iterable[Locator], change: int, alive: Callable[[str], bool], *, there: bool
) -> OwedRow:
    """The object was destroyed. Attempts are kept (they may still execute), and the claim of a living owner who waits
    for a reply: his confirmation will be refused, and he destroys what he made.

    :param there: the member confirmed once that it has it.
    """
    waits = row.owner is not None and _own(row, row.owner) is not None and alive(row.owner)
    return replace(
        row,
        kind=OwedKind.DESTROY,
        revision=0,
        owner=row.owner if waits else None,
        locators=merged(row.locators, locators),
        reason=None,
        change=change if row.settled else row.change,  # a barrier that the row was behind still finds it
        settled=False,
        asked_before=row.asked_before or there,
    )


def to_be_set(row: OwedRow, revision: int, locators: Iterable[Locator], change: int) -> OwedRow:
    """An attribute change begins for an object that the member has, or will have."""
    row = replace(row, locators=merged(row.locators, locators))
    if row.kind is OwedKind.INSTALL and not row.settled:
        return row  # it goes on owing that, in whichever revision the record has then
    return replace(row, kind=OwedKind.SET, revision=revision, change=change, settled=False, asked_before=True)


def rolled_back(row: OwedRow, record: ObjectRecord, copy: Copy | None) -> OwedRow | None:
    """The attribute change to ``record.revision + 1`` is off."""
    if row.kind is not OwedKind.SET or row.revision <= record.revision:
        return row
    if row.attempts or copy is None:  # it may have taken there, or may yet: only making it anew gets it back
        return replace(row, kind=OwedKind.INSTALL, revision=record.revision, settled=False, asked_before=True)
    if copy.revision < record.revision:  # it was behind before
        return replace(row, revision=record.revision)
    return None


def owed_again(
    row: OwedRow | None, member: str, uid: bytes, kind: OwedKind, state: Situation, copy: Copy | None, change: int
) -> OwedRow | None:
    """A member was found to lack the object, or to be behind, or to hold it. See ``Journal.owe``."""
    record = state.record
    if (record is None) != (kind is OwedKind.DESTROY):
        return row  # whether an object is to be there at all is decided by create and destroy, for all members
    if kind is OwedKind.SET and (copy is None or (row is not None and row.kind is OwedKind.INSTALL)):
        kind = OwedKind.INSTALL
    revision = 0 if record is None else record.revision if kind is OwedKind.INSTALL else state.wanted
    known = () if copy is None else (copy.locator,)
    if row is None:
        row = new_row(member, uid, kind, change)
    elif not row.settled:
        change = row.change  # a barrier that the row was behind still finds it
    return replace(
        row,
        kind=kind,
        revision=revision,
        locators=merged(row.locators, known, () if record is None else (record.locator,)),
        change=change,
        settled=False,
        asked_before=True,
        reason=None,
    )


def login_refused(
    member: str, source: str, stamp: str, logins: Iterable[LoginRecord], alive: Callable[[str], bool]
) -> LoginRecord | None:
    """Why nobody tries this PIN on this member now; None: it may be tried (DESIGN.md 4.7).

    One source may serve several members, and a wrong PIN may cost one attempt on *one* of them. So until some member
    accepted it in this state (``stamp``), it is tried on one at a time, and after a refusal on none. Once a member
    accepted it, another one's refusal says something of that other member only.
    """
    same = [login for login in logins if (login.source, login.stamp) == (source, stamp)]
    own = [login for login in same if login.member == member and login.state is LoginState.REFUSED]
    if own or any(login.state is LoginState.ACCEPTED for login in same):
        return own[0] if own else None
    others = [login for login in same if login.member != member]
    refused = [login for login in others if login.state is LoginState.REFUSED]
    trying = [login for login in others if login.state is LoginState.TRYING and alive(login.owner)]
    return next(iter(refused + trying), None)
