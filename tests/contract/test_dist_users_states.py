"""Files of the states of users' optimizers in dist stores: what is in them, and what goes wrong.

That training goes on from them elsewhere is among the tests of test_dist_states.py.
"""

import contextlib
import json
import sys

import numpy as np
import own_optimizers as own
import pytest
from helpers import pulled, same
from inside import Cluster, each

import kvstore
from kvstore import optimizer, state_file

numpy_io = pytest.importorskip("safetensors.numpy", reason="mlkvstore[state] is not installed")

ALLOWED = ("own_optimizers",)
SHAPE, LARGE = (4, 3), (700_000,)
VALUES = {"small": np.ones(SHAPE, "f4"), "large": np.ones(LARGE, "f4"), "point": np.ones((), "f8")}


@pytest.fixture(autouse=True)
def fresh():
    own.go_on.clear()
    own.inside.clear()
    yield
    own.go_on.set()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "states"


def refused(match, error=kvstore.InvalidArgumentError):
    return pytest.raises(error, match=match)


def momentum():
    return own.Momentum(lr=0.5, momentum=0.5)


@contextlib.contextmanager
def place(made, values=VALUES, workers=2, servers=2, **options):
    """The stores of a cluster, with an optimizer that `made` makes."""
    with Cluster(workers, servers, allow_import=ALLOWED, **options) as cluster:
        stores = cluster.all_stores()
        if made is not None:
            each(stores, lambda kv: kv.set_optimizer(made()))
        each(stores, lambda kv: kv.init(list(values), list(values.values())))
        yield stores


@contextlib.contextmanager
def local(made, values=VALUES):
    with kvstore.create() as kv:
        kv.set_optimizer(made())
        kv.init(list(values), list(values.values()))
        yield kv


def train(stores, steps=2, values=VALUES):
    """All workers together push the same as one."""

    def work(kv):
        for step in range(steps):
            for key, value in values.items():
                kv.push(key, np.asarray(value * (step + 1) / len(stores)))

    each(stores, work)


def check_same(stores, other, values=VALUES):
    for key in values:
        for kv in stores:
            assert same(pulled(kv, key), pulled(other, key)), key


# ---------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("rank", [0, 1])
def test_the_file_is_that_of_a_local_store(rank, path, tmp_path):
    with place(own.OwnNested) as stores, local(own.OwnNested) as kv:
        train(stores)
        train([kv])
        stores[rank].save_optimizer_states(path, dump_optimizer=True)
        kv.save_optimizer_states(tmp_path / "local", dump_optimizer=True)
    (found, about), (wanted, expected) = map(state_file.read, (path, tmp_path / "local"))
    assert about == expected
    assert found["num_update"] == wanted["num_update"] == 2
    for (key, count, stype, slots), other in zip(found["keys"], wanted["keys"], strict=True):
        assert (key, count, stype) == other[:3]
        assert slots.keys() == other[3].keys()
        assert len(slots) == 5
        for name, array in slots.items():
            assert (array.dtype, array.shape) == (other[3][name].dtype, other[3][name].shape)
            assert same(array, other[3][name]), name


def test_a_class_without_state_has_its_counts(path):
    with place(own.Curious, {"w": np.ones(3)}) as stores:
        train(stores, 3, {"w": np.ones(3)})
        stores[1].save_optimizer_states(path)
    assert state_file.read(path)[0]["keys"] == [("w", 3, "default", {})]
    own.seen.clear()
    with place(own.Curious, {"w": np.ones(3)}, 1, 1) as (kv,):
        kv.load_optimizer_states(path)
        train([kv], 1, {"w": np.ones(3)})
        kv.pull("w")
    assert own.seen[0][3:5] == (4, 4)


