"""How the plug-in is found and opened, and what is told of it. Each case in a process of its own:
what the first look finds holds for the rest of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import plugin
from kvstore import _core

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INCLUDES = [f"-I{ROOT / 'src'}", f"-I{HERE}", f"-I{HERE / 'emu'}"]
CUDA_INTERFACE = """
import kvstore, numpy
from kvstore import _core

class Cuda:
    def __init__(self):
        self.__cuda_array_interface__ = {
            "shape": (3,), "typestr": "<f4", "data": (4096, False), "version": 3,
        }

def caught(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"
"""


def python(code, plugin=None, *, script=True):
    environ = {name: text for name, text in os.environ.items() if name != "KVSTORE_CUDA_PLUGIN"}
    if plugin is not None:
        environ["KVSTORE_CUDA_PLUGIN"] = str(plugin)
    command = [sys.executable, *(("-c", CUDA_INTERFACE + code) if script else code)]
    done = subprocess.run(
        command, env=environ, cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def report(plugin=None):
    lines = python(["-m", "kvstore"], plugin, script=False).split("\n\n")[0].splitlines()
    starts = ("  CUDA ", "  NCCL ")
    first, end = (i for i, line in enumerate(lines) if line.startswith(starts))
    return "\n".join(line.strip() for line in lines[first:end])


def compiled(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA sources as a plug-in that runs on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the emulation is C++")
    return plugin.link(plugin.objects().values(), tmp_path_factory.mktemp("gpu") / "emulated.so")


@pytest.fixture(scope="module")
def build_c():
    """Compiles a C program against the headers of plug-in and emulation."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: it builds C programs of the tests")

    def build(source, program, *options):
        flags = ["-std=c17", "-D_GNU_SOURCE", "-Wall", "-Wextra", *INCLUDES]
        compiled(["gcc", *flags, source, "-o", program, *options])
        return program

    return build


@pytest.fixture(scope="module")
def small(build_c, tmp_path_factory):
    """Makes the small plug-in, as the macros say."""
    folder = tmp_path_factory.mktemp("small")

    def make(name="small", *macros):
        options = [f"-D{macro}" for macro in macros]
        return build_c(HERE / "small_plugin.c", folder / f"{name}.so", "-shared", "-fPIC", *options)

    return make


# ---------------------------------------------------------------------------------- found, opened


def test_the_report_names_plugin_driver_and_devices(small):
    plugin = small()
    assert report(plugin).splitlines() == [
        f"CUDA        {plugin}",
        "driver for CUDA 13.0, plug-in built with 12.4",
        "device 0    Small, 2.5 GiB, compute capability 8.6",
        "device 1    not usable: device 1 is lost",
    ]


def test_the_emulated_plugin_is_opened_and_tells_of_its_devices(emulated):
    out = python("print(_core.cuda_plugin(), _core.cuda_device(1)['bytes'])", emulated)
    assert out == f"({str(emulated)!r}, 2) {64 << 20}\n"
    assert "device 1    " in report(emulated)


def test_the_plugin_beside_the_core_is_the_one(small, tmp_path):
    package = tmp_path / "kvstore"
    shutil.copytree(Path(_core.__file__).parent, package, ignore=shutil.ignore_patterns("*.pyc"))
    for left in (*package.glob("libkvstore_cuda.so"), *package.glob("_cuda.txt")):
        left.unlink()
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r});"
        "runpy.run_module('kvstore', run_name='__main__')"
    )
    run = [sys.executable, "-c", code]
    environ = {
        k: v for k, v in os.environ.items() if k not in ("KVSTORE_CUDA_PLUGIN", "PYTHONPATH")
    }

    def told():
        return subprocess.run(run, env=environ, cwd="/", capture_output=True, text=True).stdout

    (package / "_cuda.txt").write_text("without CUDA: there is no nvcc here\n")
    before = told()
    assert f"this installation has no CUDA plug-in ({package}/libkvstore_cuda.so is not" in before
    assert "the installation said: without CUDA: there is no nvcc here" in before
    shutil.copy(small(), package / "libkvstore_cuda.so")
    assert f"  CUDA        {package}/libkvstore_cuda.so\n" in told()


# ---------------------------------------------------------------------------------------- errors


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in (str(tmp_path / "none.so"), ""):
        out = python("print(caught(_core.cuda_plugin))", name)
        assert out.startswith(f"NotBuiltError: KVSTORE_CUDA_PLUGIN='{name}' is not there")


def test_a_file_that_is_no_library_is_named(tmp_path):
    (tmp_path / "text.so").write_text("no library\n" * 100)
    out = python("print(caught(_core.cuda_plugin))", tmp_path / "text.so")
    assert out.startswith("NotBuiltError: the CUDA plug-in does not load (")
    assert str(tmp_path / "text.so") in out and "KVSTORE_CUDA=on" in out


def test_a_library_that_is_no_plugin_is_named(tmp_path, build_c):
    (tmp_path / "other.c").write_text("int other;\n")
    other = build_c(tmp_path / "other.c", tmp_path / "other.so", "-shared", "-fPIC")
    out = python("print(caught(_core.cuda_plugin))", other)
    assert out == f"NotBuiltError: {other} is no plug-in for kvstore: it has no kv_device_open\n"


