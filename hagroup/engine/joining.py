"""Setting up a cloning domain and bringing its two keys to another member (DESIGN.md 5).

The keys travel by RSA-OAEP to a transport key pair that the newcomer made. OAEP authenticates nobody, so the transport
key's fingerprint is compared before and the keys' fingerprints after; then a challenge proves both keys both ways.

Once they are token objects, the keys can be wrapped only by a TRUSTED key, which only the security officer of that
member can make: two people. Where a member does not enforce that, or if the domain is *sealed*, they cannot be wrapped at
all, and later members need the shares.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from hagroup.core.attributes import CKA, CKK, CKM, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, DeadlinePassed, Handle, Mechanism, MemberGone, SessionId, Template, WorkerFault
from hagroup.core.ckr import CKR
from hagroup.core.records import ObjectRecord, ObjectState
from hagroup.engine.domain import open_envelope, seal
from hagroup.engine.domain_keys import (
    CARRIER,
    DOMAIN_LABEL,
    PARTITION_LABEL,
    DomainKeys,
    IntegrityAlarm,
    scratch_session,
    throw_away_key,
)
from hagroup.engine.proof import public_digest
from hagroup.engine.token_contents import TRANSPORT_LABEL, find_all
from hagroup.errors import DomainMismatch
from hagroup.members.api import Connection

KEY_ID_LENGTH = 16
_TRANSPORT_BITS = 3072
_OAEP: Mechanism = (int(CKM.RSA_PKCS_OAEP), ["oaep", int(CKM.SHA_1), 1, None])
"""SHA-1 without a label: the one form that SoftHSM has. OAEP does not need its hash to be free of collisions."""
_SHA256: Mechanism = (int(CKM.SHA256), None)
_NO_DIGEST = (CKR.KEY_INDIGESTIBLE, CKR.FUNCTION_NOT_SUPPORTED, CKR.MECHANISM_INVALID)


class Enforcement(msgspec.Struct, frozen=True):
    """What a member enforces, found by trying."""

    wrap_with_trusted: bool
    """A WRAP_WITH_TRUSTED key cannot be wrapped by a key that is not TRUSTED."""
    unwrap_template: bool
    """What a key with UNWRAP_TEMPLATE {SENSITIVE: true} unwraps is SENSITIVE."""
    fixed: bool
    """A key with MODIFIABLE = false cannot be given DECRYPT."""


def probe_enforcement(connection: Connection, wrap_mechanism: int, *, timeout: float) -> Enforcement:
    """Try, with throw-away keys, what the protection of the domain's keys rests on."""
    wrap: Mechanism = (int(wrap_mechanism), None)
    generate: Mechanism = (int(CKM.AES_KEY_GEN), None)
    length = (int(CKA.VALUE_LEN), pack_ulong(32))
    with scratch_session(connection, timeout=timeout) as sid:
        plain = throw_away_key(connection, sid=sid, timeout=timeout)

        def refused(attributes: Template, attempt: str) -> bool:
            try:
                template: Template = [*CARRIER, length, *attributes]
                key = connection.generate(generate, template, sid=sid, timeout=timeout)
                if attempt == "wrap":
                    connection.wrap(wrap, plain, key, sid=sid, timeout=timeout)
                elif attempt == "set":
                    connection.set(key, [(int(CKA.LABEL), b"x")], sid=sid, timeout=timeout)
            except Ckr:
                return True
            return False

        trusted: Template = [(int(CKA.WRAP_WITH_TRUSTED), pack_bool(True))]
        fixed: Template = [(int(CKA.MODIFIABLE), pack_bool(False))]
        return Enforcement(
            wrap_with_trusted=not refused(trusted, "make") and refused(trusted, "wrap"),
            unwrap_template=_enforces_unwrap_template(connection, wrap, plain, sid=sid, timeout=timeout),
            fixed=not refused(fixed, "make") and refused(fixed, "set"),
        )


