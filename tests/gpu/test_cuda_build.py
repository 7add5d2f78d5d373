"""Whether the CUDA plug-in is built, and for which devices, with an nvcc that only writes down what
it was asked for."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKE = ROOT / "src/cuda/make.py"

cuda = SimpleNamespace(**runpy.run_path(str(MAKE)))

NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then
    printf 'compute_%s\\n' $FAKE_ARCHS
    exit 0
fi
echo "$@" >>"$FAKE_LOG"
if [ -n "$FAKE_FAILS" ]; then
    echo 'gpu.h(1): error: no such thing' >&2
    exit 2
fi
for out in "$@"; do :; done # the last argument of each call
echo plug-in >"$out"
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """An environment whose only nvcc is the stand-in."""
    monkeypatch.setitem(cuda.make.__globals__, "USUAL_NVCC", str(tmp_path / "nowhere"))
    programs = tmp_path / "toolkit/bin"
    programs.mkdir(parents=True)
    (programs / "nvcc").write_text(NVCC)
    (programs / "nvcc").chmod(0o755)
    monkeypatch.setenv("FAKE_ARCHS", "50 60 75 80 86 89 90 100 103 120")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.delenv("FAKE_FAILS", raising=False)
    return {"PATH": f"{programs}:/bin:/usr/bin"}


def make(tmp_path, environ, devices=None):
    present = devices if callable(devices) else lambda: devices
    return cuda.make(environ, tmp_path / "kvstore", tmp_path / "objects", present)


def asked(tmp_path):
    return (tmp_path / "log").read_text()


def no_driver():
    raise cuda.Missing("there is no CUDA driver here (libcuda.so.1)")


def is_built(tmp_path, line):
    assert (tmp_path / "kvstore/_cuda.txt").read_text() == line + "\n"
    assert "\n" not in line
    return (tmp_path / "kvstore/libkvstore_cuda.so").exists()


def test_auto_builds_for_the_devices_that_are_there(tmp_path, toolkit):
    line = make(tmp_path, toolkit, [86, 90])
    assert is_built(tmp_path, line)
    assert line.startswith("with CUDA, for devices of 86, 90 and newer (")
    log = asked(tmp_path)
    assert log.count(" -c ") == len(list(ROOT.glob("src/cuda/*.cu")))
    for part in ("compute_86,code=sm_86", "compute_90,code=sm_90", "compute_90,code=compute_90"):
        assert log.count(part) == log.count("\n"), "every call names every target"
    assert "compute_86,code=compute_86" not in log
    assert "-fmad=false" in log and "fast" not in log


def test_a_device_newer_than_nvcc_gets_code_that_its_driver_compiles(tmp_path, toolkit):
    assert is_built(tmp_path, make(tmp_path, toolkit, [80, 130]))
    assert "code=sm_130" not in asked(tmp_path)
    assert "arch=compute_120,code=compute_120" in asked(tmp_path)


def test_auto_leaves_devices_before_turing_alone(tmp_path, toolkit):
    line = make(tmp_path, toolkit, [61])
    assert not is_built(tmp_path, line)
    assert line.startswith("without CUDA: neither ") and "Turing (75)" in line


@pytest.mark.parametrize("setting", [{}, {"KVSTORE_CUDA": ""}, {"KVSTORE_CUDA": "auto"}])
def test_auto_without_a_driver_says_so(tmp_path, toolkit, setting):
    line = make(tmp_path, {**toolkit, **setting}, no_driver)
    assert not is_built(tmp_path, line)
    assert line == "without CUDA: there is no CUDA driver here (libcuda.so.1)"


def test_auto_survives_an_nvcc_that_fails(tmp_path, toolkit, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_FAILS", "1")
    line = make(tmp_path, toolkit, [80])
    assert not is_built(tmp_path, line)
    assert line.endswith("nvcc failed: gpu.h(1): error: no such thing")
    assert "gpu.h(1): error" in capfd.readouterr().err


def test_auto_survives_an_nvcc_that_is_no_program(tmp_path, toolkit):
    nvcc = tmp_path / "toolkit/bin/nvcc"
    nvcc.write_text("#!/no/such/interpreter\n")
    line = make(tmp_path, toolkit, [80])
    assert not is_built(tmp_path, line)
    assert line.startswith("without CUDA: ")


def test_on_needs_no_device_and_builds_for_each_generation(tmp_path, toolkit):
    line = make(tmp_path, {**toolkit, "KVSTORE_CUDA": "on"}, no_driver)
    assert is_built(tmp_path, line)
    assert line.startswith("with CUDA, for devices of 75, 80, 90, 100, 120 and newer")


@pytest.mark.parametrize("fails", [{}, {"FAKE_FAILS": "1"}])
def test_on_without_a_working_nvcc_is_an_error(tmp_path, toolkit, monkeypatch, fails):
    environ = {"KVSTORE_CUDA": "on", "PATH": str(tmp_path)}
    if fails:
        monkeypatch.setenv("FAKE_FAILS", "1")
        environ["PATH"] = toolkit["PATH"]
    with pytest.raises(cuda.Refused, match=r"^KVSTORE_CUDA=on: .*nvcc"):
        make(tmp_path, environ)


def test_off_builds_nothing_and_takes_away_what_was_there(tmp_path, toolkit):
    assert is_built(tmp_path, make(tmp_path, toolkit, [90]))
    line = make(tmp_path, {**toolkit, "KVSTORE_CUDA": "off"}, [90])
    assert not is_built(tmp_path, line)
    assert line == "without CUDA: KVSTORE_CUDA=off"


@pytest.mark.parametrize(
    ("text", "archs"), [("90", "90"), ("90, 80", "80, 90"), ("80;86", "80, 86")]
)
def test_arch_names_the_devices(tmp_path, toolkit, text, archs):
    environ = {**toolkit, "KVSTORE_CUDA": "on", "KVSTORE_CUDA_ARCH": text}
    assert make(tmp_path, environ).startswith(f"with CUDA, for devices of {archs} and newer")


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
@pytest.mark.parametrize("text", ["9.0", "sm_90", "ninety", "90,,x", "1", "-90", "0900"])
def test_an_arch_that_is_none_is_an_error(tmp_path, toolkit, choice, text):
    environ = {**toolkit, "KVSTORE_CUDA": choice, "KVSTORE_CUDA_ARCH": text}
    with pytest.raises(cuda.Refused, match=r"KVSTORE_CUDA_ARCH=.*as in 80,90"):
        make(tmp_path, environ, [80])


@pytest.mark.parametrize("arch", ["60", "85", "130"])
def test_an_arch_that_cannot_be_built_for_is_an_error(tmp_path, toolkit, arch):
    environ = {**toolkit, "KVSTORE_CUDA_ARCH": arch}
    with pytest.raises(cuda.Refused, match=f"compiles for 75, 80, .*, not for {arch}"):
        make(tmp_path, environ, [80])


@pytest.mark.parametrize("text", ["yes", "ON", "1"])
def test_a_choice_that_is_none_is_an_error(tmp_path, toolkit, text):
    with pytest.raises(cuda.Refused, match=f"KVSTORE_CUDA='{text}': choose one of auto, on, off"):
        make(tmp_path, {**toolkit, "KVSTORE_CUDA": text}, [80])


def test_nothing_is_compiled_twice(tmp_path, toolkit):
    make(tmp_path, toolkit, [90])
    calls = asked(tmp_path).count("\n")
    assert is_built(tmp_path, make(tmp_path, toolkit, [90]))
    assert asked(tmp_path).count("\n") == calls
    make(tmp_path, toolkit, [80])
    assert asked(tmp_path).count("\n") == 2 * calls


def test_cuda_home_comes_before_the_path(tmp_path, toolkit):
    other = tmp_path / "other/bin"
    other.mkdir(parents=True)
    shutil.copy(tmp_path / "toolkit/bin/nvcc", other)
    assert cuda.find_nvcc({**toolkit, "CUDA_HOME": str(other.parent)}) == str(other / "nvcc")
    assert cuda.find_nvcc({**toolkit, "CUDA_HOME": "/nowhere"}).startswith(
        str(tmp_path / "toolkit")
    )


def test_a_person_runs_it_by_hand(tmp_path):
    environ = {**os.environ, "KVSTORE_CUDA": "off"}
    command = [sys.executable, MAKE, tmp_path]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "without CUDA: KVSTORE_CUDA=off\n"), done.stderr
    environ["KVSTORE_CUDA"] = "perhaps"
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "KVSTORE_CUDA='perhaps': choose one of auto, on, off\n"


# ---------------------------------------------------------------------------------- the driver

DRIVER = """
int cuInit(unsigned flags) { return flags != 0 ? 1 : INIT; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGetAttribute(int *out, int attribute, int device)
{
    *out = attribute == 75 ? 8 + device : 6 * (device == 0);
    return attribute == 75 || attribute == 76 ? 0 : 1;
}
"""


def driver(tmp_path, **defines):
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: the stand-in for the driver is C")
    library = tmp_path / "libcuda_stand_in.so"
    flags = [f"-D{name}={value}" for name, value in defines.items()]
    command = ["gcc", "-shared", "-fPIC", *flags, "-x", "c", "-", "-o", library]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    return str(library)


def test_the_driver_tells_of_its_devices(tmp_path):
    assert cuda.device_archs(driver(tmp_path, INIT=0, COUNT=3)) == [86, 90, 100]


@pytest.mark.parametrize(("init", "count"), [(100, 0), (0, 0)])
def test_a_driver_without_devices_is_no_driver_to_build_for(tmp_path, init, count):
    with pytest.raises(cuda.Missing, match=rf"finds no device here \(CUresult {init}\)"):
        cuda.device_archs(driver(tmp_path, INIT=init, COUNT=count))


def test_a_driver_that_is_not_there_is_named():
    with pytest.raises(cuda.Missing, match=r"no CUDA driver here \(libnot_there\.so\)"):
        cuda.device_archs("libnot_there.so")
