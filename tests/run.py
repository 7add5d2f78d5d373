"""The habits: checks beyond the plain `pytest`, each by one command.

    python tests/run.py NAME [options]

A habit passes with exit status 0 and a closing line. What it needs and does not find is a failure
that says how to get it, never a silent pass; only `cuda` and `gpu` count as skipped, on a machine
without nvcc or without a GPU.
It runs with the Python that has the package installed with its extras [dev]; what it builds goes
into build/.
"""

import argparse
import importlib.util
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
BUILD = ROOT / "build"
JOBS = os.cpu_count() or 1
SKIPPED = "skipped"

sys.path[:0] = [str(TESTS / "c"), str(TESTS / "gpu")]


class Failed(Exception):
    """A habit did not pass; the message says why."""


def run(*command, env=None, cwd=ROOT, quiet=False, timeout_s=3000):
    """Runs a command that must succeed. `quiet`: its output is shown only when it fails."""
    command = [str(part) for part in command]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            text=True,
            errors="replace",
            timeout=timeout_s,
            **output,
        )
    except FileNotFoundError:
        raise Failed(f"{command[0]} is not on this machine") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"still running after {timeout_s} s: {' '.join(command)}") from None
    if done.returncode != 0:
        raise Failed(f"{done.stdout or ''}exit status {done.returncode}: {' '.join(command)}")
    return done.stdout


def pytest(*arguments, python=(sys.executable,), env=None):
    """Runs pytest from a folder where no checkout stands before the package that is meant."""
    BUILD.mkdir(exist_ok=True)
    options = ("-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-q", "-p", "no:cacheprovider")
    run(*python, "-m", "pytest", *options, *arguments, env=env, cwd=BUILD)


def existing(*paths):
    """Paths below tests/, which must be there."""
    found = [TESTS / path for path in paths]
    missing = [str(path.relative_to(ROOT)) for path in found if not path.exists()]
    if missing:
        raise Failed(f"not there: {', '.join(missing)}")
    return found


