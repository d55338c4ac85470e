"""Setting up a cloning domain and bringing its two keys to another member (DESIGN.md 5).

The keys travel by RSA-OAEP to a transport key pair that the newcomer made. OAEP authenticates nobody, so the transport
key's fingerprint is compared before and the keys' fingerprints after; then a challenge proves both keys both ways.

Once they are token objects, the keys can be wrapped only by a TRUSTED key, which only the security officer of that
member can make: two people. Where a member does not enforce that, or if the domain is *sealed*, they cannot be wrapped
at all, and later members need the shares.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from hagroup.core.attributes import CKA, CKK, CKM, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, DeadlinePassed, Handle, Mechanism, MemberGone, SessionId, Template, WorkerFault
from hagroup.core.ckr import CKR
from hagroup.engine import transport as transports
from hagroup.engine import unfinished
from hagroup.engine.challenge import NO_DIGEST, DomainMember, challenge
from hagroup.engine.domain_keys import (
    CARRIER,
    DOMAIN_LABEL,
    PARTITION_LABEL,
    DomainKeys,
    scratch_session,
    throw_away_key,
)
from hagroup.engine.enforcement import Enforcement, probe_enforcement
from hagroup.engine.inner_layer import OAEP
from hagroup.engine.token_contents import TRANSPORT_LABEL, find_all
from hagroup.engine.transport import KEY_ID_LENGTH, PublicPart, Transport, check, find_or_make
from hagroup.errors import DomainMismatch
from hagroup.members.api import Connection

_SHA256: Mechanism = (int(CKM.SHA256), None)


# -- the keys' templates -----------------------------------------------------------------------------------------------


def _final(label: bytes, key_id: bytes, *, sealed: bool, enforcement: Enforcement) -> Template:
    """A domain key as it stays on a token. MODIFIABLE last: a template is applied in order."""
    domain = label == DOMAIN_LABEL
    template: Template = [
        (int(CKA.CLASS), pack_ulong(CKO.SECRET_KEY)),
        (int(CKA.KEY_TYPE), pack_ulong(CKK.AES)),
        (int(CKA.TOKEN), pack_bool(True)),
        (int(CKA.PRIVATE), pack_bool(True)),
        (int(CKA.LABEL), label),
        (int(CKA.ID), key_id),
        (int(CKA.SENSITIVE), pack_bool(True)),
        (int(CKA.WRAP), pack_bool(domain)),
        (int(CKA.UNWRAP), pack_bool(domain)),
        (int(CKA.ENCRYPT), pack_bool(not domain)),
        (int(CKA.DECRYPT), pack_bool(not domain)),
        (int(CKA.SIGN), pack_bool(False)),
        (int(CKA.VERIFY), pack_bool(False)),
        (int(CKA.DERIVE), pack_bool(False)),
    ]
    if sealed or not enforcement.wrap_with_trusted:
        template.append((int(CKA.EXTRACTABLE), pack_bool(False)))
    else:
        template += [(int(CKA.EXTRACTABLE), pack_bool(True)), (int(CKA.WRAP_WITH_TRUSTED), pack_bool(True))]
    if domain and enforcement.unwrap_template:
        template.append((int(CKA.UNWRAP_TEMPLATE), [(int(CKA.SENSITIVE), pack_bool(True))]))
    return [*template, (int(CKA.COPYABLE), pack_bool(False)), (int(CKA.MODIFIABLE), pack_bool(False))]


def receive(
    newcomer: DomainMember,
    transport: Transport,
    enforcement: Enforcement,
    wrapped: Sequence[bytes],
    ids: tuple[bytes, bytes],
    *,
    sealed: bool,
    timeout: float,
) -> DomainKeys:
    """The newcomer unwraps both keys as token objects. Leftovers of an earlier attempt go first."""
    connection = newcomer.connection
    made: list[Handle] = []
    labels = (DOMAIN_LABEL, PARTITION_LABEL)
    try:
        for label, key_id, blob in zip(labels, ids, wrapped, strict=True):
            _drop_keys(connection, label, key_id, timeout=timeout)
            template = _final(label, key_id, sealed=sealed, enforcement=enforcement)
            made.append(connection.unwrap(OAEP, transport.private, blob, template, sid=transport.sid, timeout=timeout))
    except BaseException:
        drop(connection, made, timeout=timeout)
        raise
    return _keys(made, ids, newcomer.wrap_mechanism)


def _keys(handles: Sequence[Handle], ids: tuple[bytes, bytes], wrap_mechanism: int) -> DomainKeys:
    return DomainKeys(
        domain=handles[0],
        partition=handles[1],
        domain_key_id=ids[0],
        partition_key_id=ids[1],
        wrap_mechanism=wrap_mechanism,
    )


def drop(connection: Connection, handles: Sequence[Handle], *, timeout: float) -> None:
    """Destroy what was made, as far as the member answers: this runs while another error is under way."""
    for handle in handles:
        try:
            connection.destroy(handle, timeout=timeout)
        except (Ckr, MemberGone, WorkerFault, DeadlinePassed):
            pass


def _drop_keys(connection: Connection, label: bytes, key_id: bytes, *, timeout: float) -> None:
    template: Template = [(int(CKA.LABEL), label), (int(CKA.ID), key_id)]
    drop(connection, find_all(connection, template, timeout=timeout), timeout=timeout)


def _compare(a: Connection, first: Sequence[Handle], b: Connection, second: DomainKeys, *, timeout: float) -> None:
    """The keys' fingerprints on both sides, under one salt."""
    pairs = zip(("domain", "partition"), first, (second.domain, second.partition), strict=True)
    for what, one, other in pairs:
        salt = os.urandom(16)
        try:
            ours = a.digest(_SHA256, [salt, one], timeout=timeout)
            theirs = b.digest(_SHA256, [salt, other], timeout=timeout)
        except Ckr as error:
            if error.rv in NO_DIGEST:
                return  # the challenge that follows says the same in another way
            raise
        if ours != theirs:
            raise DomainMismatch(f"the {what} key that arrived on the new member is not the one that was sent")


