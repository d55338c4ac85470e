"""One member as this process sees and uses it: its state, and the life of its present connection."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Protocol

from hagroup.config.model import MemberConfig
from hagroup.core.calls import Handle
from hagroup.core.records import LoginState
from hagroup.core.states import Event, State, next_state
from hagroup.engine.domain import DomainKeys
from hagroup.engine.handles import Handles
from hagroup.members.api import Connection, MechanismInfo, TokenInfo


class Life:
    """One life of a member's module, with everything that ends with it: handles above all (DESIGN.md 8, trap 10).

    A call takes the life once and uses nothing of another; so a handle can never meet a later connection, where the
    same number may name another key.
    """

    __slots__ = (
        "began",
        "configuration",
        "connection",
        "handles",
        "keys",
        "keys_renewed",
        "logged_in",
        "manifest_epoch",
        "manifest_head",
        "manifest_high",
        "manifest_low",
        "manifest_sealed",
        "mechanisms",
        "proved_since_low",
        "resynced",
        "started",
        "token",
        "worker",
    )

    def __init__(
        self,
        connection: Connection,
        worker: str | None,
        token: TokenInfo,
        mechanisms: Mapping[int, MechanismInfo],
    ) -> None:
        self.connection = connection
        self.worker = worker
        """Lock name by which others can prove this worker dead."""
        self.token = token
        self.mechanisms = mechanisms
        self.started = 0.0
        """Boot time before its module was initialised: it sees what was on the token then."""
        self.began = 0
        """Newest change number at that time."""
        self.logged_in = False
        self.keys: DomainKeys | None = None
        """The domain's two keys; None until logged in."""
        self.keys_renewed = b""
        """Name of the domain key beside which this life saw no replaced ones on the token."""
        self.handles = Handles()
        """UID to handle of token objects found in this life."""
        self.manifest_epoch = ""
        """Epoch that the token's manifest shows; empty: it shows none."""
        self.manifest_high = 0
        """Newest change number that the manifest on the token is known to show."""
        self.manifest_low = 0
        """Every change up to here is finished there, as the token's own manifest says."""
        self.manifest_sealed = 0
        """Number of the last sealed event that the token's manifest knows of."""
        self.manifest_head = b""
        self.configuration: object = None
        """What was last seen to be shown by the token's configuration, or could not be put there."""
        self.resynced = False
        """A resync in this life came to its end, whatever that was."""
        self.proved_since_low = False
        """What moved since was looked for in this life."""


class Member:
    """A member and what this process holds of it. ``life`` is None whenever it is not connected."""

    def __init__(self, config: MemberConfig, *, rank: tuple[int, int], standby: bool) -> None:
        self.config = config
        self.name = config.name
        self.state = State.JOINING
        self.life: Life | None = None
        self.reason: str | None = None
        """Why it is not in service, for people."""
        self.outstanding = 0
        self.last_used = 0
        self.standby = standby
        self.rank = rank
        self.admitted = False
        """The journal admits it, its role serves, and it is not draining."""
        self.failures = 0
        """Connection attempts in a row that failed; the wait before the next one grows with it."""
        self.next_attempt = 0.0
        """Boot time before which no connection is tried."""
        self.entered = 0.0
        """Boot time at which its present (or last) life began."""
        self.answers = 0
        """Calls that succeeded; threads may lose counts against each other, it only has to move."""
        self.last_success = 0.0
        """Boot time at which the supervisor last saw ``answers`` moved, or a connection or probe succeeded."""
        self.rests = 0
        """How often in a row a call's deadline passed although the probe that followed was answered."""
        self.missed: dict[bytes, float] = {}
        """UIDs that were not found, with the start of the life in which they were not (see ``Roster.look_again``)."""
        self.looked_at_again = False
        """It is being connected anew for that (see ``Roster.look_again``): it will be there in a moment."""
        self.rest_until = 0.0
        """Boot time up to which it gets calls only where nobody else can serve them (while ``rests`` is not 0)."""
        self.busy = False
        """A background task (connect, probe, resync) is running for it."""
        self.unreported_login: tuple[LoginState | None] | None = None
        """Outcome of this process's last C_Login where the journal could not be told."""
        self.learning = False
        """It is just looking for the domain's new keys."""
        self.keyless: Life | None = None
        """The last life, if the domain's keys were not found in it (see ``Roster.find_keys``)."""
        self.manifest_lock = threading.Lock()
        self.journal_behind: str | None = None
        """Why no change may be made: this member's manifest shows more than the journal knows (DESIGN.md 4.6)."""

    def renew_after_fork(self) -> None:
        """In the child: not connected; what stands in the way of serving for good stays."""
        self.life = None
        self.outstanding = 0
        self.busy = self.learning = self.looked_at_again = False
        self.failures = 0
        self.next_attempt = 0.0
        self.rests = 0
        self.unreported_login = None
        self.keyless = None
        self.manifest_lock = threading.Lock()
        if self.state is not State.QUARANTINED:
            self.state = State.JOINING

    @property
    def serving(self) -> bool:
        """May get calls now."""
        return self.state is State.IN_SERVICE and self.admitted and self.life is not None

    @property
    def about_to_be_resynced(self) -> bool:
        """It was just logged in to, and has to be brought up to date before it serves."""
        life = self.life
        return self.state is State.RESYNCING and life is not None and life.keys is not None and not life.resynced

    def happened(self, event: Event) -> bool:
        """Apply ``event``; True when the state changed by it."""
        before = self.state
        self.state = next_state(before, event)
        return self.state is not before


class Missing(Exception):
    """The object is not on this member although the journal has it there."""

    def __init__(self, uid: bytes | None = None) -> None:
        super().__init__()
        self.uid = uid
        """The token object of which nothing was found."""


class Usable(Protocol):
    """An object that an operation uses: a token object of the journal or a session object of this process."""

    @property
    def always_authenticate(self) -> bool:
        """A PIN comes with each operation on it."""

    def on(self, member: Member) -> bool:
        """Whether it can be used on this member now."""

    def handle(self, member: Member, life: Life) -> Handle:
        """Its handle in this life; raises :class:`Missing`."""

    def forget(self, member: Member, life: Life) -> None:
        """The member says that the handle is stale."""

    def missing(self, member: Member) -> None:
        """It is not there: have it repaired."""

    def renew(self) -> bool:
        """Read it again. True: it, or who has it, moved since it was read; raises Ckr where it is gone."""

    @property
    def changing(self) -> bool:
        """Somebody is changing it just now: who has it will move."""

    def suspect_replica(self, member: Member) -> None:
        """Another member could use it, this one could not: have it proved."""
