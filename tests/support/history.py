"""Histories of a group: what may happen in one step, what must hold after each, and at the end.

A step is a name and a few numbers, so a history is plain data: drawn by Hypothesis or by a seed, printed, shortened,
run again.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hagroup.core.attributes import CKA, CKM, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, Handle
from hagroup.core.ckr import CKR
from hagroup.core.records import Membership, ObjectRecord, ObjectState
from hagroup.engine import configuration, manifest
from hagroup.errors import JournalUnavailable, OutcomeUnknown
from tests.support.linearizability import Kind, Observed
from tests.support.simulated import (
    CKM_AES_CMAC,
    CKM_EC_KEY_PAIR_GEN,
    CKM_ECDSA,
    Fate,
    SimMember,
    SimObject,
    SimToken,
    signature,
)
from tests.support.simulation import EXPECTED, LATE_WINDOW, PIN, Client, Killed, Simulation, key_template

Step = tuple[str, int, int, int]
P256 = bytes.fromhex("06082a8648ce3d030107")
OWN = (b"hagroup domain key", b"hagroup member key", b"hagroup partition key")
FATES = list(Fate)[1:]
WRONG_PIN = b"9999"
QUIET_ROUNDS = 40


class Broken(AssertionError):
    """Something that must hold does not."""


@dataclass
class Thing:
    """An object that was acknowledged, or that turned out to have been made."""

    uid: bytes
    number: int
    labels: set[bytes]
    """What it may be called: more than one while the outcome of a change is not known."""
    kind: int
    state: str = "live"  # live | gone | maybe (a destroy whose outcome is not known)
    secret: bytes | None = None
    mechanism: int | None = None
    changes: int = 0
    """How often somebody changed it, or tried to."""


@dataclass
class Unknown:
    """A create whose outcome is not known: all of it, or nothing."""

    number: int
    label: bytes
    count: int
    called: int


@dataclass
class Damage:
    """A token was emptied or put back: the journal cannot know before somebody connects to it."""

    admitted: float
    """When the member was last admitted, or taken out of service, before that."""


@dataclass
class History:
    """A group under way."""

    simulation: Simulation
    clients: list[Client | None]
    things: list[Thing] = field(default_factory=list)
    unknown: list[Unknown] = field(default_factory=list)
    number: int = 0
    damage: dict[str, Damage] = field(default_factory=dict)
    snapshots: dict[str, dict[int, SimObject]] = field(default_factory=dict)
    pin_refusals: dict[str, int] = field(default_factory=dict)
    """Refused attempts before the PIN on the token last changed."""
    observed: Observed = field(default_factory=Observed)
    records: int = 1
    """Sealed records that may be beside an object at the end: one more than one where a member may have executed late
    what sealed it anew."""

    # -- clients -----------------------------------------------------------------------------------------------
    def client(self, number: int) -> Client | None:
        """A living client; started anew where it was killed."""
        place = number % len(self.clients)
        client = self.clients[place]
        if client is None or client.dead:
            try:
                client = self.clients[place] = self.simulation.client("AB"[place] if place < 2 else f"C{place}")
            except (JournalUnavailable, Killed):
                return None
        return client

    def call(self, number: int, action: Callable[[Client], Any]) -> tuple[str, Any]:
        """("done", answer), ("refused", error), ("unknown", error) or ("killed", None)."""
        client = self.client(number)
        if client is None or client.would_wait():
            return "refused", None
        try:
            return "done", action(client)
        except (OutcomeUnknown, JournalUnavailable) as error:
            return "unknown", error
        except EXPECTED as error:
            return "refused", error
        except Killed:
            client.bury()
            return "killed", None

    # -- what applications do ----------------------------------------------------------------------------------
    def create(self, client: int, kind: int, _: int) -> None:
        self.number += 1
        number, label = self.number, b"%d" % self.number

        def make(one: Client) -> list[tuple[bytes, int, int | None]]:
            session = one.ready()
            match kind % 5:
                case 0 | 1:
                    template = [*key_template(label, sensitive=kind % 5 == 0), (CKA.VALUE_LEN, pack_ulong(32))]
                    uid = session.generate((CKM.AES_KEY_GEN, None), template, assign_id=True)
                    return [(uid, CKO.SECRET_KEY, CKM_AES_CMAC)]
                case 2:
                    value = [(CKA.CLASS, pack_ulong(CKO.DATA)), (CKA.VALUE, b"value of " + label)]
                    template = [*key_template(label, private=bool(kind % 2)), *value]
                    return [(session.create(template, assign_id=True), CKO.DATA, None)]
                case 3:
                    public = [*key_template(label), (CKA.EC_PARAMS, P256)]
                    mechanism, sign = CKM_EC_KEY_PAIR_GEN, CKM_ECDSA
                case _:
                    public = [*key_template(label), (CKA.MODULUS_BITS, pack_ulong(528))]
                    mechanism, sign = CKM.RSA_PKCS_KEY_PAIR_GEN, CKM.SHA256_RSA_PKCS
            pair = session.generate_pair((mechanism, None), public, key_template(label, sensitive=True), assign_id=True)
            return [(pair[0], CKO.PUBLIC_KEY, None), (pair[1], CKO.PRIVATE_KEY, int(sign))]

        called = self.observed.now()
        outcome, made = self.call(client, make)
        if outcome == "done":
            for uid, object_class, mechanism in made:
                self.observed.done(uid, Kind.CREATE, called, label)
                self.things.append(Thing(uid, number, {label}, object_class, mechanism=mechanism))
        elif outcome != "refused":
            self.unknown.append(Unknown(number, label, 2 if kind % 5 > 2 else 1, called))

    def _thing(self, number: int) -> Thing | None:
        return self.things[number % len(self.things)] if self.things else None

    def set_label(self, client: int, which: int, _: int) -> None:
        thing = self._thing(which)
        if thing is None:
            return
        self.number += 1
        new = b"%d.%d" % (thing.number, self.number)
        before, changes = thing.state, thing.changes
        thing.changes += 1
        called = self.observed.now()
        outcome, answer = self.call(client, lambda one: one.ready().set(thing.uid, [(int(CKA.LABEL), new)]))
        if outcome == "done":
            self.observed.done(thing.uid, Kind.SET, called, new)
            self._was_there(thing, before, "an attribute was set")
            thing.labels = {new} if thing.changes == changes + 1 else {*thing.labels, new}
        elif outcome == "refused":
            self._refusal(thing, answer, called)
        else:
            self.observed.unknown(thing.uid, Kind.SET, called, new)
            thing.labels = {*thing.labels, new}

    def destroy(self, client: int, which: int, _: int) -> None:
        thing = self._thing(which)
        if thing is None:
            return
        before = thing.state
        thing.changes += 1
        called = self.observed.now()
        outcome, answer = self.call(client, lambda one: one.ready().destroy(thing.uid))
        if outcome == "done":
            self.observed.done(thing.uid, Kind.DESTROY, called)
            self._was_there(thing, before, "an object was destroyed")
            thing.state = "gone"
        elif outcome == "refused":
            self._refusal(thing, answer, called)
        else:
            self.observed.unknown(thing.uid, Kind.DESTROY, called)
            if thing.state == "live":
                thing.state = "maybe"

    def read(self, client: int, which: int, _: int) -> None:
        thing = self._thing(which)
        if thing is None:
            return
        called = self.observed.now()
        outcome, answer = self.call(client, lambda one: one.ready().get(thing.uid, [int(CKA.LABEL)]))
        if outcome == "done":
            self.observed.done(thing.uid, Kind.LABEL, called, answer[0][CKA.LABEL])
        elif outcome == "refused":
            self._refusal(thing, answer, called)

    def _was_there(self, thing: Thing, before: str, what: str) -> None:
        """:param before: its state when the call began: what happened meanwhile may count as later."""
        if before == "gone":
            raise Broken(f"{what} that had been destroyed: {thing}")

    def _refusal(self, thing: Thing, error: Exception | None, called: int) -> None:
        if isinstance(error, Ckr) and error.rv == CKR.OBJECT_HANDLE_INVALID and error.function != "C_FindObjects":
            self.observed.done(thing.uid, Kind.NOT_THERE, called)
            if thing.state == "live" and not self.simulation.depth:
                raise Broken(f"an object is refused that was never destroyed: {thing}")
            if thing.state == "maybe" and not self.simulation.depth:
                thing.state = "gone"

    def sign(self, client: int, which: int, _: int) -> None:
        things = [one for one in self.things if one.mechanism is not None]
        if not things:
            return
        thing = things[which % len(things)]
        calm, before = self._calm(thing), thing.state
        called = self.observed.now()
        outcome, answer = self.call(client, lambda one: one.ready().sign((thing.mechanism or 0, None), thing.uid, b"x"))
        if outcome != "done":
            if isinstance(answer, Ckr) and (answer.rv, answer.function) == (CKR.KEY_HANDLE_INVALID, "C_SignInit"):
                self.observed.done(thing.uid, Kind.NOT_THERE, called)
            if outcome == "refused" and answer is not None and calm and self._connected(client):
                raise Broken(f"nothing is wrong, and {thing} cannot be used: {answer!r}")
            return
        self._was_there(thing, before, "a key was used")
        self.observed.done(thing.uid, Kind.THERE, called)
        if thing.secret is not None:
            key = SimObject(0, {}, thing.secret, None)
            if signature(key, thing.mechanism or 0, b"x") != answer:
                raise Broken(f"another key signed than {thing}")

    def _calm(self, thing: Thing) -> bool:
        """Nothing stands in the way of using it."""
        simulation = self.simulation
        copies, owed = simulation.journal.placement(thing.uid)
        fine = not any(member.down or member.hung or member.late for member in simulation.members.values())
        quiet = not any(simulation.faults.values()) and not any(
            one is not None and (one.kill_in, one.journal_fault_in, one.intrusion) != (None, None, None)
            for one in self.clients
        )
        listed = simulation.listed()
        right = all(one.token is one.right_token and simulation.joined(one) for one in listed)
        everywhere = len(copies) == len(listed) and not owed
        return fine and quiet and right and not self.damage and thing.state == "live" and everywhere

    def _connected(self, number: int) -> bool:
        client = self.clients[number % len(self.clients)]
        return client is not None and len(client.engine.roster.serving()) == len(self.simulation.listed())

    def find(self, client: int, _: int, __: int) -> None:
        def look(one: Client) -> list[bytes]:
            return one.ready().find({})

        before, called = self._live(), self.observed.now()
        outcome, found = self.call(client, look)
        if outcome == "done":
            self.observed.searched(called, found)
        if outcome == "done" and not self.simulation.depth:
            self._same_answer(found, before)

    def _live(self) -> set[bytes]:
        return {record.uid for record in self.simulation.journal.objects() if record.state is ObjectState.LIVE}

    def _same_answer(self, found: list[bytes], before: set[bytes]) -> None:
        """:param before: what was live when the search began: somebody may have come in between."""
        live = self._live()
        if not before & live <= set(found) <= before | live or len(set(found)) != len(found):
            raise Broken(f"a search shows {len(found)} objects where the journal has {len(live)}")

    def tick(self, client: int, _: int, __: int) -> None:
        self.call(client, lambda one: one.background())

    # -- what the world does -----------------------------------------------------------------------------------
    def _member(self, number: int) -> SimMember:
        members = list(self.simulation.members.values())
        return members[number % len(members)]

    def fault(self, member: int, fate: int, when: int) -> None:
        name = self._member(member).name
        only_changes = bool(when & 1)
        self.simulation.faults.setdefault(name, []).append(
            (when // 2 % (4 if only_changes else 24), FATES[fate % len(FATES)], only_changes)
        )

    def off(self, member: int, _: int, __: int) -> None:
        one = self._member(member)
        one.down = True
        one.power_cycle()

    def hang(self, member: int, _: int, __: int) -> None:
        self._member(member).hung = True

    def back(self, member: int, _: int, __: int) -> None:
        one = self._member(member)
        one.down = one.hung = one.token.full = False

    def full(self, member: int, _: int, __: int) -> None:
        self._member(member).token.full = True

    def snapshot(self, member: int, _: int, __: int) -> None:
        one = self._member(member)
        self.snapshots[one.name] = _copied(one.right_token.objects)

    def restore(self, member: int, _: int, __: int) -> None:
        """An old backup is put back into the token."""
        one = self._member(member)
        if one.name in self.snapshots and self._may_damage(one):
            self._damage(one, _copied(self.snapshots[one.name]))

    def empty(self, member: int, _: int, __: int) -> None:
        """All is gone but the domain's keys, as after C_InitToken and joining the domain again."""
        one = self._member(member)
        if self._may_damage(one):
            kept = {number: item for number, item in one.token.objects.items() if item.label in OWN}
            self._damage(one, kept)

    def _may_damage(self, member: SimMember) -> bool:
        """One disaster at a time: another token is whole."""
        return member.token is member.right_token and (not self.damage or set(self.damage) == {member.name})

    def _damage(self, member: SimMember, objects: dict[int, SimObject]) -> None:
        member.power_cycle()
        member.late.clear()
        member.token.objects = objects
        since = next(one.since for one in self.simulation.journal.members() if one.name == member.name)
        self.damage[member.name] = Damage(since)

    def swap(self, member: int, _: int, __: int) -> None:
        """Another token is behind the member's address, with another serial number; or the right one again."""
        one = self._member(member)
        one.power_cycle()
        one.late.clear()
        if one.token is one.right_token:
            one.token = SimToken(f"other-{one.token.serial}", PIN)
        else:
            self._put_back(one)

    def _put_back(self, member: SimMember) -> None:
        other = member.token
        member.token = member.right_token
        if other is not member.token and (other.objects or other.logins or other.refused):
            raise Broken(f"something was done on another token than {member.name}'s")

    def wipe(self, member: int, how: int, _: int) -> None:
        """The domain's keys are deleted with other tools; all else stays."""
        one = self._member(member)
        if one.token is one.right_token:
            one.token.objects = {n: item for n, item in one.token.objects.items() if item.label not in OWN}
            if how & 1:
                one.power_cycle()

    def pin(self, member: int, _: int, __: int) -> None:
        """Somebody changes the member's PIN with other tools; a person puts things right when all is healed."""
        one = self._member(member)
        if one.token.pin == PIN:
            one.token.pin = WRONG_PIN
            self.pin_refusals[one.name] = len(one.token.refused)
            one.power_cycle()

    def late(self, member: int, index: int, _: int) -> None:
        """A call that was given up is executed after all, if it still may be."""
        one = self._member(member)
        if not one.down:
            one.late = [call for call in one.late if self.simulation.clock.now - call.since < LATE_WINDOW]
            one.run_late(index)

    def kill(self, client: int, when: int, _: int) -> None:
        one = self.clients[client % len(self.clients)]
        if one is not None and not one.dead:
            one.kill_in = when % 40

    def journal_error(self, client: int, when: int, _: int) -> None:
        one = self.clients[client % len(self.clients)]
        if one is not None and not one.dead:
            one.journal_fault_in = when % 12

    def intrude(self, client: int, when: int, what: int) -> None:
        """In the middle of what this client does next, another one does something."""
        one = self.clients[client % len(self.clients)]
        if one is None or one.dead:
            return
        name = INTRUSIONS[what % len(INTRUSIONS)]
        rest = what // len(INTRUSIONS)
        other = client + 1 if name in CLIENT_STEPS else rest

        def action() -> None:
            try:
                getattr(self, name)(other, rest, rest // 7)
            except Killed:  # the intruder's death is not this client's
                pass

        one.intrusion = (when % 60, action)

    def time(self, how: int, _: int, __: int) -> None:
        self.simulation.clock.now += (0.3, 1.0, 3.0, 11.0, 31.0, 200.0, 700.0)[how % 7]

    def wall(self, how: int, _: int, __: int) -> None:
        """Somebody sets the clock on the wall."""
        self.simulation.clock.wall_offset += (-86_400.0, -7.0, 13.0, 1e6)[how % 4]

    def reboot(self, _: int, __: int, ___: int) -> None:
        """The host starts again: all processes end, and boot time starts anew. Members elsewhere notice nothing."""
        for one in self.clients:
            if one is not None and not one.dead:
                one.bury()
        before = self.simulation.clock.now
        self.simulation.clock.reboot()
        for member in self.simulation.members.values():
            for call in member.late:
                call.since -= before

    def fork(self, client: int, _: int, __: int) -> None:
        one = self.clients[client % len(self.clients)]
        if one is not None and not one.dead:
            try:
                one.fork()
            except (JournalUnavailable, Killed):
                one.bury()

    # -- steps, and what must hold after each ------------------------------------------------------------------
    def run(self, step: Step) -> None:
        name, *numbers = step
        if self.simulation.log is not None:
            self.simulation.log.append(f"-- {step}")
        self.simulation.clock.now += 0.01
        getattr(self, name)(*numbers)
        self.check()

    def check(self) -> None:
        if self.simulation.unexpected:
            raise Broken("an exception in the background:\n" + "\n".join(self.simulation.unexpected))
        self._check_pins()
        records = {record.uid: record for record in self.simulation.journal.objects()}
        live = {uid: record for uid, record in records.items() if record.state is ObjectState.LIVE}
        self._settle_unknown(records, live)
        known = {thing.uid: thing for thing in self.things}
        changing = {uid for intent in self.simulation.journal.intents() for uid in intent.uids}
        for uid, record in live.items():
            thing = known.get(uid)
            if thing is None:
                raise Broken(f"the group has an object that nobody was told of: {record.locator}")
            if thing.state == "gone":
                raise Broken(f"a destroyed object is back: {thing}")
            if record.attributes[CKA.LABEL] not in thing.labels:
                raise Broken(f"{thing} is called {record.attributes[CKA.LABEL]!r}")
            if uid not in changing:
                thing.labels = {record.attributes[CKA.LABEL]}
        for thing in self.things:
            if thing.state == "live" and thing.uid not in live:
                raise Broken(f"an acknowledged object is lost: {thing}")
            if thing.state == "maybe" and thing.uid not in live:
                thing.state = "gone"
        self._check_copies(live, known)
        self._check_clients(known)

    def _settle_unknown(self, records: dict[bytes, ObjectRecord], live: dict[bytes, ObjectRecord]) -> None:
        known = {thing.uid for thing in self.things}
        for one in list(self.unknown):
            mine = [r for r in records.values() if r.uid not in known and r.attributes[CKA.LABEL] == one.label]
            there = [record for record in mine if record.uid in live]
            if there and len(there) != one.count:
                raise Broken(f"{one} is there in part")
            if there or not mine:
                self.unknown.remove(one)
            for record in there:
                self.observed.unknown(record.uid, Kind.CREATE, one.called, one.label)
                mechanism = {CKO.SECRET_KEY: CKM_AES_CMAC}.get(CKO(record.object_class))
                self.things.append(Thing(record.uid, one.number, {one.label}, record.object_class, mechanism=mechanism))

    def _check_pins(self) -> None:
        for name, member in self.simulation.members.items():
            if len(member.token.refused) > self.pin_refusals.get(name, 0) + 1:
                raise Broken(f"a refused PIN was tried again on {name}")

    def _check_copies(self, live: dict[bytes, ObjectRecord], known: dict[bytes, Thing]) -> None:
        """What the journal says that a member has, and owes nothing for, is there: one, whole, as it should be."""
        journal = self.simulation.journal
        members = {member.name: member for member in journal.members()}
        holders: dict[bytes, int] = dict.fromkeys(live, 0)
        for member in self.simulation.listed():
            name = member.name
            damage = self.damage.get(name)
            if damage is not None:
                if members[name].membership is Membership.ADMITTED and members[name].since != damage.admitted:
                    del self.damage[name]
                else:
                    continue
            owed = {row.uid for row in journal.owed(name)}
            for copy in journal.copies(name):
                record = live.get(copy.uid)
                if record is None or copy.uid in owed or copy.revision != record.revision:
                    continue
                holders[copy.uid] += 1
                if member.token is member.right_token:
                    self._check_copy(member, record, known[copy.uid])
        if not self.damage:
            for uid, count in holders.items():
                owed_to = {row.member for row in journal.owed() if row.uid == uid}
                if not count and not owed_to:
                    raise Broken(f"no member has {known[uid]}, and none owes it")

    def _check_copy(self, member: SimMember, record: ObjectRecord, thing: Thing) -> None:
        found = _at(member, record)
        if len(found) != 1:
            raise Broken(f"{member.name} has {len(found)} of {thing}, revision {record.revision}, where it has one")
        if record.object_class in (CKO.SECRET_KEY, CKO.PRIVATE_KEY):
            secret = found[0].secret
            thing.secret = thing.secret or secret
            if secret is None or secret != thing.secret:
                raise Broken(f"{member.name} has another key, or half of one, for {thing}")

    def _check_clients(self, known: dict[bytes, Thing]) -> None:
        gone = [thing.uid for thing in self.things if thing.state == "gone"]
        for client in self.clients:
            if client is None or client.dead:
                continue
            intrusion, client.intrusion = client.intrusion, None  # looking is no step of the history
            try:
                client.engine.view.refresh()
            except (JournalUnavailable, Killed):
                continue
            finally:
                client.intrusion = intrusion
            for uid in gone:
                if client.real and client.engine.view._objects.get(uid) is not None:
                    raise Broken(f"{client.name} would use a destroyed object: {known[uid]}")

    # -- the end -----------------------------------------------------------------------------------------------
    def heal(self) -> None:
        """Nothing is wrong any more; calls that may still be late are executed."""
        simulation = self.simulation
        simulation.faults.clear()
        for client in self.clients:
            if client is not None:
                client.kill_in = client.journal_fault_in = client.intrusion = None
        for member in simulation.members.values():
            while not member.down and member.late:
                call = member.late[0]
                if simulation.clock.now - call.since < LATE_WINDOW:
                    member.run_late(0)
                else:
                    member.late.pop(0).connection.came_back()
            for call in member.late:
                call.connection.came_back()
            member.late.clear()
            self._put_back(member)
            member.down = member.hung = member.token.full = False

    def people(self) -> None:
        """They look at the status, and do what it says."""
        simulation = self.simulation
        for member in simulation.listed():
            if member.token.pin != PIN or member.token.count_low:
                member.token.pin, member.token.count_low = PIN, False
                self.pin_refusals[member.name] = len(member.token.refused)
            if not simulation.joined(member):
                kept = {n: item for n, item in member.token.objects.items() if item.label not in OWN}
                member.token.objects = kept
                simulation.give_domain(member, *simulation.domain)
            simulation.journal.forget_login(member.name)
        for record in simulation.journal.members():
            if record.membership is Membership.QUARANTINED:
                simulation.journal.update_member(record.name, membership=Membership.OUT_OF_SYNC, reason="resumed")

    def finish(self, *, late: bool = True) -> None:
        """Heal, let time pass until all is quiet, and compare everything.

        :param late: something may still come of calls that were given up.
        """
        if self.simulation.log is not None:
            self.simulation.log.append("-- heal")
        self.heal()
        for client in range(len(self.clients)):
            self.client(client)
        simulation = self.simulation
        for round_ in range(QUIET_ROUNDS):
            if round_ < 5:
                self.people()
            for number in range(len(self.clients)):
                self.tick(number, 0, 0)
            self.check()
            simulation.clock.now += LATE_WINDOW + 100.0 if round_ == 3 else 70.0
            if (round_ > 6 or not late) and self._quiet():
                break
        else:
            raise Broken(self._why_not_quiet())
        self._check_tokens()
        for number in range(len(self.clients)):
            outcome, found = self.call(number, lambda one: one.ready().find({}))
            if outcome != "done":
                raise Broken(f"all is well, and a search fails: {found!r}")
            self._same_answer(found, self._live())
            for which in range(len(self.things)):
                self.read(number, which, 0)
            for which in range(len([one for one in self.things if one.mechanism is not None])):
                self.sign(number, which, 0)
        unexplained = self.observed.unexplained()
        if unexplained is not None:
            raise Broken(unexplained)

    def _quiet(self) -> bool:
        journal = self.simulation.journal
        admitted = all(member.membership is Membership.ADMITTED for member in journal.members())
        return admitted and not journal.owed() and not journal.intents()

    def _why_not_quiet(self) -> str:
        journal = self.simulation.journal
        lines = ["it does not come to rest"]
        lines += [f"  {row}" for row in journal.owed()]
        lines += [f"  {intent}" for intent in journal.intents()]
        lines += [f"  {member.name} {member.membership.value} {member.reason}" for member in journal.members()]
        for client in self.clients:
            if client is not None:
                lines += [
                    f"  {client.name}: {m.name} {m.state} {m.reason}" for m in client.engine.roster.members.values()
                ]
        return "\n".join(lines)

    def _check_tokens(self) -> None:
        """Each token holds exactly what is live, and its records; no ghost, no orphan."""
        live = [record for record in self.simulation.journal.objects() if record.state is ObjectState.LIVE]
        known = {thing.uid: thing for thing in self.things}
        for member in self.simulation.listed():
            rest = dict(member.token.objects)
            for record in live:
                self._check_copy(member, record, known[record.uid])
                del rest[_at(member, record)[0].number]
                sealed = [
                    item
                    for item in rest.values()
                    if item.label == f"hagroup:object:{record.uid.hex()}:{record.revision}".encode()
                ]
                if not 1 <= len(sealed) <= self.records:
                    raise Broken(f"{member.name} has {len(sealed)} sealed records of {known[record.uid]}")
                for item in sealed:
                    del rest[item.number]
            left = [
                item
                for item in rest.values()
                if item.label not in OWN and not item.label.startswith((manifest.LABEL, configuration.LABEL))
            ]
            if left:
                raise Broken(f"{member.name} holds what it should not: {[_shown(item) for item in left]}")


def _shown(item: SimObject) -> str:
    return f"{item.object_class}:{item.label!r}{'' if item.attributes else ' (ghost)'}"


def _at(member: SimMember, record: ObjectRecord) -> list[SimObject]:
    """Objects on the token where this one should be."""
    locator = record.locator
    number = CKA.OBJECT_ID if record.object_class == CKO.DATA else CKA.ID
    return [
        item
        for item in member.token.objects.values()
        if item.object_class == locator.object_class
        and item.label == locator.label
        and item.attributes.get(number, b"") == locator.id
    ]


def _copied(objects: dict[int, SimObject]) -> dict[int, SimObject]:
    return {n: SimObject(n, dict(item.attributes), item.secret, None) for n, item in objects.items()}


CLIENT_STEPS = ("create", "set_label", "destroy", "sign", "find", "read", "tick")
WORLD_STEPS = ("fault", "off", "hang", "back", "full", "snapshot", "restore", "empty", "pin", "late", "swap", "wipe")
TROUBLE = ("kill", "journal_error", "intrude", "time", "wall", "reboot", "fork")
INTRUSIONS = ("set_label", "destroy", "tick", "create", "late", "off", "back", "sign")
WEIGHTS = {
    "create": 10,
    "set_label": 7,
    "destroy": 6,
    "sign": 6,
    "find": 2,
    "read": 4,
    "tick": 10,
    "fault": 10,
    "off": 2,
    "hang": 2,
    "back": 6,
    "full": 1,
    "snapshot": 2,
    "restore": 2,
    "empty": 1,
    "pin": 1,
    "late": 6,
    "kill": 4,
    "journal_error": 3,
    "intrude": 5,
    "time": 6,
    "swap": 2,
    "wipe": 1,
    "wall": 1,
    "reboot": 1,
    "fork": 2,
}


def random_steps(seed: int, length: int) -> list[Step]:
    """The history of a seed."""
    numbers = random.Random(seed)
    names = numbers.choices(list(WEIGHTS), list(WEIGHTS.values()), k=length)
    return [
        (name, numbers.randrange(1 << 16), numbers.randrange(1 << 16), numbers.randrange(1 << 16)) for name in names
    ]


def play(steps: list[Step], seed: int, *, log: list[str] | None = None, local: bool | None = None) -> None:
    """Run a history from an empty group to its end. :raises Broken: something did not hold."""
    local = seed % 3 == 0 if local is None else local
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        simulation = Simulation(Path(folder), seed, local=local)
        simulation.log = log
        with simulation.running():
            history = History(simulation, [None, None])
            for step in steps:
                history.run(step)
            history.finish()


__all__ = ["Broken", "Handle", "History", "Step", "pack_bool", "play", "random_steps"]
