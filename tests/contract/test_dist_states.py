"""Files of training states in dist stores: training goes on as if it had not stopped, on another
cluster, in a local store, and from there."""

import contextlib
import threading
from dataclasses import dataclass

import numpy as np
import own_optimizers as own
import pytest
from helpers import LONG, same
from inside import Cluster, each

import kvstore
from kvstore.lr_scheduler import FactorScheduler
from kvstore.optimizer import LARS, SGD, SGLD, Adam, GroupAdaGrad, Nadam

numpy_io = pytest.importorskip("safetensors.numpy", reason="mlkvstore[state] is not installed")

ALLOWED = ("own_optimizers",)
STOP, STEPS = 3, 6
SMALL, MANY, ROWS = (5,), (90_000,), (3_000, 30)  # MANY and ROWS are cut into slices


@dataclass
class Job:
    """What is trained: with its optimizer, the shapes of the keys and their element type."""

    make: object
    shapes: tuple
    dtype: str = "float32"

    def first(self):
        rng = np.random.default_rng(1)
        return {f"k{i}": self.numbers(rng, shape) for i, shape in enumerate(self.shapes)}

    def numbers(self, rng, shape):
        return rng.normal(size=shape).astype(self.dtype)

    def gradient(self, step, key):
        rng = np.random.default_rng([step, int(key[1:])])
        return self.numbers(rng, self.shapes[int(key[1:])])


def halving():
    return FactorScheduler(step=4, factor=0.5)


JOBS = {
    "momentum": Job(lambda: SGD(lr=0.1, momentum=0.9, wd=0.125), (SMALL, MANY, ())),
    "plain": Job(lambda: SGD(lr=0.1), (SMALL, MANY)),
    "adam": Job(lambda: Adam(lr=0.1, lr_scheduler=halving()), (SMALL, MANY)),
    "nadam": Job(lambda: Nadam(lr=0.1), (SMALL, SMALL, MANY)),
    "lars": Job(lambda: LARS(lr=0.1, momentum=0.9, lr_scheduler=halving()), (SMALL, MANY)),
    "rows": Job(lambda: GroupAdaGrad(lr=0.1), ((2, 3), ROWS)),
    "float16": Job(
        lambda: SGD(lr=0.1, momentum=0.9, multi_precision=True), (SMALL, (700_000,)), "float16"
    ),
    "float64": Job(lambda: Adam(lr=0.1), (SMALL, MANY), "float64"),
    "own": Job(
        lambda: own.OwnNested(lr=0.25, wd=0.125, lr_scheduler=halving()), (SMALL, (300_000,), ())
    ),
    "own float16": Job(
        lambda: own.OwnNested(lr=0.25, multi_precision=True), (SMALL, (700_000,)), "float16"
    ),
}


@contextlib.contextmanager
def place(job, values, where, optimizer=True, kind="dist_sync"):
    """The stores of a place, "local" or (workers, servers), with these values."""
    if where == "local":
        with kvstore.create() as kv:
            if optimizer:
                kv.set_optimizer(job.make())
            for key, value in values.items():
                kv.init(key, value)
            yield [kv]
        return
    allowed = ALLOWED if isinstance(job.make(), own.Momentum) else ()
    with Cluster(*where, kind=kind, allow_import=allowed) as cluster:
        stores = cluster.all_stores()
        if optimizer:
            each(stores, lambda kv: kv.set_optimizer(job.make()))
        each(stores, lambda kv: [kv.init(key, value) for key, value in values.items()])
        yield stores


def train(job, stores, steps):
    """Worker 0 has the gradients, the others zeros, so that the number of workers is no matter."""

    def work(kv):
        for step in steps:
            for key in kv.keys():  # noqa: SIM118
                gradient = job.gradient(step, key)
                kv.push(key, gradient if kv.rank == 0 else np.zeros_like(gradient))

    each(stores, work)


def values_of(kv):
    return {key: kv.pull(key).asnumpy() for key in kv.keys()}  # noqa: SIM118


def check_same(values, others):
    assert values.keys() == others.keys()
    for key, value in values.items():
        assert same(value, others[key])


@pytest.fixture(scope="module")
def trained():
    """job → the values when training stops, and those at its end without a stop."""
    known = {}

    def of(name):
        if name not in known:
            job = JOBS[name]
            with place(job, job.first(), "local") as (kv,):
                train(job, [kv], range(STOP))
                middle = values_of(kv)
                train(job, [kv], range(STOP, STEPS))
                known[name] = middle, values_of(kv)
        return known[name]

    return of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "states.safetensors"


