"""Tokens that may join a group, and what ha-admin is told to add them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.groups import PIN, SO_PIN, GroupFixture
from tests.support.softhsm import SOFTHSM, TokenFixture, make_token


def private(path: Path, text: str) -> Path:
    """A file that only its owner reads."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    return path


def new_token(group: GroupFixture, name: str) -> TokenFixture:
    """An initialised token beside the group's members, with its PIN file."""
    token = make_token(group.folder / name, f"payments-{name}", SO_PIN, PIN)
    private(group.folder / name / "pin", PIN)
    private(group.folder / "so-pin", SO_PIN)
    return token


def add(group: GroupFixture, name: str, token: TokenFixture, *options: str) -> Any:
    """``ha-admin member add``."""
    done = group.admin(
        "member",
        "add",
        name,
        "--module",
        SOFTHSM,
        "--token-serial",
        token.serial,
        "--env",
        f"SOFTHSM2_CONF={token.conf}",
        "--pin-file",
        str(group.folder / name / "pin"),
        "--so-pin-file",
        str(group.folder / "so-pin"),
        "--yes",
        *options,
    )
    if done.returncode == 0:
        group.reload()
    return done


def tamper(member: dict[str, Any], program: str) -> str:
    """Run a program with plain python-pkcs11 on one member's token, behind the group's back."""
    prologue = (
        "import pkcs11\nfrom pkcs11 import Attribute, KeyType, Mechanism, ObjectClass\n"
        f"token = pkcs11.lib({member['module']!r}).get_token(token_serial={member['serial'].encode()!r})\n"
        f"session = token.open(rw=True, user_pin={PIN!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-"],
        input=prologue + program,
        env=os.environ | member["env"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
