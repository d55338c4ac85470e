"""Two members with a domain, objects of every kind made as the engine makes them, and a plain look at a token."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hagroup.core.attributes import CKA, CKK, CKO, pack_bool, pack_ulong, unpack_bool, unpack_ulong
from hagroup.core.calls import Handle, SessionId, Template
from hagroup.core.records import ObjectRecord, ObjectState
from hagroup.core.templates import final_attributes, scratch_template
from hagroup.engine import replica
from hagroup.engine.challenge import DomainMember
from hagroup.engine.domain import DomainKeys, seal, seal_private_data
from hagroup.engine.domain_keys import scratch_session
from hagroup.engine.joining import generate_domain
from hagroup.engine.proof import fingerprint
from hagroup.members import ConnectionSettings, open_connection
from hagroup.members.api import Connection
from tests.support.softhsm import TokenFixture, make_token, token_folder

T = 30.0
P256 = bytes.fromhex("06082a8648ce3d030107")
P384 = bytes.fromhex("06052b81040022")
ED25519 = b"\x13\x0cedwards25519"
_generation = itertools.count(1)


def connect(token: TokenFixture, *, officer: bool = False, isolation: str = "none") -> Connection:
    settings = ConnectionSettings(
        name=token.label, module=token.module, env=token.env, token_serial=token.serial, token_label=None
    )
    connection = open_connection(settings, generation=next(_generation), isolation=isolation, timeout=20)
    pin = token.so_pin if officer else token.user_pin
    connection.login(0 if officer else 1, pin.encode(), timeout=T)
    return connection


@dataclass
class Member:
    token: TokenFixture
    connection: Connection
    keys: DomainKeys

    @property
    def side(self) -> DomainMember:
        return DomainMember(connection=self.connection, name=self.token.label)

    def objects(self) -> int:
        return len(self.connection.find([], timeout=T))


@contextmanager
def tokens(*labels: str) -> Iterator[list[TokenFixture]]:
    with token_folder() as folder:
        yield [make_token(folder / label, label) for label in labels]


@contextmanager
def members(*labels: str, isolation: str = "none") -> Iterator[list[Member]]:
    """Members that share a domain."""
    with tokens(*labels) as made, ExitStack() as stack:
        connections = []
        for token in made:
            connection = connect(token, isolation=isolation)
            stack.callback(connection.close)
            connections.append(connection)
        sides = [DomainMember(connection=c, name=t.label) for c, t in zip(connections, made, strict=True)]
        keys = generate_domain(sides, sealed=False, timeout=T)
        yield [Member(t, c, k) for t, c, k in zip(made, connections, keys, strict=True)]


# -- objects as the engine makes them ----------------------------------------------------------------------------------


def yes(*numbers: CKA) -> Template:
    return [(int(number), pack_bool(True)) for number in numbers]


def no(*numbers: CKA) -> Template:
    return [(int(number), pack_bool(False)) for number in numbers]


def record_of(member: Member, sid: SessionId, handle: Handle, template: Template) -> ObjectRecord:
    """What the engine records of a scratch object."""
    connection = member.connection
    read = replica.read_object(connection, sid, handle, template, timeout=T)
    attributes = final_attributes(template, read, default_extractable=False)
    object_class = unpack_ulong(attributes[CKA.CLASS])
    key_type = unpack_ulong(attributes[CKA.KEY_TYPE]) if CKA.KEY_TYPE in attributes else None
    uid = os.urandom(16)
    envelope = None
    if object_class in (CKO.PRIVATE_KEY, CKO.SECRET_KEY):
        envelope = seal(
            connection,
            member.keys,
            sid,
            handle,
            uid=uid,
            revision=1,
            object_class=object_class,
            key_type=key_type,
            attributes=attributes,
            timeout=T,
        )
    elif object_class == CKO.DATA and unpack_bool(attributes[CKA.PRIVATE]):
        value = dict(template)[CKA.VALUE]
        assert isinstance(value, bytes)
        envelope = seal_private_data(
            connection, member.keys, sid, value, uid=uid, revision=1, attributes=attributes, timeout=T
        )
    return ObjectRecord(
        uid=uid,
        object_class=object_class,
        key_type=key_type,
        state=ObjectState.LIVE,
        revision=1,
        attributes=attributes,
        envelope=envelope,
        fingerprint=fingerprint(connection, handle, attributes, sid=sid, timeout=T),
    )


def generate(member: Member, mechanism: int, template: Template) -> ObjectRecord:
    with scratch_session(member.connection, timeout=T) as sid:
        handle = member.connection.generate((mechanism, None), scratch_template(template), sid=sid, timeout=60)
        record = record_of(member, sid, handle, template)
        replica.install_session(member.connection, member.keys, record, sid=sid, timeout=T)
        return record


def create(member: Member, template: Template) -> ObjectRecord:
    with scratch_session(member.connection, timeout=T) as sid:
        handle = member.connection.create(scratch_template(template), sid=sid, timeout=T)
        record = record_of(member, sid, handle, template)
        replica.install_session(member.connection, member.keys, record, sid=sid, timeout=T)
        return record


def generate_pair(
    member: Member, mechanism: int, public: Template, private: Template
) -> tuple[ObjectRecord, ObjectRecord]:
    with scratch_session(member.connection, timeout=T) as sid:
        handles = member.connection.generate_pair(
            (mechanism, None), scratch_template(public), scratch_template(private), sid=sid, timeout=60
        )
        records = [
            record_of(member, sid, handle, template)
            for handle, template in zip(handles, (public, private), strict=True)
        ]
        for record in records:
            replica.install_session(member.connection, member.keys, record, sid=sid, timeout=T)
        return records[0], records[1]


def secret_key(label: bytes, *more: tuple[int, Any]) -> Template:
    return [
        (int(CKA.CLASS), pack_ulong(CKO.SECRET_KEY)),
        (int(CKA.TOKEN), pack_bool(True)),
        (int(CKA.PRIVATE), pack_bool(True)),
        (int(CKA.LABEL), label),
        (int(CKA.ID), b"id-" + label),
        (int(CKA.SENSITIVE), pack_bool(True)),
        *more,
    ]


def aes(label: bytes, *more: tuple[int, Any], length: int = 32) -> Template:
    return secret_key(label, (int(CKA.VALUE_LEN), pack_ulong(length)), *more)


def pair(label: bytes, public: Template, private: Template) -> tuple[Template, Template]:
    return (
        [
            (int(CKA.CLASS), pack_ulong(CKO.PUBLIC_KEY)),
            (int(CKA.TOKEN), pack_bool(True)),
            (int(CKA.LABEL), label),
            (int(CKA.ID), b"id-" + label),
            *public,
        ],
        [
            (int(CKA.CLASS), pack_ulong(CKO.PRIVATE_KEY)),
            (int(CKA.TOKEN), pack_bool(True)),
            (int(CKA.PRIVATE), pack_bool(True)),
            (int(CKA.SENSITIVE), pack_bool(True)),
            (int(CKA.LABEL), label),
            (int(CKA.ID), b"id-" + label),
            *private,
        ],
    )


def rsa_pair(label: bytes, *private: tuple[int, Any]) -> tuple[Template, Template]:
    public: Template = [(int(CKA.MODULUS_BITS), pack_ulong(2048)), (int(CKA.PUBLIC_EXPONENT), b"\x01\x00\x01")]
    return pair(label, public, list(private))


def data(label: bytes, value: bytes, *, private: bool, more: Template | None = None) -> Template:
    return [
        (int(CKA.CLASS), pack_ulong(CKO.DATA)),
        (int(CKA.TOKEN), pack_bool(True)),
        (int(CKA.PRIVATE), pack_bool(private)),
        (int(CKA.LABEL), label),
        (int(CKA.APPLICATION), b"tests"),
        (int(CKA.VALUE), value),
        *(more or []),
    ]


KEY_TYPES = {"RSA": CKK.RSA, "EC": CKK.EC, "DSA": CKK.DSA, "DH": CKK.DH}


# -- a plain look at a token -------------------------------------------------------------------------------------------

_LOOK = """
import json, os, sys
import pkcs11
from pkcs11 import Attribute, Mechanism, ObjectClass
asked = json.load(sys.stdin)
os.environ["SOFTHSM2_CONF"] = asked["conf"]
lib = pkcs11.lib(asked["module"])
token = lib.get_token(token_serial=asked["serial"].encode())
raw = pkcs11.attributes.AttributeMapper()
result = []
with token.open(rw=True, user_pin=asked["pin"]) as session:
    def one(label, klass):
        found = list(session.get_objects({Attribute.LABEL: label, Attribute.CLASS: ObjectClass(klass)}))
        assert len(found) == 1, (label, klass, len(found))
        return found[0]
    def packed(value):
        if isinstance(value, bool):
            return bytes([value]).hex()
        if isinstance(value, int):
            return int(value).to_bytes(8, sys.byteorder).hex()
        return (value.encode() if isinstance(value, str) else bytes(value)).hex()
    for step in asked["steps"]:
        obj = one(step["label"], step["class"])
        mechanism = Mechanism[step["mechanism"]] if "mechanism" in step else None
        options = {"mechanism": mechanism}
        if "param" in step:
            options["mechanism_param"] = bytes.fromhex(step["param"])
        data = bytes.fromhex(step.get("data", ""))
        try:
            if step["do"] == "read":
                values = {}
                for number in step["numbers"]:
                    try:
                        values[number] = packed(obj[Attribute(number)])
                    except Exception as error:
                        values[number] = "!" + type(error).__name__
                result.append(values)
            elif step["do"] == "verify":
                result.append(obj.verify(data, bytes.fromhex(step["signature"]), **options))
            elif step["do"] == "derive":
                key = obj.derive_key(pkcs11.KeyType.GENERIC_SECRET, step["bits"], mechanism=mechanism,
                    mechanism_param=data, template={Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True})
                result.append(key[Attribute.VALUE].hex())
            else:
                result.append(getattr(obj, step["do"])(data, **options).hex())
        except Exception as error:
            result.append("!" + type(error).__name__)
print(json.dumps(result))
"""


def look(token: TokenFixture, steps: list[dict[str, Any]]) -> list[Any]:
    """What plain python-pkcs11 in a process of its own says: the value in hex, or ``!`` and the exception's name."""
    asked = {
        "conf": str(token.conf),
        "module": token.module,
        "serial": token.serial,
        "pin": token.user_pin,
        "steps": steps,
    }
    done = subprocess.run(
        [sys.executable, "-c", _LOOK],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found
