"""The CUDA sources, compiled as C++ over the emulation (emu/), give the numbers of the CPU."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INCLUDES = [f"-I{ROOT / 'src'}", f"-I{HERE}", f"-I{HERE / 'emu'}"]
NUMBERS = ["-ffp-contract=off", "-O1", "-g"]

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed: the emulation is C++"
)


def compiled(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    sources = [*sorted(ROOT.glob("src/cuda/*.cu")), *sorted(HERE.glob("emu/*.cpp"))]
    objects = [folder / f"{source.name}.o" for source in sources]
    flags = ["-x", "c++", "-std=c++17", "-DKV_CUDA_EMU", "-fPIC", *NUMBERS, *INCLUDES]
    with ThreadPoolExecutor() as pool:
        jobs = zip(sources, objects, strict=True)
        list(pool.map(lambda job: compiled(["g++", *flags, "-c", job[0], "-o", job[1]]), jobs))
    compiled(["g++", "-shared", "-pthread", "-o", folder / "emulated.so", *objects])
    return folder / "emulated.so"


def test_sums_and_squares_are_right_whatever_runs_first(plugin):
    program = plugin.with_name("kernels_run")
    flags = ["-std=c17", "-D_GNU_SOURCE", "-Wall", "-Wextra", *NUMBERS, *INCLUDES]
    compiled(["gcc", *flags, HERE / "kernels_run.c", "-o", program, "-ldl"])
    done = subprocess.run([program, plugin], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
