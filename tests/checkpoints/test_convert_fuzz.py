"""Thousands of checkpoints with something wrong in what they claim: each is refused in one line, or
is the same network. Their code is checked as users run it, without the checks of types of tests."""

import claims_fuzz
import pytest
import tiny


@pytest.mark.slow
@pytest.mark.parametrize("name", [fuzz.__name__ for fuzz in claims_fuzz.FUZZES])
def test_claims(name, capsys):
    printed = tiny.script(claims_fuzz.__file__, name, timeout=300)
    with capsys.disabled():
        print(f"\n{printed}")
    assert ", tracebacks 0, " in printed
