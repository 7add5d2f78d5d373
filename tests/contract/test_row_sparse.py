"""Row-sparse values: what goes into which key, what comes out, which rows there are."""

import warnings

import numpy as np
import pytest
from helpers import has_rows, pulled, same, sparse
from model import DTYPES, HALF, Rows, total

import kvstore

SHAPE = (6, 2)


def dense(rows, shape=SHAPE, dtype="float64"):
    return np.asarray(sparse(rows, shape, dtype))


def zeros(shape=SHAPE, dtype="float64"):
    return kvstore.RowSparse.zeros(shape, dtype)


@pytest.fixture
def sd(kv):
    """A row-sparse key and a dense one of the same shape."""
    kv.init(["s", "d"], [sparse({1: 10, 4: 40}), dense({1: 10, 4: 40})])
    return kv


# ------------------------------------------------------------------------------------- the table


def test_the_form_of_a_key_is_that_of_its_first_value(sd):
    assert (sd.stype("s"), sd.stype("d")) == ("row_sparse", "default")
    assert sd.shape("s") == SHAPE
    assert sd.dtype("s") == np.float64
    assert has_rows(sd.pull("s"), {1: 10, 4: 40})


def test_a_dense_push_into_a_dense_key_assigns(sd):
    sd.push("d", np.full(SHAPE, 3.0))
    assert same(pulled(sd, "d"), np.full(SHAPE, 3.0))


def test_a_row_sparse_push_into_a_dense_key_makes_absent_rows_zero(sd):
    sd.push("d", sparse({0: 5, 4: 7}))
    assert sd.stype("d") == "default"
    assert same(pulled(sd, "d"), dense({0: 5, 4: 7}))


def test_a_row_sparse_push_without_rows_makes_a_dense_key_zero(sd):
    sd.push("d", zeros())
    assert same(pulled(sd, "d"), np.zeros(SHAPE))


def test_a_row_sparse_push_replaces_the_rows_of_a_row_sparse_key(sd):
    sd.push("s", sparse({0: 5, 4: 7}))
    assert has_rows(sd.pull("s"), {0: 5, 4: 7})
    sd.push("s", zeros())
    assert has_rows(sd.pull("s"), {})


def test_the_rows_of_a_push_are_the_union_of_those_of_its_values(sd):
    sd.push("s", [sparse({0: 1, 4: 2}), zeros(), sparse({4: 3, 5: 4}), sparse({2: 5})])
    assert has_rows(sd.pull("s"), {0: 1, 2: 5, 4: 5, 5: 4})
    sd.push("d", [sparse({0: 1, 4: 2}), zeros(), sparse({4: 3, 5: 4}), sparse({2: 5})])
    assert same(pulled(sd, "d"), dense({0: 1, 2: 5, 4: 5, 5: 4}))


def test_rows_that_are_zero_and_rows_that_sum_to_zero_stay(sd):
    sd.push("s", sparse({3: 0}))
    assert has_rows(sd.pull("s"), {3: 0})
    sd.push("s", [sparse({2: 5, 3: 1}), sparse({2: -5})])
    assert has_rows(sd.pull("s"), {2: 0, 3: 1})


def test_a_pull_into_a_dense_out_makes_the_value_dense(sd):
    for key in "sd":
        assert same(pulled(sd, key), dense({1: 10, 4: 40}))


def test_a_pull_into_a_row_sparse_out_gives_all_stored_rows(sd):
    sd.push("s", sparse({0: 0, 2: [0, 7]}))
    out = sparse({5: 9})
    sd.pull("s", out=out, ignore_sparse=False)
    assert has_rows(out, {0: 0, 2: [0, 7]})


def test_a_pull_of_a_dense_key_into_a_row_sparse_out_gives_the_rows_with_a_non_zero(sd):
    sd.push("d", dense({0: [0, 3], 2: [-0.0, 0.0], 3: [np.nan, 0]}))
    out = sparse({5: 9})
    sd.pull("d", out=out, ignore_sparse=False)
    assert out.indices.tolist() == [0, 3]
    assert same(out.data, np.array([[0, 3], [np.nan, 0]]))


