"""Builds kvstore._core, the C core with its binding; everything else stands in pyproject.toml.

KVSTORE_BUILD chooses a flavour, each built in its own directory build/<flavour>:
release (the default), debug (assertions and the order of locks checked), asan, tsan.

KVSTORE_UCX says whose headers of UCX, the transport between processes, are used: package (the
default; libucx-cu12, where it is installed), system, or off. Its library is found at run time.

KVSTORE_CUDA (auto, on, off) and KVSTORE_CUDA_ARCH say whether the CUDA plug-in is built beside the
core, and for which devices: src/cuda/make.py.
"""

import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDERS = (
    *("base", "net", "engine", "array", "kernels", "compress", "optim", "comm", "ps", "store"),
    "py",
)

# The arithmetic must not depend on the compiler: no dialect that fuses multiply and add, nothing
# that -ffast-math brings. The flavours' flags come last and so replace the interpreter's own.
COMMON = [
    *("-std=c17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=hidden", "-pthread", "-D_GNU_SOURCE", "-Isrc"),
]
if sys.platform == "linux":
    # Calls of Python's functions go through a pointer, not through a stub: 3 % of a small push.
    COMMON.append("-fno-plt")

CHECKED = ["-DKV_DEBUG", "-UNDEBUG", "-g", "-O1", "-fno-omit-frame-pointer"]
FLAVOURS = {
    "release": (["-O3"], []),
    "debug": (CHECKED, []),
    "asan": (
        [*CHECKED, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        ["-fsanitize=address,undefined"],
    ),
    "tsan": ([*CHECKED, "-fsanitize=thread"], ["-fsanitize=thread"]),
}

flavour = os.environ.get("KVSTORE_BUILD", "release")
if flavour not in FLAVOURS:
    raise SystemExit(f"KVSTORE_BUILD={flavour!r}: choose one of {', '.join(FLAVOURS)}")
compile_flags, link_flags = FLAVOURS[flavour]
cuda = SimpleNamespace(**runpy.run_path("src/cuda/make.py"))


def system_folders():
    """Where the system may keep the headers of its libraries."""
    command = ["pkg-config", "--cflags-only-I", "ucx"]
    if shutil.which(command[0]):
        done = subprocess.run(command, capture_output=True, text=True)
        yield from (flag.removeprefix("-I") for flag in done.stdout.split())
    yield from ("/usr/include", "/usr/local/include")


def package_folders():
    found = find_spec("libucx")
    if found is not None and found.origin is not None:
        yield os.path.join(os.path.dirname(found.origin), "include")


def ucx_flags():
    """How to compile with UCX, nothing where its headers are not. A sanitizer's build is without:
    UCX is not instrumented and patches functions of the C library that the sanitizer has replaced.
    """
    wanted = os.environ.get("KVSTORE_UCX") or "package"
    choices = {"package": package_folders, "system": system_folders, "off": tuple}
    if wanted not in choices:
        raise SystemExit(f"KVSTORE_UCX={wanted!r}: choose one of {', '.join(choices)}")
    if wanted == "off" or sys.platform != "linux" or flavour in ("asan", "tsan"):
        return []
    for folder in choices[wanted]():
        if Path(folder, "ucp/api/ucp.h").exists():
            # What the compiler searches anyway must keep its place in the order.
            place = [] if folder == "/usr/include" else ["-isystem", folder]
            return ["-DKV_WITH_UCX", *place]
    if wanted == "system":
        raise SystemExit("KVSTORE_UCX=system: the headers of UCX are not here (Debian: libucx-dev)")
    print("without UCX, the transport between processes: libucx-cu12 is not installed here")
    return []


class Build(build_ext):
    """Builds the CUDA plug-in and the core, whose sources it compiles side by side: setuptools
    does one after the other."""

    def run(self):
        package = Path(self.build_lib, "kvstore")
        try:
            print(cuda.make(os.environ, package, Path(self.build_temp, "cuda")))
        except cuda.Refused as error:
            raise SystemExit(str(error)) from None
        super().run()
        for name in (cuda.PLUGIN, cuda.DECISION) if self.inplace else ():
            Path("kvstore", name).unlink(missing_ok=True)
            if (package / name).exists():
                shutil.copy(package / name, "kvstore")

    def get_source_files(self):
        return [*super().get_source_files(), *cuda.files()]

    def build_extensions(self):
        compile_some = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = [pool.submit(compile_some, [source], **options) for source in sources]
                return [name for job in jobs for name in job.result()]

        self.compiler.compile = compile_all
        super().build_extensions()


# dlopen is in the C library itself since glibc 2.34; before it has a library of its own.
dlopen_library = ["-ldl"] if sys.platform == "linux" else []

core = Extension(
    "kvstore._core",
    sources=sorted(path for folder in FOLDERS for path in glob(f"src/{folder}/*.c")),
    depends=sorted(glob("src/**/*.h", recursive=True) + glob("src/**/*.inc", recursive=True)),
    include_dirs=[numpy.get_include()],
    extra_compile_args=[*COMMON, *ucx_flags(), *compile_flags, f'-DKV_FLAVOUR="{flavour}"'],
    extra_link_args=["-pthread", "-lm", *dlopen_library, *link_flags],
)

setup(
    ext_modules=[core],
    cmdclass={"build_ext": Build},
    options={"build": {"build_base": f"build/{flavour}"}},
)
