"""Optimizers of dist stores over the real control plane: worker 0 declares, other workers agree."""

import json
import threading
import time

import pytest
from fakes import LONG, Child, until

import kvstore
from kvstore import _declared, optimizer
from kvstore.cluster import control
from kvstore.lr_scheduler import CosineScheduler, FactorScheduler, MultiFactorScheduler

SHORT = 0.2


@pytest.fixture
def four(make_cluster):
    """A cluster of two workers and two servers, which serve."""
    cluster = make_cluster(2, 2)
    *cluster.workers, first, second = cluster.start()
    cluster.servers = [first, second]
    for server in cluster.servers:
        cluster.serve(server)
    return cluster


@pytest.fixture
def asked(monkeypatch):
    """An event that is set when a server has answered whether there is agreement."""
    event = threading.Event()
    answer = _declared.COMMANDS[_declared.AGREE]

    def answering(member, body):
        event.set()
        return answer(member, body)

    monkeypatch.setitem(_declared.COMMANDS, _declared.AGREE, answering)
    return event


def declare(cluster, rank, one, timeout=LONG):
    return _declared.declare(cluster.workers[rank], timeout, one)


def on_servers(cluster):
    """Numbers of the optimizers that every server has got, in order."""
    got = [[entry[0] for entry in server.core.optimizers] for server in cluster.servers]
    assert got[0] == got[1]
    return got[0]


# ------------------------------------------------------------------------------------ agreement


def test_every_server_has_the_optimizer_when_the_call_returns(four):
    one = optimizer.SGD(lr=0.1, momentum=0.9, wd=1e-4, begin_num_update=7, multi_precision=True)
    number = declare(four, 0, one)
    assert 0 < number < 2**64
    for server in four.servers:
        assert server.core.optimizers == [(number, "sgd", one._numbers, 7)]
    assert declare(four, 1, optimizer.SGD(**one._numbers, begin_num_update=7)) == number
    assert on_servers(four) == [number]


def advanced(schedule):
    schedule(50)
    return schedule


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (optimizer.SGD(lr=1), optimizer.SGD(learning_rate=1.0)),
        (
            optimizer.Adam(lr_mult={"b": 2, 3: 1}, names={1: "x", 0: "y"}),
            optimizer.Adam(lr_mult={3: 1.0, "b": 2.0}, param_idx2name={0: "y", 1: "x"}),
        ),
        (
            optimizer.SGD(lr_scheduler=FactorScheduler(2, factor=1)),
            optimizer.SGD(lr_scheduler=advanced(FactorScheduler(2, factor=1.0))),
        ),
        (
            optimizer.LARS(lr_scheduler=MultiFactorScheduler([2, 4], base_lr=2)),
            optimizer.LARS(lr_scheduler=advanced(MultiFactorScheduler((2, 4), base_lr=2))),
        ),
    ],
)
def test_equal_optimizers_have_equal_numbers_however_they_are_written(one, same, four):
    assert declare(four, 0, one) == declare(four, 1, same)


def test_different_optimizers_have_different_numbers(four):
    those = [
        optimizer.SGD(),
        optimizer.NAG(),
        optimizer.SGD(lr=0.1),
        optimizer.SGD(lr=0.1, lazy_update=False),
        optimizer.SGD(lr_scheduler=FactorScheduler(2)),
        optimizer.SGD(lr_mult={1: 2}),
        optimizer.SGD(lr_mult={"1": 2}),
        optimizer.SGD(begin_num_update=1),
    ]
    numbers = [declare(four, 0, one) for one in those]
    assert len(set(numbers)) == len(those)
    assert on_servers(four) == numbers


def test_a_class_that_comes_again_after_another_has_another_number(four):
    those = [optimizer.SGD(), optimizer.SGD(lr=0.1), optimizer.NAG(), optimizer.SGD()]
    numbers = [declare(four, 0, one) for one in those]
    assert len(set(numbers)) == 4
    assert declare(four, 0, optimizer.SGD()) == numbers[3]
    assert [declare(four, 1, one) for one in those] == numbers
    trainings = [[known[2] for known in server.declared.known] for server in four.servers]
    assert trainings == [[1, 1, 2, 3, 3]] * 2


