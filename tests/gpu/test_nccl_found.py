"""Which NCCL is found and opened, and what is told of it. Each case in a process of its own: what
was opened stays."""

import ctypes.util
import os
import shutil
import subprocess
import sys

import pytest

CALLS = (
    "GetUniqueId CommInitRankConfig CommFinalize CommDestroy CommAbort CommGetAsyncError "
    "GroupStart GroupEnd AllReduce Broadcast GetErrorString GetLastError"
).split()
CODE = """
from kvstore import _core
from kvstore._about import nccl_folder
try:
    print(*_core.nccl_library(nccl_folder()))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def python(*command, path="", named=None):
    environ = {name: text for name, text in os.environ.items() if name != "KVSTORE_NCCL"}
    if named is not None:
        environ["KVSTORE_NCCL"] = str(named)
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), *sys.path]))
    done = subprocess.run(
        [sys.executable, *command], env=environ, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Makes a library of this version with NCCL's calls, which do nothing."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: it builds a stand-in for NCCL")
    folder = tmp_path_factory.mktemp("nccl")

    def make(name, version, calls=CALLS):
        target = folder / name / "nvidia/nccl/lib/libnccl.so.2"
        target.parent.mkdir(parents=True)
        text = [f"int ncclGetVersion(int *v) {{ *v = {version}; return 0; }}"]
        text += [f"int nccl{call}(void) {{ return 0; }}" for call in calls]
        command = "gcc -shared -fPIC -Wl,-soname,libnccl.so.2 -x c - -o".split()
        subprocess.run([*command, target], input="\n".join(text), text=True, check=True)
        return target

    return make


def test_the_package_is_found_where_modules_are(library):
    file = library("package", 22907)
    place = file.parents[3]
    assert python("-c", CODE, path=place) == f"{file} 22907\n"
    told = [line for line in python("-m", "kvstore", path=place).splitlines() if " NCCL " in line]
    assert told == [f"  NCCL        {file}, 2.29.7"]


def test_a_setting_comes_before_the_package(library):
    package, other = library("behind", 22907), library("named", 21805)
    assert python("-c", CODE, path=package.parents[3], named=other) == f"{other} 21805\n"


def test_a_copy_of_the_process_comes_before_the_package(library):
    package, other = library("second", 22907), library("first", 22304)
    code = f"import ctypes; ctypes.CDLL({str(other)!r})\n{CODE}"
    assert python("-c", code, path=package.parents[3]) == f"{other} 22304\n"


def test_what_cannot_be_used_is_named(library, tmp_path):
    old = library("old", 21706)
    assert python("-c", CODE, named=old) == (
        f"NotBuiltError: {old} is NCCL of version 21706, older than 2.18: pip install "
        "nvidia-nccl-cu12 (nvidia-nccl-cu13 for CUDA 13), or name the file of an NCCL of 2.18 or "
        "newer in KVSTORE_NCCL\n"
    )
    other = library("other", 22907, CALLS[:-2])
    assert f"{other} is no NCCL that can be used, it lacks nccl" in python("-c", CODE, named=other)
    for name in (tmp_path / "none.so", ""):
        assert python("-c", CODE, named=name).startswith(
            f"NotBuiltError: KVSTORE_NCCL='{name}' does not load ("
        )


@pytest.mark.skipif(
    ctypes.util.find_library("nccl") is not None, reason="the system of this machine has NCCL"
)
def test_without_any_it_says_what_to_install(tmp_path):
    (tmp_path / "nvidia/nccl").mkdir(parents=True)
    code = f"import kvstore._about; kvstore._about.nccl_folder = lambda: None\n{CODE}"
    told = python("-c", code, path=tmp_path)
    assert told.startswith("NotBuiltError: NCCL is not on this machine (")
    assert "pip install nvidia-nccl-cu12 (nvidia-nccl-cu13 for CUDA 13)" in told
