"""Ctrl-C in the middle of every command of ha-admin: the same command again completes it (issue 4).

Each is run on a copy of a group, and asked to tell its interactions with the journal, the members and files. Then it
gets SIGINT, a process of its own as it is, at some of these: ``HAGROUP_CTRL_C_ALL=1`` at all of them (hours).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import forked_admin, plain
from tests.support.admin_commands import ALL, MORE, READING, Sites, make_site, make_transport_keys, toml_of, words_of
from tests.support.forked_admin import Done
from tests.support.groups import GroupFixture
from tests.support.interactions import AFTER, BEFORE

FINE, DEGRADED, USAGE, STOPPED = 0, 1, 2, 130
STOPPED_TEXT = "ha-admin: stopped; run the same command again to complete it"
ONLY_READ = (*READING, "objects --member hsm2", "verify", "domain show", "doctor")
JOURNAL_ALONE = ("journal note", *(f"member {what} hsm2" for what in ("standby", "backup", "activate", "resume")))
Point = tuple[int, str]

CREATED = "keys of a domain are there already"
COMPLETE = {
    "group create --yes": "was created already",
    "group join --yes": "this host is in a group",
    "group delete --yes": "the group was not created yet",
    "domain create --yes": CREATED,
    "domain create --sealed --yes": "holds shares already",
    "domain rotate --yes --json": "holds shares already",
    "member add hsm4 --yes": 'the group has a member "hsm4" already',
    "member remove hsm3 --yes": "the group has no member 'hsm3'",
    "backup create": "exists already and is not overwritten",
    "domain shares --shares 2-of-3 --yes": "holds shares already",
}
"""What a command says that had done all when it was stopped."""


@pytest.fixture(scope="module")
def sites(fast_folder: Path) -> Sites:
    folder = fast_folder / "ctrl-c"
    site = make_site(folder / "site")
    make_transport_keys(site)
    return Sites(site, folder)


def run(group: GroupFixture, line: str, stop: Point | None = None) -> Done:
    config = toml_of(group, line)
    return forked_admin.run("--config", str(config), *words_of(group, line), watch=group.folder, stop=stop)


def points(line: str, done: Done) -> list[Point]:
    """Where to stop it: in the middle, for what changes something also after its first change."""
    met = done.interactions
    changes = [number for number, (_, is_change) in enumerate(met, 1) if is_change]
    if os.environ.get("HAGROUP_CTRL_C_ALL"):
        return [(number, when) for number in range(1, len(met) + 1) for when in (BEFORE, AFTER)]
    middle = (len(met) * 2 // 3, BEFORE)
    if line in MORE:  # others ask more of the same commands
        return [(changes[0], AFTER)]
    return [middle] if line in ONLY_READ else [(changes[0], AFTER), middle]


def whole(group: GroupFixture, line: str, where: str) -> None:
    """Nothing is half-done."""
    config = toml_of(group, line)

    def fine(*words: str) -> None:
        done = forked_admin.run("--config", str(config), *words)
        assert done.returncode == FINE, f"{line}, stopped {where}; {words}: {done.stdout}{done.stderr}"

    if line == "group delete --yes":
        assert all(plain.objects(member, own=True) == [] for member in group.members.values()), where
        return
    if line.startswith("domain create"):
        fine("group", "create", "--yes", "--so-pin-file", str(group.folder / "so-pin"))
    if line.startswith("journal move"):
        config.write_text(config.read_text().replace("sqlite:journal.db", "sqlite:moved.db"))
    pin = ["--pin-file", str(group.folder / "hsm1" / "pin")]
    if line in ("journal rebuild --yes", "journal adopt --yes", "group join --yes") or line.startswith("journal move"):
        fine("sync", *pin)
    fine("verify", *pin)


@pytest.mark.parametrize("line", [*ALL, *MORE])
def test_ctrl_c(sites: Sites, line: str) -> None:
    with sites.copy(line) as group:
        undisturbed = run(group, line, (0, BEFORE))
        assert undisturbed.returncode in (FINE, DEGRADED), undisturbed.stderr
        assert len(undisturbed.interactions) > 2
        if line in ONLY_READ:
            for point in points(line, undisturbed):
                stopped_and_again(group, line, point, undisturbed.returncode)
            return
    where = points(line, undisturbed)
    for point in where:
        with sites.copy(line) as group:
            told = stopped_and_again(group, line, point, undisturbed.returncode)
            if line not in JOURNAL_ALONE or point == where[-1]:
                whole(group, line, told)


def stopped_and_again(group: GroupFixture, line: str, point: Point, status: int) -> str:
    """Returns where it was stopped."""
    stopped = run(group, line, point)
    where = f"at {point}: {stopped.stopped_at}"
    told = stopped.stdout + stopped.stderr
    if not stopped.stopped_at:  # what comes in the background made it shorter
        assert stopped.returncode == status, f"{line}, {where}: {told}"
        return where
    assert stopped.returncode == STOPPED, f"{line}, {where}: {stopped.returncode}: {told}"
    assert "Traceback" not in told, where
    assert stopped.stderr.strip().splitlines()[-1] == STOPPED_TEXT, f"{where}: {told}"
    again = run(group, line)
    told = again.stdout + again.stderr
    complete = again.returncode == USAGE and line in COMPLETE and COMPLETE[line] in again.stderr
    assert again.returncode == status or complete, f"{line}, stopped {where}: {again.returncode}: {told}"
    assert "Traceback" not in told, where
    return where
