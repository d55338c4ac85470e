"""Shares of the domain's secrets for people: SLIP-39, M of N for each secret (DESIGN.md 5).

Said plainly (G8): while shares are made or put together, both secrets are in this process. They go nowhere else.
The library is loaded when it is used: most commands, and nearly every program, need no shares.
"""

from __future__ import annotations

import re

import msgspec

from hagroup.core.attributes import CKA, CKK, CKO, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, Template
from hagroup.engine import transport
from hagroup.engine.challenge import DomainMember, open_reference
from hagroup.engine.domain_keys import CARRIER, DomainKeys, scratch_session
from hagroup.engine.enforcement import Enforcement
from hagroup.engine.inner_layer import OAEP
from hagroup.engine.joining import wrap_by_trusted
from hagroup.errors import ConfigurationError, DomainMismatch
from hagroup.members.api import Connection

SECRETS = ("domain key", "partition key")
_MOST = 16
_LENGTH = 32


class Scheme(msgspec.Struct, frozen=True):
    """So many of so many people are needed, for each secret."""

    needed: int
    of: int


def scheme(text: str) -> Scheme:
    """From ``2-of-3``. :raises ConfigurationError: it is none."""
    found = re.fullmatch(r"(\d{1,2})-of-(\d{1,2})", text)
    if found is None:
        raise ConfigurationError(f"--shares {text}: write M-of-N, for example 2-of-3")
    needed, of = int(found[1]), int(found[2])
    if not 2 <= needed <= of <= _MOST:
        raise ConfigurationError(f"--shares {text}: at least 2 are needed, of at most {_MOST}")
    return Scheme(needed, of)


def split(secret: bytes, how: Scheme) -> list[str]:
    """One line of words for each person."""
    import shamir_mnemonic

    groups = shamir_mnemonic.generate_mnemonics(1, [(how.needed, how.of)], secret)
    return list(groups[0])


def needed_for(words: str) -> tuple[int, int]:
    """(what tells its set from another one, how many of the set are needed), from one share.

    :raises ConfigurationError: a word is wrong or missing; the share is not shown.
    """
    from shamir_mnemonic import MnemonicError, Share

    try:
        share = Share.from_mnemonic(words)
    except (MnemonicError, ValueError):
        raise ConfigurationError("this is no share: a word is wrong or missing (it carries a checksum)") from None
    return share.identifier, share.member_threshold


def combine(shares: list[str], what: str) -> bytes:
    """:raises ConfigurationError: they do not make up one secret."""
    from shamir_mnemonic import MnemonicError, combine_mnemonics

    try:
        secret: bytes = combine_mnemonics(shares)
    except (MnemonicError, ValueError):
        raise ConfigurationError(
            f"these shares of the {what} do not go together: too few, one of them twice, or from different sets"
        ) from None
    if len(secret) != _LENGTH:
        raise ConfigurationError(f"these shares are not those of a {what}: the secret has another length")
    return secret


def prove(
    member: DomainMember,
    secrets: tuple[bytes, bytes],
    reference: bytes,
    group_keys: tuple[bytes, bytes],
    *,
    timeout: float,
) -> None:
    """Whether the secrets are the group's: they open its reference envelope, as session keys of a member.

    :raises DomainMismatch: they are not; the text says which.
    """
    connection = member.connection
    with scratch_session(connection, timeout=timeout) as sid:
        made = [connection.create([*CARRIER, (int(CKA.VALUE), one)], sid=sid, timeout=timeout) for one in secrets]
        keys = DomainKeys(
            domain=made[0],
            partition=made[1],
            domain_key_id=group_keys[0],
            partition_key_id=group_keys[1],
            wrap_mechanism=member.wrap_mechanism,
        )
        try:
            open_reference(connection, keys, reference, timeout=timeout)
        except DomainMismatch as error:
            raise DomainMismatch(f"the shares are not those of this group's present keys: {error}") from error


def read_secrets(member: DomainMember, keys: DomainKeys, officer: Connection, *, timeout: float) -> tuple[bytes, bytes]:
    """Both secrets out of a member: its user and its security officer together.

    :raises DomainMismatch: they are sealed in it.
    """
    connection = member.connection
    with scratch_session(connection, timeout=timeout) as sid:
        # a pair for this session only: the token's own one lets nothing come out readable
        pair = transport.find_or_make(
            connection, Enforcement(False, False, False), sid=sid, sealed=False, timeout=timeout
        )
        wrapped = wrap_by_trusted(member, keys, officer, "the host", pair.public, timeout=timeout)
        readable: Template = [
            (int(CKA.CLASS), pack_ulong(CKO.SECRET_KEY)),
            (int(CKA.KEY_TYPE), pack_ulong(CKK.AES)),
            (int(CKA.TOKEN), pack_bool(False)),
            (int(CKA.SENSITIVE), pack_bool(False)),
            (int(CKA.EXTRACTABLE), pack_bool(True)),
        ]
        values = []
        for one in wrapped:
            try:
                key = connection.unwrap(OAEP, pair.private, one, readable, sid=sid, timeout=timeout)
                value, _ = connection.get(key, [int(CKA.VALUE)], sid=sid, timeout=timeout)
                values.append(value[CKA.VALUE])
            except (Ckr, KeyError) as error:
                raise DomainMismatch(f'member "{member.name}" does not let its secrets be read') from error
    return values[0], values[1]


def random_secrets(connection: Connection, *, timeout: float) -> tuple[bytes, bytes]:
    """Two new ones, by a member's random number generator."""
    return tuple(connection.random(_LENGTH, timeout=timeout) for _ in SECRETS)  # type: ignore[return-value]