def test_a_worker_that_comes_early_waits_for_worker_0(four, asked):
    early = four.pool.submit(declare, four, 1, optimizer.Adam())
    assert asked.wait(LONG)
    assert not early.done()
    number = declare(four, 0, optimizer.Adam())
    assert early.result(LONG) == number


def test_a_worker_may_be_calls_behind_or_ahead(four, asked):
    those = [optimizer.SGD(lr=rate) for rate in (0.1, 0.2, 0.3, 0.1)]
    numbers = [declare(four, 0, one) for one in those[:3]]
    assert [declare(four, 1, one) for one in those[:3]] == numbers
    asked.clear()
    ahead = four.pool.submit(declare, four, 1, those[3])
    assert asked.wait(LONG)
    assert declare(four, 0, those[3]) == ahead.result(LONG) == numbers[0]


def test_a_worker_may_leave_calls_out_or_say_again_what_holds(four):
    declare(four, 0, optimizer.SGD(lr=0.1))
    declare(four, 0, optimizer.SGD(lr=0.2))
    number = declare(four, 0, optimizer.Adam())
    for _ in range(3):
        assert declare(four, 1, optimizer.Adam(), SHORT) == number
    assert len(on_servers(four)) == 3


def test_a_worker_that_never_calls_is_fine(four):
    for rate in (0.1, 0.2):
        declare(four, 0, optimizer.SGD(lr=rate))
    waiting = [four.pool.submit(worker.barrier, LONG) for worker in four.workers]
    for future in waiting:
        future.result(LONG)


def test_servers_remember_a_bounded_number_of_calls(four):
    server = four.servers[0].declared
    for call in range(2 * _declared.KEPT):
        server.known.append((call, call + 1, 1))
    assert len(server.known) == _declared.KEPT


# --------------------------------------------------------------------------------- disagreement


@pytest.mark.parametrize(
    ("own", "text"),
    [
        (optimizer.Adam(), "class Adam, that of worker 0 of SGD"),
        (optimizer.SGD(lr=0.3, momentum=0.5), "learning_rate is 0.3, that of worker 0 0.1"),
        (optimizer.SGD(lr=0.1, momentum=0.5), "momentum is 0.5, that of worker 0 0"),
        (optimizer.SGD(lr=0.1, clip_gradient=2), "clip_gradient is 2, that of worker 0 None"),
        (optimizer.SGD(lr=0.1, lazy_update=False), "lazy_update is False, that of worker 0"),
        (optimizer.SGD(lr=0.1, wd_mult={"a": 2}), r"wd_mult is \[\['a', 2\]\], that of worker 0"),
        (optimizer.SGD(lr=0.1, names={3: "x" * 200}), r"names is .*\.\.\., that of worker 0 \[\]"),
        (optimizer.SGD(lr=0.1, begin_num_update=5), "begin_num_update is 5, that of worker 0 0"),
        (optimizer.SGD(lr=0.1, lr_scheduler=CosineScheduler(5)), "schedule is .*Cosine.* 0 None"),
    ],
)
def test_another_optimizer_than_worker_0s_is_refused_and_the_difference_named(own, text, four):
    number = declare(four, 0, optimizer.SGD(lr=0.1))
    with pytest.raises(kvstore.InvalidArgumentError, match=f"worker 1 is not the one.*{text}"):
        declare(four, 1, own)
    assert on_servers(four) == [number]
    assert declare(four, 1, optimizer.SGD(lr=0.1)) == number


def test_a_difference_of_long_names_that_json_makes_longer_is_told(four):
    declare(four, 0, optimizer.SGD(names={1: "\N{SNOWMAN WITHOUT SNOW}\N{GRINNING FACE}" * 500}))
    with pytest.raises(kvstore.InvalidArgumentError, match=r"its names is \[\[1, '\U0001f600"):
        declare(four, 1, optimizer.SGD(names={1: "\N{GRINNING FACE}" * 500}))


