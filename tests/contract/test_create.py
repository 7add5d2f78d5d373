"""Making a store: kinds, options, what a store says of itself, what a build cannot do."""

import math

import numpy as np
import pytest
from helpers import assert_clean, pulled, refused, run_script

import kvstore

LOCAL_KINDS = [
    "local",
    "local_update_cpu",
    "local_allreduce_cpu",
    "device",
    "local_allreduce_device",
]


def raises(error, pattern):
    return pytest.raises(error, match=f"(?i){pattern}")


@pytest.mark.parametrize("kind", LOCAL_KINDS)
def test_every_local_kind_stores_values(kind):
    with kvstore.create(kind) as kv:
        kv.init("w", np.arange(3.0))
        kv.push("w", [np.ones(3), np.ones(3)])
        assert pulled(kv, "w").tolist() == [2, 2, 2]


@pytest.mark.parametrize("asked", ["LOCAL", "Local", "Device", "Local_AllReduce_Device"])
def test_letter_case_does_not_matter_and_type_is_lower_case(asked):
    with kvstore.create(asked) as kv:
        assert kv.type == asked.lower()


def test_the_default_kind_is_local():
    with kvstore.create() as kv:
        assert kv.type == "local"


def test_type_is_the_name_that_was_asked_for():
    with kvstore.create("local_allreduce_cpu") as kv:
        assert kv.type == "local_allreduce_cpu"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("dist_asink", "dist_async"),
        ("locall", "local"),
        ("devise", "device"),
        ("my_local", "local"),
        ("localdevice", None),
        ("", None),
        (" local", "local"),
        ("local\0", None),
    ],
)
def test_an_unknown_kind_is_refused_and_the_nearest_named(name, nearest):
    with raises(kvstore.InvalidArgumentError, nearest or "kind") as info:
        kvstore.create(name)
    if name.isprintable() and name:
        assert name in str(info.value)


@pytest.mark.parametrize("name", [3, None, b"local", ["local"]])
def test_a_kind_that_is_no_str_is_a_type_error(name):
    with pytest.raises(TypeError):
        kvstore.create(name)


def test_nccl_without_cuda_says_what_is_missing_and_what_to_do():
    script = """if True:
        import kvstore
        try:
            kvstore.create("NCCL")
        except kvstore.NotBuiltError as error:
            assert isinstance(error, ImportError)
            print(error)
    """
    done = run_script(script, KVSTORE_CUDA_PLUGIN="/no/plug-in.so")
    assert_clean(done)
    assert done.stdout.startswith("a store of kind 'nccl' cannot be had here: ")
    assert "KVSTORE_CUDA_PLUGIN='/no/plug-in.so' is not there: name the file" in done.stdout
    assert "'device'" in done.stdout


@pytest.mark.parametrize("kind", ["local", "device", "dist_sync", "nccl"])
@pytest.mark.parametrize("option", ["timeout", "num_threads"])
@pytest.mark.parametrize("value", [0, -1, -(2**70)])
def test_a_number_not_above_zero_is_refused_for_every_kind(kind, option, value):
    with raises(kvstore.InvalidArgumentError, option):
        kvstore.create(kind, **{option: value})


@pytest.mark.parametrize("kind", ["local", "dist_sync"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, -0.0])
def test_a_timeout_that_is_no_length_of_time_is_refused(kind, value):
    with raises(kvstore.InvalidArgumentError, "timeout"):
        kvstore.create(kind, timeout=value)


@pytest.mark.parametrize("value", ["1", [1], b"1", 1j, np.ones(2)])
def test_a_timeout_that_is_no_number_is_refused(value):
    with raises(kvstore.KVStoreError, "timeout") as info:
        kvstore.create("local", timeout=value)
    assert isinstance(info.value, (TypeError, ValueError))


@pytest.mark.parametrize("value", ["2", [2], 1.5])
def test_num_threads_that_is_no_integer_is_refused(value):
    with raises(kvstore.KVStoreError, "num_threads") as info:
        kvstore.create("local", num_threads=value)
    assert isinstance(info.value, (TypeError, ValueError))


@pytest.mark.parametrize("kind", ["local", "device", "dist_sync", "nccl"])
def test_an_unknown_option_is_refused_by_name(kind):
    with raises(kvstore.InvalidArgumentError, "timeuot"):
        kvstore.create(kind, timeuot=1)


@pytest.mark.parametrize("option", ["token", "scheduler", "role", "rank", "num_workers"])
def test_an_option_of_dist_is_refused_by_a_local_kind(option):
    with raises(kvstore.InvalidArgumentError, option):
        kvstore.create("local", **{option: 1})


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0.5},
        {"timeout": 10},
        {"timeout": np.float32(2)},
        {"timeout": 1e300},
        {"num_threads": 1},
        {"num_threads": np.int64(3)},
        {"num_threads": 1000},
        {"deterministic": True},
        {"deterministic": False, "timeout": 1, "num_threads": 2},
    ],
)
def test_every_legal_option_gives_a_working_store(options):
    with kvstore.create("local", **options) as kv:
        kv.init(1, np.ones(100_000, np.float32))
        kv.push(1, [np.full(100_000, 3, np.float32)] * 3)
        assert (pulled(kv, 1) == 9).all()


@pytest.mark.one_process
def test_a_local_store_is_a_cluster_of_one(kv):
    assert (kv.rank, kv.num_workers) == (0, 1)
    assert kv.is_capable("optimizer") is True
    assert kv.is_capable("flying") is False


@pytest.mark.one_process
def test_barriers_of_a_local_store_do_nothing(kv):
    assert kv.barrier() is None
    assert kv._barrier() is None
    assert kv.set_barrier_before_exit(True) is None
    assert kv.set_barrier_before_exit(False) is None