def test_row_sparse_pull_gives_the_rows_asked_for_of_either_form(sd):
    for key in "sd":
        out = sparse({5: 9})
        sd.row_sparse_pull(key, out=out, row_ids=np.array([4, 0, 4]))
        assert has_rows(out, {0: 0, 4: 40})


def test_a_pull_without_out_gives_an_array_of_the_keys_form(sd):
    assert isinstance(sd.pull("s"), kvstore.RowSparse)
    assert isinstance(sd.pull("d"), kvstore.NDArray)
    s, d = sd.pull(["s", "d"])
    assert has_rows(s, {1: 10, 4: 40})
    assert same(d.asnumpy(), dense({1: 10, 4: 40}))
    s[:] = 0
    assert has_rows(sd.pull("s"), {1: 10, 4: 40}), "the pulled array was the stored one"


def test_row_sparse_pull_without_out_gives_row_sparse_arrays(sd):
    assert has_rows(sd.row_sparse_pull("d", row_ids=np.array([1, 2])), {1: 10, 2: 0})
    s, d = sd.row_sparse_pull(["s", "d"], row_ids=[np.array([4]), np.array([1, 0])])
    assert has_rows(s, {4: 40})
    assert has_rows(d, {0: 0, 1: 10})
    assert sd.row_sparse_pull([], row_ids=np.array([0])) == []


