"""``ha-watchdog install``: the systemd units, with the path of this very command."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path

from hagroup.errors import ConfigurationError

SYSTEMD = Path("/etc/systemd/system")
_COMMAND = "/usr/bin/ha-watchdog"
"""As the unit files have it."""


def units(into: Path) -> list[tuple[Path, str]]:
    """Where each unit goes, and its text."""
    command = str(_own_command())
    return [
        (into / source.name, source.read_text(encoding="utf-8").replace(_COMMAND, command))
        for source in sorted(files("hagroup.watchdog").joinpath("systemd").iterdir(), key=lambda one: one.name)
        if source.is_file()
    ]


def _own_command() -> Path:
    started = Path(sys.argv[0])
    beside = Path(sys.executable).with_name("ha-watchdog")
    found = started if started.name == "ha-watchdog" else beside if beside.exists() else shutil.which("ha-watchdog")
    if found is None:
        raise ConfigurationError("the command ha-watchdog is not installed: install the package first")
    return Path(os.path.abspath(found))


def write(path: Path, text: str) -> None:
    """All or nothing; what an administrator changed by hand is kept beside it.

    :raises ConfigurationError: there is no such folder.
    """
    if not path.parent.is_dir():
        raise ConfigurationError(f"{path.parent} is no folder: systemd is not here, or name its folder with --into")
    if path.exists() and path.read_text(encoding="utf-8") != text:
        path.replace(path.with_name(f"{path.name}.before"))
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(0o644)
    temporary.replace(path)
