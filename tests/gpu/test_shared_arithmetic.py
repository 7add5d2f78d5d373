"""The headers that the CUDA sources share with the core compile alone, in every language."""

import re
import shutil
import subprocess

import pytest

import plugin

INCLUDE = re.compile(r'^#include "((?!cuda/)[^"]+)"', re.MULTILINE)
SHARED = sorted(
    {
        name
        for path in plugin.CUDA.iterdir()
        for name in INCLUDE.findall(path.read_text())
        if path.suffix in (".cu", ".h")
    }
)
WARNINGS = "-Wall -Wextra -Werror -fsyntax-only -ffp-contract=off -Isrc".split()
LANGUAGES = {
    "C17": ["gcc", "-x", "c", "-std=c17", *WARNINGS],
    "C++17": ["g++", "-x", "c++", "-std=c++17", *WARNINGS],
    "CUDA": ["nvcc", "-x", "cu", "-std=c++17", "-fmad=false", "-Isrc", "--ptx", "-o", "/dev/null"],
}


def test_the_arithmetic_is_shared():
    assert {"kernels/step.h", "kernels/codec.h", "kernels/device.h"} <= set(SHARED)


@pytest.mark.parametrize("language", LANGUAGES)
def test_shared_headers_compile_alone(tmp_path, language):
    command = LANGUAGES[language]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    # nvcc starts slowly: all headers in one go, each of them twice.
    names = [SHARED * 2] if language == "CUDA" else [[name, name] for name in SHARED]
    for each in names:
        source = tmp_path / "alone.txt"
        source.write_text("".join(f'#include "{name}"\n' for name in each))
        done = subprocess.run(
            [*command, str(source)], cwd=plugin.ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