def _enforces_unwrap_template(
    connection: Connection, wrap: Mechanism, key: Handle, *, sid: SessionId, timeout: float
) -> bool:
    restricted: Template = [
        *CARRIER,
        (int(CKA.VALUE_LEN), pack_ulong(32)),
        (int(CKA.UNWRAP_TEMPLATE), [(int(CKA.SENSITIVE), pack_bool(True))]),
    ]
    clear = [item for item in CARRIER if item[0] != CKA.SENSITIVE]
    try:
        unwrapping = connection.generate((int(CKM.AES_KEY_GEN), None), restricted, sid=sid, timeout=timeout)
        wrapped = connection.wrap(wrap, unwrapping, key, sid=sid, timeout=timeout)
    except Ckr:
        return False
    try:
        template: Template = [*clear, (int(CKA.SENSITIVE), pack_bool(False))]
        connection.unwrap(wrap, unwrapping, wrapped, template, sid=sid, timeout=timeout)
    except Ckr:
        return True
    return False


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


class Newcomer(msgspec.Struct, frozen=True, kw_only=True):
    """A member that gets the keys; its user is logged in."""

    connection: Connection
    name: str
    wrap_mechanism: int = CKM.AES_KEY_WRAP_PAD


class _Transport(msgspec.Struct, frozen=True):
    """A transport key pair in the newcomer, session objects of its session ``sid``."""

    sid: SessionId
    private: Handle
    modulus: bytes
    exponent: bytes

    def public_template(self, *, token: bool, trusted: bool) -> Template:
        return [
            (int(CKA.CLASS), pack_ulong(CKO.PUBLIC_KEY)),
            (int(CKA.KEY_TYPE), pack_ulong(CKK.RSA)),
            (int(CKA.TOKEN), pack_bool(token)),
            (int(CKA.PRIVATE), pack_bool(False)),
            (int(CKA.LABEL), TRANSPORT_LABEL),
            (int(CKA.ID), self.fingerprint[:KEY_ID_LENGTH]),
            (int(CKA.MODULUS), self.modulus),
            (int(CKA.PUBLIC_EXPONENT), self.exponent),
            (int(CKA.WRAP), pack_bool(True)),
            *([(int(CKA.TRUSTED), pack_bool(True))] if trusted else []),
        ]

    @property
    def fingerprint(self) -> bytes:
        return public_digest({CKA.MODULUS: self.modulus, CKA.PUBLIC_EXPONENT: self.exponent}, CKO.PUBLIC_KEY)


def _make_transport(connection: Connection, sid: SessionId, *, timeout: float) -> _Transport:
    public, private = connection.generate_pair(
        (int(CKM.RSA_PKCS_KEY_PAIR_GEN), None),
        [
            (int(CKA.TOKEN), pack_bool(False)),
            (int(CKA.MODULUS_BITS), pack_ulong(_TRANSPORT_BITS)),
            (int(CKA.PUBLIC_EXPONENT), b"\x01\x00\x01"),
            (int(CKA.WRAP), pack_bool(True)),
        ],
        [
            (int(CKA.TOKEN), pack_bool(False)),
            (int(CKA.PRIVATE), pack_bool(True)),
            (int(CKA.SENSITIVE), pack_bool(True)),
            (int(CKA.EXTRACTABLE), pack_bool(False)),
            (int(CKA.UNWRAP), pack_bool(True)),
        ],
        sid=sid,
        timeout=timeout,
    )
    values, _ = connection.get(public, [int(CKA.MODULUS), int(CKA.PUBLIC_EXPONENT)], sid=sid, timeout=timeout)
    return _Transport(sid, private, values[CKA.MODULUS], values[CKA.PUBLIC_EXPONENT])


def _check_transport(
    connection: Connection, public: Handle, transport: _Transport, *, sid: SessionId = 0, timeout: float
) -> None:
    values, _ = connection.get(public, [int(CKA.MODULUS), int(CKA.PUBLIC_EXPONENT)], sid=sid, timeout=timeout)
    if public_digest(values, CKO.PUBLIC_KEY) != transport.fingerprint:
        raise DomainMismatch("the transport key on the existing member is not the one that the new member made")


def _receive(
    newcomer: Newcomer,
    transport: _Transport,
    wrapped: Sequence[bytes],
    ids: tuple[bytes, bytes],
    *,
    sealed: bool,
    timeout: float,
) -> DomainKeys:
    """The newcomer unwraps both keys as token objects. Leftovers of an earlier attempt go first."""
    connection = newcomer.connection
    enforcement = probe_enforcement(connection, newcomer.wrap_mechanism, timeout=timeout)
    made: list[Handle] = []
    labels = (DOMAIN_LABEL, PARTITION_LABEL)
    try:
        for label, key_id, blob in zip(labels, ids, wrapped, strict=True):
            _drop_keys(connection, label, key_id, timeout=timeout)
            template = _final(label, key_id, sealed=sealed, enforcement=enforcement)
            made.append(connection.unwrap(_OAEP, transport.private, blob, template, sid=transport.sid, timeout=timeout))
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
            if error.rv in _NO_DIGEST:
                return  # the challenge that follows says the same in another way
            raise
        if ours != theirs:
            raise DomainMismatch(f"the {what} key that arrived on the new member is not the one that was sent")