def test_a_schedule_whose_numbers_differ_is_named(four):
    declare(four, 0, optimizer.SGD(lr_scheduler=FactorScheduler(2, factor=0.5)))
    with pytest.raises(kvstore.InvalidArgumentError, match="its schedule is "):
        declare(four, 1, optimizer.SGD(lr_scheduler=FactorScheduler(3, factor=0.5)))


def test_the_deadline_says_that_worker_0_has_not_called(four):
    with pytest.raises(kvstore.TimeoutError, match="worker 0, which has not called set_optimizer"):
        declare(four, 1, optimizer.SGD(), SHORT)
    number = declare(four, 0, optimizer.SGD())
    assert declare(four, 1, optimizer.SGD(), SHORT) == number


def test_a_later_call_waits_for_worker_0_and_then_names_the_difference(four, asked):
    for rank in (0, 1):
        declare(four, rank, optimizer.SGD(lr=0.1))
    declare(four, 0, optimizer.SGD(lr=0.2))
    asked.clear()
    late = four.pool.submit(declare, four, 1, optimizer.Adam())
    assert asked.wait(LONG)
    assert declare(four, 0, optimizer.Adam()) == late.result(LONG)
    with pytest.raises(kvstore.InvalidArgumentError, match=r"class NAG.*\(it waited 0.2 s for wor"):
        declare(four, 1, optimizer.NAG(), SHORT)


# ------------------------------------------------------------------------------ what goes wrong


class OwnSchedule(FactorScheduler):
    pass


@pytest.mark.parametrize("schedule", [lambda n: 0.1, OwnSchedule(2)], ids=["function", "subclass"])
def test_a_schedule_of_ones_own_is_refused(schedule, four):
    with pytest.raises(kvstore.InvalidArgumentError, match="must be a built-in one"):
        declare(four, 0, optimizer.SGD(lr_scheduler=schedule))
    assert on_servers(four) == []


def test_a_class_that_servers_cannot_import_is_refused(four):
    class Own(optimizer.Optimizer):
        def update(self, key, weight, grad, state):
            weight -= grad

    with pytest.raises(kvstore.InvalidArgumentError, match="Own is defined in a function"):
        declare(four, 0, Own())
    assert on_servers(four) == []


def test_an_optimizer_that_is_too_large_for_a_command_is_refused(four):
    large = optimizer.SGD(names=dict.fromkeys(range(60000), "a name of a key"))
    with pytest.raises(kvstore.InvalidArgumentError, match="optimizer SGD: the body of command"):
        declare(four, 0, large)


@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_on_one_server_is_raised_and_may_be_tried_again(failing, four):
    number = declare(four, 0, optimizer.SGD())
    core, add = four.servers[failing].core, four.servers[failing].core.add_optimizer

    def fail(*arguments):
        raise MemoryError("no memory for an optimizer")

    core.add_optimizer = fail
    with pytest.raises(kvstore.KVStoreError) as info:
        declare(four, 0, optimizer.Adam())
    assert str(info.value) == (
        f"not all servers have taken the optimizer Adam: server {failing}: "
        "MemoryError: no memory for an optimizer"
    )
    # Nobody else goes on with what only one server has.
    with pytest.raises(kvstore.InvalidArgumentError, match=r"worker 0 of SGD.*waited"):
        declare(four, 1, optimizer.Adam(), SHORT)
    assert declare(four, 1, optimizer.SGD()) == number
    core.add_optimizer = add
    assert declare(four, 0, optimizer.Adam()) == declare(four, 1, optimizer.Adam())


