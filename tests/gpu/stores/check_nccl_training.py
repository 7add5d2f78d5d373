"""Optimizers of stores of kind `nccl`: all devices make the steps of a `local` store."""

import itertools

import numpy as np
import pytest
from nccl_twin import ALL, TYPES_16, both_of, lists, nccl_twin
from test_optimizers import CASES, COMMON, ids, numbers_of
from twin import FLOATS, draw

from kvstore import optimizer


@pytest.mark.parametrize("common", COMMON, ids=["plain", "all"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_every_optimizer_leaves_the_same_bits(case, common):
    """16-bit weights with and without a copy in float32."""
    name, own = case
    random = np.random.default_rng(9)
    numbers = {**numbers_of(name, own, common), "multi_precision": bool(common)}
    shapes = [(5, 7), (13, 9), *([()] if name != "groupadagrad" else [])]
    with nccl_twin() as both:
        for kv in both_of(both):
            kv.set_optimizer(optimizer.create(name, **numbers))
        for dtype in FLOATS:
            keys = [f"{shape} {dtype}" for shape in shapes]
            both.init(keys, [draw(random, shape, dtype) for shape in shapes], ALL)
            for _ in range(3):
                both.push(keys, [lists(random, shape, dtype) for shape in shapes], ALL)
                both.push(keys[0], lists(random, shapes[0], dtype), ALL)
        both.agree()


def test_sgld_draws_the_same_numbers_everywhere():
    random = np.random.default_rng(10)
    with nccl_twin() as both:
        for kv in both_of(both):
            kv.set_optimizer(optimizer.SGLD(learning_rate=0.01, wd=0.1))
        for dtype in FLOATS:
            key, bound = str(dtype), {8: 1e-13, 4: 1e-5, 2: 5e-2}[dtype.itemsize]
            both.init(key, draw(random, (9, 5), dtype))
            for _ in range(4):
                both.push(key, lists(random, (9, 5), dtype), ALL)
            both.agree(key, bound=bound)


def test_an_optimizer_is_set_and_changed_in_the_middle():
    random = np.random.default_rng(11)
    rules = (
        lambda: optimizer.SGD(learning_rate=0.5, momentum=0.5),
        lambda: optimizer.Adam(learning_rate=0.1, multi_precision=True),
        lambda: optimizer.SGD(learning_rate=0.5, multi_precision=True),
        lambda: optimizer.LAMB(learning_rate=0.1),
        lambda: optimizer.Adam(learning_rate=0.1),
    )
    with nccl_twin() as both:
        for dtype in FLOATS:
            both.init(str(dtype), draw(random, (17,), dtype))
            both.push(str(dtype), lists(random, (17,), dtype), ALL)
        for rule in rules:
            for kv in both_of(both):
                kv.set_optimizer(rule())
            for dtype in FLOATS:
                for _ in range(2):
                    both.pushpull(str(dtype), lists(random, (17,), dtype), ALL, ALL)
            for kv in both_of(both):
                kv.set_optimizer_params(lr=0.05)
            for dtype in FLOATS:
                both.push(str(dtype), lists(random, (17,), dtype), ALL)
            both.agree()


@pytest.mark.parametrize("name", ["sgd", "adam", "lamb", "nadam", "lbsgd", "groupadagrad"])
def test_states_are_saved_and_loaded_on_all_devices(name, tmp_path):
    random = np.random.default_rng(12)
    numbers = {"learning_rate": 0.1, "multi_precision": True}
    if name in ("sgd", "lbsgd"):
        numbers["momentum"] = 0.9
    early, late = tmp_path / "early", tmp_path / "late"
    with nccl_twin() as both:
        for kv in both_of(both):
            kv.set_optimizer(optimizer.create(name, **numbers))
        for dtype in FLOATS:
            both.init(str(dtype), draw(random, (5, 7), dtype))

        def steps(count):
            for dtype, _ in itertools.product(FLOATS, range(count)):
                both.push(str(dtype), lists(random, (5, 7), dtype), ALL)

        steps(2)
        both.kv.save_optimizer_states(str(early), dump_optimizer=True)
        both.host.save_optimizer_states(str(late), dump_optimizer=True)
        assert early.read_bytes() == late.read_bytes()
        steps(2)
        for kv in both_of(both):
            kv.load_optimizer_states(str(early))
        steps(2)
        both.agree()
        both.kv.save_optimizer_states(str(early), dump_optimizer=True)
        both.host.save_optimizer_states(str(late), dump_optimizer=True)
        assert early.read_bytes() == late.read_bytes()


@pytest.mark.parametrize("dtype", TYPES_16, ids=str)
def test_masters_stay_the_same_on_all_devices(dtype):
    """Many small steps, which 16 bits alone would lose."""
    random = np.random.default_rng(18)
    with nccl_twin() as both:
        for kv in both_of(both):
            kv.set_optimizer(optimizer.SGD(learning_rate=1e-3, momentum=0.9, multi_precision=True))
        both.init("w", draw(random, (40,), dtype))
        for step in range(20):
            both.push("w", lists(random, (40,), dtype), (0,) if step == 10 else ALL)
        both.agree()
