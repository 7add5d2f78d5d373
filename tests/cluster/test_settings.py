"""Where a process learns its place in a cluster: options, then KVSTORE_*, then DMLC_*."""

import os
import subprocess
import sys

import numpy as np
import pytest

import kvstore
from kvstore.cluster import settings


def read(**options):
    return settings.read({"scheduler": "localhost:9000", **options})


def refused(pattern, **options):
    with pytest.raises(kvstore.InvalidArgumentError, match=pattern) as info:
        read(**options)
    return str(info.value)


def test_options_win_over_our_variables_and_these_over_mxnets(monkeypatch):
    monkeypatch.setenv("DMLC_NUM_WORKER", "1")
    assert read().num_workers == 1
    monkeypatch.setenv("KVSTORE_NUM_WORKERS", "2")
    assert read().num_workers == 2
    assert read(num_workers=3).num_workers == 3
    assert read(num_workers=None).num_workers == 2


def test_the_variables_of_mxnets_launcher_are_enough(monkeypatch):
    for name, value in {
        "DMLC_ROLE": "scheduler",
        "DMLC_PS_ROOT_URI": "10.0.0.1",
        "DMLC_PS_ROOT_PORT": "9091",
        "DMLC_NUM_WORKER": "4",
        "DMLC_NUM_SERVER": "2",
        "DMLC_NODE_HOST": "node1",
        "DMLC_INTERFACE": "eth0",
    }.items():
        monkeypatch.setenv(name, value)
    found = settings.read()
    assert (found.role, found.host, found.port) == ("scheduler", "10.0.0.1", 9091)
    assert (found.num_workers, found.num_servers) == (4, 2)
    assert (found.advertise, found.interface) == ("node1", "eth0")
    assert found.timeout == 300


def test_an_empty_variable_counts_as_not_set(monkeypatch):
    monkeypatch.setenv("KVSTORE_RANK", "")
    monkeypatch.setenv("KVSTORE_ROLE", "")
    assert read().rank is None
    assert read().role == "worker"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:1", "localhost", 1),
        ("127.0.0.1:65535", "127.0.0.1", 65535),
        ("[::1]:9000", "::1", 9000),
        ("[fe80::1%eth0]:9000", "fe80::1%eth0", 9000),
    ],
)
def test_an_address_is_host_and_port(text, host, port):
    found = read(scheduler=text)
    assert (found.host, found.port) == (host, port)
    assert found.address == text


def test_mxnets_address_may_be_ipv6_too(monkeypatch):
    monkeypatch.setenv("DMLC_PS_ROOT_URI", "::1")
    monkeypatch.setenv("DMLC_PS_ROOT_PORT", "9000")
    assert settings.read().address == "[::1]:9000"


@pytest.mark.parametrize(
    "text", ["host", "host:", ":9000", "::1:9000", "host:-1", "host:65536", "host:x", "host:٣", ""]
)
def test_a_bad_address_is_refused_by_name(text):
    message = refused("host:port", scheduler=text)
    assert "KVSTORE_SCHEDULER" in message and "option scheduler" in message


def test_only_a_scheduler_may_have_port_0():
    numbers = {"num_workers": 1, "num_servers": 1}
    assert read(role="scheduler", scheduler="localhost:0", **numbers).port == 0
    refused("a port from 1", scheduler="localhost:0")


def test_without_an_address_the_message_says_how_to_give_one():
    with pytest.raises(kvstore.InvalidArgumentError) as info:
        settings.read()
    for name in ("KVSTORE_SCHEDULER", "DMLC_PS_ROOT_URI", "DMLC_PS_ROOT_PORT", "kvrun"):
        assert name in str(info.value)


def test_mxnets_host_needs_its_port(monkeypatch):
    monkeypatch.setenv("DMLC_PS_ROOT_URI", "localhost")
    with pytest.raises(kvstore.InvalidArgumentError, match="needs DMLC_PS_ROOT_PORT"):
        settings.read()


@pytest.mark.parametrize("name", ["num_workers", "num_servers"])
def test_a_scheduler_must_know_the_numbers(name):
    numbers = {"num_workers": 1, "num_servers": 1}
    del numbers[name]
    message = refused(f"must know {name}", role="scheduler", **numbers)
    assert settings.BY_OPTION[name].variables[0] in message


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_workers", [0, -1, 1.5, "x", True, "1 2", 2**40]),
        ("num_servers", [-1, "-3"]),
        ("rank", [-1, 0.0, "first", False]),
        ("timeout", [0, -1, float("nan"), float("inf"), "soon", True, [1]]),
        ("same_host_copies", ["on", "AUTO"]),
        ("port_range", ["1", "9-1", "0-5", "1-70000", "a-b", "1-2-3"]),
        ("role", ["king", "Worker"]),
        ("token", [3, b"x"]),
    ],
)
def test_a_bad_value_is_refused_by_variable_and_option(name, values):
    for value in values:
        message = refused(".", **{name: value})
        assert settings.BY_OPTION[name].variables[0] in message
        assert f"option {name}" in message


def test_a_bad_variable_is_shown_with_its_value(monkeypatch):
    monkeypatch.setenv("DMLC_NUM_SERVER", "many")
    assert "DMLC_NUM_SERVER='many'" in refused("from 0")


def test_a_token_is_never_shown():
    assert "12345" not in refused("token", token=12345)
    assert "not shown" in refused("token", token=12345)


def test_an_unknown_option_is_refused():
    refused("no option 'tokem'", tokem="x")


def test_numbers_may_be_of_any_integer_type():
    assert read(num_workers=np.int64(3)).num_workers == 3
    assert read(timeout=np.float32(2)).timeout == 2


def test_a_scheduler_has_no_rank():
    assert read(role="scheduler", num_workers=1, num_servers=1, rank=3).rank is None


def test_the_report_lists_every_setting_and_hides_the_token():
    env = {**os.environ, **dict.fromkeys(settings.INTERNAL, "9"), settings.PORT: "9"}
    env.update(KVSTORE_TOKEN="my-secret", DMLC_ROLE="server")
    command = [sys.executable, "-m", "kvstore"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "my-secret" not in done.stdout
    assert "KVSTORE_TOKEN=(set)" in done.stdout
    assert "DMLC_ROLE=server" in done.stdout
    assert not [name for name in settings.variables() if f"{name} is set, and no" in done.stdout]
    for setting in settings.TABLE:
        assert any(f"{name}=" in done.stdout for name in setting.variables)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train.py", "--rate", "a b"], "`kvrun -n 2 -s 2 python train.py --rate 'a b'` starts"),
        (["-c"], "`kvrun -n 2 -s 2 python train.py` starts"),
    ],
)
def test_a_worker_without_a_scheduler_is_told_what_to_type(arguments, told, monkeypatch):
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(kvstore.InvalidArgumentError, match="KVSTORE_SCHEDULER") as caught:
        settings.read({})
    assert told in str(caught.value)