@pytest.mark.parametrize("there", ["local", (1, 1), (3, 2)], ids=str)
def test_row_sparse_keys_go_on(there, path):
    dense = np.zeros((6, 2), "f4")
    dense[[1, 4]] = 1
    value = kvstore.RowSparse.from_dense(dense)

    def push(stores):
        rows = np.full((2, 2), 1 / len(stores), "f4")
        gradient = kvstore.RowSparse(rows, [1, 5], dense.shape)
        each(stores, lambda kv: kv.push("w", gradient))

    def content(kv):
        found = kv.pull("w")
        return found if isinstance(found, np.ndarray) else found.todense()

    with local(own.RowMomentum, {"w": value}) as kv, contextlib.ExitStack() as stack:
        other = own.RowMomentum
        stores = stack.enter_context(place(other, {"w": value}, 1, 2))
        for _ in range(2):
            push([kv])
            push(stores)
        stores[0].save_optimizer_states(path)
        assert numpy_io.load_file(path)["w/state.0"][1, 0] == 2
        middle = {"w": stores[0].pull("w")}
        if there == "local":
            stores = [stack.enter_context(local(other, middle))]
        else:
            stores = stack.enter_context(place(other, middle, *there))
        stores[-1].load_optimizer_states(path)
        if there != (3, 2):  # thirds are not exact
            push([kv])
            push(stores)
            assert same(content(stores[0]), content(kv))
        stores[0].save_optimizer_states(path)
        assert state_file.read(path)[0]["keys"][0][2] == "row_sparse"


@pytest.mark.parametrize("loader", [0, 1])
def test_states_wait_for_the_init_of_their_keys(loader, path):
    with place(momentum) as stores, local(momentum) as kv:
        train(stores)
        train([kv])
        stores[0].save_optimizer_states(path)
        middle = {key: pulled(kv, key) for key in VALUES}
        with place(momentum, {"small": middle["small"]}, 2, 1) as others:
            others[loader].load_optimizer_states(path)
            # What still waits is in a file that is saved now.
            before = path.read_bytes()
            others[loader].save_optimizer_states(path)
            assert numpy_io.load_file(path).keys() == numpy_io.load(before).keys()
            for key in ("point", "large"):
                each(others, lambda kv: kv.init(key, middle[key]))  # noqa: B023
            train(others)
            train([kv])
            check_same(others, kv)


@pytest.mark.parametrize("loader", [0, 1])
def test_a_running_cluster_goes_back(loader, path):
    with place(momentum) as stores, local(momentum) as kv:
        train(stores)
        train([kv])
        stores[1].save_optimizer_states(path)
        middle = {key: pulled(kv, key) for key in VALUES}
        train(stores)
        each(stores, lambda kv: kv.delete(list(VALUES)))
        each(stores, lambda kv: kv.init(list(middle), list(middle.values())))
        train(stores, 1)
        each(stores, lambda kv: kv.delete("small"))
        each(stores, lambda kv: kv.init("small", middle["small"]))
        each(stores, lambda kv: kv.delete(["large", "point"]))
        each(stores, lambda kv: kv.init(["large", "point"], [middle["large"], middle["point"]]))
        stores[loader].load_optimizer_states(path)
        train(stores)
        train([kv])
        check_same(stores, kv)


def test_a_state_that_was_loaded_is_saved_as_it_was(path, tmp_path):
    """And may be replaced by one of another shape: the class has not seen it yet."""
    with place(own.Shaped) as stores:
        train(stores)
        stores[0].save_optimizer_states(path)
        with place(own.Shaped) as others:
            others[1].load_optimizer_states(path)
            others[0].save_optimizer_states(tmp_path / "other")
            assert same(
                numpy_io.load_file(tmp_path / "other")["small/state"],
                numpy_io.load_file(path)["small/state"],
            )
            others[0].load_optimizer_states(tmp_path / "other")
            train(others, 1)
            others[0].save_optimizer_states(tmp_path / "other")
        assert (numpy_io.load_file(tmp_path / "other")["small/state"] == 3).all()


def test_keys_that_the_file_has_not_begin_anew(path):
    with place(momentum, {"small": VALUES["small"]}) as stores:
        stores[0].save_optimizer_states(path)
        train(stores, 2, {"small": VALUES["small"]})
        stores[1].load_optimizer_states(path)
        stores[1].save_optimizer_states(path)
        assert numpy_io.load_file(path) == {}
        before = pulled(stores[0], "small")
        train(stores, 1, {"small": VALUES["small"]})
        assert same(pulled(stores[0], "small"), before - np.float32(0.5))


