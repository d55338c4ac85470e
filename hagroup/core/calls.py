"""The vocabulary of a call to one member: what is asked, and the four ways in which it can end.

Everything is bytes and numbers: attributes are packed before they come here (DESIGN.md 1.1), handles and session
numbers belong to one *generation* of one member's connection and mean nothing outside it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from hagroup.core import ckr

Handle: TypeAlias = int
"""Object handle, valid in one generation of one member's connection."""

SessionId: TypeAlias = int
"""A session opened by name in the member (scratch, stream, SO); 0 stands for the pooled session of the channel."""

Template: TypeAlias = "list[tuple[int, bytes | list[Any]]]"
"""Attributes in the order in which they are applied: (CKA number, packed value, or a nested template)."""

MechanismParam: TypeAlias = "None | bytes | list[Any]"
"""``None``, raw bytes, or ``[form, field, ...]`` for structures with pointers, which only the member's own process
can lay out. Forms: ``["oaep", hash, mgf, source or None]``, ``["pss", hash, mgf, salt_length]``,
``["eddsa", prehash, context or None]``, ``["ecdh", kdf, shared or None, public]``, ``["string", data]``
(CK_KEY_DERIVATION_STRING_DATA), ``["cbc_data", iv, data]`` (CK_AES_CBC_ENCRYPT_DATA_PARAMS),
``["gcm", nonce, aad or None, tag_bits]``, ``["ctr", counter_bits, counter_block]``."""

Mechanism: TypeAlias = "tuple[int, MechanismParam]"
"""CKM number and parameter."""


class Ckr(Exception):
    """The member answered, with a return value other than CKR_OK. The call is over; its effect is what PKCS#11 says."""

    def __init__(self, rv: int, function: str) -> None:
        super().__init__(f"{function}: {ckr.name(rv)}")
        self.rv = rv
        self.function = function


class MemberGone(Exception):
    """The connection ended (worker died or was killed, socket closed) before a reply came.

    ``sent`` is False only where it is certain that the member never saw the request.
    """

    def __init__(self, text: str, *, sent: bool) -> None:
        super().__init__(text)
        self.sent = sent


class DeadlinePassed(Exception):
    """No reply inside the deadline. The call may still execute, at any later time (DESIGN.md 4.1)."""


class StaleGeneration(Exception):
    """The request named handles of an earlier generation. It was not executed."""


class WorkerFault(Exception):
    """The worker's own code failed (not the module): the text says where. Treated like :class:`MemberGone`."""