MOVES = [
    ((2, 2), 1, (1, 3), 0),
    ((2, 2), 0, (2, 2), 1),
    ((3, 1), 2, (2, 2), 0),
    ((2, 2), 1, "local", 0),
    ("local", 0, (3, 2), 2),
]


@pytest.mark.parametrize("dump", [False, True], ids=["states", "dump"])
@pytest.mark.parametrize(("where", "saver", "then", "loader"), MOVES)
@pytest.mark.parametrize("name", JOBS)
def test_training_goes_on_elsewhere(name, where, saver, then, loader, dump, trained, path):
    job = JOBS[name]
    middle, end = trained(name)
    with place(job, job.first(), where) as stores:
        train(job, stores, range(STOP))
        check_same(values_of(stores[0]), middle)
        stores[saver].save_optimizer_states(path, dump_optimizer=dump)
    early = dump and "own" in name  # or keys were cut
    with place(job, {} if early else middle, then, optimizer=not dump) as stores:
        stores[loader].load_optimizer_states(path)
        if early:
            each(stores, lambda kv: kv.init(list(middle), list(middle.values())))
        train(job, stores, range(STOP, STEPS))
        check_same(values_of(stores[-1]), end)


def test_noise_goes_on_where_it_was(path):
    job = Job(lambda: SGLD(lr=0.1), (SMALL, MANY))
    with place(job, job.first(), (2, 2)) as stores:
        train(job, stores, range(STOP))
        stores[1].save_optimizer_states(path)
        middle = values_of(stores[0])
        train(job, stores, range(STOP, STEPS))
        end = values_of(stores[0])
    with place(job, middle, (1, 2)) as stores:
        stores[0].load_optimizer_states(path)
        train(job, stores, range(STOP, STEPS))
        check_same(values_of(stores[0]), end)


@pytest.mark.parametrize("dump", [False, True], ids=["states", "dump"])
def test_dist_async(dump, path):
    """Each worker counts its own pushes: all go on from the servers' counts."""
    job = JOBS["adam"]

    def take_turns(stores, steps):
        for step in steps:
            for kv in stores:
                for key in kv.keys():  # noqa: SIM118
                    kv.push(key, job.gradient(step, key))
                    kv.pull(key)  # the push has been applied

    with place(job, job.first(), (2, 2), kind="dist_async") as stores:
        take_turns(stores, range(STOP))
        stores[1].save_optimizer_states(path, dump_optimizer=dump)
        middle = values_of(stores[0])
        take_turns(stores, range(STOP, STEPS))
        end = values_of(stores[0])
    with place(job, middle, (2, 3), kind="dist_async") as stores:
        stores[1].load_optimizer_states(path)
        take_turns(stores, range(STOP, STEPS))
        check_same(values_of(stores[1]), end)


# ------------------------------------------------------------------------------------ who calls


def test_a_worker_without_the_optimizer_saves_and_loads(path, trained):
    job = JOBS["adam"]
    middle, end = trained("adam")
    with Cluster(2, 2) as cluster:
        stores = cluster.all_stores()
        stores[0].set_optimizer(job.make())
        each(stores, lambda kv: [kv.init(key, value) for key, value in job.first().items()])
        train(job, stores, range(STOP))
        stores[1].save_optimizer_states(path)
        assert stores[1].optimizer is None
    with Cluster(2, 2) as cluster:
        stores = cluster.all_stores()
        stores[0].set_optimizer(job.make())
        each(stores, lambda kv: [kv.init(key, value) for key, value in middle.items()])
        stores[1].load_optimizer_states(path)
        train(job, stores, range(STOP, STEPS))
        check_same(values_of(stores[0]), end)


def test_the_optimizer_of_a_file_is_set_for_all(path):
    job = Job(lambda: SGD(lr=0.5, momentum=0.5, lr_mult={"k0": 2}), (SMALL,))
    with place(job, job.first(), "local") as (kv,):
        train(job, [kv], range(2))
        kv.save_optimizer_states(path, dump_optimizer=True)
    other = Job(Adam, (SMALL,))
    for loader in (0, 1):
        with place(other, job.first(), (2, 2)) as stores:
            train(job, stores, range(1))
            stores[loader].load_optimizer_states(path)
            assert [kv.optimizer for kv in stores] == [job.make()] * 2
            each(stores, lambda kv: kv.set_optimizer_params(lr=0.25))