def tool(name):
    """A program of the extras [dev], beside this Python or on the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Failed(f"{name} is missing: pip install -e '.[dev]'")
    return found


# ---------------------------------------------------------------------------------------- lint

WARNINGS = (
    "-Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith "
    "-Wwrite-strings -Werror"
).split()


def lint(options):
    steps = (compiler_warnings, layout, python_style, python_types, stub, house_rules)
    problems = []
    for step in steps:
        try:
            step()
        except Failed as error:
            problems.append(f"{step.__name__}: {error}")
    if problems:
        raise Failed("\n".join(problems))


def compiler_warnings():
    """gcc with its optimiser on, which finds more, and clang with its analysis of locks. UCX is in
    the build once, if its headers are here, and once not."""
    import numpy

    import build
    import plugin

    headers = ("-isystem", sysconfig.get_path("include"), "-isystem", numpy.get_include())
    common = ["-std=c17", *WARNINGS, "-D_GNU_SOURCE", "-Isrc", "-fvisibility=hidden", *headers]
    compilers = (
        ["gcc", "-O2", "-c", "-o", "/dev/null", *common],
        ["clang", "-fsyntax-only", "-Wthread-safety", *common],
    )
    folders = (ROOT / "src", TESTS / "c", TESTS / "gpu")
    sources = [path for folder in folders for path in sorted(folder.rglob("*.c"))]
    jobs = [
        [*compiler, *defines, source.relative_to(ROOT)]
        for compiler in compilers
        for defines in (build.ucx_flags("debug"), ("-DKV_DEBUG",))
        for source in sources
    ]
    jobs += [
        ["g++", *plugin.EMULATION, "-Wshadow", "-Werror", "-c", "-o", "/dev/null", source]
        for source in (*plugin.sources(), plugin.RULES)
    ]
    together(lambda job: run(*job, quiet=True), jobs)


def together(function, jobs):
    """Calls the function for every job, side by side, and reports all failures."""

    def attempt(job):
        try:
            function(job)
        except Failed as error:
            return str(error)

    with ThreadPoolExecutor(JOBS) as pool:
        problems = [problem for problem in pool.map(attempt, jobs) if problem]
    if problems:
        raise Failed("\n".join(problems))


def layout():
    """clang-format of one release."""
    formatter = tool("clang-format")
    version = run(formatter, "--version", quiet=True)
    if "version 14." not in version:
        raise Failed(f"clang-format 14 is needed (pip install -e '.[dev]'), this is {version}")
    folders = (ROOT / "src", TESTS, ROOT / "benchmarks")
    kinds = ("c", "h", "inc", "cu", "cpp")
    files = [path for folder in folders for kind in kinds for path in folder.rglob(f"*.{kind}")]
    files = sorted(path for path in files if "peers" not in path.parts)
    run(formatter, "--dry-run", "-Werror", *files, quiet=True)


def python_style():
    run(tool("ruff"), "check", "--quiet", ".", quiet=True)
    run(tool("ruff"), "format", "--quiet", "--check", "--diff", ".", quiet=True)


def python_types():
    run(tool("mypy"), quiet=True)


def stub():
    """_core.pyi against the module as it was built."""
    allowed = ("--allowlist", TESTS / "lint" / "stub_allowlist.txt", "--ignore-unused-allowlist")
    run(tool("stubtest"), "kvstore._core", *allowed, quiet=True)


def house_rules():
    pytest("--quiet", "--no-header", *existing("lint"))


# ---------------------------------------------------------------------------------- sanitizers

SANITIZED_SEEDS = 200
REPORT = re.compile(r"ERROR: |WARNING: ThreadSanitizer: |: runtime error: ")


def sanitized(flavour, tests, on_cuda=(), plugin_flavour=None):
    """The C tests, then Python tests on a package built with the sanitizer. `on_cuda`: the tests,
    and the options, of processes with the emulation of CUDA; `plugin_flavour`: which one its own
    code is built with."""
    import build

    c_tests(flavour)
    random_programs(flavour, SANITIZED_SEEDS)
    emulated = on_emulation(flavour, plugin_flavour) if on_cuda else {}
    library = run("gcc", f"-print-file-name=lib{flavour}.so", quiet=True).strip()
    if not Path(library).is_absolute():
        raise Failed(f"gcc has no lib{flavour}.so")
    reports = BUILD / flavour / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    # Leaks are not looked for: the interpreter leaves much behind; the live-object counters do it.
    # Reports go to files, or pytest would keep them to itself.
    options = f"allocator_may_return_null=1:print_stacktrace=1:log_path={reports}/report"
    env = {
        "ASAN_OPTIONS": f"{options}:detect_leaks=0",
        "TSAN_OPTIONS": f"{options}:die_after_fork=0:suppressions={TESTS / 'tsan.supp'}",
        "UBSAN_OPTIONS": options,
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(install_flavour(flavour)),
    }
    # The sanitizer is loaded by the interpreter itself, not by what starts it, and
    # sys.executable is the interpreter itself, never a script that starts it.
    preload = f"LD_PRELOAD={os.path.realpath(library)}"
    python = (*build.command("env", flavour, preload), sys.executable)
    env = {**env, "KVSTORE_TESTS_WITHOUT_TORCH": "1"}
    check = f"import kvstore; assert kvstore._core.build_info()['flavour'] == {flavour!r}"
    problems = []
    try:
        run(*python, "-c", check, env=env, cwd=BUILD)
        pytest(*tests, python=python, env=env)
        for arguments in on_cuda:
            pytest(*arguments, python=python, env={**env, **emulated, **cuda_tests(env)})
    except Failed as error:
        problems.append(str(error))
    texts = [path.read_text(errors="replace") for path in sorted(reports.iterdir())]
    problems += [text for text in texts if REPORT.search(text)]
    if problems:
        raise Failed("\n".join(problems))


def c_programs(flavour, pattern):
    import build

    try:
        programs = build.build(flavour, pattern=pattern)
    except build.BuildError as error:
        raise Failed(str(error)) from None
    if not programs:
        raise Failed(f"there is no tests/c/{pattern}")
    return programs


def c_tests(flavour):
    import build

    for program in c_programs(flavour, "test_*.c"):
        passed, failed, output = build.run(program, flavour)
        if failed or not passed:
            raise Failed(output)
        print(f"{program.name}: {passed} passed", flush=True)


def random_programs(flavour, seeds):
    """Random programs on every engine: the same bytes as on the naive one."""
    import build

    (program,) = c_programs(flavour, "engine_random.c")
    command = build.command(program, flavour, "--seeds", str(seeds))
    run(*command, env=build.environment())


def on_emulation(flavour, plugin_flavour):
    """The programs of tests/gpu on the emulation. What tells other processes of it."""
    import build
    import plugin

    folder = BUILD / flavour / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        parts = plugin.objects(plugin_flavour).values()
        library = plugin.link(parts, folder / "emulated.so", plugin_flavour)
        nccl = plugin.nccl(folder / "libnccl.so.2", plugin_flavour)
        programs = plugin.programs(flavour).values()
    except build.BuildError as error:
        raise Failed(str(error)) from None
    env = {"KVSTORE_CUDA_PLUGIN": str(library), "KVSTORE_NCCL": str(nccl)}
    env["KVSTORE_CUDA_SEEDS"] = "1"
    for program in programs:
        run(*build.command(program, flavour), env={**build.environment(), **env}, quiet=True)
        print(f"{program.name}: passed", flush=True)
    return env


# Of the contract and of stores what runs with CUDA tensors.
STORES_ON_CUDA = ("-o", "python_files=check_*.py", *existing("gpu/stores"))
CONTRACT_ON_CUDA = ("-p", "contract_on_cuda", *existing("contract"))


def cuda_tests(env):
    """What they need besides."""
    path = [path for path in (env.get("PYTHONPATH"), str(TESTS / "gpu")) if path]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "KVSTORE_TESTS_KINDS": "device nccl local dist_device_sync",
    }


def install_flavour(flavour):
    """A copy of the package with the core of a flavour, to be put on PYTHONPATH."""
    folder = BUILD / flavour / "package"
    shutil.rmtree(folder, ignore_errors=True)
    arguments = ("--quiet", "--no-deps", "--target", folder, ROOT)
    run(sys.executable, "-m", "pip", "install", *arguments, env={"KVSTORE_BUILD": flavour})
    return folder


# Not on a sanitizer's build: the C tests, which have their own, and what brings much code that no
# sanitizer has seen.
UNSANITIZED = ("test_c.py", "test_demo.py", "test_notebook.py", "test_torch.py")


def suites(*folders):
    ignored = [f"--ignore={TESTS / 'unit' / name}" for name in UNSANITIZED]
    return [*existing(*folders), *ignored]


def contract(*patterns):
    """The contract tests of these names."""
    found = [
        str(p.relative_to(TESTS)) for n in patterns for p in TESTS.glob(f"contract/test_{n}.py")
    ]
    return sorted(set(found))


# What several threads do, and what comes from other processes.
THREADED = ("dist_*", "*async*", "*threads", "updater*", "signals")
# Of the stores over CUDA memory: what goes wrong.
QUICK_STORES = ("bad", "death")


def asan(options):
    if options.quick:
        tests = ("unit", "faults", *contract(*THREADED, "row_sparse*", "fork", "exit"))
        files = existing(*(f"gpu/stores/check_{name}.py" for name in QUICK_STORES))
        sanitized("asan", suites(*tests), on_cuda=[files], plugin_flavour="debug")
    else:
        tests = ("unit", "contract", "golden", "faults", "fuzz")
        on_cuda = [STORES_ON_CUDA, CONTRACT_ON_CUDA]
        sanitized("asan", suites(*tests), on_cuda=on_cuda, plugin_flavour="asan")


def tsan(options):
    quick = contract("*threads", "async", "dist_rounds", "dist_failures")
    sanitized("tsan", suites(*(quick if options.quick else ("unit", "contract", "golden", "fuzz"))))


# -------------------------------------------------------------------------------- other habits


def engine(options):
    random_programs("debug", options.seeds)


def golden(options):
    pytest(*existing("golden"))


def faults(options):
    pytest(*existing("faults"))
    kills = {"KVSTORE_KILLS": str(options.kills)}
    pytest(*existing("cluster/test_kills.py"), "-k", "random_kills", env=kills)


def fuzz(options):
    pytest(*existing("fuzz"), env={"KVSTORE_FUZZ_SECONDS": str(options.seconds or 60)})


def soak(options):
    seconds = {"KVSTORE_SOAK_SECONDS": str(options.seconds or 600)}
    pytest(*existing("cluster/test_soak.py"), env=seconds)


def bench(options):
    run(sys.executable, ROOT / "benchmarks" / "run.py", "--quick")


def large(options):
    pytest("-m", "large", TESTS)


CUDA_ARCH = 90  # where only compiling is the test


def cuda(options):
    """The plug-in for GPUs is compiled, shows its entry only, and can be loaded without a GPU."""
    import plugin

    if shutil.which("nvcc") is None:
        print("nvcc is not on this machine")
        return SKIPPED
    library = cuda_plugin([CUDA_ARCH])
    rows = run("nm", "-D", "--defined-only", library, quiet=True).splitlines()
    if [row.split()[2] for row in rows] != ["kv_device_open"]:
        raise Failed("\n".join(["the plug-in shows more than its entry:", *rows]))
    env = {"KVSTORE_CUDA_PLUGIN": str(library)}
    output = run(
        plugin.programs()["test_gpu_failures"],
        "without_devices_there_is_no_table",
        env=env,
        quiet=True,
    )
    told = [line.strip() for line in output.splitlines() if "no CUDA device" in line]
    print(told[0] if told else "there is a CUDA device here")


def gpu(options):
    """The tests of the plug-in, of stores and of the contract on a GPU."""
    import plugin

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc is not on this machine")
        return SKIPPED
    try:
        archs = plugin.make.for_present(plugin.make.device_archs(), plugin.make.known_archs(nvcc))
    except plugin.make.Missing as missing:
        print(missing)
        return SKIPPED
    env = {"KVSTORE_CUDA_PLUGIN": str(cuda_plugin(archs))}
    folder = runpy.run_path(str(ROOT / "kvstore" / "_about.py"))["nccl_folder"]()
    if folder is not None and "KVSTORE_NCCL" not in os.environ:
        env["KVSTORE_NCCL"] = f"{folder}/libnccl.so.2"
    programs = plugin.programs().values()
    for program in programs:
        run(program, env=env)
    beside = os.pathsep.join([str(Path(nvcc).resolve().parent), os.environ["PATH"]])
    sanitizer = shutil.which("compute-sanitizer", path=beside)
    if sanitizer is None:
        print("compute-sanitizer is not on this machine: memory and races are not checked")
    # Calls that fail are among what the programs test.
    tools = (("memcheck", "--report-api-errors", "no"), ("racecheck",))
    for tool in tools if sanitizer is not None else ():
        for program in programs:
            run(sanitizer, "--error-exitcode", "1", "--tool", *tool, program, env=env)
    for arguments in (STORES_ON_CUDA, CONTRACT_ON_CUDA):
        pytest(*arguments, env={**env, **cuda_tests(os.environ)})


def cuda_plugin(archs):
    import plugin

    try:
        return plugin.make.compile_plugin(shutil.which("nvcc"), archs, ROOT / "build" / "gpu")
    except plugin.make.Missing as error:
        raise Failed(str(error)) from None


# The oldest NumPy that the package runs on, tried where it has wheels.
OLD_NUMPY = {"3.10": "numpy==1.26.*"}
# Of the contract what depends on the interpreter: callbacks, threads, lifetimes, start and end.
INTERPRETED = (
    "init_push_pull",
    "*async",
    "*threads",
    "updater*",
    "signals",
    "fork",
    "exit",
    "start",
)


def versions(options):
    """Build, import and a suite on every CPython from 3.10 on that is found; --quick: on two."""
    quick = contract(*INTERPRETED, "row_sparse", "dist_rounds", "dist_set_optimizer")
    suite = existing("unit/test_package.py", *(quick if options.quick else ["contract"]))
    found = pythons()
    if not found:
        raise Failed("no CPython from 3.10 on was found")
    if options.quick:
        names = list(found)
        found = {name: found[name] for name in (names[0], names[-1])}
    for version, interpreter in found.items():
        venv = BUILD / "versions" / version
        shutil.rmtree(venv, ignore_errors=True)
        run(interpreter, "-m", "venv", venv, quiet=True)
        python = (venv / "bin" / "python",)
        packages = (
            f"{ROOT}[state]",
            "pytest",
            "hypothesis",
            "ml_dtypes",
            OLD_NUMPY.get(version, "numpy"),
        )
        run(*python, "-m", "pip", "install", "--quiet", *packages, quiet=True)
        print(f"CPython {version}", flush=True)
        pytest(*suite, python=python)


def pythons():
    """The interpreters found, by version: on the path and below pyenv."""
    candidates = [shutil.which(f"python3.{minor}") for minor in range(10, 20)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += sorted(pyenv.glob("3.*/bin/python3"), reverse=True)
    code = "import sys; print(sys.implementation.name, '%d.%d' % sys.version_info[:2])"
    found = {}
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        match = re.fullmatch(r"cpython (3\.(\d+))\n", done.stdout)
        if done.returncode == 0 and match and int(match[2]) >= 10:
            found.setdefault(match[1], candidate)
    return dict(sorted(found.items(), key=lambda item: minor(item[0])))


def minor(version):
    return int(version.removeprefix("3."))


# ------------------------------------------------------------------------------------- choosing

HABITS = (lint, asan, tsan, engine, golden, faults, fuzz, soak, versions, bench, large, cuda, gpu)
NEEDS_PACKAGE = (lint, golden, faults, fuzz, soak, bench, large, gpu)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("habit", choices=[habit.__name__ for habit in HABITS])
    parser.add_argument("--seeds", type=int, default=2000, help="engine: how many programs")
    parser.add_argument("--kills", type=int, default=200, help="faults: of random processes")
    parser.add_argument("--seconds", type=int, help="fuzz (60), soak (600): for how long")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="asan, tsan, versions: of the Python tests those they are for most",
    )
    options = parser.parse_args()
    # A shell's background job ignores Ctrl-C, and so would the tests of it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    habit = next(habit for habit in HABITS if habit.__name__ == options.habit)
    start = time.monotonic()
    try:
        if habit in NEEDS_PACKAGE and importlib.util.find_spec("kvstore") is None:
            raise Failed("kvstore is not installed: pip install -e '.[dev]'")
        outcome = habit(options) or "passed"
    except Failed as error:
        print(error, file=sys.stderr)
        outcome = "FAILED"
    print(f"{options.habit}: {outcome} in {time.monotonic() - start:.0f} s")
    return outcome == "FAILED"


if __name__ == "__main__":
    sys.exit(main())
