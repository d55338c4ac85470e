"""The same module as :mod:`pkcs11.defaults`."""

import sys

import pkcs11.defaults
from pkcs11.defaults import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = pkcs11.defaults