# -- making a domain ---------------------------------------------------------------------------------------------------


def generate_domain(members: Sequence[Newcomer], *, sealed: bool, timeout: float) -> list[DomainKeys]:
    """Make a new domain on these members at once, in the same order; nothing stays where it fails on one.

    The keys are generated as session objects in the first member and go, from there, to every member alike: so a sealed
    domain can begin on several members without its keys ever being outside of one.
    """
    source = members[0].connection
    ids = (os.urandom(KEY_ID_LENGTH), os.urandom(KEY_ID_LENGTH))
    done: list[tuple[Newcomer, DomainKeys]] = []
    with scratch_session(source, timeout=timeout) as sid:
        drafts = [throw_away_key(source, sid=sid, timeout=timeout) for _ in ids]
        try:
            for member in members:
                with scratch_session(member.connection, timeout=timeout) as inner:
                    transport = _make_transport(member.connection, inner, timeout=timeout)
                    template = transport.public_template(token=False, trusted=False)
                    public = source.create(template, sid=sid, timeout=timeout)
                    _check_transport(source, public, transport, sid=sid, timeout=timeout)
                    wrapped = [source.wrap(_OAEP, public, draft, sid=sid, timeout=timeout) for draft in drafts]
                    keys = _receive(member, transport, wrapped, ids, sealed=sealed, timeout=timeout)
                    done.append((member, keys))
                    _compare(source, drafts, member.connection, keys, timeout=timeout)
            for member, keys in done[1:]:
                challenge(done[0][0], done[0][1], member, keys, timeout=timeout)
        except BaseException:
            for member, keys in done:
                drop(member.connection, [keys.domain, keys.partition], timeout=timeout)
            raise
    return [keys for _, keys in done]


def import_domain(
    member: Newcomer,
    domain_secret: bytes,
    partition_secret: bytes,
    ids: tuple[bytes, bytes],
    *,
    sealed: bool,
    timeout: float,
) -> DomainKeys:
    """Make the keys from secrets that people put together from their shares: said plainly, these are in the host then."""
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
    source: Newcomer,
    source_keys: DomainKeys,
    source_officer: Connection,
    newcomer: Newcomer,
    *,
    timeout: float,
) -> DomainKeys:
    """Bring an existing member's keys to a new one.

    :param source_officer: a second connection to the existing member (another process: user and security officer cannot
        be logged in in one), where the security officer is logged in.
    """
    connection = source.connection
    with scratch_session(newcomer.connection, timeout=timeout) as sid:
        transport = _make_transport(newcomer.connection, sid, timeout=timeout)
        # A session object of the officer's process would not show in the user's: so it is on the token for a moment.
        template = transport.public_template(token=True, trusted=True)
        officers = source_officer.create(template, timeout=timeout)
        try:
            public = _trusted(connection, transport, timeout=timeout)
            wrapped = [
                connection.wrap(_OAEP, public, key, timeout=timeout)
                for key in (source_keys.domain, source_keys.partition)
            ]
        except Ckr as error:
            if error.rv in (CKR.KEY_UNEXTRACTABLE, CKR.KEY_NOT_WRAPPABLE):
                raise DomainMismatch(
                    f'the keys of the domain are sealed in member "{source.name}" and cannot be handed on; '
                    f'member "{newcomer.name}" gets them from the shares (`ha-admin domain join --shares`)'
                ) from error
            raise
        finally:
            source_officer.destroy(officers, timeout=timeout)
        ids = (source_keys.domain_key_id, source_keys.partition_key_id)
        keys = _receive(newcomer, transport, wrapped, ids, sealed=False, timeout=timeout)
    try:
        _compare(
            connection,
            [source_keys.domain, source_keys.partition],
            newcomer.connection,
            keys,
            timeout=timeout,
        )
        challenge(source, source_keys, newcomer, keys, timeout=timeout)
    except BaseException:
        drop(newcomer.connection, [keys.domain, keys.partition], timeout=timeout)
        raise
    return keys


