"""What ``hagroup.toml`` may say, what it means, and the one sentence for each thing that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hagroup.config.load import load_text
from hagroup.config.model import Endpoint, EtcdUrl, GroupConfig, PinSource, SqliteUrl, Webhook
from hagroup.core.classify import Verdict
from hagroup.core.records import Role
from hagroup.errors import ConfigurationError

FILE = "/etc/x/hagroup.toml"
MINIMAL = """\
[group]
label = "payments"

[[member]]
name = "hsm1"
module = "/usr/lib/softhsm/libsofthsm2.so"
token_serial = "2a5b0c"

[[member]]
name = "hsm2"
module = "vendor/libcryptoki.so"
token_label = "two"
"""


def parse(text: str) -> GroupConfig:
    return load_text(text, FILE)


def with_group(lines: str) -> str:
    return MINIMAL.replace('label = "payments"\n', f'label = "payments"\n{lines}\n', 1)


def with_member(lines: str) -> str:
    return f"{MINIMAL}{lines}\n"


def with_section(lines: str) -> str:
    return f"{MINIMAL}\n{lines}\n"


def test_defaults() -> None:
    config = parse(MINIMAL)
    assert config.path == Path(FILE)
    assert (config.group.min_replicas, config.group.degraded, config.group.ha_only) == (2, "allow", True)
    assert (config.group.serial, config.group.recovery_mode, config.group.replay_limit) == (None, "enhanced", 2**24)
    assert config.journal.url == SqliteUrl(Path("/etc/x/journal.db"))
    assert (config.journal.mirror, config.journal.offline_serving) == (None, "allow")
    assert (config.timeouts.call, config.timeouts.generate, config.timeouts.probe) == (5.0, 60.0, 1.0)
    assert (config.watchdog.interval, config.watchdog.threshold, config.watchdog.listen) == (5.0, 2, None)
    one, two = config.members
    assert (one.role, one.isolation, one.priority, one.late_window) == (Role.ACTIVE, "process", 0, 600.0)
    assert (one.wrap_mechanism, one.oaep_hash, one.local, two.local) == (0x210A, "SHA-1", True, False)
    assert (one.env, one.pin, one.errors) == ({}, None, {})
    assert two.module == Path("/etc/x/vendor/libcryptoki.so")


def test_everything_given() -> None:
    config = parse("""
