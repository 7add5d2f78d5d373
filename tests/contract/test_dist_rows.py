"""Row-sparse values in dist stores: a cluster does what one process does that is given the values
of all workers, and only the rows that are meant travel."""

import contextlib
import itertools

import numpy as np
import pytest
from helpers import Worker, has_rows, pulled, same, sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import Cluster, each

import kvstore
from kvstore import _core, optimizer

# Of one slice, of rows of one element, of rows of none, of a slice on each server (at least).
SHAPES = [(6, 2), (7, 1), (5, 0, 3), (40_000, 2), (0, 4)]
WIDE = (100_000, 64)


@pytest.fixture
def pair():
    with Cluster(2, 2) as cluster:
        yield cluster.all_stores(timeout=5)


def forget():
    """Takes the errors away that nobody has been told of."""
    while True:
        try:
            return kvstore.wait_all()
        except (MemoryError, kvstore.KVStoreError):
            pass


def rows_of(array):
    return array.indices.tolist(), array.data.tobytes()


def some_rows(rng, shape, dtype):
    """A RowSparse of small integers with few rows, perhaps none."""
    count = int(rng.integers(0, min(shape[0], 5) + 1))
    ids = np.sort(rng.choice(shape[0], count, replace=False))
    data = rng.integers(-4, 5, (count, *shape[1:]))
    return kvstore.RowSparse(data.astype(dtype), ids, shape)


# ------------------------------------------------------------------------ the same as one process


def program(seed, shape, dtype, steps, workers):
    """What is done to the keys: (call, key, values of each worker, row ids of each worker)."""
    rng = np.random.default_rng(seed)
    for call in steps:
        key = "sd"[rng.integers(2)]
        values = [
            [some_rows(rng, shape, dtype) for _ in range(rng.integers(1, 4))]
            for _ in range(workers)
        ]
        ids = [rng.integers(0, max(shape[0], 1), rng.integers(0, 9)) for _ in range(workers)]
        if shape[0] == 0:
            ids = [np.zeros(0, np.int64) for _ in ids]
        yield call, key, values, ids


def first_values(seed, shape, dtype):
    rng = np.random.default_rng([seed, 7])
    return [some_rows(rng, shape, dtype), rng.integers(-3, 4, shape).astype(dtype)]


def apply(kv, call, key, values, ids, shape, dtype):
    """One call; gives what a pull of that kind shows then."""
    out = kvstore.RowSparse.zeros(shape, dtype)
    if call == "push":
        kv.push(key, values)
        return None
    if call == "pushpull":
        kv.pushpull(key, values, out=out)
    elif call == "pushpull dense":
        out = np.empty(shape, dtype)
        kv.pushpull(key, values, out=out)
        return out.tobytes()
    elif call == "pull":
        kv.pull(key, out=out, ignore_sparse=False)
    elif call == "pull dense":
        return pulled(kv, key).tobytes()
    else:
        other = kvstore.RowSparse.zeros(shape, dtype)
        kv.row_sparse_pull(key, out=[out, other], row_ids=[ids, ids[:3]])
        return rows_of(out), rows_of(other)
    return rows_of(out)


CALLS = ["push", "pushpull", "pushpull dense", "pull", "pull dense", "row_sparse_pull"]
OPTIMIZERS = {
    "none": None,
    "sgd": lambda: optimizer.SGD(learning_rate=0.5, momentum=0.5, wd=0.25),
    "sgd, not lazy": lambda: optimizer.SGD(
        learning_rate=0.5, momentum=0.5, wd=0.25, lazy_update=False
    ),
    "adam": lambda: optimizer.Adam(learning_rate=0.25),
    "adagrad": lambda: optimizer.AdaGrad(learning_rate=0.25),
    "ftrl": lambda: optimizer.Ftrl(learning_rate=0.25),
    "adadelta": lambda: optimizer.AdaDelta(wd=0.5),
}
INTEGERS = ["float64", "float16", "int32", "uint8", "int64"]


def expected(seed, shape, dtype, steps, workers, make):
    """The results of each worker in a store of one process."""
    found = [[] for _ in range(workers)]
    with kvstore.create("local") as kv:
        kv.init(["s", "d"], first_values(seed, shape, dtype))
        if make is not None:
            kv.set_optimizer(make())
        for call, key, values, ids in program(seed, shape, dtype, steps, workers):
            together = [value for each_workers in values for value in each_workers]
            if "push" in call:
                kv.push(key, together)
            for rank in range(workers):
                reads = {"pushpull": "pull", "pushpull dense": "pull dense", "push": None}
                read = reads.get(call, call)
                found[rank].append(read and apply(kv, read, key, None, ids[rank], shape, dtype))
    return found


