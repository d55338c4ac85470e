"""What the settings of ``hagroup.toml`` promise (DESIGN.md 1.2, 4.2, 4.5), and the loss of everything."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism, bootstrap
from hagroup.core.records import WATCHDOG, Observation
from hagroup.engine.supervisor import doubted
from hagroup.errors import GroupReadOnly, GroupUnavailable, JournalUnavailable
from tests.support import plain
from tests.support.groups import PIN, GroupFixture, run_client, wait_until

RSA = Mechanism.SHA256_RSA_PKCS


@contextmanager
def client(group: GroupFixture) -> Iterator[Any]:
    """A logged-in session with all members in service that can be."""
    library = pkcs11.lib(str(group.toml))
    try:
        with library.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
            library.group.supervisor.settle()
            yield session
    finally:
        library.unload()


def engine(session: Any) -> Any:
    return session.token.slot._library.group


def set_option(group: GroupFixture, section: str, line: str) -> None:
    """Put ``line`` into a section, in place of the same key where there is one."""
    key = line.split("=")[0].strip()
    lines = [old for old in group.toml.read_text().splitlines() if old.split("=")[0].strip() != key]
    place = next(number for number, old in enumerate(lines) if old.startswith(f"[{section}]"))
    lines.insert(place + 1, line)
    group.toml.write_text("\n".join(lines) + "\n")


def quick(group: GroupFixture) -> None:
    """Short deadlines, as tests want them."""
    for line in ("call = 1.0", "generate = 5.0", "probe = 0.5"):
        set_option(group, "timeouts", line)


def in_service(session: Any, *names: str) -> None:
    """These members, and no others, serve; and what is owed to them is done."""
    group = engine(session)

    def settled() -> bool:
        group.supervisor.wake()
        serving = {member.name for member in group.roster.serving()}
        return serving == set(names) and not any(group.journal.owed(name) for name in names)

    wait_until(settled, f"{names} in service")


# -- [group] degraded --------------------------------------------------------------------------------------------


def test_degraded_refuse(new_group: Any) -> None:
    group = new_group()
    set_option(group, "group", 'degraded = "refuse"')
    with client(group) as session:
        _, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label="signer")
        key = session.generate_key(KeyType.AES, 128, store=True, label="key")
        group.stop("hsm2")
        wait_until(lambda: len(engine(session).roster.serving()) == 2, "hsm2 gone")
        session.generate_key(KeyType.AES, 128, store=True, label="still two")
        group.stop("hsm3")
        wait_until(lambda: len(engine(session).roster.serving()) == 1, "hsm3 gone")
        with pytest.raises(GroupReadOnly):
            session.generate_key(KeyType.AES, 128, store=True, label="refused")
        with pytest.raises(GroupReadOnly):
            key[Attribute.LABEL] = "refused"
        with pytest.raises(GroupReadOnly):
            key.destroy()
        with pytest.raises(pkcs11.exceptions.TokenWriteProtected):
            key.copy({Attribute.LABEL: "refused"})
        assert private.sign(b"data", mechanism=RSA)
        assert session.generate_key(KeyType.AES, 128).encrypt(b"x", mechanism_param=bytes(16)), "session objects"
        group.bring_back("hsm2")
        in_service(session, "hsm1", "hsm2")
        key[Attribute.LABEL] = "changed"
        assert list(session.get_objects({Attribute.LABEL: "refused"})) == []
        group.bring_back("hsm3")
        in_service(session, "hsm1", "hsm2", "hsm3")
    wait_until(lambda: group.admin("sync").returncode == 0, "in sync")
    assert [plain.labels(member) for member in group.members.values()] == [
        ["changed", "signer", "signer", "still two"]
    ] * 3


# -- [journal] mirror ----------------------------------------------------------------------------------------------


def mirrored(path: Path) -> dict[bytes, tuple[int, bool]]:
    """UID: (revision, whether there is a record)."""
    connection = sqlite3.connect(path)
    try:
        rows = connection.execute("SELECT uid, revision, record IS NOT NULL FROM records").fetchall()
        return {uid: (revision, bool(there)) for uid, revision, there in rows}
    finally:
        connection.close()


def test_mirror_holds_the_envelopes_instead_of_the_members(fast_folder: Path, new_group: Any) -> None:
    group = new_group()
    place = fast_folder / "other-disk"
    place.mkdir(mode=0o700)
    mirror = place / "mirror.db"
    set_option(group, "journal", f'mirror = "{mirror}"')
    with client(group) as session:
        key = session.generate_key(KeyType.AES, 256, store=True, label="mirrored")
        doomed = session.generate_key(KeyType.AES, 256, store=True, label="doomed")
        key[Attribute.LABEL] = "renamed"
        doomed.destroy()
        assert mirrored(mirror) == {key.uid: (2, True), doomed.uid: (1, False)} or mirrored(mirror) == {
            key.uid: (2, True),
            doomed.uid: (0, False),
        }
        for member in group.members.values():
            own = [item["label"] for item in plain.objects(member, own=True)]
            assert not [label for label in own if label.startswith("hagroup:object")], own
        # the other disk goes away: nothing can be changed, nothing is left over, all else goes on
        place.rename(place.with_name("gone"))
        for change in (
            lambda: session.generate_key(KeyType.AES, 128, store=True, label="refused"),
            lambda: key.__setitem__(Attribute.LABEL, "refused"),
            lambda: key.copy({Attribute.LABEL: "refused"}),
            lambda: key.destroy(),
        ):
            with pytest.raises(JournalUnavailable, match="mirror"):
                change()
        assert engine(session).journal.intents() == []
        assert key[Attribute.LABEL] == "renamed"
        assert key.encrypt(b"x" * 16, mechanism_param=bytes(16))
        assert list(session.get_objects({Attribute.LABEL: "refused"})) == []
        for member in group.members.values():
            assert plain.labels(member) == ["renamed"]
        place.with_name("gone").rename(place)
        key[Attribute.LABEL] = "again"
        session.generate_key(KeyType.AES, 128, store=True, label="more")
        assert sorted(mirrored(mirror).values())[-1] == (3, True)
    for member in group.members.values():
        assert plain.labels(member) == ["again", "more"]
    # the journal is lost: the mirror and the members make it anew, and what was destroyed stays so
    for end in ("", "-wal", "-shm", ".view"):
        (group.folder / f"journal.db{end}").unlink(missing_ok=True)
    rebuilt = group.admin("journal", "rebuild", "--json")
    assert rebuilt.returncode == 0, rebuilt.stdout + rebuilt.stderr
    told = json.loads(rebuilt.stdout)
    assert (told["objects"], told["tombstones"], told["doubtful"]) == (2, 1, [])
    with client(group) as session:
        assert sorted(found.label for found in session.get_objects()) == ["again", "more"]
        session.generate_key(KeyType.AES, 128, store=True, label="new")
        next(iter(session.get_objects({Attribute.LABEL: "more"}))).destroy()
    for member in group.members.values():
        assert plain.labels(member) == ["again", "new"]


# -- [journal] offline_serving ---------------------------------------------------------------------------------------


@contextmanager
def journal_away(group: GroupFixture) -> Iterator[None]:
    journal = group.folder / "journal.db"
    journal.rename(journal.with_suffix(".away"))
    try:
        yield
    finally:
        journal.with_suffix(".away").rename(journal)


@contextmanager
def journal_locked(group: GroupFixture) -> Iterator[None]:
    """Somebody holds the write lock and does not let go. In another process: SQLite's locks are a process's."""
    import subprocess
    import sys

    program = (
        "import sqlite3, sys\n"
        f"c = sqlite3.connect({str(group.folder / 'journal.db')!r}, isolation_level=None)\n"
        "c.execute('BEGIN IMMEDIATE'); print('locked', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            holder.stdin.close()
            holder.wait()


@pytest.mark.parametrize("away", [journal_away, journal_locked])
def test_operations_go_on_without_the_journal(new_group: Any, away: Any) -> None:
    group = new_group()
    with client(group) as session:
        public, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label="signer")
        key = session.generate_key(KeyType.AES, 128, store=True, label="key")
        in_service(session, "hsm1", "hsm2", "hsm3")
        signature = private.sign(b"data", mechanism=RSA)
        assert public.verify(b"data", signature, mechanism=RSA)
        assert key.encrypt(b"x" * 16, mechanism_param=bytes(16))
        loose = session.generate_key(KeyType.AES, 128)
        with away(group):
            assert private.sign(b"data", mechanism=RSA) == signature
            assert public.verify(b"data", signature, mechanism=RSA)
            assert loose.encrypt(b"x", mechanism_param=bytes(16))
            for change in (
                lambda: session.generate_key(KeyType.AES, 128, store=True, label="refused"),
                lambda: key.__setitem__(Attribute.LABEL, "refused"),
                lambda: key.destroy(),
            ):
                begun = time.monotonic()
                with pytest.raises(JournalUnavailable):
                    change()
                assert time.monotonic() - begun < 12
            assert private.sign(b"data", mechanism=RSA) == signature
        key[Attribute.LABEL] = "changed"
        session.generate_key(KeyType.AES, 128, store=True, label="made")
        assert private.sign(b"data", mechanism=RSA) == signature
        run_client(group, "session.get_key(label='made').destroy()\n")
        assert list(session.get_objects({Attribute.LABEL: "made"})) == []
        assert list(session.get_objects({Attribute.LABEL: "refused"})) == []
        assert engine(session).journal.intents() == []
        for member in group.members.values():
            wait_until(lambda member=member: plain.labels(member) == ["changed", "signer", "signer"], "the same on all")


def test_a_member_lost_without_the_journal(new_group: Any) -> None:
    """The failover itself needs no journal."""
    group = new_group()
    quick(group)
    with client(group) as session:
        _, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label="signer")
        in_service(session, "hsm1", "hsm2", "hsm3")
        signature = private.sign(b"data", mechanism=RSA)
        with journal_away(group):
            for name in ("hsm1", "hsm2"):
                connection = engine(session).roster.members[name].life.connection
                group.workers()[name].kill()
                wait_until(lambda connection=connection: not connection.alive, "its worker is gone")
            for _ in range(20):
                assert private.sign(b"data", mechanism=RSA) == signature
        in_service(session, "hsm1", "hsm2", "hsm3")


def test_a_client_cannot_start_without_the_journal(new_group: Any) -> None:
    group = new_group(members=1)
    with journal_away(group):
        with pytest.raises(JournalUnavailable):
            pkcs11.lib(str(group.toml))
        done = group.admin("status", "--json")  # tells what it can: the journal is away, the members answer
        assert done.returncode == 1
        assert json.loads(done.stdout)["journal"]["ok"] is False


# -- everything lost, and back ---------------------------------------------------------------------------------------


def test_all_members_lost_and_back(new_group: Any) -> None:
    group = new_group()
    quick(group)
    with client(group) as session:
        _, private = session.generate_keypair(KeyType.RSA, 2048, store=True, label="signer")
        loose = session.generate_key(KeyType.AES, 128)
        ciphertext = loose.encrypt(b"x" * 16, mechanism_param=bytes(16))
        in_service(session, "hsm1", "hsm2", "hsm3")
        for _ in range(2):
            for name in group.members:
                group.stop(name)
            for _ in range(3):
                begun = time.monotonic()
                with pytest.raises(pkcs11.exceptions.DeviceError):
                    private.sign(b"data", mechanism=RSA)
                assert time.monotonic() - begun < 3 * 1.0 + 1.5
            with pytest.raises(GroupUnavailable):
                session.generate_key(KeyType.AES, 128, store=True, label="nowhere")
            for name in group.members:
                group.bring_back(name)

            def works() -> bool:
                try:
                    return bool(private.sign(b"data", mechanism=RSA))
                except pkcs11.exceptions.DeviceError:
                    return False

            wait_until(works, "signing again")
            assert loose.encrypt(b"x" * 16, mechanism_param=bytes(16)) == ciphertext, "session objects too"
            in_service(session, "hsm1", "hsm2", "hsm3")
        assert list(session.get_objects({Attribute.LABEL: "nowhere"})) == []


# -- observations ----------------------------------------------------------------------------------------------------


def seen(member: str, observer: str, when: float, *, ok: bool = False) -> Observation:
    return Observation(member=member, observer=observer, site=None, ok=ok, kind="test", boot_time=when)


def test_who_is_doubted() -> None:
    everybody = {"a", "b", "c", "me"}
    assert doubted([seen("m", "a", 5.0)], "me", everybody.__contains__) == {}
    assert doubted([seen("m", "a", 5.0), seen("m", "b", 7.0)], "me", everybody.__contains__) == {"m": 5.0}
    assert doubted([seen("m", "a", 5.0), seen("m", "me", 7.0)], "me", everybody.__contains__) == {}
    assert doubted([seen("m", "a", 5.0), seen("m", "dead", 7.0)], "me", everybody.__contains__) == {}
    assert doubted([seen("m", "a", 5.0), seen("m", "b", 7.0, ok=True)], "me", everybody.__contains__) == {}
    three = [seen("m", "a", 5.0), seen("m", "b", 7.0), seen("m", "c", 9.0)]
    assert doubted(three, "me", everybody.__contains__) == {"m": 7.0}
    watchdog = Observation(member="m", observer="a", site="zurich", ok=False, kind=WATCHDOG, boot_time=5.0)
    assert doubted([watchdog], "me", everybody.__contains__, site="zurich") == {"m": 5.0}, "of the same site"
    assert doubted([watchdog], "me", everybody.__contains__, site="geneva") == {}, "of another"
    two = [seen("m", "a", 5.0), seen("m", "b", 7.0)]
    assert doubted(two, "me", everybody.__contains__, site="geneva") == {}, "nor two that are elsewhere"


def test_what_two_others_saw_is_looked_at_and_not_believed(new_group: Any) -> None:
    group = new_group()
    with client(group) as session:
        mine = engine(session)
        in_service(session, "hsm1", "hsm2", "hsm3")
        probed: list[tuple[str, bool]] = []
        lock = threading.Lock()
        probe = mine.roster.probe

        def noted(member: Any, life: Any, stalled: bool = True) -> bool:
            with lock:
                probed.append((member.name, stalled))
            return bool(probe(member, life, stalled))

        mine.roster.probe = noted
        others = [bootstrap.open_group(group.toml), bootstrap.open_group(group.toml)]
        try:
            for other in others:
                other.supervisor.settle()
            for number, other in enumerate(others):
                later = mine.clock.boot() + 1.0  # than any success of ours
                other.journal.observe([seen("hsm2", other.journal.owner, later)])
                mine.supervisor.tick()
                if number == 0:
                    assert probed == [], "one witness is none"
            assert probed == [], "our own success is fresher than a heartbeat"
            wait_until(lambda: probed, "a look at hsm2")
            session.generate_random(8)
            assert set(probed) == {("hsm2", False)}
            in_service(session, "hsm1", "hsm2", "hsm3")
            assert mine.roster.members["hsm2"].rests == 0, "no call of ours stalled: it is not spared"
        finally:
            for other in others:
                other.close()
