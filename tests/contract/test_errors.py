"""The classes of errors, and that an error leaves everything as it was."""

import builtins
import pickle

import numpy as np
import pytest
from helpers import ALSO, contents, pulled, refused

import kvstore


@pytest.mark.parametrize("error", ALSO, ids=lambda e: e.__name__)
def test_every_error_is_also_what_a_python_user_would_catch(error):
    assert issubclass(error, kvstore.KVStoreError)
    assert issubclass(error, ALSO[error])
    assert issubclass(kvstore.KVStoreError, Exception)


def test_errors_of_kinds_to_come_have_their_classes():
    assert issubclass(kvstore.PeerLostError, (kvstore.KVStoreError, ConnectionError))
    assert issubclass(kvstore.PeerLostError, ConnectionError)
    assert issubclass(kvstore.DeviceError, kvstore.KVStoreError)
    assert issubclass(kvstore.DeviceError, RuntimeError)


def test_the_timeout_error_is_the_builtin_one_too():
    assert issubclass(kvstore.TimeoutError, builtins.TimeoutError)
    assert kvstore.TimeoutError is not builtins.TimeoutError


@pytest.mark.parametrize("error", ALSO, ids=lambda e: e.__name__)
def test_errors_can_be_pickled(error):
    back = pickle.loads(pickle.dumps(error("some text")))
    assert type(back) is error
    assert str(back) == "some text"


def test_the_text_of_a_key_error_stands_without_quotes():
    assert str(kvstore.KeyNotFoundError("key 'w'")) == "key 'w'"


UNKNOWN = {
    "push": lambda kv, key: kv.push(key, np.ones(3)),
    "push in list": lambda kv, key: kv.push(["a", key], [np.ones(3), np.ones(3)]),
    "pull": lambda kv, key: kv.pull(key, out=np.ones(3)),
    "pull without out": lambda kv, key: kv.pull(key),
    "pull of list without out": lambda kv, key: kv.pull(["a", key]),
    "pushpull": lambda kv, key: kv.pushpull(key, np.ones(3)),
    "async push": lambda kv, key: kv.push(key, np.ones(3), async_op=True),
    "NDArray": lambda kv, key: kv.push(key, kvstore.ones(3, "float64")),
    "delete": lambda kv, key: kv.delete(key),
    "shape": lambda kv, key: kv.shape(key),
    "dtype": lambda kv, key: kv.dtype(key),
    "stype": lambda kv, key: kv.stype(key),
}


@pytest.mark.parametrize("call", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_key_is_a_key_error_that_names_it(kv, call):
    kv.init("a", np.zeros(3))
    with refused(kv, kvstore.KeyNotFoundError, "^[^'\"].*'nokey'"):
        call(kv, "nokey")


@pytest.mark.parametrize("call", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_integer_key_is_named_too(kv, call):
    kv.init(1, np.zeros(3))
    with pytest.raises(kvstore.KVStoreError, match=r"-12345\b|'a'"):
        call(kv, -12345)


@pytest.mark.parametrize("call", UNKNOWN.values(), ids=UNKNOWN)
def test_the_other_key_type_is_a_type_error_that_names_the_key(kv, call):
    kv.init("a", np.zeros(3))
    with refused(kv, kvstore.ArrayTypeError, r"\b12345\b"):
        call(kv, 12345)


def test_before_the_first_init_every_key_is_unknown(kv):
    for key in (3, "w"):
        with refused(kv, kvstore.KeyNotFoundError, str(key)):
            kv.pull(key)


def test_a_list_push_with_one_bad_value_changes_no_key(kv):
    keys = [f"k{i}" for i in range(20)]
    kv.init(keys, [np.zeros(3)] * 20)
    before = contents(kv)
    for bad in (np.ones(4), np.ones(3, np.float32), None, [], [np.ones(3), np.ones(2)]):
        for at in (0, 7, 19):
            values = [np.ones(3)] * 20
            values[at] = bad
            with pytest.raises((ValueError, TypeError)):
                kv.push(keys, values)
            with pytest.raises((ValueError, TypeError)):
                kv.push(keys, values, async_op=True)
    assert contents(kv) == before


def test_an_init_with_one_bad_value_adds_no_key(kv):
    for bad in (np.ones(3, np.uint16), None, [], [np.ones(3)] * 2, "x"):
        with pytest.raises((ValueError, TypeError)):
            kv.init(["a", "b", "c"], [np.ones(3), bad, np.ones(3)])
        assert list(kv.keys()) == []


@pytest.mark.one_process
def test_a_bad_call_runs_no_updater(kv):
    kv.init(["a", "b"], [np.zeros(3), np.zeros(3)])
    ran = []
    kv.set_updater(lambda *args: ran.append(args))
    with pytest.raises(ValueError):
        kv.push(["a", "b"], [np.ones(3), np.ones(4)])
    with pytest.raises(KeyError):
        kv.push(["a", "c"], [np.ones(3), np.ones(3)])
    assert ran == []


def test_after_any_refusal_the_store_works_on(kv):
    kv.init("w", np.zeros(3))
    for _ in range(50):
        for bad in (np.ones(4), np.ones(3, int), None, "x", [], [[np.ones(3)]]):
            with pytest.raises((ValueError, TypeError)):
                kv.push("w", bad)
    kv.push("w", np.ones(3))
    assert pulled(kv, "w").tolist() == [1, 1, 1]


def test_an_updater_must_be_callable(kv):
    for bad in (3, "fn", [], np.ones(3)):
        with pytest.raises(TypeError):
            kv.set_updater(bad)
    kv.init("w", np.zeros(3))
    kv.push("w", np.ones(3))
    assert pulled(kv, "w").tolist() == [1, 1, 1]


@pytest.mark.parametrize("timeout", [float("nan"), 0, -1])
def test_a_wait_refuses_a_timeout_that_is_no_length_of_time(kv, timeout):
    kv.init("w", np.zeros(3))
    handle = kv.push("w", np.ones(3), async_op=True)
    with pytest.raises(ValueError, match="timeout"):
        handle.wait(timeout)
    with pytest.raises((TypeError, ValueError), match="timeout"):
        handle.wait("1")
    handle.wait()
