"""T 3.4.12: members of different cloning domains are refused, with the sentence that says which; nothing is created
anywhere. When a group is created, and when a member of one shows up with another domain key."""

from __future__ import annotations

from pathlib import Path

import pytest

import hagroup as pkcs11
from tests.support import plain
from tests.support.domains import DOMAIN, PARTITION, check_refused_at_create, check_refused_in_service, implant
from tests.support.groups import PIN, make_group


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        pytest.param((b"x" * 32, PARTITION), "another domain key", id="domain-key"),
        pytest.param((b"x" * 32, b"y" * 32), "secret differs", id="both-keys"),
        pytest.param((DOMAIN, None), "0 partition keys", id="half-a-domain"),
    ],
)
def test_group_create(
    fast_folder: Path, request: pytest.FixtureRequest, second: tuple[bytes, bytes | None], sentence: str
) -> None:
    check_refused_at_create(fast_folder / f"domains-{request.node.callspec.id}", second, sentence)


def test_a_member_shows_up_with_another_domain_key(fast_folder: Path) -> None:
    """At the start of a client, where both keys have the right names and identifiers."""
    fresh = make_group(fast_folder / "domains-12", members=2)
    implant(fresh.members["hsm2"], b"x" * 32, None, ids=False)
    lib = pkcs11.lib(str(fresh.toml))
    try:
        with lib.get_token(token_label="payments").open(rw=True, user_pin=PIN) as session:
            check_refused_in_service(fresh, session, "this member has another domain key")
    finally:
        lib.unload()


def test_a_member_that_is_another_groups_token(fast_folder: Path) -> None:
    """The file names the token of another group's hsm2."""
    own = make_group(fast_folder / "domains-own", members=2)
    other = make_group(fast_folder / "domains-other", members=2, anew=True)
    text = own.toml.read_text()
    for old, new in (
        (own.members["hsm2"]["serial"], other.members["hsm2"]["serial"]),
        ("hsm2/softhsm2.conf", str(other.folder / "hsm2" / "softhsm2.conf")),
    ):
        assert old in text
        text = text.replace(old, new)
    own.toml.write_text(text)
    before = plain.objects(other.members["hsm2"], own=True)
    with pytest.raises(pkcs11.ConfigurationError) as refused:
        pkcs11.lib(str(own.toml))
    assert other.members["hsm2"]["serial"] in str(refused.value)
    assert own.members["hsm2"]["serial"] in str(refused.value)
    assert plain.objects(other.members["hsm2"], own=True) == before
    assert other.admin("status").returncode == 0