def test_a_pull_skips_row_sparse_outs_with_one_warning_for_a_key(sd):
    outs = [sparse({5: 9}), np.empty(SHAPE), sparse({5: 8}), np.empty(SHAPE)]
    with pytest.warns(UserWarning, match="'s'.*row_sparse_pull.*ignore_sparse"):
        sd.pull("s", out=outs[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.pull("s", outs)
        sd.pull("s", out=outs[0], async_op=True).wait()
    with pytest.warns(UserWarning, match="'d'") as seen:
        sd.pull(["d", "s", "d"], out=[outs[:2], outs[2], outs[3]])
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert has_rows(outs[0], {5: 9})
    assert has_rows(outs[2], {5: 8})
    assert same(outs[1], dense({1: 10, 4: 40}))
    assert same(outs[3], dense({1: 10, 4: 40}))


@pytest.mark.one_process
def test_each_store_and_each_new_key_of_a_name_warns_again(sd):
    def warned(kv, key):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            kv.pull(key, out=zeros())
        return len(seen)

    assert [warned(sd, "s"), warned(sd, "s")] == [1, 0]
    sd.delete("s")
    sd.init("s", zeros())
    assert warned(sd, "s") == 1
    with kvstore.create(sd.type) as other:
        other.init("s", zeros())
        assert warned(other, "s") == 1


def test_a_warning_that_is_an_error_comes_out_of_the_pull(sd):
    out = np.full(SHAPE, 7.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'s'"):
            sd.pull("s", out=[zeros(), out])
    assert (out == 7).all()
    sd.pull("s", out=[zeros(), out])
    assert same(out, dense({1: 10, 4: 40}))


def test_an_array_that_is_reshaped_while_the_warning_is_shown_is_looked_at_again(sd, monkeypatch):
    out = np.empty(SHAPE)
    reshape = lambda *a, **k: out.resize((12,), refcheck=False)  # noqa: E731
    monkeypatch.setattr(warnings, "showwarning", reshape)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(kvstore.InvalidArgumentError, match=r"\(12,\)"):
            sd.pull(["s", "d"], out=[zeros(), out])


# --------------------------------------------------------------------------------- pushpull and co


def test_pushpull_in_place_gives_the_sum_back_into_all_values(sd):
    for key in "sd":
        values = [sparse({0: 1}), sparse({0: 2, 5: 3}), zeros()]
        sd.pushpull(key, values)
        for value in values:
            assert has_rows(value, {0: 3, 5: 3})
        single = sparse({2: 8})
        sd.pushpull(key, single)
        assert has_rows(single, {2: 8})
        assert same(pulled(sd, key), dense({2: 8}))


def test_pushpull_with_row_sparse_values_fills_outs_of_any_form(sd):
    for key in "sd":
        outs = [zeros(), np.empty(SHAPE), kvstore.zeros(SHAPE, "float64"), np.empty((6, 4))[:, ::2]]
        value = sparse({3: 7})
        sd.pushpull(key, [value, sparse({0: 1})], out=outs)
        assert has_rows(outs[0], {0: 1, 3: 7})
        assert all(same(np.asarray(out), dense({0: 1, 3: 7})) for out in outs[1:])
        assert has_rows(value, {3: 7})


def test_pushpull_of_dense_values_into_a_row_sparse_out(sd):
    out = zeros()
    sd.pushpull("d", [dense({1: 1}), dense({1: 1, 2: 5})], out=[out])
    assert has_rows(out, {1: 2, 2: 5})


def test_broadcast_of_a_row_sparse_value(kv):
    outs = [sparse({5: 9}), np.empty(SHAPE), zeros()]
    kv.broadcast("s", sparse({1: 1, 2: 0}), outs)
    assert kv.stype("s") == "row_sparse"
    assert has_rows(outs[0], {1: 1, 2: 0})
    assert has_rows(outs[2], {1: 1, 2: 0})
    assert same(outs[1], dense({1: 1}))


def test_broadcast_of_a_dense_value_into_a_row_sparse_out(kv):
    out = zeros()
    kv.broadcast(["d", "s"], [dense({1: 1, 2: 0}), [sparse({3: 0})]], [out, np.empty(SHAPE)])
    assert has_rows(out, {1: 1})
    assert (kv.stype("d"), kv.stype("s")) == ("default", "row_sparse")


def test_lists_of_keys_mix_forms(sd):
    sd.push(["s", "d", "s"], [[sparse({0: 1}), sparse({1: 2})], dense({2: 3}), sparse({1: 4})])
    assert has_rows(sd.pull("s"), {0: 1, 1: 6})
    outs = [zeros(), [np.empty(SHAPE), zeros()], np.empty(SHAPE)]
    sd.pull(["d", "s", "d"], out=outs, ignore_sparse=False)
    assert has_rows(outs[0], {2: 3})
    assert same(outs[1][0], dense({0: 1, 1: 6}))
    assert has_rows(outs[1][1], {0: 1, 1: 6})
    assert same(outs[2], dense({2: 3}))


def test_a_key_twice_in_a_row_sparse_pull_keeps_each_outs_ids(sd):
    a, b, c, d = (zeros() for _ in range(4))
    ids = [[np.array([1]), np.array([2])], np.array([4]), [np.array([5, 4])]]
    sd.row_sparse_pull(["s", "d", "s"], out=[[a, b], c, [d]], row_ids=ids)
    assert has_rows(a, {1: 10})
    assert has_rows(b, {2: 0})
    assert has_rows(c, {4: 40})
    assert has_rows(d, {4: 40, 5: 0})
    first, second = sd.row_sparse_pull(["s", "s"], row_ids=[[1], [4]])
    assert has_rows(first, {1: 10})
    assert has_rows(second, {4: 40})


def test_init_and_push_copy_the_callers_rows(kv):
    value = sparse({1: 1})
    kv.init("s", value)
    value.data[...] = 5
    assert has_rows(kv.pull("s"), {1: 1})
    kv.push("s", value)
    value.data[...] = 6
    value[:] = 0
    assert has_rows(kv.pull("s"), {1: 5})


def test_an_out_does_not_share_memory_with_the_store(sd):
    out = sd.pull("s")
    out.data[...] = 9
    assert has_rows(sd.pull("s"), {1: 10, 4: 40})


def test_the_same_array_may_be_pushed_several_times_in_one_call(sd):
    value = sparse({1: 2})
    sd.push("s", [value, value, value])
    assert has_rows(sd.pull("s"), {1: 6})
    sd.push(["s", "d"], [value, value])
    assert same(pulled(sd, "d"), dense({1: 2}))


def test_an_array_pulled_from_a_key_can_be_pushed_to_it(sd):
    value = sd.pull("s")
    sd.push("s", [value, value])
    assert has_rows(sd.pull("s"), {1: 20, 4: 80})
    sd.pushpull("s", value)
    assert has_rows(value, {1: 10, 4: 40})


# ------------------------------------------------------------------------------------ the user's


def test_the_memory_of_an_array_made_without_a_copy_is_read_and_never_written(sd):
    memory = np.array([[1.0, 1], [2, 2]])
    value = kvstore.RowSparse(memory, [0, 3], SHAPE, copy=False)
    sd.push("s", value)
    assert has_rows(sd.pull("s"), {0: 1, 3: 2})
    memory[0] = 7
    sd.push("d", value)
    assert same(pulled(sd, "d"), dense({0: 7, 3: 2}))
    sd.pushpull("s", [value, sparse({0: 1, 3: 1})], out=value)
    assert has_rows(value, {0: 8, 3: 3})
    assert memory.tolist() == [[7, 7], [2, 2]]


def test_a_view_goes_on_showing_the_rows_that_a_pull_has_replaced(sd):
    out = sparse({0: 1, 2: 2})
    data, ids = out.data, out.indices
    sd.pull("s", out=out, ignore_sparse=False)
    assert data.tolist() == [[1, 1], [2, 2]]
    assert ids.tolist() == [0, 2]
    assert has_rows(out, {1: 10, 4: 40})


# --------------------------------------------------------------------------------------- row ids

IDS = {
    **{name: np.array([4, 1, 4, 0], name) for name in ("i1", "i2", "i4", "i8", "u1", "u2", "u4")},
    "uint64": np.array([4, 1, 4, 0], np.uint64),
    "big-endian": np.array([4, 1, 4, 0], ">i4"),
    "two dimensions": np.array([[4, 1], [4, 0]]),
    "one dimension each": np.array([[[4], [1], [0]]]),
    "Fortran": np.asfortranarray(np.array([[4, 1], [4, 0]])),
    "strided": np.array([4, 9, 1, 9, 0, 9], np.int32)[::2],
    "backwards": np.array([4, 1, 0])[::-1],
    "read-only": np.frombuffer(np.array([4, 1, 0]).tobytes(), np.int64),
    "list": [4, 1, 4, 0],
    "tuple": (4, 1, 0),
    "list of NumPy's integers": [np.int64(4), np.int8(1), np.uint16(0)],
    "NDArray": kvstore.array(np.array([4, 1, 0])),
    "memoryview": memoryview(np.array([4, 1, 0])),
    "NDArray of int32": kvstore.array(np.array([4, 1, 0], np.int32)),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_row_ids_are_integers_of_any_type_shape_and_order(sd, ids):
    for key in "sd":
        out = zeros()
        sd.row_sparse_pull(key, out=out, row_ids=ids)
        assert has_rows(out, {0: 0, 1: 10, 4: 40})


@pytest.mark.parametrize(
    "ids", [np.array([], np.int32), [], (), np.empty((3, 0), np.int64)], ids=str
)
def test_no_row_ids_give_no_rows(sd, ids):
    out = sparse({5: 9})
    sd.row_sparse_pull("s", out=out, row_ids=ids)
    assert has_rows(out, {})
    assert out.data.shape == (0, 2)


def test_a_zero_dimensional_row_id_is_one_row(sd):
    assert has_rows(sd.row_sparse_pull("s", row_ids=np.array(4)), {4: 40})


def test_one_array_of_ids_serves_many_outs(sd):
    outs = [zeros() for _ in range(3)]
    sd.row_sparse_pull("s", out=outs, row_ids=np.array([4, 2]))
    assert all(has_rows(out, {2: 0, 4: 40}) for out in outs)
    outs = [[zeros(), zeros()], zeros()]
    sd.row_sparse_pull(["s", "d"], out=outs, row_ids=np.array([1]))
    assert all(has_rows(out, {1: 10}) for out in [*outs[0], outs[1]])
    outs[0][0].data[...] = 7
    assert has_rows(outs[0][1], {1: 10})


@pytest.mark.parametrize("make", [np.array, kvstore.array, memoryview, list, tuple, "0-d"])
def test_a_list_of_ids_has_one_for_each_out(sd, make):
    ids = [np.array(4), np.array(1)] if make == "0-d" else None
    if ids is None:
        ids = [make(np.array([4, 4])), make(np.array([1, 1]))]
    outs = [zeros(), zeros()]
    sd.row_sparse_pull("s", out=outs, row_ids=ids)
    assert has_rows(outs[0], {4: 40})
    assert has_rows(outs[1], {1: 10})
    outs = [zeros(), zeros()]
    sd.row_sparse_pull(["d", "s"], out=outs, row_ids=tuple(ids))
    assert has_rows(outs[0], {4: 40})
    assert has_rows(outs[1], {1: 10})


@pytest.mark.parametrize("number", [1, 33, 2000, 70_000])
@pytest.mark.parametrize("limit", [3, 900, 2**21, 2**40])
def test_many_ids_are_sorted_and_each_kept_once(kv, number, limit):
    ids = np.random.default_rng(number).integers(0, limit, number)
    kv.init("s", sparse({0: 7, int(ids[0]): 8}, (limit, 1)))
    out = kv.row_sparse_pull("s", row_ids=ids)
    expected = np.unique(ids)
    assert same(out.indices, expected)
    assert (out.data[expected == ids[0]] == 8).all()
    assert (out.data[(expected != ids[0]) & (expected != 0)] == 0).all()


def test_the_ids_that_were_given_are_not_changed(sd):
    ids = np.array([4, 1, 4, 0])
    sd.row_sparse_pull("s", row_ids=ids)
    assert ids.tolist() == [4, 1, 4, 0]


# -------------------------------------------------------------------------------- types and shapes


def some(numbers, shape, dtype, rows):
    ids = np.sort(numbers.choice(shape[0], rows, replace=False))
    data = numbers.normal(scale=50, size=(rows, *shape[1:]))
    return ids, np.abs(data).astype(dtype) if np.dtype(dtype).kind == "u" else data.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(20, 3), (20,), (20, 2, 5), (50, 1, 1), (7, 300)], ids=str)
def test_every_type_and_shape_gives_the_models_bits(kv, dtype, shape):
    numbers = np.random.default_rng(5)
    parts = [some(numbers, shape, dtype, rows) for rows in (5, 0, 7, 3, 1)]
    ours = [kvstore.RowSparse(data, ids, shape) for ids, data in parts]
    theirs = [Rows(data, ids, shape) for ids, data in parts]
    kv.init(["s", "d"], [ours[0], np.asarray(ours[0])])
    for count in range(1, len(parts) + 1):
        right = total(theirs[:count])
        kv.push(["s", "d"], [ours[:count]] * 2)
        out = kv.pull("s")
        assert out.dtype == dtype
        assert same(out.indices, right.indices)
        assert same(out.data, right.data)
        assert same(pulled(kv, "s"), np.asarray(right))
        assert same(pulled(kv, "d"), np.asarray(right))
    for key in "sd":
        out = kv.row_sparse_pull(key, row_ids=np.arange(shape[0]))
        assert same(out.data, np.asarray(right))


@pytest.mark.parametrize("dtype", sorted(HALF, key=str), ids=lambda d: d.name)
def test_sums_of_16_bit_types_are_rounded_once(kv, dtype):
    big = 2048 if dtype == np.float16 else 256
    values = [sparse({1: big}, dtype=dtype), *(sparse({1: 1}, dtype=dtype) for _ in range(4))]
    kv.init(["s", "d"], [zeros(dtype=dtype), np.zeros(SHAPE, dtype)])
    kv.push(["s", "d"], [values, values])
    assert has_rows(kv.pull("s"), {1: big + 4})
    assert same(pulled(kv, "d"), np.asarray(sparse({1: big + 4}, dtype=dtype)))


def test_integers_wrap(kv):
    kv.init("s", zeros(dtype="uint8"))
    kv.push("s", [sparse({1: 250}, dtype="uint8"), sparse({1: 10}, dtype="uint8")])
    assert has_rows(kv.pull("s"), {1: 4})


def test_a_sum_is_made_of_the_rows_that_are_there(kv):
    """An absent row is not added as zeros, which would turn -0.0 into 0.0."""
    kv.init("s", zeros())
    kv.push("s", [sparse({1: -0.0}), sparse({2: 1})])
    assert same(kv.pull("s").data, np.array([[-0.0, -0.0], [1, 1]]))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (5, 0), (2, 0, 4), (1,), (1, 1)], ids=str)
