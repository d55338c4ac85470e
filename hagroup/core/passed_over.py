"""What the event says of clients that a change was not acknowledged by: which host has to look after them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

PASSED_OVER = "client passed over"
_CLIENT = "client:"


def passed_over_data(hosts: Mapping[str, str]) -> dict[str, str]:
    """:param hosts: of each client."""
    return {"clients": " ".join(hosts), **{_CLIENT + client: host for client, host in hosts.items()}}


def clients_in(data: Mapping[str, str]) -> dict[str, str]:
    """By client: its host. Empty for an event of an earlier hagroup."""
    return {key.removeprefix(_CLIENT): host for key, host in data.items() if key.startswith(_CLIENT)}


def hosts_left(data: Mapping[str, str], left: Collection[str]) -> dict[str, bool]:
    """By host of such an event: whether one of its clients is among those that are not over."""
    found: dict[str, bool] = {}
    for client, host in clients_in(data).items():
        found[host] = found.get(host, False) or client in left
    return found
