"""Real etcd nodes on loopback, with TLS, for tests and trials. Not for production: all nodes are on one machine."""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_READY = 60.0
LOOPBACK = "127.0.0.1"


def main() -> None:
    parser = argparse.ArgumentParser(prog="etcd-cluster", description=__doc__)
    parser.add_argument("command", choices=["start", "stop"])
    parser.add_argument("dir", type=Path, metavar="DIR")
    parser.add_argument("--nodes", type=int, default=3, metavar="N")
    options = parser.parse_args()
    folder: Path = options.dir.absolute()
    if options.command == "stop":
        stop(folder)
        return
    if not 1 <= options.nodes <= 7:
        parser.error("--nodes must be from 1 to 7")
    if (folder / "cluster.json").exists():
        parser.error(f"{folder} holds a cluster already: stop it with `tools/etcd-cluster stop {folder}`, or remove it")
    if shutil.which("etcd") is None:
        parser.error("there is no etcd on PATH: install Debian's etcd-server")
    try:
        endpoints = start(folder, options.nodes)
    except OSError as error:
        parser.error(f"{folder}: {error.strerror}")
    except RuntimeError as error:
        sys.exit(f"etcd-cluster: {error}")
    print(f"etcd://{','.join(endpoints)}/NAME")
    print(
        f"""
Write into hagroup.toml, with a NAME for the group:

[journal]
url  = "etcd://{",".join(endpoints)}/NAME"
ca   = "{folder}/ca.pem"
cert = "{folder}/client.pem"
key  = "{folder}/client.key"

Stop it with: tools/etcd-cluster stop {folder}""",
        file=sys.stderr,
    )


def start(
    folder: Path,
    count: int,
    addresses: Sequence[str] | None = None,
    at: Callable[[int], AbstractContextManager[None]] = lambda number: nullcontext(),
) -> list[str]:
    """Ready for use when it returns. The endpoints of the clients.

    :param addresses: on which the nodes listen; default: loopback.
    :param at: where the node with this number (from 0) is started.
    """
    addresses = addresses or [LOOPBACK] * count
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    make_certificates(folder, addresses)
    ports = free_ports(2 * count)
    nodes: list[dict[str, object]] = [
        {
            "name": f"node{n + 1}",
            "address": addresses[n],
            "client": ports[2 * n],
            "peer": ports[2 * n + 1],
            "dir": str(folder / f"node{n + 1}"),
        }
        for n in range(count)
    ]
    (folder / "cluster.json").write_text(json.dumps(nodes, indent=2), encoding="utf-8")
    for number, node in enumerate(nodes):
        with at(number):
            start_node(folder, nodes, node)
    wait_until_ready(folder, nodes)
    return [f"{node['address']}:{node['client']}" for node in nodes]