def test_arrays_without_rows_or_elements_work(kv, shape):
    rows = np.arange(shape[0])
    value = kvstore.RowSparse(np.ones(shape), rows, shape)
    kv.init(["s", "d"], [value, np.ones(shape)])
    kv.push(["s", "d"], [[value, value], value])
    out = kv.pull("s")
    assert same(out.indices, rows)
    assert same(out.data, np.full(shape, 2.0))
    assert same(pulled(kv, "s"), np.full(shape, 2.0))
    assert same(pulled(kv, "d"), np.ones(shape))
    kv.pull("d", out=out, ignore_sparse=False)
    assert out.indices.tolist() == (rows.tolist() if value.size else [])
    assert same(kv.row_sparse_pull("s", row_ids=rows).indices, rows)
    assert same(kv.row_sparse_pull("d", row_ids=rows).indices, rows)
    kv.pushpull("s", [value, out])
    assert same(out.indices, rows)


def test_row_numbers_need_64_bits(kv):
    shape, last = (2**40, 1), 2**40 - 1
    kv.init("s", sparse({0: 1, last: 2}, shape, "float32"))
    kv.push(
        "s", [sparse({2**33: 3, last: 4}, shape, "float32"), sparse({2**33: 1}, shape, "float32")]
    )
    assert has_rows(kv.pull("s"), {2**33: 4, last: 4})
    out = kv.row_sparse_pull("s", row_ids=np.array([last, 5, 2**33]))
    assert has_rows(out, {5: 0, 2**33: 4, last: 4})
    kv.pushpull("s", sparse({2**39: 6}, shape, "float32"), out=out)
    assert has_rows(out, {2**39: 6})


