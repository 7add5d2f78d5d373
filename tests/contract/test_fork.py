"""Fork: what the child can do with its parent's objects, and with new ones."""

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
