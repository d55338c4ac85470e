"""What is written is read back as the same; editing one key leaves the rest alone."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hagroup.config.load import load_text
from hagroup.config.members import absolute_env_value
from hagroup.config.model import (
    Endpoint,
    EtcdUrl,
    GroupConfig,
    GroupSection,
    JournalSection,
    MemberConfig,
    PinSource,
    SqliteUrl,
    Timeouts,
    WatchdogSection,
    Webhook,
)
from hagroup.config.write import (
    append_member,
    remove_member,
    render,
    set_group_serial,
    set_member_role,
    write_new,
)
from hagroup.core.classify import Verdict
from hagroup.core.records import Role
from hagroup.errors import ConfigurationError

FILE = Path("/etc/x/hagroup.toml")

printable = st.characters(exclude_categories=["Cc", "Cs"])
names = st.text("ab01._-", min_size=1, max_size=6)
serials = st.text("ab01", min_size=1, max_size=16)
variables = st.text("AZ_az", min_size=1, max_size=6)
labels = st.text(printable, min_size=1, max_size=8).filter(lambda s: not s[-1].isspace())
values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
components = st.text(printable, min_size=1, max_size=6).filter(lambda s: "/" not in s and s not in (".", ".."))
paths = st.builds(
    lambda folder, rest: Path(folder, *rest),
    st.sampled_from(["/etc/x", "/etc", "/etc/x/../y", "/etc/xx"]),
    st.lists(components, min_size=1, max_size=3),
)
seconds = st.floats(0.001, 1e6)
numbers = st.integers(0, 2**31 - 1)
words = st.lists(values, max_size=3).flatmap(
    lambda rest: st.one_of(paths.map(str), st.just("true")).map(lambda command: (command, *rest))
)
env_values = st.one_of(values, paths.map(str)).map(lambda value: absolute_env_value(value, FILE.parent))
endpoints = st.builds(Endpoint, st.sampled_from(["h1", "10.0.0.1", "::1"]), st.integers(1, 65535))
pin_sources = st.one_of(
    st.builds(PinSource, file=paths),
    st.builds(PinSource, env=variables),
    st.builds(PinSource, command=words),
)
members = st.builds(
    MemberConfig,
    name=names,
    module=paths,
    token_label=labels,
    role=st.sampled_from([Role.ACTIVE, Role.STANDBY]),
    site=st.none() | names,
    priority=st.integers(-(2**31), 2**31 - 1),
    isolation=st.sampled_from(["process", "none"]),
    env=st.dictionaries(variables, env_values, max_size=3),
    pin=st.none() | pin_sources,
    init_args=st.none() | values,
    wrap_mechanism=st.integers(0, 2**64 - 1),
    oaep_hash=st.sampled_from(["SHA-1", "SHA-512"]),
    late_window=seconds,
    local=st.booleans(),
    errors=st.dictionaries(st.integers(1, 2**64 - 1) | st.integers(1, 16), st.sampled_from(Verdict), max_size=3),
)
journals = st.one_of(
    st.builds(
        JournalSection,
        url=st.builds(SqliteUrl, path=paths),
        mirror=st.none() | st.just(Path("/mnt/mirror.db")),
        offline_serving=st.sampled_from(["allow", "refuse"]),
    ),
    st.builds(
        JournalSection,
        url=st.builds(EtcdUrl, st.lists(endpoints, min_size=1, max_size=3, unique=True).map(tuple), names),
        ca=st.none() | paths,
        cert=paths,
        key=paths,
        user=values,
        password_file=paths,
    ),
)
watchdogs = st.builds(
    WatchdogSection,
    interval=st.floats(100, 200),
    threshold=st.integers(1, 9),
    retry=st.integers(-1, 9),
    retry_interval=seconds,
    verify_rate=st.floats(0, 100),
    listen=st.none() | endpoints,
    log_style=st.sampled_from(["json", "console", "luna"]),
    hook=st.none() | words,
    webhook=st.none() | st.builds(Webhook, url=st.just("https://h/x?y=1"), secret_file=st.none() | paths),
)
configs = st.builds(
    GroupConfig,
    path=st.just(FILE),
    group=st.builds(
        GroupSection,
        label=labels,
        serial=st.none() | serials,
        min_replicas=st.just(1),
        degraded=st.sampled_from(["allow", "refuse"]),
        ha_only=st.booleans(),
        recovery_mode=st.sampled_from(["enhanced", "basic"]),
        replay_limit=numbers | st.integers(0, 9).map(lambda n: n * 2**20),
    ),
    journal=journals,
    timeouts=st.lists(st.floats(0.001, 4.5), min_size=3, max_size=3)
    .map(sorted)
    .map(lambda t: Timeouts(probe=t[0], call=t[1], generate=t[2])),
    members=st.lists(members, min_size=1, max_size=3, unique_by=lambda m: m.name)
    .filter(lambda ms: len({m.token_label for m in ms}) == len(ms))
    .map(tuple),
    watchdog=st.just(WatchdogSection()) | watchdogs,
)


@settings(max_examples=150, deadline=None)
@given(configs)
def test_what_is_rendered_is_read_back(config: GroupConfig) -> None:
    assert load_text(render(config), FILE) == config


def simple() -> GroupConfig:
    def member(name: str) -> MemberConfig:
        return MemberConfig(
            name=name,
            module=Path("/usr/lib/softhsm/libsofthsm2.so"),
            token_serial="ab12",
            env={"SOFTHSM2_CONF": f"/etc/x/{name}/softhsm2.conf"},
            pin=PinSource(file=Path(f"/etc/x/{name}/pin")),
            local=True,
        )

    return GroupConfig(
        path=FILE,
        group=GroupSection(label="payments", serial="74007601"),
        journal=JournalSection(url=SqliteUrl(Path("/etc/x/journal.db"))),
        timeouts=Timeouts(),
        members=(member("hsm1"), member("hsm2")),
    )


def test_the_text_is_for_people() -> None:
    text = render(simple())
    for line in (
        'label         = "payments"  # virtual token label',
        'url             = "sqlite:journal.db"',
        'env          = { SOFTHSM2_CONF = "hsm1/softhsm2.conf" }',
        'pin          = { file = "hsm1/pin" }',
        'module       = "/usr/lib/softhsm/libsofthsm2.so"',
    ):
        assert f"\n{line}" in text
    assert "wrap_mechanism" not in text


def test_what_is_not_text_is_refused() -> None:
    config = msgspec.structs.replace(simple(), journal=JournalSection(url=SqliteUrl(Path("/etc/x/\udcff"))))
    with pytest.raises(ConfigurationError, match="is not text"):
        render(config)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "hagroup.toml"


def test_write_new(file: Path) -> None:
    config = msgspec.structs.replace(simple(), path=file)
    old = os.umask(0o077)
    try:
        write_new(config)
    finally:
        os.umask(old)
    assert load_text(file.read_text(), file) == config
    assert file.stat().st_mode & 0o777 == 0o644
    with pytest.raises(ConfigurationError, match="exists already"):
        write_new(config)
    assert os.listdir(file.parent) == [file.name]


MEMBER = '[[member]]\nname = "hsm1"\nmodule = "m.so"\ntoken_label = "x"\n'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('[group] # a\nlabel = "x" # b\n\n# c\n', '[group] # a\nlabel = "x" # b\nserial = "77"\n\n# c\n'),
        ('[group]\n  label    = "x"\n', '[group]\n  label    = "x"\n  serial   = "77"\n'),
        ('[group]\nlabel="x"\n', '[group]\nlabel="x"\nserial = "77"\n'),
        ('[group]\n"label" = "x"\n', '[group]\n"label" = "x"\nserial  = "77"\n'),
        ('[group]\r\nlabel = "x"\r\n', '[group]\r\nlabel = "x"\r\nserial = "77"\r\n'),
        ('[group]\nlabel = """\nx"""\n', '[group]\nlabel = """\nx"""\nserial = "77"\n'),
        ('group = { label = "x", ha_only = false }\n', 'group = { label = "x", serial = "77", ha_only = false }\n'),
        ('group.label = "x"\n', 'group.label = "x"\ngroup.serial = "77"\n'),
        ("[group]\nserial = '1'  # old\nlabel = 'x'\n", "[group]\nserial = \"77\"  # old\nlabel = 'x'\n"),
        ('group = { label = "x", serial="1"}\n', 'group = { label = "x", serial="77"}\n'),
    ],
)
def test_set_group_serial(file: Path, before: str, after: str) -> None:
    newline = "\r\n" if "\r" in before else "\n"
    file.write_text(before + MEMBER.replace("\n", newline), newline="")
    file.chmod(0o640)
    config = set_group_serial(file, "77")
    assert config.group.serial == "77"
    assert file.read_bytes().decode() == after + MEMBER.replace("\n", newline)
    assert file.stat().st_mode & 0o777 == 0o640
    assert os.listdir(file.parent) == [file.name]


def test_set_group_serial_where_the_label_is_last_and_has_no_newline(file: Path) -> None:
    file.write_text(f'{MEMBER}[group]\nlabel = "x"')
    set_group_serial(file, "77")
    assert file.read_text() == f'{MEMBER}[group]\nlabel = "x"\nserial = "77"'


def test_a_file_that_is_not_right_is_left_alone(file: Path) -> None:
    file.write_text(f'[group]\nlabel = "x"\n{MEMBER}')
    before = file.read_text()
    with pytest.raises(ConfigurationError):
        set_group_serial(file, "not a serial")
    assert file.read_text() == before
    file.chmod(0o666)
    with pytest.raises(ConfigurationError, match="may be written by others"):
        set_group_serial(file, "77")
    assert os.listdir(file.parent) == [file.name]


def test_a_link_stays_one(file: Path) -> None:
    real = file.with_name("real.toml")
    real.write_text(f'[group]\nlabel = "x"\n{MEMBER}')
    file.symlink_to(real.name)
    set_group_serial(file, "77")
    assert file.is_symlink()
    assert 'serial = "77"' in real.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another group")
def test_the_owner_stays(file: Path) -> None:
    file.write_text(f'[group]\nlabel = "x"\n{MEMBER}')
    os.chown(file, 0, 12345)
    set_group_serial(file, "77")
    assert (file.stat().st_uid, file.stat().st_gid) == (0, 12345)


@settings(max_examples=50, deadline=None)
@given(configs, serials)
def test_any_rendered_file_takes_a_serial(config: GroupConfig, serial: str) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder, "hagroup.toml")
        file.write_text(render(config), newline="")
        before = load_text(file.read_bytes().decode(), file)
        after = set_group_serial(file, serial)
        assert after == msgspec.structs.replace(before, group=msgspec.structs.replace(before.group, serial=serial))


def test_append_member(file: Path) -> None:
    file.write_text(f'# mine\n[group]\nlabel = "x"\n{MEMBER}[watchdog]\nretry = 3')
    before = file.read_text()
    member = MemberConfig(name="hsm2", module=file.parent / "m.so", token_label="y", role=Role.BACKUP)
    config = append_member(file, member)
    assert config.members[1] == member
    assert file.read_text().startswith(f"{before}\n\n[[member]]\n")
    with pytest.raises(ConfigurationError, match="is that of another member"):
        append_member(file, member)


def test_remove_member_leaves_the_rest_alone(file: Path) -> None:
    second = (
        '[[member]]\nname = "b"\nmodule = "/m.so"\ntoken_label = "b"\n[member.env]\nLIST = """\n[[member]]\n"""\n\n'
    )
    third = '# the third\n# stays\n[[member]]\nname = "c"\nmodule = "/m.so"\ntoken_label = "c"\n'
    head = f'# mine\n[group]\nlabel = "x"\nmin_replicas = 1\n{MEMBER}'
    file.write_text(head + second + third)
    config = remove_member(file, "b")
    assert [member.name for member in config.members][1:] == ["c"]
    assert file.read_text() == head + third
    remove_member(file, "c")
    assert file.read_text().startswith(head)
    with pytest.raises(ConfigurationError, match="has no member"):
        remove_member(file, "c")


def test_set_member_role(file: Path) -> None:
    file.write_text(f'[group]\nlabel = "x"\nmin_replicas = 1\n{MEMBER}[watchdog]\nretry = 3\n')
    name = load_text(file.read_text(), file).members[0].name
    assert set_member_role(file, name, Role.STANDBY).members[0].role is Role.STANDBY
    assert set_member_role(file, name, Role.ACTIVE).members[0].role is Role.ACTIVE
    assert file.read_text().count("role") == 1
    assert "retry = 3" in file.read_text()