@pytest.mark.one_process
def test_row_numbers_of_an_updater_need_64_bits(kv):
    shape, out = (2**40, 1), sparse({}, (2**40, 1), "float32")
    kv.init("s", out)
    kv.set_updater(lambda key, recv, stored: stored.__setitem__(slice(None), recv))
    kv.pushpull("s", sparse({2**39: 6}, shape, "float32"), out=out)
    assert has_rows(out, {2**39: 6})


def test_many_rows_and_many_values_give_the_models_bits(kv):
    numbers, shape = np.random.default_rng(3), (90_000, 4)
    parts = [some(numbers, shape, np.float32, 20_000) for _ in range(5)]
    right = np.zeros(shape, np.float32)
    for ids, data in parts:
        right[ids] += data
    kv.init(["s", "d"], [zeros(shape, "float32"), np.zeros(shape, np.float32)])
    values = [kvstore.RowSparse(data, ids, shape) for ids, data in parts]
    kv.push(["s", "d"], [values, values])
    out = kv.pull("s")
    assert same(out.indices, np.unique(np.concatenate([ids for ids, _ in parts])))
    assert same(out.data, right[out.indices])
    assert same(pulled(kv, "s"), right)
    assert same(pulled(kv, "d"), right)


def test_a_hundred_values_are_summed(kv):
    values = [sparse({i % 5: i, 5: 1}) for i in range(100)]
    kv.init("s", zeros())
    kv.push("s", values)
    expected = {row: sum(range(row, 100, 5)) for row in range(5)}
    assert has_rows(kv.pull("s"), {**expected, 5: 100})


