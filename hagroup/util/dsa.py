"""The same module as :mod:`pkcs11.util.dsa` (for type checkers: at run time the package has put that in its place)."""

from pkcs11.util.dsa import *  # noqa: F403
