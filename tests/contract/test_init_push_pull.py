"""The values: what init, push, pull, pushpull, broadcast and delete do to them."""

import numpy as np
import pytest
from helpers import contents, pulled, refused, same

import kvstore


def test_init_stores_a_copy(kv):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    kv.init("w", value)
    value[:] = -1
    assert pulled(kv, "w").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_push_without_updater_assigns_the_sum(kv):
    kv.init("w", np.full(3, 100.0))
    kv.push("w", [np.arange(3.0), np.ones(3), np.full(3, 10.0)])
    assert pulled(kv, "w").tolist() == [11, 12, 13]
    kv.push("w", np.array([1.0, 2.0, 3.0]))
    assert pulled(kv, "w").tolist() == [1, 2, 3]


def test_push_never_keeps_nor_changes_the_pushed_arrays(kv):
    kv.init("w", np.zeros(3))
    one, two = np.ones(3), np.full(3, 2.0)
    kv.push("w", one)
    one[:] = 7
    assert pulled(kv, "w").tolist() == [1, 1, 1]
    kv.push("w", [one, two])
    assert (one.tolist(), two.tolist()) == ([7, 7, 7], [2, 2, 2])
    one[:] = two[:] = 50
    assert pulled(kv, "w").tolist() == [9, 9, 9]


def test_pull_gives_a_copy(kv):
    kv.init("w", np.ones(3))
    pulled(kv, "w")[:] = 5
    new = kv.pull("w")
    np.asarray(new)[:] = 6
    assert pulled(kv, "w").tolist() == [1, 1, 1]


def test_pull_fills_every_out(kv):
    kv.init("w", np.arange(4))
    outs = [np.empty(4, np.int64) for _ in range(5)]
    assert kv.pull("w", out=outs) is None
    assert all(out.tolist() == [0, 1, 2, 3] for out in outs)


def test_pull_without_out_gives_a_new_ndarray(kv):
    kv.init("w", np.arange(6, dtype=np.int32).reshape(3, 2))
    pull = kv.pull("w")
    assert isinstance(pull, kvstore.NDArray)
    assert (pull.shape, np.dtype(pull.dtype)) == ((3, 2), np.int32)
    assert pull.asnumpy().tolist() == [[0, 1], [2, 3], [4, 5]]


def test_pull_of_a_list_without_out_gives_a_list_of_ndarrays(kv):
    kv.init(["a", "b"], [np.ones(2), np.zeros((1, 1), np.int8)])
    pulls = kv.pull(["b", "a", "b"])
    assert isinstance(pulls, list)
    assert [p.asnumpy().tolist() for p in pulls] == [[[0]], [1, 1], [[0]]]
    np.asarray(pulls[0])[:] = 4
    assert pulls[2].asnumpy().tolist() == [[0]]


def test_pushpull_sums_stores_and_copies_out(kv):
    kv.init("w", np.zeros(2))
    outs = [np.empty(2), np.empty(2)]
    assert kv.pushpull("w", [np.ones(2), np.full(2, 2.0)], out=outs) is None
    assert [o.tolist() for o in outs] == [[3, 3], [3, 3]]
    assert pulled(kv, "w").tolist() == [3, 3]


def test_pushpull_without_out_writes_back_into_the_values(kv):
    kv.init("w", np.zeros(2))
    values = [np.ones(2), np.full(2, 2.0), np.full(2, 3.0)]
    kv.pushpull("w", values)
    assert [v.tolist() for v in values] == [[6, 6]] * 3
    kv.pushpull("w", values[0])
    assert values[0].tolist() == [6, 6]


def test_pushpull_may_write_into_its_own_values(kv):
    kv.init("w", np.zeros(2))
    a, b = np.ones(2), np.full(2, 2.0)
    kv.pushpull("w", [a, b], out=[b, a])
    assert (a.tolist(), b.tolist()) == ([3, 3], [3, 3])
    kv.pushpull("w", a, out=a[:])
    assert a.tolist() == [3, 3]
    kv.pushpull("w", [a, a], out=a)
    assert a.tolist() == [6, 6]


def test_one_array_may_be_pushed_several_times_in_a_list(kv):
    kv.init("w", np.zeros(2))
    one = np.ones(2)
    kv.push("w", [one, one, one])
    assert pulled(kv, "w").tolist() == [3, 3]


@pytest.mark.one_process
def test_pushpull_with_an_updater_gives_the_updated_value(kv):
    kv.init("w", np.full(2, 10.0))

    def subtract(key, recv, stored):
        stored -= recv

    kv.set_updater(subtract)
    out = np.empty(2)
    kv.pushpull("w", [np.ones(2), np.ones(2)], out=out)
    assert out.tolist() == [8, 8]


def test_broadcast_is_init_then_pull(kv):
    outs = [np.empty(3), np.empty(3)]
    assert kv.broadcast("w", np.arange(3.0), outs) is None
    assert [o.tolist() for o in outs] == [[0, 1, 2]] * 2
    assert pulled(kv, "w").tolist() == [0, 1, 2]
    kv.broadcast(["a", "b"], [np.ones(1), [np.zeros(2)]], [[outs[0][:1]], [np.empty(2)]])
    assert outs[0][0] == 1


def test_broadcast_of_a_known_key_raises_as_init_does(kv):
    kv.init("w", np.zeros(3))
    out = np.full(3, 9.0)
    with refused(kv, kvstore.InvalidArgumentError, "'w'"):
        kv.broadcast("w", np.ones(3), out)
    assert out.tolist() == [9, 9, 9]


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (np.empty(4), kvstore.InvalidArgumentError),
        (np.empty(3, np.float32), kvstore.ArrayTypeError),
    ],
)
def test_a_refused_broadcast_has_not_initialised_the_key(kv, out, error):
    with refused(kv, error, "'w'"):
        kv.broadcast("w", np.ones(3), out)
    assert "w" not in kv
    kv.init(3, np.ones(1))


