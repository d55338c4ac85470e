"""A member's own token, read with plain python-pkcs11 in a process of its own: hagroup has no part in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

_PROGRAM = r"""
import json, sys, time
import pkcs11
from pkcs11 import Attribute, ObjectClass
from pkcs11.attributes import AttributeMapper

class Raw(AttributeMapper):
    # dates and the like would raise where they are empty
    KEEP = {Attribute.CLASS, Attribute.ENCRYPT, Attribute.DECRYPT, Attribute.SIGN, Attribute.VERIFY, Attribute.WRAP,
            Attribute.UNWRAP, Attribute.DERIVE, Attribute.KEY_TYPE, Attribute.LABEL}
    def unpack_attributes(self, key, value):
        return super().unpack_attributes(key, value) if key in self.KEEP else bytes(value)

asked = json.load(sys.stdin)
token = pkcs11.lib(asked["module"]).get_token(token_serial=asked["serial"].encode())
OWN = ("hagroup:", "hagroup ")

def everything(session):
    try:
        yield from session.get_objects()
    except pkcs11.exceptions.AttributeValueInvalid:  # an object that shows no class: a ghost
        yield None

def listing(session):
    found = []
    for item in everything(session):
        if item is None:
            found.append({"label": "", "class": None, "attributes": {}})
            continue
        label = item[Attribute.LABEL]
        if label.startswith(OWN):
            if asked.get("own"):
                found.append({"label": label, "class": int(item[Attribute.CLASS])})
            continue
        values = {}
        for number in asked["attributes"]:
            try:
                values[str(number)] = item[Attribute(number)].hex() if not isinstance(
                    item[Attribute(number)], (str, bool, int)) else item[Attribute(number)]
            except Exception as error:
                values[str(number)] = type(error).__name__
        found.append({"label": label, "class": int(item[Attribute.CLASS]), "attributes": values})
    return found

def settled_listing(session):
    # SoftHSM shows a data object that another process is just making (a manifest) without its label or class, and fails
    # where an object goes away under the search: a ghost would still be there at the last look.
    for last in [False] * 40 + [True]:
        try:
            found = listing(session)
        except pkcs11.exceptions.ObjectHandleInvalid:
            if last:
                raise
        else:
            if last or not any(item["label"] == "" and item["class"] in (None, ObjectClass.DATA) for item in found):
                return found
        time.sleep(0.05)

with token.open(user_pin=asked["pin"], attribute_mapper=Raw()) as session:
    answer = {}
    if "attributes" in asked:
        answer["objects"] = settled_listing(session)
    for job in asked.get("jobs", []):
        key = session.get_key(object_class=ObjectClass(job["class"]), label=job["label"])
        data = bytes.fromhex(job["data"])
        arguments = {"mechanism": pkcs11.Mechanism[job["mechanism"]]}
        if job.get("iv"):
            arguments["mechanism_param"] = bytes.fromhex(job["iv"])
        answer.setdefault("results", []).append(getattr(key, job["use"])(data, **arguments).hex())
print(json.dumps(answer))
"""


def ask(member: dict[str, Any], pin: str = "1234", **asked: Any) -> dict[str, Any]:
    """Run the program above on ``member`` ({module, serial, env})."""
    question = {"module": member["module"], "serial": member["serial"], "pin": pin, **asked}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps(question),
        env=os.environ | member["env"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def objects(member: dict[str, Any], *attributes: int, pin: str = "1234", own: bool = False) -> list[dict[str, Any]]:
    """All objects on the token but hagroup's own (``own``: those too)."""
    found: list[dict[str, Any]] = ask(member, pin, attributes=list(attributes), own=own)["objects"]
    return found


def labels(member: dict[str, Any], pin: str = "1234") -> list[str]:
    """Labels of the objects on the token, sorted."""
    return sorted(item["label"] for item in objects(member, pin=pin))


def use(
    member: dict[str, Any], how: str, object_class: int, label: str, data: bytes, mechanism: str, iv: bytes = b""
) -> bytes:
    """``sign``, ``encrypt`` or ``decrypt`` with one key on the token."""
    job = {
        "use": how,
        "class": object_class,
        "label": label,
        "data": data.hex(),
        "mechanism": mechanism,
        "iv": iv.hex(),
    }
    return bytes.fromhex(ask(member, jobs=[job])["results"][0])
