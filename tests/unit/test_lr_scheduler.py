"""The schedules as objects; their values are compared with recorded ones in tests/golden."""

import copy
import json
import math
import pickle
import threading

import numpy as np
import pytest

import kvstore
from kvstore.lr_scheduler import (
    CosineScheduler,
    FactorScheduler,
    LRScheduler,
    MultiFactorScheduler,
    PolyScheduler,
    _pack,
    _unpack,
)

MAKE = {
    "factor": lambda **k: FactorScheduler(step=3, factor=0.5, **k),
    "multi": lambda **k: MultiFactorScheduler(step=[3, 7], factor=0.5, **k),
    "poly": lambda **k: PolyScheduler(max_update=10, final_lr=0.001, **k),
    "cosine": lambda **k: CosineScheduler(max_update=10, **k),
}


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


def refused(match):
    return pytest.raises(kvstore.InvalidArgumentError, match=match)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"base_lr": float("nan")}, "base_lr is .*finite|base_lr"),
        ({"base_lr": "1"}, "base_lr is a number, not '1'"),
        ({"base_lr": True}, "base_lr is a number"),
        ({"warmup_steps": -1}, "warmup_steps is a whole number of at least 0, not -1"),
        ({"warmup_steps": 1.5}, "warmup_steps"),
        ({"warmup_steps": True}, "warmup_steps"),
        ({"warmup_begin_lr": 0.5}, "warmup_begin_lr is at most 0.01, not 0.5"),
        ({"warmup_mode": "cubic"}, "warmup_mode is 'linear' or 'constant', not 'cubic'"),
    ],
)
def test_common_arguments_are_checked(make, keywords, message):
    with refused(message):
        make(**keywords)


@pytest.mark.parametrize(
    "klass, keywords, message",
    [
        (FactorScheduler, {"step": 0}, "step is a whole number of at least 1, not 0"),
        (
            FactorScheduler,
            {"step": 1, "factor": 1.5},
            "factor is at least 0 and at most 1, not 1.5",
        ),
        (FactorScheduler, {"step": 1, "factor": -1}, "factor"),
        (FactorScheduler, {"step": 1, "stop_factor_lr": math.inf}, "stop_factor_lr is finite"),
        (MultiFactorScheduler, {"step": []}, "step is a list"),
        (MultiFactorScheduler, {"step": 3}, "step is a list"),
        (MultiFactorScheduler, {"step": [0, 1]}, "each step is a whole number of at least 1"),
        (MultiFactorScheduler, {"step": [2, 2]}, "the steps increase"),
        (PolyScheduler, {"max_update": 0}, "max_update is a whole number of at least 1"),
        (PolyScheduler, {"max_update": 9, "pwr": -1}, "pwr is at least 0"),
        (
            PolyScheduler,
            {"max_update": 9, "warmup_steps": 9},
            "max_update is more than warmup_steps",
        ),
        (CosineScheduler, {"max_update": 2.5}, "max_update"),
        (CosineScheduler, {"max_update": 9, "final_lr": "x"}, "final_lr"),
    ],
)
def test_own_arguments_are_checked(klass, keywords, message):
    with refused(message):
        klass(**keywords)


def test_arguments_are_attributes_and_only_the_base_may_be_set(make):
    schedule = make(base_lr=0.5, warmup_steps=2, warmup_begin_lr=0.25)
    assert (schedule.base_lr, schedule.warmup_steps, schedule.warmup_begin_lr) == (0.5, 2, 0.25)
    with pytest.raises(AttributeError, match=r"warmup_steps of a .* is fixed"):
        schedule.warmup_steps = 3
    with pytest.raises(AttributeError, match="has no attribute 'warmup'"):
        _ = schedule.warmup
    schedule.base_lr = np.float32(0.25)
    assert schedule.base_lr == 0.25
    with refused("base_lr"):
        schedule.base_lr = math.nan
    assert schedule.base_lr == 0.25


