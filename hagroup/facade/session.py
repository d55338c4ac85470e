"""Sessions of the virtual token."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pkcs11 import types
from pkcs11.attributes import AttributeMapper
from pkcs11.constants import Attribute, ObjectClass, UserType
from pkcs11.defaults import DEFAULT_GENERATE_MECHANISMS, DEFAULT_PARAM_GENERATE_MECHANISMS
from pkcs11.exceptions import ArgumentsBad, ObjectHandleInvalid, OperationNotInitialized
from pkcs11.mechanisms import KeyType

from hagroup.core.calls import Ckr, Mechanism
from hagroup.core.ckr import CKR
from hagroup.engine import api
from hagroup.facade.errors import error_for, raises_pkcs11
from hagroup.facade.mechanisms import OfKeyType, mechanism_with_param
from hagroup.facade.objects import LocalDomainParameters, make_object
from hagroup.facade.packing import (
    as_bytes,
    as_pin,
    check_bit_length,
    check_key_type,
    leaves_id_open,
    merge_templates,
    pack,
    resolve_capabilities,
)
from hagroup.facade.streams import Operation, OperationLock

if TYPE_CHECKING:
    from hagroup.facade.slots import Token

_FIXED_LENGTH = (KeyType.DES2, KeyType.DES3, KeyType.GOST28147, KeyType.SEED)
_WITH_ID = (ObjectClass.SECRET_KEY, ObjectClass.PUBLIC_KEY, ObjectClass.PRIVATE_KEY, ObjectClass.CERTIFICATE)
_PARAMETER_SETS = {
    KeyType.ML_DSA: ("ML-DSA", "MLDSAParameterSet.ML_DSA_65"),
    KeyType.ML_KEM: ("ML-KEM", "MLKEMParameterSet.ML_KEM_768"),
}


class Session(types.Session):
    """A session of the virtual token; usable from several threads."""

    __slots__ = (
        "__weakref__",
        "_user_type",
        "attribute_mapper",
        "closed",
        "engine",
        "handle",
        "operation",
        "operation_lock",
        "rw",
        "token",
    )

    token: Token
    rw: bool
    handle: int
    engine: api.Session
    """The group's side of it (hagroup's own)."""
    attribute_mapper: AttributeMapper
    closed: bool
    operation_lock: OperationLock
    operation: Operation | None
    """The multi-part operation that holds the lock."""

    def __init__(self, token: Token, engine: api.Session, *, user_type: int, mapper: AttributeMapper) -> None:
        self.token = token
        self.engine = engine
        self.rw = engine.rw
        self.handle = engine.id
        self.attribute_mapper = mapper
        self.operation_lock = OperationLock()
        self.operation = None
        self._user_type = user_type
        self.closed = False

    def _identity(self) -> Any:
        return "hagroup.Session", self.token, self.handle

    @property
    def user_type(self) -> UserType | int:
        """Who logged in with this session; a plain number where a vendor defined it."""
        try:
            return UserType(self._user_type)
        except ValueError:
            return self._user_type

    @raises_pkcs11
    def close(self) -> None:
        """Closes it; if it was opened with a PIN, everybody is logged out of the virtual token."""
        if self.closed:
            raise Ckr(CKR.SESSION_HANDLE_INVALID, "C_CloseSession")
        self.closed = True
        try:
            if self._user_type != UserType.NOBODY:
                self.engine.logout()
        finally:
            self.engine.close()

    # -- PINs ----------------------------------------------------------------------------------------------
    @raises_pkcs11
    def reaffirm_credentials(self, pin: Any) -> None:
        """The context-specific login for the multi-part operation that was just begun."""
        encoded = as_pin(pin)
        operation = self.operation
        if operation is None:
            raise OperationNotInitialized()
        operation.reaffirm(encoded)

    @raises_pkcs11
    def set_pin(self, old_pin: Any, new_pin: Any) -> None:
        self.engine.set_pin(as_pin(old_pin), as_pin(new_pin))

    @raises_pkcs11
    def init_pin(self, pin: Any) -> None:
        self.engine.init_pin(as_pin(pin))

    # -- objects -------------------------------------------------------------------------------------------
    def get_objects(self, attrs: Mapping[Attribute, Any] | None = None, batch_size: int = 10) -> Iterator[Any]:
        packed = pack(self.attribute_mapper, attrs or {})
        try:
            found = self.engine.find({number: value for number, value in packed if isinstance(value, bytes)})
        except Ckr as error:
            raise error_for(error.rv) from error
        for uid in found:
            try:
                found_object = make_object(self, uid)
            except Ckr as error:
                if error.rv == CKR.OBJECT_HANDLE_INVALID:
                    continue  # destroyed since the search
                raise error_for(error.rv) from error
            except ObjectHandleInvalid:
                continue
            yield found_object

    @raises_pkcs11
    def create_object(self, attrs: dict[Attribute, Any]) -> Any:
        attrs = dict(attrs)
        has_id = attrs.get(Attribute.CLASS) in _WITH_ID
        assign_id = has_id and leaves_id_open(None, attrs)
        return make_object(self, self.engine.create(pack(self.attribute_mapper, attrs), assign_id=assign_id))

    def create_domain_parameters(
        self, key_type: KeyType, attrs: dict[Attribute, Any], local: bool = False, store: bool = False
    ) -> Any:
        if local and store:
            raise ArgumentsBad("Cannot set both `local` and `store`")
        attrs = dict(attrs)
        attrs[Attribute.CLASS] = ObjectClass.DOMAIN_PARAMETERS
        attrs[Attribute.KEY_TYPE] = key_type
        attrs[Attribute.TOKEN] = store
        return LocalDomainParameters(self, attrs) if local else self.create_object(attrs)

    @raises_pkcs11
    def generate_domain_parameters(
        self,
        key_type: KeyType,
        param_length: int,
        store: bool = False,
        mechanism: Any = None,
        mechanism_param: Any = None,
        template: dict[Attribute, Any] | None = None,
    ) -> Any:
        check_key_type(key_type)
        check_bit_length(param_length, "param_length", required=True)
        mech = mechanism_with_param(OfKeyType(key_type), DEFAULT_PARAM_GENERATE_MECHANISMS, mechanism, mechanism_param)
        attributes = {
            Attribute.CLASS: ObjectClass.DOMAIN_PARAMETERS,
            Attribute.TOKEN: store,
            Attribute.PRIME_BITS: param_length,
        }
        packed = pack(self.attribute_mapper, merge_templates(attributes, template))
        return make_object(self, self.engine.generate(mech, packed, assign_id=False))

    @raises_pkcs11
    def generate_key(
        self,
        key_type: KeyType,
        key_length: int | None = None,
        id: bytes | None = None,
        label: str | None = None,
        store: bool = False,
        capabilities: Any = None,
        mechanism: Any = None,
        mechanism_param: Any = None,
        template: dict[Attribute, Any] | None = None,
    ) -> Any:
        check_key_type(key_type)
        check_bit_length(key_length, "key_length")
        capabilities = resolve_capabilities(key_type, capabilities)
        mech = mechanism_with_param(OfKeyType(key_type), DEFAULT_GENERATE_MECHANISMS, mechanism, mechanism_param)
        attributes = self.attribute_mapper.secret_key_template(
            capabilities=capabilities, id_=id, label=label, store=store
        )
        if key_type not in _FIXED_LENGTH:
            if key_length is None:
                raise ArgumentsBad("Must provide `key_length'")
            attributes[Attribute.VALUE_LEN] = key_length // 8  # in bytes
        packed = pack(self.attribute_mapper, merge_templates(attributes, template))
        return make_object(self, self.engine.generate(mech, packed, assign_id=leaves_id_open(id, template)))

    @raises_pkcs11
    def _generate_keypair(  # type: ignore[override]  # pkcs11.types has **kwargs in place of the names
        self,
        key_type: KeyType,
        key_length: int | None = None,
        id: bytes | None = None,
        label: str | None = None,
        store: bool = False,
        capabilities: Any = None,
        mechanism: Any = None,
        mechanism_param: Any = None,
        public_template: dict[Attribute, Any] | None = None,
        private_template: dict[Attribute, Any] | None = None,
    ) -> tuple[types.PublicKey, types.PrivateKey]:
        check_key_type(key_type)
        check_bit_length(key_length, "key_length")
        capabilities = resolve_capabilities(key_type, capabilities)
        mech = mechanism_with_param(OfKeyType(key_type), DEFAULT_GENERATE_MECHANISMS, mechanism, mechanism_param)
        mapper = self.attribute_mapper
        public = mapper.public_key_template(capabilities=capabilities, id_=id, label=label, store=store)
        private = mapper.private_key_template(capabilities=capabilities, id_=id, label=label, store=store)
        if key_type is KeyType.RSA:
            if key_length is None:
                raise ArgumentsBad("Must provide `key_length'")
            public[Attribute.PUBLIC_EXPONENT] = b"\1\0\1"
            public[Attribute.MODULUS_BITS] = key_length
        elif key_type in _PARAMETER_SETS:
            name, example = _PARAMETER_SETS[key_type]
            if public_template is None or Attribute.PARAMETER_SET not in public_template:
                raise ArgumentsBad(
                    f"{name} key generation requires `Attribute.PARAMETER_SET` in `public_template` (e.g. {example})."
                )
            if key_type is KeyType.ML_KEM:
                public[Attribute.ENCAPSULATE] = True
                private[Attribute.DECAPSULATE] = True
        return self.generate_pair(
            mech,
            merge_templates(public, public_template),
            merge_templates(private, private_template),
            assign_id=leaves_id_open(id, public_template, private_template),
        )

    def generate_pair(
        self, mech: Mechanism, public: Mapping[Any, Any], private: Mapping[Any, Any], *, assign_id: bool
    ) -> tuple[types.PublicKey, types.PrivateKey]:
        """A key pair from whole templates (hagroup's own)."""
        first, second = self.engine.generate_pair(
            mech, pack(self.attribute_mapper, public), pack(self.attribute_mapper, private), assign_id=assign_id
        )
        return make_object(self, first), make_object(self, second)

    # -- random and digest -----------------------------------------------------------------------------------
    @raises_pkcs11
    def seed_random(self, seed: bytes) -> None:
        self.engine.seed(as_bytes(seed))

    @raises_pkcs11
    def generate_random(self, nbits: int) -> bytes:
        length = operator.index(nbits) // 8
        if length < 0:
            raise OverflowError("can't convert negative value to CK_ULONG")
        return self.engine.random(length) if length else b""

    @raises_pkcs11
    def _digest(self, data: bytes, mechanism: Any = None, mechanism_param: Any = None) -> bytes:
        return self.engine.digest(mechanism_with_param(OfKeyType(None), {}, mechanism, mechanism_param), data)

    def _digest_generator(
        self, data: Iterable[bytes | types.Key], mechanism: Any = None, mechanism_param: Any = None
    ) -> bytes:
        mech = mechanism_with_param(OfKeyType(None), {}, mechanism, mechanism_param)
        with Operation(self, "digest", mech, None) as operation:
            operation.ingest(data)
            return operation.final()