def test_another_version_says_to_install_again(small):
    out = python("print(caught(_core.cuda_plugin))", small("version", "VERSION=9"))
    assert "NotBuiltError: the CUDA plug-in" in out
    assert "interface 9, not " in out and "install kvstore again" in out


def test_a_plugin_without_a_table_is_refused(small):
    out = python("print(caught(_core.cuda_plugin))", small("empty", "EMPTY"))
    assert "NotBuiltError" in out and "gave no table of version " in out


def test_a_machine_without_a_device_is_a_device_error(small):
    plugin = small("none", "DEVICES=0")
    out = python("print(caught(_core.cuda_plugin))", plugin)
    assert out == "DeviceError: there is no CUDA device here\n"
    assert report(plugin).startswith("CUDA        no: there is no CUDA device here")


@pytest.mark.parametrize("number", [2, -1, 2**40])
def test_a_device_that_is_not_there_is_a_device_error(small, number):
    assert "DeviceError: there is no device" in python(
        f"print(caught(_core.cuda_device, {number}))", small()
    )


# ------------------------------------------------------------------------- once, threads, forks


@pytest.mark.parametrize("macro", ["DEVICES=2", "DEVICES=0"])
def test_many_threads_open_it_once_and_are_told_the_same(small, macro):
    code = """
import threading
at_once, answers = threading.Barrier(8), []
def look():
    at_once.wait()
    answers.append(caught(_core.cuda_plugin))
threads = [threading.Thread(target=look) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
answers.append(caught(_core.cuda_plugin))
print(len(answers), set(answers))
"""
    out = python(code, small(f"tell{macro[-1]}", "TELL=1", macro)).splitlines()
    assert out[0] == "opened" and out[1].startswith("9 {'") and len(out) == 2
    assert ("DeviceError" in out[1]) == (macro == "DEVICES=0")


FORK = """
import os, sys
def in_child():
    sys.stdout.flush()
    if os.fork() == 0:
        print(caught(_core.cuda_plugin), caught(_core.cuda_device, 0), sep="\\n", flush=True)
        os._exit(0)
    os.wait()
"""


def test_a_child_forked_after_it_was_opened_says_to_spawn(small):
    out = python(FORK + "_core.cuda_plugin(); in_child()", small()).splitlines()
    sentence = "DeviceError: CUDA does not work in a process forked from one that has used it"
    assert len(out) == 2 and all(line.startswith(sentence) for line in out)
    assert "spawn" in out[0]


def test_a_child_forked_before_opens_it_for_itself(small):
    out = python(FORK + "in_child(); print(caught(_core.cuda_plugin))", small())
    assert out == "nothing raised\n" * 3


def test_a_child_is_told_what_its_parent_found_missing(tmp_path):
    out = python(FORK + "caught(_core.cuda_plugin); in_child()", tmp_path / "none.so").splitlines()
    assert len(out) == 2 and all("NotBuiltError: KVSTORE_CUDA_PLUGIN=" in line for line in out)


# ------------------------------------------------------------------------------ arrays of a device

CALLS = """
with kvstore.create("local") as kv:
    kv.init("w", numpy.zeros(3, "float32"))
    for error in (
        caught(kv.push, "w", Cuda()),
        caught(kv.push, "w", [numpy.zeros(3, "float32"), Cuda()]),
        caught(kv.pull, "w", out=Cuda()),
        caught(kv.pushpull, "w", numpy.zeros(3, "float32"), out=Cuda()),
        caught(kv.init, "new", Cuda()),
        caught(kv.broadcast, "new", Cuda(), out=numpy.zeros(3, "float32")),
    ):
        print(error)
    print(kv.pull("w").asnumpy().tolist(), kv.keys())
"""


@pytest.mark.parametrize("there", [True, False])
def test_cuda_arrays_are_refused_by_key_and_nothing_changes(emulated, tmp_path, there):
    *errors, last = python(CALLS, emulated if there else tmp_path / "none.so").splitlines()
    whose = ["value of key 'w'", "value 1 of key 'w'", *["out of key 'w'"] * 2]
    whose += ["value of key 'new'"] * 2
    assert len(errors) == len(whose)
    for error, who in zip(errors, whose, strict=True):
        if there:
            assert error.startswith("ArrayTypeError: ") and who[who.index("key") :] in error
            assert error.endswith("tells of memory at 0x1000, which is on no CUDA device")
        else:
            assert error.startswith("NotBuiltError: ") and who in error
            assert "is in CUDA memory, which cannot be used here: " in error
            assert error.endswith("name the file of a plug-in, or auto")
    assert last == "[0.0, 0.0, 0.0] ['w']"


def test_a_cuda_array_where_no_driver_is_is_a_device_error(small):
    code = "kv = kvstore.create(); print(caught(kv.init, 'w', Cuda())); kv.close()"
    out = python(code, small("none", "DEVICES=0"))
    assert out.startswith("DeviceError: the value of key 'w' is in CUDA memory, which cannot be")
    assert "there is no CUDA device here" in out
