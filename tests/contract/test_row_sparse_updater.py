"""Python updaters with row-sparse values: what they see, and what becomes of what they leave."""

import gc

import numpy as np
import pytest
from helpers import has_rows, pulled, same, sparse

import kvstore

SHAPE = (6, 2)


class Boom(Exception):
    pass


def zeros():
    return kvstore.RowSparse.zeros(SHAPE, "float64")


@pytest.fixture
def sd(kv):
    kv.init(["s", "d"], [sparse({1: 10, 4: 40}), np.asarray(sparse({1: 10, 4: 40}))])
    return kv


def test_recv_is_row_sparse_where_the_push_is_and_stored_where_the_key_is(sd):
    kinds = []
    sd.set_updater(lambda key, recv, stored: kinds.append((key, type(recv), type(stored))))
    sd.push("s", sparse({1: 1}))
    sd.push("d", sparse({1: 1}))
    sd.push("d", np.ones(SHAPE))
    sd.push(["d", "s"], [[sparse({1: 1}), sparse({2: 1})], [sparse({1: 1})] * 2])
    rows = kvstore.RowSparse
    assert kinds == [
        ("s", rows, rows),
        ("d", rows, np.ndarray),
        ("d", np.ndarray, np.ndarray),
        ("d", rows, np.ndarray),
        ("s", rows, rows),
    ]


def test_dense_and_row_sparse_pushes_of_a_key_may_alternate(sd):
    seen = []

    def updater(key, recv, stored):
        seen.append(np.asarray(recv)[:, 0].tolist())
        stored += np.asarray(recv)

    sd.set_updater(updater)
    for number in range(3):
        sd.push("d", np.full(SHAPE, number + 1.0))
        sd.push("d", sparse({number: 5}))
    right = [0.0] * 6
    assert seen[::2] == [[n + 1.0] * 6 for n in range(3)]
    assert seen[1::2] == [[*right[:n], 5.0, *right[n + 1 :]] for n in range(3)]
    assert pulled(sd, "d")[:, 0].tolist() == [11, 21, 11, 6, 46, 6]


def test_an_updater_gets_the_sum_and_the_stored_rows(sd):
    seen = []

    def updater(key, recv, stored):
        seen.append((recv.copy(), stored.copy(), recv.dtype, recv.shape, stored.shape))

    sd.set_updater(updater)
    sd.push("s", [sparse({0: 1, 4: 2}), sparse({4: 3, 5: 4})])
    sd.push("s", zeros())
    (recv, stored, *described), (nothing, again, *_) = seen
    assert has_rows(recv, {0: 1, 4: 5, 5: 4})
    assert has_rows(stored, {1: 10, 4: 40})
    assert described == [np.float64, SHAPE, SHAPE]
    assert has_rows(nothing, {})
    assert has_rows(again, {1: 10, 4: 40})


def test_stored_rows_can_be_changed_in_place(sd):
    def updater(key, recv, stored):
        at = np.searchsorted(stored.indices, recv.indices)
        stored.data[at] += recv.data

    sd.set_updater(updater)
    sd.push("s", sparse({4: 2}))
    sd.push("s", [sparse({1: 1}), sparse({4: 1})])
    assert has_rows(sd.pull("s"), {1: 11, 4: 43})


ASSIGNED = {
    "dense": (lambda recv: np.asarray(sparse({0: 1, 3: [0, 2]})), {0: 1, 3: [0, 2]}),
    "RowSparse": (lambda recv: sparse({0: 1, 2: 0}), {0: 1, 2: 0}),
    "recv": (lambda recv: recv, {1: 5, 5: 6}),
    "zero": (lambda recv: 0, {}),
    "no rows": (lambda recv: zeros(), {}),
    "NDArray": (lambda recv: kvstore.array(np.asarray(sparse({2: 7}))), {2: 7}),
}


@pytest.mark.parametrize(("value", "rows"), ASSIGNED.values(), ids=ASSIGNED)
@pytest.mark.parametrize("whole", [slice(None), ...], ids=["colon", "dots"])
def test_stored_rows_can_be_replaced(sd, value, rows, whole):
    sd.set_updater(lambda key, recv, stored: stored.__setitem__(whole, value(recv)))
    out = zeros()
    sd.pushpull("s", sparse({1: 5, 5: 6}), out=out)
    assert has_rows(out, rows)
    assert has_rows(sd.pull("s"), rows)
    sd.set_updater(None)
    sd.push("s", sparse({2: 1}))
    assert has_rows(sd.pull("s"), {2: 1})


def test_the_next_push_finds_what_the_last_one_left(sd):
    def updater(key, recv, stored):
        stored[:] = np.asarray(stored) + np.asarray(recv)

    sd.set_updater(updater)
    for row in (0, 4, 2, 4):
        sd.push("s", sparse({row: 1}))
    assert has_rows(sd.pull("s"), {0: 1, 1: 10, 2: 1, 4: 42})


@pytest.mark.parametrize("number", [1, 2, 5])
def test_recv_is_never_the_callers_array(sd, number):
    values = [sparse({1: 1, 2: 2}) for _ in range(number)]
    memory = [v.data for v in values]

    def updater(key, recv, stored):
        assert not any(np.shares_memory(recv.data, m) for m in memory)
        recv.data[...] = 99
        recv[:] = 0

    sd.set_updater(updater)
    sd.push(["s", "d"], [values, values])
    memory.clear()
    assert all(has_rows(v, {1: 1, 2: 2}) for v in values)
    assert has_rows(sd.pull("s"), {1: 10, 4: 40})


