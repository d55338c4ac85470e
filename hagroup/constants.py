"""The same module as :mod:`pkcs11.constants`."""

import sys

import pkcs11.constants
from pkcs11.constants import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = pkcs11.constants
