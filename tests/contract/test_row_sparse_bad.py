"""What is refused of row-sparse values and row ids: the class, the message, and nothing changed."""

import numpy as np
import pytest
from helpers import has_rows, refused, sparse

import kvstore

SHAPE = (6, 2)
BAD, TYPE, UNKNOWN = (
    kvstore.InvalidArgumentError,
    kvstore.ArrayTypeError,
    kvstore.KeyNotFoundError,
)


def zeros(shape=SHAPE, dtype="float64"):
    return kvstore.RowSparse.zeros(shape, dtype)


def ones():
    return np.ones(SHAPE)


@pytest.fixture
def sd(kv):
    kv.init(["s", "d", "0-d"], [sparse({1: 10, 4: 40}), ones(), np.ones(())])
    return kv


# call, error, what its message says
PUSHES = {
    "dense into row-sparse": (lambda kv: kv.push("s", ones()), TYPE, "'s'", "dense", "row-sparse"),
    "NDArray into row-sparse": (lambda kv: kv.push("s", kvstore.ones(SHAPE)), TYPE, "'s'", "dense"),
    "dense in a list": (
        lambda kv: kv.push(["d", "s"], [ones(), [ones(), ones()]]),
        TYPE,
        "'s'",
        "value 0",
    ),
    "dense after row-sparse": (
        lambda kv: kv.push("d", [sparse({1: 1}), ones()]),
        TYPE,
        "value 1",
        "'d'",
        "dense",
        "row-sparse",
    ),
    "row-sparse after dense": (
        lambda kv: kv.push("d", [ones(), ones(), sparse({1: 1})]),
        TYPE,
        "value 2",
        "'d'",
    ),
    "a key twice in two forms": (
        lambda kv: kv.push(["d", "s", "d"], [ones(), sparse({1: 1}), sparse({1: 1})]),
        TYPE,
        "value 1",
        "'d'",
    ),
    "dense into row-sparse in place": (lambda kv: kv.pushpull("s", ones()), TYPE, "'s'", "dense"),
    "element type": (
        lambda kv: kv.push("s", sparse({1: 1}, dtype="float32")),
        TYPE,
        "'s'",
        "float32",
        "float64",
    ),
    "element type of the second": (
        lambda kv: kv.push("d", [sparse({1: 1}), sparse({1: 1}, dtype="int64")]),
        TYPE,
        "value 1",
        "int64",
    ),
    "shape": (
        lambda kv: kv.push("s", sparse({1: 1}, (7, 2))),
        BAD,
        "'s'",
        r"\(7, 2\)",
        r"\(6, 2\)",
    ),
    "row's shape": (lambda kv: kv.push("d", sparse({1: 1}, (6, 3))), BAD, r"\(6, 3\)"),
    "number of dimensions": (lambda kv: kv.push("s", sparse({1: 1}, (6,))), BAD, r"\(6,\)"),
    "rows into a 0-d key": (lambda kv: kv.push("0-d", sparse({0: 1}, (1,))), BAD, r"\(1,\)"),
    "form before type": (lambda kv: kv.push("s", np.ones(SHAPE, np.int8)), TYPE, "dense"),
    "key before form": (lambda kv: kv.push(["s", "x"], [ones(), ones()]), UNKNOWN, "'x'"),
    "init again": (lambda kv: kv.init("s", sparse({1: 1})), BAD, "'s'", "already"),
    "init of two": (lambda kv: kv.init("n", [sparse({1: 1}), sparse({1: 1})]), BAD, "'n'"),
    "init twice": (lambda kv: kv.init(["n", "n"], [sparse({1: 1}), ones()]), BAD, "'n'", "twice"),
    "SciPy's or others' lists": (lambda kv: kv.push("s", [[sparse({1: 1})]]), BAD, "deeper"),
}
PULLS = {
    "shape of a row-sparse out": (
        lambda kv: kv.pull("s", out=zeros((7, 2)), ignore_sparse=False),
        BAD,
        r"\(7, 2\)",
        r"\(6, 2\)",
    ),
    "type of a row-sparse out": (
        lambda kv: kv.pull("d", out=[ones(), zeros(dtype="int8")], ignore_sparse=False),
        TYPE,
        "out 1",
        "int8",
    ),
    "shape of a dense out": (lambda kv: kv.pull("s", out=np.ones((2, 6))), BAD, r"\(2, 6\)"),
    "a row-sparse out of a 0-d key": (
        lambda kv: kv.pull("0-d", out=zeros((1,)), ignore_sparse=False),
        BAD,
        r"\(1,\)",
    ),
    "unknown key with a row-sparse out": (lambda kv: kv.pull("x", out=zeros()), UNKNOWN, "'x'"),
    "type of a pushpull's out": (
        lambda kv: kv.pushpull("s", sparse({1: 1}), out=zeros(dtype="float16")),
        TYPE,
        "float16",
    ),
    "broadcast of a known key": (
        lambda kv: kv.broadcast("s", sparse({1: 1}), zeros()),
        BAD,
        "'s'",
        "already",
    ),
    "broadcast into another shape": (
        lambda kv: kv.broadcast("n", sparse({1: 1}), zeros((6, 3))),
        BAD,
        r"\(6, 3\)",
    ),
}


