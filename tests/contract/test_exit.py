"""The end of the interpreter, with work pending and objects kept: exit status 0, not a word."""

import pytest
from helpers import PRELUDE, assert_clean, run_script

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
    done = run_script(PRELUDE.replace("KIND", "'local'") + text, timeout=20)
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
