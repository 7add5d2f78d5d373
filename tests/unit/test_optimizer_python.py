"""Optimizers in Python: derived from kvstore.optimizer.Optimizer, run by the store as updaters."""

import threading

import numpy as np
import pytest
from samples import Momentum, Plain

import kvstore
from kvstore.optimizer import SGD, Optimizer

ONES = np.ones(2, np.float32)


def refused(*, match, of=kvstore.InvalidArgumentError):
    return pytest.raises(of, match=match)


def value(kv, key="w"):
    return kv.pull(key).asnumpy().tolist()


def test_a_users_class_updates(kv):
    kv.set_optimizer(Plain(lr=0.5, wd=0.5, lr_mult={1: 2}, wd_mult={2: 0}))
    kv.init([1, 2], [ONES] * 2)
    kv.push([1, 2], [ONES, [ONES, ONES]])
    assert value(kv, 1) == [-0.5, -0.5]
    assert value(kv, 2) == [0, 0]


def test_a_users_class_sees_counts_and_the_scheduled_rate(kv):
    seen = []

    class Looking(Plain):
        def update(self, key, weight, grad, state):
            seen.append((key, self.update_count(key), self.num_update, self.lr, self.get_lr(key)))

    kv.set_optimizer(Looking(lr_scheduler=lambda n: n / 4, lr_mult={"b": 2}, begin_num_update=3))
    kv.init(["a", "b"], [ONES] * 2)
    kv.push(["a", "b"], [ONES] * 2)
    kv.push("a", ONES)
    assert seen == [("a", 4, 4, 1, 1), ("b", 4, 4, 1, 2), ("a", 5, 5, 1.25, 1.25)]
    outside = kv.optimizer
    assert outside.num_update == 3
    for helper in (outside.get_lr, outside.update_count):
        with refused(match="is for update"):
            helper("a")


def test_counts_are_those_of_each_store():
    counted = []

    class Counting(Plain):
        def update(self, key, weight, grad, state):
            counted.append(self.update_count(key))

    one = Counting()
    with kvstore.create() as first, kvstore.create() as second:
        for kv in (first, second, first):
            if kv.optimizer is None:
                kv.set_optimizer(one)
                kv.init("w", ONES)
            kv.push("w", ONES)
    assert counted == [1, 1, 2]


def test_an_update_may_push_to_another_key(kv):
    class Nested(Plain):
        def update(self, key, weight, grad, state):
            before = self.update_count(key)
            if key == "a":
                kv.push("b", grad)
            assert (before, self.update_count(key)) == (1, 1)
            super().update(key, weight, grad, state)

    kv.set_optimizer(Nested(lr=0.5, lr_mult={"b": 2}))
    kv.init(["a", "b"], [ONES] * 2)
    kv.push("a", ONES)
    assert (value(kv, "a"), value(kv, "b")) == ([0.5, 0.5], [0, 0])


def test_row_sparse_gradients_arrive_as_such(w):
    class Rows(Optimizer):
        def update(self, key, weight, grad, state):
            assert isinstance(grad, kvstore.RowSparse)
            weight[grad.indices] -= grad.data

    w.set_optimizer(Rows())
    w.push("w", kvstore.RowSparse(np.ones(1, np.float32), [1], (2,)))
    assert value(w) == [1, 0]


@pytest.mark.parametrize("method", ["create_state", "update"])
def test_exceptions_come_out_as_raised(w, method):
    error = RuntimeError("mine")

    def fail(*_):
        raise error

    w.set_optimizer(type("Failing", (Plain,), {method: fail})())
    with pytest.raises(RuntimeError) as caught:
        w.push("w", ONES)
    assert caught.value is error
    assert value(w) == [1, 1]