def test_second_init_is_refused(kv):
    kv.init("w", np.zeros(3))
    with refused(kv, kvstore.InvalidArgumentError, "'w'"):
        kv.init("w", np.ones(3))
    with refused(kv, kvstore.InvalidArgumentError, "'w'"):
        kv.init(["new", "w"], [np.ones(2), np.ones(3)])
    assert "new" not in kv
    with refused(kv, kvstore.InvalidArgumentError, "'new'"):
        kv.init(["new", "new"], [np.ones(2), np.ones(2)])
    assert "new" not in kv


def test_init_takes_exactly_one_value_a_key(kv):
    kv.init("w", [np.ones(2)])
    assert pulled(kv, "w").tolist() == [1, 1]
    with refused(kv, kvstore.InvalidArgumentError, "'v'", "2"):
        kv.init("v", [np.ones(2), np.ones(2)])
    with refused(kv, kvstore.InvalidArgumentError, "'v'"):
        kv.init(["v"], [[np.ones(2), np.ones(2)]])
    with refused(kv, kvstore.InvalidArgumentError, "'v'"):
        kv.broadcast("v", [np.ones(2), np.ones(2)], np.empty(2))


def test_delete_forgets_the_key(kv):
    kv.init(["a", "b"], [np.ones(3), np.zeros(2)])
    assert kv.delete("a") is None
    assert "a" not in kv
    assert list(kv.keys()) == ["b"]
    with refused(kv, kvstore.KeyNotFoundError, "'a'"):
        kv.pull("a")
    with refused(kv, kvstore.KeyNotFoundError, "'a'"):
        kv.delete("a")


def test_a_deleted_key_may_be_initialised_with_another_shape_and_type(kv):
    kv.init("a", np.ones(3))
    kv.delete("a")
    kv.init("a", np.zeros((2, 2), np.int8))
    assert kv.shape("a") == (2, 2)
    assert np.dtype(kv.dtype("a")) == np.int8


def test_keys_stand_in_the_order_of_their_init(kv):
    names = [f"k{i * 7919 % 101}" for i in range(101)]
    for name in names[:50]:
        kv.init(name, np.zeros(1))
    kv.init(names[50:], [np.zeros(1)] * 51)
    assert list(kv.keys()) == names
    for name in names[::3]:
        kv.delete(name)
    kv.init(names[0], np.zeros(1))
    kept = [n for i, n in enumerate(names) if i % 3]
    assert list(kv.keys()) == [*kept, names[0]]


def test_a_store_of_many_keys_keeps_them_apart(kv):
    kv.init(list(range(-500, 500)), [np.full(3, i) for i in range(-500, 500)])
    for i in range(-500, 500, 2):
        kv.delete(i)
    kv.push(list(range(-499, 500, 4)), [np.full(3, 7)] * 250)
    for i in range(-500, 500):
        if i % 2 == 0:
            assert i not in kv
        else:
            expected = 7 if (i + 499) % 4 == 0 else i
            assert pulled(kv, i).tolist() == [expected] * 3


def test_contains_shape_dtype_and_stype_describe_a_key(kv):
    kv.init("w", np.zeros((2, 0, 3), np.float16))
    assert "w" in kv
    assert "v" not in kv
    assert 3 not in kv
    assert kv.shape("w") == (2, 0, 3)
    assert np.dtype(kv.dtype("w")) == np.float16
    assert kv.stype("w") == "default"
    for call in (kv.shape, kv.dtype, kv.stype):
        with refused(kv, kvstore.KeyNotFoundError, "'v'"):
            call("v")
        with refused(kv, kvstore.ArrayTypeError, "3"):
            call(3)


def test_later_calls_see_earlier_ones_in_order(kv):
    kv.init(1, np.zeros(2))
    for i in range(100):
        kv.push(1, np.full(2, float(i)), priority=-i)
        assert pulled(kv, 1)[1] == i


@pytest.mark.parametrize("count", [0, 1, 3, 17, 1000, 70_000, 1_200_000])
def test_sums_of_any_length_are_right_in_every_element(kv, count):
    rng = np.random.default_rng(count)
    values = [rng.integers(-1000, 1000, count).astype(np.float32) for _ in range(5)]
    kv.init("w", np.zeros(count, np.float32))
    kv.push("w", values)
    assert same(pulled(kv, "w"), sum(values))
    outs = [np.empty(count, np.float32) for _ in range(3)]
    kv.pushpull("w", values[:2], out=outs)
    assert all(same(out, values[0] + values[1]) for out in outs)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 8, 9, 33, 200])
def test_any_number_of_values_is_summed_left_to_right(kv, number):
    rng = np.random.default_rng(number)
    values = [rng.standard_normal(129).astype(np.float32) for _ in range(number)]
    expected = values[0].copy()
    for value in values[1:]:
        expected += value
    kv.init("w", np.zeros(129, np.float32))
    kv.push("w", values)
    assert same(pulled(kv, "w"), expected)


def test_a_refused_call_leaves_outs_as_they_were(kv):
    kv.init(["a", "b"], [np.ones(2), np.ones(2)])
    before = contents(kv)
    out = np.full(2, 9.0)
    with pytest.raises(kvstore.InvalidArgumentError):
        kv.pushpull(["a", "b"], [np.zeros(2), np.zeros(2)], out=[out, np.empty(3)])
    assert out.tolist() == [9, 9]
    assert contents(kv) == before
