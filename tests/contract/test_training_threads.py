"""Training that several threads change at once, and what optimizers' own code may do to a store."""

import gc
import weakref

import numpy as np
import pytest
from helpers import Worker, held, pulled, same, sparse

import kvstore
from kvstore import optimizer

WIDE = (100_000, 64)


def rows(ids, number=1.0):
    return sparse(dict.fromkeys(ids, number), WIDE, "float32")


def push_that_waits_for_its_first_key(kv, value):
    """A thread whose push of ['a', 'b'] has been counted, but has to wait for 'a'."""

    def push():
        view = value.data  # while there is one, a push is not asynchronous
        kv.push(["a", "b"], [rows([0]), value])
        assert len(view) > 0

    worker = Worker(push)
    worker.wait_in_call(push)
    return worker


def test_a_push_of_an_optimizer_that_was_replaced_meanwhile_finds_other_rows(kv):
    kv.init(["a", "b"], [rows([0])] * 2)
    with held(kv, "a"):
        kv.set_optimizer(optimizer.SGD(lr=1.0, momentum=0.5))
        for _ in range(3):
            kv.push("b", rows([0, 1]))
        worker = push_that_waits_for_its_first_key(kv, rows(range(500, 1000)))
        kv.set_optimizer(optimizer.AdaGrad(lr=1.0, eps=0.0))
        kv.push("b", rows(range(2000, 2500)))
    worker.result()
    kv.push("b", rows([0, 500, 2000, 3000]))
    b = kv.row_sparse_pull("b", row_ids=[1, 500, 501, 2000, 2001, 3000]).data[:, 0]
    adagrad = -1 - 1 / np.sqrt(np.float32(2))
    assert np.allclose(b, [-4.25, -2, -1, adagrad, -1, -1], rtol=1e-6)


def test_an_assignment_from_before_the_optimizer_may_replace_the_rows(kv):
    kv.init(["a", "b"], [rows([0])] * 2)
    with held(kv, "a"):
        worker = push_that_waits_for_its_first_key(kv, rows(range(500, 1000)))
        kv.set_optimizer(optimizer.SGD(lr=1.0, momentum=0.5))
        kv.push("b", rows([3, 500]))
    worker.result()
    for _ in range(2):
        kv.push("b", rows([500, 999, 2000]))
    b = kv.row_sparse_pull("b", row_ids=[0, 500, 501, 999, 2000]).data[:, 0]
    assert b.tolist() == [0, 1 - 1.5 - 1.75, 1, 1 - 1 - 1.5, -1 - 1.5]


def test_a_number_that_takes_state_away_and_gives_it_back_leaves_room_for_all_rows(kv):
    kv.init("w", kvstore.RowSparse.zeros(WIDE))
    kv.set_optimizer(optimizer.SGD(lr=1.0, momentum=0.5))
    kv.push("w", rows([0]))
    kv.set_optimizer_params(momentum=0)
    kv.push("w", rows(range(1, 500)))
    kv.set_optimizer_params(momentum=0.5)
    kv.push("w", rows(range(500)))
    assert kv.pull("w").data[:, 0].tolist() == [-2.5] + [-2.0] * 499


@pytest.mark.parametrize("value", [np.ones(4, "float32"), rows([1])], ids=["dense", "row-sparse"])
def test_state_keeps_its_meaning_when_the_same_class_keeps_more_of_it(kv, value):
    kv.init("w", value)
    kv.set_optimizer(optimizer.LBSGD(lr=1.0, momentum=0.5, batch_scale=1))
    kv.push("w", value)
    kv.set_optimizer(optimizer.LBSGD(lr=1.0, momentum=0.5, batch_scale=4))
    slots = kv._states_export()["keys"][0][3]
    assert list(slots) == ["m"]
    kv.push("w", value)
    slots = kv._states_export()["keys"][0][3]
    assert {name: abs(array).max() for name, array in slots.items()} == {"sum": 1.0, "m": 1.0}


