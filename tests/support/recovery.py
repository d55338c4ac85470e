"""What the recovery tests (T 3.4.4 to 3.4.7) share: a client that starts, and what the tokens hold."""

from __future__ import annotations

from tests.support import plain
from tests.support.groups import GroupFixture, run_client


def converge(group: GroupFixture) -> None:
    """A new client starts; that is all."""
    program = (
        "import time, subprocess, json\n"
        "deadline = time.monotonic() + 120\n"
        f"command = [sys.executable, '-m', 'hagroup.admin.cli', '--config', {str(group.toml)!r}, 'status', '--json']\n"
        "while True:\n"
        "    done = subprocess.run(command, capture_output=True, text=True)\n"
        "    if done.returncode == 0: break\n"
        "    assert time.monotonic() < deadline, done.stdout + done.stderr\n"
        "    time.sleep(0.2)\n"
    )
    run_client(group, program)


def all_labels(group: GroupFixture) -> list[list[str]]:
    return [plain.labels(member) for member in group.members.values()]
