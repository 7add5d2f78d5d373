"""Builds the CUDA sources as a plug-in for the emulation (emu/), and the programs that test it."""

import runpy
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "c"))
import build  # noqa: E402

CUDA = ROOT / "src" / "cuda"
EMULATION = (
    "-x c++ -std=c++17 -DKV_CUDA_EMU -O1 -fPIC -ffp-contract=off -fvisibility=hidden -pthread "
    "-Wall -Wextra -Isrc -Itests/gpu/emu"
).split()
RULES = HERE / "emu_rules.cpp"
NCCL = HERE / "emu_nccl.cpp"
# What setup.py builds the plug-in for devices with.
make = SimpleNamespace(**runpy.run_path(str(CUDA / "make.py")))


def sources():
    """What the emulated plug-in is made of."""
    return [*sorted(CUDA.glob("*.cu")), *sorted(HERE.glob("emu/*.cpp"))]


def sanitizer(flavour):
    """What the compiler is told besides, for a process under a sanitizer."""
    return build.FLAVOURS[flavour] if flavour in ("asan", "tsan") else []


def objects(flavour="debug"):
    """The emulation's objects, by the name of their source, up to date."""
    flags = [*EMULATION, *sanitizer(flavour)]
    out = ROOT / "build" / ("gpu-emulated" + (f"-{flavour}" if sanitizer(flavour) else ""))
    out.mkdir(parents=True, exist_ok=True)
    names = [source.name for source in sources()]
    with ThreadPoolExecutor(build.JOBS) as pool:
        made = pool.map(lambda path: build.compile_source(path, flags, "g++", out), sources())
        return dict(zip(names, made, strict=True))


def link(parts, target, flavour="debug"):
    build.call(["g++", *sanitizer(flavour), "-shared", "-pthread", *map(str, parts)], target)
    return target


def nccl(target, flavour="debug"):
    """The stand-in for libnccl, for a process that has opened the emulated plug-in."""
    flags = ["-Itests/gpu", *EMULATION, *sanitizer(flavour)]
    build.call(["g++", *flags, "-shared", str(NCCL), "-ldl"], target)
    return target


def rules(target):
    """The program that makes the mistakes which the emulation must show."""
    parts = [path for name, path in objects().items() if name.endswith(".cpp")]
    build.call(["g++", *EMULATION, str(RULES), "-x", "none", *map(str, parts)], target)
    return target


def planted(folder, file, old, new, users):
    """The emulated plug-in with a mistake: a file of src/cuda in which `old` is `new`. `users`: the
    sources that are made again, if the file is a header."""
    text = (CUDA / file).read_text()
    assert old in text, f"{file} has changed, and the mistake with it: {old}"
    copy = folder / "cuda" / file
    copy.parent.mkdir()
    copy.write_text(text.replace(old, new))
    parts = objects()
    for source in [CUDA / name for name in users] or [copy]:
        parts[source.name] = folder / f"{source.name}.o"
        build.call(["g++", f"-I{folder}", *EMULATION, "-w", "-c", str(source)], parts[source.name])
    return link(parts.values(), folder / "planted.so")


def mistaken(folder, source, old, new):
    """A copy of a source of the core in which `old` is `new`."""
    text = source.read_text()
    assert text.count(old) == 1, f"{source.name} has changed, and the mistake with it: {old}"
    copy = folder / source.name
    copy.write_text(text.replace(old, new))
    return copy


def planted_core(folder, file, old, new, name):
    """A program of test_gpu_*.c with a mistake in a source of the core."""
    source = ROOT / "src" / file
    flags, out = build.settings("debug")
    test = programs()[name].with_name(f"tests-gpu-{name}.c.o")
    parts = {path: build.compile_source(path, flags, "gcc", out) for path in build.core_sources()}
    parts[source] = mistaken(folder, source, old, new)
    target = folder / name
    parts = [test, *parts.values()]
    build.call(["gcc", *flags, "-w", *map(str, parts), "-lm", "-lpthread", "-ldl"], target)
    return target


def programs(flavour="debug"):
    """The programs of test_gpu_*.c, by name."""
    return {path.stem: path for path in build.build(flavour, pattern="test_gpu_*.c", folder="gpu")}


def package(folder, file=None, old="", new=""):
    """A copy of the package, to be put on the path, with a core that checks itself; with a mistake
    in it if there is a file: one of src/ in which `old` is `new`."""
    import numpy

    flags, out = build.settings("debug")
    binding = ["-I" + sysconfig.get_path("include"), "-I" + numpy.get_include()]
    binding += ['-DKV_FLAVOUR="debug"']
    sources = dict.fromkeys(build.core_sources(), flags)
    sources |= dict.fromkeys(sorted((ROOT / "src" / "py").glob("*.c")), flags + binding)
    with ThreadPoolExecutor(build.JOBS) as pool:
        made = pool.map(lambda pair: build.compile_source(*pair, "gcc", out), sources.items())
        parts = dict(zip(sources, made, strict=True))
    if file is not None:
        source = ROOT / "src" / file
        copy = mistaken(folder, source, old, new)
        parts[source] = folder / f"{source.name}.o"
        build.call(["gcc", *sources[source], "-w", "-c", str(copy)], parts[source])
    whole = folder / "kvstore"
    shutil.copytree(ROOT / "kvstore", whole, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    core = whole / ("_core" + sysconfig.get_config_var("EXT_SUFFIX"))
    build.call(["gcc", "-shared", "-pthread", *map(str, parts.values()), "-lm", "-ldl"], core)
    return folder