def test_repr_shows_the_arguments_and_the_rate():
    schedule = FactorScheduler(step=1, factor=0.5, base_lr=0.5)
    text = "FactorScheduler(step=1, factor=0.5, stop_factor_lr=1e-08, base_lr={})"
    assert repr(schedule) == text.format(0.5)
    schedule(2)
    assert repr(schedule) == text.format(0.25)
    assert repr(PolyScheduler(9, warmup_steps=2)) == (
        "PolyScheduler(max_update=9, pwr=2, final_lr=0, base_lr=0.01, warmup_steps=2, "
        "warmup_begin_lr=0, warmup_mode='linear')"
    )


def test_equality_is_of_arguments_and_position(make):
    one, other = make(base_lr=0.5), make(base_lr=0.5)
    assert one == other != make(base_lr=0.25)
    one(9)
    assert one != other
    other(9)
    assert one == other
    assert one != FactorScheduler(step=4)
    with pytest.raises(TypeError):
        hash(one)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_copies_go_on_by_themselves(make, again):
    schedule = make(base_lr=0.5)
    schedule(5)
    other = again(schedule)
    assert other == schedule
    other(9)
    assert other != schedule


def test_a_packed_schedule_is_json_and_comes_back(make):
    schedule = make(base_lr=0.5, warmup_steps=2)
    schedule(5)
    packed = json.loads(json.dumps(_pack(schedule)))
    assert _unpack(packed) == schedule
    assert _pack(lambda n: 1.0) is None
    own = type("Own", (LRScheduler,), {"__call__": lambda self, num_update: 1.0})
    assert _pack(own()) is None


@pytest.mark.parametrize(
    "packed",
    [
        None,
        3,
        {},
        {"class": "LRScheduler", "arguments": {}, "state": {"base_lr": 1}},
        {"class": ["FactorScheduler"], "arguments": {}, "state": {}},
        {"class": "FactorScheduler", "arguments": {}, "state": {"base_lr": 1, "count": 0}},
        {"class": "FactorScheduler", "arguments": {"step": 0}, "state": {"base_lr": 1, "count": 0}},
        {"class": "FactorScheduler", "arguments": {"step": 1}, "state": {"base_lr": 1}},
        {
            "class": "FactorScheduler",
            "arguments": {"step": 1},
            "state": {"base_lr": 1, "count": -1},
        },
        {
            "class": "FactorScheduler",
            "arguments": {"step": 1},
            "state": {"base_lr": [], "count": 1},
        },
        {"class": "FactorScheduler", "arguments": {"step": 1}, "state": None},
    ],
)
def test_what_describes_no_schedule(packed):
    with pytest.raises(kvstore.InvalidArgumentError):
        _unpack(packed)


def test_a_state_that_does_not_fit_changes_nothing(make):
    schedule = make()
    before = schedule.state_dict()
    with refused("the state of a"):
        schedule.load_state_dict({"base_lr": 1, "other": 2})
    assert schedule.state_dict() == before


def test_a_schedule_of_ones_own_keeps_its_attributes():
    class Halving(LRScheduler):
        def __init__(self, half, **common):
            super().__init__(**common)
            self.half = half

        def __call__(self, num_update):
            return self.base_lr * self.half**num_update

    schedule = Halving(0.5, base_lr=0.5)
    schedule.half = 0.25
    assert schedule(1) == 0.125
    assert schedule.state_dict() == {"base_lr": 0.5}
    with pytest.raises(TypeError, match="abstract"):
        LRScheduler()


@pytest.mark.parametrize("factor", [0, 0.5, 1])
def test_a_far_update_is_reached_at_once(factor):
    schedule = FactorScheduler(step=1, factor=factor, base_lr=0.5)
    assert schedule(2**62) == (0.5 if factor == 1 else 1e-8)
    assert schedule.state_dict()["count"] == 2**62 - 1


def test_threads_that_ask_at_once_leave_a_position_that_one_thread_could_have():
    schedule = FactorScheduler(step=1, factor=0.5, base_lr=1.0, stop_factor_lr=0)
    wrong = []

    def ask(first):
        for n in range(first, 900, 4):
            rate = schedule(n)
            at = schedule.state_dict()
            if at["base_lr"] != 0.5 ** at["count"] or rate > 0.5 ** (n - 1):
                wrong.append((n, rate, at))

    threads = [threading.Thread(target=ask, args=(1 + i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
