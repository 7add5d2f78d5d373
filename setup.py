"""Builds kvstore._core, the C core with its binding; everything else stands in pyproject.toml.

KVSTORE_BUILD chooses a flavour, each built in its own directory build/<flavour>:
release (the default), debug (assertions and the order of locks checked), asan, tsan.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDERS = ("base", "net", "engine", "array", "kernels", "compress", "optim", "comm", "store", "py")

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


class BuildInParallel(build_ext):
    """Compiles the sources of an extension side by side; setuptools does one after the other."""

    def build_extensions(self):
        compile_some = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = [pool.submit(compile_some, [source], **options) for source in sources]
                return [name for job in jobs for name in job.result()]

        self.compiler.compile = compile_all
        super().build_extensions()


core = Extension(
    "kvstore._core",
    sources=sorted(path for folder in FOLDERS for path in glob(f"src/{folder}/*.c")),
    depends=sorted(glob("src/**/*.h", recursive=True) + glob("src/**/*.inc", recursive=True)),
    include_dirs=[numpy.get_include()],
    extra_compile_args=[*COMMON, *compile_flags, f'-DKV_FLAVOUR="{flavour}"'],
    extra_link_args=["-pthread", "-lm", *link_flags],
)

setup(
    ext_modules=[core],
    cmdclass={"build_ext": BuildInParallel},
    options={"build": {"build_base": f"build/{flavour}"}},
)
