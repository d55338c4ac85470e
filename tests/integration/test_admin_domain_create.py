"""``ha-admin domain create``: the two secrets made before the group, for those who want them sealed or in shares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.admin_commands import without_keys
from tests.support.commands import run_here
from tests.support.groups import GroupFixture
from tests.support.newcomers import private, tamper

USAGE, UNREACHABLE = 2, 3
CREATE = ("domain", "create", "--yes", "--so-pin-file", "{folder}/so-pin")
Refused = Callable[[GroupFixture, tuple[str, ...], int, str], None]
LOOK = """
import json
found = {}
for item in session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY}):
    flags = (Attribute.SENSITIVE, Attribute.EXTRACTABLE, Attribute.WRAP_WITH_TRUSTED, Attribute.MODIFIABLE)
    found[item.label] = [item[flag] for flag in flags]
print(json.dumps(found))
"""


def in_folder(group: GroupFixture, words: tuple[str, ...]) -> list[str]:
    return [word.replace("{folder}", str(group.folder)) for word in words]


def secrets(group: GroupFixture, name: str) -> dict[str, list[bool]]:
    """Secret keys on a member's token: SENSITIVE, EXTRACTABLE, WRAP_WITH_TRUSTED, MODIFIABLE of each."""
    found: dict[str, list[bool]] = json.loads(tamper(group.members[name], LOOK))
    return found


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that has to say in one sentence why it does nothing."""

    def run(group: GroupFixture, words: tuple[str, ...], status: int, why: str) -> None:
        code, out, err = run_here(monkeypatch, capsys, "--config", str(group.toml), *in_folder(group, words))
        assert code == status, out + err
        assert len(err.splitlines()) == 1 and why in err, err

    return run


def test_sealed_and_in_shares(refused: Refused, fast_folder: Path) -> None:
    """Everything that may be wrong first, and it changes nothing; then the keys, the shares, and the group."""
    sealed = without_keys(fast_folder / "sealed-domain", 2)
    folder = sealed.folder / "shares"
    create = ("domain", "create", "--sealed", "--shares", "2-of-3")
    alone = (*create, "--shares-folder", str(folder))
    named = (*alone, "--so-pin-file", str(sealed.folder / "so-pin"))
    wrong = (*alone, "--yes", "--so-pin-file", str(private(sealed.folder / "wrong", "99999999")))
    refused(sealed, (*create, "--yes"), USAGE, "--shares-folder; nothing was changed")
    refused(sealed, named, USAGE, "not confirmed")
    refused(sealed, (*alone, "--yes"), USAGE, "the SO PIN is needed: give --so-pin-file or --so-pin-env")
    refused(sealed, wrong, USAGE, 'member "hsm1" refused the SO PIN')
    sealed.take_away("hsm2")
    try:
        refused(sealed, (*named, "--yes"), UNREACHABLE, 'member "hsm2" cannot be used')
    finally:
        sealed.bring_back("hsm2")
    assert not folder.exists() and secrets(sealed, "hsm1") == {}

    done = sealed.admin(*named, "--yes")
    assert done.returncode == 0, done.stderr
    assert "now `ha-admin group create`" in done.stdout
    files = sorted(folder.iterdir())
    assert len(files) == 6 and all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    never_leave = {"hagroup domain key", "hagroup partition key"}
    for name in sealed.members:
        found = secrets(sealed, name)
        assert set(found) == never_leave
        assert {(sensitive, extractable, changed) for sensitive, extractable, _, changed in found.values()} == {
            (True, False, False)
        }
    refused(sealed, CREATE, USAGE, "keys of a domain are there already, on hsm1, hsm2; nothing was changed")

    created = sealed.admin("group", "create", "--yes", "--so-pin-file", str(sealed.folder / "so-pin"))
    assert created.returncode == 0, created.stderr
    assert set(secrets(sealed, "hsm2")) == never_leave, "the group took these keys and made no others"
    refused(sealed, CREATE, USAGE, "was created already and has its keys")
    words = [f"{what}-key-share-{number}" for what in ("domain", "partition") for number in (1, 3)]
    options = [option for name in words for option in ("--share-file", str(folder / name))]
    checked = sealed.admin("domain", "shares", "--check", *options)
    assert checked.returncode == 0 and "these shares give both keys" in checked.stdout, checked.stderr


def test_as_by_default_and_one_that_has_other_keys(refused: Refused, fast_folder: Path) -> None:
    """By default the keys may leave a member for a token that its security officer trusts. A token that has keys of
    another domain is named, and the one beside it stays as it is."""
    plain = without_keys(fast_folder / "default-domain", 1)
    done = plain.admin(*in_folder(plain, CREATE))
    assert done.returncode == 0, done.stderr
    assert set(secrets(plain, "hsm1")) == {"hagroup domain key", "hagroup partition key"}
    assert all(flags == [True, True, True, False] for flags in secrets(plain, "hsm1").values())

    mixed = without_keys(fast_folder / "mixed-domain", 1)
    other = (plain.folder / "hagroup.toml").read_text().partition("[[member]]")[2]
    other = other.replace('"hsm1"', '"theirs"', 1).replace('"hsm1/', f'"{plain.folder}/hsm1/')
    mixed.toml.write_text(f"{mixed.toml.read_text()}[[member]]{other}")
    refused(mixed, CREATE, USAGE, "there already, on theirs; nothing was changed")
    assert secrets(mixed, "hsm1") == {}
