"""Python updaters: what they see, when they run, what an error in one does."""

import gc
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest
from helpers import pulled, same

import kvstore


class Boom(Exception):
    pass


def accumulate(key, recv, stored):
    stored += recv


def test_an_updater_changes_the_stored_value_in_place(kv):
    kv.init("w", np.full(3, 10.0))
    kv.set_updater(accumulate)
    kv.push("w", np.ones(3))
    kv.push("w", [np.ones(3), np.full(3, 5.0)])
    assert pulled(kv, "w").tolist() == [17, 17, 17]


def test_the_old_name_of_set_updater_works(kv):
    kv.init("w", np.zeros(3))
    kv._set_updater(accumulate)
    kv.push("w", np.ones(3))
    kv.push("w", np.ones(3))
    assert pulled(kv, "w").tolist() == [2, 2, 2]


def test_none_restores_assignment(kv):
    kv.init("w", np.zeros(3))
    kv.set_updater(accumulate)
    kv.push("w", np.ones(3))
    kv.set_updater(None)
    kv.push("w", np.full(3, 5.0))
    assert pulled(kv, "w").tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    "updater",
    [accumulate, lambda k, r, s: s.__iadd__(r), type("U", (), {"__call__": accumulate})],
    ids=["function", "lambda", "class"],
)
def test_any_callable_may_be_an_updater(kv, updater):
    if isinstance(updater, type):
        updater = type("U", (), {"__call__": lambda self, k, r, s: accumulate(k, r, s)})()
    kv.init("w", np.zeros(3))
    kv.set_updater(updater)
    kv.push("w", np.ones(3))
    assert pulled(kv, "w").tolist() == [1, 1, 1]


def test_an_updater_is_called_with_key_sum_and_stored(kv):
    kv.init(["a", "b"], [np.full((2, 2), 4, np.int32), np.zeros(3, np.float16)])
    seen = []

    def updater(key, recv, stored):
        seen.append((key, recv.copy(), stored.copy()))

    kv.set_updater(updater)
    kv.push(["b", "a"], [np.ones(3, np.float16), [np.ones((2, 2), np.int32)] * 3])
    (b, b_recv, b_stored), (a, a_recv, a_stored) = seen
    assert (b, a) == ("b", "a")
    assert same(b_recv, np.ones(3, np.float16))
    assert same(b_stored, np.zeros(3, np.float16))
    assert same(a_recv, np.full((2, 2), 3, np.int32))
    assert same(a_stored, np.full((2, 2), 4, np.int32))


@pytest.mark.parametrize(
    "value",
    [np.ones(3), kvstore.ones(3, "float64"), memoryview(np.ones(3)), np.ones(6)[::2]],
    ids=["NumPy", "NDArray", "memoryview", "strided"],
)
def test_host_values_of_any_library_reach_the_updater_as_numpy(kv, value):
    kv.init("w", np.zeros(3))
    kinds = []

    def updater(key, recv, stored):
        kinds.append((type(recv), type(stored)))
        stored += recv

    kv.set_updater(updater)
    kv.push("w", value)
    kv.push("w", [value, np.ones(3)])
    assert kinds == [(np.ndarray, np.ndarray)] * 2
    assert pulled(kv, "w").tolist() == [3, 3, 3]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_recv_is_never_the_callers_array(kv, number):
    kv.init("w", np.zeros(1000))
    values = [np.ones(1000) for _ in range(number)]

    def updater(key, recv, stored):
        assert not any(np.shares_memory(recv, v) for v in values)
        assert not any(np.shares_memory(stored, v) for v in values)
        assert not np.shares_memory(recv, stored)
        assert recv.flags.writeable
        assert stored.flags.writeable
        recv[:] = 99
        stored[:] = 1

    kv.set_updater(updater)
    kv.push("w", values)
    kv.pushpull("w", values, out=np.empty(1000))
    assert all((v == 1).all() for v in values)


def test_an_ndarray_that_was_pushed_is_not_changed_by_the_updater(kv):
    kv.init("w", np.zeros(3))
    value = kvstore.array(np.ones(3))

    def updater(key, recv, stored):
        recv[:] = 99

    kv.set_updater(updater)
    kv.push("w", value)
    assert value.asnumpy().tolist() == [1, 1, 1]


@pytest.mark.parametrize("key", [3, -(2**63), "w"])
def test_an_updater_gets_a_plain_key(kv, key):
    class Name(str):
        __slots__ = ()

    kv.init(key, np.zeros(1))
    seen = []
    kv.set_updater(lambda key, recv, stored: seen.append(key))
    kv.push(np.int64(key) if isinstance(key, int) else Name(key), np.ones(1))
    assert seen == [key]
    assert type(seen[0]) is type(key)


