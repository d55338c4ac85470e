"""Deliberate bugs in the protocol, and the test that catches each (``tools/mutants`` shows it).

Each breaks one rule of DESIGN.md by an edit of one place. A rule whose bug no test notices is not tested.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """Where ``old`` stands exactly once in ``file``, ``new`` is put; ``test`` must fail then."""

    name: str
    why: str
    file: str
    old: str
    new: str
    test: str


GROUP = "tests/properties/test_group_machine.py"
PROTOCOL = "tests/properties/test_protocol_rules.py"
JOURNAL = "tests/contract/test_journal.py"

MUTATIONS = (
    Mutation(
        "unwrap before the envelope is durable",
        "the trial unwrap at the source makes a token object, before the journal has a row or an envelope (4.2)",
        "hagroup/engine/replica.py",
        "    return _make(connection, keys, record, token=False, sid=sid, timeout=timeout)",
        "    return _make(connection, keys, record, token=True, sid=sid, timeout=timeout)",
        f"{PROTOCOL}::test_killed_before_the_envelope_is_durable_leaves_nothing",
    ),
    Mutation(
        "tombstone after destroy",
        "members are told to destroy before the tombstone is durable (4.3)",
        "hagroup/engine/change.py",
        "        try:\n            (tombstone, rows), targets = self._group.replication.begin(",
        "        from hagroup.engine import replica\n\n"
        "        for _, life in self._group.replication.targets():\n"
        "            place = [record.locator]\n"
        "            replica.remove(life.connection, uid, place, record.fingerprint, {}, timeout=self._timeout)\n"
        "        try:\n            (tombstone, rows), targets = self._group.replication.begin(",
        f"{PROTOCOL}::test_killed_before_the_tombstone_leaves_the_object_whole",
    ),
    Mutation(
        "no owed row before a change",
        "a create is owed only by the members that are asked, so one that is away never gets it (4.1)",
        "hagroup/journal/changing.py",
        "                for name in names:\n                    row = rules.new_row(",
        "                for name in asked:\n                    row = rules.new_row(",
        f"{JOURNAL}::test_create_is_owed_by_every_listed_member_whatever_its_membership",
    ),
    Mutation(
        "late unwrap not undone",
        "an install that is confirmed after the object was destroyed stays on the member (4.1)",
        "hagroup/engine/replicate.py",
        "                overtaken = True\n                self.undo(member, life, record)",
        "                overtaken = True\n                self._journal.undone(member.name, record.uid)",
        f"{PROTOCOL}::test_an_install_that_a_destroy_overtook_is_undone",
    ),
    Mutation(
        "doubt cleared at once",
        "a call without an answer is taken for over, although the member may still execute it (4.1)",
        "hagroup/engine/resync.py",
        "            late = given_up and self._clock.boot() - attempt.since > member.config.late_window",
        "            late = given_up",
        f"{PROTOCOL}::test_a_call_that_executes_late_leaves_nothing",
    ),
    Mutation(
        "admission without the barrier",
        "a member is admitted although it owes changes from before its verification began (4.6)",
        "hagroup/journal/membership.py",
        "            if hinders:\n                return hinders\n",
        "",
        f"{JOURNAL}::test_admission_waits_for_what_was_owed_before_the_barrier",
    ),
    Mutation(
        "admission by an older membership",
        "a member is admitted although another process just found that its token was restored (4.6)",
        "hagroup/journal/membership.py",
        "            t.expect_membership(membership_revision)\n",
        "",
        f"{PROTOCOL}::test_a_token_that_is_restored_while_it_is_admitted_is_looked_at_again",
    ),
    Mutation(
        "the first of several matches",
        "of several objects that match on a member one is used (4.4)",
        "hagroup/engine/objects.py",
        "        if len(found) != 1:  # never the first of several (DESIGN.md 4.4)",
        "        if not found:",
        f"{PROTOCOL}::test_of_several_matches_none_is_used",
    ),
    Mutation(
        "handle cached across generations",
        "a connection starts with the handles of the one before it, where numbers name other keys (trap 10)",
        "hagroup/engine/roster.py",
        "            member.life = life\n            member.looked_at_again = False",
        "            life.handles = member.__dict__.setdefault('handles', life.handles)\n"
        "            member.life = life\n            member.looked_at_again = False",
        f"{PROTOCOL}::test_no_handle_outlives_its_connection",
    ),
    Mutation(
        "a handle that was forgotten while it was looked for is kept",
        "what moved may have been made anew on the member, and its number given to another key (trap 10)",
        "hagroup/engine/handles.py",
        "                if self._searches.get(uid) is search:\n                    self[uid] = search.handle",
        "                self[uid] = search.handle",
        "tests/unit/test_handles.py::test_what_is_forgotten_meanwhile_is_not_remembered",
    ),
    Mutation(
        "retry without looking",
        "what was asked for without an answer is made again without looking whether it is there (3)",
        "hagroup/engine/resync.py",
        "        return row.asked_before or row.kind is OwedKind.SET",
        "        return row.kind is OwedKind.SET",
        f"{PROTOCOL}::test_an_unanswered_install_is_looked_for_before_it_is_made",
    ),
    Mutation(
        "refused PIN tried again",
        "the record of a refusal does not keep anybody from trying that PIN again (4.7)",
        "hagroup/journal/rules.py",
        "        return own[0] if own else None",
        "        return None",
        f"{JOURNAL}::test_a_refused_pin_is_not_tried_until_its_source_changes",
    ),
    Mutation(
        "PIN tried while the count is low",
        "a token that remembers a failed login is logged in to automatically (4.7)",
        "hagroup/engine/login.py",
        "    if automatic and (trouble := pin_trouble(flags)):\n        raise _held(member, trouble)\n",
        "",
        f"{PROTOCOL}::test_nobody_logs_in_automatically_while_the_count_is_low",
    ),
    Mutation(
        "resync claims without the lease",
        "a resync that lost its lease to another process goes on claiming rows (4.1, 4.6)",
        "hagroup/engine/resync.py",
        "batch, worker=life.worker, membership_revision=self._view.group.membership_revision, lease=lease",
        "batch, worker=life.worker, membership_revision=self._view.group.membership_revision",
        f"{PROTOCOL}::test_a_resync_that_lost_its_lease_changes_nothing",
    ),
    Mutation(
        "tombstone not applied to in-doubt rows",
        "a destroy leaves rows alone that are in doubt, so what comes late is never destroyed (4.1)",
        "hagroup/journal/transaction.py",
        "            condemned[member] = rules.condemned(",
        "            condemned[member] = row if row.attempts else rules.condemned(",
        f"{PROTOCOL}::test_a_call_that_executes_late_leaves_nothing",
    ),
    Mutation(
        "manifest not read at connect",
        "a token that was restored, or a journal that is behind, is not noticed (4.6)",
        "hagroup/engine/key_search.py",
        "            manifest.check(self._roster.journal, self._roster.view, member, "
        "life, timeout=timeout, shown=shown)\n",
        "",
        f"{PROTOCOL}::test_a_journal_that_is_behind_changes_nothing",
    ),
    Mutation(
        "a slow member makes keys, too",
        "whoever makes a key there waits ten times as long, while quick members stand idle",
        "hagroup/engine/choosing.py",
        "choose(rested, last, self._time_for_making()) if making else choose(rested, last)",
        "choose(rested, last)",
        "tests/scenarios/test_3_4_11_slow_member.py::test_no_key_is_made_on_it",
    ),
    Mutation(
        "the reference's key not compared",
        "a member whose mechanism makes other keys of envelopes serves (G9)",
        "hagroup/engine/challenge.py",
        "    if not right:\n",
        "    if False:\n",
        "tests/integration/test_domain.py::test_a_reference_tells_when_another_key_comes_out",
    ),
    Mutation(
        "a token's own progress not read",
        "what was created since a token was saved is not looked for after it was put back (4.6)",
        "hagroup/engine/resync.py",
        "        return life.proved_since_low or self._prove_since_low(member, life)",
        "        return True",
        f"{GROUP}::test_history_that_once_broke[restored, created since]",
    ),
    Mutation(
        "a creation counts members that lost it",
        "an object being created is not looked for on a token that was emptied (G1)",
        "hagroup/engine/whole_token.py",
        "            wanted = record.state is ObjectState.LIVE or record.uid in self._settled",
        "            wanted = record.state is ObjectState.LIVE",
        f"{GROUP}::test_history_that_once_broke[emptied while creating]",
    ),
    Mutation(
        "a token that was read a while ago is taken for its present state",
        "what others made or renamed while a token was read counts as lost there (4.6)",
        "hagroup/engine/recent.py",
        "    return record is not None and name not in owed and copies.get(name) == copy",
        "    return record is not None",
        "tests/integration/test_long_reads.py::test_changes_while_a_whole_token_is_compared",
    ),
    Mutation(
        "nobody looks for what a dead program cut off",
        "a ghost stays on the token of a member whose worker died with its program (trap 3)",
        "hagroup/engine/resync.py",
        "            if self._journal.cut_off(member.name):\n",
        "            if False:\n",
        "tests/faults/test_torn_writes.py::test_a_program_dies_with_its_member_inside_a_write",
    ),
    Mutation(
        "a request that was never read counts as sent",
        "two members that were killed before a call make that call fail (3)",
        "hagroup/members/process.py",
        "sent = sent and not isinstance(error, ConnectionResetError)",
        "sent = bool(sent)",
        "tests/contract/test_connection.py::test_a_request_that_a_killed_worker_never_read",
    ),
    Mutation(
        "an error of a member means that nothing was made",
        "a token that was put back to that moment has the object without its sealed record (G1)",
        "hagroup/engine/replica.py",
        "not isinstance(error, Ckr) or refuses(error)",
        "True",
        f"{GROUP}::test_history_that_once_broke[made in spite of an error]",
    ),
    Mutation(
        "a record alone is not looked for",
        "the sealed record of a destroyed object comes back with a restored token (G2)",
        "hagroup/engine/whole_token.py",
        "                stone.uid in self._with_record\n                or any(",
        "                any(",
        f"{GROUP}::test_history_that_once_broke[record of a destroyed object]",
    ),
    Mutation(
        "what was put aside at a member's admission is looked for under its present names only",
        "a destroyed key stays on a token that was put back to before its label changed (G2)",
        "hagroup/engine/resync.py",
        "anywhere=put_aside or record.membership",
        "anywhere=record.membership",
        f"{GROUP}::test_history_that_once_broke[destroyed, under its name of before]",
    ),
    Mutation(
        "a lease is not kept while its holder is inside something long",
        "a member with many objects behind a slow line is never admitted (4.6)",
        "hagroup/engine/held_lease.py",
        "    thread.start()\n",
        "",
        "tests/integration/test_long_reads.py::test_a_token_that_takes_longer_to_read_than_a_lease_lasts",
    ),
    Mutation(
        "members being resynced are not asked",
        "an attribute change that a dead process left keeps all members out of service for ever (4.3)",
        "hagroup/engine/recovery.py",
        "        connected = [m for m in self._roster.members.values() if m.serving or m.state is State.RESYNCING]",
        "        connected = self._roster.serving()",
        f"{GROUP}::test_history_that_once_broke[change of members that all left]",
    ),
    Mutation(
        "commit before any member accepted",
        "an attribute change that every member refused is committed all the same (4.3)",
        "hagroup/engine/change.py",
        "                if result.outcome is Outcome.CONFIRMED:\n                    self._accepted(",
        "                if result.outcome is not Outcome.UNKNOWN:\n                    self._accepted(",
        f"{PROTOCOL}::test_a_change_that_all_refuse_is_none",
    ),
    Mutation(
        "live with too few copies",
        "a new object is acknowledged before min_replicas members confirmed it (G1)",
        "hagroup/journal/changing.py",
        "                if sum(1 for name in held if name not in owed or owed[name].settled) < needed:\n"
        "                    return False\n",
        "",
        f"{JOURNAL}::test_live_needs_enough_confirmations_on_serving_members",
    ),
    Mutation(
        "view number not compared",
        "a process goes on using what another one destroyed (4.5)",
        "hagroup/engine/group.py",
        "            raise JournalUnavailable(self._unusable)\n        self.view.refresh()\n",
        "            raise JournalUnavailable(self._unusable)\n",
        f"{PROTOCOL}::test_what_another_process_destroyed_is_refused",
    ),
)
