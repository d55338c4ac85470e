"""Outside the members there is no secret: no PIN, no key value (G8). A program does everything that might let one out,
and then every place where it could have gone is searched, in every way in which bytes are written down."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.groups import GroupFixture, make_group

PIN, SO_PIN = "hush-7391-user", "hush-5520-officer"
WRONG_PIN = "hush-1147-wrong"
AES_VALUE = bytes.fromhex("d1c2b3a4958677685a4b3c2d1e0f00f1e2d3c4b5a6978889fa0b1c2d3e4f5061")
OPEN_VALUE = bytes.fromhex("0badc0de5eed0badc0de5eed0badc0de")
GENERIC_VALUE = b"a generic secret, known to the test"
DATA_VALUE = b"the value of a private data object, known to the test"

CLIENT = r"""
import json, logging, os, sys, traceback
import psutil
asked = json.loads(sys.stdin.readline())
logging.basicConfig(filename=asked["log"], level=logging.DEBUG, format="%(asctime)s %(name)s %(levelname)s %(message)s")

import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11.util.rsa import decode_rsa_private_key
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives import serialization

texts = open(asked["texts"], "w")

def fails(what, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        print(what, repr(error), str(error), error.__dict__, traceback.format_exc(), file=texts, flush=True)
    else:
        raise AssertionError(f"{what} was accepted")

lib = pkcs11.lib(asked["toml"])
token = lib.get_token(token_label="payments")
fails("wrong PIN", token.open, rw=True, user_pin=asked["wrong"])
fails("wrong SO PIN", token.open, rw=True, so_pin=asked["wrong"])
session = token.open(rw=True, user_pin=asked["pin"])
fails("second login", token.open, user_pin=asked["pin"])
print(repr(session), str(session), repr(token), repr(lib), vars(lib), file=texts, flush=True)

for item in list(session.get_objects()):
    item.destroy()  # another run's

def secret(label, key_type, value, **more):
    template = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: key_type, Attribute.TOKEN: True,
                Attribute.LABEL: label, Attribute.VALUE: value}
    return session.create_object(template | {Attribute[name]: given for name, given in more.items()})

values = {name: bytes.fromhex(value) for name, value in asked["values"].items()}
sealed = secret("sealed", KeyType.AES, values["aes"])
opened = secret("open", KeyType.AES, values["open"], SENSITIVE=False, EXTRACTABLE=True)
secret("generic", KeyType.GENERIC_SECRET, values["generic"], SENSITIVE=False, EXTRACTABLE=True, SIGN=True)
session.create_object({Attribute.CLASS: ObjectClass.DATA, Attribute.TOKEN: True, Attribute.PRIVATE: True,
                       Attribute.LABEL: "data", Attribute.VALUE: values["data"]})
pair = rsa.generate_private_key(65537, 2048)
der = pair.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL,
                         serialization.NoEncryption())
private = session.create_object(decode_rsa_private_key(der) | {
    Attribute.TOKEN: True, Attribute.LABEL: "private", Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True})
numbers = pair.private_numbers()
for name, number in (("d", numbers.d), ("p", numbers.p), ("q", numbers.q), ("dmp1", numbers.dmp1)):
    values[name] = number.to_bytes((number.bit_length() + 7) // 8, "big")

# what an application does with them, and what goes wrong
assert opened[Attribute.VALUE] == values["open"]
assert list(session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.VALUE: values["open"]})) == [opened]
sealed.encrypt(b"data", mechanism_param=bytes(16))
private.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS)
copied = sealed.copy({Attribute.LABEL: "copy", Attribute.TOKEN: True})
copied[Attribute.LABEL] = "renamed copy"
fails("sensitive value", lambda: sealed[Attribute.VALUE])
fails("bad template", secret, "bad", KeyType.AES, values["aes"] + b"!")
fails("bad RSA", session.create_object, {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.KEY_TYPE: KeyType.RSA,
      Attribute.TOKEN: True, Attribute.PRIVATE_EXPONENT: values["d"]})
fails("unpackable", session.create_object, {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES,
      Attribute.VALUE: values["aes"], Attribute.LABEL: 5})
fails("set value", opened.__setitem__, Attribute.VALUE, values["aes"])
fails("wrong old PIN", session.set_pin, asked["wrong"], asked["pin"] + "x")
fails("bad ciphertext", sealed.decrypt, values["aes"], mechanism_param=bytes(16))
for worker in psutil.Process().children():
    worker.kill()  # members are lost and connected again, with all their log lines
for _ in range(20):
    try:
        sealed.encrypt(b"data", mechanism_param=bytes(16))
    except pkcs11.PKCS11Error as error:  # two members died in this call
        print(repr(error), str(error), traceback.format_exc(), file=texts, flush=True)
