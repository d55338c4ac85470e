"""A pytest plugin for a process that runs python-pkcs11's own tests: what ``import pkcs11`` gives there.

``HAGROUP_SHIM`` names the target as JSON: ``{"kind": "plain"}``, ``{"kind": "group", "config": PATH}`` or
``{"kind": "direct", "settings": {...}, "support": PATH}`` (the facade over a single member); with ``"force_token":
true`` every key that is made from a template becomes a token object. ``HAGROUP_SHIM_RESULTS`` is where the outcomes go.

The tests know SoftHSM by its file name, so that they are given that name whatever the target is.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Generator
from types import ModuleType
from typing import Any

import pytest

TARGET = json.loads(os.environ["HAGROUP_SHIM"])
MODULE = os.environ["PKCS11_MODULE"]
outcomes: dict[str, dict[str, str]] = {}


# -- what stands behind pkcs11.lib -----------------------------------------------------------------------------------
def _initialize_with_locking() -> None:
    """python-pkcs11 initialises without locks, and SoftHSM with several threads then breaks (DESIGN.md 8, trap 1)."""
    from hagroup.members.cryptoki import CKF_OS_LOCKING_OK, CkInitializeArgs, Cryptoki

    cryptoki = Cryptoki(ctypes.CDLL(MODULE))
    cryptoki.C_Finalize(None)
    cryptoki.C_Initialize(ctypes.byref(CkInitializeArgs(flags=CKF_OS_LOCKING_OK)))


def _use_plain() -> None:
    import pkcs11

    real = pkcs11.lib

    def lib(so: str) -> Any:
        loaded = real(so)
        if so == MODULE:
            _initialize_with_locking()
        return loaded

    pkcs11.lib = lib


def _direct_bootstrap(target: dict[str, Any]) -> ModuleType:
    """In place of ``hagroup.bootstrap``: a group that is one member."""
    spec = importlib.util.spec_from_file_location("direct_engine", target["support"])
    assert spec is not None
    assert spec.loader is not None
    support = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(support)
    from hagroup.members.module import ConnectionSettings

    generations = iter(range(1, 1000))
    settings = ConnectionSettings(**target["settings"])
    bootstrap = ModuleType("hagroup.bootstrap")
    bootstrap.open_group = lambda _: support.direct_group(settings, generation=next(generations))  # type: ignore[attr-defined]
    return bootstrap


def _use_group(target: dict[str, Any]) -> None:
    import pkcs11._pkcs11  # the real ones, before hagroup takes their place

    import hagroup

    if target["kind"] == "direct":
        sys.modules["hagroup.bootstrap"] = _direct_bootstrap(target)
        target["config"] = "direct.toml"
    real_lib, real_unload = hagroup.lib, hagroup.unload
    hagroup.lib = lambda so: real_lib(target["config"] if so == MODULE else so)  # type: ignore[assignment]
    hagroup.unload = lambda so: real_unload(target["config"] if so == MODULE else so)  # type: ignore[assignment]
    hagroup._pkcs11 = pkcs11._pkcs11  # type: ignore[attr-defined]  # python-pkcs11's own lib() looks for it beside itself
    sys.modules["pkcs11"] = hagroup


if TARGET["kind"] == "plain":
    _use_plain()
else:
    _use_group(TARGET)


# -- token objects in place of session objects -----------------------------------------------------------------------
class ReadWriteToken:
    """A token whose sessions are read-write."""

    def __init__(self, token: Any) -> None:
        self._token = token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._token, name)

    def open(self, *args: Any, **kwargs: Any) -> Any:
        return self._token.open(*args, **{**kwargs, "rw": True})


def _force_token_objects() -> None:
    from pkcs11 import attributes

    real = attributes._apply_common

    def stored(template: Any, id_: Any, label: Any, store: Any) -> None:
        real(template, id_, label, True)

    attributes._apply_common = stored


def _wipe() -> None:
    """Removes all objects, those of tests that failed half-way too."""
    import pkcs11

    token = pkcs11.lib(MODULE).get_token(token_label=os.environ["PKCS11_TOKEN_LABEL"])
    with token.open(rw=True, user_pin=os.environ["PKCS11_TOKEN_PIN"]) as session:
        for found in list(session.get_objects()):
            found.destroy()


if TARGET.get("force_token"):
    _force_token_objects()


def pytest_sessionstart() -> None:
    """Before the collection, which keeps each class's setUpClass as it is then."""
    if TARGET.get("force_token"):
        sys.path.insert(0, os.getcwd())  # before the other package "tests", of this project
        import tests

        real = tests.TestCase.setUpClass.__func__

        def set_up(cls: Any) -> None:
            real(cls)
            if cls.with_token or cls.with_session:
                cls.token = ReadWriteToken(cls.token)

        tests.TestCase.setUpClass = classmethod(set_up)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown() -> Generator[None]:
    yield
    if TARGET.get("force_token"):
        _wipe()


# -- outcomes ----------------------------------------------------------------------------------------------------------
def pytest_runtest_logreport(report: Any) -> None:
    name = report.nodeid.split("/")[-1]
    said = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", "") or "")
    if report.when == "call" or report.outcome != "passed":
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.outcome == "skipped" else report.outcome
        if outcomes.get(name, {}).get("outcome") != "failed":
            outcomes[name] = {"outcome": outcome, "message": said[:500]}


def pytest_sessionfinish() -> None:
    with open(os.environ["HAGROUP_SHIM_RESULTS"], "w") as results:
        json.dump(outcomes, results)