def ids(*numbers, dtype=np.int64):
    return np.array(numbers, dtype)


def rsp(*args, **kwargs):
    return lambda kv: kv.row_sparse_pull(*args, **kwargs)


ROW_IDS = {
    "no row_ids": (rsp("s", out=zeros()), BAD, "row_ids"),
    "None": (rsp("s", row_ids=None), BAD, "row_ids"),
    "too large": (rsp("s", row_ids=ids(0, 6)), BAD, r"row id 6\b", "'s'", r"\b6 rows"),
    "negative": (rsp("d", row_ids=ids(3, -1)), BAD, r"row id -1\b", "'d'"),
    "very large": (rsp("s", row_ids=ids(2**62)), BAD, str(2**62)),
    "smallest": (rsp("s", row_ids=ids(-(2**63))), BAD, str(-(2**63))),
    "uint64": (rsp("s", row_ids=ids(0, 2**64 - 1, dtype=np.uint64)), BAD, str(2**64 - 1)),
    "in the second out": (
        rsp("s", out=[zeros(), zeros()], row_ids=[ids(1), ids(9)]),
        BAD,
        "out 1",
        r"row id 9\b",
    ),
    "in the second key": (
        rsp(["d", "s"], out=[zeros(), zeros()], row_ids=[ids(1), ids(9)]),
        BAD,
        "'s'",
        r"row id 9\b",
    ),
    "floats": (rsp("s", row_ids=np.array([1.0])), TYPE, "row_ids", "float64"),
    "float32": (rsp("s", row_ids=np.array([1], np.float32)), TYPE, "float32"),
    "no floats": (rsp("s", row_ids=np.array([], np.float64)), TYPE, "float64"),
    "bools": (rsp("s", row_ids=np.array([True])), TYPE, "bool"),
    "list of floats": (rsp("s", row_ids=[1.0, 2.0]), TYPE, "row_ids"),
    "list of bools": (rsp("s", row_ids=[True, False]), TYPE, "row_ids", "bool"),
    "list with None": (rsp("s", row_ids=[None]), TYPE, "row_ids"),
    "text": (rsp("s", row_ids="01"), TYPE, "row_ids", "str"),
    "bytes": (rsp("s", row_ids=b"\0\1"), TYPE, "row_ids", "bytes"),
    "a number": (rsp("s", row_ids=3), TYPE, "row_ids", "int"),
    "a range": (rsp("s", row_ids=range(3)), TYPE, "row_ids", "range"),
    "a set": (rsp("s", row_ids={1, 2}), TYPE, "row_ids", "set"),
    "objects": (rsp("s", row_ids=np.array([1], object)), TYPE, "row_ids"),
    "dates": (rsp("s", row_ids=np.array(["2024"], "M8[Y]")), TYPE, "row_ids"),
    "a masked array": (rsp("s", row_ids=np.ma.array([1, 2])), TYPE, "row_ids", "mask"),
    "a RowSparse": (rsp("s", row_ids=zeros(dtype="int64")), TYPE, "row_ids", "RowSparse"),
    "a ragged list": (rsp("s", row_ids=[1, [2]]), BAD, "row_ids"),
    "a number among arrays": (
        rsp("s", out=[zeros(), zeros()], row_ids=[ids(1), 2]),
        TYPE,
        "row_ids",
        "int",
    ),
    "more ids than outs": (
        rsp("s", out=zeros(), row_ids=[ids(1), ids(2)]),
        BAD,
        r"\b2\b",
        r"\b1\b",
    ),
    "fewer ids than outs": (
        rsp("s", out=[zeros(), zeros()], row_ids=[ids(1)]),
        BAD,
        r"\b1\b",
        r"\b2\b",
    ),
    "more ids than keys": (
        rsp(["s", "d"], out=[zeros(), zeros()], row_ids=[ids(1)] * 3),
        BAD,
        r"\b3\b",
        r"\b2\b",
        "keys",
    ),
    "fewer ids than a key's outs": (
        rsp(["s", "d"], out=[[zeros(), zeros()], zeros()], row_ids=[[ids(1)], ids(1)]),
        BAD,
        r"\b1\b",
        r"\b2\b",
    ),
    "a dense out": (rsp("s", out=ones(), row_ids=ids(1)), TYPE, "dense", "RowSparse", "'s'"),
    "an NDArray": (rsp("d", out=kvstore.ones(SHAPE), row_ids=ids(1)), TYPE, "dense"),
    "one dense out": (rsp("s", out=[zeros(), ones()], row_ids=ids(1)), TYPE, "out 1", "dense"),
    "no outs": (rsp("s", out=[], row_ids=ids(1)), BAD, "'s'", r"\b0\b"),
    "type of the out": (rsp("s", out=zeros(dtype="int8"), row_ids=ids(1)), TYPE, "int8", "float64"),
    "shape of the out": (rsp("s", out=zeros((5, 2)), row_ids=ids(1)), BAD, r"\(5, 2\)"),
    "a 0-d key": (rsp("0-d", row_ids=ids(0)), BAD, "dimension"),
    "unknown key": (rsp("x", out=zeros(), row_ids=ids(0)), UNKNOWN, "'x'"),
    "unknown key without out": (rsp(["s", "x"], row_ids=ids(0)), UNKNOWN, "'x'"),
    "key type": (rsp(7, out=zeros(), row_ids=ids(0)), TYPE, r"\b7\b"),
    "no key": (rsp(None, out=zeros(), row_ids=ids(0)), TYPE, "key"),
    "key before form": (rsp("x", out=ones(), row_ids=ids(0)), UNKNOWN, "'x'"),
    "form before ids": (rsp("s", out=ones(), row_ids=ids(99)), TYPE, "dense"),
    "shape before ids": (rsp("s", out=zeros((5, 2)), row_ids=ids(99)), BAD, r"\(5, 2\)"),
    "async without out": (rsp("s", row_ids=ids(1), async_op=True), BAD, "out"),
    "priority": (rsp("s", row_ids=ids(1), priority=1.5), TYPE, "priority"),
}
CALLS = {**PUSHES, **PULLS, **ROW_IDS}


