"""Rules of the house that a reader of the sources can check: who includes whom, length, exits."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"

# Each floor may include itself and those named for it, and what those may include: arrows of
# #include point down only.
BELOW = {
    "base": (),
    "engine": ("base",),
    "array": ("engine",),
    "net": ("base",),
    "kernels": ("array",),
    "cuda": ("kernels",),
    "compress": ("kernels",),
    "optim": ("compress",),
    "comm": ("optim",),
    "ps": ("comm", "net"),
    "store": ("ps", "kv.h"),
    "kv.h": ("comm",),
    "py": ("store", "kv.h"),
}
MAX_LINES = 600

INCLUDE = re.compile(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
SOURCES = sorted(path for path in SRC.rglob("*") if path.suffix in (".c", ".h", ".inc", ".cu"))
TEXTS = {path.relative_to(SRC): path.read_text() for path in SOURCES}


def allowed(floor):
    found = {floor}
    for below in BELOW[floor]:
        found |= allowed(below)
    return found


def floor_of(path):
    return path.parts[0]


def includes():
    for path, text in TEXTS.items():
        for quoted, angled in INCLUDE.findall(text):
            yield path, quoted, angled


def test_includes_point_down_only():
    wrong = []
    for path, quoted, _ in includes():
        if not quoted:
            continue
        target = Path(quoted) if (SRC / quoted).exists() else path.parent / quoted
        assert (SRC / target).exists(), f"{path} includes {quoted}, which is nowhere"
        if floor_of(target) not in allowed(floor_of(path)):
            wrong.append(f"{path} includes {target}")
    assert not wrong


def test_the_core_is_free_of_python():
    assert not [path for path, q, a in includes() if a == "Python.h" and floor_of(path) != "py"]


def test_one_file_sees_numpy():
    files = {path for path, q, a in includes() if (q or a).startswith("numpy/")}
    assert files <= {Path("py/numpy.c")}


def test_one_table_and_one_transport_see_ucx():
    files = {path for path, q, a in includes() if (q or a).startswith(("ucp/", "ucs/", "uct/"))}
    assert files <= {Path("net/ucx_load.h")}
    files = {path for path, q, a in includes() if q == "net/ucx_load.h"}
    assert files <= {Path("net/ucx_load.c"), Path("net/ucx.c")}


def test_one_file_sees_cuda():
    files = {path for path, q, a in includes() if re.match("cu(da|blas|b/|rand)|nccl|emu", q or a)}
    assert {path for path in files if floor_of(path) != "cuda"} == set()
    angled = {path for path, q, a in includes() if re.match("cu(da|blas|b/|rand)|nccl|emu", a)}
    assert angled == {Path("cuda/gpu.h")}


def test_nothing_ends_the_process():
    ends = re.compile(r"\b(?:abort|exit|_exit|_Exit|quick_exit|assert)\s*\(|\bPy_FatalError\b")
    assert not [
        f"{path}: {line.strip()}"
        for path, text in TEXTS.items()
        for line in text.splitlines()
        if ends.search(line) and not line.lstrip().startswith(("*", "/*", "//"))
    ]


@pytest.mark.parametrize("folder", ["src", "kvstore", "tests", "benchmarks"])
def test_no_file_is_too_long(folder):
    suffixes = (".c", ".h", ".inc", ".cu", ".cpp", ".py", ".pyi")
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert files
    long = {
        str(path.relative_to(ROOT)): lines
        for path in files
        if "peers" not in path.parts and (lines := path.read_text().count("\n")) > MAX_LINES
    }
    assert not long
