"""The same module as :mod:`pkcs11.types`."""

import sys

import pkcs11.types
from pkcs11.types import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = pkcs11.types