def run_cluster(seed, shape, dtype, steps, sizes, make):
    workers = sizes[0]

    def work(kv):
        first = first_values(seed, shape, dtype)
        if kv.rank > 0:
            first = [kvstore.RowSparse.zeros(shape, dtype), np.zeros(shape, dtype)]
        kv.init(["s", "d"], first)
        if make is not None:
            kv.set_optimizer(make())
        return [
            apply(kv, call, key, values[kv.rank], ids[kv.rank], shape, dtype)
            for call, key, values, ids in program(seed, shape, dtype, steps, workers)
        ]

    with Cluster(*sizes) as cluster:
        return cluster.run(work)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(INTEGERS),
    steps=st.lists(st.sampled_from(CALLS), min_size=1, max_size=8),
    sizes=st.sampled_from([(2, 2), (3, 2), (2, 3), (1, 2)]),
)
def test_a_cluster_does_what_one_process_does_with_all_values(seed, shape, dtype, steps, sizes):
    right = expected(seed, shape, dtype, steps, sizes[0], None)
    assert run_cluster(seed, shape, dtype, steps, sizes, None) == right


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(["float32", "float64"]),
    steps=st.lists(st.sampled_from(CALLS), min_size=2, max_size=8),
    sizes=st.sampled_from([(2, 2), (3, 2), (2, 3), (1, 2)]),
    name=st.sampled_from(sorted(set(OPTIMIZERS) - {"none"})),
)
def test_so_it_does_with_an_optimizer(seed, shape, dtype, steps, sizes, name):
    make = OPTIMIZERS[name]
    right = expected(seed, shape, dtype, steps, sizes[0], make)
    assert run_cluster(seed, shape, dtype, steps, sizes, make) == right


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"none"}))
def test_dist_async_applies_the_rows_of_each_push_on_their_own(name):
    with Cluster(2, 2, kind="dist_async") as cluster, kvstore.create("local") as one:
        stores = cluster.all_stores()
        shape = (40_000, 2)
        first = first_values(3, shape, "float64")
        each(stores, lambda kv: kv.init(["s", "d"], first))
        each(stores, lambda kv: kv.set_optimizer(OPTIMIZERS[name]()))
        one.init(["s", "d"], first)
        one.set_optimizer(OPTIMIZERS[name]())
        rng = np.random.default_rng(5)
        for _ in range(6):
            value, key = some_rows(rng, shape, "float64"), "sd"[rng.integers(2)]
            for kv in (stores[0], one):
                kv.push(key, value)
            for key in "sd":
                found = [
                    rows_of(kv.pull(key, out=None)) if key == "s" else pulled(kv, key).tobytes()
                    for kv in (stores[0], one)
                ]
                assert found[0] == found[1]


# --------------------------------------------------------------------------------- what travels


def traffic(cluster, rank=0):
    counters = cluster.members[rank].core.counters()
    return np.array([counters["bytes_sent"], counters["bytes_received"]])


@pytest.mark.parametrize("kind", ["dense", "row-sparse"])
def test_only_the_rows_asked_for_and_pushed_travel(kind):
    rng = np.random.default_rng(1)
    some = np.sort(rng.choice(WIDE[0], 1000, replace=False))
    row_bytes = WIDE[1] * 4
    with Cluster(1, 2) as cluster:
        kv = cluster.store()
        value = kvstore.RowSparse(np.ones((1000, WIDE[1]), "float32"), some, WIDE)
        kv.init("w", value if kind == "row-sparse" else np.zeros(WIDE, "float32"))
        begin = traffic(cluster)
        kv.push("w", value)
        cluster.members[0].core.drain(10)
        sent, received = traffic(cluster) - begin
        assert 1000 * row_bytes < sent < 1000 * (row_bytes + 8) + 40_000
        assert received < 40_000
        begin = traffic(cluster)
        out = kv.row_sparse_pull("w", row_ids=np.concatenate([some[::2], some[:10:2]]))
        assert same(out.indices, some[::2]) and (out.data == 1).all()
        sent, received = traffic(cluster) - begin
        assert 500 * row_bytes < received < 500 * row_bytes + 40_000
        assert sent < 500 * 8 + 40_000


