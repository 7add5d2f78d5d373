"""The CUDA sources, compiled as C++ over the emulation (emu/), give the numbers of the CPU."""

import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_sums_and_squares_are_right_whatever_runs_first(plugin, build_c):
    program = build_c(HERE / "kernels_run.c", plugin.with_name("kernels_run"), "-ldl")
    done = subprocess.run([program, plugin], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
