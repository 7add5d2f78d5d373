"""Stores over CUDA memory, on the emulation: the tests of stores/, in processes of their own."""

import os
import shutil
import subprocess
import sys

import pytest

import plugin

STORES = plugin.HERE / "stores"
FILES = sorted(path.name for path in STORES.glob("check_*.py"))

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the emulation is built with g++, which is missing here"
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return plugin.link(plugin.objects().values(), tmp_path_factory.mktemp("gpu") / "emulated.so")


def run(emulated, *arguments, path=(), **env):
    """pytest's status and output."""
    env = {**os.environ, "KVSTORE_CUDA_PLUGIN": str(emulated), **env}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (*path, env.get("PYTHONPATH"))))
    options = ("-c", plugin.ROOT / "pyproject.toml", "--rootdir", plugin.ROOT, "-q")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", *arguments],
        env=env,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=300,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", FILES)
def test_file_passes_on_the_emulation(emulated, name):
    status, output = run(emulated, STORES / name)
    assert status == 0, output
