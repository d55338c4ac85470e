"""The journal on etcd beyond the contract: authentication, wrong settings, forks, unknown outcomes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from hagroup.config.model import JournalSection
from hagroup.errors import JournalOutcomeUnknown, JournalUnavailable
from hagroup.journal import EtcdJournal, etcd_opened
from hagroup.journal.api import Asking
from hagroup.journal.clock import boot_time
from hagroup.journal.etcd_client import EtcdClient, Unanswered, b64
from hagroup.journal.etcd_keys import KeptOwner
from hagroup.journal.etcd_mirror import TTL
from tests.support.etcd import EtcdBackend, one_node
from tests.support.groups import wait_until
from tests.support.journals import ask, confirm, installed, make_live, member, new_object, revision_of


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[EtcdBackend]:
    made = EtcdBackend(tmp_path, [member("a"), member("b")])
    yield made
    made.close()


@pytest.fixture
def authenticated(tmp_path: Path) -> Iterator[JournalSection]:
    """The cluster with authentication on: a user who may do everything below /hagroup/."""
    section = one_node().section()
    client = EtcdClient(section)
    password = tmp_path / "password"
    password.write_text("right\n")
    password.chmod(0o600)
    for user in ("root", "hagroup"):
        client.call("/auth/user/add", {"name": user, "password": "right"})
    client.call("/auth/role/add", {"name": "root"})
    client.call("/auth/role/add", {"name": "hagroup"})
    permission = {"permType": "READWRITE", "key": b64("/hagroup/"), "range_end": b64("/hagroup0")}
    client.call("/auth/role/grant", {"name": "hagroup", "perm": permission})
    client.call("/auth/user/grant", {"user": "root", "role": "root"})
    client.call("/auth/user/grant", {"user": "hagroup", "role": "hagroup"})
    client.call("/auth/enable", {})
    yield replace(section, user="hagroup", password_file=password)
    root = EtcdClient(replace(section, user="root", password_file=password))
    root.call("/auth/disable", {})
    for user in ("root", "hagroup"):
        client.call("/auth/user/delete", {"name": user})
        client.call("/auth/role/delete", {"role": user})


def create(section: JournalSection) -> None:
    EtcdJournal.create(
        section,
        label="payments",
        serial="74007601",
        members=[member("a"), member("b")],
        domain_key_id=b"domain",
        partition_key_id=b"partition",
        reference=b"reference",
    )


def test_user_and_password(authenticated: JournalSection, tmp_path: Path) -> None:
    create(authenticated)
    journal = EtcdJournal.open(authenticated)
    try:
        record = make_live(journal, "a")
        assert [one.uid for one in journal.search({})] == [record.uid]
    finally:
        journal.close()
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong")
    with pytest.raises(JournalUnavailable, match="refuses the user or password"):
        EtcdJournal.open(replace(authenticated, password_file=wrong))
    with pytest.raises(JournalUnavailable, match=r"give .journal. user"):
        EtcdJournal.open(replace(authenticated, user=None, password_file=None))


def test_what_is_not_there_is_said(backend: EtcdBackend, tmp_path: Path) -> None:
    with pytest.raises(JournalUnavailable, match="does not exist"):
        EtcdJournal.open(one_node().section())
    with pytest.raises(JournalUnavailable, match="already"):
        create(backend.section)
    other = tmp_path / "other-ca.pem"
    other.write_bytes((one_node().folder / "node.pem").read_bytes())
    with pytest.raises(JournalUnavailable, match="certificate"):
        EtcdJournal.open(replace(backend.section, ca=other))


def test_a_forked_child_is_another_owner(backend: EtcdBackend) -> None:
    journal = backend.open()
    record = make_live(journal, "a")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        answer = b"wrong"
        try:
            try:
                journal.object(record.uid)
            except JournalUnavailable:
                journal.reopen_after_fork()
                assert journal.object(record.uid) == record
                answer = make_live(journal, "b").uid.hex().encode() + b" " + journal.owner.encode()
                journal.close()
        finally:
            os.write(write, answer)
            os._exit(0)
    os.waitpid(child, 0)
    uid, owner = os.read(read, 1000).decode().split()
    assert owner != journal.owner
    assert not journal.owner_alive(owner)
    assert journal.object(bytes.fromhex(uid)) is not None
    assert journal.owner_alive(journal.owner)
    make_live(journal, "a")


def test_who_ends_is_waited_for_by_nobody(backend: EtcdBackend) -> None:
    """A program that comes to its end takes its registration with it; not its parent's, if it was forked."""
    journal = backend.open()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            etcd_opened._at_exit()
            journal.reopen_after_fork()
            os.write(write, journal.owner.encode())
            etcd_opened._at_exit()
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    others = backend.open()
    assert not others.owner_alive(os.read(read, 1000).decode())
    assert others.owner_alive(journal.owner)