def test_an_updater_runs_in_the_pushing_thread(kv):
    kv.init("w", np.zeros(1))
    seen = []
    kv.set_updater(lambda key, recv, stored: seen.append(threading.get_ident()))
    kv.push("w", np.ones(1))
    kv.push("w", kvstore.ones(1, "float64"))
    kv.push("w", np.ones(1), async_op=True).wait()
    assert seen == [threading.get_ident()] * 3


def test_an_updater_runs_for_zero_dimensional_and_empty_values(kv):
    kv.init([0, 1], [np.array(3.0), np.empty((0, 4))])
    shapes = []

    def updater(key, recv, stored):
        shapes.append((recv.shape, stored.shape))
        stored += recv

    kv.set_updater(updater)
    kv.push([0, 1], [np.array(2.0), np.empty((0, 4))])
    assert shapes == [((), ()), ((0, 4), (0, 4))]
    assert pulled(kv, 0) == 5


def test_the_stored_value_may_be_written_in_any_way(kv):
    kv.init("w", np.zeros((2, 3)))

    def updater(key, recv, stored):
        stored[0] = recv[1]
        stored[1, 2] = 7
        np.add(stored, 1, out=stored)

    kv.set_updater(updater)
    kv.push("w", np.arange(6.0).reshape(2, 3))
    assert pulled(kv, "w").tolist() == [[4, 5, 6], [1, 1, 8]]


def test_an_updater_that_deforms_its_arguments_harms_nothing(kv):
    kv.init("w", np.zeros((2, 3)))
    shapes = []

    def updater(key, recv, stored):
        shapes.append((recv.shape, recv.dtype, recv.flags.writeable, stored.shape, stored.dtype))
        stored += recv
        recv.flags.writeable = False
        with warnings.catch_warnings():  # newer versions of NumPy would rather not have it done
            warnings.simplefilter("ignore", DeprecationWarning)
            stored.shape = 6
            recv.shape = (3, 2)

    kv.set_updater(updater)
    for _ in range(3):
        kv.push("w", np.ones((2, 3)))
    f8 = np.dtype(np.float64)
    assert shapes == [((2, 3), f8, True, (2, 3), f8)] * 3
    assert pulled(kv, "w").tolist() == [[3, 3, 3]] * 2


def test_the_result_of_an_updater_is_dropped(kv):
    kv.init("w", np.ones(3))
    kv.set_updater(lambda key, recv, stored: np.full(3, 50.0))
    kv.push("w", np.ones(3))
    assert pulled(kv, "w").tolist() == [1, 1, 1]


def test_arguments_that_are_kept_stay_valid_memory(kv):
    kv.init("w", np.zeros(1000))
    kept = []

    def updater(key, recv, stored):
        kept.extend((recv, stored))
        stored += recv

    kv.set_updater(updater)
    for i in range(20):
        kv.push("w", np.full(1000, float(i)))
    assert (pulled(kv, "w") == 190).all()
    kv.delete("w")
    kv.init("w", np.full(1000, 5.0))
    kv.push("w", np.ones(1000))
    assert (pulled(kv, "w") == 6).all()
    kv.close()
    for array in kept:
        assert array.shape == (1000,)
        assert np.isfinite(array).all()
        array[:] = 3


def test_an_updater_is_let_go_when_it_is_replaced_or_the_store_closed(kv):
    class Updater:
        def __call__(self, key, recv, stored):
            stored += recv

    kv.init("w", np.zeros(3))
    gone = []
    for _ in range(2):
        updater = Updater()
        gone.append(weakref.ref(updater))
        kv.set_updater(updater)
        kv.push("w", np.ones(3))
        del updater
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is not None
    kv.close()
    gc.collect()
    assert gone[1]() is None


def test_a_cycle_of_store_and_updater_is_collected():
    class Updater:
        def __init__(self, kv):
            self.kv = kv

        def __call__(self, key, recv, stored):
            stored += recv

    kv = kvstore.create("local")
    kv.init("w", np.zeros(3))
    updater = Updater(kv)
    gone = weakref.ref(updater)
    kv.set_updater(updater)
    kv.push("w", np.ones(3))
    del kv, updater
    gc.collect()
    assert gone() is None


# -------------------------------------------------------------------------------------- errors


def failing(at, error=Boom):
    def updater(key, recv, stored):
        stored[0] += recv[0]
        if key == at:
            raise error(f"at {key}")
        stored[1:] += recv[1:]

    return updater


