"""The first byte of a worker's lock file: whether a call that changes its token is inside the module.

``hagroup.members.lock`` writes it, ``hagroup.journal.owners`` reads it.
"""

CHANGING, RESTING = b"1", b"0"