def test_the_deadline_of_worker_0_names_the_server_that_does_not_answer(make_cluster):
    cluster = make_cluster(1, 2)
    worker, first, _ = cluster.start()
    cluster.serve(first)
    with pytest.raises(kvstore.TimeoutError, match=r"optimizer SGD: .*missing: server 1 \("):
        _declared.declare(worker, SHORT, optimizer.SGD())


def test_a_loss_ends_the_wait_for_worker_0(four, asked):
    waiting = four.pool.submit(declare, four, 1, optimizer.SGD())
    assert asked.wait(LONG)
    lost = four.servers[1]._writer.transport.abort
    control.loop().call_soon_threadsafe(lost)
    with pytest.raises(kvstore.PeerLostError, match="server 1"):
        waiting.result(LONG)


def test_worker_0_ends_the_wait_for_it_when_it_leaves(four, asked):
    early = four.pool.submit(declare, four, 1, optimizer.SGD())
    assert asked.wait(LONG)
    four.workers[0].close(LONG, together=False)
    with pytest.raises(kvstore.PeerLostError, match="worker 0 has left the cluster, and worker 1"):
        early.result(LONG)


def test_what_worker_0_had_set_holds_when_it_has_left(four):
    number = declare(four, 0, optimizer.SGD(lr=0.1))
    assert declare(four, 1, optimizer.SGD(lr=0.1)) == number
    four.workers[0].close(LONG, together=False)
    assert declare(four, 1, optimizer.SGD(lr=0.1)) == number
    with pytest.raises(kvstore.InvalidArgumentError, match=r"learning_rate is 0\.2"):
        declare(four, 1, optimizer.SGD(lr=0.2))


def test_ctrl_c_ends_the_wait_for_worker_0(make_cluster, asked):
    cluster = make_cluster(2, 1)
    first = cluster.join("worker")
    until(lambda: cluster.scheduler.roster.nodes)
    action = "from kvstore import _declared, optimizer; "
    action += "_declared.declare(member, 600, optimizer.SGD())"
    second = Child.node("worker", cluster.address, action)
    try:
        cluster.serve(cluster.join("server").result(LONG))
        assert first.result(LONG).rank == 0
        assert asked.wait(LONG)
        begin = time.time()
        second.send_signal(2)
        said = second.ends(1)[0].splitlines()[-1].split()
        assert said[1] == "KeyboardInterrupt" and float(said[0]) - begin < LONG / 2
    finally:
        second.stop()


# ------------------------------------------------------------------------- hostile declarations


def body_of(one, **changes):
    return {"call": 1, "training": 1, "optimizer": {**_declared._describe(one), **changes}}


