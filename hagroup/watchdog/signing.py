"""The heartbeat's last level: a signature with a tiny key made for that purpose.

The key is a session object, made anew in each life of a member: it is never on a token, no search of anybody shows it,
no crash leaves it behind, and it needs neither a lease nor bookkeeping.
"""

from __future__ import annotations

from hagroup.core.attributes import CKA, pack_bool, pack_ulong
from hagroup.core.calls import Ckr, Handle, Template
from hagroup.core.ckr import CKR
from hagroup.core.numbers import CKK, CKM, CKO
from hagroup.engine.member import Life

_KEY: Template = [
    (CKA.CLASS, pack_ulong(CKO.SECRET_KEY)),
    (CKA.KEY_TYPE, pack_ulong(CKK.GENERIC_SECRET)),
    (CKA.TOKEN, pack_bool(False)),
    (CKA.PRIVATE, pack_bool(True)),
    (CKA.SENSITIVE, pack_bool(True)),
    (CKA.EXTRACTABLE, pack_bool(False)),
    (CKA.SIGN, pack_bool(True)),
    (CKA.VALUE_LEN, pack_ulong(32)),
]
_DATA = b"hagroup heartbeat"
_OVERLOAD = frozenset({CKR.HOST_MEMORY, CKR.DEVICE_MEMORY, CKR.SESSION_COUNT})
"""No room for one more session or key just now: that is no failure (DESIGN.md 3)."""


class Signing:
    """The keys of one watchdog, one for each member; a member is asked by one thread at a time."""

    def __init__(self) -> None:
        self._keys: dict[str, tuple[Life, Handle]] = {}

    def sign(self, name: str, life: Life, *, timeout: float) -> bool:
        """Sign with the member's key, made where there is none in this life yet.

        :return: False: the member lists no such mechanism, or has no room for the key just now.
        :raises Ckr: what the member answered instead; and whatever its connection raises.
        """
        if not {int(CKM.GENERIC_SECRET_KEY_GEN), int(CKM.SHA256_HMAC)} <= set(life.mechanisms):
            return False
        connection = life.connection
        of, key = self._keys.get(name, (None, 0))
        try:
            if of is not life:
                key = connection.generate((int(CKM.GENERIC_SECRET_KEY_GEN), None), _KEY, timeout=timeout)
                self._keys[name] = life, key
            connection.sign((int(CKM.SHA256_HMAC), None), key, _DATA, timeout=timeout)
        except Ckr as error:
            if error.rv in _OVERLOAD:
                return False
            raise
        return True
