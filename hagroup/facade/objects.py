"""Objects of the virtual token, with the capabilities that their attributes give them."""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pkcs11 import types
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.defaults import DEFAULT_GENERATE_MECHANISMS
from pkcs11.exceptions import AttributeTypeInvalid, FunctionFailed

from hagroup.core.ckr import CKR
from hagroup.facade.errors import error_for, raises_pkcs11
from hagroup.facade.mechanisms import mechanism_with_param
from hagroup.facade.packing import leaves_id_open, merge_templates, pack, pack_attribute, resolve_capabilities

if TYPE_CHECKING:
    from hagroup.facade.session import Session

_DOMAIN_ATTRIBUTES = (Attribute.BASE, Attribute.PRIME, Attribute.SUBPRIME, Attribute.EC_PARAMS)


def virtual_handle(uid: bytes) -> int:
    """A handle that is the same for a UID in every process, so that no table grows with the objects seen."""
    return int.from_bytes(uid[:8], "big") ^ int.from_bytes(uid[8:16], "big") or 1


class Object(types.Object):
    """An object of the group, seen through one session."""

    _session: Session

    def __init__(self, session: Session, uid: bytes, *, private: bool = False) -> None:
        self._session = session
        self._uid = uid
        self._logouts = session.engine.logouts if private else None

    @property
    def uid(self) -> bytes:
        """Its name in the group (hagroup's own); a logout ends it for private objects (PKCS#11, C_Logout)."""
        if self._logouts is not None and self._logouts != self._session.engine.logouts:
            raise error_for(CKR.OBJECT_HANDLE_INVALID)
        return self._uid

    @property
    def session(self) -> Session:
        return self._session

    @property
    def handle(self) -> int:
        return virtual_handle(self._uid)

    def _identity(self) -> Any:
        return "hagroup.Object", self._session, self._uid

    @raises_pkcs11
    def __getitem__(self, key: Attribute) -> Any:
        number = operator.index(key)
        values, errors = self._session.engine.get(self.uid, [number])
        if number not in values:
            raise error_for(errors.get(number, CKR.FUNCTION_FAILED))
        return self._session.attribute_mapper.unpack_attributes(key, values[number])

    @raises_pkcs11
    def __setitem__(self, key: Attribute, value: Any) -> None:
        packed = pack_attribute(self._session.attribute_mapper, key, value)
        self._session.engine.set(self.uid, [packed])

    @raises_pkcs11
    def get_attributes(self, keys: Iterable[Attribute]) -> dict[Attribute, Any]:
        """Those that can be read; the first one's error if none can."""
        asked = {operator.index(key): key for key in keys}
        if not asked:
            return {}
        values, errors = self._session.engine.get(self.uid, list(asked))
        if not values:
            raise error_for(next((errors[n] for n in asked if n in errors), CKR.FUNCTION_FAILED))
        unpack = self._session.attribute_mapper.unpack_attributes
        return {key: unpack(key, values[number]) for number, key in asked.items() if number in values}

    @raises_pkcs11
    def copy(self, attrs: dict[Attribute, Any]) -> Object:
        template = pack(self._session.attribute_mapper, attrs)
        copied: Object = make_object(self._session, self._session.engine.copy(self.uid, template))
        return copied

    @raises_pkcs11
    def destroy(self) -> None:
        self._session.engine.destroy(self.uid)


class SecretKey(types.SecretKey):
    pass


class PublicKey(types.PublicKey):
    pass


class PrivateKey(types.PrivateKey):
    pass


class Certificate(types.Certificate):
    pass


class GenerateWithParametersMixin(types.DomainParameters):
    """Key pairs from domain parameters, whether these are on the token or in Python alone."""

    @raises_pkcs11
    def generate_keypair(
        self,
        id: bytes | None = None,
        label: str | None = None,
        store: bool = False,
        capabilities: Any = None,
        mechanism: Any = None,
        mechanism_param: Any = None,
        public_template: dict[Attribute, Any] | None = None,
        private_template: dict[Attribute, Any] | None = None,
    ) -> tuple[types.PublicKey, types.PrivateKey]:
        session: Session = self.session  # type: ignore[assignment]  # both kinds of parameters have ours
        mapper = session.attribute_mapper
        capabilities = resolve_capabilities(self.key_type, capabilities)
        mech = mechanism_with_param(self, DEFAULT_GENERATE_MECHANISMS, mechanism, mechanism_param)
        public = mapper.public_key_template(capabilities=capabilities, id_=id, label=label, store=store)
        try:
            public.update(self.get_attributes(list(_DOMAIN_ATTRIBUTES)))
        except (AttributeTypeInvalid, FunctionFailed):
            pass  # not all parameters are known to all domains
        private = mapper.private_key_template(capabilities=capabilities, id_=id, label=label, store=store)
        return session.generate_pair(
            mech,
            merge_templates(public, public_template),
            merge_templates(private, private_template),
            assign_id=leaves_id_open(id, public_template, private_template),
        )


class LocalDomainParameters(GenerateWithParametersMixin, types.LocalDomainParameters):
    def _identity(self) -> Any:
        return "hagroup.LocalDomainParameters", id(self)


class StoredDomainParameters(GenerateWithParametersMixin):
    pass


_CLASS_MAP: dict[int, type[types.Object]] = {
    ObjectClass.SECRET_KEY: SecretKey,
    ObjectClass.PUBLIC_KEY: PublicKey,
    ObjectClass.PRIVATE_KEY: PrivateKey,
    ObjectClass.DOMAIN_PARAMETERS: StoredDomainParameters,
    ObjectClass.CERTIFICATE: Certificate,
}
_KEY_CLASSES = (ObjectClass.SECRET_KEY, ObjectClass.PUBLIC_KEY, ObjectClass.PRIVATE_KEY)

_CLASS = int(Attribute.CLASS)
_capability_mixins: list[tuple[int, type[Object]]] = []
_PRIVATE = int(Attribute.PRIVATE)
_asked_of_new = [_CLASS, _PRIVATE]
_classes: dict[tuple[int, int], type[Object]] = {}
_ULONG = struct.Struct("@L")


def register_capability(attribute: Attribute, mixin: type[Object]) -> None:
    """Objects whose ``attribute`` is true get ``mixin``'s methods."""
    _capability_mixins.append((int(attribute), mixin))
    _asked_of_new.append(int(attribute))


def _class_of(object_class: int, capabilities: int) -> type[Object]:
    """One Python class for all objects of a class with the same capabilities."""
    known = _classes.get((object_class, capabilities))
    if known is None:
        base = _CLASS_MAP[object_class]
        mixins = [mixin for bit, (_, mixin) in enumerate(_capability_mixins) if capabilities >> bit & 1]
        made = type(base.__name__, (base, *mixins, Object), {"__module__": __name__, "__doc__": base.__doc__})
        known = _classes.setdefault((object_class, capabilities), made)
    return known


def make_object(session: Session, uid: bytes) -> Any:
    """An object with the right bases for its class and capabilities; of unknown class, a plain :class:`Object`."""
    values, _ = session.engine.get(uid, _asked_of_new)
    raw = values.get(_CLASS, b"")
    object_class = _ULONG.unpack(raw)[0] if len(raw) == _ULONG.size else -1
    private = any(values.get(_PRIVATE, b""))
    if object_class not in _CLASS_MAP:
        return Object(session, uid, private=private)
    capabilities = 0
    for bit, (number, _) in enumerate(_capability_mixins):
        if any(values.get(number, b"")):
            capabilities |= 1 << bit
    return _class_of(object_class, capabilities)(session, uid, private=private)
