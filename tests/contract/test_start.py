"""Ways to start: engines, settings, spawned processes, sub-interpreters."""

import sys

import pytest
from helpers import assert_clean, run_script


@pytest.mark.parametrize("engine", ["threaded", "naive", "stepping"])
def test_every_engine_gives_the_same_values(script, engine):
    done = script(
        """
outs = []
for i in range(20):
    kv.push("w", [kvstore.full(3, i, "float64"), np.ones(3)])
    kv.push("v", kv.pull("w"))
    outs.append(kv.pull("v"))
    kv.push("w", np.full(3, 50.0), async_op=True)
assert [o.asnumpy()[0] for o in outs] == [i + 1 for i in range(20)]
assert kvstore._core.build_info()["engine"] == sys.argv[1]
""",
        engine,
        KVSTORE_ENGINE=engine,
    )
    assert_clean(done)


def test_an_engine_that_does_not_exist_is_an_error_not_a_default():
    done = run_script("import kvstore; kvstore.create()", KVSTORE_ENGINE="fast")
    assert done.returncode == 1
    assert "InvalidArgumentError" in done.stderr
    assert "fast" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [("KVSTORE_NUM_THREADS", "-1"), ("KVSTORE_NUM_THREADS", "two"), ("KVSTORE_ENGINE_SEED", "x")],
)
def test_a_setting_that_does_not_parse_is_an_error(variable, value):
    done = run_script(
        "import kvstore; kvstore.create()", **{"KVSTORE_ENGINE": "stepping", variable: value}
    )
    assert done.returncode == 1
    assert "InvalidArgumentError" in done.stderr
    assert variable in done.stderr
    assert value in done.stderr


def test_a_store_works_in_a_process_that_was_spawned():
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(total_in_a_store, ([1.0, 2.0, 3.0],)) == 6


def total_in_a_store(numbers):
    import numpy as np

    import kvstore

    with kvstore.create("local") as kv:
        kv.init("sum", np.zeros(1))
        kv.push("sum", [np.array([n]) for n in numbers])
        return float(kv.pull("sum").asnumpy()[0])


def test_the_import_starts_no_thread():
    done = run_script(
        "import threading, os, kvstore;"
        "print(threading.active_count(), len(os.listdir('/proc/self/task'))"
        " if os.path.exists('/proc/self/task') else 1)",
        OPENBLAS_NUM_THREADS="1",
        OMP_NUM_THREADS="1",
    )
    assert_clean(done)
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the refusal is CPython's own from 3.12 on")
def test_sub_interpreters_are_refused():
    done = run_script(
        """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
interpreter = interpreters.create()
problem = None
try:
    problem = interpreters.run_string(interpreter, "import kvstore._core")
except Exception as error:
    problem = error
print("refused" if problem is not None else "accepted")
"""
    )
    assert "refused" in done.stdout, done.stdout + done.stderr