@pytest.mark.parametrize("case", CALLS)
def test_what_is_wrong_is_refused_and_nothing_changes(sd, case):
    call, error, *patterns = CALLS[case]
    with refused(sd, error, *patterns):
        call(sd)


@pytest.mark.one_process
def test_no_updater_runs_for_a_call_that_is_refused(sd):
    seen = []
    sd.set_updater(lambda key, recv, stored: seen.append(key))
    for call, error, *_ in PUSHES.values():
        with pytest.raises(error):
            call(sd)
    assert seen == []


@pytest.mark.parametrize("row_ids", [ids(6), [ids(1), ids(6)]], ids=["one", "list"])
def test_outs_of_a_refused_row_sparse_pull_are_not_touched(sd, row_ids):
    outs = [sparse({5: 9}), sparse({2: 8})]
    with refused(sd, BAD):
        sd.row_sparse_pull("s", out=outs, row_ids=row_ids)
    assert has_rows(outs[0], {5: 9})
    assert has_rows(outs[1], {2: 8})


def test_the_same_array_as_two_outs_is_refused(sd):
    out = sparse({5: 9})
    with refused(sd, BAD, "overlap|same"):
        sd.pull("s", out=[out, out], ignore_sparse=False)
    with refused(sd, BAD, "overlap|same"):
        sd.row_sparse_pull(["s", "d"], out=[out, out], row_ids=ids(1))
    with refused(sd, BAD, "overlap|same"):
        sd.pushpull("s", [out, out])
    empty = zeros((0,))
    sd.init("e", empty)
    with refused(sd, BAD, "overlap|same"):
        sd.pull("e", out=[empty, empty], ignore_sparse=False)
    assert has_rows(out, {5: 9})


