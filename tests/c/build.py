"""Builds the C tests, one program a test file, and runs them.

    python tests/c/build.py [--flavour release|debug|asan|tsan] [--cc gcc] [--out DIR] [--run]

Every program is linked from one tests/c/test_*.c (or one of another folder) and all sources of the
core that do not need Python. Objects are kept in the build folder and made again when a file that
they include has changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("base", "net", "engine", "array", "kernels", "compress", "optim", "comm", "ps", "store")
COMMON = (
    "-std=c17 -Wall -Wextra -ffp-contract=off -fno-math-errno -fno-trapping-math -D_GNU_SOURCE "
    "-Isrc -fvisibility=hidden -fPIC -pthread"
).split()
FLAVOURS = {
    "release": "-O3".split(),
    "debug": "-O0 -g -DKV_DEBUG".split(),
    "asan": (
        "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer "
        "-DKV_DEBUG"
    ).split(),
    "tsan": "-O1 -g -fsanitize=thread -DKV_DEBUG".split(),
}
JOBS = 2
TIMEOUT_S = 300


class BuildError(Exception):
    pass


def _out_of_date(target: Path, depfile: Path) -> bool:
    """Whether a file that the target was made from is newer, or gone."""
    try:
        made = target.stat().st_mtime
        names = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        return any((ROOT / name).stat().st_mtime > made for name in [*names, __file__])
    except (OSError, IndexError):
        return True


def call(command: list[str], target: Path) -> None:
    """Runs a compiler. Its output appears whole, since two builds may share the folder, and has the
    time of the start, so that a source changed meanwhile is newer."""
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    start = time.time()
    done = subprocess.run([*command, "-o", str(scratch)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        scratch.unlink(missing_ok=True)
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    os.utime(scratch, (start, start))
    scratch.replace(target)


def compile_source(source: Path, flags: list[str], cc: str, out: Path) -> Path:
    name = source.relative_to(ROOT)
    target = out / ("-".join(name.parts) + ".o")
    depfile = target.with_suffix(".d")
    if _out_of_date(target, depfile):
        call([cc, *flags, "-c", str(name), "-MMD", "-MT", "x", "-MF", str(depfile)], target)
    return target


def ucx() -> Path | None:
    """The folder of the package libucx, with include/ and lib/."""
    found = find_spec("libucx")
    return None if found is None or found.origin is None else Path(found.origin).parent


def ucx_flags(flavour: str) -> list[str]:
    """How to compile with UCX, nothing without its headers. With the sanitizers it is left out: it
    is not instrumented, and it patches functions of the C library that they have replaced."""
    folder = ucx()
    if folder is None or flavour in ("asan", "tsan"):
        return []
    return ["-DKV_WITH_UCX", "-isystem", str(folder / "include")]


def settings(
    flavour: str = "debug", cc: str = "gcc", out: Path | None = None
) -> tuple[list[str], Path]:
    """What the compiler is given, and where its objects are."""
    with_ucx = ucx_flags(flavour)
    suffix = ("" if cc == "gcc" else f"-{Path(cc).name}") + ("-ucx" if with_ucx else "")
    out = (out or ROOT / "build" / f"c-{flavour}{suffix}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    return COMMON + FLAVOURS[flavour] + with_ucx, out


def core_sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / "src" / folder).glob("*.c"))]


def build(
    flavour: str = "debug",
    cc: str = "gcc",
    out: Path | None = None,
    pattern: str = "test_*.c",
    folder: str = "c",
) -> list[Path]:
    """The programs of these sources, up to date. BuildError has the compiler's words."""
    flags, out = settings(flavour, cc, out)
    core = core_sources()
    tests = sorted((ROOT / "tests" / folder).glob(pattern))

    def link(test: Path, object_: Path) -> Path:
        program = out / test.stem
        parts = [object_, *core_objects]
        newest = max(path.stat().st_mtime for path in parts)
        if not program.exists() or program.stat().st_mtime < newest:
            call([cc, *flags, *map(str, parts), "-lm", "-lpthread", "-ldl"], program)
        return program

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda path: compile_source(path, flags, cc, out), core + tests))
        core_objects, test_objects = objects[: len(core)], objects[len(core) :]
        return list(pool.map(link, tests, test_objects))


def command(program: Path, flavour: str, *arguments: str) -> list[str]:
    """How to start a program. Where the kernel scatters addresses widely, ThreadSanitizer finds no
    room for its shadow memory, so there they are not scattered."""
    fixed = flavour == "tsan" and shutil.which("setarch")
    return [*(["setarch", "-R"] if fixed else []), str(program), *arguments]


def environment() -> dict[str, str]:
    """What the programs are told: the sanitizers that an allocation without memory gives NULL, as
    elsewhere, and the tests of the transport where UCX is."""
    options = "allocator_may_return_null=1:print_stacktrace=1"
    told = {f"{name}_OPTIONS": options for name in ("ASAN", "TSAN", "UBSAN")}
    folder = ucx()
    return told if folder is None else {**told, "KVSTORE_TEST_UCX_LIBRARY": str(folder / "lib")}


def run(program: Path, flavour: str, timeout_s: float = TIMEOUT_S) -> tuple[int, int, str]:
    """Runs all tests of a program: how many passed, how many failed, what it printed."""
    try:
        done = subprocess.run(
            command(program, flavour),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | environment(),
            timeout=timeout_s,
        )
        text, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode(errors="replace")
        text += f"{program.name}: still running after {timeout_s} s\n"
        code = -1
    lines = text.splitlines()
    passed = sum(line.startswith("ok ") for line in lines)
    failed = sum(line.startswith("FAIL") for line in lines)
    if code != 0 and failed == 0:
        text += f"{program.name}: ended with {code}\n"
        failed = 1
    return passed, failed, text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flavour", choices=FLAVOURS, default="debug")
    parser.add_argument("--cc", default="gcc")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", action="store_true")
    options = parser.parse_args()
    try:
        programs = build(options.flavour, options.cc, options.out)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    if not options.run:
        print(*programs, sep="\n")
        return 0
    passed = failed = 0
    for program in programs:
        good, bad, text = run(program, options.flavour)
        passed, failed = passed + good, failed + bad
        print(text, end="")
    print(f"{passed} passed, {failed} failed")
    return failed > 0 or passed == 0


if __name__ == "__main__":
    sys.exit(main())
