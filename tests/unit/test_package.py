"""The package around the core: import, errors, registry, server names, what it tells of itself."""

import builtins
import importlib.metadata
import inspect
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest

import kvstore
from kvstore import _about, _core, errors

PACKAGE = Path(kvstore.__file__).parent


def python(*arguments, **environment):
    """Runs this interpreter where no checkout stands before the installed package."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd="/",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ------------------------------------------------------------------------------------- import


def test_version_is_the_distributions():
    assert kvstore.__version__ == importlib.metadata.version("mlkvstore")


def test_everything_public_is_there():
    for name in kvstore.__all__:
        assert getattr(kvstore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kvstore.nothing


def test_import_starts_no_thread_and_pulls_in_nothing_heavy():
    code = (
        "import sys, numpy, os; before = set(sys.modules); import kvstore;"
        "print(len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self') else 1);"
        "print(*sorted(set(sys.modules) - before))"
    )
    # NumPy's own linear algebra library would start threads.
    done = python("-c", code, OPENBLAS_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    threads, modules = done.stdout.splitlines()
    assert threads == "1"
    others = {name for name in modules.split() if name.split(".")[0] not in ("kvstore", "numpy")}
    assert others <= set(sys.builtin_module_names)


def test_import_takes_under_a_tenth_of_a_second_beyond_numpy():
    code = "import numpy, time; t = time.time(); import kvstore; print(time.time() - t)"
    assert min(float(python("-c", code).stdout) for _ in range(3)) < 0.1


# ------------------------------------------------------------------------- a core that is missing


@pytest.fixture
def copy(tmp_path):
    """A copy of the Python part, as a checkout has it before it is built."""
    shutil.copytree(
        PACKAGE, tmp_path / "kvstore", ignore=shutil.ignore_patterns("_core.*.so", "__pycache__")
    )
    return tmp_path


def import_from(folder, *paths):
    return subprocess.run(
        [sys.executable, "-c", "import kvstore"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=60,
    ).stderr


def test_a_checkout_without_a_build_says_how_to_build_it(copy):
    (copy / "setup.py").touch()
    message = import_from(copy)
    assert "ImportError" in message
    assert f"{copy / 'kvstore'} holds the Python part of kvstore but not its C core" in message
    assert f"run in {copy}: pip install -e ." in message


def test_a_checkout_without_a_build_names_the_installed_package(copy):
    (copy / "setup.py").touch()
    installed = copy / "elsewhere"
    (installed / "kvstore").mkdir(parents=True)
    shutil.copy(_core.__file__, installed / "kvstore")
    message = import_from(copy, installed)
    assert f"installed in {installed / 'kvstore'}, but {copy} stands before it" in message


def test_a_package_without_its_core_says_how_to_install_it(copy):
    assert "pip install --force-reinstall mlkvstore" in import_from(copy)


def test_a_core_for_another_python_is_named(copy):
    (copy / "kvstore" / "_core.cpython-399-strange.so").touch()
    message = import_from(copy)
    assert "for this Python (CPython" in message
    assert "there is only _core.cpython-399-strange.so" in message


def test_a_core_that_does_not_load_is_not_called_missing(copy):
    name = Path(_core.__file__).name
    (copy / "kvstore" / name).write_bytes(b"no shared object")
    message = import_from(copy)
    assert f"is there ({copy / 'kvstore' / name}) but does not load:" in message


# ------------------------------------------------------------------------------------- errors

KIN = {
    errors.KeyNotFoundError: KeyError,
    errors.InvalidArgumentError: ValueError,
    errors.ArrayTypeError: TypeError,
    errors.TimeoutError: builtins.TimeoutError,
    errors.PeerLostError: ConnectionError,
    errors.NotBuiltError: ImportError,
    errors.DeviceError: RuntimeError,
    errors.ClosedError: RuntimeError,
}


@pytest.mark.parametrize("kind", KIN, ids=lambda kind: kind.__name__)
def test_an_error_is_the_builtin_too_and_survives_pickling(kind):
    assert issubclass(kind, errors.KVStoreError) and issubclass(kind, KIN[kind])
    assert getattr(kvstore, kind.__name__) is kind
    error = kind("pull of key 'w' before init")
    error.updated_keys = ["a"]
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error) == "pull of key 'w' before init"
    assert copy.updated_keys == ["a"]


# ----------------------------------------------------------------------------------- registry


@pytest.fixture
def registry(monkeypatch):
    from kvstore import base

    monkeypatch.setattr(base, "_registered", {})


def make_class(name, module="cell"):
    class Mine(kvstore.KVStoreBase):
        type, rank, num_workers = "mine", 0, 1

        def __init__(self, **options):
            self.options = options

        def broadcast(self, key, value, out, priority=0): ...

        def pushpull(self, key, value, out=None, priority=0): ...

        def is_capable(self, capability):
            return False

    Mine.__name__ = Mine.__qualname__ = name
    Mine.__module__ = module
    return Mine


def test_built_in_stores_are_instances_of_the_abstract_class(kv):
    assert isinstance(kv, kvstore.KVStoreBase) and isinstance(kv, kvstore.KVStore)
    assert issubclass(kvstore.KVStore, kvstore.KVStoreBase)
    for name, member in inspect.getmembers(kvstore.KVStoreBase):
        if not name.startswith("_") and name not in ("register", "OPTIMIZER"):
            assert hasattr(kv, name), f"the abstract class promises {name}: {member}"


def test_create_makes_a_registered_class_with_its_options(registry):
    mine = kvstore.register(make_class("Mine"))
    kv = kvstore.create("MINE", speed=3)
    assert type(kv) is mine and kv.options == {"speed": 3}


def test_a_registered_class_without_an_optimizer_says_so(registry):
    kv = make_class("Mine")()
    for call, arguments in (
        (kv.set_optimizer, (None,)),
        (kv.save_optimizer_states, ("f",)),
        (kv.load_optimizer_states, ("f",)),
    ):
        with pytest.raises(kvstore.NotBuiltError, match=f"Mine has no {call.__name__}"):
            call(*arguments)


def test_a_class_that_lacks_a_call_cannot_be_made(registry):
    @kvstore.register
    class Half(kvstore.KVStoreBase):
        def pushpull(self, key, value, out=None, priority=0): ...

    with pytest.raises(TypeError, match="abstract"):
        kvstore.create("half")


def test_a_class_defined_again_replaces_itself_in_silence(registry):
    kvstore.register(make_class("Mine"))
    again = make_class("Mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kvstore.register(again)
    assert type(kvstore.create("mine")) is again


def test_another_class_of_the_same_name_warns(registry):
    kvstore.register(make_class("Mine"))
    with pytest.warns(UserWarning, match=r"made a cell\.Mine and from now on makes a other\.MINE"):
        kvstore.register(make_class("MINE", module="other"))


@pytest.mark.parametrize("name", ["Local", "Device", "Dist_Sync", "NCCL"])
def test_a_built_in_kind_cannot_be_registered(registry, name):
    with pytest.raises(kvstore.InvalidArgumentError, match=f"{name.lower()!r} is a built-in kind"):
        kvstore.register(make_class(name))


@pytest.mark.parametrize("thing", [3, "Mine", int, lambda: None], ids=repr)
def test_only_derived_classes_can_be_registered(registry, thing):
    with pytest.raises(kvstore.ArrayTypeError, match=r"derived from kvstore\.KVStoreBase"):
        kvstore.register(thing)


# ------------------------------------------------------------------------------------- server


def test_a_local_store_has_no_server(kv):
    with pytest.raises(kvstore.InvalidArgumentError, match=f"kind '{kv.type}' has no server"):
        kvstore.KVStoreServer(kv).run()


def test_a_server_is_made_of_a_store():
    with pytest.raises(kvstore.ArrayTypeError, match="takes a store, not a int"):
        kvstore.KVStoreServer(3)


@pytest.mark.parametrize(
    ("role", "error", "message"),
    [
        (None, kvstore.InvalidArgumentError, "set DMLC_ROLE to server or scheduler"),
        ("worker", kvstore.InvalidArgumentError, "a worker does not serve"),
        ("king", kvstore.InvalidArgumentError, "one of worker, server, scheduler"),
        ("server", kvstore.InvalidArgumentError, "a server must know where the scheduler is"),
        ("scheduler", kvstore.InvalidArgumentError, "KVSTORE_SCHEDULER or the option scheduler"),
    ],
)
def test_serve_says_why_it_cannot(monkeypatch, role, error, message):
    monkeypatch.delenv("DMLC_ROLE", raising=False)
    if role:
        monkeypatch.setenv("DMLC_ROLE", role)
    with pytest.raises(error, match=message):
        kvstore.serve()


def test_a_controller_is_callable():
    with pytest.raises(kvstore.ArrayTypeError, match="a function of"):
        kvstore.serve(controller=3)


def test_the_server_module_prints_its_error_and_fails():
    done = python("-m", "kvstore.server", DMLC_ROLE="server")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("kvstore.server: a server must know where the scheduler is")
    assert done.stderr.count("\n") == 1


# --------------------------------------------------------------------------- python -m kvstore


def test_the_report_shows_version_build_and_every_setting():
    done = python("-m", "kvstore")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"kvstore {kvstore.__version__}, {PACKAGE}" in done.stdout
    assert _core.build_info()["flavour"] in done.stdout
    words = " ".join(done.stdout.split())
    for variable, value, _, text in _core.settings():
        assert f"{variable}={value} " in words
        assert text in words


def test_the_report_shows_what_the_environment_sets():
    done = python("-m", "kvstore", KVSTORE_NUM_THREADS="3")
    assert "KVSTORE_NUM_THREADS=3  (default 0)" in done.stdout


def test_the_report_names_unknown_settings_and_the_nearest_known_one():
    others = {"KVSTORE_BUILD": "release", "KVSTORE_UCX": "off", "KVSTORE_UCX_TLS": "tcp"}
    done = python("-m", "kvstore", KVSTORE_NUM_TREADS="3", **others)
    assert (
        "KVSTORE_NUM_TREADS is set, and no setting has that name; "
        "did you mean KVSTORE_NUM_THREADS?" in done.stdout
    )
    assert not [name for name in others if name in done.stdout]


def test_the_report_survives_a_setting_that_does_not_parse():
    done = python("-m", "kvstore", KVSTORE_ISA="sse9000")
    assert done.returncode == 0, done.stderr
    assert "KVSTORE_ISA=sse9000" in done.stdout


def test_a_module_is_found_without_importing_it():
    assert _about.find_module("numpy") == str(Path(numpy.__file__).parent)
    assert _about.find_module("no_such_module") is None
    assert _about.find_module("xml.no_such_module") is None


def test_the_core_lists_its_instruction_sets():
    info = _core.build_info()
    assert info["isa"] in info["isas"]
    assert "baseline" in _core.isa_available()
    assert set(_core.isa_available()) <= set(info["isas"])
