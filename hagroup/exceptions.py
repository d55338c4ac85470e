"""The same module as :mod:`pkcs11.exceptions`."""

import sys

import pkcs11.exceptions
from pkcs11.exceptions import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = pkcs11.exceptions
