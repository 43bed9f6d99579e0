"""Thousands of checkpoints with something wrong in what they claim: each is refused in one line, or
is the same network. Their code is checked as users run it, without the checks of types of tests."""

import os

import claims_fuzz
import pytest
import tiny


@pytest.mark.slow
@pytest.mark.parametrize("name", [fuzz.__name__ for fuzz in claims_fuzz.FUZZES])
def test_claims(name, capsys):
    tests = str(tiny.ROOT / "tests")
    rooms = [tests, *(entry.path for entry in os.scandir(tests) if entry.is_dir())]
    code = (f"import runpy, sys; sys.path[:0] = {rooms!r}; sys.argv[1:] = [{name!r}]\n"
            f"runpy.run_path({claims_fuzz.__file__!r}, run_name='__main__')")
    done = tiny.process(code=code)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert ", tracebacks 0, " in done.stdout
