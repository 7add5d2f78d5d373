"""What the built core shows to the linker."""

import re
import shutil
import subprocess

import pytest

from kvstore import _core

# libdl is where older C libraries have dlopen.
LIBRARIES = (
    "libc",
    "libm",
    "libpthread",
    "libdl",
    "ld-linux",
    "ld-linux-x86-64",
    "ld-linux-aarch64",
)


def readelf(option):
    with open(_core.__file__, "rb") as file:
        if file.read(4) != b"\x7fELF":
            pytest.skip("the core is no ELF file: readelf cannot look into it")
    assert shutil.which("readelf"), "readelf is part of binutils, as the compiler's linker is"
    command = ["readelf", "--wide", option, _core.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_only_exported_symbol_is_the_modules_entry():
    rows = [line.split() for line in readelf("--dyn-syms").splitlines()]
    exported = {
        row[7] for row in rows if len(row) == 8 and row[4] in ("GLOBAL", "WEAK") and row[6] != "UND"
    }
    assert exported == {"PyInit__core"}


def test_the_core_links_the_c_library_only():
    if _core.build_info()["flavour"] in ("asan", "tsan"):
        pytest.skip("a sanitizer's build links the sanitizer")
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", readelf("--dynamic"))
    assert needed
    assert not [name for name in needed if name.split(".so")[0] not in LIBRARIES]