def start_node(folder: Path, nodes: list[dict[str, object]], node: dict[str, object]) -> None:
    """Start one node, or start it again."""
    deadline = time.monotonic() + _READY
    address, ports = str(node["address"]), [int(str(node[name])) for name in ("client", "peer")]
    while not all(_is_free(port, address) for port in ports) and time.monotonic() < deadline:
        time.sleep(0.05)  # one that was just killed has them for a moment longer
    peers = ",".join(f"{one['name']}={_url(one, 'peer')}" for one in nodes)
    client, peer = _url(node, "client"), _url(node, "peer")
    ca, cert, key = (str(folder / name) for name in ("ca.pem", "node.pem", "node.key"))
    command = ["etcd", "--name", str(node["name"]), "--data-dir", str(node["dir"]), "--initial-cluster", peers]
    command += ["--listen-client-urls", client, "--advertise-client-urls", client]
    command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
    command += ["--client-cert-auth", "--trusted-ca-file", ca, "--cert-file", cert, "--key-file", key]
    command += ["--peer-client-cert-auth", "--peer-trusted-ca-file", ca, "--peer-cert-file", cert]
    command += ["--peer-key-file", key, "--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h"]
    with (folder / f"{node['name']}.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    (folder / f"{node['name']}.pid").write_text(str(process.pid), encoding="ascii")


def _url(node: dict[str, object], port: str) -> str:
    return f"https://{node['address']}:{node[port]}"


def read_nodes(folder: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((folder / "cluster.json").read_text(encoding="utf-8"))
    return found


def leader(folder: Path, nodes: list[dict[str, object]]) -> str | None:
    """The name of the node that leads now, as one that answers sees it."""
    session = client_session(folder)
    for node in nodes:
        try:
            status = session.post(f"{_url(node, 'client')}/v3/maintenance/status", json={}, timeout=1).json()
        except requests.RequestException:
            continue
        if status.get("leader") == status["header"]["member_id"]:
            return str(node["name"])
    return None


def client_session(folder: Path) -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    session.verify, session.cert = str(folder / "ca.pem"), (str(folder / "client.pem"), str(folder / "client.key"))
    return session


def wait_until_ready(folder: Path, nodes: list[dict[str, object]]) -> None:
    """A write goes through every node."""
    deadline = time.monotonic() + _READY
    session = client_session(folder)
    waiting = list(nodes)
    while waiting:
        try:
            if session.post(f"{_url(waiting[0], 'client')}/v3/kv/range", json={"key": "AA=="}, timeout=1).ok:
                waiting.pop(0)
                continue
        except requests.RequestException:
            pass
        if time.monotonic() > deadline:
            stop(folder)
            log = (folder / f"{waiting[0]['name']}.log").read_text(errors="replace")[-500:]
            raise RuntimeError(f"the nodes did not become ready in {_READY:g} s; the last lines of the log:\n{log}")
        time.sleep(0.05)


def stop(folder: Path) -> None:
    """Idempotent. The data go, so the nodes need no time to leave each other in order."""
    for path in folder.glob("*.pid"):
        pid = int(path.read_text(encoding="ascii"))
        if is_ours(pid, folder):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while is_ours(pid, folder) and time.monotonic() < deadline:
            time.sleep(0.01)
        path.unlink()
    (folder / "cluster.json").unlink(missing_ok=True)
    for node in folder.glob("node[0-9]"):
        shutil.rmtree(node, ignore_errors=True)


def is_ours(pid: int, folder: Path) -> bool:
    """The number may be another process's by now."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" and any(
            argument.startswith(bytes(folder)) for argument in arguments
        )
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Below those that the system gives to outgoing connections: else a client that tries to reach a node that is down
    may be given that node's own port, and the node cannot be started again."""
    chosen: list[int] = []
    while len(chosen) < count:
        port = random.randrange(10_000, 32_000)
        if port not in chosen and _is_free(port):
            chosen.append(port)
    return chosen


def _is_free(port: int, address: str = LOOPBACK) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as etcd does: connections that ended do not count
        try:
            one.bind((address, port))
            one.listen()
        except OSError:
            return False
    return True


def make_certificates(folder: Path, addresses: Sequence[str] = (LOOPBACK,)) -> None:
    """A CA of its own; one certificate for the nodes, one for clients (without a CN: etcd's gateway refuses one where
    authentication is on)."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "hagroup test CA")])
    ca = sign(ca_name, ca_key.public_key(), ca_name, ca_key, [(x509.BasicConstraints(ca=True, path_length=0), True)])
    (folder / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    numbers = [x509.IPAddress(ipaddress.ip_address(one)) for one in dict.fromkeys([LOOPBACK, *addresses])]
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), *numbers])
    for name, extensions in (("node", [(usage, False), (names, False)]), ("client", [(usage, False)])):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"hagroup test {name}")])
        made = sign(subject, key.public_key(), ca_name, ca_key, extensions)
        (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        path = folder / f"{name}.key"
        path.touch(mode=0o600)
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


def sign(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    extensions: list[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA256())


if __name__ == "__main__":
    main()
