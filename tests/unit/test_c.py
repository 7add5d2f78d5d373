"""The C tests, built as the debug flavour; each program is one test here."""

import shutil
import sys
from pathlib import Path

import pytest

C_TESTS = Path(__file__).resolve().parents[1] / "c"
sys.path.insert(0, str(C_TESTS))
import build  # noqa: E402

NAMES = sorted(path.stem for path in C_TESTS.glob("test_*.c"))


@pytest.fixture(scope="module")
def programs():
    if shutil.which("gcc") is None:
        pytest.skip("the C tests are built with gcc, which this machine lacks")
    return {program.stem: program for program in build.build("debug")}


def test_there_are_c_tests():
    assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_program_passes(programs, name):
    passed, failed, output = build.run(programs[name], "debug")
    assert failed == 0 and passed > 0, output