secret("after the loss", KeyType.AES, values["aes"])
session.generate_key(KeyType.AES, 256, store=True, label="generated")
print(json.dumps({"pid": os.getpid(), "values": {name: value.hex() for name, value in values.items()}}), flush=True)
sys.stdin.readline()
session.close()
lib.unload()
"""


def forms(value: bytes) -> dict[str, bytes]:
    """How bytes come to be written down."""
    encoded = base64.b64encode(value).rstrip(b"=")
    return {
        "raw": value,
        "hex": value.hex().encode(),
        "HEX": value.hex().upper().encode(),
        "base64": encoded[:-1],
        "base64url": base64.urlsafe_b64encode(value).rstrip(b"=")[:-1],
        "repr": repr(value)[2:-1].encode(),
        "list": ", ".join(map(str, value)).encode(),
        "reversed": value[::-1],
    }


class Search:
    """All secrets in all forms."""

    def __init__(self, secrets: dict[str, bytes]) -> None:
        parts = {name: value[:24] for name, value in secrets.items()}  # half of a key is bad enough
        self._wanted = {(name, form): written for name, part in parts.items() for form, written in forms(part).items()}
        self._pattern = re.compile(b"|".join(re.escape(written) for written in self._wanted.values()))

    def found(self, content: bytes) -> set[tuple[str, str]]:
        if not self._pattern.search(content):
            return set()
        return {which for which, written in self._wanted.items() if written in content}


@pytest.fixture(scope="module")
def secret_group(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "secret", "--pin", PIN, "--so-pin", SO_PIN, "--no-pin-sources", members=2)


@pytest.fixture(scope="module", params=["process", "none"])
def ran(secret_group: GroupFixture, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The client after all that it did, still running; its secrets and where it wrote."""
    folder = secret_group.folder.parent / f"secret-{request.param}"
    folder.mkdir()
    toml = secret_group.folder / f"{request.param}.toml"
    toml.write_text(secret_group.toml.read_text().replace('"process"', f'"{request.param}"'))
    toml.chmod(0o600)
    asked = {
        "toml": str(toml),
        "log": str(folder / "debug.log"),
        "texts": str(folder / "texts"),
        "pin": PIN,
        "wrong": WRONG_PIN,
        "values": {
            "aes": AES_VALUE.hex(),
            "open": OPEN_VALUE.hex(),
            "generic": GENERIC_VALUE.hex(),
            "data": DATA_VALUE.hex(),
        },
    }
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stderr is not None
        client.stdin.write(json.dumps(asked).encode() + b"\n")
        client.stdin.flush()
        line = client.stdout.readline()
        assert line, client.stderr.read().decode()
        answer = json.loads(line)
        secrets = {name: bytes.fromhex(value) for name, value in answer["values"].items()}
        pins = {"PIN": PIN.encode(), "SO PIN": SO_PIN.encode(), "wrong PIN": WRONG_PIN.encode()}
        yield {"pid": answer["pid"], "search": Search(secrets | pins), "folder": folder, "isolation": request.param}
        client.stdin.write(b"\n")
        output, errors = client.communicate(timeout=60)
        assert client.returncode == 0, errors.decode()
        assert not Search(secrets | pins).found(output + errors)


def test_the_search_finds_what_it_looks_for(ran: dict[str, Any]) -> None:
    for form in forms(AES_VALUE).values():
        assert ran["search"].found(b"x" + form + b"y")
    assert ran["search"].found(f"a line with {PIN} in it".encode())


def test_logs_and_exceptions(ran: dict[str, Any]) -> None:
    log, texts = (ran["folder"] / name for name in ("debug.log", "texts"))
    assert b"hagroup" in log.read_bytes()
    assert b"member.connected" in log.read_bytes()
    assert texts.read_text().count("Traceback") >= 8
    assert ran["search"].found(log.read_bytes()) == set()
    # ``locals`` of a traceback are not shown; the source lines of the client itself name no value either
    assert ran["search"].found(texts.read_bytes()) == set()


def test_the_journal_and_every_other_file(secret_group: GroupFixture, ran: dict[str, Any]) -> None:
    """All that hagroup wrote: the journal with its write-ahead log, view number, locks. Not the fixtures' PIN files,
    and not the tokens."""
    looked = []
    for path in sorted(secret_group.folder.rglob("*")):
        if not path.is_file() or "tokens" in path.parts or path.name == "pin":
            continue
        assert ran["search"].found(path.read_bytes()) == set(), path
        looked.append(path.name)
    assert "journal.db" in looked
    assert any(name.endswith("-wal") for name in looked), looked


def test_command_lines_and_environments(ran: dict[str, Any]) -> None:
    client = psutil.Process(ran["pid"])
    processes = [client, *client.children(recursive=True)]
    assert len(processes) >= (3 if ran["isolation"] == "process" else 1)
    for process in processes:
        for name in ("cmdline", "environ", "comm"):
            content = Path(f"/proc/{process.pid}/{name}").read_bytes()
            if process.pid == client.pid and name == "cmdline":
                content = content.replace(CLIENT.encode(), b"")
            assert ran["search"].found(content) == set(), (process, name)


def test_nobody_reads_the_workers_memory(ran: dict[str, Any]) -> None:
    """PINs and keys pass through it: no core dump, no debugger of the same user."""
    if ran["isolation"] == "none":
        assert not psutil.Process(ran["pid"]).children()
        return
    for worker in psutil.Process(ran["pid"]).children(recursive=True):
        limits = Path(f"/proc/{worker.pid}/limits").read_text()
        assert re.search(r"Max core file size\s+0\s+0", limits)
        assert os.stat(f"/proc/{worker.pid}/environ").st_uid == 0  # not dumpable: its /proc belongs to root


def test_commands(secret_group: GroupFixture, ran: dict[str, Any]) -> None:
    """The loudest that ha-admin can be, with a right and with a wrong PIN."""
    wrong = ran["folder"] / "wrong"
    wrong.write_text(WRONG_PIN)
    wrong.chmod(0o600)
    right = str(secret_group.folder / "hsm1" / "pin")
    for arguments in (
        ["-v", "status", "--json"],
        ["-v", "sync", "--pin-file", right],
        ["-v", "sync", "--pin-file", str(wrong)],
        ["-v", "objects"],
        ["-v", "objects", "--member", "hsm1", "--pin-file", right],
        ["-v", "objects", "--member", "hsm1", "--pin-file", str(wrong)],
    ):
        done = secret_group.admin(*arguments)
        assert ran["search"].found((done.stdout + done.stderr).encode()) == set(), arguments
        assert "Traceback" not in done.stderr
    for name in secret_group.members:  # the right one clears the token's counter
        secret_group.admin("objects", "--member", name, "--pin-file", right)
