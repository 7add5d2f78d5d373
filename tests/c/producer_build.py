"""Builds kvstore_producer, the array library of the DLPack tests, from tests/c/producer.c."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
NAME = "kvstore_producer"


class BuildError(Exception):
    pass


def build(out_dir: Path) -> Path:
    """The extension module in `out_dir`. BuildError has the compiler's words."""
    target = Path(out_dir) / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    flags = shlex.split("-std=c17 -O1 -g -Wall -Wextra -fPIC -shared -D_GNU_SOURCE")
    if sysconfig.get_platform().startswith("macosx"):
        flags += ["-undefined", "dynamic_lookup"]
    paths = [f"-I{ROOT / 'src'}", f"-I{sysconfig.get_path('include')}"]
    command = [*compiler, *flags, *paths, str(ROOT / "tests" / "c" / "producer.c")]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr}")
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