# -- making a domain ---------------------------------------------------------------------------------------------------


def new_ids() -> tuple[bytes, bytes]:
    """Names of a new domain and a new partition key: CKA_ID on every member."""
    return os.urandom(KEY_ID_LENGTH), os.urandom(KEY_ID_LENGTH)


def draft(
    connection: Connection, secrets: tuple[bytes, bytes] | None, *, sid: SessionId, timeout: float
) -> list[Handle]:
    """Both keys as session objects that can be wrapped: generated, or put together from what people hold shares of."""
    if secrets is None:
        return [throw_away_key(connection, sid=sid, timeout=timeout) for _ in range(2)]
    return [connection.create([*CARRIER, (int(CKA.VALUE), one)], sid=sid, timeout=timeout) for one in secrets]


def wrap_to(
    connection: Connection, drafts: Sequence[Handle], public: PublicPart, *, sid: SessionId, timeout: float
) -> tuple[bytes, bytes]:
    """Both keys, for the owner of a transport key."""
    handle = connection.create(public.template(token=False, trusted=False), sid=sid, timeout=timeout)
    check(connection, handle, public, sid=sid, timeout=timeout)
    first, second = (connection.wrap(OAEP, handle, one, sid=sid, timeout=timeout) for one in drafts)
    return first, second


def hand_out(
    source: Connection,
    sid: SessionId,
    drafts: Sequence[Handle],
    ids: tuple[bytes, bytes],
    members: Sequence[DomainMember],
    *,
    sealed: bool,
    timeout: float,
) -> list[DomainKeys]:
    """Bring drafts in ``sid`` of ``source`` to these members, in the same order; nothing stays if it fails."""
    done: list[tuple[DomainMember, DomainKeys]] = []
    paired: list[Connection] = []
    try:
        for member in members:
            connection = member.connection
            if transports.find(connection, timeout=timeout) is None:
                paired.append(connection)
            enforcement = probe_enforcement(connection, member.wrap_mechanism, timeout=timeout)
            with scratch_session(connection, timeout=timeout) as inner:
                transport = find_or_make(connection, enforcement, sid=inner, sealed=sealed, timeout=timeout)
                wrapped = wrap_to(source, drafts, transport.public, sid=sid, timeout=timeout)
                keys = receive(member, transport, enforcement, wrapped, ids, sealed=sealed, timeout=timeout)
                done.append((member, keys))
                _compare(source, drafts, connection, keys, timeout=timeout)
        for member, keys in done[1:]:
            challenge(done[0][0], done[0][1], member, keys, timeout=timeout)
    except BaseException:
        for member, keys in done:
            drop(member.connection, [keys.domain, keys.partition], timeout=timeout)
        for connection in paired:
            drop(connection, transports.own(connection, timeout=timeout), timeout=timeout)
        raise
    return [keys for _, keys in done]


def generate_domain(
    members: Sequence[DomainMember], *, sealed: bool, timeout: float, secrets: tuple[bytes, bytes] | None = None
) -> list[DomainKeys]:
    """Make a new domain on these members at once, in the same order; nothing stays where it fails on one.

    The keys are generated as session objects in the first member and go, from there, to every member alike: so a sealed
    domain can begin on several members without its keys ever being outside of one.

    :param secrets: both keys, where people are to hold shares of them: said plainly, these are in the host then.
    """
    source, ids = members[0].connection, new_ids()
    try:
        for member in members:
            unfinished.mark(member.connection, ids, timeout=timeout)
        with scratch_session(source, timeout=timeout) as sid:
            drafts = draft(source, secrets, sid=sid, timeout=timeout)
            keys = hand_out(source, sid, drafts, ids, members, sealed=sealed, timeout=timeout)
    except BaseException:
        for member in members:
            with contextlib.suppress(Ckr, MemberGone, WorkerFault, DeadlinePassed):
                unfinished.clear(member.connection, ids, timeout=timeout)
        raise
    for member in members:
        unfinished.clear(member.connection, (), timeout=timeout)
    return keys