def test_servers_without_a_row_that_is_asked_for_are_not_asked():
    with Cluster(1, 2) as cluster:
        kv = cluster.store()
        kv.init("w", kvstore.RowSparse.zeros((40_000, 2), "float32"))
        before = [server.counters()["messages_received"] for server in cluster.servers]
        assert not kv.row_sparse_pull("w", row_ids=np.array([0, 1])).data.any()
        assert kv.row_sparse_pull("w", row_ids=np.zeros(0, int)).indices.size == 0
        after = [server.counters()["messages_received"] for server in cluster.servers]
        assert sum(after) - sum(before) == 1


def test_one_list_of_ids_for_many_outs_is_one_request():
    with Cluster(1, 2) as cluster:
        kv = cluster.store()
        kv.init("w", np.arange(80_000.0).reshape(40_000, 2))
        ids = np.arange(0, 40_000, 7)
        outs = [kvstore.RowSparse.zeros((40_000, 2), "float64") for _ in range(4)]
        begin = traffic(cluster)
        kv.row_sparse_pull("w", out=outs, row_ids=ids)
        kvstore.wait_all()
        _, received = traffic(cluster) - begin
        assert received < 1.5 * 16 * ids.size
        for out in outs:
            assert same(out.indices, ids)
            assert same(out.data, np.arange(80_000.0).reshape(40_000, 2)[ids])


def test_row_sparse_values_travel_uncompressed(pair):
    def work(kv):
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
        kv.init("w", np.zeros((6, 2)))
        kv.push("w", sparse({2: 0.125}))
        return pulled(kv, "w")[:, 0].tolist()

    assert each(pair, work) == [[0, 0, 0.25, 0, 0, 0]] * 2


def test_a_first_value_larger_than_a_message(pair):
    shape = (220_000, 40)
    value = kvstore.RowSparse(
        np.repeat(np.arange(shape[0], dtype="float32"), shape[1]).reshape(shape),
        np.arange(shape[0]),
        shape,
    )

    def work(kv):
        out = kvstore.RowSparse.zeros(shape, "float32")
        kv.broadcast("w", value if kv.rank == 0 else out, out)
        return out

    for out in each(pair, work):
        assert same(out.indices, value.indices) and same(out.data, value.data)


@pytest.mark.parametrize("shape", [(2, 100_003), (3, 99_991, 1), (2, 3 << 18)])
def test_rows_that_are_cut_into_slices(pair, shape):
    rng = np.random.default_rng(2)
    first, row = rng.integers(-9, 9, (2, *shape)).astype("float32")

    def work(kv):
        kv.init("w", first if kv.rank == 0 else np.zeros_like(first))
        out = kv.row_sparse_pull("w", row_ids=np.array([1]))
        assert same(out.data, first[1:2])
        kv.push("w", kvstore.RowSparse(row[1:2], np.array([1]), shape))
        kv.pull("w", out=out, ignore_sparse=False)
        assert same(out.indices, np.array([1])) and same(out.data, 2 * row[1:2])
        kv.set_optimizer(optimizer.SGD(learning_rate=1, momentum=0.5, wd=0.5))
        kv.push("w", kvstore.RowSparse(row[:1], np.array([0]), shape))
        return pulled(kv, "w")

    for found in each(pair, work):
        assert same(found[1:2], 2 * row[1:2])  # the step was lazy
        assert (found[:1] == -2 * row[:1]).all()


# -------------------------------------------------------------------------------- what is wrong


def test_dense_and_row_sparse_pushes_of_one_round_fail_for_all(pair):
    each(pair, lambda kv: kv.init("w", np.zeros((6, 2))))
    out = np.ones((6, 2))

    def work(kv):
        with pytest.raises(kvstore.ArrayTypeError, match=r"'w'.*worker 0.*dense.*worker 1"):
            kv.pushpull("w", np.ones((6, 2)) if kv.rank == 0 else sparse({1: 1}), out=out.copy())
        kv.push("w", sparse({1: 1}))
        return pulled(kv, "w")[:, 0].tolist()

    assert each(pair, work) == [[0, 2, 0, 0, 0, 0]] * 2


