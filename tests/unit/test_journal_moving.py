"""That two journals hold the same is told without both in memory; and that they do not."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from hagroup.journal.api import Contents
from hagroup.journal.moving import difference, digest, digest_of, everything
from tests.support.journals import SqliteBackend, ask, make_live, member, revision_of


def test_what_is_missing_added_or_changed_is_named(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path, [member("a"), member("b")])
    journal = backend.open()
    records = [make_live(journal, "a") for _ in range(3)]
    journal.destroy(records.pop().uid, asking=ask("a"), membership_revision=revision_of(journal))
    journal.event("noticed", "something")
    group, members, contents = everything(journal, journal.group().epoch)
    there = digest(journal)

    def compared(contents: Contents) -> str | None:
        return difference(digest_of(group, members, contents), there)

    assert compared(contents) is None
    assert compared(replace(contents, records=contents.records[::-1])) is None, "whatever the order"
    assert compared(replace(contents, records=contents.records[1:])) == "records: 1 and 2"
    other = replace(contents.records[0], envelope=b"another")
    assert compared(replace(contents, records=[other, contents.records[1]])) == "records: 2 and 2"
    twice = [contents.records[0], contents.records[0]]
    assert compared(replace(contents, records=twice)) == "records: 2 and 2"
    for name in ("copies", "tombstones", "owed", "events"):
        kept = getattr(contents, name)
        assert compared(replace(contents, **{name: [*kept, kept[0]]})) == f"{name}: {len(kept) + 1} and {len(kept)}"
    assert compared(replace(contents, cleared="epoch")) == "the head"
    assert compared(replace(contents, epoch="another")) == "group, epoch or members"
    backend.close()
