"""What can go wrong with a group, and what the caller may conclude from each.

Every error derives from :class:`HAError` and from the ``pkcs11`` exception that an application written for
one HSM already catches, so that an unchanged program does the right thing.
"""

from __future__ import annotations

from pkcs11 import exceptions as p11


class HAError(p11.PKCS11Error):
    """Base of everything that hagroup raises of its own. Each subclass says what may be concluded."""


class ConfigurationError(HAError, p11.ArgumentsBad):
    """The configuration cannot be used. Nothing was loaded, opened or changed; the text names file, key and line."""


class GroupUnavailable(HAError, p11.DeviceError):
    """No member that could serve this call is usable now.

    A repeatable call (sign, decrypt, ...) was not executed with a result; it may be repeated at any time. The
    group recovers by itself: no restart and no ``C_Finalize`` is needed.
    """


class OutcomeUnknown(HAError, p11.DeviceError):
    """Members died or hung inside a changing call and it is not known yet whether it was carried out.

    The journal holds the intent; it is finished or undone by whoever comes next, and never left half-made. Look
    the object up before asking again.
    """


class CallTimeout(HAError, p11.DeviceError):
    """Two members did not answer inside their deadline; a third was not asked. Nothing is concluded about them."""


class JournalUnavailable(HAError, p11.DeviceError):
    """The journal cannot be reached or written: no change was begun. Operations with existing keys may go on."""


class JournalOutcomeUnknown(JournalUnavailable):
    """The journal was asked and gave no answer: whether the change was recorded is not known yet.

    It is settled as soon as the journal answers again: taken back, or, where it was recorded, finished or undone like
    what a dead process left. Look before asking again.
    """


class JournalMismatch(HAError, p11.DeviceError):
    """This journal is not the group's current one (copied, restored, or of another epoch). Nothing was changed."""


class GroupReadOnly(HAError, p11.TokenWriteProtected):
    """Fewer members are usable than ``min_replicas`` and ``degraded = "refuse"``: the change was not begun."""


class NotReplicable(HAError, p11.KeyUnextractable):
    """This object cannot be replicated to the members, so it was not made anywhere. Make it a session object."""


class DomainMismatch(HAError, p11.TokenNotRecognised):
    """A member does not share the group's cloning domain or partition secret; nothing was created on it."""


class MemberQuarantined(HAError, p11.TokenNotRecognised):
    """A member needs a person: its PIN differs, it is another token, or its domain is wrong. The text says which."""


class StreamTooLong(HAError, p11.DeviceError):
    """The member of a multi-part operation failed after more input than is kept for a replay. Start it again."""


class NotOnGroup(HAError, p11.FunctionNotSupported):
    """This cannot be promised on a group, the text says why; nothing happened."""