def test_the_class_of_a_file_is_set_for_all(path):
    with local(own.OwnNested) as kv:
        train([kv])
        kv.save_optimizer_states(path, dump_optimizer=True)
        middle = {key: pulled(kv, key) for key in VALUES}
        for loader in (0, 1):
            with place(lambda: optimizer.SGD(lr=0.5), {}) as stores:
                stores[loader].load_optimizer_states(path)
                assert all(type(kv.optimizer) is own.OwnNested for kv in stores)
                each(stores, lambda kv: kv.init(list(middle), list(middle.values())))
                train(stores, 1)
                with local(own.OwnNested, middle) as other:
                    other.load_optimizer_states(path)
                    train([other], 1)
                    check_same(stores, other)


def test_all_workers_may_save_and_load_at_once(path):
    with place(momentum, workers=3) as stores, local(momentum) as kv:
        for kv_ in (*stores, kv):
            kv_.init("four", np.ones(4))
        one = {"four": np.ones(4)}
        each(stores, lambda kv: kv.push("four", np.ones(4)))
        kv.push("four", [np.ones(4)] * 3)
        each(stores, lambda kv: kv.barrier())
        each(stores, lambda kv: kv.save_optimizer_states(f"{path}{kv.rank}"))
        files = [state_file.read(f"{path}{rank}") for rank in range(3)]
        for found, _ in files:
            assert same(found["keys"][0][3]["state"], files[0][0]["keys"][0][3]["state"])
        each(stores, lambda kv: kv.load_optimizer_states(f"{path}0"))
        each(stores, lambda kv: kv.push("four", np.ones(4)))
        kv.push("four", [np.ones(4)] * 3)
        check_same(stores, kv, one)


@pytest.mark.parametrize("dump", [False, True])
def test_dist_async(dump, path):
    one = {"w": np.ones(3)}
    with place(momentum, one, kind="dist_async") as stores, local(momentum, one) as kv:
        for _ in range(2):
            for store in stores:
                store.push("w", one["w"])
                kv.push("w", one["w"])
                store.pull("w")
        stores[1].save_optimizer_states(path, dump_optimizer=dump)
        middle = {"w": pulled(kv, "w")}
        with place(momentum, middle, kind="dist_async") as others:
            others[1].load_optimizer_states(path)
            for store in others:
                store.push("w", one["w"])
                kv.push("w", one["w"])
                store.pull("w")
            check_same(others[1:], kv, one)


# -------------------------------------------------------------------------------- what goes wrong


@pytest.fixture
def running():
    """Two stores that have been trained; afterwards they are as they were."""
    with place(momentum) as stores, local(momentum) as kv:
        train(stores)
        yield stores
        train(stores)
        train([kv], 2)
        train([kv], 2)
        check_same(stores, kv)


