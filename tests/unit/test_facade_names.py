"""``import hagroup as pkcs11``: the same names, the same objects."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pkcs11
import pytest

import hagroup
from hagroup import errors

MODULES = ["attributes", "constants", "defaults", "exceptions", "mechanisms", "types", "util"]
MODULES += [f"util.{name}" for name in ("dh", "dsa", "ec", "rsa", "x509")]
OURS = {"lib", "unload"}


def _public(module: ModuleType) -> set[str]:
    return {name for name in vars(module) if not name.startswith("_")}


def test_every_public_name_of_pkcs11_is_there_and_is_the_same_object() -> None:
    # What only a type checker or the implementation imported there is not pkcs11's.
    own = {n for n in _public(pkcs11) if getattr(getattr(pkcs11, n), "__module__", "pkcs11").startswith("pkcs11")}
    assert {"Mechanism", "PROTECTED_AUTH", "exceptions", "ec", "NoSuchKey"} <= own
    assert own - _public(hagroup) == set()
    assert {name for name in own - OURS if getattr(hagroup, name) is not getattr(pkcs11, name)} == set()


def test_star_import_gives_them_too() -> None:
    namespace: dict[str, object] = {}
    exec("from hagroup import *", namespace)
    exports = {n for n in _public(pkcs11) if getattr(getattr(pkcs11, n), "__module__", "").startswith("pkcs11.")}
    assert exports - namespace.keys() == set()


def test_own_names_are_lib_unload_and_the_errors() -> None:
    own = {name for name, value in vars(errors).items() if isinstance(value, type)}
    for name in own:
        assert getattr(hagroup, name) is getattr(errors, name)
        assert issubclass(getattr(errors, name), hagroup.PKCS11Error)
        assert issubclass(getattr(errors, name), hagroup.HAError)
    assert own <= set(hagroup.__all__)
    assert sorted(set(hagroup.__all__)) == sorted(hagroup.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_submodules_are_the_same_modules(name: str) -> None:
    ours = importlib.import_module(f"hagroup.{name}")
    assert ours is importlib.import_module(f"pkcs11.{name}")


@pytest.mark.parametrize(
    "statement",
    [
        "import hagroup.util.ec as m",
        "from hagroup.util import ec as m",
        "from hagroup import ec as m",
        "import hagroup.util.ec; m = hagroup.util.ec",
    ],
)
def test_import_in_a_fresh_process(statement: str) -> None:
    code = f"{statement}\nimport pkcs11.util.ec\nassert m is pkcs11.util.ec"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
