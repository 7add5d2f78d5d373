"""Builds the CUDA plug-in: whether, for which devices, how. setup.py runs this; so may a person,
`python src/cuda/make.py FOLDER`, with the same settings.

KVSTORE_CUDA: auto (the default) builds it where nvcc and a driver with devices are found, for those
devices, and never fails an install; on builds it anywhere, for all devices that this nvcc knows
from Turing on; off does not. KVSTORE_CUDA_ARCH (as in 80,90) names the devices instead.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHOICES = ("auto", "on", "off")
TURING = 75  # what older ones lack, no source here knows
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
PLUGIN = "libkvstore_cuda.so"
DECISION = "_cuda.txt"  # one line beside the package's core, for `python -m kvstore`

# -fmad=false: the numbers are the processor's, bit for bit. The runtime is linked in, so the
# plug-in needs nothing but the driver.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-DNDEBUG", f"-I{HERE.parent}", "-cudart", "static"]
HOST = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]


class Refused(Exception):
    """A setting is wrong, or what it demands cannot be done."""


class Missing(Exception):
    """Why `auto` builds nothing."""


def sources():
    return sorted(HERE.glob("*.cu"))


def files():
    """All that a source distribution needs besides headers, from the folder of setup.py."""
    return [f"src/cuda/{path.name}" for path in (*sources(), Path(__file__))]


# ---------------------------------------------------------------------------------- what is here


def find_nvcc(environ):
    """The one that is named, else the first on the path, else the usual one; None for none."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        named = environ.get(variable) and shutil.which(f"{environ[variable]}/bin/nvcc")
        if named:
            return named
    return shutil.which("nvcc", path=environ.get("PATH")) or shutil.which(USUAL_NVCC)


def known_archs(nvcc):
    """The compute capabilities that this nvcc compiles for, 90 for 9.0."""
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    found = sorted({int(number) for number in re.findall(r"^compute_(\d+)$", done.stdout, re.M)})
    if done.returncode != 0 or not found:
        raise Missing(f"{nvcc} does not tell what it compiles for: {last_line(done)}")
    return found


def last_line(done):
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {done.returncode}, no output"


def device_archs(library="libcuda.so.1"):
    """The compute capabilities of this machine's devices, asked of the driver."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        raise Missing(f"there is no CUDA driver here ({library})") from None
    count, number = ctypes.c_int(), ctypes.c_int()
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error or count.value < 1:
        raise Missing(f"the CUDA driver finds no device here (CUresult {error})")
    found = set()
    for device in range(count.value):
        parts = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
                raise Missing(f"the CUDA driver does not tell what device {device} is")
            parts.append(number.value)
        found.add(parts[0] * 10 + parts[1])
    return sorted(found)


# ------------------------------------------------------------------------------------ the decision


def parse_archs(text):
    """'80, 90' as [80, 90]; None for no text."""
    if not text.strip():
        return None
    words = re.split(r"[\s,;]+", text.strip(" ,;"))
    if not all(re.fullmatch(r"[1-9]\d{1,2}", word) for word in words):
        raise Refused(
            f"KVSTORE_CUDA_ARCH={text!r}: name compute capabilities without their dot, as in 80,90"
        )
    return sorted({int(word) for word in words})


def check_archs(archs, known, nvcc):
    for arch in archs:
        if arch not in known or arch < TURING:
            choice = ", ".join(str(each) for each in known if each >= TURING)
            raise Refused(f"KVSTORE_CUDA_ARCH: {nvcc} compiles for {choice}, not for {arch}")


def for_all(known):
    """The oldest of each generation (80 of 80, 86, 89): its code runs on all of them."""
    oldest = {}
    for arch in known:
        if arch >= TURING:
            oldest.setdefault(arch // 10, arch)
    return sorted(oldest.values())


def for_present(present, known):
    """The newest that nvcc knows and the device runs, if need be compiled again by its driver."""
    chosen = {max((arch for arch in known if arch <= one), default=0) for one in present}
    return sorted(arch for arch in chosen if arch >= TURING)


def decide(environ, devices=device_archs):
    """nvcc and the compute capabilities to build for. Raises Missing with the reason if nothing is
    to be built."""
    wanted = environ.get("KVSTORE_CUDA") or "auto"
    if wanted not in CHOICES:
        raise Refused(f"KVSTORE_CUDA={wanted!r}: choose one of {', '.join(CHOICES)}")
    archs = parse_archs(environ.get("KVSTORE_CUDA_ARCH", ""))
    if wanted == "off":
        raise Missing("KVSTORE_CUDA=off")
    nvcc = find_nvcc(environ)
    if nvcc is None:
        raise Missing("there is no nvcc here: install the CUDA toolkit, or set CUDA_HOME to it")
    known = known_archs(nvcc)
    if archs:
        check_archs(archs, known, nvcc)
    if wanted == "on":
        archs = archs or for_all(known)
    else:
        present = devices()
        archs = archs or for_present(present, known)
    if not archs:
        raise Missing(f"neither {nvcc} nor the devices here are of Turing ({TURING}) or newer")
    return nvcc, archs


# ---------------------------------------------------------------------------------------- building


def compile_plugin(nvcc, archs, objects):
    """Gives the plug-in that was made, or made earlier of the same sources. Raises Missing with
    what nvcc said."""
    objects = objects / "-".join(map(str, archs))
    made = objects / PLUGIN
    inputs = [*HERE.parent.rglob("*.[ch]"), *HERE.parent.rglob("*.inc"), *HERE.iterdir()]
    if made.exists() and made.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return made
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # What is newer than all of them compiles this when it loads it.
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")

    def compile_one(source):
        run(nvcc, [*FLAGS, *HOST, *targets, "-c", source, "-o", objects / f"{source.stem}.o"])

    objects.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources()))
    parts = [objects / f"{source.stem}.o" for source in sources()]
    run(nvcc, ["-shared", "-cudart", "static", *targets, *parts, "-o", made])
    return made


def run(nvcc, arguments):
    done = subprocess.run([nvcc, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.stderr.write(done.stdout + done.stderr)
        raise Missing(f"{nvcc} failed: {last_line(done)}")


def make(environ, folder, objects, devices=device_archs):
    """Puts the plug-in into `folder`, or sees to it that there is none. Gives the line that says
    which, and leaves it beside. Raises Refused."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Replaced, not written over: a process may have it open.
    (folder / PLUGIN).unlink(missing_ok=True)
    try:
        nvcc, archs = decide(environ, devices)
        shutil.copyfile(compile_plugin(nvcc, archs, Path(objects)), folder / PLUGIN)
        line = f"with CUDA, for devices of {', '.join(map(str, archs))} and newer ({nvcc})"
    except (Missing, OSError) as error:
        if environ.get("KVSTORE_CUDA") == "on":
            raise Refused(f"KVSTORE_CUDA=on: {error}") from error
        line = f"without CUDA: {error}"
    (folder / DECISION).write_text(line + "\n")
    return line


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python src/cuda/make.py FOLDER")
    try:
        print(make(os.environ, sys.argv[1], HERE.parents[1] / "build/cuda"))
    except Refused as error:
        raise SystemExit(str(error)) from None
