"""What a process does to a store: fork, exit, Ctrl-C. Each in a process of its own."""

import sys

import pytest
from helpers import assert_clean, run_script

PRELUDE = """
import gc, os, signal, sys, threading, time
import numpy as np, kvstore

kv = kvstore.create(KIND)
kv.init(["v", "w"], [np.zeros(3), np.zeros(3)])

def hold(key):
    '''Holds the key in a daemon thread until the event that it returns is set.'''
    entered, release = threading.Event(), threading.Event()
    def updater(key, recv, stored):
        entered.set()
        release.wait()
    kv.set_updater(updater)
    threading.Thread(target=kv.push, args=(key, np.ones(3)), daemon=True).start()
    entered.wait()
    kv.set_updater(None)
    return release
"""


@pytest.fixture(params=["local", "device"])
def script(request):
    def run(text, *args, **options):
        return run_script(PRELUDE.replace("KIND", repr(request.param)) + text, *args, **options)

    return run


# ---------------------------------------------------------------------------------------- fork

FORK = """
def child(work):
    '''Runs work in a forked child; its exit status.'''
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            signal.alarm(30)
            work()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def closed(call):
    try:
        call()
    except kvstore.ClosedError as error:
        assert "fork" in str(error), error
    else:
        raise AssertionError("no ClosedError")
"""


def test_after_fork_the_childs_calls_on_old_objects_raise_closed_error(script):
    done = script(
        FORK
        + """
array = kvstore.ones(3, "float64")
handle = kv.push("w", np.ones(3), async_op=True)
handle.wait()

def work():
    closed(lambda: kv.push("w", np.ones(3)))
    closed(lambda: kv.pull("w", out=np.ones(3)))
    closed(lambda: kv.pull("w"))
    closed(lambda: kv.pushpull("w", np.ones(3)))
    closed(lambda: kv.init("new", np.ones(3)))
    closed(lambda: kv.delete("w"))
    closed(lambda: kv.keys())
    closed(lambda: kv.set_updater(None))
    closed(lambda: kv.push("w", np.ones(3), async_op=True))
    closed(array.asnumpy)
    closed(array.wait_to_read)
    kv.close()

assert child(work) == 0
kv.push("w", np.full(3, 5.0))
assert kv.pull("w").asnumpy().tolist() == [5, 5, 5]
"""
    )
    assert done.returncode == 0, done.stderr


def test_after_fork_a_new_store_works_in_the_child(script):
    done = script(
        FORK
        + """
big = np.ones(3_000_000, np.float32)
kv.init("big", big)
kv.push("big", [big, big])
kv.push("w", kvstore.ones(3, "float64"))
kvstore.wait_all()

def work():
    for kind in ("local", "device"):
        with kvstore.create(kind) as new:
            new.init(1, big)
            new.push(1, [big, big, big])
            out = kvstore.zeros(3_000_000)
            new.pull(1, out=out)
            assert (out.asnumpy() == 3).all()
            new.push(1, big, async_op=True).wait()
            new.set_updater(lambda key, recv, stored: stored.__iadd__(recv))
            new.push(1, big)
            kvstore.wait_all()

assert child(work) == 0
assert child(lambda: child(work) == 0 or 1 / 0) == 0
assert (kv.pull("big").asnumpy() == 2).all()
"""
    )
    assert done.returncode == 0, done.stderr


def test_fork_with_operations_pending_and_a_key_held_harms_neither(script):
    done = script(
        FORK
        + """
release = hold("w")
outs = [kv.pull("w") for _ in range(3)]
handle = kv.push("w", np.ones(3), async_op=True)
value = kvstore.full(3, 4, "float64")
kv.push("w", value)

def work():
    global outs, handle, value, kv
    for out in outs:
        closed(out.asnumpy)
    closed(handle.wait)
    closed(lambda: kv.pull("w", out=np.ones(3)))
    outs = handle = value = kv = None
    gc.collect()
    with kvstore.create("local") as new:
        new.init("w", np.ones(3))
        assert new.pull("w").asnumpy().tolist() == [1, 1, 1]
    kvstore.wait_all()

assert child(work) == 0
release.set()
handle.wait()
assert kv.pull("w").asnumpy().tolist() == [4, 4, 4]
assert [o.asnumpy().tolist() for o in outs] == [[0, 0, 0]] * 3
"""
    )
    assert done.returncode == 0, done.stderr


def test_fork_while_threads_are_in_calls_leaves_the_child_working(script):
    done = script(
        FORK
        + """
stop = threading.Event()
def use(key):
    while not stop.is_set():
        kv.push(key, np.ones(3))
        kv.push(key, kvstore.ones(3, "float64"))
        kv.pull(key).asnumpy()
threads = [threading.Thread(target=use, args=(key,)) for key in "vwvw"]
for thread in threads:
    thread.start()

def work():
    with kvstore.create("local") as new:
        new.init("w", np.ones(3))
        new.push("w", kvstore.full(3, 2, "float64"))
        assert new.pull("w").asnumpy().tolist() == [2, 2, 2]

statuses = [child(work) for _ in range(20)]
stop.set()
for thread in threads:
    thread.join()
assert statuses == [0] * 20, statuses
"""
    )
    assert done.returncode == 0, done.stderr


