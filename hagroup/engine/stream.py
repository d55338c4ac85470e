"""Multi-part operations: pinned to one member, replayed on another if that one fails (DESIGN.md 3)."""

from __future__ import annotations

from collections.abc import Callable

from hagroup.core.calls import Ckr, DeadlinePassed, Handle, Mechanism, SessionId
from hagroup.core.ckr import CKR
from hagroup.core.classify import Verdict, classify
from hagroup.engine.calls import Caller
from hagroup.engine.member import Life, Member, Missing, Usable
from hagroup.engine.opening import CONNECTION_LOST
from hagroup.engine.roster import Roster
from hagroup.errors import CallTimeout, StreamTooLong

_MOST_FAILURES = 2
_APPLICATION = (Verdict.APPLICATION, Verdict.CAPABILITY, Verdict.AMBIGUOUS)


class GroupStream:
    """One multi-part operation of one thread.

    Input is kept until ``limit`` bytes, and what was given out for it, so that a replay gives exactly the rest, or an
    error where the operation is not deterministic. (Not a hash of it: SHA-256 costs more than AES does.)
    """

    def __init__(
        self,
        caller: Caller,
        roster: Roster,
        kind: str,
        mech: Mechanism,
        key: Usable | None,
        *,
        pin: bytes | None,
        logged_in: bool,
        keys_of: Callable[[bytes], Usable],
    ) -> None:
        self._caller = caller
        self._roster = roster
        self._kind = kind
        self._mech = mech
        self._key = key
        self._objects: list[Usable] = [] if key is None else [key]
        """What a member has to have: the key, and what was digested in between."""
        self._pin = pin
        self._logged_in = logged_in
        self._keys_of = keys_of
        self._timeout = roster.config.timeouts.call
        self._limit = roster.config.group.replay_limit
        self._input: list[bytes | Usable] | None = []
        self._kept = 0
        self._given: list[bytes] = []
        """Kept as long as the input is."""
        self._behind: bytearray | None = None
        """After a replay: the new member's output, until it has reached what was given out before."""
        self._member: Member | None = None
        self._life: Life | None = None
        self._id: SessionId = 0
        self._failed = 0
        self._open = True
        self._start()

    def _start(self) -> None:
        """Choose a member, C_...Init there."""

        def init(life: Life, handles: list[Handle]) -> tuple[Life, SessionId]:
            key = handles[0] if self._key is not None else 0
            stream = life.connection.stream_open(self._kind, self._mech, key, pin=self._pin, timeout=self._timeout)
            return life, stream

        self._life, self._id = self._caller.run(self._objects, init, logged_in=self._logged_in, mechanism=self._mech[0])
        self._member = next((m for m in self._roster.members.values() if m.life is self._life), None)
        if self._member is not None:
            with self._roster.changed:
                self._member.outstanding += 1

    def _leave(self) -> None:
        if self._member is not None:
            self._roster.choosing.done(self._member)
            self._member = None

    def update(self, data: bytes) -> bytes:
        return self._carry_on(data)

    def update_key(self, uid: bytes) -> None:
        """Its member may not have this key (yet): then the operation goes to one that has."""
        key = self._keys_of(uid)
        self._objects.append(key)
        self._carry_on(key)

    def final(self, signature: bytes = b"") -> bytes:
        try:
            return self._attempt(lambda life: life.connection.stream_final(self._id, signature, timeout=self._timeout))
        finally:
            self._end()

    def cancel(self) -> None:
        if not self._open:
            return
        life = self._life
        self._end()
        if life is None or not life.connection.alive:
            return
        try:
            life.connection.stream_cancel(self._id, timeout=self._timeout)
        except (Ckr, DeadlinePassed, *CONNECTION_LOST):
            pass  # its session is closed with the connection, or by the worker itself

    def _end(self) -> None:
        self._open = False
        self._leave()

    def _carry_on(self, part: bytes | Usable) -> bytes:
        result = self._attempt(lambda life: self._send(life, part))
        if self._input is not None:
            self._input.append(part)
            self._kept += len(part) if isinstance(part, bytes) else 0
            if self._kept > self._limit:
                self._input = None
        return result

    def _send(self, life: Life, part: bytes | Usable) -> bytes:
        if isinstance(part, bytes):
            return life.connection.stream_update(self._id, part, timeout=self._timeout)
        if self._member is None:
            raise Missing
        return life.connection.stream_update(self._id, part.handle(self._member, life), timeout=self._timeout)

    def _attempt(self, step: Callable[[Life], bytes]) -> bytes:
        """One step; where the member fails, the input so far goes to another one and the step is repeated there."""
        if not self._open:
            raise Ckr(CKR.OPERATION_NOT_INITIALIZED, f"{self._kind} stream")
        replay = False
        while True:
            member, life = self._member, self._life
            try:
                if replay:
                    member, life = self._replay()
                if member is None or life is None:
                    raise Missing
                return self._produce(step(life))
            except Ckr as error:
                self._decide(member, life, error)
            except DeadlinePassed:
                if member is not None and life is not None:
                    self._roster.timed_out(member, life)
            except CONNECTION_LOST as error:
                if member is not None and life is not None:
                    self._roster.lost(member, life, str(error))
            except Missing:
                pass
            except BaseException:
                self._end()
                raise
            replay = True

    def _decide(self, member: Member | None, life: Life | None, error: Ckr) -> None:
        always = self._key is not None and self._key.always_authenticate
        overrides = member.config.errors if member is not None else {}
        verdict = classify(error.rv, overrides, logged_in=self._logged_in, always_authenticate=always)
        if verdict in _APPLICATION or member is None or life is None:
            self._end()
            raise error
        if verdict is not Verdict.OVERLOAD:
            self._roster.lost(member, life, str(error))

    def _replay(self) -> tuple[Member | None, Life | None]:
        """Start again on another member, and give it the input so far."""
        self._leave()
        self._failed += 1
        if self._failed > _MOST_FAILURES:
            raise CallTimeout("members failed again and again in one multi-part operation; start it again")
        if self._input is None:
            raise StreamTooLong(
                f"the member of this multi-part operation failed after more than {self._limit} bytes, the most that is "
                "kept for a replay ([group] replay_limit); start the operation again"
            )
        self._start()
        member, life = self._member, self._life
        if life is not None:
            self._behind = bytearray()
            for part in self._input:
                self._behind += self._send(life, part)
        return member, life

    def _produce(self, output: bytes) -> bytes:
        """What the caller gets of a step's output: after a replay, only what it did not get before."""
        if self._behind is not None:
            self._behind += output
            given = b"".join(self._given)
            if len(self._behind) < len(given):
                return b""
            if not self._behind.startswith(given):
                raise StreamTooLong("another member gives another output for the same input; start the operation again")
            output, self._behind = bytes(self._behind[len(given) :]), None
        if self._input is None:
            self._given.clear()
        else:
            self._given.append(output)
        return output
