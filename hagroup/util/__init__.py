"""The same package as :mod:`pkcs11.util`, its modules too."""

import sys

import pkcs11.util
from pkcs11.util import *  # noqa: F403 - what type checkers see
from pkcs11.util import dh, dsa, ec, rsa, x509

# Before the package is replaced: an import of hagroup.util.ec would otherwise load a second copy of pkcs11's file.
for _name, _module in {"dh": dh, "dsa": dsa, "ec": ec, "rsa": rsa, "x509": x509}.items():
    sys.modules[f"{__name__}.{_name}"] = _module
sys.modules[__name__] = pkcs11.util
