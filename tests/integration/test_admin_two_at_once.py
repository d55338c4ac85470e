"""Two administrators who do something at the same time: each succeeds or is refused in one sentence, one of them
succeeds, and what there is in the end is whole (issue 4)."""

from __future__ import annotations

import shutil
import threading
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import forked_admin, plain
from tests.support.admin_commands import ALL, Sites, make_site, newcomer, toml_of, words_of
from tests.support.forked_admin import Done
from tests.support.groups import GroupFixture
from tests.support.softhsm import SOFTHSM

FINE, USAGE, UNREACHABLE = 0, 2, 3
ADD, REMOVE, JOIN = "member add hsm4 --yes", "member remove hsm3 --yes", "group join --yes"
MOVE = "journal move sqlite:journal.db sqlite:moved.db --yes"
OWN = ["hagroup domain key", "hagroup partition key"]
KEYS = ["key 0", "key 1"]
THREE = ("hsm1", "hsm2", "hsm3")
ANOTHER = "another ha-admin"
NOT_NOW = "no member of the group is in service"
"""All are just brought up to date with what the other one changed."""


@pytest.fixture(scope="module")
def sites(fast_folder: Path) -> Sites:
    folder = fast_folder / "two-at-once"
    site = make_site(folder / "site")
    newcomer(site, "hsm5")
    return Sites(site, folder)


@contextmanager
def both(
    sites: Sites, line: str, *said: str, other: str = "", place: str = ""
) -> Iterator[tuple[GroupFixture, list[bool]]]:
    """Two commands that begin at once, on a copy of the group. Which of them succeeded?

    :param said: what one that is refused may say.
    :param other: the second one, with the same options; the same one where it is not given.
    :param place: folder of the second one's configuration.
    """
    together = threading.Barrier(2)
    with sites.copy(line) as group, ThreadPoolExecutor(2) as pool:

        def run(one: str, toml: Path) -> Done:
            name = "hsm5" if "hsm5" in one else "hsm4"
            words = words_of(group, one, [word.replace("hsm4", name) for word in ALL[line]])
            together.wait(timeout=60)
            return forked_admin.run("--config", str(toml), *words)

        mine = toml_of(group, line)
        theirs = group.folder / place / "hagroup.toml" if place else mine
        running = [pool.submit(run, line, mine), pool.submit(run, other or line, theirs)]
        done = [one.result(timeout=240) for one in running]
        for one in done:
            if one.returncode != FINE:
                assert one.returncode in (USAGE, UNREACHABLE), done
                (sentence,) = one.stderr.strip().splitlines()
                assert sentence.startswith("ha-admin: "), done
                assert any(text in sentence for text in (*said, NOT_NOW)), done
        fine = [one.returncode == FINE for one in done]
        assert any(fine), done
        yield group, fine


def whole(group: GroupFixture, toml: Path, labels: list[str], members: tuple[str, ...]) -> None:
    """In order for the group, and as plain python-pkcs11 sees each token."""
    for words in (["sync"], ["verify"]):
        done = forked_admin.run("--config", str(toml), *words, "--pin-file", str(group.folder / "hsm1" / "pin"))
        assert done.returncode == FINE, done.stdout + done.stderr
    there = GroupFixture(toml)
    there.reload()
    assert tuple(there.members) == members
    for name in members:
        found = [item["label"] for item in plain.objects(there.members[name], own=True)]
        assert sorted(label for label in found if not label.startswith("hagroup")) == labels, name
        assert sorted(label for label in found if label in OWN) == OWN, f"{name}: the keys of one domain, once"


@pytest.mark.parametrize(
    ("line", "said", "labels"),
    [
        pytest.param("domain rotate --yes", [ANOTHER], KEYS, id="domain rotate"),
        pytest.param("clear --yes", [ANOTHER], [], id="clear"),
        pytest.param("backup restore --yes", [ANOTHER], KEYS, id="backup restore"),
        pytest.param("sync --adopt", [ANOTHER], [*KEYS, "stranger"], id="sync --adopt"),
        pytest.param("journal rebuild --yes", [ANOTHER, "in use"], KEYS, id="journal rebuild"),
        pytest.param("domain join hsm2", [ANOTHER], KEYS, id="domain join"),
    ],
)
def test_the_same_twice(sites: Sites, line: str, said: list[str], labels: list[str]) -> None:
    with both(sites, line, *said) as (group, _):
        whole(group, group.toml, labels, THREE)


def test_one_member_added_twice(sites: Sites) -> None:
    with both(sites, ADD, ANOTHER, 'has a member "hsm4" already') as (group, _):
        whole(group, group.toml, KEYS, (*THREE, "hsm4"))