def import_domain(
    member: DomainMember,
    domain_secret: bytes,
    partition_secret: bytes,
    ids: tuple[bytes, bytes],
    *,
    sealed: bool,
    timeout: float,
) -> DomainKeys:
    """Make the keys from secrets that people put together from shares: said plainly, these are in the host then."""
    connection = member.connection
    enforcement = probe_enforcement(connection, member.wrap_mechanism, timeout=timeout)
    made: list[Handle] = []
    pairs = zip((DOMAIN_LABEL, PARTITION_LABEL), ids, (domain_secret, partition_secret), strict=True)
    try:
        for label, key_id, secret in pairs:
            _drop_keys(connection, label, key_id, timeout=timeout)
            template = _final(label, key_id, sealed=sealed, enforcement=enforcement)
            made.append(connection.create([*template[:-1], (int(CKA.VALUE), secret), template[-1]], timeout=timeout))
    except BaseException:
        drop(connection, made, timeout=timeout)
        raise
    return _keys(made, ids, member.wrap_mechanism)


def join_domain(
    source: DomainMember,
    source_keys: DomainKeys,
    source_officer: Connection,
    newcomer: DomainMember,
    *,
    timeout: float,
) -> DomainKeys:
    """Bring an existing member's keys to a new one.

    :param source_officer: a second connection to the existing member (another process: user and security officer cannot
        be logged in in one), where the security officer is logged in.
    """
    connection, receiver = source.connection, newcomer.connection
    before = transports.own(receiver, timeout=timeout)
    enforcement = probe_enforcement(receiver, newcomer.wrap_mechanism, timeout=timeout)
    made: list[Handle] = []
    try:
        with scratch_session(receiver, timeout=timeout) as sid:
            transport = find_or_make(receiver, enforcement, sid=sid, sealed=False, timeout=timeout)
            wrapped = wrap_by_trusted(
                source, source_keys, source_officer, f'member "{newcomer.name}"', transport.public, timeout=timeout
            )
            ids = (source_keys.domain_key_id, source_keys.partition_key_id)
            keys = receive(newcomer, transport, enforcement, wrapped, ids, sealed=False, timeout=timeout)
            made += [keys.domain, keys.partition]
        _compare(connection, [source_keys.domain, source_keys.partition], receiver, keys, timeout=timeout)
        challenge(source, source_keys, newcomer, keys, timeout=timeout)
    except BaseException:
        pairs = [handle for handle in transports.own(receiver, timeout=timeout) if handle not in before]
        drop(receiver, [*made, *pairs], timeout=timeout)
        raise
    return keys


def wrap_by_trusted(
    source: DomainMember,
    source_keys: DomainKeys,
    source_officer: Connection,
    receiver: str,
    public: PublicPart,
    *,
    timeout: float,
) -> list[bytes]:
    """Both keys of an existing member, for the owner of a transport key that its security officer trusts.

    :raises DomainMismatch: they cannot leave it.
    """
    connection = source.connection
    # A session object of the officer's process would not show in the user's: so it is on the token for a moment.
    leftovers = find_all(source_officer, [(int(CKA.LABEL), TRANSPORT_LABEL)], timeout=timeout)
    drop(source_officer, leftovers, timeout=timeout)
    officers = source_officer.create(public.template(token=True, trusted=True), timeout=timeout)
    try:
        trusted = _trusted(connection, public, timeout=timeout)
        return [
            connection.wrap(OAEP, trusted, key, timeout=timeout) for key in (source_keys.domain, source_keys.partition)
        ]
    except Ckr as error:
        if error.rv in (CKR.KEY_UNEXTRACTABLE, CKR.KEY_NOT_WRAPPABLE):
            raise DomainMismatch(
                f'the keys of the domain are sealed in member "{source.name}" and cannot be handed on; '
                f"{receiver} gets them from the shares (`ha-admin domain join --shares`)"
            ) from error
        raise
    finally:
        source_officer.destroy(officers, timeout=timeout)


def _trusted(connection: Connection, public: PublicPart, *, timeout: float) -> Handle:
    """The officer's public key as the user sees it."""
    template: Template = [
        (int(CKA.CLASS), pack_ulong(CKO.PUBLIC_KEY)),
        (int(CKA.LABEL), TRANSPORT_LABEL),
        (int(CKA.ID), public.fingerprint[:KEY_ID_LENGTH]),
    ]
    found = find_all(connection, template, timeout=timeout)
    if len(found) != 1:
        raise DomainMismatch(
            f"the user of the existing member sees {len(found)} transport keys where the security officer made one"
        )
    check(connection, found[0], public, timeout=timeout)
    return found[0]
