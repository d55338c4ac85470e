"""The same module as :mod:`pkcs11.mechanisms`."""

import sys

import pkcs11.mechanisms
from pkcs11.mechanisms import *  # noqa: F403 - what type checkers see

sys.modules[__name__] = pkcs11.mechanisms