[group]
label = "payments"
serial = "74007601"
min_replicas = 1
degraded = "refuse"
ha_only = false
recovery_mode = "basic"
replay_limit = "1MiB"
[journal]
url = "etcd://h1,h2:2390,[::1]:7/payments"
offline_serving = "refuse"
ca = "ca.pem"
cert = "cert.pem"
key = "/k.pem"
user = "me"
password_file = "password"
[timeouts]
call = 2
generate = 2.5
probe = 1
[[member]]
name = "hsm1"
module = "/m.so"
token_label = "x"
role = "standby"
site = "zurich"
priority = -3
isolation = "none"
pin = { command = ["./get-pin", "a/b"] }
init_args = "configdir='sql:/x'"
wrap_mechanism = "CKM_AES_KEY_WRAP_KWP"
oaep_hash = "SHA-256"
late_window = 30
local = true
errors = { CKR_GENERAL_ERROR = "member-failed", 0x80000001 = "overload", "6" = "library-reset" }
[watchdog]
interval = 1.5
threshold = 3
retry = 0
retry_interval = 4
verify_rate = 0
listen = "[::]:1"
log_style = "luna"
hook = ["mail", "./x"]
webhook = { url = "https://h/x", secret_file = "s" }
""")
    url = config.journal.url
    assert isinstance(url, EtcdUrl)
    assert url.endpoints == (Endpoint("h1", 2379), Endpoint("h2", 2390), Endpoint("::1", 7))
    assert str(url) == "etcd://h1:2379,h2:2390,[::1]:7/payments"
    (member,) = config.members
    assert member.errors == {5: Verdict.MEMBER_FAILED, 0x80000001: Verdict.OVERLOAD, 6: Verdict.LIBRARY_RESET}
    assert member.pin == PinSource(command=("/etc/x/get-pin", "a/b"))
    assert (member.wrap_mechanism, member.role, member.local) == (0x210B, Role.STANDBY, True)
    assert config.group.replay_limit == 2**20
    assert config.watchdog.listen == Endpoint("::", 1)
    assert config.watchdog.hook == ("mail", "./x")
    assert config.watchdog.webhook == Webhook(url="https://h/x", secret_file=Path("/etc/x/s"))


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("hsm1/softhsm2.conf", "/etc/x/hsm1/softhsm2.conf"),
        ("./softhsm2.conf", "/etc/x/softhsm2.conf"),
        ("../y/softhsm2.conf", "/etc/x/../y/softhsm2.conf"),
        ("hsm1/", "/etc/x/hsm1/"),
        ("/opt/softhsm2.conf", "/opt/softhsm2.conf"),
        ("softhsm2.conf", "softhsm2.conf"),
        ("https://host/path", "https://host/path"),
        ("sql:/etc/pki", "sql:/etc/pki"),
        ("a=b/c", "a=b/c"),
        ("-Da/b", "-Da/b"),
        ("/a:b/c", "/a:b/c"),
        ("info", "info"),
        ("", ""),
    ],
)
def test_env_values_that_look_like_relative_paths_become_absolute(value: str, meaning: str) -> None:
    config = parse(with_member(f'env = {{ X = "{value}" }}'))
    assert config.members[1].env == {"X": meaning}


def test_min_replicas_defaults_to_what_there_is() -> None:
    assert parse(MINIMAL[: MINIMAL.rindex("[[member]]")]).group.min_replicas == 1
    assert parse(with_member('role = "backup"')).group.min_replicas == 1


def test_windows_newlines() -> None:
    assert parse(MINIMAL.replace("\n", "\r\n")) == parse(MINIMAL)
    refused(with_group("ha_only = 1").replace("\n", "\r\n"), 3, "[group] ha_only")


def refused(text: str, line: int, key: str) -> str:
    """The text is refused, in one sentence that names the file, the line and the key; returns the rest of it."""
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    sentence = str(caught.value)
    assert caught.value.__cause__ is None
    assert len(sentence.splitlines()) == 1
    start = f"{FILE}, line {line}: {key}"
    assert sentence.startswith(start), sentence
    return sentence[len(start) :]


BAD_GROUP = [
    ("min_replicas = 3", "min_replicas", "must be at most 2, the number of members that are active or standby, not 3"),
    ("min_replicas = 0", "min_replicas", "must be a whole number from 1 to 2147483647, not 0"),
    ("min_replicas = true", "min_replicas", "must be a whole number from 1 to 2147483647, not true"),
    ('degraded = "maybe"', "degraded", 'must be "allow" or "refuse", not "maybe"'),
    ('ha_only = "yes"', "ha_only", 'must be true or false, not "yes"'),
    ("recovery_mode = 1", "recovery_mode", 'must be "enhanced" or "basic", not 1'),
    ("serial = 74007601", "serial", "must be a text in quotes, not 74007601"),
    ('serial = "12345678901234567"', "serial", 'must be made of 1 to 16 letters and digits, not "12345678901234567"'),
    ('serial = ""', "serial", "must not be empty"),
    (
        'replay_limit = "16MB"',
        "replay_limit",
        'must be a number of bytes from 0 to 1024 GiB such as 1048576 or "16MiB"',
    ),
    ("replay_limit = -1", "replay_limit", "must be a number of bytes"),
    ("min_replica = 1", "min_replica", "is not a known key (did you mean min_replicas?)"),
    ("Serial = 1", "Serial", "is not a known key (did you mean serial?)"),
    ("zzz = 1", "zzz", "is not a known key (known are label, serial, "),
    ('"a\\nb" = 1', '"a\\nb"', "is not a known key (known are label, serial, "),
    ("replay_limit.x = 1", "replay_limit", "must be a number of bytes"),
]


@pytest.mark.parametrize(("lines", "key", "problem"), BAD_GROUP)
def test_bad_group(lines: str, key: str, problem: str) -> None:
    assert refused(with_group(lines), 3, f"[group] {key} ").startswith(problem)


BAD_MEMBER = [
    ('role = "primary"', "role", 'must be "active" or "standby" or "backup", not "primary"'),
    ('isolation = "thread"', "isolation", 'must be "process" or "none", not "thread"'),
    ("priority = 1.5", "priority", "must be a whole number from -2147483648 to 2147483647, not 1.5"),
    ('site = "a b"', "site", 'must be made of 1 to 64 letters, digits, ".", "_" or "-", not "a b"'),
    ('token_serial = "x"', "token_label", "cannot stand beside token_serial: one of them names the token"),
    ('env = "X=1"', "env", 'must be a table such as { NAME = "value" }'),
    ("env = { X = 1 }", "env.X", "must be a text in quotes"),
    ('env = { "A B" = "1" }', 'env."A B"', "must be the name of an environment variable"),
    ('env = { X = "~/a" }', "env.X", "must be a whole path (~ has no meaning here)"),
    ('pin = "1234"', "pin", "must be a table with one of file, env or command such as { file ="),
    ('pin = { value = "1234" }', "pin.value", "is not a known key (known are file, env, command)"),
    ("pin = { file = 1234 }", "pin.file", "must be a text in quotes"),
    ("pin = { }", "pin", "must be a table with one of file, env or command"),
    ('pin = { file = "a", env = "B" }', "pin", "must be a table with one of file, env or command"),
    ('pin = { env = "1234" }', "pin.env", "must be the name of an environment variable"),
    ('pin = { command = "echo 1234" }', "pin.command", "must be a list of words such as"),
    ("pin = { command = [] }", "pin.command", "must be a list of words such as"),
    ('pin = { file = "~/pin" }', "pin.file", "must be a whole path (~ has no meaning here)"),
    ("init_args = 1234", "init_args", "must be a text in quotes"),
    ('wrap_mechanism = "AES_WRAP"', "wrap_mechanism", 'must be a mechanism such as "AES_KEY_WRAP_PAD" or 0x210A, not'),
    ("wrap_mechanism = -1", "wrap_mechanism", 'must be a mechanism such as "AES_KEY_WRAP_PAD" or 0x210A, not -1'),
    ('oaep_hash = "MD5"', "oaep_hash", 'must be "SHA-1" or "SHA-224" or "SHA-256" or "SHA-384" or "SHA-512", not'),
    ("late_window = 0", "late_window", "must be a number of seconds greater than 0, not 0"),
    ('local = "no"', "local", 'must be true or false, not "no"'),
    ('errors = { CKR_OK = "overload" }', "errors.CKR_OK", "must be a return value other than CKR_OK"),
    ('errors = { CKR_NONE = "overload" }', "errors.CKR_NONE", "must be a return value such as CKR_GENERAL_ERROR or"),
    ('errors = { CKR_GENERAL_ERROR = "x" }', "errors.CKR_GENERAL_ERROR", 'must be "member-failed" or "quarantine" or'),
    (
        'errors = { CKR_GENERAL_ERROR = "overload", 0x5 = "overload" }',
        "errors.0x5",
        "stands for the same return value as another key beside it",
    ),
    ('rol = "active"', "rol", "is not a known key (did you mean role?)"),
]


@pytest.mark.parametrize(("lines", "key", "problem"), BAD_MEMBER)
def test_bad_member(lines: str, key: str, problem: str) -> None:
    line = 12 if key == "token_label" else 13
    rest = refused(with_member(lines), line, f'[[member]] "hsm2" {key} ')
    assert rest.startswith(problem)
    assert "1234" not in rest


BAD_SECTIONS = [
    ('[timeouts]\ncall = "five"', 15, '[timeouts] call must be a number of seconds greater than 0, not "five"'),
    ("[timeouts]\ncall = 0", 15, "[timeouts] call must be a number of seconds greater than 0, not 0"),
    ("[timeouts]\ncall = nan", 15, "[timeouts] call must be a number of seconds greater than 0, not nan"),
    ("[timeouts]\ncall = inf", 15, "[timeouts] call must be a number of seconds greater than 0, not inf"),
    ("[timeouts]\ncall = true", 15, "[timeouts] call must be a number of seconds greater than 0, not true"),
    (f"[timeouts]\ncall = 0x{'f' * 400}", 15, "[timeouts] call must be a number of seconds greater than 0, not a num"),
    ("[timeouts]\nprobe = 6", 15, "[timeouts] probe (6) must not be greater than call (5)"),
    ("[timeouts]\ncall = 61", 15, "[timeouts] call (61) must not be greater than generate (60)"),
    ("[timeouts]\ncall = 0.5", 15, "[timeouts] call (0.5) must not be less than probe (1, the default)"),
    ("[timeout]\ncall = 1", 14, "timeout is not a known section (did you mean timeouts?)"),
    ("[[timeouts]]\ncall = 1", 14, "[timeouts] must be a section with one such header"),
    ('[journal]\nurl = "postgres://h/x"', 15, '[journal] url must be "sqlite:FILE" or "etcd://HOST:PORT,…/NAME", not'),
    ('[journal]\nurl = "sqlite:"', 15, '[journal] url must be "sqlite:FILE" with the name of a file, not "sqlite:"'),
    ('[journal]\nurl = "sqlite://host/x"', 15, '[journal] url must be "sqlite:FILE" without a host; a whole path'),
    ('[journal]\nurl = "sqlite::memory:"', 15, "[journal] url must be a file (the journal must outlive this process)"),
    ('[journal]\nurl = "etcd://h1:2379"', 15, '[journal] url must be "etcd://HOST:PORT,…/NAME" with one name'),
    (
        '[journal]\nurl = "etcd://h1:0/x"',
        15,
        '[journal] url must be made of hosts written "HOST:PORT" with ports from 1 to 65535',
    ),
    ('[journal]\nurl = "etcd://h1,,h2/x"', 15, '[journal] url must be made of hosts written "HOST:PORT"'),
    ('[journal]\nurl = "etcd://h1,h1/x"', 15, "[journal] url must be a list of different hosts"),
    ('[journal]\nurl = "etcd://me:1234@h/x"', 15, "[journal] url must be without user and password"),
    ('[journal]\nca = "x"', 15, "[journal] ca is only for an etcd:// journal"),
    ('[journal]\nurl = "etcd://h/x"\ncert = "x"', 16, "[journal] cert needs key beside it"),
    ('[journal]\nurl = "etcd://h/x"\nuser = "x"', 16, "[journal] user needs password_file beside it"),
    ('[journal]\nmirror = "journal.db"', 15, "[journal] mirror must be another place than the journal itself"),
    ('[journal]\nurl = "etcd://h/x"\nmirror = "m.db"', 16, "[journal] mirror is only for a sqlite: journal"),
    ('[journal]\noffline_serving = "no"', 15, '[journal] offline_serving must be "allow" or "refuse", not "no"'),
    ("[watchdog]\ninterval = 1", 15, "[watchdog] interval (1) must be greater than [timeouts] probe (1)"),
    ("[timeouts]\nprobe = 5", 15, "[timeouts] probe (5) must be less than [watchdog] interval (5, the default)"),
    ("[watchdog]\nthreshold = 0", 15, "[watchdog] threshold must be a whole number from 1 to 2147483647, not 0"),
    ("[watchdog]\nretry = -2", 15, "[watchdog] retry must be a whole number from -1 to 2147483647, not -2"),
    ("[watchdog]\nverify_rate = -1", 15, "[watchdog] verify_rate must be a number of objects per second, not -1"),
    ('[watchdog]\nlisten = "9464"', 15, "[watchdog] listen must be an address with a port such as"),
    ('[watchdog]\nlog_style = "xml"', 15, '[watchdog] log_style must be "json" or "console" or "luna", not "xml"'),
    ('[watchdog]\nhook = "mail x"', 15, "[watchdog] hook must be a list of words such as"),
    ('[watchdog]\nwebhook = { url = "ftp://h/" }', 15, "[watchdog] webhook.url must be an address that begins with"),
    ('[watchdog]\nwebhook = { url = "https://u:1234@h/" }', 15, "[watchdog] webhook.url must be without user"),
    ("[watchdog.webhook]", 14, "[watchdog] webhook.url is missing"),
    ("[[member]]\n", 14, "[[member]] number 3 name is missing"),
    ("[member2]", 14, "member2 is not a known section (did you mean member?)"),
]


@pytest.mark.parametrize(("lines", "line", "sentence"), BAD_SECTIONS)
def test_bad_sections(lines: str, line: int, sentence: str) -> None:
    assert "1234" not in refused(with_section(lines), line, sentence)


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        (f"label = 'x'\n{MINIMAL}", 1, "label is not a known key outside all sections (known are group, journal,"),
        ("", 1, "at least one [[member]] is needed"),
        ("[member]\nname = 'x'", 1, "[[member]] must be written with two brackets, once for each member"),
        (MINIMAL.replace('"payments"', '""'), 2, "[group] label must not be empty"),
        (MINIMAL.replace('"payments"', f'"{"ü" * 17}"'), 2, "[group] label must be at most 32 bytes long"),
        (MINIMAL.replace('label = "payments"\n', ""), 1, "[group] label is missing"),
        (MINIMAL.replace('name = "hsm2"\n', ""), 9, "[[member]] number 2 name is missing"),
        (MINIMAL.replace('"hsm2"', '"hsm 2"'), 10, '[[member]] "hsm 2" name must be made of 1 to 64 letters'),
        (MINIMAL.replace('"hsm2"', f'"{"x" * 65}"'), 10, "[[member]] number 2 name must be made of"),
        (MINIMAL.replace('"hsm2"', '"hsm1"'), 10, '[[member]] "hsm1" name is that of another member'),
        (MINIMAL.replace('"hsm2"', '"a\\nb"'), 10, "[[member]] number 2 name must be made of"),
        (MINIMAL.replace('token_label = "two"\n', ""), 9, '[[member]] "hsm2" token_serial is missing (or token_label)'),
        (MINIMAL.replace('"two"', f'"{"x" * 33}"'), 12, '[[member]] "hsm2" token_label must be 1 to 32 characters'),
        (MINIMAL.replace('"2a5b0c"', '"ü"'), 7, '[[member]] "hsm1" token_serial must be 1 to 16 printable ASCII'),
        (MINIMAL.replace('"2a5b0c"', f'"{"1" * 17}"'), 7, '[[member]] "hsm1" token_serial must be 1 to 16 printable'),
        (MINIMAL.replace('module = "vendor/libcryptoki.so"\n', ""), 9, '[[member]] "hsm2" module is missing'),
        (MINIMAL.replace("token_", "role = 'backup'\ntoken_"), 4,
         "at least one [[member]] must have the role active or standby"),
        (MINIMAL.replace('"vendor/libcryptoki.so"', '"~/x.so"'), 11, '[[member]] "hsm2" module must be a whole path'),
        ('[group]\nlabel = "a\n', 2, "this is not TOML: "),
        ("[group]\nlabel = 'a'\nlabel = 'b'\n", 3, "this is not TOML: Cannot overwrite a value"),
        ("[group", 1, "this is not TOML: "),
    ],
)  # fmt: skip
def test_bad_files(text: str, line: int, sentence: str) -> None:
    refused(text, line, sentence)


def test_one_token_twice() -> None:
    text = MINIMAL + MINIMAL[MINIMAL.rindex("[[member]]") :].replace("hsm2", "hsm3")
    refused(text, 16, '[[member]] "hsm3" token_label names the same token of the same module as "hsm2"')
    assert len(parse(text + 'env = { CONF = "hsm3/conf" }').members) == 3


@pytest.mark.parametrize("text", ["a = " + "1" * 5000, "a = " + "[" * 100_000])
def test_absurd_values(text: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(FILE)):
        parse(text)


def test_a_secret_written_in_the_wrong_place_is_not_shown() -> None:
    for lines in (
        'pin = "s3cret-1"',
        'pin = ["s3cret-1"]',
        'pin = { file = ["s3cret-1"] }',
        'init_args = ["s3cret-1"]',
    ):
        with pytest.raises(ConfigurationError) as caught:
            parse(with_member(lines))
        assert "s3cret-1" not in str(caught.value)


values = st.recursive(
    st.one_of(st.text(max_size=8).map(json.dumps), st.integers().map(str), st.just("true"),
              st.floats(allow_nan=False).map(repr), st.just('"allow"'), st.just("1979-05-27"), st.just('"a/b"')),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2).map(lambda v: f"[{', '.join(v)}]"),
        st.lists(inner, max_size=1).map(lambda v: f"{{ {''.join('file = ' + x for x in v)} }}"),
    ),
    max_leaves=4,
)  # fmt: skip
GROUP_KEYS = ["serial", "min_replicas", "degraded", "ha_only", "recovery_mode", "replay_limit"]
MEMBER_KEYS = ["role", "site", "priority", "isolation", "env", "pin", "init_args", "wrap_mechanism", "oaep_hash",
               "late_window", "local", "errors"]  # fmt: skip
OTHER_KEYS = ["journal.url", "journal.mirror", "timeouts.call", "timeouts.probe", "watchdog.interval", "watchdog.retry",
              "watchdog.listen", "watchdog.hook", "watchdog.webhook", "group", "member", "timeouts"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from([*GROUP_KEYS, *MEMBER_KEYS, *OTHER_KEYS]), value=values)
def test_any_value_is_accepted_or_refused_in_one_sentence(key: str, value: str) -> None:
    line = f"{key} = {value}"
    text = with_group(line) if key in GROUP_KEYS else with_member(line) if key in MEMBER_KEYS else f"{line}\n{MINIMAL}"
    try:
        parse(text)
    except ConfigurationError as error:
        sentence = str(error)
    else:
        return
    assert re.match(rf"{re.escape(FILE)}, line \d+: \S", sentence)
    assert len(sentence.splitlines()) == 1
