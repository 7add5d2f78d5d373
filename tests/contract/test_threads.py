"""Many threads in one store."""

import contextlib
import itertools
import threading

import numpy as np
import pytest
from helpers import LONG, Worker, held, pulled

import kvstore

THREADS = 4
ROUNDS = 300


def together(*functions):
    """Runs the functions, started at the same moment, each in a thread."""
    start = threading.Barrier(len(functions), timeout=LONG)

    def run(function):
        start.wait()
        return function()

    workers = [Worker(run, function) for function in functions]
    return [worker.result() for worker in workers]


@pytest.mark.parametrize("size", [4, 40_000])
def test_threads_with_keys_of_their_own_do_not_disturb_each_other(kv, size):
    rounds = ROUNDS if size < 1000 else 40
    kv.init(list(range(THREADS)), [np.zeros(size)] * THREADS)

    def work(key):
        out = np.empty(size)
        for i in range(rounds):
            kv.push(key, [np.full(size, float(key + i)), np.full(size, float(i))])
            kv.pull(key, out=out)
            assert (out == key + 2 * i).all()
            kv.pushpull(key, out)
            assert (out == key + 2 * i).all()

    together(*(lambda key=key: work(key) for key in range(THREADS)))


@pytest.mark.one_process
@pytest.mark.parametrize("size", [4, 40_000])
def test_updates_of_one_key_by_many_threads_are_all_counted(kv, size):
    rounds = ROUNDS if size < 1000 else 40
    kv.init("w", np.zeros(size, np.int64))

    def updater(key, recv, stored):
        stored += recv

    kv.set_updater(updater)

    def work(me):
        for i in range(rounds):
            kv.push("w", np.full(size, me * 1000 + i))

    together(*(lambda me=me: work(me) for me in range(THREADS)))
    total = sum(me * 1000 + i for me in range(THREADS) for i in range(rounds))
    assert (pulled(kv, "w") == total).all()


