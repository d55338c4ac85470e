"""The same module as :mod:`pkcs11.attributes`."""

import sys

import pkcs11.attributes
from pkcs11.attributes import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = pkcs11.attributes