def test_the_numbers_of_worker_0_are_those_that_are_saved(path):
    job = JOBS["plain"]
    with place(job, job.first(), (2, 2)) as stores:
        train(job, stores, range(2))
        stores[0].set_optimizer_params(momentum=0.5)
        train(job, stores, range(2))
        assert stores[1].optimizer == SGD(lr=0.1)
        stores[1].save_optimizer_states(path, dump_optimizer=True)
        assert stores[1].optimizer == SGD(lr=0.1)
    assert set(numpy_io.load_file(path)) == {"k0/m", "k1/m"}
    with kvstore.create() as kv:
        kv.load_optimizer_states(path)
        assert kv.optimizer == SGD(lr=0.1, momentum=0.5)


def test_states_wait_for_the_init_of_their_keys(path, trained):
    job = JOBS["momentum"]
    middle, end = trained("momentum")
    with place(job, job.first(), (2, 2)) as stores:
        train(job, stores, range(STOP))
        stores[1].save_optimizer_states(path)
    with Cluster(2, 3) as cluster:
        stores = cluster.all_stores()
        each(stores, lambda kv: kv.set_optimizer(job.make()))
        each(stores, lambda kv: kv.init("k0", middle["k0"]))
        stores[1].load_optimizer_states(path)
        each(stores, lambda kv: [kv.init(key, middle[key]) for key in ("k1", "k2")])
        train(job, stores, range(STOP, STEPS))
        check_same(values_of(stores[0]), end)


def test_what_a_file_has_not_begins_anew(path):
    """A key that was pushed before the load, and not before the file was written."""
    job = Job(lambda: Adam(lr=0.1), (SMALL, MANY))
    with place(job, job.first(), (1, 2)) as (kv,):
        kv.push("k0", job.gradient(0, "k0"))
        kv.save_optimizer_states(path)
    with place(job, job.first(), (2, 2)) as stores, place(job, job.first(), "local") as (local,):
        train(job, stores, range(1))
        each(stores, lambda kv: kv.barrier())
        stores[0].load_optimizer_states(path)
        local.init("fresh", stores[0].pull("k1"))
        local.push("fresh", job.gradient(1, "k1"))
        train(job, stores, range(1, 2))
        assert same(stores[0].pull("k1").asnumpy(), local.pull("fresh").asnumpy())


def test_residuals_of_a_local_store_are_left_out(path):
    job = Job(lambda: SGD(lr=0.1, momentum=0.9), (SMALL,))
    with place(job, job.first(), "local") as (kv,):
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
        train(job, [kv], range(2))
        kv.save_optimizer_states(path)
        assert "k0/residual.0" in numpy_io.load_file(path)
    with place(job, job.first(), (1, 2)) as (kv,):
        kv.load_optimizer_states(path)
        kv.save_optimizer_states(path)
    assert set(numpy_io.load_file(path)) == {"k0/m"}


def test_pushes_under_way_are_in_the_file(path):
    """And those of this worker that are to come wait, until the others have pushed too."""
    job = Job(lambda: SGD(lr=0.1, momentum=0.9), (SMALL,))
    with place(job, job.first(), (2, 1)) as stores:
        late = stores[1].push("k0", job.gradient(0, "k0"), async_op=True)

        def work(kv):
            if kv.rank == 1:
                kv.save_optimizer_states(path)
            else:
                kv.push("k0", job.gradient(1, "k0"))

        each(stores, work)
        late.wait()
        assert same(
            numpy_io.load_file(path)["k0/m"],
            np.float32(-0.1) * (job.gradient(0, "k0") + job.gradient(1, "k0")),
        )


# ---------------------------------------------------------------------------------------- errors


def refused(match, error=kvstore.InvalidArgumentError):
    return pytest.raises(error, match=match)


@pytest.fixture
def file_of(path):
    def write(job):
        with place(job, job.first(), "local") as (kv,):
            train(job, [kv], range(2))
            kv.save_optimizer_states(path)
        return path

    return write


ADAM = Job(lambda: Adam(lr=0.1), (SMALL, MANY))


@pytest.fixture
def pair():
    """Two stores that have been trained; afterwards they are as they were."""
    with (
        place(ADAM, ADAM.first(), (2, 2)) as stores,
        place(ADAM, ADAM.first(), "local") as (local,),
    ):
        train(ADAM, stores, range(STOP))
        yield stores
        train(ADAM, stores, range(STOP, STEPS))
        train(ADAM, [local], range(STEPS))
        check_same(values_of(stores[1]), values_of(local))