def test_reading_all_may_take_longer_than_a_registration_lasts(
    backend: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large journal, or a slow machine: it would register and read anew for ever."""
    made = backend.open()
    for _ in range(20):
        make_live(made, "a")
    made.close()
    call, page = EtcdClient.call, 1

    def slowly(self: EtcdClient, path: str, body: dict[str, object], **more: object) -> object:
        if body.get("limit") == page:
            time.sleep(0.2)
        return call(self, path, body, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(EtcdClient, "call", slowly)
    monkeypatch.setattr("hagroup.journal.etcd_mirror._PAGE", page)
    monkeypatch.setattr("hagroup.journal.etcd_mirror._KEEP_ALIVE", 0.5)
    for module in ("etcd_mirror", "etcd_opened"):
        monkeypatch.setattr(f"hagroup.journal.{module}.TTL", 2)
    journal = backend.open()
    assert journal.counts()["live"] == 20
    assert journal.former_owners == frozenset()


def test_operations_wait_a_moment_for_an_etcd_that_is_silent(backend: EtcdBackend) -> None:
    """Then they go on with what is known."""
    journal = backend.open()
    record = make_live(journal, "a")
    one_node().signal("node1", signal.SIGSTOP)
    try:
        for read in (journal.view, lambda: journal.object(record.uid)):
            began = time.monotonic()
            assert read()
            assert time.monotonic() - began < 3.0
    finally:
        one_node().signal("node1", signal.SIGCONT)


@pytest.mark.parametrize("carried_out", [True, False])
def test_an_answer_that_is_lost_is_found_out(
    backend: EtcdBackend, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    """An error is not a no, and not a yes: the transaction's own key tells."""
    journal = backend.open()
    original, lost = EtcdClient._ask, []

    def losing(self: EtcdClient, index: int, path: str, body: dict, **more: object) -> object:
        if path == "/kv/txn" and body.get("compare") and len(body["compare"]) > 2 and not lost:
            lost.append(path)
            if carried_out:
                original(self, index, path, body, **more)  # type: ignore[arg-type]
            from hagroup.journal.etcd_client import _NoAnswer

            raise _NoAnswer("lost")
        return original(self, index, path, body, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(EtcdClient, "_ask", losing)
    record = new_object()
    intent = journal.begin_create([record], asking=[], membership_revision=revision_of(journal))
    assert lost
    assert [one.id for one in journal.intents()] == [intent.id], "once"


def cut_off_in_a_transaction(journal: EtcdJournal, *, carried_out: bool) -> Callable[..., object]:
    """In place of ``EtcdClient.call``: the next transaction gets no answer, and from then on nobody answers."""
    original, away = EtcdClient.call, []

    def cut_off(self: EtcdClient, path: str, body: dict, **more: object) -> object:
        if path == "/kv/txn" and body.get("compare") and self is journal._client and (away or len(body["compare"]) > 2):
            if not away and carried_out:
                original(self, path, body, **more)  # type: ignore[arg-type]
            away.append(path)
            unanswered = more.get("unanswered")
            if isinstance(unanswered, list):
                unanswered.append("lost")
            raise Unanswered("cut off")
        return original(self, path, body, **more)  # type: ignore[arg-type]

    return cut_off


@pytest.mark.parametrize("carried_out", [True, False])
def test_an_outcome_that_nobody_can_tell_is_settled_later(
    backend: EtcdBackend, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    journal, other = backend.open(), backend.open()
    cut_off = cut_off_in_a_transaction(journal, carried_out=carried_out)
    record = new_object()
    with monkeypatch.context() as patched:
        patched.setattr(EtcdClient, "call", cut_off)
        with pytest.raises(JournalOutcomeUnknown):
            journal.begin_create([record], asking=[], membership_revision=1)
    journal._settle_later()
    left = other.intents()
    if not carried_out:
        assert left == []
        assert other.object(record.uid) is None
        return
    assert [one.uids for one in left] == [(record.uid,)]
    adopted = other.adopt_intent(left[0].id)
    assert adopted is not None, "nobody works on it"
    assert other.claim([("a", record.uid)], worker=None, membership_revision=1)
    assert confirm(other, installed("a", record)) == [True]
    assert other.go_live(left[0].id, needed=1, serving=["a"])


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_login_of_which_nobody_can_tell_whether_it_was_announced(
    backend: EtcdBackend, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    """It was not made. As long as it counted as under way nobody could log in there, on any host."""
    journal, other = backend.open(), backend.open()
    with monkeypatch.context() as patched:
        patched.setattr(EtcdClient, "call", cut_off_in_a_transaction(journal, carried_out=carried_out))
        with pytest.raises(JournalOutcomeUnknown):
            journal.begin_login("a", "file:pin", "stamp", clear=True)
    journal._settle_later()
    assert other.begin_login("a", "file:pin", "stamp", clear=True) is None
    journal._settle_later()
    refused = journal.begin_login("a", "file:pin", "stamp", clear=True)
    assert refused is not None and refused.owner == other.owner, "that one is under way"


def test_time_that_the_machine_slept_counts(backend: EtcdBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others stopped waiting for this process meanwhile: until it has read all anew it knows nothing."""
    journal = backend.open()
    before, awake = journal.view_number(), boot_time
    assert before != -1
    monkeypatch.setattr("hagroup.journal.etcd_mirror.boot_time", lambda: awake() + TTL + 1)
    assert journal.view_number() == -1
    wait_until(lambda: journal.view_number() > before, "everything was read anew")


def test_lock_files_of_the_dead_go_when_no_row_tells_of_them(backend: EtcdBackend) -> None:
    """Else each program that ends leaves some for ever."""
    journal, other = backend.open(), backend.open()
    folder = etcd_opened._locks(backend.section.url.name)
    asked, idle = other.worker_lock("a")[0], other.worker_lock("b")[0]
    record = new_object()
    asking = [Asking(member="a", worker=asked)]
    other.begin_create([record], asking=asking, membership_revision=revision_of(journal))
    owner = other.owner
    other.close()
    later = backend.open()
    left = set(os.listdir(folder))
    assert not {idle, owner} & left
    assert {asked, journal.owner, later.owner} <= left
    assert later.worker_dead(asked), "proved by its file"


def test_what_was_never_live_is_destroyed_without_waiting(backend: EtcdBackend) -> None:
    """The others acknowledge that too: else each would be waited for until its registration ran out."""
    journal, other = backend.open(), backend.open()
    record = new_object()
    journal.begin_create([record], asking=[], membership_revision=1)
    began = time.monotonic()
    journal.destroy(record.uid, asking=[], membership_revision=1)
    assert time.monotonic() - began < TTL / 2
    assert other.events() == []


def test_a_destruction_that_is_done_waits_for_all_and_never_looks_refused(
    backend: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody answers just after it was recorded: who has not heard of it still uses the key."""
    journal, other = backend.open(), backend.open()
    records = [make_live(journal, "a"), make_live(journal, "a")]
    assert [one.uid for one in other.objects()] == [one.uid for one in records]
    told, prefix, silent = other._mirror._told, EtcdClient.prefix, [True, True, True]
    heard: list[int] = []

    def hears(revision: int) -> None:
        wait_until(lambda: not silent, "the others answer again")
        heard.append(revision)
        told(revision)

    def no_answer(self: EtcdClient, prefix_: str, **more: object) -> object:
        if self is journal._client and silent:
            silent.pop()
            raise Unanswered("cut off")
        return prefix(self, prefix_, **more)  # type: ignore[arg-type]

    def cannot(*what: object, **more: object) -> None:
        raise JournalUnavailable("cut off")

    monkeypatch.setattr(other._mirror, "_told", hears)
    monkeypatch.setattr(EtcdClient, "prefix", no_answer)
    journal.destroy(records[0].uid, asking=[], membership_revision=1)
    assert heard

    monkeypatch.setattr(journal, "_everybody_saw", lambda revision: {"somebody": KeptOwner("host", 1, 0.0)})
    monkeypatch.setattr(journal, "_note_passed_over", cannot)
    stone, _ = journal.destroy(records[1].uid, asking=[], membership_revision=1)
    assert other.tombstone(records[1].uid) == stone


def test_who_lost_his_registration_while_nobody_answered_comes_back_by_himself(
    backend: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage, or a freeze, that was longer than a registration lasts."""
    monkeypatch.setattr("hagroup.journal.etcd_mirror._KEEP_ALIVE", 0.05)
    journal, other = backend.open(), backend.open()
    before = journal.owner
    other._client.revoke(journal._lease)
    journal._client.available = False
    wait_until(lambda: journal.owner != before and journal._client.available, "it registers anew")
    record = make_live(journal, "a")
    assert other.object(record.uid) == record
    assert not other.owner_alive(before)


def test_a_reply_counts_although_the_registration_ran_out_meanwhile(
    backend: EtcdBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as nobody else found out that it had, and took over."""
    monkeypatch.setattr("hagroup.journal.etcd_mirror._KEEP_ALIVE", 0.05)
    journal, other = backend.open(), backend.open()
    records = [new_object(), new_object()]
    for record in records:
        journal.begin_create([record], asking=ask("a"), membership_revision=revision_of(journal))
    before = journal.owner
    other._client.revoke(journal._lease)
    wait_until(lambda: journal.owner != before, "it registers anew")
    assert other.claim([("a", records[1].uid)], worker=None, membership_revision=1)
    assert confirm(journal, installed("a", records[0])) == [True]
    assert confirm(journal, installed("a", records[1])) == [False], "undone by him, then made anew"
    assert "a" not in other.placement(records[0].uid)[1]
