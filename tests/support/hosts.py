"""Programs that stand for hosts: each with a configuration, a folder for locks and a place on the network of its own,
and its own ways to the members; doing what it is told over a pipe."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.groups import PIN, GroupFixture
from tests.support.networks import Place

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

HOST = """
import json, random, sys, threading, time
import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism
lib = pkcs11.lib(sys.argv[1])
session = lib.get_token(token_label="payments").open(rw=True, user_pin=sys.stdin.readline().strip())
kept = {}
longest, signed, failed, busy = [0.0], [0], [], threading.Event()
changing, changer = threading.Event(), []
changed = {"alive": [], "dead": [], "unknown": [], "changes": 0, "longest": 0.0}

def sign_on():
    key = kept["signer"]
    while busy.is_set():
        began = time.monotonic()
        try:
            key.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS)
            signed[0] += 1
        except Exception as error:
            failed.append(repr(error))
        longest[0] = max(longest[0], time.monotonic() - began)

def change_on(name):
    # Whatever was refused may have happened or not.
    chance, number, keys = random.Random(), 0, {}
    while changing.is_set():
        number += 1
        label, key = f"{name}-{number}", None
        if keys and chance.random() < 0.4:
            label = chance.choice(sorted(keys))
            key = keys.pop(label)
            changed["alive"].remove(label)
        changed["unknown"].append(label)
        began = time.monotonic()
        try:
            if key is None:
                keys[label] = session.generate_key(KeyType.AES, 128, store=True, label=label)
            else:
                key.destroy()
            changed["unknown"].remove(label)
            changed["alive" if key is None else "dead"].append(label)
            changed["changes"] += 1
        except pkcs11.PKCS11Error:
            time.sleep(0.05)
        finally:
            changed["longest"] = max(changed["longest"], time.monotonic() - began)

def act(what, label, *more):
    if what == "pair":
        kept[label] = session.generate_keypair(KeyType.RSA, 1024, store=True, label=label)[1]
    elif what == "aes":
        kept[label] = session.generate_key(KeyType.AES, 256, store=True, label=label)
    elif what == "find":
        found = [one for one in session.get_objects({Attribute.LABEL: label})]
        if found:
            kept[label] = found[-1]
        return len(found)
    elif what == "rename":
        kept[label][Attribute.LABEL] = more[0]
    elif what == "destroy":
        kept[label].destroy()
    elif what == "encrypt":
        return len(kept[label].encrypt(bytes(16), mechanism_param=bytes(16)))
    elif what == "sign":
        return len(kept[label].sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS))
    elif what == "begin signing":
        busy.set()
        threading.Thread(target=sign_on, daemon=True).start()
    elif what == "end signing":
        busy.clear()
        return [signed[0], longest[0], failed[:3]]
    elif what == "begin changing":
        changing.set()
        changer.append(threading.Thread(target=change_on, args=(label,), daemon=True))
        changer[-1].start()
    elif what == "end changing":
        changing.clear()
        changer.pop().join()
        return changed

print("ready", flush=True)
for line in sys.stdin:
    began = time.monotonic()
    try:
        answer = {"ok": act(*json.loads(line))}
    except Exception as error:
        answer = {"error": [one.__name__ for one in type(error).__mro__], "text": str(error)}
    print(json.dumps({**answer, "took": time.monotonic() - began}), flush=True)
"""


class Host:
    """A program on another host: it does what it is told, one thing after the other."""

    def __init__(self, group: GroupFixture, place: Place | None = None) -> None:
        """It is being started.

        :param group: as this host sees it; see :func:`own_configuration`.
        """
        self.group, self.place = group, place or Place()
        with self.place.inside():
            self.process = subprocess.Popen(
                [sys.executable, "-c", HOST, str(self.group.toml)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"XDG_RUNTIME_DIR": str(self.group.folder)},
                preexec_fn=_die_with_the_tests,
            )
        assert self.process.stdin is not None
        print(PIN, file=self.process.stdin, flush=True)

    def started(self) -> None:
        assert self._line() == "ready"

    def _line(self, timeout: float = 60.0) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        assert ready, "the program on the other host gives no answer"
        return self.process.stdout.readline().strip()

    def tell(self, *what: str) -> None:
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._line())
        return found

    def ask(self, *what: str) -> dict[str, Any]:
        self.tell(*what)
        return self.answer()

    def do(self, *what: str) -> Any:
        answer = self.ask(*what)
        assert "ok" in answer, answer
        return answer["ok"]

    @contextmanager
    def cut_off(self, *members: str) -> Iterator[bool]:
        """From the network, and from these members. Where a place cannot be cut off it is frozen: False."""
        with self.place.cut_off() as separate, contextlib.ExitStack() as back:
            if separate:
                workers = self.group.workers(self.process.pid)
                for member in members:
                    self.group.take_away(member)
                    back.callback(self.group.bring_back, member)
                    workers[member].kill()
            else:
                self.process.send_signal(signal.SIGSTOP)
                back.callback(self.process.send_signal, signal.SIGCONT)
            yield separate

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


def own_configuration(group: GroupFixture, name: str, **journal: str) -> GroupFixture:
    """Of a host that reaches the same tokens by ways of its own.

    :param journal: what is otherwise in its ``[journal]``.
    """
    folder = group.folder / name
    folder.mkdir(mode=0o700)
    toml = folder / "hagroup.toml"
    shutil.copy(group.toml, toml)
    text = toml.read_text()
    for key, value in journal.items():
        kept = [line for line in text.splitlines() if not line.startswith(f"{key} ")]
        at = kept.index("[journal]") + 1
        text = "\n".join([*kept[:at], f'{key} = "{value}"', *kept[at:], ""])
    toml.write_text(text)
    for member in group.members:
        shutil.copytree(group.folder / member, folder / member, ignore=shutil.ignore_patterns("tokens"))
        (folder / member / "tokens").symlink_to(group.token_folder(member))
        conf = folder / member / "softhsm2.conf"
        conf.write_text(conf.read_text().replace(str(group.folder), str(folder)))
    made = GroupFixture(toml)
    made.reload()
    return made


def _die_with_the_tests() -> None:
    """Also where they are killed and this one is stopped."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
