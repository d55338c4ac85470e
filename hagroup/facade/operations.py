"""What keys can do: the capabilities of python-pkcs11's mixins, carried out by the group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pkcs11 import types
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.defaults import (
    DEFAULT_DERIVE_MECHANISMS,
    DEFAULT_ENCAPSULATE_MECHANISMS,
    DEFAULT_ENCRYPT_MECHANISMS,
    DEFAULT_SIGN_MECHANISMS,
    DEFAULT_WRAP_MECHANISMS,
)
from pkcs11.exceptions import ArgumentsBad
from pkcs11.mechanisms import KeyType

from hagroup.core.calls import Ckr, Template
from hagroup.facade.errors import error_for, raises_pkcs11
from hagroup.facade.mechanisms import mechanism_with_param
from hagroup.facade.objects import Object, make_object, register_capability
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
from hagroup.facade.streams import Operation


class EncryptMixin(types.EncryptMixin, Object):
    def _encrypt(
        self, data: bytes, mechanism: Any = None, mechanism_param: Any = None, buffer_size: int = 8192
    ) -> bytes:
        mech = mechanism_with_param(self, DEFAULT_ENCRYPT_MECHANISMS, mechanism, mechanism_param)
        try:
            return self._session.engine.encrypt(mech, self.uid, data)
        except Ckr as error:
            raise error_for(error.rv) from error

    def _encrypt_generator(
        self, data: Iterable[bytes], mechanism: Any = None, mechanism_param: Any = None, buffer_size: int = 8192
    ) -> Iterator[bytes]:
        mech = mechanism_with_param(self, DEFAULT_ENCRYPT_MECHANISMS, mechanism, mechanism_param)
        with Operation(self._session, "encrypt", mech, self.uid) as operation:
            yield from operation.crypt(data)


class DecryptMixin(types.DecryptMixin, Object):
    def _decrypt(
        self,
        data: bytes,
        mechanism: Any = None,
        mechanism_param: Any = None,
        pin: Any = None,
        buffer_size: int = 8192,
    ) -> bytes:
        mech = mechanism_with_param(self, DEFAULT_ENCRYPT_MECHANISMS, mechanism, mechanism_param)
        reaffirmed = None if pin is None else as_pin(pin)
        try:
            return self._session.engine.decrypt(mech, self.uid, data, pin=reaffirmed)
        except Ckr as error:
            raise error_for(error.rv) from error

    def _decrypt_generator(
        self,
        data: Iterable[bytes],
        mechanism: Any = None,
        mechanism_param: Any = None,
        pin: Any = None,
        buffer_size: int = 8192,
    ) -> Iterator[bytes]:
        mech = mechanism_with_param(self, DEFAULT_ENCRYPT_MECHANISMS, mechanism, mechanism_param)
        reaffirmed = None if pin is None else as_pin(pin)
        with Operation(self._session, "decrypt", mech, self.uid, reaffirmed) as operation:
            yield from operation.crypt(data)


class SignMixin(types.SignMixin, Object):
    def _sign(
        self,
        data: bytes,
        mechanism: Any = None,
        mechanism_param: Any = None,
        pin: Any = None,
        buffer_size: int = 8192,
    ) -> bytes:
        mech = mechanism_with_param(self, DEFAULT_SIGN_MECHANISMS, mechanism, mechanism_param)
        reaffirmed = None if pin is None else as_pin(pin)
        try:
            return self._session.engine.sign(mech, self.uid, data, pin=reaffirmed)
        except Ckr as error:
            raise error_for(error.rv) from error

    def _sign_generator(
        self,
        data: Iterable[bytes],
        mechanism: Any = None,
        mechanism_param: Any = None,
        pin: Any = None,
        buffer_size: int = 8192,
    ) -> bytes:
        mech = mechanism_with_param(self, DEFAULT_SIGN_MECHANISMS, mechanism, mechanism_param)
        reaffirmed = None if pin is None else as_pin(pin)
        with Operation(self._session, "sign", mech, self.uid, reaffirmed) as operation:
            operation.ingest(data)
            return operation.final()


class VerifyMixin(types.VerifyMixin, Object):
    def _verify(self, data: bytes, signature: bytes, mechanism: Any = None, mechanism_param: Any = None) -> None:
        mech = mechanism_with_param(self, DEFAULT_SIGN_MECHANISMS, mechanism, mechanism_param)
        try:
            self._session.engine.verify(mech, self.uid, data, as_bytes(signature))
        except Ckr as error:
            raise error_for(error.rv) from error

    def _verify_generator(
        self, data: Iterable[bytes], signature: bytes, mechanism: Any = None, mechanism_param: Any = None
    ) -> None:
        mech = mechanism_with_param(self, DEFAULT_SIGN_MECHANISMS, mechanism, mechanism_param)
        signature = as_bytes(signature)
        with Operation(self._session, "verify", mech, self.uid) as operation:
            operation.ingest(data)
            operation.final(signature)


class WrapMixin(types.WrapMixin, Object):
    @raises_pkcs11
    def wrap_key(self, key: types.Key, mechanism: Any = None, mechanism_param: Any = None) -> bytes:
        if not isinstance(key, types.Key):
            raise ArgumentsBad("`key` must be a Key.")
        if not isinstance(key, Object):
            raise ArgumentsBad("`key` must be a Key of this group.")
        mech = mechanism_with_param(self, DEFAULT_WRAP_MECHANISMS, mechanism, mechanism_param)
        return self._session.engine.wrap(mech, self.uid, key.uid)


class UnwrapMixin(types.UnwrapMixin, Object):
    @raises_pkcs11
    def unwrap_key(
        self,
        object_class: ObjectClass,
        key_type: KeyType,
        key_data: bytes,
        id: bytes | None = None,
        label: str | None = None,
        mechanism: Any = None,
        mechanism_param: Any = None,
        store: bool = False,
        capabilities: Any = None,
        template: dict[Attribute, Any] | None = None,
    ) -> Any:
        if not isinstance(object_class, ObjectClass):
            raise ArgumentsBad("`object_class` must be ObjectClass.")
        check_key_type(key_type)
        capabilities = resolve_capabilities(key_type, capabilities)
        mech = mechanism_with_param(self, DEFAULT_WRAP_MECHANISMS, mechanism, mechanism_param)
        mapper = self._session.attribute_mapper
        attributes = mapper.generic_key_template(
            {Attribute.CLASS: object_class, Attribute.KEY_TYPE: key_type},
            id_=id,
            label=label,
            store=store,
            capabilities=capabilities,
        )
        uid = self._session.engine.unwrap(
            mech,
            self.uid,
            as_bytes(key_data),
            pack(mapper, merge_templates(attributes, template)),
            assign_id=leaves_id_open(id, template),
        )
        return make_object(self._session, uid)


def _secret_key_template(
    key: Object,
    key_type: KeyType,
    key_length: int | None,
    id_: bytes | None,
    label: str | None,
    store: bool,
    capabilities: Any,
    template: dict[Attribute, Any] | None,
) -> Template:
    """The new key's attributes for derive, encapsulate and decapsulate."""
    mapper = key.session.attribute_mapper
    attributes = mapper.secret_key_template(capabilities=capabilities, id_=id_, label=label, store=store)
    attributes[Attribute.KEY_TYPE] = key_type
    if key_length is not None:
        attributes[Attribute.VALUE_LEN] = key_length // 8  # in bytes
    return pack(mapper, merge_templates(attributes, template))


