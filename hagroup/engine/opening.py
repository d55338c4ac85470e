"""A member's life begins: its module is started, in a worker process or in this one, and says what it is."""

from __future__ import annotations

from hagroup.config.model import MemberConfig
from hagroup.core.calls import MemberGone, StaleGeneration, WorkerFault
from hagroup.engine.member import Life
from hagroup.journal.api import Journal
from hagroup.members import ConnectionSettings, open_connection
from hagroup.members.api import Connection

CONNECTION_LOST = (MemberGone, WorkerFault, StaleGeneration)
START_TIMEOUT = 15.0
"""Seconds for a worker to start and its module to initialise (SoftHSM: 0.36 s with 10,000 objects)."""


def open_life(
    config: MemberConfig, journal: Journal | None, *, generation: int, timeout: float, serial: str | None = None
) -> Life:
    """Start a member's module (worker process or copy in this process) and read what it is.

    :param journal: gives the lock by which others can prove the worker dead; None while there is no group yet.
    """
    worker, lock_file = (None, None) if journal is None else journal.worker_lock(config.name)
    settings = ConnectionSettings(
        name=config.name,
        module=str(config.module),
        env=dict(config.env),
        token_serial=config.token_serial or serial,
        token_label=None if config.token_serial or serial else config.token_label,
        init_args=config.init_args,
        lock_file=lock_file,
    )
    connection: Connection = open_connection(
        settings, generation=generation, isolation=config.isolation, timeout=START_TIMEOUT
    )
    try:
        token = connection.token_info(timeout=timeout)
        return Life(connection, worker, token, connection.mechanisms(timeout=timeout))
    except BaseException:
        connection.kill()
        raise