@pytest.mark.one_process
def test_lists_of_keys_in_opposite_order_do_not_block_each_other(kv):
    keys = list(range(6))
    kv.init(keys, [np.zeros(3, np.int64)] * 6)

    def updater(key, recv, stored):
        stored += recv

    kv.set_updater(updater)

    def work(order):
        for _ in range(ROUNDS // 3):
            kv.push(order, [np.ones(3, np.int64)] * 6)
            kv.pushpull(order, [np.ones(3, np.int64) for _ in order])

    together(*(lambda o=o: work(o) for o in (keys, keys[::-1], keys[3:] + keys[:3])))
    assert all((pulled(kv, k) == ROUNDS // 3 * 2 * 3).all() for k in keys)


def test_a_pull_never_sees_half_a_push(kv):
    size = 50_000
    kv.init("w", np.zeros(size))
    stop = threading.Event()

    def push():
        try:
            for i in range(60):
                kv.push("w", np.full(size, float(i)))
        finally:
            stop.set()

    def pull():
        out = np.empty(size)
        while not stop.is_set():
            kv.pull("w", out=out)
            assert out[0] == out[-1] == out[size // 2]
            assert (out == out[0]).all()

    together(push, pull, pull)


def test_keys_come_and_go_in_many_threads(kv):
    def work(me):
        for i in range(ROUNDS):
            key = f"{me}-{i % 10}"
            kv.init(key, np.full(i % 5, float(i)))
            assert pulled(kv, key).tolist() == [float(i)] * (i % 5)
            assert key in kv
            kv.keys()
            kv.delete(key)

    together(*(lambda me=me: work(me) for me in range(THREADS)))
    assert list(kv.keys()) == []


def test_one_of_many_inits_of_a_key_wins(kv):
    def work(me, key):
        try:
            kv.init(key, np.full(3, float(me)))
        except kvstore.InvalidArgumentError:
            return None
        return me

    for key in range(50):
        won = together(*(lambda me=me, key=key: work(me, key) for me in range(THREADS)))
        winners = [me for me in won if me is not None]
        assert len(winners) == 1
        assert pulled(kv, key).tolist() == [float(winners[0])] * 3


def test_a_key_deleted_by_another_thread_is_unknown_or_still_there(kv):
    kv.init("w", np.zeros(3))
    stop = threading.Event()

    def use():
        out = np.empty(3)
        while not stop.is_set():
            try:
                kv.push("w", np.ones(3))
                kv.pull("w", out=out)
                kv.pull("w").asnumpy()
            except kvstore.KeyNotFoundError:
                pass

    def come_and_go():
        try:
            for _ in range(ROUNDS):
                kv.delete("w")
                kv.init("w", np.zeros(3))
        finally:
            stop.set()

    together(use, use, come_and_go)


def test_close_in_one_thread_ends_the_calls_of_others_with_closed_error():
    for _ in range(20):
        kv = kvstore.create("local")
        kv.init("w", np.zeros(3))
        started = threading.Barrier(3, timeout=LONG)

        def use(kv=kv, started=started):
            kv.push("w", np.ones(3))
            started.wait()
            with pytest.raises(kvstore.ClosedError):
                for _ in itertools.count():
                    kv.push("w", np.ones(3))
                    kv.pull("w", out=np.empty(3))

        def close(kv=kv, started=started):
            started.wait()
            kv.close()

        together(use, use, close)


@pytest.mark.one_process
def test_the_updater_may_be_changed_while_others_push(kv):
    kv.init("w", np.zeros(3, np.int64))
    stop = threading.Event()

    def push():
        while not stop.is_set():
            kv.push("w", np.ones(3, np.int64))

    def change():
        try:
            for i in range(ROUNDS):
                kv.set_updater((lambda key, recv, stored: None) if i % 2 else None)
        finally:
            stop.set()

    together(push, push, change)


def test_lists_changed_by_another_thread_during_the_call_are_read_safely(kv):
    kv.init([0, 1], [np.zeros(3), np.zeros(3)])
    keys, values = [0, 1], [np.ones(3), [np.ones(3), np.ones(3)]]
    outs = [np.ones(3), np.ones(3)]
    stop = threading.Event()

    def change():
        while not stop.is_set():
            keys[:] = [0]
            values[:] = [np.ones(3)]
            values[:] = []
            keys[:] = [0, 1]
            values[:] = [np.ones(3), [np.ones(3), np.ones(3)]]

    def push():
        try:
            for _ in range(ROUNDS):
                try:
                    kv.push(keys, values)
                    kv.pushpull(keys, values, outs)
                except kvstore.InvalidArgumentError:
                    pass
        finally:
            stop.set()

    together(push, change, change)
    for key in (0, 1):
        assert pulled(kv, key)[0] in (0, 1, 2)


def test_an_array_reshaped_by_another_thread_is_read_safely(kv):
    kv.init("w", np.zeros((2, 3)))
    value = np.ones((2, 3))
    stop = threading.Event()

    def change():
        while not stop.is_set():
            value.resize((3, 2), refcheck=False)
            value.resize((2, 3), refcheck=False)

    def push():
        try:
            for _ in range(ROUNDS * 3):
                with contextlib.suppress(kvstore.InvalidArgumentError):
                    kv.push("w", value)
        finally:
            stop.set()

    together(push, change)
    assert pulled(kv, "w").shape == (2, 3)


def test_arrays_are_used_by_many_threads_at_once(kv):
    kv.init("w", np.zeros(100))
    shared = kvstore.ones(100, "float64")
    out = kvstore.zeros(100, "float64")

    def work():
        for _ in range(ROUNDS // 3):
            kv.push("w", [shared, shared])
            kv.pull("w", out=out)
            assert out.asnumpy()[0] in (0, 2)

    together(*[work] * THREADS)
    kvstore.wait_all()
    assert (out.asnumpy() == 2).all()


def test_handles_and_ndarrays_of_many_threads_end(kv):
    kv.init([0, 1], [np.zeros(10), np.zeros(10)])

    def work(me):
        handles = []
        for i in range(ROUNDS // 3):
            handles.append(kv.push(me % 2, np.full(10, float(i)), async_op=True))
            kv.push(i % 2, kvstore.full(10, i, "float64"))
            kv.pull(i % 2).asnumpy()
        for handle in handles:
            handle.wait()

    together(*(lambda me=me: work(me) for me in range(THREADS)))


@pytest.mark.one_process
def test_a_waiting_call_keeps_its_arrays_when_the_list_is_emptied(kv):
    kv.init("w", np.zeros(3))
    values = [np.full(3, 2.0), np.full(3, 3.0)]
    with held(kv, "w") as release:
        worker = Worker(kv.push, "w", values)
        worker.wait_in_call(Worker.run)
        values.clear()
        junk = [np.full(3, 50.0) for _ in range(100)]
        release.set()
        worker.result()
        del junk
    assert pulled(kv, "w").tolist() == [5, 5, 5]


class Reshaping:
    """A producer that reshapes another value of its call while it hands out its tensor."""

    def __init__(self, array, victim, shape):
        self.array, self.victim, self.shape = array, victim, shape

    def __dlpack__(self, **options):
        self.victim.shape = self.shape
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
def test_an_array_reshaped_by_a_later_value_of_the_call_is_seen_as_it_is(kv):
    kv.init("w", np.zeros((2, 3)))
    victim = np.ones(6)
    kv.push("w", [victim, Reshaping(np.ones((2, 3)), victim, (2, 3))])
    assert pulled(kv, "w").tolist() == [[2.0] * 3] * 2
    victim = np.ones((2, 3))
    with pytest.raises(kvstore.InvalidArgumentError, match=r"\(3, 2\).*\(2, 3\)"):
        kv.push("w", [victim, Reshaping(np.ones((2, 3)), victim, (3, 2))])
    assert pulled(kv, "w").tolist() == [[2.0] * 3] * 2
