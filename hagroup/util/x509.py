"""The same module as :mod:`pkcs11.util.x509` (for type checkers: at run time the package has put that in its place)."""

from pkcs11.util.x509 import *  # noqa: F403