@pytest.mark.one_process
def test_no_node_of_a_local_store_is_dead(kv):
    assert kv.num_dead_node() == 0
    assert kv.num_dead_node("server", timeout=1) == 0
    assert kv.get_num_dead_node(7) == 0


@pytest.mark.one_process
@pytest.mark.parametrize("name", ["send_command_to_servers", "_send_command_to_servers"])
def test_a_local_store_has_no_servers_to_command(kv, name):
    with refused(kv, kvstore.InvalidArgumentError, "server"):
        getattr(kv, name)(0, "body")


@pytest.mark.one_process
def test_a_local_store_is_no_server(kv):
    with raises(kvstore.KVStoreError, "server"):
        kvstore.KVStoreServer(kv).run()


CALLS = {
    "init": lambda kv: kv.init("new", np.ones(3)),
    "push": lambda kv: kv.push("w", np.ones(3)),
    "pull": lambda kv: kv.pull("w", out=np.ones(3)),
    "pull without out": lambda kv: kv.pull("w"),
    "pushpull": lambda kv: kv.pushpull("w", np.ones(3)),
    "broadcast": lambda kv: kv.broadcast("new", np.ones(3), np.ones(3)),
    "async push": lambda kv: kv.push("w", np.ones(3), async_op=True),
    "delete": lambda kv: kv.delete("w"),
    "keys": lambda kv: kv.keys(),
    "in": lambda kv: "w" in kv,
    "shape": lambda kv: kv.shape("w"),
    "dtype": lambda kv: kv.dtype("w"),
    "stype": lambda kv: kv.stype("w"),
    "set_updater": lambda kv: kv.set_updater(None),
    "empty push": lambda kv: kv.push([], []),
    "unknown key": lambda kv: kv.push("nokey", np.ones(3)),
    "with": lambda kv: kv.__enter__(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_closed_store_refuses_every_call(kv, call):
    kv.init("w", np.ones(3))
    kv.close()
    with raises(kvstore.ClosedError, "closed") as info:
        call(kv)
    assert isinstance(info.value, RuntimeError)


def test_close_twice_is_the_same_as_once(kv):
    kv.close()
    kv.close()


def test_with_closes_the_store_and_lets_the_error_through():
    with pytest.raises(ZeroDivisionError), kvstore.create("local") as kv:
        kv.init("w", np.ones(3))
        1 / 0  # noqa: B018
    with pytest.raises(kvstore.ClosedError):
        kv.pull("w")


@pytest.mark.one_process
def test_stores_do_not_share_keys(kv):
    with kvstore.create("local") as other:
        kv.init("w", np.ones(3))
        other.init(3, np.zeros(2))
        assert "w" not in other
        assert 3 not in kv


def test_arrays_pulled_from_a_store_outlive_it(kv):
    kv.init("w", np.arange(4.0))
    pull = kv.pull("w")
    kv.close()
    del kv
    assert pull.asnumpy().tolist() == [0, 1, 2, 3]


def test_a_registered_class_is_a_kind():
    @kvstore.KVStoreBase.register
    class ContractTestStore(kvstore.KVStoreBase):
        def __init__(self, **options):
            self.options = options

        def broadcast(self, key, value, out, priority=0):
            pass

        def pushpull(self, key, value, out=None, priority=0):
            pass

        def set_optimizer(self, optimizer):
            pass

        @staticmethod
        def is_capable(capability):
            return False

        def save_optimizer_states(self, fname, dump_optimizer=False):
            pass

        def load_optimizer_states(self, fname):
            pass

        @property
        def type(self):
            return "contractteststore"

        @property
        def rank(self):
            return 0

        @property
        def num_workers(self):
            return 1

    assert isinstance(kvstore.create("ContractTestStore"), ContractTestStore)
    assert isinstance(kvstore.create("contractteststore"), ContractTestStore)


def test_calls_name_missing_and_unknown_arguments(kv):
    with pytest.raises(TypeError, match="value"):
        kv.push("w")
    with pytest.raises(TypeError, match="prioritty"):
        kv.push("w", np.ones(3), prioritty=3)
    with pytest.raises(TypeError, match="key"):
        kv.push("w", np.ones(3), key="w")
    with pytest.raises(TypeError, match="push"):
        kv.push("w", np.ones(3), 0, False, None, None, None)


def test_a_priority_that_is_no_integer_is_a_type_error(kv):
    kv.init("w", np.ones(3))
    for priority in ("high", 1.5, None, [1]):
        with pytest.raises(TypeError, match="priority"):
            kv.push("w", np.zeros(3), priority=priority)
    assert pulled(kv, "w").tolist() == [1, 1, 1]


@pytest.mark.parametrize("priority", [0, -7, 2**31 - 1, -(2**31), np.int8(3), True])
def test_a_priority_may_be_any_integer_of_32_bits(kv, priority):
    out = np.empty(3)
    kv.init("w", np.ones(3))
    kv.push("w", np.full(3, 5.0), priority=priority)
    kv.pull("w", out=out, priority=priority)
    kv.pushpull("w", out, priority=priority)
    kv.broadcast("v", out, np.empty(3), priority=priority)
    assert out.tolist() == [5, 5, 5]


@pytest.mark.parametrize("priority", [2**31, -(2**40), 10**30])
def test_a_priority_beyond_32_bits_is_refused(kv, priority):
    kv.init("w", np.ones(3))
    with refused(kv, kvstore.InvalidArgumentError, "priority", "32"):
        kv.push("w", np.zeros(3), priority=priority)
