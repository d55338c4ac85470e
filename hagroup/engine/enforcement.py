"""What the protection of the domain's keys rests on, tried on a member with throw-away keys (DESIGN.md 5)."""

from __future__ import annotations

import msgspec

from hagroup.core.attributes import CKA, CKM, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, Handle, Mechanism, SessionId, Template
from hagroup.engine.domain_keys import CARRIER, scratch_session, throw_away_key
from hagroup.members.api import Connection


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
