"""The event log's seal (DESIGN.md 4.8): a hash chain over all events, whose head is sealed inside a member.

Events are appended unchained, so that no operation waits for it. Whoever is logged in and gets the lease seals them
later, in batches. The manifests on the members know the newest head, so that a log cut off together with its seal is
noticed as well. The chain begins with the first event: the newest seal speaks for all, whatever keys came before.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence

import msgspec

from hagroup.config.logging import get_logger
from hagroup.core.calls import Ckr, DeadlinePassed
from hagroup.core.clock import Clock
from hagroup.core.records import EVENT_LOG_BROKEN, EVENT_LOG_WHOLE, Event, Seal
from hagroup.engine import manifest
from hagroup.engine.consistency import open_findings
from hagroup.engine.domain_keys import DomainKeys, IntegrityAlarm, open_data, seal_data
from hagroup.engine.member import Life
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.engine.roster import Roster
from hagroup.engine.view import View
from hagroup.errors import JournalUnavailable
from hagroup.journal.api import Journal, LeaseLost
from hagroup.members.api import Connection

log = get_logger(__name__)

PAUSE = 30.0
"""Seconds between looks of one process: each seal costs one encryption, and a write to each token."""
LEASE = 30.0
_PURPOSE = b"event log"
_EVERYTHING = 2**31


def start(serial: str) -> bytes:
    """The chain's head before the first event."""
    return hashlib.sha256(b"hagroup events " + serial.encode()).digest()


def follow(head: bytes, event: Event) -> bytes:
    """The chain's head after one more event."""
    content = [event.number, event.time, event.kind, event.member, event.text, sorted(event.data.items())]
    return hashlib.sha256(head + msgspec.msgpack.encode(content)).digest()


def heads(serial: str, events: Iterable[Event]) -> dict[int, bytes]:
    """The chain's head after each event, by its number."""
    head = start(serial)
    found = {0: head}
    for event in events:
        head = found[event.number] = follow(head, event)
    return found


def _content(number: int, head: bytes) -> bytes:
    return msgspec.msgpack.encode([number, head])


def opens(connection: Connection, keys: DomainKeys, seal: Seal, *, timeout: float) -> bool:
    """Whether the seal was made inside a member of this domain, for just this head."""
    try:
        return open_data(connection, keys, _PURPOSE, seal.mac, timeout=timeout) == _content(seal.number, seal.head)
    except IntegrityAlarm:
        return False


def broken(events: Sequence[Event], serial: str, seal: Seal | None, manifests: dict[str, tuple[int, bytes]]) -> str:
    """What is wrong with the log, as one sentence; empty: nothing.

    :param events: all, oldest first.
    :param manifests: number and head that each member's manifest of this epoch shows.
    """
    chain = heads(serial, events)
    last = events[-1].number if events else 0
    for name, (number, head) in manifests.items():
        covered = 0 if seal is None else seal.number
        if number > min(last, covered):
            return (
                f'the event log was cut off: member "{name}" knows that events up to {number} were sealed, but the '
                f"journal has events up to {last}, sealed up to {covered}"
            )
        if number and chain.get(number) != head:
            return (
                f'the event log is not what it was: events up to {number} differ from those that member "{name}" knows'
            )
    if seal is None:
        return ""
    if seal.number > last:
        return f"the event log was cut off: events up to {seal.number} were sealed, the last one there is {last}"
    for expected, event in enumerate(events, 1):
        if event.number != expected and expected <= seal.number:
            return f"the event log is not what it was: event {expected} is missing, {event.number} is in its place"
    if chain.get(seal.number) != seal.head:
        return (
            f"the event log is not what it was: one of the events up to {seal.number} was changed, removed or put in "
            "another place after they were sealed"
        )
    return ""


class Sealer:
    """Of one process; any thread may ask, one at a time works, over all processes."""

    def __init__(self, roster: Roster, view: View, journal: Journal, clock: Clock) -> None:
        self._roster = roster
        self._view = view
        self._journal = journal
        self._clock = clock
        self._looked = clock.boot()

    @property
    def _timeout(self) -> float:
        return self._roster.config.timeouts.generate

    def due(self) -> bool:
        """Whether it is time to look again."""
        now = self._clock.boot()
        if now - self._looked < PAUSE:
            return False
        self._looked = now
        return True

    def seal(self) -> None:
        """Seal what is not sealed yet, if some member is logged in and nobody else is at it; show it in the manifests.

        A log that is not what it was is told as an event, and not sealed any further.
        """
        members = [one for one in self._roster.serving() if one.life is not None and one.life.keys is not None]
        if not members or members[0].life is None or self._roster.journal_behind() is not None:
            return
        try:
            lease = self._journal.acquire_lease("seal", ttl=LEASE)
        except JournalUnavailable:
            return
        if lease is None:
            return
        life = members[0].life
        try:
            self._view.refresh(always=True)
            seal = self._next(life)
            if seal is not None:
                self._journal.put_seal(seal, lease=lease)
                self._view.refresh(always=True)
        except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
            self._roster.lost(members[0], life, str(error))
            return
        except (LeaseLost, JournalUnavailable):
            return  # the next one goes on
        finally:
            with contextlib.suppress(JournalUnavailable):
                self._journal.release_lease(lease)
        self._show()

    def _next(self, life: Life) -> Seal | None:
        """None: nothing is new, or the log is broken."""
        group = self._view.group
        events = self._journal.events(limit=_EVERYTHING)
        keys = life.keys
        assert keys is not None
        before = group.seal
        covered = 0 if before is None else before.number
        fresh = [event for event in events if event.number > covered]
        renew = before is not None and _older(before, keys)
        if before is not None and (fresh or renew) and not opens(life.connection, keys, before, timeout=self._timeout):
            why = f"the event log's seal over events up to {covered} does not open: it was not made by this group"
        elif fresh or renew:
            shown = {
                one.name: (one.life.manifest_sealed, one.life.manifest_head)
                for one in self._roster.serving()
                if one.life is not None and one.life.manifest_sealed
            }
            why = broken(events, group.serial, before, shown)
        else:
            return None
        if why:
            self._tell(why, events)
            return None
        if open_findings(events):
            self._journal.event(EVENT_LOG_WHOLE, f"all is as it was sealed, up to event {covered}")
            events = self._journal.events(limit=_EVERYTHING)
        number, head = events[-1].number, heads(group.serial, events)[events[-1].number]
        mac = seal_data(life.connection, keys, _PURPOSE, _content(number, head), timeout=self._timeout)
        return Seal(number=number, head=head, mac=mac)

    def _tell(self, why: str, events: Sequence[Event]) -> None:
        """Once, not each time that somebody looks."""
        if why not in open_findings(events):
            log.error("journal.event-log-broken", reason=why)
            self._journal.event(EVENT_LOG_BROKEN, why)

    def _show(self) -> None:
        """The newest seal goes into the manifests of the members that this process serves by."""
        group = self._view.group
        if group.seal is None:
            return
        for member in self._roster.serving():
            life = member.life
            if life is None or life.keys is None or life.manifest_sealed >= group.seal.number:
                continue
            try:
                manifest.show_seal(self._view, member, life, timeout=self._timeout)
            except (Ckr, DeadlinePassed, *CONNECTION_LOST) as error:
                self._roster.lost(member, life, str(error))


def _older(seal: Seal, keys: DomainKeys) -> bool:
    """Whether it is under keys that were replaced, which may be dropped soon."""
    try:
        return bool(msgspec.msgpack.decode(seal.mac, type=list)[0] != keys.partition_key_id)
    except (msgspec.DecodeError, IndexError):
        return False
