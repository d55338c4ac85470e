"""Two members on one module file are two members; what happens to one is no affair of the other's (DESIGN.md 3)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism
from tests.support import plain
from tests.support.faulty import Load, engine
from tests.support.groups import PIN, SO_PIN, GroupFixture, make_group, wait_until
from tests.support.softhsm import SOFTHSM, make_token

IV = bytes(16)
PKCS1 = Mechanism.SHA256_RSA_PKCS
ISOLATIONS = ["process", "none"]


def opened(group: GroupFixture, isolation: str) -> Iterator[Any]:
    toml = group.folder / f"{isolation}.toml"
    if not toml.exists():
        toml.write_text(group.toml.read_text().replace('"process"', f'"{isolation}"'))
        toml.chmod(0o600)
    lib = pkcs11.lib(str(toml))
    with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
        wait_until(lambda: len(serving(session)) == len(group.members), "all members in service")
        yield session
        for item in list(session.get_objects({Attribute.TOKEN: True})):
            item.destroy()
    lib.unload()


def serving(session: Any) -> dict[str, Any]:
    """The members in service, with the start of their present connection."""
    return {member.name: member.life for member in engine(session).roster.serving()}


def reinitialise(group: GroupFixture, session: Any, name: str) -> None:
    """The member's module starts anew; returns when it is in service again."""
    before = serving(session)[name]
    worker = group.workers().get(name)
    if worker is not None:
        worker.kill()
    else:
        engine(session).roster.lost(engine(session).roster.members[name], before, "reinitialised by a test")
    engine(session).roster.bury_the_dead()

    def again() -> bool:
        for item in engine(session).roster.members.values():
            item.next_attempt = 0.0
        engine(session).supervisor.wake()
        return serving(session).get(name) not in (None, before)

    wait_until(again, f"{name} in service again")


@pytest.fixture(scope="module")
def pair(fast_folder: Path) -> GroupFixture:
    """Two members on one module file; only ``env`` tells them apart."""
    group = make_group(fast_folder / "pair", members=2)
    assert len({member["module"] for member in group.members.values()}) == 1
    return group


@pytest.fixture(scope="module", params=ISOLATIONS)
def session(pair: GroupFixture, request: pytest.FixtureRequest) -> Iterator[Any]:
    yield from opened(pair, request.param)


def test_each_is_its_own_token(pair: GroupFixture, session: Any) -> None:
    session.generate_keypair(KeyType.RSA, 2048, store=True, label="on both")
    lives = serving(session)
    assert {life.token.serial for life in lives.values()} == {member["serial"] for member in pair.members.values()}
    first, second = (
        plain.use(member, "sign", 3, "on both", b"data", "SHA256_RSA_PKCS") for member in pair.members.values()
    )
    assert first == second
    for member in pair.members.values():
        assert plain.labels(member).count("on both") == 2


def test_reinitialising_one_does_not_disturb_the_other(pair: GroupFixture, session: Any) -> None:
    """A stream and a session object on the one go on while the other starts anew, twice."""
    roster = engine(session).roster
    key = session.generate_key(KeyType.AES, 256, store=True, label="stream")
    whole = key.encrypt(b"0123456789abcdef" * 6, mechanism_param=IV)
    roster.choosing.here.last = roster.members["hsm1"]
    chunks = iter([b"0123456789abcdef"] * 6)

    def feed() -> Iterator[bytes]:
        for number, chunk in enumerate(chunks):
            if number in (2, 4):
                (busy,) = [name for name, member in roster.members.items() if member.outstanding]
                before = serving(session)[busy]
                (other,) = {"hsm1", "hsm2"} - {busy}
                reinitialise(pair, session, other)
                assert serving(session)[busy] is before, "the other one was not touched"
            yield chunk

    assert b"".join(key.encrypt(feed(), mechanism_param=IV)) == whole
    mine = session.generate_key(KeyType.AES, 256)
    expected = mine.encrypt(b"data", mechanism_param=IV)
    for name in ("hsm1", "hsm2"):
        reinitialise(pair, session, name)
        assert mine.encrypt(b"data", mechanism_param=IV) == expected


def test_reinitialised_under_load(pair: GroupFixture, session: Any) -> None:
    _, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label="load")
    expected = private.sign(b"data", mechanism=PKCS1)

    def sign(_: int) -> None:
        assert private.sign(b"data", mechanism=PKCS1) == expected

    with Load(sign, 6) as load:
        for name in ("hsm1", "hsm2"):
            load.wait_for(50)
            reinitialise(pair, session, name)
        load.wait_for(50)
    assert not load.errors


# -- a group of one ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lonely(fast_folder: Path) -> GroupFixture:
    return make_group(fast_folder / "lonely", members=1)


@pytest.fixture(scope="module", params=ISOLATIONS)
def alone(lonely: GroupFixture, request: pytest.FixtureRequest) -> Iterator[Any]:
    yield from opened(lonely, request.param)


def test_a_group_of_one(lonely: GroupFixture, alone: Any) -> None:
    public, private = alone.generate_keypair(KeyType.RSA, 2048, store=True, label="only")
    assert public.verify(b"data", private.sign(b"data", mechanism=PKCS1), mechanism=PKCS1)
    private[Attribute.LABEL] = "renamed"
    assert plain.labels(lonely.members["hsm1"]) == ["only", "renamed"]
    private.destroy()
    assert plain.labels(lonely.members["hsm1"]) == ["only"]
    assert lonely.admin("status").returncode == 0


def test_the_only_member_starts_anew(lonely: GroupFixture, alone: Any) -> None:
    """Calls wait for it, within their bound: none fails."""
    _, private = alone.generate_keypair(KeyType.RSA, 2048, store=True, label="back")
    expected = private.sign(b"data", mechanism=PKCS1)

    def sign(_: int) -> None:
        assert private.sign(b"data", mechanism=PKCS1) == expected

    with Load(sign, 4) as load:
        load.wait_for(20)
        reinitialise(lonely, alone, "hsm1")
        load.wait_for(20)
    assert not load.errors, load.errors[0]


# -- one token twice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_two_members_that_are_one_token_are_refused(fast_folder: Path, isolation: str) -> None:
    """By another name and another ``env`` it is still the same token."""
    folder = fast_folder / f"twice {isolation}"
    folder.mkdir(mode=0o700)
    token = make_token(folder / "hsm1", "one token", SO_PIN, PIN)
    other_conf = folder / "other.conf"
    other_conf.write_text(token.conf.read_text())
    for name, text in (("pin", PIN), ("so-pin", SO_PIN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    toml = folder / "hagroup.toml"
    members = "".join(
        f'[[member]]\nname = "{name}"\nmodule = "{SOFTHSM}"\n{find}\nisolation = "{isolation}"\n'
        f'env = {{ SOFTHSM2_CONF = "{conf}" }}\npin = {{ file = "pin" }}\n'
        for name, conf, find in (
            ("hsm1", token.conf, f'token_serial = "{token.serial}"'),
            ("hsm2", other_conf, 'token_label = "one token"'),
        )
    )
    toml.write_text(f'[group]\nlabel = "payments"\n{members}')
    toml.chmod(0o600)
    group = GroupFixture(toml)
    before = toml.read_text()
    done = group.admin("group", "create", "--yes", "--so-pin-file", str(folder / "so-pin"))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    for word in ('"hsm1"', '"hsm2"', "one token", token.serial):
        assert word in done.stderr
    assert toml.read_text() == before
    assert not (folder / "journal.db").exists()
    assert plain.objects({"module": SOFTHSM, "serial": token.serial, "env": token.env}, own=True) == []