def test_an_update_that_returns_its_weight_is_told(w):
    class Returning(Optimizer):
        def update(self, key, weight, grad, state):
            return weight - grad

    w.set_optimizer(Returning())
    with refused(match=r"in place.*returns nothing, not array\(\[0\., 0\.\]"):
        w.push("w", ONES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, of the assignment
def test_a_weight_keeps_its_shape(w):
    class Reshaping(Optimizer):
        def update(self, key, weight, grad, state):
            weight.shape = (1, 2)

    w.set_optimizer(Reshaping())
    with refused(match="keeps its shape"):
        w.push("w", ONES)
    w.set_optimizer(Plain(lr=0.5))
    w.push("w", ONES)
    assert value(w) == [0.5, 0.5]


def test_classes_that_cannot_update_are_refused_when_set(w):
    class Nothing(Optimizer):
        pass

    class NoInit(Plain):
        def __init__(self):
            pass

    with refused(match="Nothing has no update"):
        w.set_optimizer(Nothing())
    with refused(match=r"NoInit does not call super\(\).__init__"):
        w.set_optimizer(NoInit())


def test_integers_are_refused(kv):
    kv.init("i", np.ones(2, np.int32))
    for given in (Plain(), SGD()):
        kv.set_optimizer(given)
        with refused(match="floating types only", of=kvstore.ArrayTypeError):
            kv.push("i", np.ones(2, np.int32))


def test_the_same_class_again_keeps_its_state_and_another_begins_anew(w):
    w.set_optimizer(Momentum(lr=0.5))
    w.push("w", ONES)
    w.set_optimizer(Momentum(lr=0.25))
    w.push("w", ONES)  # m = 0.5*-0.5 - 0.25
    assert value(w) == [0, 0]
    w.set_optimizer(Plain(lr=0.25))
    w.set_optimizer(Momentum(lr=0.25))
    w.push("w", ONES)
    assert value(w) == [-0.25, -0.25]


def test_a_key_that_is_forgotten_begins_anew(w):
    w.set_optimizer(Momentum(lr=0.5))
    w.push("w", ONES)
    w._optimizer_owner().forget(["w", "other"])
    w.push("w", ONES)
    assert value(w) == [0, 0]
    assert w._optimizer_owner().progress.counts == {"w": 1}


def test_attributes_of_a_users_class_change_on_a_copy(w):
    given = Momentum(lr=0.5)
    w.set_optimizer(given)
    w.push("w", ONES)
    w.set_optimizer_params(momentum=0.25, lr=0.25)
    assert (given.momentum, given.lr) == (0.5, 0.5)
    assert (w.optimizer.momentum, w.optimizer.lr) == (0.25, 0.25)
    w.push("w", ONES)  # m = 0.25*-0.5 - 0.25
    assert value(w) == [0.125, 0.125]
    for name in ("nomentum", "_names", "lr_scheduler"):
        with refused(match=f"no number '{name}'"):
            w.set_optimizer_params(**{name: 1})
    with pytest.raises(AttributeError, match="fixed"):
        given.lr = 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_multi_precision_of_a_users_class_updates_in_float32(kv, dtype):
    seen = set()

    class Small(Plain):
        def update(self, key, weight, grad, state):
            seen.update((weight.dtype.name, grad.dtype.name))
            weight -= np.float32(2**-12)

    kv.set_optimizer(Small(multi_precision=True))
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    kind = np.dtype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    kv.init("w", np.ones(2, kind))
    for _ in range(16):
        kv.push("w", np.ones(2, kind))
    assert seen == {"float32"}
    assert kv.pull("w").asnumpy().astype(np.float32).tolist() == [1 - 2**-8] * 2


def test_torch_gradients_reach_a_users_class_as_numpy(w):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    w.set_optimizer(Plain(lr=0.5))
    w.push("w", torch.ones(2))
    assert value(w) == [0.5, 0.5]


def test_threads_count_all_pushes(kv):
    kv.set_optimizer(Plain(lr=0))
    keys = list(range(8))
    kv.init(keys, [ONES] * 8)

    def work(key):
        for _ in range(50):
            kv.push(key, ONES)

    threads = [threading.Thread(target=work, args=(key % 4,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress = kv._optimizer_owner().progress
    assert progress.counts == dict.fromkeys(range(4), 100)
    assert progress.num_update == 100
