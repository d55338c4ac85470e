"""A lease that is kept while its holder is inside something long: a large token on a slow HSM takes minutes to read.

Its holder renews it between one piece of work and the next, which also tells that he still has it. This thread does it
meanwhile. It stops with the process (SIGSTOP), and for a holder that is inside one thing for too long: then another
process may take over, as from one that died.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from hagroup.config.logging import get_logger
from hagroup.core.records import Lease
from hagroup.errors import JournalUnavailable
from hagroup.journal.api import Journal, LeaseLost

log = get_logger(__name__)

LONGEST = 600.0
"""Seconds that the holder may be inside one thing."""


@contextlib.contextmanager
def held(journal: Journal, lease: Lease, *, ttl: float) -> Iterator[None]:
    """Renew the lease in the background until the block is left.

    Its token stays the same, so the lease that the caller has stays good.
    """
    over = threading.Event()
    thread = threading.Thread(target=_keep, args=(journal, lease, ttl, over), name=f"lease {lease.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _keep(journal: Journal, lease: Lease, ttl: float, over: threading.Event) -> None:
    until = time.monotonic() + LONGEST
    while not over.wait(ttl / 3) and time.monotonic() < until:
        try:
            journal.renew_lease(lease, ttl=ttl)
        except LeaseLost:
            return  # the holder finds out
        except JournalUnavailable as error:
            log.warning("journal.unavailable", error=str(error))