def test_two_members_added(sites: Sites) -> None:
    with both(sites, ADD, ANOTHER, other="member add hsm5 --yes") as (group, fine):
        added = {name for name, ok in zip(("hsm4", "hsm5"), fine, strict=True) if ok}
        listed = tuple(one["name"] for one in tomllib.loads(group.toml.read_text())["member"])
        assert set(listed) == {*THREE, *added}
        whole(group, group.toml, KEYS, listed)
        for name in {"hsm4", "hsm5"} - added:
            serial = (group.folder / name / "serial").read_text()
            env = {"SOFTHSM2_CONF": str(group.folder / name / "softhsm2.conf")}
            assert plain.objects({"module": SOFTHSM, "serial": serial, "env": env}, own=True) == []


def test_two_members_removed(sites: Sites) -> None:
    """One of them has to stay: ``min_replicas`` is 2."""
    with both(sites, REMOVE, ANOTHER, "min_replicas", other="member remove hsm2 --yes") as (group, fine):
        gone = "hsm3" if fine[0] else "hsm2"
        assert fine.count(True) == 1
        assert plain.objects(group.members[gone], own=True) == []
        whole(group, group.toml, KEYS, tuple(name for name in THREE if name != gone))


def test_one_member_removed_twice(sites: Sites) -> None:
    with both(sites, REMOVE, ANOTHER, "has no member 'hsm3'") as (group, _):
        assert plain.objects(group.members["hsm3"], own=True) == []
        whole(group, group.toml, KEYS, ("hsm1", "hsm2"))


def test_journal_moved_twice(sites: Sites) -> None:
    with both(sites, MOVE, ANOTHER, "exists already", "moved to") as (group, _):
        group.toml.write_text(group.toml.read_text().replace("sqlite:journal.db", "sqlite:moved.db"))
        whole(group, group.toml, KEYS, THREE)
        assert [file.name for file in group.folder.glob(".moved.db*.new")] == []


def test_journal_moved_to_two_places(sites: Sites) -> None:
    elsewhere = MOVE.replace("moved.db", "elsewhere.db")
    with both(sites, MOVE, ANOTHER, "go on with that", "moved to", other=elsewhere) as (group, fine):
        assert fine.count(True) == 1
        there = "moved.db" if fine[0] else "elsewhere.db"
        group.toml.write_text(group.toml.read_text().replace("sqlite:journal.db", f"sqlite:{there}"))
        whole(group, group.toml, KEYS, THREE)


@pytest.mark.parametrize("line", ["domain create --yes", "group create --yes"])
def test_founded_twice(sites: Sites, line: str) -> None:
    with both(sites, line, ANOTHER, "created already", "created meanwhile", "there already") as (group, fine):
        assert fine.count(True) == 1
        toml = toml_of(group, line)
        if line == "domain create --yes":
            create = forked_admin.run("--config", str(toml), *words_of(group, "group create --yes"))
            assert create.returncode == FINE, create.stderr
        whole(group, toml, [], ("hsm1", "hsm2"))


def test_one_backup_twice(sites: Sites) -> None:
    with both(sites, "backup create", "exists already and is not overwritten") as (group, fine):
        assert fine.count(True) == 1
        assert not list(group.folder.glob(".new-backup*"))
        assert group.admin("clear", "--yes").returncode == FINE
        restored = group.admin("backup", "restore", str(group.folder / "new-backup"), "--yes", "--dry-run")
        assert restored.returncode == FINE and "2 destroyed" in restored.stdout, restored.stdout
        whole(group, group.toml, [], THREE)


def test_one_host_joins_twice(sites: Sites) -> None:
    with both(sites, JOIN, ANOTHER, "this host is in a group", "exists already") as (group, fine):
        assert fine.count(True) == 1
        whole(group, toml_of(group, JOIN), KEYS, THREE)


def test_two_hosts_join(sites: Sites) -> None:
    """Each makes the journal anew; only one of the two is the group's from then on."""
    with both(sites, JOIN, place="host2") as (group, fine):
        assert fine == [True, True]
        hosts = [toml_of(group, JOIN), group.folder / "host2" / "hagroup.toml"]
        pin = ["--pin-file", str(group.folder / "hsm1" / "pin")]
        synced = [forked_admin.run("--config", str(toml), "sync", *pin) for toml in (*hosts, *hosts)][2:]
        (theirs,) = [toml for toml, done in zip(hosts, synced, strict=True) if done.returncode == FINE]
        behind = [done.stdout + done.stderr for done in synced if done.returncode != FINE]
        assert len(behind) == 1 and "ha-admin recover" in behind[0], synced
        whole(group, theirs, KEYS, THREE)
        shutil.rmtree(group.folder / "host2")
