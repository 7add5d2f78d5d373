"""Clusters over a network: two network namespaces, joined by a cable, with processes in both."""

import os
import shutil
import subprocess

import pytest
from fakes import LONG, Child

pytestmark = pytest.mark.ucx

NEAR, FAR = "near", "far"  # scheduler and server; workers
ADDRESSES = {4: {NEAR: "10.77.0.1", FAR: "10.77.0.2"}, 6: {NEAR: "fd77::1", FAR: "fd77::2"}}
ANY = {4: "0.0.0.0", 6: "::"}
BITS = {4: 24, 6: 64}

WORKER = """
import numpy as np
import kvstore
with kvstore.create("dist_sync") as kv:
    sizes = [3, 5000, 1 << 20]
    kv.init([str(size) for size in sizes], [np.zeros(size, "float32") for size in sizes])
    for step in range(1, 4):
        for size in sizes:
            out = np.empty(size, "float32")
            kv.pushpull(str(size), np.full(size, step, "float32"), out=out)
            assert (out == 2 * step).all(), (size, step)
print("done")
"""


def call(*command):
    """Run a program of iproute2; its words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    return done.stderr.strip() or f"status {done.returncode}" if done.returncode else ""


class Network:
    """The two namespaces, which have names of this process's."""

    def __init__(self):
        self.names = {side: f"kvstore-{os.getpid()}-{side}" for side in (NEAR, FAR)}
        self.made, self.has_inet6 = [], False

    def make(self):
        for name in self.names.values():
            trouble = call("ip", "netns", "add", name)
            if trouble:
                pytest.skip(f"this process may not make a network namespace: {trouble}")
            self.made.append(name)
        near, far = self.names.values()
        cable = ("type", "veth", "peer", "name", FAR, "netns", far)
        trouble = call("ip", "link", "add", NEAR, "netns", near, *cable)
        if trouble:
            pytest.skip(f"this kernel has no veth, a cable between namespaces: {trouble}")
        for side, name in self.names.items():
            for family, addresses in ADDRESSES.items():
                address = f"{addresses[side]}/{BITS[family]}"
                told = ["nodad"] if family == 6 else []
                trouble = call("ip", "-n", name, "addr", "add", address, "dev", side, *told)
                assert not trouble or family == 6, trouble
                self.has_inet6 = not trouble
            for device in ("lo", side):
                assert not call("ip", "-n", name, "link", "set", device, "up")

    def inside(self, side):
        return "ip", "netns", "exec", self.names[side]

    def disturb(self, *how):
        for side, name in self.names.items():
            trouble = call("tc", "-n", name, "qdisc", "add", "dev", side, "root", "netem", *how)
            if trouble:
                pytest.skip(f"this kernel has no netem, which delays and loses packets: {trouble}")

    def remove(self):
        for name in self.made:  # and what is in them
            call("ip", "netns", "del", name)


@pytest.fixture
def network():
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("this machine lacks ip and tc, of iproute2, which make networks")
    made = Network()
    try:
        made.make()
        yield made
    finally:
        made.remove()


@pytest.fixture
def start(network):
    """Starts a process in a namespace; all are ended with the test."""
    made = []

    def start(side, *command, **options):
        made.append(Child(*command, by=network.inside(side), **options))
        return made[-1]

    yield start
    for one in made:
        one.stop()


@pytest.fixture
def cluster(network, start):
    """Runs a whole cluster: scheduler and two servers near, two workers far."""
    schedulers = []

    def run(family, token="secret", far_token="secret", options=None, **near):
        address = ADDRESSES[family][NEAR]
        if family == 6 and not network.has_inet6:
            pytest.skip("this kernel has no IPv6")
        secret = {"KVSTORE_TOKEN": token}
        scheduler, where = Child.scheduler(
            2, 2, host=address, by=network.inside(NEAR), **secret, **near
        )
        schedulers.append(scheduler)
        place = {"KVSTORE_SCHEDULER": where, "KVSTORE_TIMEOUT": str(LONG), **(options or {})}
        serve = {"KVSTORE_ROLE": "server", **place, **secret}
        servers = [start(NEAR, "-m", "kvstore.server", **serve) for _ in range(2)]
        work = {"KVSTORE_ROLE": "worker", **place, "KVSTORE_TOKEN": far_token}
        workers = [start(FAR, "-c", WORKER, **work) for _ in range(2)]
        return scheduler, servers, workers

    yield run
    for one in schedulers:
        one.stop()


def ends_well(nodes):
    scheduler, servers, workers = nodes
    for worker in workers:
        assert worker.ends() == ("done\n", "")
    for node in (*servers, scheduler):
        assert node.ends() == ("", "")


@pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("copies", ["auto", "off"])
def test_a_cluster_works_over_a_network(family, copies, cluster):
    ends_well(cluster(family, options={"KVSTORE_SAME_HOST_COPIES": copies}))


@pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
def test_the_address_to_listen_on_may_be_another_than_that_to_connect_to(family, cluster):
    told = ADDRESSES[family][NEAR]
    ends_well(cluster(family, KVSTORE_BIND=ANY[family], KVSTORE_ADVERTISE=told))


def test_who_has_another_token_is_told_so_and_the_scheduler_says_it(cluster):
    _, _, workers = cluster(4, far_token="another")
    for worker in workers:
        _, err = worker.ends(1)
        assert "InvalidArgumentError" in err and "KVSTORE_TOKEN" in err


def test_a_scheduler_that_others_can_reach_wants_a_token(start):
    place = {"KVSTORE_ROLE": "scheduler", "KVSTORE_SCHEDULER": f"{ADDRESSES[4][NEAR]}:0"}
    numbers = {"KVSTORE_NUM_WORKERS": "1", "KVSTORE_NUM_SERVERS": "1"}
    _, err = start(NEAR, "-m", "kvstore.server", **place, **numbers).ends(1)
    assert f"listens on {ADDRESSES[4][NEAR]}" in err and "needs a token" in err


def test_a_cluster_works_over_a_slow_network_that_loses_packets(network, cluster):
    network.disturb("delay", "10ms", "2ms", "loss", "1%")
    ends_well(cluster(4, options={"KVSTORE_SAME_HOST_COPIES": "off"}))