@pytest.mark.parametrize("layout", ["Fortran", "strided", "backwards", "NDArray", "memoryview"])
def test_dense_outs_of_a_row_sparse_key_may_have_any_layout(sd, layout):
    base = np.full((6, 4), 7.0)
    out = {
        "Fortran": np.empty(SHAPE, order="F"),
        "strided": base[:, ::2],
        "backwards": np.empty(SHAPE)[::-1, ::-1],
        "NDArray": kvstore.empty(SHAPE, "float64"),
        "memoryview": memoryview(np.empty(SHAPE)),
    }[layout]
    sd.pull("s", out=[out, np.empty(SHAPE)])
    assert same(np.asarray(out), dense({1: 10, 4: 40}))
    assert (base[:, 1::2] == 7).all()


@pytest.mark.one_process  # elsewhere messages may still have some
def test_memory_of_rows_goes_with_the_key(kv):
    def live():
        kvstore.wait_all()
        return kvstore._core.counters()["value_bytes"]

    before = live()
    kv.init("s", sparse({i: i for i in range(500)}, (1000, 200)))
    assert live() - before >= 500 * 200 * 8
    kv.push("s", sparse({1: 1}, (1000, 200)))
    assert live() - before < 50 * 200 * 8, "rows that have gone keep their memory"
    kv.delete("s")
    assert live() == before
