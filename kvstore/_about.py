"""What the package can say about itself: why its core is missing, how it was built, what it found,
and every setting. Imports neither the core nor anything heavy by itself."""

import contextlib
import ctypes.util
import difflib
import importlib.machinery
import importlib.util
import os
import platform
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent

# name, what it is good for here; modules first, then shared libraries as the linker knows them.
MODULES = (
    ("ml_dtypes", "bfloat16 as NumPy arrays"),
    ("safetensors", "files of optimizer states"),
    ("scipy", "sparse matrices to and from RowSparse"),
    ("torch", "tensors as values"),
    ("cupy", "CUDA arrays as values"),
    ("jax", "arrays as values"),
    ("sklearn", "the demo's data set"),
    ("matplotlib", "the demo's plot"),
    ("rich", "the demo's progress bar"),
    ("ray", "clusters on Ray"),
)
LIBRARIES = (("cuda", "the CUDA driver"),)

# Read by setup.py, not by the package.
BUILD_VARIABLES = ("KVSTORE_BUILD", "KVSTORE_UCX", "KVSTORE_CUDA", "KVSTORE_CUDA_ARCH")


def why_no_core(error: ImportError) -> str:
    """The sentence for a failed import of the C core: not there, or there and failing to load."""
    here = _cores(HERE)
    loadable = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    for core in here:
        if core.name.removeprefix("_core") in loadable:
            return f"the C core of kvstore is there ({core}) but does not load: {error}"
    lines = [f"{HERE} holds the Python part of kvstore but not its C core"]
    if here:
        lines[0] += (
            f" for this Python (CPython {platform.python_version()}); "
            f"there is only {', '.join(core.name for core in here)}"
        )
    elsewhere = _installed_elsewhere()
    if elsewhere:
        lines.append(
            f"kvstore is installed in {elsewhere}, but {HERE.parent} stands before it on sys.path: "
            "start Python in another folder, or build this checkout"
        )
    if (HERE.parent / "setup.py").exists():
        lines.append(f"to build this checkout, run in {HERE.parent}: pip install -e .")
    else:
        lines.append("to install it anew: pip install --force-reinstall mlkvstore")
    return ".\n".join(lines)


def _cores(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("_core.*") if path.suffix in (".so", ".pyd"))


def _installed_elsewhere() -> Path | None:
    for entry in sys.path:
        folder = Path(entry or ".").resolve() / "kvstore"
        if folder != HERE.resolve() and _cores(folder):
            return folder
    return None


def find_module(name: str) -> str | None:
    """Where an optional module would come from, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return str(next(iter(spec.submodule_search_locations)))
    return spec.origin


def find_ucx() -> str | None:
    """Where UCX would come from: the wheel libucx-cu12 before the system's library."""
    package = find_module("libucx")
    if package is not None:
        for found in sorted(Path(package).glob("lib/libucp.so*")):
            return str(found)
    return ctypes.util.find_library("ucp")


def nccl_folder() -> str | None:
    """The folder of NCCL's library in the package nvidia-nccl-cu12 or -cu13; None: the system's."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / "lib" / "libnccl.so.2").exists():
            return str(Path(folder) / "lib")
    return None


def unknown_settings(known: list[str]) -> Iterator[str]:
    """A line for each variable of the environment that looks like a setting and is none."""
    for variable in sorted(os.environ):
        # KVSTORE_UCX_* are settings of UCX, which knows their names.
        if not variable.startswith("KVSTORE_") or variable.startswith("KVSTORE_UCX_"):
            continue
        if variable in (*known, *BUILD_VARIABLES):
            continue
        near = difflib.get_close_matches(variable, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"{variable} is set, and no setting has that name{hint}"


def report() -> Iterator[str]:
    """The lines of ``python -m kvstore``."""
    import numpy

    from . import __version__, _core
    from .cluster import settings as cluster_settings
    from .errors import KVStoreError

    yield f"kvstore {__version__}, {HERE}"
    yield _row("Python", f"{platform.python_version()}, NumPy {numpy.__version__}")
    try:
        info = _core.build_info()
    except KVStoreError as error:
        yield _row("error", str(error))
    else:
        compiler = info["compiler"]  # gcc gives its version only
        compiler = f"gcc {compiler}" if compiler[:1].isdigit() else compiler
        yield _row("built as", f"{info['flavour']}, {compiler}, NumPy API {info['numpy_target']}")
        yield _row("kernels", f"{info['isa']} (of {', '.join(info['isas'])})")
        yield _row("engine", info["engine"])
        yield _row("processors", str(info["processors"]))
        yield _row("dist stores", "yes" if info["ucx"] else "no: built without UCX")
    yield from _cuda()
    yield from _nccl()

    yield ""
    yield "Optional libraries"
    for name, purpose in MODULES:
        yield _row(name, f"{find_module(name) or 'not found'}  ({purpose})")
    yield _row("ucx", f"{find_ucx() or 'not found'}  (values between the nodes of a cluster)")
    for name, purpose in LIBRARIES:
        yield _row(name, f"{ctypes.util.find_library(name) or 'not found'}  ({purpose})")

    yield ""
    yield "Settings, from the environment"
    settings = [*_core.settings(), *cluster_settings.listing()]
    for variable, value, default, text in settings:
        origin = "default" if variable not in os.environ else f"default {default}"
        yield f"  {variable}={value}  ({origin})"
        yield textwrap.fill(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    known = [variable for variable, *_ in settings] + cluster_settings.variables()
    for line in unknown_settings(known):
        yield f"  {line}"


def _cuda() -> Iterator[str]:
    """The plug-in: what the installation decided, what it finds now."""
    from . import _core
    from .errors import KVStoreError

    try:
        file, count = _core.cuda_plugin()
    except KVStoreError as error:
        yield _row("CUDA", f"no: {error}")
        with contextlib.suppress(OSError):
            yield _row("", f"the installation said: {(HERE / '_cuda.txt').read_text().strip()}")
        return
    yield _row("CUDA", file)
    for number in range(count):
        try:
            device = _core.cuda_device(number)
        except KVStoreError as error:
            yield _row(f"device {number}", f"not usable: {error}")
            continue
        if number == 0:
            versions = (
                f"{v // 1000}.{v % 1000 // 10}" for v in (device["driver"], device["runtime"])
            )
            yield _row("", "driver for CUDA {}, plug-in built with {}".format(*versions))
        yield _row(
            f"device {number}",
            f"{device['name']}, {device['bytes'] / 2**30:.1f} GiB, "
            f"compute capability {device['major']}.{device['minor']}",
        )


def _nccl() -> Iterator[str]:
    """Which NCCL stores of kind nccl would use."""
    from . import _core
    from .errors import KVStoreError

    try:
        file, version = _core.nccl_library(nccl_folder())
    except KVStoreError as error:
        yield _row("NCCL", f"no: {error}")
        return
    number = f"{version // 10000}.{version % 10000 // 100}.{version % 100}"
    yield _row("NCCL", f"{file}, {number}")


def _row(name: str, text: str) -> str:
    return f"  {name:<12}{text}"
