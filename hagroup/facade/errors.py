"""From return values to python-pkcs11's exceptions: the same mapping as ``map_rv_to_error`` of its ``_pkcs11``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from pkcs11 import exceptions as p11

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_CLASSES: dict[int, type[p11.PKCS11Error]] = {
    CKR.ATTRIBUTE_TYPE_INVALID: p11.AttributeTypeInvalid,
    CKR.ATTRIBUTE_VALUE_INVALID: p11.AttributeValueInvalid,
    CKR.ATTRIBUTE_READ_ONLY: p11.AttributeReadOnly,
    CKR.ATTRIBUTE_SENSITIVE: p11.AttributeSensitive,
    CKR.ARGUMENTS_BAD: p11.ArgumentsBad,
    CKR.DATA_INVALID: p11.DataInvalid,
    CKR.DATA_LEN_RANGE: p11.DataLenRange,
    CKR.DOMAIN_PARAMS_INVALID: p11.DomainParamsInvalid,
    CKR.DEVICE_ERROR: p11.DeviceError,
    CKR.DEVICE_MEMORY: p11.DeviceMemory,
    CKR.DEVICE_REMOVED: p11.DeviceRemoved,
    CKR.ENCRYPTED_DATA_INVALID: p11.EncryptedDataInvalid,
    CKR.ENCRYPTED_DATA_LEN_RANGE: p11.EncryptedDataLenRange,
    CKR.EXCEEDED_MAX_ITERATIONS: p11.ExceededMaxIterations,
    CKR.FUNCTION_CANCELED: p11.FunctionCancelled,
    CKR.FUNCTION_FAILED: p11.FunctionFailed,
    CKR.FUNCTION_REJECTED: p11.FunctionRejected,
    CKR.FUNCTION_NOT_SUPPORTED: p11.FunctionNotSupported,
    CKR.KEY_HANDLE_INVALID: p11.KeyHandleInvalid,
    CKR.KEY_INDIGESTIBLE: p11.KeyIndigestible,
    CKR.KEY_NEEDED: p11.KeyNeeded,
    CKR.KEY_NOT_NEEDED: p11.KeyNotNeeded,
    CKR.KEY_SIZE_RANGE: p11.KeySizeRange,
    CKR.KEY_NOT_WRAPPABLE: p11.KeyNotWrappable,
    CKR.KEY_TYPE_INCONSISTENT: p11.KeyTypeInconsistent,
    CKR.KEY_UNEXTRACTABLE: p11.KeyUnextractable,
    CKR.GENERAL_ERROR: p11.GeneralError,
    CKR.HOST_MEMORY: p11.HostMemory,
    CKR.MECHANISM_INVALID: p11.MechanismInvalid,
    CKR.MECHANISM_PARAM_INVALID: p11.MechanismParamInvalid,
    CKR.NO_EVENT: p11.NoEvent,
    CKR.OBJECT_HANDLE_INVALID: p11.ObjectHandleInvalid,
    CKR.OPERATION_ACTIVE: p11.OperationActive,
    CKR.OPERATION_NOT_INITIALIZED: p11.OperationNotInitialized,
    CKR.PIN_EXPIRED: p11.PinExpired,
    CKR.PIN_INCORRECT: p11.PinIncorrect,
    CKR.PIN_INVALID: p11.PinInvalid,
    CKR.PIN_LEN_RANGE: p11.PinLenRange,
    CKR.PIN_LOCKED: p11.PinLocked,
    CKR.PIN_TOO_WEAK: p11.PinTooWeak,
    CKR.PUBLIC_KEY_INVALID: p11.PublicKeyInvalid,
    CKR.RANDOM_NO_RNG: p11.RandomNoRNG,
    CKR.RANDOM_SEED_NOT_SUPPORTED: p11.RandomSeedNotSupported,
    CKR.SESSION_CLOSED: p11.SessionClosed,
    CKR.SESSION_COUNT: p11.SessionCount,
    CKR.SESSION_EXISTS: p11.SessionExists,
    CKR.SESSION_HANDLE_INVALID: p11.SessionHandleInvalid,
    CKR.SESSION_READ_ONLY: p11.SessionReadOnly,
    CKR.SESSION_READ_ONLY_EXISTS: p11.SessionReadOnlyExists,
    CKR.SESSION_READ_WRITE_SO_EXISTS: p11.SessionReadWriteSOExists,
    CKR.SIGNATURE_LEN_RANGE: p11.SignatureLenRange,
    CKR.SIGNATURE_INVALID: p11.SignatureInvalid,
    CKR.TEMPLATE_INCOMPLETE: p11.TemplateIncomplete,
    CKR.TEMPLATE_INCONSISTENT: p11.TemplateInconsistent,
    CKR.SLOT_ID_INVALID: p11.SlotIDInvalid,
    CKR.TOKEN_NOT_PRESENT: p11.TokenNotPresent,
    CKR.TOKEN_NOT_RECOGNIZED: p11.TokenNotRecognised,
    CKR.TOKEN_WRITE_PROTECTED: p11.TokenWriteProtected,
    CKR.UNWRAPPING_KEY_HANDLE_INVALID: p11.UnwrappingKeyHandleInvalid,
    CKR.UNWRAPPING_KEY_SIZE_RANGE: p11.UnwrappingKeySizeRange,
    CKR.UNWRAPPING_KEY_TYPE_INCONSISTENT: p11.UnwrappingKeyTypeInconsistent,
    CKR.USER_NOT_LOGGED_IN: p11.UserNotLoggedIn,
    CKR.USER_ALREADY_LOGGED_IN: p11.UserAlreadyLoggedIn,
    CKR.USER_ANOTHER_ALREADY_LOGGED_IN: p11.AnotherUserAlreadyLoggedIn,
    CKR.USER_PIN_NOT_INITIALIZED: p11.UserPinNotInitialized,
    CKR.USER_TOO_MANY_TYPES: p11.UserTooManyTypes,
    CKR.WRAPPED_KEY_INVALID: p11.WrappedKeyInvalid,
    CKR.WRAPPED_KEY_LEN_RANGE: p11.WrappedKeyLenRange,
    CKR.WRAPPING_KEY_HANDLE_INVALID: p11.WrappingKeyHandleInvalid,
    CKR.WRAPPING_KEY_SIZE_RANGE: p11.WrappingKeySizeRange,
    CKR.WRAPPING_KEY_TYPE_INCONSISTENT: p11.WrappingKeyTypeInconsistent,
}

# Programs compare these texts: python-pkcs11 has no class for them.
_TEXTS: dict[int, str] = {
    CKR.BUFFER_TOO_SMALL: "Buffer was too small. Should never see this.",
    CKR.CRYPTOKI_ALREADY_INITIALIZED: "Initialisation error (already initialized). Should never see this.",
    CKR.CRYPTOKI_NOT_INITIALIZED: "Initialisation error (not initialized). Should never see this.",
    CKR.SESSION_PARALLEL_NOT_SUPPORTED: "Parallel not supported. Should never see this.",
    CKR.USER_TYPE_INVALID: "User type invalid. Should never see this.",
}


def error_for(rv: int) -> p11.PKCS11Error:
    """The exception that python-pkcs11 raises for ``rv``."""
    error = _CLASSES.get(rv)
    if error is not None:
        return error()
    return p11.PKCS11Error(_TEXTS.get(rv) or f"Unmapped error code {hex(rv)}")


def raises_pkcs11(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Lets python-pkcs11's exceptions leave ``function`` in place of :class:`Ckr`, which stays their cause."""

    @functools.wraps(function)
    def translated(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except Ckr as error:
            raise error_for(error.rv) from error

    return translated