@pytest.mark.parametrize("rank", [0, 1])
class TestBad:
    def test_another_optimizer(self, rank, pair, file_of):
        with refused("of the optimizer SGD, the store's is a Adam"):
            pair[rank].load_optimizer_states(file_of(Job(SGD, (SMALL, MANY))))

    def test_another_shape(self, rank, pair, file_of):
        with refused(r"'(m|v)' of key 'k1' .*another shape"):
            pair[rank].load_optimizer_states(file_of(Job(ADAM.make, (SMALL, (90_001,)))))

    def test_another_element_type(self, rank, pair, file_of):
        with refused("another element type"):
            pair[rank].load_optimizer_states(file_of(Job(ADAM.make, (SMALL, MANY), "float64")))

    def test_keys_of_another_type(self, rank, pair, path):
        with kvstore.create() as kv:
            kv.set_optimizer(Adam())
            kv.init(3, np.ones(5, np.float32))
            kv.push(3, np.ones(5, np.float32))
            kv.save_optimizer_states(path)
        with refused("its keys are int, those of the store str"):
            pair[rank].load_optimizer_states(path)

    def test_an_unknown_state(self, rank, pair, file_of):
        path = file_of(ADAM)
        tensors = numpy_io.load_file(path)
        length = int.from_bytes(path.read_bytes()[:8], "little")
        header = path.read_bytes()[8 : 8 + length]
        name = next(iter(name for name in tensors if name.startswith("k0/")))
        changed = header.replace(f'"{name}"'.encode(), b'"k0/' + b"x" * (len(name) - 3) + b'"')
        path.write_bytes(path.read_bytes()[:8] + changed + path.read_bytes()[8 + length :])
        with refused("none that the optimizer keeps"):
            pair[rank].load_optimizer_states(path)

    def test_a_file_that_was_cut(self, rank, pair, file_of):
        path = file_of(ADAM)
        path.write_bytes(path.read_bytes()[:-9])
        with refused("not a file of training states"):
            pair[rank].load_optimizer_states(path)

    def test_no_file(self, rank, pair, tmp_path):
        with refused("No such file", FileNotFoundError):
            pair[rank].load_optimizer_states(tmp_path / "none")
        with refused("Is a directory", IsADirectoryError):
            pair[rank].save_optimizer_states(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_without_an_optimizer(rank, path, file_of):
    with place(ADAM, ADAM.first(), (2, 2), optimizer=False) as stores:
        with refused("has no optimizer"):
            stores[rank].save_optimizer_states(path)
        assert not path.exists()
        with refused("optimizer"):
            stores[rank].load_optimizer_states(file_of(ADAM))


def test_an_optimizer_in_python_that_servers_cannot_import_is_refused(path):
    class Own(kvstore.optimizer.Optimizer):
        def update(self, key, weight, grad, state):
            weight -= grad

    kvstore.optimizer.register(Own)
    for made, words in ((Own(), "Own is defined in a function"), (own.OwnNested(), "may not imp")):
        with kvstore.create() as kv:
            kv.set_optimizer(made)
            kv.save_optimizer_states(path, dump_optimizer=True)
        with place(ADAM, ADAM.first(), (2, 2)) as stores:
            for kv in stores:
                with refused(words, kvstore.KVStoreError):
                    kv.load_optimizer_states(path)
                assert kv.optimizer == Adam(lr=0.1)


def test_keys_of_integers_have_no_state(path):
    with place(ADAM, ADAM.first(), (2, 2)) as stores:
        each(stores, lambda kv: kv.init("count", np.arange(4)))
        stores[1].save_optimizer_states(path)
        stores[0].load_optimizer_states(path)
        assert same(stores[1].pull("count").asnumpy(), np.arange(4))
    assert numpy_io.load_file(path) == {}


@pytest.mark.parametrize("verb", ["save", "load"])
def test_the_deadline(verb, file_of, tmp_path):
    """A worker whose push waits for another's."""
    path = file_of(ADAM)
    with Cluster(2, 2) as cluster:
        stores = [cluster.store(0), cluster.store(1, timeout=0.3)]
        each(stores, lambda kv: kv.set_optimizer(Adam(lr=0.1)))
        each(stores, lambda kv: [kv.init(key, value) for key, value in ADAM.first().items()])
        late = stores[1].push("k0", ADAM.gradient(0, "k0"), async_op=True)
        with refused("key 'k0'.*(worker 0|deadline)", kvstore.TimeoutError):
            if verb == "save":
                stores[1].save_optimizer_states(tmp_path / "other")
            else:
                stores[1].load_optimizer_states(path)
        with contextlib.suppress(kvstore.TimeoutError):
            late.wait()
        stores[0].push("k0", ADAM.gradient(0, "k0"))
        stores[1].save_optimizer_states(tmp_path / "other")
        stores[1].load_optimizer_states(tmp_path / "other")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_server(rank, file_of, tmp_path):
    path = file_of(ADAM)
    with place(ADAM, ADAM.first(), (2, 2)) as stores:
        kv = stores[rank]
        kv.load_optimizer_states(path)
    with Cluster(2, 2) as cluster:
        stores = cluster.all_stores()
        each(stores, lambda kv: kv.set_optimizer(Adam(lr=0.1)))
        each(stores, lambda kv: [kv.init(key, value) for key, value in ADAM.first().items()])
        cluster.servers[1].close()
        for call in (
            lambda: stores[rank].save_optimizer_states(tmp_path / "other"),
            lambda: stores[rank].load_optimizer_states(path),
        ):
            with refused("server 1", kvstore.PeerLostError):
                call()


# ------------------------------------------------------------------------------ many that call


@pytest.mark.parametrize("dump", [False, True], ids=["states", "dump"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), None])
def test_all_workers_may_load_and_go_on_at_once(order, dump, path, trained):
    """In a row or together (None): nobody waits for the others before the next push."""
    job = JOBS["nadam"]
    middle, end = trained("nadam")
    with place(job, job.first(), (3, 2)) as stores:
        train(job, stores, range(STOP))
        stores[0].save_optimizer_states(path, dump_optimizer=dump)
    with place(job, middle, (3, 2)) as stores:
        turns = {rank: threading.Event() for rank in range(3)}

        def work(kv):
            place = order.index(kv.rank) if order else 0
            if place > 0:
                assert turns[order[place - 1]].wait(LONG)
            kv.load_optimizer_states(path)
            late = kv.push("k0", first if kv.rank == 0 else np.zeros_like(first), async_op=True)
            turns[kv.rank].set()
            late.wait()

        first = job.gradient(STOP, "k0")
        each(stores, work)
        for key in ("k1", "k2"):
            gradient = job.gradient(STOP, key)
            each(stores, lambda kv: kv.push(key, gradient if kv.rank == 0 else 0 * gradient))  # noqa: B023
        train(job, stores, range(STOP + 1, STEPS))
        check_same(values_of(stores[1]), end)