def test_a_schedule_that_pushes_into_its_store_is_refused(kv):
    kv.init(["a", "b"], [np.zeros(3)] * 2)

    def schedule(num_update):
        kv.push("b", np.ones(3))
        return 1.0

    kv.set_optimizer(optimizer.SGD(lr_scheduler=schedule))
    with pytest.raises(kvstore.InvalidArgumentError, match="inside the schedule"):
        kv.push("a", np.ones(3))
    assert same(pulled(kv, "a"), np.zeros(3))
    assert same(pulled(kv, "b"), np.zeros(3))


def test_a_schedule_may_push_into_another_store(kv):
    other = kvstore.create("local")
    for store in (kv, other):
        store.init("a", np.zeros(3))

    def schedule(num_update):
        other.push("a", np.full(3, num_update))
        return 1.0

    kv.set_optimizer(optimizer.SGD(lr_scheduler=schedule))
    with pytest.raises(kvstore.ArrayTypeError):
        kv.push("a", np.ones(3))  # the schedule's own error: an integer value
    other.delete("a")
    other.init("a", np.zeros(3, int))
    kv.push("a", np.ones(3))
    assert same(pulled(other, "a"), np.ones(3, int))
    assert same(pulled(kv, "a"), -np.ones(3))


def test_a_store_in_a_cycle_with_its_schedule_is_collected():
    store = kvstore.create("local")
    store.init("a", np.zeros(3))
    store.set_optimizer(optimizer.SGD(lr_scheduler=lambda num_update, kv=store: 0.1))
    store.push("a", np.ones(3))
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is None


class Index:
    def __index__(self):
        return 3


def test_waiting_states_and_python_optimizers_know_a_key_by_its_number(kv, tmp_path):
    @optimizer.register
    class Steps(optimizer.Optimizer):
        def create_state(self, key, weight):
            return np.zeros_like(weight)

        def update(self, key, weight, grad, state):
            state += 1
            weight[...] = state

    kv.init(3, np.zeros(2))
    kv.set_optimizer(optimizer.SGD(lr=1.0, momentum=0.5))
    kv.push(3, np.ones(2))
    kv.save_optimizer_states(tmp_path / "states")
    kv.delete(Index())
    kv.load_optimizer_states(tmp_path / "states")
    kv.init(Index(), np.zeros(2))
    kv.push(3, np.ones(2))
    assert same(pulled(kv, 3), np.full(2, -1.5))
    kv.set_optimizer(Steps())
    kv.push(3, np.ones(2))
    kv.delete(Index())
    kv.init(3, np.zeros(2))
    kv.push(3, np.ones(2))
    assert same(pulled(kv, 3), np.ones(2))


def test_states_that_wait_go_with_their_optimizer(kv, tmp_path):
    kv.init("w", np.zeros(2))
    kv.set_optimizer(optimizer.SGD(lr=1.0, momentum=0.5))
    kv.push("w", np.ones(2))
    kv.save_optimizer_states(tmp_path / "states")
    for replace in (
        lambda: kv.set_optimizer(optimizer.Adam()),
        lambda: kv.set_updater(None),
    ):
        kv.set_optimizer(optimizer.SGD(lr=1.0, momentum=0.5))
        kv.delete("w")
        kv.load_optimizer_states(tmp_path / "states")
        replace()
        kv.init("w", np.zeros(2))
    assert "w" in kv


def test_rows_without_elements_load_at_once_however_many_there_are(kv, tmp_path):
    shape = (2**58, 0)
    value = kvstore.RowSparse(np.ones((1, 0)), [2**58 - 1], shape)
    kv.init("w", kvstore.RowSparse.zeros(shape, "float64"))
    kv.set_optimizer(optimizer.SGD(lr=1.0, momentum=0.5))
    kv.push("w", value)
    kv.save_optimizer_states(tmp_path / "states")
    kv.load_optimizer_states(tmp_path / "states")
    assert kv.pull("w").num_rows == 1


def test_a_push_that_ended_early_has_not_counted_the_keys_that_it_left():
    with kvstore.create("local", timeout=0.1) as kv:
        kv.init(["a", "b"], [np.zeros(3)] * 2)
        with held(kv, "a"):
            kv.set_optimizer(optimizer.SGD(lr=1.0))
            with pytest.raises(kvstore.TimeoutError):
                kv.push(["b", "a"], [np.ones(3)] * 2)
        assert [entry[:2] for entry in kv._states_export()["keys"]] == [("b", 1)]