@pytest.mark.parametrize("shape", [SHAPE, (5, 0)], ids=str)
def test_an_out_that_is_a_value_of_another_key_is_refused(kv, shape):
    kv.init(["a", "b"], [sparse({1: 1}, shape), sparse({2: 2}, shape)])
    x, y, z = (sparse({3: 3}, shape) for _ in range(3))
    with refused(kv, BAD, "another key"):
        kv.pushpull(["a", "b"], [x, y], out=[y, z])
    kv.pushpull(["a", "b"], [x, y], out=[x, z])
    assert has_rows(z, {3: 3})


def test_a_dense_out_in_the_memory_of_a_row_sparse_value_is_refused(sd):
    memory = np.ones(SHAPE)
    value = kvstore.RowSparse(memory, np.arange(6), SHAPE, copy=False)
    with refused(sd, BAD, "shares memory"):
        sd.pushpull("s", value, out=memory)
    with refused(sd, BAD, "shares memory"):
        sd.pushpull("s", value, out=memory[::-1])
    with refused(sd, BAD, "shares memory"):
        sd.pushpull(["d", "s"], [ones(), value], out=[memory, zeros()])
    view = value.data
    with refused(sd, BAD, "shares memory"):
        sd.broadcast("n", value, [np.empty(SHAPE), view])
    assert (memory == 1).all()


@pytest.mark.parametrize("late", [False, True], ids=["at once", "async"])
def test_wrong_asynchronous_calls_raise_at_the_call_or_the_wait(sd, late):
    out = sparse({5: 9})
    with refused(sd, BAD, "row id 6"):
        sd.row_sparse_pull("s", out=out, row_ids=[6], async_op=late).wait()
    with refused(sd, TYPE, "dense"):
        sd.push("s", ones(), async_op=late).wait()
    assert has_rows(out, {5: 9})


def test_a_closed_store_comes_first(sd):
    sd.close()
    for call in (rsp("s"), rsp("s", out=ones(), row_ids="x"), rsp("x", row_ids=[1])):
        with pytest.raises(kvstore.ClosedError):
            call(sd)


def test_after_any_refusal_the_store_works_on(sd):
    for call, error, *_ in CALLS.values():
        with pytest.raises(error):
            call(sd)
        sd.pushpull("s", sparse({2: 1}), out=zeros())
    assert has_rows(sd.pull("s"), {2: 1})