@pytest.mark.parametrize("verb", ["save", "load"])
def test_worker_0_is_further_on(verb, file_of, path, tmp_path):
    """Its pushes that wait for this worker's are in no state on servers, but in its counts."""
    path = file_of(ADAM)
    with place(ADAM, ADAM.first(), (2, 2)) as stores:
        train(ADAM, stores, range(STOP))
        ahead = stores[0].push("k0", ADAM.gradient(STOP, "k0"), async_op=True)
        with refused("worker 0 has pushed what worker 1, which .*between two barriers"):
            if verb == "save":
                stores[1].save_optimizer_states(tmp_path / "other")
            else:
                stores[1].load_optimizer_states(path)
        assert not (tmp_path / "other").exists()
        stores[1].push("k0", np.zeros(SMALL, "float32"))
        ahead.wait()
        each(stores, lambda kv: kv.push("k1", 0 * ADAM.gradient(STOP, "k1")))
        stores[1].save_optimizer_states(tmp_path / "other")
        stores[1].load_optimizer_states(path)


def test_a_file_of_another_class_that_is_refused_changes_no_counts(path):
    with kvstore.create() as kv:
        kv.set_optimizer(SGD(momentum=0.5))
        kv.init("k0", np.ones(7, np.float32))
        kv.push("k0", np.ones(7, np.float32))
        kv.save_optimizer_states(path, dump_optimizer=True)
    for loader in (0, 1):
        with (
            place(ADAM, ADAM.first(), (2, 2)) as stores,
            place(ADAM, ADAM.first(), "local") as (kv,),
        ):
            train(ADAM, stores, range(STOP))
            with refused("another shape"):
                stores[loader].load_optimizer_states(path)
            train(ADAM, stores, range(STOP, STEPS))
            train(ADAM, [kv], range(STEPS))
            check_same(values_of(stores[0]), values_of(kv))