@pytest.mark.parametrize("rank", [0, 1])
class TestBad:
    def write(self, path, made, values=VALUES, dump=False):
        with local(made, values) as kv:
            train([kv], 1, values)
            kv.save_optimizer_states(path, dump_optimizer=dump)

    def test_another_class_in_python(self, rank, running, path):
        self.write(path, own.OwnNested)
        with refused("of the optimizer OwnNested, the store's is a Momentum"):
            running[rank].load_optimizer_states(path)

    def test_a_built_in_class(self, rank, running, path):
        self.write(path, lambda: optimizer.SGD(momentum=0.5))
        with refused("of the optimizer SGD, the store's is a Momentum"):
            running[rank].load_optimizer_states(path)

    def test_a_class_that_no_server_may_import(self, rank, running, path, monkeypatch):
        class Away(own.Momentum):
            pass

        Away.__module__, Away.__qualname__ = "own_away", "Away"
        monkeypatch.setitem(
            kvstore._optimizer.registered, "away", Away
        )  # as the decorator does, without a name that stays
        self.write(path, Away, dump=True)
        with refused("own_away:Away is not known in this process: import", kvstore.KVStoreError):
            running[rank].load_optimizer_states(path)
        monkeypatch.setitem(sys.modules, "own_away", type("m", (), {"Away": Away}))
        with refused("may not import the optimizer own_away:Away", kvstore.KVStoreError):
            running[rank].load_optimizer_states(path)

    def test_another_shape(self, rank, running, path):
        values = {**VALUES, "point": np.ones(1)}
        self.write(path, momentum, values)
        with refused(r"state 'state' of key 'point' is float64 \(\), .* float64 \(1,\)"):
            running[rank].load_optimizer_states(path)

    def test_other_parts(self, rank, running, path):
        self.write(path, own.RowMomentum, {})
        with local(momentum) as kv:
            train([kv])
            kv.save_optimizer_states(path)
        tensors = numpy_io.load_file(path)
        tensors["large/state.0"] = tensors.pop("large/state")
        length = int.from_bytes(path.read_bytes()[:8], "little")
        about = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
        path.write_bytes(numpy_io.save(tensors, about))
        with refused(r"'large' consists of state, that of the file of state\.0"):
            running[rank].load_optimizer_states(path)

    def test_a_key_of_integers(self, rank, running, path):
        self.write(path, momentum, {"count": np.ones(3)})
        each(running, lambda kv: kv.init("count", np.ones(3, "i4")))
        with refused("the state of key 'count' .* updates floating types only"):
            running[rank].load_optimizer_states(path)

    def test_keys_of_another_type(self, rank, running, path):
        self.write(path, momentum, {3: np.ones(3)})
        with refused("its keys are int, those of the store str"):
            running[rank].load_optimizer_states(path)

    def test_a_file_of_this_class_into_a_built_in_one(self, rank, path):
        self.write(path, momentum)
        with place(lambda: optimizer.SGD(momentum=0.5)) as stores:
            with refused("of the optimizer .*Momentum'?, (which|the store's is a SGD)"):
                stores[rank].load_optimizer_states(path)
            assert type(stores[rank].optimizer) is optimizer.SGD

    def test_a_key_that_was_cut(self, rank, path):
        self.write(path, momentum)
        with place(None) as stores:
            each(stores, lambda kv: kv.set_optimizer(momentum()))
            with refused("the state of key 'large' .*whole on one server: .* before init"):
                stores[rank].load_optimizer_states(path)
            stores[rank].save_optimizer_states(path)
            assert numpy_io.load_file(path) == {}

    @pytest.mark.parametrize(
        ("odd", "words"),
        [
            ("set", r"the state of key 'set' holds a set as 'state\.odd\.0'"),
            ("complex", r"'state\.odd\.0' of the state of key 'complex' is of complex128"),
            ("slash", r"'state\.odd\.0' of the state of key 'slash' has a part 'a/b'"),
            ("number", r"'state\.odd\.0' of the state of key 'number' has a part 3"),
            ("twice", r"the state of key 'twice' has two parts 'state\.odd\.0\.a\.b'"),
        ],
    )
    def test_what_cannot_be_saved(self, rank, odd, words, path):
        path.write_bytes(b"old")
        values = {"a": np.ones(3), odd: np.ones(3)}
        with place(own.Odd, values) as stores, local(own.Odd, values) as kv:
            train(stores, 1, values)
            train([kv], 1, values)
            for store in (stores[rank], kv):
                with refused(words, kvstore.ArrayTypeError):
                    store.save_optimizer_states(path)
            assert path.read_bytes() == b"old"
            assert [one.name for one in path.parent.iterdir()] == ["states"]
            train(stores, 1, values)
            train([kv], 1, values)
            check_same(stores, kv, values)


def test_a_state_of_another_shape_fails_its_key_until_another_file(monkeypatch, path, tmp_path):
    """Where the class has not begun, only its next update can tell."""
    with place(own.Shaped) as stores:
        train(stores)
        stores[0].save_optimizer_states(path)
        monkeypatch.setattr(own.Shaped, "extent", 4)
        with place(own.Shaped) as others:
            others[1].load_optimizer_states(path)
            for _ in range(2):
                with refused(r"'small'.*state 'state' of key 'small' is float64 \(4,\)"):
                    each(
                        others,
                        lambda kv: kv.pushpull("small", VALUES["small"], out=np.zeros(SHAPE, "f4")),
                    )
            others[0].save_optimizer_states(tmp_path / "other")
            assert (numpy_io.load_file(tmp_path / "other")["small/state"] == 2).all()
            monkeypatch.setattr(own.Shaped, "extent", 3)
            each(others, lambda kv: kv.delete("small"))
            each(others, lambda kv: kv.init("small", VALUES["small"]))
            others[1].load_optimizer_states(path)
            each(others, lambda kv: kv.push("small", VALUES["small"]))
            assert (pulled(others[0], "small") == 4).all()
