"""python-pkcs11's classes over the engine: one front end of the group (DESIGN.md 1.1)."""

# Gives objects their capabilities.
from hagroup.facade import operations as operations
