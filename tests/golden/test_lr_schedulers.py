"""The rates that MXNet 1.9.1's schedules gave, asked in order, at random, and after an optimizer
with a rate of its own took the schedule."""

import json
from pathlib import Path

import numpy as np
import pytest

from kvstore import lr_scheduler, optimizer

HERE = Path(__file__).parent
CASES = json.loads((HERE / "lr_schedulers.json").read_text())
TOLERANCE = 1e-15


@pytest.fixture(scope="module")
def rates():
    with np.load(HERE / "lr_schedulers.npz") as stored:
        return dict(stored)


def make(case):
    keywords = {name: value for name, value in case.items() if name not in ("class", "id")}
    return getattr(lr_scheduler, case["class"])(**keywords)


def name(case):
    return f"{case['id']}-{case['class']}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_rates_in_order(case, rates):
    schedule, expected = make(case), rates[f"{case['id']}/ascending"]
    assert len(expected) == 61
    given = [schedule(n) for n in range(61)]
    np.testing.assert_allclose(given, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_rates_in_any_order_depend_on_what_was_asked_before(case, rates):
    schedule = make(case)
    given = [schedule(int(n)) for n in rates[f"{case['id']}/query"]]
    np.testing.assert_allclose(given, rates[f"{case['id']}/answer"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_rate_given_to_the_optimizer_becomes_the_base_of_the_schedule(case, rates):
    schedule = make(case)
    optimizer.SGD(learning_rate=0.77, lr_scheduler=schedule)
    given = [schedule(n) for n in range(61)]
    np.testing.assert_allclose(given, rates[f"{case['id']}/overwritten"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_schedule_goes_on_from_a_saved_position(case, rates):
    query, answer = (rates[f"{case['id']}/{part}"] for part in ("query", "answer"))
    first = make(case)
    for n in query[:20]:
        first(int(n))
    second = make(case)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second == first
    given = [second(int(n)) for n in query[20:]]
    np.testing.assert_allclose(given, answer[20:], rtol=0, atol=TOLERANCE)