SGD = optimizer.SGD(lr=0.1, lr_scheduler=FactorScheduler(2))
NUMBERS = _declared._describe(SGD)["numbers"]
SCHEDULE = _declared._describe(SGD)["schedule"]
HOSTILE = {
    "no JSON": "{",
    "bytes": b"\xff\xfe\x00",
    "nothing": "",
    "a number": "3",
    "a list": "[]",
    "deep": "[" * 100_000,
    "not finite": json.dumps(body_of(SGD, numbers={**NUMBERS, "wd": float("nan")})),
    "infinite": json.dumps(body_of(SGD, numbers={**NUMBERS, "wd": float("inf")})),
    "huge": json.dumps(body_of(SGD, numbers={**NUMBERS, "wd": 10**400})),
    "no optimizer": json.dumps({"call": 1, "training": 1}),
    "no call": json.dumps({"training": 1, "optimizer": _declared._describe(SGD)}),
    "a training that is text": json.dumps({**body_of(SGD), "training": "1"}),
    "a training of 65 bits": json.dumps({**body_of(SGD), "training": 2**64}),
    "a call that is text": json.dumps({**body_of(SGD), "call": "1"}),
    "a call that is true": json.dumps({**body_of(SGD), "call": True}),
    "a negative call": json.dumps({**body_of(SGD), "call": -1}),
    "more": json.dumps({**body_of(SGD), "more": 1}),
    "a class that is none": json.dumps(body_of(SGD, kind="nothing")),
    "a class that is a list": json.dumps(body_of(SGD, kind=[])),
    "an import path": json.dumps(body_of(SGD, kind="os.system")),
    "another class": json.dumps(body_of(SGD, kind="adam")),
    "one part more": json.dumps(body_of(SGD, keywords={})),
    "numbers that are a list": json.dumps(body_of(SGD, numbers=[])),
    "a number of another name": json.dumps(body_of(SGD, numbers={**NUMBERS, "x": 1})),
    "a number left out": json.dumps(body_of(SGD, numbers={"wd": 0})),
    "a number that is text": json.dumps(body_of(SGD, numbers={**NUMBERS, "wd": "0"})),
    "a number that is a list": json.dumps(body_of(SGD, numbers={**NUMBERS, "wd": [0]})),
    "a number out of range": json.dumps(body_of(SGD, numbers={**NUMBERS, "clip_gradient": -1})),
    "a flag that is a number": json.dumps(body_of(SGD, numbers={**NUMBERS, "lazy_update": 7})),
    "a part among the numbers": json.dumps(body_of(SGD, numbers={**NUMBERS, "lr_mult": [[1, 2]]})),
    "a begin that is negative": json.dumps(body_of(SGD, begin=-1)),
    "a begin that is too large": json.dumps(body_of(SGD, begin=2**63)),
    "a begin that is no number": json.dumps(body_of(SGD, begin="0")),
    "multipliers that are text": json.dumps(body_of(SGD, lr_mult="ab")),
    "multipliers of no pairs": json.dumps(body_of(SGD, lr_mult=[[1, 2, 3]])),
    "a multiplier of a list": json.dumps(body_of(SGD, lr_mult=[[[1], 2]])),
    "a multiplier twice": json.dumps(body_of(SGD, lr_mult=[[1, 2], [1, 3]])),
    "a key of 65 bits": json.dumps(body_of(SGD, lr_mult=[[2**64, 2]])),
    "a name that is a number": json.dumps(body_of(SGD, names=[[1, 2]])),
    "a schedule that is text": json.dumps(body_of(SGD, schedule="FactorScheduler")),
    "a schedule that is none": json.dumps(body_of(SGD, schedule={**SCHEDULE, "class": "os"})),
    "a schedule without arguments": json.dumps(body_of(SGD, schedule={**SCHEDULE, "arguments": 1})),
    "a schedule of other arguments": json.dumps(
        body_of(SGD, schedule={**SCHEDULE, "arguments": {"step": 2, "self": 1}})
    ),
    "a schedule that has come far": json.dumps(
        body_of(SGD, schedule={**SCHEDULE, "state": {"base_lr": 1, "count": 9}})
    ),
    "a schedule of huge numbers": json.dumps(
        body_of(SGD, schedule={**SCHEDULE, "arguments": {"step": 2, "base_lr": 10**400}})
    ),
}


@pytest.fixture(scope="module")
def serving():
    """A cluster for all hostile bodies: the servers go on after each."""
    from fakes import Cluster

    cluster = Cluster(1, 1)
    worker, server = cluster.start()
    cluster.serve(server)
    yield worker, server
    cluster.close()


@pytest.mark.parametrize("head", [_declared.DECLARE, _declared.AGREE])
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_server_takes_nothing_that_is_no_declaration(body, head, serving):
    worker, server = serving
    if head == _declared.AGREE and isinstance(body, str):
        body = body.replace('"call"', '"since"').replace('"training": 1, ', "")
    before = len(server.core.optimizers)
    with pytest.raises(kvstore.KVStoreError, match=r"^server 0: InvalidArgumentError: ") as info:
        worker.command(head, body, LONG)
    assert len(str(info.value)) < 500
    assert len(server.core.optimizers) == before == len(server.declared.known)
    number = _declared.declare(worker, LONG, SGD)
    assert server.core.optimizers.pop()[0] == number
    assert server.declared.known.pop()[1] == _declared._digest(_declared._describe(SGD))
