"""Calls of the store from inside an updater."""

import threading

import numpy as np
import pytest
from helpers import LONG, Worker, pulled

import kvstore


def inside(kv, call, key="w"):
    """What `call` raises inside the updater of `key`; None if it works."""
    caught = []

    def updater(updated, recv, stored):
        if updated != key or caught:
            return
        caught.append(None)
        try:
            call()
        except Exception as error:
            caught[0] = error

    kv.set_updater(updater)
    kv.push(key, np.ones(3))
    assert caught, "the updater did not run"
    return caught.pop()


@pytest.fixture
def vw(kv):
    kv.init(["v", "w"], [np.zeros(3), np.zeros(3)])
    return kv


SAME_KEY = {
    "push": lambda kv: kv.push("w", np.ones(3)),
    "push in list": lambda kv: kv.push(["v", "w"], [np.ones(3), np.ones(3)]),
    "pull": lambda kv: kv.pull("w", out=np.ones(3)),
    "pull without out": lambda kv: kv.pull("w"),
    "pull into NDArray": lambda kv: kv.pull("w", out=kvstore.ones(3, "float64")),
    "pushpull": lambda kv: kv.pushpull("w", np.ones(3)),
    "async push": lambda kv: kv.push("w", np.ones(3), async_op=True),
    "async pull": lambda kv: kv.pull("w", out=np.ones(3), async_op=True),
    "delete": lambda kv: kv.delete("w"),
}


@pytest.mark.parametrize("call", SAME_KEY.values(), ids=SAME_KEY)
def test_a_call_on_the_same_key_raises(vw, call):
    error = inside(vw, lambda: call(vw))
    assert isinstance(error, kvstore.InvalidArgumentError)
    assert "'w'" in str(error)
    vw.set_updater(None)
    assert "w" in vw
    vw.push("w", np.full(3, 5.0))
    assert pulled(vw, "w").tolist() == [5, 5, 5]


OTHERS = {
    "push": lambda kv: kv.push("v", np.full(3, 4.0)),
    "pull": lambda kv: kv.pull("v", out=np.ones(3)),
    "pull without out": lambda kv: kv.pull("v").asnumpy(),
    "pushpull": lambda kv: kv.pushpull("v", np.ones(3)),
    "init": lambda kv: kv.init("new", np.ones(3)),
    "broadcast": lambda kv: kv.broadcast("new", np.ones(3), np.ones(3)),
    "delete": lambda kv: kv.delete("v"),
    "async": lambda kv: kv.push("v", np.ones(3), async_op=True).wait(),
    "describe": lambda kv: (kv.keys(), "w" in kv, kv.shape("w"), kv.dtype("w")),
    "barrier": lambda kv: kv.barrier(),
}


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_calls_on_other_keys_work(vw, call):
    assert inside(vw, lambda: call(vw)) is None


def test_an_updater_may_push_another_key_through_itself(vw):
    seen = []

    def updater(key, recv, stored):
        seen.append(key)
        stored += recv
        if key == "w":
            vw.push("v", recv)

    vw.set_updater(updater)
    vw.push("w", np.ones(3))
    assert seen == ["w", "v"]
    assert pulled(vw, "v").tolist() == [1, 1, 1]


def test_a_chain_of_updaters_that_comes_back_raises(vw):
    errors = []

    def updater(key, recv, stored):
        stored += recv
        try:
            vw.push({"w": "v", "v": "w"}[key], recv)
        except kvstore.InvalidArgumentError as error:
            errors.append((key, str(error)))

    vw.set_updater(updater)
    vw.push("w", np.ones(3))
    assert [key for key, _ in errors] == ["v"]
    assert "'w'" in errors[0][1]
    assert (pulled(vw, "v")[0], pulled(vw, "w")[0]) == (1, 1)


def test_another_store_works_inside_an_updater(vw):
    with kvstore.create("local") as other:
        other.init("w", np.zeros(3))
        assert inside(vw, lambda: other.push("w", np.ones(3))) is None
        assert pulled(other, "w").tolist() == [1, 1, 1]


def test_wait_all_raises_inside_an_updater(vw):
    assert isinstance(inside(vw, kvstore.wait_all), kvstore.InvalidArgumentError)
    kvstore.wait_all()


def test_wait_for_a_handle_queued_behind_the_updater_raises(vw):
    entered, queued = threading.Event(), threading.Event()
    handles, errors = [], []

    def updater(key, recv, stored):
        entered.set()
        assert queued.wait(LONG)
        for wait in (handles[0].wait, lambda: handles[0].wait(20)):
            try:
                wait()
            except kvstore.KVStoreError as error:
                errors.append(error)

    vw.set_updater(updater)
    worker = Worker(vw.push, "w", np.ones(3))
    assert entered.wait(LONG)
    vw.set_updater(None)
    handles.append(vw.push("w", np.full(3, 7.0), async_op=True))
    queued.set()
    worker.result()
    assert [type(e) for e in errors] == [kvstore.InvalidArgumentError] * 2
    handles[0].wait()
    assert pulled(vw, "w").tolist() == [7, 7, 7]