def test_an_exception_comes_out_of_the_push_as_it_was_raised(kv):
    kv.init("w", np.zeros(3))
    boom = Boom("mine")

    def updater(key, recv, stored):
        raise boom

    kv.set_updater(updater)
    for call in (kv.push, kv.pushpull):
        with pytest.raises(Boom) as info:
            call("w", np.ones(3))
        assert info.value is boom
        frames = [entry.name for entry in info.traceback]
        assert "updater" in frames
    boom.__traceback__ = None


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit, MemoryError, StopIteration])
def test_exceptions_of_every_class_come_out(kv, error):
    kv.init("w", np.zeros(3))
    kv.set_updater(failing("w", error))
    with pytest.raises(error):
        kv.push("w", np.ones(3))
    kv.set_updater(None)
    kv.push("w", np.full(3, 4.0))
    assert pulled(kv, "w").tolist() == [4, 4, 4]


def test_what_a_failing_updater_has_written_stays(kv):
    kv.init("w", np.zeros(3))
    kv.set_updater(failing("w"))
    with pytest.raises(Boom):
        kv.push("w", np.ones(3))
    assert pulled(kv, "w").tolist() == [1, 0, 0]


def test_updated_keys_tells_which_keys_of_the_list_were_updated(kv):
    keys = ["a", "b", "c", "d"]
    kv.init(keys, [np.zeros(3)] * 4)
    kv.set_updater(failing("c"))
    with pytest.raises(Boom) as info:
        kv.push(keys, [np.ones(3)] * 4)
    assert list(info.value.updated_keys) == ["a", "b"]
    if sys.version_info >= (3, 11):
        assert any("'a'" in note and "'b'" in note for note in info.value.__notes__)
    assert [pulled(kv, k).tolist() for k in keys] == [
        [1, 1, 1],
        [1, 1, 1],
        [1, 0, 0],
        [0, 0, 0],
    ]


@pytest.mark.parametrize("failed", [1, 2])
def test_updated_keys_of_integer_keys_are_integers(kv, failed):
    kv.init([1, 2], [np.zeros(3)] * 2)
    kv.set_updater(failing(failed))
    with pytest.raises(Boom) as info:
        kv.push([1, 2], [np.ones(3)] * 2)
    assert list(info.value.updated_keys) == ([] if failed == 1 else [1])


def test_updated_keys_counts_a_key_that_stands_twice_once(kv):
    kv.init(["a", "b"], [np.zeros(3)] * 2)
    kv.set_updater(failing("b"))
    with pytest.raises(Boom) as info:
        kv.push(["a", "b", "a"], [np.ones(3)] * 3)
    assert list(info.value.updated_keys) == ["a"]


def test_a_single_key_push_that_failed_had_updated_nothing(kv):
    kv.init("w", np.zeros(3))
    kv.set_updater(failing("w"))
    with pytest.raises(Boom) as info:
        kv.push("w", np.ones(3))
    assert list(info.value.updated_keys) == []


def test_an_updater_with_the_wrong_signature_raises_pythons_error(kv):
    kv.init("w", np.zeros(3))
    kv.set_updater(lambda key, recv: None)
    with pytest.raises(TypeError, match="argument"):
        kv.push("w", np.ones(3))


def test_a_failed_pushpull_leaves_the_outs_of_the_failed_key(kv):
    kv.init("w", np.zeros(3))
    kv.set_updater(failing("w"))
    out = np.full(3, 9.0)
    with pytest.raises(Boom):
        kv.pushpull("w", np.ones(3), out=out)
    assert out.tolist() == [9, 9, 9]


def test_with_async_op_the_handle_is_finished_and_carries_the_error(kv):
    kv.init("w", np.zeros(3))
    boom = Boom("mine")

    def updater(key, recv, stored):
        raise boom

    kv.set_updater(updater)
    handle = kv.push("w", np.ones(3), async_op=True)
    assert handle.done()
    assert handle.exception() is boom
    for _ in range(2):
        with pytest.raises(Boom) as info:
            handle.wait()
        assert info.value is boom
    boom.__traceback__ = None


def test_with_async_op_and_a_working_updater_the_handle_is_finished(kv):
    kv.init("w", np.zeros(3))
    kv.set_updater(accumulate)
    handle = kv.push("w", np.ones(3), async_op=True)
    assert handle.done()
    assert handle.exception() is None
    handle.wait()
    assert pulled(kv, "w").tolist() == [1, 1, 1]


def test_with_async_op_wrong_arguments_raise_at_once(kv):
    kv.init("w", np.zeros(3))
    kv.set_updater(accumulate)
    with pytest.raises(ValueError):
        kv.push("w", np.ones(4), async_op=True)
