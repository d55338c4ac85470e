"""Makes a hagroup group of independent SoftHSM members, as an ordinary user, for trials, demonstrations and tests.

Each member is a SoftHSM token in a folder of its own. The PINs given here are test PINs: they are written into PIN
files (mode 0600) and go to the tokens by the PKCS#11 interface, into no other command line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

from hagroup.config.model import (
    GroupConfig,
    GroupSection,
    JournalSection,
    MemberConfig,
    PinSource,
    Timeouts,
)
from hagroup.config.urls import BadUrl, parse_journal_url
from hagroup.config.write import render
from hagroup.errors import HAError

MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
)


class Refused(Exception):
    """What is wrong, in one sentence."""


def main() -> int:
    if len(sys.argv) == 2 and sys.argv[1] == "--init-token":
        return init_token()
    options = parse()
    try:
        print(make(options))
    except (Refused, HAError) as error:
        print(f"make-group: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make-group: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make-group", description=__doc__)
    parser.add_argument("directory", metavar="DIR", type=Path, help="made if missing; refused if it holds a group")
    parser.add_argument("--members", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--label", default="payments", help="label of the virtual token")
    parser.add_argument("--pin", default="1234", help="user PIN of every member (a test PIN)")
    parser.add_argument("--so-pin", default="12345678", help="SO PIN of every member (a test PIN)")
    parser.add_argument("--journal", default="sqlite:journal.db", help="URL of the journal")
    for name, what in (("ca", "CA of its nodes"), ("cert", "client certificate"), ("key", "its key")):
        parser.add_argument(f"--journal-{name}", type=Path, metavar="FILE", help=f"for a journal on etcd: {what}")
    parser.add_argument("--isolation", choices=("process", "none"), default="process")
    parser.add_argument("--module", type=Path, help="module of all members (default: SoftHSM's, where Debian has it)")
    parser.add_argument("--min-replicas", type=int, help="default 2, or 1 for a group of one")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="more environment of every member's module; {dir} stands for the member's folder",
    )
    parser.add_argument("--no-pin-sources", action="store_true", help="do not name the PIN files in hagroup.toml")
    return parser.parse_args()


def make(options: argparse.Namespace) -> Path:
    directory: Path = options.directory.absolute()
    config_path = directory / "hagroup.toml"
    if config_path.exists():
        raise Refused(f"{directory} holds a group already (hagroup.toml); choose another folder or remove this one")
    if not 1 <= options.members <= 64:
        raise Refused("--members takes a number from 1 to 64")
    try:
        parse_journal_url(options.journal, directory)
    except BadUrl as bad:
        raise Refused(f"--journal must be {bad}") from None
    module = options.module or next((Path(path) for path in MODULES if Path(path).exists()), None)
    if module is None or not module.exists():
        raise Refused("SoftHSM's module was not found; install softhsm2, or name it with --module")
    softhsm = next((Path(path) for path in MODULES if Path(path).exists()), module)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.chmod(0o700)
    members = []
    for number in range(1, options.members + 1):
        name = f"hsm{number}"
        folder = directory / name
        (folder / "tokens").mkdir(parents=True, mode=0o700)
        conf = folder / "softhsm2.conf"
        conf.write_text(
            f"directories.tokendir = {folder / 'tokens'}\nobjectstore.backend = file\n"
            "log.level = ERROR\nslots.removable = false\n"
        )
        pin_file = folder / "pin"
        private(pin_file, options.pin)
        environment = {"SOFTHSM2_CONF": str(conf)}
        serial = run_init_token(softhsm, environment, f"{options.label}-{name}", options.so_pin, options.pin)
        for setting in options.env:
            key, _, value = setting.partition("=")
            environment[key] = value.replace("{dir}", str(folder))
        members.append(
            MemberConfig(
                name=name,
                module=module.absolute(),
                token_serial=serial,
                env=environment,
                isolation=options.isolation,
                pin=None if options.no_pin_sources else PinSource(file=pin_file),
                local=True,
            )
        )
    config = GroupConfig(
        path=config_path,
        group=GroupSection(label=options.label, min_replicas=options.min_replicas or min(2, options.members)),
        journal=JournalSection(
            url=parse_journal_url(options.journal, directory),
            ca=options.journal_ca and options.journal_ca.absolute(),
            cert=options.journal_cert and options.journal_cert.absolute(),
            key=options.journal_key and options.journal_key.absolute(),
        ),
        timeouts=Timeouts(),
        members=tuple(members),
    )
    private(config_path, render(config))
    create_group(config_path, directory, options)
    return config_path


def private(path: Path, text: str) -> None:
    """Write a file that only its owner reads."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def create_group(config_path: Path, directory: Path, options: argparse.Namespace) -> None:
    so_pin_file = directory / ".so-pin"
    private(so_pin_file, options.so_pin)
    command = [sys.executable, "-m", "hagroup.admin.cli", "--config", str(config_path), "group", "create", "--yes"]
    command += ["--so-pin-file", str(so_pin_file)]
    if options.no_pin_sources:
        command += ["--pin-file", str(directory / "hsm1" / "pin")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        so_pin_file.unlink()
    if done.returncode:
        raise Refused((done.stderr or done.stdout).strip().removeprefix("ha-admin: "))


def run_init_token(module: Path, environment: dict[str, str], label: str, so_pin: str, pin: str) -> str:
    """Initialise a token in a process of its own (SoftHSM reads its configuration once); returns its serial number."""
    asked = {"module": str(module), "label": label, "so_pin": so_pin, "pin": pin}
    done = subprocess.run(
        [sys.executable, __file__, "--init-token"],
        input=json.dumps(asked),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Refused(f"no token could be made: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    return done.stdout.strip()


def init_token() -> int:
    from hagroup.members.cryptoki import CkTokenInfo, Cryptoki

    asked = json.load(sys.stdin)
    module = Cryptoki(ctypes.CDLL(asked["module"]))
    module.C_Initialize(None)
    slots, count = (ctypes.c_ulong * 64)(), ctypes.c_ulong(64)
    module.C_GetSlotList(1, slots, ctypes.byref(count))
    slot = slots[count.value - 1]
    so_pin, pin = asked["so_pin"].encode(), asked["pin"].encode()
    module.C_InitToken(slot, so_pin, len(so_pin), asked["label"].encode()[:32].ljust(32))
    session = ctypes.c_ulong()
    module.C_OpenSession(slot, 6, None, None, ctypes.byref(session))
    module.C_Login(session.value, 0, so_pin, len(so_pin))
    module.C_InitPIN(session.value, pin, len(pin))
    info = CkTokenInfo()
    module.C_GetTokenInfo(slot, ctypes.byref(info))
    print(bytes(info.serialNumber).decode().strip())
    module.C_Finalize(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
