"""`kvstore.create` of a dist kind, up to the store: options, roles, one place in a process.

The store and the data plane are stand-ins; whole clusters are tested in test_cluster_store.py.
"""

import types

import pytest
from fakes import LONG, FakeCore, until

import kvstore
from kvstore import _core, base
from kvstore.cluster import member

pytestmark = pytest.mark.ucx


class FakeStore:
    """What the core is given for a dist kind; for a local one it is the core's own class."""

    def __new__(cls, name, **options):
        if name == "local":
            return _core.KVStore(name, **options)
        store = super().__new__(cls)
        store.name, store.options = name, options
        return store


@pytest.fixture(autouse=True)
def with_dist(monkeypatch):
    stand_in = types.SimpleNamespace(
        kinds=_core.kinds, options_check=_core.options_check, KVStore=FakeStore, Node=FakeCore
    )
    monkeypatch.setattr(base, "_core", stand_in)
    monkeypatch.setattr(member, "_core", stand_in)


@pytest.fixture
def cluster(make_cluster):
    return make_cluster(1, 1, token="secret")


def create(cluster, kind="dist_sync", **options):
    server = cluster.join("server")
    store = kvstore.create(kind, scheduler=cluster.address, token="secret", **options)
    cluster.members.append(store.options["_member"])
    server.result(LONG)
    return store


@pytest.mark.parametrize(
    ("kind", "asynchronous"),
    [
        ("dist", False),
        ("dist_sync", False),
        ("Dist_Device_Sync", False),
        ("dist_async", True),
        ("DIST_ASYNC_DEVICE", True),
        ("dist_device_async", True),
    ],
)
def test_a_worker_joins_and_the_store_gets_its_member(kind, asynchronous, cluster):
    store = create(cluster, kind, timeout=LONG, num_threads=2)
    joined = store.options.pop("_member")
    assert store.name == kind
    assert store.options == {"timeout": LONG, "num_threads": 2}
    assert (joined.role, joined.rank, joined.asynchronous) == ("worker", 0, asynchronous)


def test_the_environment_is_enough(cluster, monkeypatch):
    monkeypatch.setenv("KVSTORE_SCHEDULER", cluster.address)
    monkeypatch.setenv("KVSTORE_TOKEN", "secret")
    monkeypatch.setenv("KVSTORE_TIMEOUT", "77")
    cluster.join("server")
    store = kvstore.create("dist")
    assert store.options["timeout"] == 77
    cluster.members.append(store.options["_member"])


@pytest.mark.parametrize(
    "options",
    [
        {"num_threads": 0},
        {"deterministic": 1},
        {"timeout": 0},
        {"rank": -1},
        {"num_workers": 0},
        {"scheduler": "nowhere"},
        {"token": 3},
        {"tokem": "x"},
    ],
)
def test_every_option_is_checked_before_the_cluster_hears_anything(options, cluster):
    options = {"scheduler": cluster.address, "token": "secret", **options}
    with pytest.raises(kvstore.InvalidArgumentError):
        kvstore.create("dist_sync", **options)
    assert cluster.scheduler.roster.nodes == []


@pytest.mark.parametrize("role", ["server", "scheduler"])
def test_what_is_no_worker_gets_a_store_without_a_member(role, cluster, monkeypatch):
    monkeypatch.setenv("DMLC_ROLE", role)
    numbers = {"num_workers": 1, "num_servers": 1}
    store = kvstore.create("dist", scheduler=cluster.address, **numbers)
    assert store.options["_member"] is None
    assert cluster.scheduler.roster.nodes == []


def test_a_process_has_one_place_at_a_time(cluster):
    store = create(cluster)
    with pytest.raises(kvstore.InvalidArgumentError, match="already is a worker") as info:
        kvstore.create("dist_async", scheduler=cluster.address, token="secret")
    assert cluster.address in str(info.value) and "close that store" in str(info.value)
    store.options["_member"].close(LONG)
    with pytest.raises(kvstore.InvalidArgumentError, match="cannot come back"):
        kvstore.create("dist_async", scheduler=cluster.address, token="secret")


def test_a_store_that_cannot_be_made_is_told_to_the_others(cluster, monkeypatch):
    def broken(name, **options):
        if name != "local":
            raise kvstore.DeviceError("no device")
        return _core.KVStore(name, **options)

    monkeypatch.setattr(base._core, "KVStore", broken)
    server = cluster.join("server")
    with pytest.raises(kvstore.DeviceError, match="no device"):
        kvstore.create("dist", scheduler=cluster.address, token="secret")
    until(lambda: server.result(LONG).core.lost)
    assert "its store could not be made: DeviceError: no device" in server.result(LONG).core.lost
