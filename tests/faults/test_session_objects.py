"""Session objects survive the member that they were made on; they end with their session everywhere."""

from __future__ import annotations

from typing import Any

import pytest

from hagroup import Attribute, KeyType, Mechanism
from hagroup.exceptions import KeyUnextractable, PKCS11Error
from tests.support.faulty import FaultGroup, engine

IV = b"0123456789abcdef"


def home(session: Any, item: Any) -> str:
    """The one member that a session object is on."""
    ((name, _, _),) = engine(session).object(item.uid).places()
    return str(name)


@pytest.mark.parametrize("extractable", [True, False])
def test_a_secret_key(faulty: FaultGroup, session: Any, extractable: bool) -> None:
    template = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: extractable}
    key = session.generate_key(KeyType.AES, 256, label="mine", template=template)
    encrypted = key.encrypt(b"data", mechanism_param=IV)
    faulty.kill(session, home(session, key))
    assert key.encrypt(b"data", mechanism_param=IV) == encrypted
    assert key.decrypt(encrypted, mechanism_param=IV) == b"data"
    assert key[Attribute.LABEL] == "mine"
    assert key[Attribute.EXTRACTABLE] is extractable
    wrapping = session.generate_key(KeyType.AES, 256)
    if extractable:
        assert wrapping.wrap_key(key)
    else:
        with pytest.raises(KeyUnextractable):
            wrapping.wrap_key(key)
    assert [found.uid for found in session.get_objects({Attribute.LABEL: "mine"})] == [key.uid]
    key.destroy()


def test_a_key_pair_and_its_attributes(faulty: FaultGroup, session: Any) -> None:
    public, private = session.generate_keypair(KeyType.RSA, 2048, label="pair", id=b"\x01\x02")
    private[Attribute.LABEL] = "renamed"
    signature = private.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS)
    faulty.kill(session, home(session, private))
    assert private.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS) == signature
    assert public.verify(b"data", signature, mechanism=Mechanism.SHA256_RSA_PKCS)
    assert (private[Attribute.LABEL], private[Attribute.ID]) == ("renamed", b"\x01\x02")
    private.destroy()
    with pytest.raises(PKCS11Error):
        private.sign(b"data", mechanism=Mechanism.SHA256_RSA_PKCS)
    assert not list(session.get_objects({Attribute.LABEL: "renamed"}))


def test_members_that_died_unnoticed(faulty: FaultGroup, session: Any) -> None:
    """Nothing was asked of them when they died: one call may find out about two, and goes to the third."""
    key = session.generate_key(KeyType.AES, 256)
    encrypted = key.encrypt(b"data", mechanism_param=IV)
    first = home(session, key)
    second = next(name for name in faulty.names if name != first)
    for name in (first, second):
        faulty.kill(session, name)
    assert key.encrypt(b"data", mechanism_param=IV) == encrypted


def test_every_member_dies_once(faulty: FaultGroup, session: Any) -> None:
    key = session.generate_key(KeyType.AES, 256)
    encrypted = key.encrypt(b"data", mechanism_param=IV)
    for name in faulty.names:
        faulty.kill(session, name)
        assert key.encrypt(b"data", mechanism_param=IV) == encrypted
        faulty.wait_serving(session)


def test_they_end_with_their_session(faulty: FaultGroup, session: Any) -> None:
    with session.token.open(rw=True) as other:
        key = other.generate_key(KeyType.AES, 256, label="short-lived")
        faulty.kill(session, home(session, key))
        key.encrypt(b"data", mechanism_param=IV)
    assert not list(session.get_objects({Attribute.LABEL: "short-lived"}))
    with pytest.raises(PKCS11Error):
        key.encrypt(b"data", mechanism_param=IV)
    faulty.heal(session)
    faulty.check_tokens(session)
