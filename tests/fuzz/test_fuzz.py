"""Random call sequences on every kind and engine against the plain NumPy model.

Each runs in a process of its own, since the engine is chosen once a process, and so that a crash is
a failed test. KVSTORE_FUZZ_SECONDS (as given by `tests/run.py fuzz --seconds`) is the time for all
of them together; without it the sequences are few and the same at every run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ["local", "device"]
ENGINES = [("threaded", "1"), ("naive", "1"), ("stepping", "1"), ("stepping", "2")]
SECONDS = float(os.environ.get("KVSTORE_FUZZ_SECONDS", "0"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("engine", "seed"), ENGINES)
def test_random_calls_do_what_the_model_does(kind, engine, seed):
    share = [str(SECONDS / len(KINDS) / len(ENGINES))] if SECONDS > 0 else []
    machine = Path(__file__).with_name("machine.py")
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(machine), kind, *share],
        env={**os.environ, "KVSTORE_ENGINE": engine, "KVSTORE_ENGINE_SEED": seed},
        capture_output=True,
        text=True,
        timeout=SECONDS + 600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
