"""What this process knows of the group: the journal's content as of the last view number that it saw.

Before every operation :meth:`View.refresh` compares the view number (a memory read on SQLite) and drops what moved, so
that a key deleted by one process is refused by all others (DESIGN.md 4.5).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import msgspec

from hagroup.core.attributes import CKA
from hagroup.core.records import GroupRecord, MemberRecord, ObjectRecord, is_true
from hagroup.errors import JournalUnavailable
from hagroup.journal.api import Journal


class ObjectView(msgspec.Struct, frozen=True):
    """One live token object, and the members that have its current revision and owe nothing for it."""

    record: ObjectRecord
    members: frozenset[str]
    changing: bool
    """Somebody is at work on it: an attribute change is open, or a member is just being asked."""
    private: bool
    always_authenticate: bool


class View:
    """Cached reading of the journal. One per process; safe for threads."""

    def __init__(self, journal: Journal, *, serve_offline: bool) -> None:
        self._journal = journal
        self._serve_offline = serve_offline
        self._lock = threading.Lock()
        self._objects: dict[bytes, ObjectView | None] = {}
        self._seen = journal.view_number()
        self.dropped: Callable[[Collection[bytes] | None], None] = lambda uids: None
        """Called with the UIDs of what moved (None: everything), before anybody sees the new view: whoever keeps
        handles drops theirs, so that a handle number given away again never names another key."""
        self.moved = 0
        """Grows each time the members or the group record were read anew."""
        self.group: GroupRecord
        self.members: dict[str, MemberRecord]
        self._load_members()
        self._since = self.group.change

    def _load_members(self) -> None:
        self.group, members = self._journal.view()
        self.members = {member.name: member for member in members}
        self.moved += 1

    def refresh(self, *, always: bool = False) -> None:
        """Drop what others changed. Without the journal the last view goes on serving, or JournalUnavailable.

        :param always: the journal said that this view is old. Its number may not show it: a process that dies between
            its commit and moving the number leaves the others behind until the next commit.
        """
        number = self._journal.view_number()
        if number == self._seen and not always:
            return
        with self._lock:
            if number == self._seen and not always:
                return
            try:
                changes = self._journal.changes(self._since, self.group.epoch)
                if changes.everything:
                    self._objects.clear()
                for uid in changes.uids:
                    self._objects.pop(uid, None)
                self.dropped(None if changes.everything else changes.uids)
                if changes.members or changes.everything:
                    self._load_members()
            except JournalUnavailable:
                if not self._serve_offline:
                    raise
                return
            self._since = changes.change
            self._seen = number

    def object(self, uid: bytes) -> ObjectView | None:
        """The live object, or None where there is none (never made, still being made, destroyed)."""
        found = self._objects.get(uid)
        if found is not None or uid in self._objects:
            return found
        seen = self._seen
        record, copies, owed = self._journal.object_with_placement(uid)
        view = None
        if record is not None and record.state == "live":
            members = (name for name, copy in copies.items() if copy.revision == record.revision and name not in owed)
            changing = record.intent is not None or any(row.owner is not None for row in owed.values())
            private, always = is_true(record, CKA.PRIVATE), is_true(record, CKA.ALWAYS_AUTHENTICATE)
            view = ObjectView(record, frozenset(members), changing, private, always)
        with self._lock:
            if seen == self._seen:  # else it may be older than what others dropped meanwhile
                self._objects[uid] = view
        return view

    def renew_after_fork(self) -> None:
        """In the child: a lock of its own, and everything read anew."""
        self._lock = threading.Lock()
        with self._lock:
            self._objects.clear()
            self._seen = self._journal.view_number()  # before it is read: what comes between is not missed
            self._load_members()
            self._since = self.group.change
