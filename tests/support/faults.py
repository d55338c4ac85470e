"""The fault interposer for tests: builds it, wraps a module with it, and controls it.

``softhsm-fixtures/faultcontrol.py`` has the layout of the control file and all operations on it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FIXTURES = Path(__file__).parents[2] / "softhsm-fixtures"
if str(FIXTURES) not in sys.path:
    sys.path.append(str(FIXTURES))

from faultcontrol import (  # noqa: E402
    CRYPTO,
    CallInProgress,
    FaultControl,
    FaultControlError,
    FunctionStats,
    Rule,
    TracedCall,
)

__all__ = [
    "CRYPTO",
    "FIXTURES",
    "CallInProgress",
    "FaultControl",
    "FaultControlError",
    "FunctionStats",
    "Rule",
    "TracedCall",
    "build_interposer",
    "fault_env",
]


def build_interposer() -> Path:
    """The interposer's module, compiled if it is missing or older than its source."""
    built = subprocess.run(
        [str(FIXTURES / "build-interposer")], capture_output=True, text=True, timeout=120, check=False
    )
    if built.returncode:
        raise RuntimeError(f"the interposer could not be built: {built.stderr.strip()}")
    return Path(built.stdout.strip())


def fault_env(control: FaultControl | Path | str, module: Path | str) -> dict[str, str]:
    """What a member's ``env`` must hold beside the module's own variables, with the interposer as its ``module``."""
    path = control.path if isinstance(control, FaultControl) else str(control)
    return {"HAGROUP_FAULT_MODULE": str(module), "HAGROUP_FAULT_CONTROL": path}
