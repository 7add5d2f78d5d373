"""The CUDA sources as a plug-in that runs on the CPU: compiled as C++ over the emulation (emu/)."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INCLUDES = [f"-I{ROOT / 'src'}", f"-I{HERE}", f"-I{HERE / 'emu'}"]
NUMBERS = ["-ffp-contract=off", "-O1", "-g"]


def compiled(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def plugin(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the emulation is C++")
    folder = tmp_path_factory.mktemp("gpu")
    sources = [*sorted(ROOT.glob("src/cuda/*.cu")), *sorted(HERE.glob("emu/*.cpp"))]
    objects = [folder / f"{source.name}.o" for source in sources]
    flags = ["-x", "c++", "-std=c++17", "-DKV_CUDA_EMU", "-fPIC", *NUMBERS, *INCLUDES]
    with ThreadPoolExecutor() as pool:
        jobs = zip(sources, objects, strict=True)
        list(pool.map(lambda job: compiled(["g++", *flags, "-c", job[0], "-o", job[1]]), jobs))
    compiled(["g++", "-shared", "-pthread", "-o", folder / "emulated.so", *objects])
    return folder / "emulated.so"


@pytest.fixture(scope="session")
def build_c():
    """Compiles a C program against the headers of plug-in and emulation."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: it builds C programs of the tests")

    def build(source, program, *options):
        flags = ["-std=c17", "-D_GNU_SOURCE", "-Wall", "-Wextra", *NUMBERS, *INCLUDES]
        compiled(["gcc", *flags, source, "-o", program, *options])
        return program

    return build