def _trusted(connection: Connection, transport: _Transport, *, timeout: float) -> Handle:
    """The officer's public key as the user sees it."""
    template: Template = [
        (int(CKA.CLASS), pack_ulong(CKO.PUBLIC_KEY)),
        (int(CKA.LABEL), TRANSPORT_LABEL),
        (int(CKA.ID), transport.fingerprint[:KEY_ID_LENGTH]),
    ]
    found = find_all(connection, template, timeout=timeout)
    if len(found) != 1:
        raise DomainMismatch(
            f"the user of the existing member sees {len(found)} transport keys where the security officer made one"
        )
    _check_transport(connection, found[0], transport, timeout=timeout)
    return found[0]


# -- proving that two members share a domain ---------------------------------------------------------------------------

_TRIAL_UID = b"hagroup trial".ljust(16, b"\0")


def _trial_record(attributes: dict[int, bytes], envelope: bytes | None = None) -> ObjectRecord:
    return ObjectRecord(
        uid=_TRIAL_UID,
        object_class=CKO.SECRET_KEY,
        key_type=CKK.AES,
        state=ObjectState.LIVE,
        revision=0,
        attributes=attributes,
        envelope=envelope,
    )


def _digest(connection: Connection, sid: SessionId, salt: bytes, key: Handle, *, timeout: float) -> bytes:
    """Empty where the member cannot."""
    try:
        return connection.digest(_SHA256, [salt, key], sid=sid, timeout=timeout)
    except Ckr as error:
        if error.rv in _NO_DIGEST:
            return b""
        raise


def reference_envelope(connection: Connection, keys: DomainKeys, *, timeout: float) -> bytes:
    """An envelope of a throw-away key, with what tells that it was opened right: opens only with both keys (G9)."""
    salt = os.urandom(16)
    with scratch_session(connection, timeout=timeout) as sid:
        key = throw_away_key(connection, sid=sid, timeout=timeout)
        digest = _digest(connection, sid, salt, key, timeout=timeout)
        attributes = {int(CKA.LABEL): salt, int(CKA.CHECK_VALUE): digest}
        envelope = seal(
            connection,
            keys,
            sid,
            key,
            uid=_TRIAL_UID,
            revision=0,
            object_class=CKO.SECRET_KEY,
            key_type=CKK.AES,
            attributes=attributes,
            timeout=timeout,
        )
    return msgspec.msgpack.encode([salt, digest, envelope])


def open_reference(connection: Connection, keys: DomainKeys, reference: bytes, *, timeout: float) -> None:
    """Prove a member's keys by a reference envelope.

    :raises DomainMismatch: a key of the domain differs; the text says which.
    """
    try:
        salt, digest, envelope = msgspec.msgpack.decode(reference, type=tuple[bytes, bytes, bytes])
    except msgspec.DecodeError:
        raise IntegrityAlarm("the reference envelope is damaged") from None
    record = _trial_record({int(CKA.LABEL): salt, int(CKA.CHECK_VALUE): digest}, envelope)
    with scratch_session(connection, timeout=timeout) as sid:
        try:
            key = open_envelope(connection, keys, sid, record, CARRIER, timeout=timeout)
        except IntegrityAlarm as error:
            raise DomainMismatch(
                "the partition secret differs: the outer layer of an envelope that a member of the group made does not "
                "open on this one"
            ) from error
        found = _digest(connection, sid, salt, key, timeout=timeout)
    if digest and found and found != digest:
        raise DomainMismatch("the domain key differs: an envelope opens on this member to another key")


def challenge(one: Newcomer, one_keys: DomainKeys, other: Newcomer, other_keys: DomainKeys, *, timeout: float) -> None:
    """Prove that two members share both secrets: each opens what the other sealed.

    :raises DomainMismatch: they do not; the text says which members and which secret (T 3.4.12, T 3.4.13).
    """
    for sender, sender_keys, receiver, receiver_keys in (
        (one, one_keys, other, other_keys),
        (other, other_keys, one, one_keys),
    ):
        reference = reference_envelope(sender.connection, sender_keys, timeout=timeout)
        try:
            open_reference(receiver.connection, receiver_keys, reference, timeout=timeout)
        except DomainMismatch as error:
            raise DomainMismatch(
                f'member "{receiver.name}" does not share the domain of member "{sender.name}": {error}'
            ) from error
