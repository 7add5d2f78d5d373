"""Messages of any bytes: read without a step outside, and written again the same.

Needs clang with libFuzzer. KVSTORE_FUZZ_SECONDS is the time; without it the runs are few.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = int(float(os.environ.get("KVSTORE_FUZZ_SECONDS", "0")))
FLAGS = (
    "-std=c17 -D_GNU_SOURCE -Isrc -g -O1 -fsanitize=fuzzer,address,undefined "
    "-fno-sanitize-recover=all -pthread"
).split()


@pytest.mark.skipif(
    shutil.which("clang") is None, reason="clang, which brings libFuzzer, is not installed"
)
def test_any_bytes_are_read_as_a_message_or_refused(tmp_path):
    program = tmp_path / "fuzz_wire"
    sources = ["tests/fuzz/fuzz_wire.c", "src/ps/wire.c", *sorted((ROOT / "src/base").glob("*.c"))]
    sources += [f"src/{name}.c" for name in ("array/dtype", "compress/codec", "optim/step")]
    subprocess.run(["clang", *FLAGS, *map(str, sources), "-o", str(program)], cwd=ROOT, check=True)
    length = f"-max_total_time={SECONDS}" if SECONDS > 0 else "-runs=50000"
    done = subprocess.run(
        [program, length, "-seed=1", "-max_len=4096", "-timeout=10"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS + 600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done" in done.stderr
