"""Which objects an event of the log is about: their UIDs and labels, in its data.

Never in its text: that goes to people who have no business with what an application's keys are called (``doctor
--bundle``, hook and webhook).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hagroup.core.attributes import CKA
from hagroup.core.records import Event, ObjectRecord
from hagroup.journal.api import Journal

_OBJECT = "object:"
_MOST = 100
"""Objects that one event names; its text has their number where there are more."""


def label_of(record: ObjectRecord) -> str:
    return record.attributes.get(CKA.LABEL, b"").decode(errors="replace")


def objects(labels: Mapping[bytes, str]) -> dict[str, str]:
    """As data of an event. :param labels: by UID."""
    return {_OBJECT + uid.hex(): label for uid, label in list(labels.items())[:_MOST]}


def known(journal: Journal, uids: Iterable[bytes]) -> dict[str, str]:
    """The same, with the labels that the journal has for them (the last one, of what was destroyed)."""
    labels = {}
    for uid, _ in zip(uids, range(_MOST), strict=False):
        record = journal.object(uid)
        tombstone = journal.tombstone(uid) if record is None else None
        if record is not None:
            labels[uid] = label_of(record)
        else:
            locators = () if tombstone is None else tombstone.locators
            labels[uid] = locators[-1].label.decode(errors="replace") if locators else ""
    return objects(labels)


def objects_in(event: Event) -> dict[str, str]:
    """Labels by UID, in hexadecimal digits."""
    return {key.removeprefix(_OBJECT): label for key, label in event.data.items() if key.startswith(_OBJECT)}


def uids_of(journal: Journal, events: Iterable[Event], name: str) -> frozenset[str]:
    """What a person may mean: the object with this UID, and those that have this label now or had it in an event."""
    now = {record.uid.hex() for record in journal.search({CKA.LABEL: name.encode()})}
    then = {uid for event in events for uid, label in objects_in(event).items() if label == name}
    return frozenset({name.lower(), *now, *then})