class DeriveMixin(types.DeriveMixin, Object):
    @raises_pkcs11
    def derive_key(
        self,
        key_type: KeyType,
        key_length: int,
        id: bytes | None = None,
        label: str | None = None,
        store: bool = False,
        capabilities: Any = None,
        mechanism: Any = None,
        mechanism_param: Any = None,
        template: dict[Attribute, Any] | None = None,
    ) -> Any:
        check_key_type(key_type)
        check_bit_length(key_length, "key_length", required=True)
        capabilities = resolve_capabilities(key_type, capabilities)
        mech = mechanism_with_param(self, DEFAULT_DERIVE_MECHANISMS, mechanism, mechanism_param)
        packed = _secret_key_template(self, key_type, key_length, id, label, store, capabilities, template)
        uid = self._session.engine.derive(mech, self.uid, packed, assign_id=leaves_id_open(id, template))
        return make_object(self._session, uid)


class EncapsulateMixin(types.EncapsulateMixin, Object):
    @raises_pkcs11
    def encapsulate_key(
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
    ) -> tuple[bytes, Any]:
        check_key_type(key_type)
        check_bit_length(key_length, "key_length")
        capabilities = resolve_capabilities(key_type, capabilities)
        mech = mechanism_with_param(self, DEFAULT_ENCAPSULATE_MECHANISMS, mechanism, mechanism_param)
        packed = _secret_key_template(self, key_type, key_length, id, label, store, capabilities, template)
        ciphertext, uid = self._session.engine.encapsulate(
            mech, self.uid, packed, assign_id=leaves_id_open(id, template)
        )
        return ciphertext, make_object(self._session, uid)


class DecapsulateMixin(types.DecapsulateMixin, Object):
    @raises_pkcs11
    def decapsulate_key(
        self,
        ciphertext: bytes,
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
        mech = mechanism_with_param(self, DEFAULT_ENCAPSULATE_MECHANISMS, mechanism, mechanism_param)
        packed = _secret_key_template(self, key_type, key_length, id, label, store, capabilities, template)
        uid = self._session.engine.decapsulate(
            mech, self.uid, packed, as_bytes(ciphertext), assign_id=leaves_id_open(id, template)
        )
        return make_object(self._session, uid)


for _attribute, _mixin in (
    (Attribute.ENCRYPT, EncryptMixin),
    (Attribute.DECRYPT, DecryptMixin),
    (Attribute.SIGN, SignMixin),
    (Attribute.VERIFY, VerifyMixin),
    (Attribute.WRAP, WrapMixin),
    (Attribute.UNWRAP, UnwrapMixin),
    (Attribute.DERIVE, DeriveMixin),
    (Attribute.ENCAPSULATE, EncapsulateMixin),
    (Attribute.DECAPSULATE, DecapsulateMixin),
):
    register_capability(_attribute, _mixin)