def test_outs_get_what_the_updater_left(sd):
    def updater(key, recv, stored):
        stored[...] = np.asarray(stored) + np.asarray(recv)

    sd.set_updater(updater)
    right = {0: 1, 1: 10, 4: 40}
    for key in "sd":
        outs = [zeros(), np.empty(SHAPE), kvstore.zeros(SHAPE, "float64"), np.empty((6, 4))[:, ::2]]
        sd.pushpull(key, sparse({0: 1}), out=outs)
        assert has_rows(outs[0], right)
        assert all(same(np.asarray(out), np.asarray(sparse(right))) for out in outs[1:])
        values = [sparse({0: 1}), sparse({0: 1})]
        sd.pushpull(key, values)
        assert all(has_rows(value, {**right, 0: 3}) for value in values)


def test_arguments_that_are_kept_are_harmless(sd):
    kept = []

    def updater(key, recv, stored):
        kept.append((recv, stored, recv.data, stored.data if key == "s" else stored))
        stored[...] = np.asarray(stored) + np.asarray(recv)

    sd.set_updater(updater)
    for row in range(6):
        sd.push(["s", "d"], [sparse({row: 1}), [sparse({row: 1})] * 2])
    sd.set_updater(None)
    for recv, stored, rows, data in kept:
        recv.data[...] = 7
        rows[...] = 8
        recv[:] = 0
        assert stored.shape == SHAPE
        data.sum()
    value = sd.pull("s")
    assert value.indices.tolist() == list(range(6))
    sd.delete("s")
    sd.close()
    gc.collect()
    for recv, stored, rows, data in kept:
        assert recv.num_rows == 0
        rows[...] = data.sum()
        stored[...] = 0


def test_rows_that_are_kept_can_be_pushed(sd):
    kept = []
    sd.set_updater(lambda key, recv, stored: kept.extend([recv, stored]))
    sd.push("s", sparse({1: 5, 2: 6}))
    sd.set_updater(None)
    sd.push("s", kept)
    assert has_rows(sd.pull("s"), {1: 15, 2: 6, 4: 40})


def test_an_error_of_an_updater_comes_out_and_what_it_wrote_stays(sd):
    def updater(key, recv, stored):
        if key == "s":
            stored[:] = recv
            raise Boom(key)
        stored[...] = np.asarray(recv)

    sd.set_updater(updater)
    out = sparse({5: 9})
    with pytest.raises(Boom) as info:
        sd.pushpull(["d", "s"], [sparse({0: 1}), sparse({0: 1})], out=[np.empty(SHAPE), out])
    assert info.value.updated_keys == ["d"]
    sd.set_updater(None)
    assert has_rows(out, {5: 9})
    assert has_rows(sd.pull("s"), {0: 1})
    assert same(pulled(sd, "d"), np.asarray(sparse({0: 1})))


def test_an_error_after_a_change_in_place_leaves_the_change(sd):
    def updater(key, recv, stored):
        stored.data[0] = 3
        raise Boom

    sd.set_updater(updater)
    handle = sd.push("s", sparse({0: 1}), async_op=True)
    with pytest.raises(Boom):
        handle.wait()
    assert has_rows(sd.pull("s"), {1: 3, 4: 40})


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (np.ones((6, 3)), kvstore.InvalidArgumentError),
        (np.ones(SHAPE, np.float32), kvstore.ArrayTypeError),
        (sparse({1: 1}, (7, 2)), kvstore.InvalidArgumentError),
        (3.0, kvstore.ArrayTypeError),
        ("abc", kvstore.ArrayTypeError),
    ],
    ids=["shape", "type", "shape of rows", "number", "text"],
)
def test_an_assignment_that_fails_changes_nothing(sd, value, error):
    def updater(key, recv, stored):
        stored[:] = value

    sd.set_updater(updater)
    with pytest.raises(error):
        sd.push("s", sparse({0: 1}))
    assert has_rows(sd.pull("s"), {1: 10, 4: 40})


def test_calls_on_other_keys_work_from_inside(sd):
    sd.init("other", zeros())

    def updater(key, recv, stored):
        if key == "other":
            stored[:] = recv
            return
        sd.push("other", [recv, stored])
        stored[:] = sd.pull("other")
        with pytest.raises(kvstore.InvalidArgumentError, match="itself"):
            sd.row_sparse_pull("s", row_ids=[0])

    sd.set_updater(updater)
    sd.push("s", sparse({1: 1, 2: 2}))
    assert has_rows(sd.pull("s"), {1: 11, 2: 2, 4: 40})


def test_a_pull_of_another_key_into_stored_is_waited_for_by_the_updaters_end(sd):
    def updater(key, recv, stored):
        sd.pull("d", out=stored, ignore_sparse=False)
        stored.wait_to_read()

    sd.push("d", sparse({0: 3}))
    sd.set_updater(updater)
    sd.push("s", sparse({1: 1}))
    assert has_rows(sd.pull("s"), {0: 3})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8", "int64"])
def test_rows_of_any_type_reach_the_updater(kv, dtype):
    kv.init("s", sparse({0: 3}, dtype=kvstore.RowSparse.zeros((1,), dtype).dtype))
    kinds = []

    def updater(key, recv, stored):
        kinds.append((recv.dtype, stored.dtype))
        stored.data[...] += recv.data

    kv.set_updater(updater)
    kv.push("s", sparse({0: 2}, dtype=kv.dtype("s")))
    assert kinds == [(kv.dtype("s"),) * 2]
    assert has_rows(kv.pull("s"), {0: 5})