BAD = {
    "row id too large": lambda kv: kv.row_sparse_pull("s", row_ids=np.array([1, 6])),
    "negative row id": lambda kv: kv.row_sparse_pull("s", row_ids=np.array([-1])),
    "shape": lambda kv: kv.push("s", sparse({1: 1}, (7, 2))),
    "type": lambda kv: kv.push("s", sparse({1: 1}, dtype="float32")),
    "dense value": lambda kv: kv.push("s", np.ones((6, 2))),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_on_one_worker_is_refused_there_and_changes_nothing(pair, case):
    each(pair, lambda kv: kv.init("s", sparse({1: 1})))
    with pytest.raises(kvstore.KVStoreError, match="'s'"):
        BAD[case](pair[1])
    each(pair, lambda kv: kv.push("s", sparse({2: 3})))
    for kv in pair:
        assert has_rows(kv.pull("s"), {2: 6})


def test_workers_that_disagree_on_the_form_of_a_key(pair):
    def work(kv):
        with pytest.raises(kvstore.ArrayTypeError, match=r"row-sparse on worker 0, dense here"):
            kv.init("w", sparse({1: 1}) if kv.rank == 0 else np.zeros((6, 2)))
            raise kvstore.ArrayTypeError("row-sparse on worker 0, dense here")  # rank 0 succeeds

    each(pair, work)


def test_workers_that_disagree_on_the_shape_of_a_row_sparse_key(pair):
    def work(kv):
        kv.init("w", sparse({1: 1}, (6 + kv.rank, 2)))

    first, second = Worker(work, pair[0]), Worker(work, pair[1])
    first.result()
    with pytest.raises(kvstore.InvalidArgumentError, match=r"shape \(6, 2\) on worker 0"):
        second.result()


def test_a_deleted_key_may_come_back_with_another_form(pair):
    def work(kv):
        kv.init("w", sparse({1: 1}))
        kv.push("w", sparse({kv.rank: 1}))
        kv.delete("w")
        kv.init("w", np.ones((6, 2)))
        kv.push("w", sparse({1: 1}))
        dense = pulled(kv, "w")[:, 0].tolist()
        kv.delete("w")
        kv.init("w", sparse({3: 3}, (9, 1)))
        return dense, rows_of(kv.pull("w"))

    due = [0, 2, 0, 0, 0, 0], rows_of(sparse({3: 3}, (9, 1)))
    assert each(pair, work) == [due, due]


def test_a_pull_waits_for_the_pushes_before_it(pair):
    each(pair, lambda kv: kv.init("s", sparse({1: 1})))
    pair[0].push("s", sparse({2: 1}))
    handles = [
        pair[0].row_sparse_pull("s", out=sparse({}), row_ids=np.array([2]), async_op=True),
        pair[0].pull("s", out=sparse({}), ignore_sparse=False, async_op=True),
    ]
    assert not any(handle.done() for handle in handles)
    out = sparse({})
    pair[1].pushpull("s", sparse({3: 1}), out=out)
    for handle in handles:
        handle.wait()
    assert has_rows(out, {2: 1, 3: 1})


def test_a_pull_that_is_given_up_leaves_its_out_alone():
    with Cluster(2, 2) as cluster:
        kv, other = cluster.all_stores(timeout=2)
        each([kv, other], lambda kv: kv.init("s", sparse({1: 1})))
        kv.push("s", sparse({2: 1}))
        out = sparse({5: 5})
        view = out.data  # so that the call waits
        with pytest.raises(kvstore.TimeoutError, match=r"'s'.*has not (pushed|answered)"):
            kv.pull("s", out=out, ignore_sparse=False)
        with pytest.raises(kvstore.TimeoutError, match=r"'s'.*has not (pushed|answered)"):
            kv.row_sparse_pull("s", out=out, row_ids=np.array([1]))
        assert has_rows(out, {5: 5}) and (view == 5).all()
        forget()  # the push has waited in vain, too, but counts
        other.push("s", sparse({2: 1}))
        kv.pull("s", out=out, ignore_sparse=False)
        assert has_rows(out, {2: 2})


@pytest.mark.parametrize("seed", range(16))
def test_faults_of_the_wire_end_every_call_with_the_right_rows_or_a_typed_error(seed):
    faults = ("delay=1,reorder", "reorder,kill", "reorder,fail", "reorder,short")[seed % 4]
    try:
        cluster = Cluster(2, 2, transport="faulty", seed=seed, faults=faults)
    except kvstore.KVStoreError:
        assert seed % 4
        return

    def work(kv):
        rng, shape = np.random.default_rng([seed, kv.rank]), (40_000, 2)
        try:
            kv.init("s", kvstore.RowSparse.zeros(shape, "float64"))
            for number in range(1, 6):
                ids = np.sort(rng.choice(shape[0], 3000, replace=False))
                kv.push("s", kvstore.RowSparse(np.full((3000, 2), float(number)), ids, shape))
                out = kv.row_sparse_pull("s", row_ids=ids)
                assert same(out.indices, ids)
                assert np.isin(out.data, [number, 2 * number]).all()
        except kvstore.KVStoreError as error:
            return error
        return None

    with cluster:
        errors = cluster.run(work)
        assert seed % 4 or errors == [None, None]
    forget()


LAYERED = {
    "lars": lambda: optimizer.LARS(learning_rate=0.5, momentum=0.5, wd=0.25),
    "lars, not lazy": lambda: optimizer.LARS(learning_rate=0.5, momentum=0.5, lazy_update=False),
    "lamb": lambda: optimizer.LAMB(learning_rate=0.25, wd=0.125),
    "lbsgd": lambda: optimizer.LBSGD(learning_rate=0.5, momentum=0.5, warmup_strategy="lars"),
}


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("kind", ["dist_sync", "dist_async"])
def test_norms_of_a_row_sparse_value_are_those_of_all_its_slices(name, kind):
    shape, workers = (40_000, 3), 1 if kind == "dist_async" else 2
    rng = np.random.default_rng(4)
    values = [[some_rows(rng, shape, "float64") for _ in range(workers)] for _ in range(6)]
    first = some_rows(rng, shape, "float64")

    def work(kv):
        found = []
        kv.init("s", first)
        kv.set_optimizer(LAYERED[name]())
        for step in values:
            kv.push("s", step if kv.type == "local" else step[kv.rank])
            found.append(kv.pull("s"))
        return found

    with kvstore.create("local") as one:
        right = work(one)
    with Cluster(workers, 3, kind=kind) as cluster:
        for found in cluster.run(work):
            for value, due in zip(found, right, strict=True):
                assert same(value.indices, due.indices)
                np.testing.assert_allclose(value.data, due.data, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_without_memory_all_slices_take_the_rows_of_a_round_or_none_does(seed):
    shape, failed, seen = (40_000, 2), 0, set()
    ids = np.arange(0, shape[0], 1000)
    rows = kvstore.RowSparse(np.ones((ids.size, 2), "float32"), ids, shape)
    for nth in itertools.count(seed + 1, 4):  # until an attempt needs fewer allocations than nth
        with Cluster(1, 2) as cluster:
            kv = cluster.store(timeout=10)
            kv.set_optimizer(LAYERED["lamb"]())
            kv.init("s", kvstore.RowSparse.zeros(shape, "float32"))
            kv.push("s", rows)
            before = pulled(kv, "s")[ids[0], 0]
            _core.fault_set("alloc", nth)
            try:
                kv.push("s", rows)
                kv.pull("s").wait_to_read()
            except (MemoryError, kvstore.PeerLostError):
                failed += 1
            finally:
                passed = _core.fault_set("alloc", 0)
            forget()
            with contextlib.suppress(kvstore.PeerLostError):
                value = pulled(kv, "s")[ids]
                assert (value == value[0, 0]).all()
                seen.add(float(value[0, 0]) == float(before))
        if passed < nth:
            break
    assert failed > 0
    assert False in seen


CUT = (2, 100_003)
MANY_CALLS = {
    "push": lambda kv: kv.push("s", [sparse({0: 1}), sparse({1: 1})]),
    "pull": lambda kv: kv.pull("s", out=[sparse({}), sparse({})], ignore_sparse=False),
    "pull dense": lambda kv: pulled(kv, "s"),
    "pushpull": lambda kv: kv.pushpull("d", sparse({2: 1}), out=[sparse({}), np.zeros((6, 2))]),
    "row_sparse_pull": lambda kv: kv.row_sparse_pull(
        "d", out=[sparse({}), sparse({})], row_ids=[np.array([1]), np.array([1, 2])]
    ),
    "cut": lambda kv: kv.pushpull(
        "cut", sparse({1: 1}, CUT, "float32"), out=sparse({}, CUT, "float32")
    ),
    "cut, by row": lambda kv: kv.row_sparse_pull("cut", row_ids=np.array([1])),
    "init": lambda kv: kv.init("new", sparse({1: 1})),
}


@pytest.mark.parametrize("call", MANY_CALLS)
def test_every_allocation_of_a_call_may_fail(call):
    nth, failed = 0, 0
    while True:
        nth += 1
        with Cluster(1, 2) as cluster:
            kv = cluster.store(timeout=10)
            kv.init("s", sparse({1: 1}))
            kv.init("d", np.ones((6, 2)))
            kv.init("cut", np.zeros(CUT, "float32"))
            _core.fault_set("alloc", nth)
            try:
                MANY_CALLS[call](kv)
                kvstore.wait_all()
            except (MemoryError, kvstore.PeerLostError, kvstore.TimeoutError):
                failed += 1
            passed = _core.fault_set("alloc", 0)
            forget()
        if passed < nth:
            break
    assert failed > 3
