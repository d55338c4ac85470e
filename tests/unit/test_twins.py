"""Which other objects of the group may stand in a place on a token (DESIGN.md 4.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from hagroup.core.records import Locator
from hagroup.engine.twins import others_at
from hagroup.journal import SqliteJournal
from tests.support.journals import (
    AES,
    LABEL,
    SECRET_KEY,
    SqliteBackend,
    ask,
    make_live,
    member,
    new_object,
    new_uid,
    revision_of,
)


@pytest.fixture
def journal(tmp_path: Path) -> SqliteJournal:
    return SqliteBackend(tmp_path, [member("a")]).open()


def found(journal: SqliteJournal, label: bytes, id_: bytes = b"id") -> list[bytes]:
    place = Locator(SECRET_KEY, AES, id_, label)
    return [record.uid for record in others_at(journal, b"mine", [place])]


def begin_set(journal: SqliteJournal, uid: bytes, label: bytes) -> str:
    return journal.begin_set(
        uid,
        revision=1,
        new_attributes={LABEL: label},
        new_envelope=None,
        asking=ask("a"),
        membership_revision=revision_of(journal),
    ).id


def test_one_that_is_being_made(journal: SqliteJournal) -> None:
    record = new_object(b"here", id_=b"id")
    journal.begin_create([record], asking=ask("a"), membership_revision=revision_of(journal))
    assert found(journal, b"here") == [record.uid]
    assert found(journal, b"elsewhere") == []
    assert others_at(journal, record.uid, [record.locator]) == []


def test_one_whose_label_is_just_changing_may_be_at_either(journal: SqliteJournal) -> None:
    uid = make_live(journal, "a", record=new_object(b"old", id_=b"id")).uid
    intent = begin_set(journal, uid, b"new")
    assert found(journal, b"old") == [uid]
    assert found(journal, b"new") == [uid]
    journal.commit_set(intent)
    assert found(journal, b"old") == []
    assert found(journal, b"new") == [uid]


def test_one_that_members_have_under_another_id(journal: SqliteJournal) -> None:
    """Nothing else separates two there; the id that applications see is the same."""
    first = make_live(journal, "a", record=new_object(b"twin", id_=b"id"))
    uid = new_uid()
    alike = msgspec.structs.replace(new_object(b"twin", id_=b"id", uid=uid), fingerprint=first.fingerprint)
    make_live(journal, "a", record=alike)
    second = journal.object(uid)
    assert second is not None
    assert second.member_id == uid
    assert found(journal, b"twin") == [first.uid]
    assert found(journal, b"twin", id_=uid) == [uid]


def test_one_that_comes_to_life_while_it_is_looked_for(journal: SqliteJournal, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = make_live(journal, "a", record=new_object(b"old", id_=b"id")).uid
    intent = begin_set(journal, uid, b"new")
    reads = [journal.intents, journal.search]

    def is_committed_between(read: Any) -> Any:
        def instead(*arguments: Any) -> Any:
            reads.remove(read)
            if not reads:
                journal.commit_set(intent)
            return read(*arguments)

        return instead

    for read in reads:
        monkeypatch.setattr(journal, read.__name__, is_committed_between(read))
    assert found(journal, b"new") == [uid]
