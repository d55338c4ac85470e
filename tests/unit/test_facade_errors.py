"""Return values become the exceptions that python-pkcs11 raises for them."""

from __future__ import annotations

import re
from pathlib import Path

import pkcs11
import pytest

from hagroup.core.calls import Ckr
from hagroup.core.ckr import CKR
from hagroup.facade.errors import error_for, raises_pkcs11


def _table_of_pkcs11() -> dict[str, str]:
    """``map_rv_to_error`` as python-pkcs11's source has it: CKR name and the expression after ``exc =``."""
    source = (Path(pkcs11.__file__).parent / "_pkcs11.pxd").read_text()
    body = source[source.index("map_rv_to_error") :]
    return dict(re.findall(r"rv == CKR_(\w+):\s+exc = (.+)", body))


def test_table_is_that_of_pkcs11() -> None:
    table = _table_of_pkcs11()
    assert len(table) > 70
    for name, expression in table.items():
        expected = eval(expression, vars(pkcs11.exceptions))
        ours = error_for(CKR[name])
        assert type(ours) is type(expected), name
        assert str(ours) == str(expected), name
    for unmapped in set(CKR.__members__) - table.keys():
        assert str(error_for(CKR[unmapped])) == f"Unmapped error code {hex(CKR[unmapped])}"


@pytest.mark.parametrize(("rv", "text"), [(0x1B, "0x1b"), (0x80000123, "0x80000123"), (CKR.ACTION_PROHIBITED, "0x1b")])
def test_unmapped_codes_keep_their_number(rv: int, text: str) -> None:
    error = error_for(rv)
    assert type(error) is pkcs11.PKCS11Error
    assert str(error) == f"Unmapped error code {text}"


def test_the_cause_stays_visible() -> None:
    @raises_pkcs11
    def fails() -> None:
        raise Ckr(CKR.PIN_INCORRECT, "C_Login")

    with pytest.raises(pkcs11.PinIncorrect) as caught:
        fails()
    assert str(caught.value.__cause__) == "C_Login: CKR_PIN_INCORRECT"