def test_a_forked_child_may_end_as_a_program_does(script):
    done = script(
        """
array = kvstore.ones(3, "float64")
kv.push("w", array)
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    new = kvstore.create("local")
    new.init(1, array.shape[0] * np.ones(1))
    pending = [new.pull(1) for _ in range(10)]
    sys.exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
"""
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------- exit

EXITS = {
    "nothing pending": "",
    "handles, arrays and views kept": """
handles = [kv.push("w", np.ones(3), async_op=True) for _ in range(50)]
arrays = [kv.pull("w") for _ in range(50)]
views = [np.asarray(a) for a in arrays]
numbers = [kvstore.ones(3) for _ in range(50)]
""",
    "operations pending": """
big = kvstore.ones(4_000_000)
kv.init("big", big)
for _ in range(10):
    kv.push("big", [big, big])
    out = kv.pull("big")
handle = kv.push("big", np.ones(4_000_000, np.float32), async_op=True)
""",
    "an updater kept": """
class Updater:
    def __init__(self):
        self.kv = kv
    def __call__(self, key, recv, stored):
        stored += recv
        self.kept = recv, stored
kv.set_updater(Updater())
kv.push("w", np.ones(3))
""",
    "a cycle of objects": """
class Node:
    pass
node = Node()
node.self, node.kv, node.array = node, kv, kv.pull("w")
kv.set_updater(lambda key, recv, stored, node=node: None)
""",
    "daemon threads in calls": """
def use(key):
    while True:
        kv.push(key, np.ones(3))
        kv.pull(key, out=np.ones(3))
        kv.push(key, kvstore.ones(3, "float64"))
        kv.push(key, np.ones(3), async_op=True)
def quietly(key):
    try:
        use(key)
    except kvstore.ClosedError:
        pass
for key in "vwvw":
    threading.Thread(target=quietly, args=(key,), daemon=True).start()
for _ in range(100):
    kv.push("w", np.ones(3))
""",
    "daemon threads in large calls": """
kv.init("big", np.zeros(1_000_000))
def use():
    try:
        while True:
            kv.pushpull("big", np.ones(1_000_000))
    except kvstore.ClosedError:
        pass
for _ in range(3):
    threading.Thread(target=use, daemon=True).start()
kv.push("big", np.ones(1_000_000))
""",
    "a daemon thread in an updater": """
release = hold("w")
""",
    "operations queued behind an updater that never ends": """
release = hold("w")
kv.push("w", kvstore.ones(3, "float64"))
out = kv.pull("w")
handle = kv.push("w", np.ones(3), async_op=True)
""",
    "a daemon thread that waits for a key": """
release = hold("w")
waiting = threading.Event()
def wait():
    waiting.set()
    try:
        kv.push("w", np.ones(3))
    except kvstore.ClosedError:
        pass
threading.Thread(target=wait, daemon=True).start()
waiting.wait()
""",
    "a thread that ends later": """
def use():
    threading.main_thread().join()
    for _ in range(100):
        kv.push("w", np.ones(3))
        kv.pull("w").asnumpy()
threading.Thread(target=use).start()
""",
    "calls in atexit": """
import atexit
def use():
    try:
        kv.push("w", np.ones(3))
        kv.pull("w").asnumpy()
        kv.push("w", np.ones(3), async_op=True).wait()
        kvstore.create("local").init(1, np.ones(3))
        kv.close()
    except kvstore.ClosedError:
        pass
atexit.register(use)
""",
    "calls in a finaliser": """
class Last:
    def __init__(self):
        self.kv, self.array, self.closed = kv, kv.pull("w"), kvstore.ClosedError
    def __del__(self):
        try:
            self.kv.push("w", self.array)
            self.array.asnumpy()
        except self.closed:
            pass
last = Last()
last.self = last
""",
    "a store closed with work pending": """
for _ in range(100):
    kv.push("w", kvstore.ones(3, "float64"))
kv.close()
""",
    "a loop that awaits": """
import asyncio
async def wait(handle):
    await handle
release = hold("w")
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
handle = kv.push("w", np.ones(3), async_op=True)
task = loop.create_task(wait(handle))
loop.call_soon(loop.stop)
loop.run_forever()
release.set()
loop.run_until_complete(task)
loop.close()
""",
    "sys.exit": "sys.exit(0)",
}


@pytest.mark.parametrize("text", EXITS.values(), ids=EXITS)
def test_the_interpreter_exits_cleanly_with(text):
    done = run_script(PRELUDE.replace("KIND", "'local'") + text, timeout=40)
    assert_clean(done)


def test_an_atexit_function_older_than_the_import_is_refused_new_work():
    done = run_script(
        """
import atexit
@atexit.register
def late():
    try:
        kv.push("w", np.ones(3))
    except kvstore.ClosedError:
        print("refused")
    else:
        print("worked")
import numpy as np, kvstore
kv = kvstore.create("local")
kv.init("w", np.ones(3))
"""
    )
    assert_clean(done)
    assert done.stdout in ("refused\n", "worked\n")


def test_an_unhandled_error_is_reported_once_and_the_exit_is_clean():
    done = run_script(PRELUDE.replace("KIND", "'local'") + "kv.pull('nokey')")
    assert done.returncode == 1
    assert done.stderr.count("KeyNotFoundError") == 1
    assert "Fatal" not in done.stderr


# -------------------------------------------------------------------------------------- Ctrl-C

INTERRUPT = """
def interrupt_when_waiting():
    '''Sends SIGINT when the main thread has stood at one instruction of `blocked` for a while.'''
    main, place, since = threading.main_thread().ident, None, time.monotonic()
    while True:
        frame = sys._current_frames()[main]
        now = frame.f_code, frame.f_lasti
        if now != place or now[0] is not blocked.__code__:
            place, since = now, time.monotonic()
        elif time.monotonic() - since > 0.1:
            break
        time.sleep(0.001)
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

def blocked(call):
    call()

def interrupted(call):
    thread = threading.Thread(target=interrupt_when_waiting)
    thread.start()
    try:
        blocked(call)
    except KeyboardInterrupt:
        took = time.monotonic() - sent
    else:
        raise AssertionError("no KeyboardInterrupt")
    thread.join()
    assert took < 1, took

from functools import partial
release = hold("w")
"""

WAITS = {
    "push": "partial(kv.push, 'w', np.full(3, 7.0))",
    "pull": "partial(kv.pull, 'w', out=out)",
    "pushpull": "partial(kv.pushpull, 'w', np.full(3, 7.0), out=out)",
    "push of a list": "partial(kv.push, ['w'], [np.full(3, 7.0)])",
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
def test_ctrl_c_ends_a_wait_within_a_second_and_cancels_the_call(script, call):
    done = script(
        INTERRUPT
        + f"""
out = np.full(3, 9.0)
interrupted({call})
release.set()
assert kv.pull("w").asnumpy().tolist() == [0, 0, 0]
assert out.tolist() == [9, 9, 9]
kv.push("w", np.ones(3))
assert kv.pull("w").asnumpy().tolist() == [1, 1, 1]
"""
    )
    assert_clean(done)


ASYNC_WAITS = {
    "handle": "handle.wait",
    "handle with a timeout": "partial(handle.wait, 25)",
    "array": "array.asnumpy",
    "wait_to_read": "array.wait_to_read",
    "wait_all": "kvstore.wait_all",
}


@pytest.mark.parametrize("call", ASYNC_WAITS.values(), ids=ASYNC_WAITS)
def test_ctrl_c_ends_a_wait_for_an_operation_which_goes_on(script, call):
    done = script(
        INTERRUPT
        + f"""
handle = kv.push("w", np.full(3, 7.0), async_op=True)
array = kv.pull("w")
interrupted({call})
assert not handle.done()
release.set()
handle.wait()
assert array.asnumpy().tolist() == [7, 7, 7]
"""
    )
    assert_clean(done)


def test_ctrl_c_waits_for_its_turn_of_an_updater_and_does_not_run_it(script):
    done = script(
        INTERRUPT
        + """
ran = []
kv.set_updater(lambda key, recv, stored: ran.append(key))
interrupted(partial(kv.push, "w", np.ones(3)))
release.set()
kv.push("v", np.ones(3))
assert ran == ["v"], ran
kv.push("w", np.ones(3))
assert ran == ["v", "w"], ran
"""
    )
    assert_clean(done)


def test_a_signal_handler_that_returns_lets_the_wait_go_on(script):
    done = script(
        INTERRUPT
        + """
seen = []
def handler(number, frame):
    seen.append(number)
    release.set()
signal.signal(signal.SIGINT, handler)
thread = threading.Thread(target=interrupt_when_waiting)
thread.start()
blocked(partial(kv.push, "w", np.full(3, 7.0)))
thread.join()
assert seen == [signal.SIGINT]
assert kv.pull("w").asnumpy().tolist() == [7, 7, 7]
"""
    )
    assert_clean(done)


def test_a_signal_handler_may_use_the_store(script):
    done = script(
        INTERRUPT
        + """
def handler(number, frame):
    kv.push("v", np.full(3, 3.0))
    kv.push("v", kvstore.full(3, 4, "float64"))
    assert kv.pull("v").asnumpy().tolist() == [4, 4, 4]
    release.set()
signal.signal(signal.SIGINT, handler)
thread = threading.Thread(target=interrupt_when_waiting)
thread.start()
blocked(partial(kv.push, "w", np.full(3, 7.0)))
thread.join()
assert kv.pull("w").asnumpy().tolist() == [7, 7, 7]
"""
    )
    assert_clean(done)


# --------------------------------------------------------------------------- other ways to start


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
    import kvstore
    import numpy as np

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