def test_read_of_an_array_queued_behind_the_updater_raises(vw):
    entered, queued = threading.Event(), threading.Event()
    outs, errors = [], []

    def updater(key, recv, stored):
        entered.set()
        assert queued.wait(LONG)
        for read in (outs[0].asnumpy, outs[0].wait_to_read, lambda: np.asarray(outs[0])):
            try:
                read()
            except Exception as error:
                errors.append(error)

    vw.set_updater(updater)
    worker = Worker(vw.push, "w", np.ones(3))
    assert entered.wait(LONG)
    vw.set_updater(None)
    outs.append(vw.pull("w"))
    queued.set()
    worker.result()
    assert len(errors) == 3
    assert all(isinstance(e, kvstore.InvalidArgumentError) for e in errors[:2])
    assert outs[0].asnumpy().tolist() == [0, 0, 0]


@pytest.mark.parametrize("call", ["push", "pull", "pushpull", "delete"])
def test_a_cycle_over_two_threads_raises_in_one_of_them(call):
    with kvstore.create("local", timeout=LONG) as kv:
        kv.init(["a", "b"], [np.zeros(3), np.zeros(3)])
        both = threading.Barrier(2, timeout=LONG)
        depth = threading.local()
        raised = []

        def updater(key, recv, stored):
            stored += recv
            if getattr(depth, "inside", False):
                return
            depth.inside = True
            both.wait()
            other = {"a": "b", "b": "a"}[key]
            try:
                if call == "delete":
                    kv.pull(other, out=np.empty(3))
                    kv.push(other, recv)
                elif call == "pull":
                    kv.pull(other, out=np.empty(3))
                else:
                    getattr(kv, call)(other, recv.copy())
            except kvstore.KVStoreError as error:
                raised.append((other, error))

        kv.set_updater(updater)
        workers = [Worker(kv.push, key, np.ones(3)) for key in "ab"]
        for worker in workers:
            worker.result()
        assert [type(e) for _, e in raised] == [kvstore.InvalidArgumentError]
        assert f"'{raised[0][0]}'" in str(raised[0][1])
        kv.set_updater(None)
        kv.push(["a", "b"], [np.ones(3), np.ones(3)])


def test_a_cycle_over_three_threads_raises_in_one_of_them():
    with kvstore.create("device", timeout=LONG) as kv:
        kv.init([0, 1, 2], [np.zeros(3)] * 3)
        all_in = threading.Barrier(3, timeout=LONG)
        depth = threading.local()
        raised = []

        def updater(key, recv, stored):
            if getattr(depth, "inside", False):
                return
            depth.inside = True
            all_in.wait()
            try:
                kv.push((key + 1) % 3, recv)
            except kvstore.KVStoreError as error:
                raised.append(error)

        kv.set_updater(updater)
        workers = [Worker(kv.push, key, np.ones(3)) for key in range(3)]
        for worker in workers:
            worker.result()
        assert [type(e) for e in raised] == [kvstore.InvalidArgumentError]


def test_set_updater_from_inside_takes_effect_afterwards(vw):
    def updater(key, recv, stored):
        vw.set_updater(None)
        stored += 10 * recv

    vw.set_updater(updater)
    vw.push("w", np.ones(3))
    assert pulled(vw, "w").tolist() == [10, 10, 10]
    vw.push("w", np.ones(3))
    assert pulled(vw, "w").tolist() == [1, 1, 1]


def test_a_list_push_keeps_the_updater_that_it_began_with(vw):
    def updater(key, recv, stored):
        vw.set_updater(None)
        stored += 10 * recv

    vw.set_updater(updater)
    vw.push(["v", "w"], [np.ones(3), np.ones(3)])
    assert (pulled(vw, "v")[0], pulled(vw, "w")[0]) == (10, 10)


def test_close_from_inside_takes_effect_afterwards(vw):
    out = np.empty(3)

    def updater(key, recv, stored):
        vw.close()
        stored += recv

    vw.set_updater(updater)
    vw.pushpull("w", np.ones(3), out=out)
    assert out.tolist() == [1, 1, 1]
    with pytest.raises(kvstore.ClosedError):
        vw.pull("w")


def test_the_last_reference_to_the_store_may_go_inside_its_updater():
    stores = [kvstore.create("local")]
    stores[0].init("w", np.zeros(3))
    out = np.empty(3)

    def updater(key, recv, stored):
        stores.clear()
        stored += recv

    stores[0].set_updater(updater)
    stores[0].pushpull("w", np.ones(3), out=out)
    assert out.tolist() == [1, 1, 1]
