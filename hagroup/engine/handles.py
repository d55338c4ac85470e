"""Handles of token objects found in one life of a member; each is looked for once, however many threads need it.

Finding an object and comparing its fingerprint is several calls to the member. Threads that begin to use a key at the
same moment would each make them all, on a member that has other things to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from hagroup.core.calls import DeadlinePassed, Handle


class _Search:
    """What one thread looks for and others wait for."""

    __slots__ = ("done", "error", "handle", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.done = threading.Event()
        self.handle: Handle | None = None
        self.error: Exception | None = None


class Handles(dict[bytes, Handle]):
    """UID to handle. What is forgotten while it is looked for is not remembered when it is found."""

    def __init__(self) -> None:
        super().__init__()
        self._searches: dict[bytes, _Search] = {}
        self._lock = threading.RLock()

    def find(self, uid: bytes, look: Callable[[], Handle], *, timeout: float) -> Handle:
        """The known handle, or what ``look`` finds; the outcome is that of all who asked meanwhile.

        :param timeout: seconds to wait for another thread's search.
        :raises DeadlinePassed: that one did not come to its end.
        """
        with self._lock:
            handle = self.get(uid)
            if handle is not None:
                return handle
            others = self._searches.get(uid)
            if others is None:
                mine = self._searches[uid] = _Search()
        if others is None:
            return self._look(uid, mine, look)
        if others.thread == threading.get_ident():  # a signal handler, or a finalizer, that came in between
            return look()
        if not others.done.wait(timeout):
            raise DeadlinePassed("another call's search for the same object hangs")
        if others.error is not None:
            raise others.error
        return look() if others.handle is None else others.handle  # none: it was interrupted

    def _look(self, uid: bytes, search: _Search, look: Callable[[], Handle]) -> Handle:
        try:
            search.handle = look()
            with self._lock:
                if self._searches.get(uid) is search:
                    self[uid] = search.handle
            return search.handle
        except Exception as error:
            search.error = error
            raise
        finally:
            with self._lock:
                if self._searches.get(uid) is search:
                    del self._searches[uid]
            search.done.set()

    def pop(self, uid: bytes, *default: Any) -> Any:
        with self._lock:
            self._searches.pop(uid, None)
            return super().pop(uid, *default)

    def clear(self) -> None:
        with self._lock:
            self._searches.clear()
            super().clear()
