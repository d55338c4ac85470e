"""Reads the ``[[member]]`` tables.

**Values in ``env``** are relative to the file where they look like a relative path: they contain a ``/``, do not begin
with one, and what stands before the first ``/`` has neither ``:`` nor ``=`` in it and does not begin with ``-``. So
``hsm1/softhsm2.conf`` and ``./softhsm2.conf`` are paths; ``/etc/x``, ``https://x/y``, ``sql:/etc/pki``, ``-Dconf=a/b``
and ``info`` stay as they are. A list of paths is written with whole paths. It depends on the text alone, not on which
files are there, so that the same file always means the same.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, get_args

from pkcs11 import Mechanism

from hagroup.config.model import AES_KEY_WRAP_PAD, OAEP_HASHES, Isolation, MemberConfig, PinSource, is_softhsm
from hagroup.config.table import Source, Table
from hagroup.core.ckr import CKR
from hagroup.core.classify import Verdict
from hagroup.core.records import Role

CKR_PREFIX = "CKR_"
_CK_ULONG = 2**64
_PIN_KEYS = PinSource.__struct_fields__
_PIN_EXPECTED = 'a table with one of file, env or command such as { file = "hsm1/pin" }'
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RELATIVE_PATH = re.compile(r"(?!-)[^/:=]+/.*", re.DOTALL)
_TOKEN_LABEL = re.compile(r"(?=.*\S$)[^\x00-\x1f\x7f]{1,32}")
_TOKEN_SERIAL = re.compile(r"(?=\S)(?=.*\S$)[\x20-\x7e]{1,16}")


def read_members(source: Source, values: Any) -> tuple[MemberConfig, ...]:
    if values is None or values == []:
        raise source.error(("member",), "at least one [[member]] is needed")
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise source.error(("member",), "[[member]] must be written with two brackets, once for each member")
    members: list[MemberConfig] = []
    for index, value in enumerate(values):
        member = _read_member(source, value, index)
        for other in members:
            _refuse_double(source, index, member, other)
        members.append(member)
    return tuple(members)


def _read_member(source: Source, values: dict[str, Any], index: int) -> MemberConfig:
    name = values.get("name")
    named = isinstance(name, str) and name.isprintable() and len(name) <= 64
    title = f'[[member]] "{name}"' if named else f"[[member]] number {index + 1}"
    table = Table(source, values, ("member", index), f"{title} ", MemberConfig.__struct_fields__)
    name = table.required("name", table.name("name"))
    module = table.required("module", table.path("module"))
    serial = table.text("token_serial", "1 to 16 printable ASCII characters", _TOKEN_SERIAL)
    label = table.text("token_label", "1 to 32 characters without control characters", _TOKEN_LABEL)
    if serial is None and label is None:
        raise table.error("token_serial", "is missing (or token_label)")
    if serial is not None and label is not None:
        raise table.error("token_label", "cannot stand beside token_serial: one of them names the token")
    return MemberConfig(
        name=name,
        module=module,
        token_serial=serial,
        token_label=label,
        role=table.choice("role", tuple(Role), Role.ACTIVE),
        site=table.name("site"),
        priority=table.whole("priority", 0, -(2**31), 2**31 - 1),
        isolation=table.choice("isolation", get_args(Isolation), "process"),
        env=_read_env(table),
        pin=_read_pin_source(table),
        init_args=table.text("init_args", show=False),
        wrap_mechanism=_read_mechanism(table, "wrap_mechanism"),
        oaep_hash=table.choice("oaep_hash", OAEP_HASHES, "SHA-1"),
        late_window=table.seconds("late_window", 600.0),
        local=table.flag("local", is_softhsm(module)),
        errors=_read_errors(table),
    )


def _refuse_double(source: Source, index: int, member: MemberConfig, other: MemberConfig) -> None:
    if member.name == other.name:
        raise source.error(("member", index, "name"), f'[[member]] "{member.name}" name is that of another member')
    same_module = os.path.realpath(member.module) == os.path.realpath(other.module)
    token = (member.token_serial, member.token_label)
    if same_module and dict(member.env) == dict(other.env) and token == (other.token_serial, other.token_label):
        key = "token_serial" if member.token_serial else "token_label"
        problem = f'names the same token of the same module as "{other.name}"'
        raise source.error(("member", index, key), f'[[member]] "{member.name}" {key} {problem}')


def _read_env(table: Table) -> dict[str, str]:
    values = table.raw("env")
    env = table.table("env", list(values) if isinstance(values, dict) else (), 'a table such as { NAME = "value" }')
    if env is None:
        return {}
    read = {}
    for name in env.keys:
        if not _ENV_NAME.fullmatch(name):
            raise env.error(name, "must be the name of an environment variable")
        value = env.raw(name)
        if not isinstance(value, str) or "\0" in value:
            env.refuse(name, "a text in quotes", show=False)
        if value.startswith("~/"):
            env.refuse(name, "a whole path (~ has no meaning here)")
        read[name] = absolute_env_value(value, table.source.path.parent)
    return read


def absolute_env_value(value: str, folder: Path) -> str:
    """``value``, below ``folder`` if it looks like a relative path (see the head of this module)."""
    return os.path.join(folder, value.removeprefix("./")) if _RELATIVE_PATH.fullmatch(value) else value


def _read_pin_source(table: Table) -> PinSource | None:
    pin = table.table("pin", _PIN_KEYS, _PIN_EXPECTED)
    if pin is None:
        return None
    if len(pin.keys) != 1:
        table.refuse("pin", _PIN_EXPECTED, show=False)
    if "file" in pin:
        pin.text("file", "the path of a file", show=False)
    return PinSource(
        file=pin.path("file"),
        env=pin.text("env", "the name of an environment variable", _ENV_NAME, show=False),
        command=pin.words("command"),
    )


def _read_mechanism(table: Table, key: str) -> int:
    value = table.raw(key)
    if value is None:
        return AES_KEY_WRAP_PAD
    if isinstance(value, str):
        try:
            value = int(value, 0) if value[:1].isdigit() else Mechanism[value.removeprefix("CKM_")].value
        except (KeyError, ValueError):
            value = None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _CK_ULONG:
        table.refuse(key, 'a mechanism such as "AES_KEY_WRAP_PAD" or 0x210A')
    return value


def _read_errors(table: Table) -> dict[int, Verdict]:
    values = table.raw("errors")
    expected = 'a table such as { CKR_GENERAL_ERROR = "member-failed" }'
    errors = table.table("errors", list(values) if isinstance(values, dict) else (), expected)
    if errors is None:
        return {}
    read: dict[int, Verdict] = {}
    for key in errors.keys:
        try:
            number = int(key, 0) if key[:1].isdigit() else int(CKR[key.removeprefix(CKR_PREFIX)])
        except (KeyError, ValueError):
            raise errors.error(key, "must be a return value such as CKR_GENERAL_ERROR or 0x80000001") from None
        if not 0 < number < _CK_ULONG:
            raise errors.error(key, "must be a return value other than CKR_OK, of at most 64 bits")
        if number in read:
            raise errors.error(key, "stands for the same return value as another key beside it")
        read[number] = errors.choice(key, tuple(Verdict), Verdict.APPLICATION)
    return read
