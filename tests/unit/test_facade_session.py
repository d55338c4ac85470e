"""Sessions and objects, against a real token: the facade over a single member."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import hagroup as pkcs11
from hagroup import Attribute, KeyType, Mechanism, ObjectClass
from hagroup.attributes import AttributeMapper
from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.facade import lib as facade
from hagroup.members.module import ConnectionSettings
from tests.support.direct_engine import DirectGroup, direct_group
from tests.support.softhsm import make_token, token_folder

PIN, SO_PIN = "1234", "12345678"
OPEN_KEY = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}


@pytest.fixture(scope="module")
def group() -> Iterator[DirectGroup]:
    with token_folder() as folder:
        made = make_token(folder, "FACADE", SO_PIN, PIN)
        settings = ConnectionSettings(name="only", module=made.module, env=made.env, token_label="FACADE")
        group = direct_group(settings)
        try:
            yield group
        finally:
            group.close()


@pytest.fixture
def token(group: DirectGroup, monkeypatch: pytest.MonkeyPatch) -> Any:
    bootstrap = ModuleType("hagroup.bootstrap")
    bootstrap.open_group = lambda _: group  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hagroup.bootstrap", bootstrap)
    monkeypatch.setattr(facade, "_libraries", {})
    return pkcs11.lib("facade.toml").get_token(token_label="FACADE")


@pytest.fixture
def session(token: Any) -> Iterator[Any]:
    with token.open(rw=True, user_pin=PIN) as session:
        yield session
        for found in list(session.get_objects({Attribute.TOKEN: True})):
            found.destroy()


# -- login -----------------------------------------------------------------------------------------------------------
def test_a_second_login_is_refused_and_leaves_nothing_open(token: Any, session: Any) -> None:
    with pytest.raises(pkcs11.UserAlreadyLoggedIn):
        token.open(user_pin=PIN)
    with token.open() as second:
        assert second.generate_key(KeyType.AES, 128) in set(second.get_objects())
    assert session.generate_random(64)


def test_a_wrong_pin_does_not_block_the_security_officer(token: Any) -> None:
    with pytest.raises(pkcs11.PinIncorrect):
        token.open(user_pin="wrong")
    with token.open(rw=True, so_pin=SO_PIN) as session:
        assert session.user_type is pkcs11.UserType.SO
    with token.open(user_pin=PIN):
        pass


def test_without_login_private_objects_do_not_show(token: Any) -> None:
    with token.open(rw=True, user_pin=PIN) as session:
        session.generate_key(KeyType.AES, 128, label="hidden", store=True)
    with token.open() as session:
        assert list(session.get_objects({Attribute.LABEL: "hidden"})) == []
    with token.open(rw=True, user_pin=PIN) as session:
        session.get_key(label="hidden").destroy()


def test_pins_are_text(session: Any) -> None:
    for call in (
        lambda: session.set_pin(None, "x"),
        lambda: session.set_pin(PIN, None),
        lambda: session.init_pin(None),
    ):
        with pytest.raises(AttributeError):
            call()
    with pytest.raises(pkcs11.PinLenRange):
        session.set_pin(PIN, "")


def test_read_only(token: Any) -> None:
    with token.open(user_pin=PIN) as session:
        with pytest.raises(pkcs11.SessionReadOnly):
            session.generate_key(KeyType.AES, 128, store=True)
        assert session.generate_key(KeyType.AES, 128)


# -- objects ---------------------------------------------------------------------------------------------------------
def test_classes_are_made_once_for_each_set_of_capabilities(session: Any) -> None:
    first, second = session.generate_key(KeyType.AES, 128), session.generate_key(KeyType.AES, 256)
    assert type(first) is type(second)
    assert type(first).__name__ == "SecretKey"
    bare = session.generate_key(KeyType.AES, 128, capabilities=0)
    assert isinstance(bare, pkcs11.SecretKey)
    assert not isinstance(bare, pkcs11.EncryptMixin)
    assert isinstance(first, (pkcs11.EncryptMixin, pkcs11.SignMixin))
    public, private = session.generate_keypair(KeyType.RSA, 1024)
    assert isinstance(public, pkcs11.PublicKey)
    assert isinstance(private, pkcs11.PrivateKey)
    assert isinstance(private, pkcs11.SignMixin)
    assert not isinstance(public, pkcs11.SignMixin)
    data = session.create_object({Attribute.CLASS: ObjectClass.DATA, Attribute.VALUE: b"data", Attribute.LABEL: "d"})
    assert isinstance(data, pkcs11.Object)
    assert not isinstance(data, pkcs11.Key)


def test_identity(token: Any, session: Any) -> None:
    key = session.generate_key(KeyType.AES, 128, label="same")
    found = session.get_key(label="same")
    assert key == found
    assert key is not found
    assert hash(key) == hash(found)
    assert key.handle == found.handle > 0
    assert {key, session.generate_key(KeyType.AES, 128)} == set(session.get_objects())
    with token.open() as other:
        seen = other.get_key(label="same")
        assert seen.handle == key.handle, "one handle for one object"
        assert seen != key, "an object belongs to the session that found it, as in python-pkcs11"


def test_get_attributes(session: Any) -> None:
    key = session.generate_key(KeyType.AES, 128, label="a")
    assert key.get_attributes([]) == {}
    got = key.get_attributes([Attribute.LABEL, Attribute.VALUE, Attribute.CERTIFICATE_TYPE, Attribute.CLASS])
    assert list(got.items()) == [(Attribute.LABEL, "a"), (Attribute.CLASS, ObjectClass.SECRET_KEY)]
    with pytest.raises(pkcs11.AttributeSensitive):
        key.get_attributes([Attribute.VALUE, Attribute.CERTIFICATE_TYPE])
    with pytest.raises(pkcs11.AttributeTypeInvalid):
        key.get_attributes([Attribute.CERTIFICATE_TYPE, Attribute.VALUE])
    with pytest.raises(pkcs11.AttributeSensitive):
        key[Attribute.VALUE]
    with pytest.raises(NotImplementedError):
        key[0xDEADBEEF] = b"x"


def test_badly_typed_templates_raise(session: Any) -> None:
    """Each of these ends the whole process in python-pkcs11 (DESIGN.md 8, trap 5)."""
    before = len(list(session.get_objects()))
    with pytest.raises(AttributeError):
        session.generate_key(KeyType.AES, 128, label=b"x")
    with pytest.raises(TypeError):
        session.generate_key(KeyType.AES, 128, id="abc")
    with pytest.raises(NotImplementedError):
        list(session.get_objects({Attribute.OWNER: b"x"}))
    with pytest.raises(AttributeError):
        session.get_key(label=b"x")
    with pytest.raises(TypeError):
        session.create_object({Attribute.CLASS: ObjectClass.DATA, Attribute.VALUE: "text"})
    with pytest.raises(AttributeError):
        session.generate_keypair(KeyType.RSA, 1024, private_template={Attribute.LABEL: 5})
    with pytest.raises(AttributeError):
        session.generate_key(KeyType.AES, 128).copy({Attribute.LABEL: b"x"})
    assert len(list(session.get_objects())) == before + 1


def test_custom_mapper(token: Any) -> None:
    class TextIds(AttributeMapper):
        def __init__(self) -> None:
            super().__init__()
            self.register_handler(Attribute.ID, lambda text: text.encode(), lambda raw: raw.decode().upper())

    with token.open(user_pin=PIN, attribute_mapper=TextIds()) as session:
        key = session.generate_key(KeyType.AES, 128, id="abc", template={Attribute.LABEL: "x"})
        assert key[Attribute.ID] == "ABC"
        assert key.get_attributes([Attribute.ID]) == {Attribute.ID: "ABC"}
        key[Attribute.ID] = "def"
        assert session.get_key(id="def") == key


def test_objects_that_vanish_during_a_search_are_left_out(session: Any) -> None:
    first, second = session.generate_key(KeyType.AES, 128), session.generate_key(KeyType.AES, 128)
    search = session.get_objects(batch_size=1)
    next(search)
    first.destroy()
    second.destroy()
    assert list(search) == []
    with pytest.raises(pkcs11.ObjectHandleInvalid):
        first[Attribute.LABEL]


def test_objects_may_be_used_during_a_search(session: Any) -> None:
    for _ in range(2):
        session.generate_key(KeyType.AES, 128)
    for key in session.get_objects():
        assert key.encrypt(b"x", mechanism_param=b"i" * 16)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda s: s.generate_key(KeyType.AES, 128), [True]),
        (lambda s: s.generate_key(KeyType.AES, 128, id=b""), [False]),
        (lambda s: s.generate_key(KeyType.AES, 128, id=b"1"), [False]),
        (lambda s: s.generate_key(KeyType.AES, 128, template={Attribute.ID: b"1"}), [False]),
        (lambda s: s.generate_keypair(KeyType.RSA, 1024), [True, True]),
        (lambda s: s.generate_keypair(KeyType.RSA, 1024, public_template={Attribute.ID: b""}), [False, False]),
        (lambda s: s.create_object({Attribute.CLASS: ObjectClass.DATA, Attribute.VALUE: b"x"}), [False]),
        (
            lambda s: s.create_object(
                {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: KeyType.AES, Attribute.VALUE: b"1" * 16}
            ),
            [True],
        ),
    ],
)
def test_assign_id_where_the_application_left_it_open(
    group: DirectGroup, session: Any, make: Any, expected: list[bool]
) -> None:
    group.assigned.clear()
    make(session)
    assert group.assigned == expected


def test_a_pair_shares_the_assigned_id(session: Any) -> None:
    public, private = session.generate_keypair(KeyType.RSA, 1024, store=True)
    assert public.id == private.id
    assert len(public.id) == 16
    assert session.generate_key(KeyType.AES, 128, id=b"", store=True).id == b""


# -- operations ------------------------------------------------------------------------------------------------------
def test_one_shot_operations_go_on_beside_a_stream(session: Any) -> None:
    key = session.generate_key(KeyType.AES, 128)
    stream = key.encrypt([b"a" * 16, b"b" * 16], mechanism_param=b"i" * 16)
    next(stream)
    assert key.encrypt(b"x", mechanism_param=b"i" * 16)
    with pytest.raises(pkcs11.OperationActive):
        next(key.encrypt([b"x"], mechanism_param=b"i" * 16))
    rest = b"".join(stream)
    assert len(rest) >= 16


def test_one_session_in_many_threads(session: Any) -> None:
    key = session.generate_key(KeyType.AES, 128)
    data, results = b"1234" * 256 * 1024, []
    expected = hashlib.sha256(key.encrypt(data, mechanism_param=b"i" * 16)).digest()

    def work() -> None:
        results.append(hashlib.sha256(key.encrypt(data, mechanism_param=b"i" * 16)).digest())

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [expected] * 10


def test_digest_of_data_and_keys(session: Any) -> None:
    key = session.generate_key(KeyType.AES, 128, template=OPEN_KEY)
    value = key[Attribute.VALUE]
    assert (
        session.digest([b"a", b"", key, b"b"], mechanism=Mechanism.SHA256)
        == hashlib.sha256(b"a" + value + b"b").digest()
    )
    assert session.digest(key, mechanism=Mechanism.SHA256) == hashlib.sha256(value).digest()
    assert session.digest("é", mechanism=Mechanism.SHA256) == hashlib.sha256("é".encode()).digest()
    with pytest.raises(pkcs11.ArgumentsBad):
        session.digest(b"x")


def test_sign_and_verify(session: Any) -> None:
    public, private = session.generate_keypair(KeyType.RSA, 1024)
    mechanism = Mechanism.SHA256_RSA_PKCS
    signature = private.sign(b"data", mechanism=mechanism)
    assert private.sign([b"da", b"", b"ta"], mechanism=mechanism, buffer_size=10) == signature
    assert public.verify(b"data", signature, mechanism=mechanism) is True
    assert public.verify([b"da", b"ta"], signature, mechanism=mechanism) is True
    assert public.verify(b"other", signature, mechanism=mechanism) is False
    assert public.verify(b"data", b"short", mechanism=mechanism) is False
    with pytest.raises(TypeError):
        public.verify(b"data", "text", mechanism=mechanism)


def test_context_specific_login(session: Any) -> None:
    template = {Attribute.ALWAYS_AUTHENTICATE: True}
    public, private = session.generate_keypair(KeyType.RSA, 1024, private_template=template)
    mechanism = Mechanism.SHA256_RSA_PKCS
    signature = private.sign(b"data", mechanism=mechanism, pin=PIN)
    assert public.verify(b"data", signature, mechanism=mechanism)
    with pytest.raises(pkcs11.UserNotLoggedIn):
        private.sign(b"data", mechanism=mechanism)
    with pytest.raises(pkcs11.PinIncorrect):
        private.sign(b"data", mechanism=mechanism, pin="wrong")

    def with_login() -> Iterator[bytes]:
        session.reaffirm_credentials(PIN)
        yield b"data"

    assert private.sign(with_login(), mechanism=mechanism) == signature
    assert private.sign([b"data"], mechanism=mechanism, pin=PIN) == signature
    with pytest.raises(pkcs11.OperationNotInitialized):
        session.reaffirm_credentials(PIN)


def test_wrap_takes_keys_of_the_group_only(session: Any) -> None:
    key = session.generate_key(KeyType.AES, 128)
    for other in (b"key", pkcs11.SecretKey()):
        with pytest.raises(pkcs11.ArgumentsBad):
            key.wrap_key(other)
    inner = session.generate_key(KeyType.AES, 128, template=OPEN_KEY)
    wrapped = key.wrap_key(inner)
    again = key.unwrap_key(ObjectClass.SECRET_KEY, KeyType.AES, wrapped, template=OPEN_KEY)
    assert again[Attribute.VALUE] == inner[Attribute.VALUE]
    with pytest.raises(TypeError):
        key.unwrap_key(ObjectClass.SECRET_KEY, KeyType.AES, "text")


def test_domain_parameters(session: Any) -> None:
    from hagroup.util.ec import encode_named_curve_parameters

    curve = {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
    parameters = session.create_domain_parameters(KeyType.EC, curve, local=True)
    assert isinstance(parameters, pkcs11.LocalDomainParameters)
    assert parameters.handle is None
    assert parameters in {parameters}
    public, private = parameters.generate_keypair()
    signature = private.sign(b"x" * 32, mechanism=Mechanism.ECDSA)
    assert public.verify(b"x" * 32, signature, mechanism=Mechanism.ECDSA)
    with pytest.raises(pkcs11.ArgumentsBad):
        session.create_domain_parameters(KeyType.EC, curve, local=True, store=True)


def test_random(session: Any) -> None:
    assert len(session.generate_random(64)) == 8
    assert session.generate_random(7) == b""
    session.seed_random(b"12345678")
    for call in (lambda: session.generate_random(1.5), lambda: session.seed_random("text")):
        with pytest.raises(TypeError):
            call()


def test_what_the_engine_says_reaches_the_application(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = session.generate_key(KeyType.AES, 128)

    def refuse(*_: Any, **__: Any) -> bytes:
        raise Ckr(CKR.KEY_FUNCTION_NOT_PERMITTED, "C_EncryptInit")

    monkeypatch.setattr(session.engine, "encrypt", refuse)
    with pytest.raises(pkcs11.PKCS11Error, match="Unmapped error code 0x68"):
        key.encrypt(b"x", mechanism_param=b"i" * 16)
