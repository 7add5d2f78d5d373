"""What the tests of the control plane share: a data plane that moves nothing, clusters whose nodes
are threads of this process, and nodes that are processes of their own."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path

from kvstore.cluster import control, settings
from kvstore.cluster.member import Member
from kvstore.cluster.roster import Stage
from kvstore.cluster.scheduler import Scheduler
from kvstore.errors import PeerLostError

HERE = Path(__file__).parent
# How long something may take that is due at once: a loaded machine under a sanitizer is slow.
LONG = 60


class FakeCore:
    """The methods of the data plane. `lost` is what it was told of a broken cluster, `gone` are the
    workers that have left."""

    def __init__(self, role, rank, num_workers, num_servers, **options):
        self.role, self.rank, self.options = role, rank, options
        self.peers, self.lost, self.closed = None, None, False
        self.optimizers, self.gone = [], []
        self.woken = threading.Event()

    def address(self):
        return f"{self.role} {self.rank} \0\xff".encode("latin-1")

    def connect(self, peers):
        self.peers = peers

    def wait_ready(self, timeout):
        if self.lost is not None:
            raise PeerLostError(self.lost)

    def wait_alone(self, timeout):
        pass

    def drain(self, timeout):
        pass

    def add_optimizer(self, number, kind, numbers, flags, begin_num_update, training):
        self.optimizers.append((number, kind, {**numbers, **flags}, begin_num_update))

    def next_update(self, timeout):
        self.woken.wait(timeout)
        self.woken.clear()

    def wake(self):
        self.woken.set()

    def lose(self, why):
        self.lost = why

    def left(self, rank, finished):
        self.gone.append((rank, finished))

    def close(self):
        self.closed = True


def make_settings(role, address, **options):
    """Settings of a node, with numbers as the scheduler's unless given."""
    options.setdefault("timeout", LONG)
    return settings.read({"role": role, "scheduler": address, **options})


class Cluster:
    """A scheduler in this process; `join` makes members of it in threads."""

    def __init__(self, num_workers, num_servers, host="127.0.0.1", port=0, **options):
        self.numbers = {"num_workers": num_workers, "num_servers": num_servers}
        address = settings.join_address(host, port)
        self.scheduler = Scheduler(make_settings("scheduler", address, **self.numbers, **options))
        control.run(self.scheduler.listen())
        self.address = settings.join_address(host, self.scheduler.address[1])
        self.options = {k: v for k, v in options.items() if k == "token"}
        self.ended = control.start(self.scheduler.run())
        self.pool = ThreadPoolExecutor(num_workers + num_servers + 8)
        self.members = []

    def settings(self, role, **options):
        return make_settings(role, self.address, **{**self.options, **options})

    def join(self, role, asynchronous=False, make_core=FakeCore, **options):
        """A future of a member."""

        def work():
            node = self.settings(role, **options)
            member = Member.join(node, asynchronous=asynchronous, make_core=make_core)
            self.members.append(member)
            return member

        return self.pool.submit(work)

    def start(self):
        """All members, joined: workers by rank, then servers by rank."""
        futures = [self.join("worker") for _ in range(self.numbers["num_workers"])]
        futures += [self.join("server") for _ in range(self.numbers["num_servers"])]
        members = [future.result(LONG) for future in futures]
        members.sort(key=lambda member: (member.role != "worker", member.rank))
        return members

    def serve(self, server, controller=None):
        """Let a member be a server until the cluster ends."""
        from kvstore import _dist

        def work():
            for command in server.commands():
                _dist.run_command(server, command, controller)
            server.close()

        return self.pool.submit(work)

    def close(self):
        """End it however far it is."""
        for member in self.members:
            member.close(LONG, together=False)
        if self.scheduler.roster.stage > Stage.JOINING:
            with contextlib.suppress(PeerLostError, FutureTimeout, CancelledError):
                self.ended.result(5)
        self.ended.cancel()
        self.pool.shutdown()


# A node that is a process: it joins, says so, does what it was told and says how that ended.
NODE = """
import os, sys, time
from fakes import FakeCore, make_settings
from kvstore import server
from kvstore.cluster.member import Member

def controller(head, body):
    time.sleep(float(body))

role, address, action = sys.argv[1:]
try:
    settings = make_settings(role, address)
    if role == "server":
        FakeCore.wait_ready = lambda self, timeout: print("joined", flush=True)
        server._serve(settings, controller, FakeCore)
    else:
        print("joining", flush=True)
        member = Member.join(settings, make_core=FakeCore)
        print("joined", flush=True)
        exec(action)
except BaseException as error:
    print(time.time(), type(error).__name__, error, flush=True)
    if action == "raise":
        raise
    if not isinstance(error, SystemExit):
        os._exit(1)
print("done", flush=True)
"""


class Child(subprocess.Popen):
    """A Python process with this folder on its path, and no setting but those given. `by` is the
    program that starts it, in its place."""

    def __init__(self, *command, by=(), pass_fds=(), talks=False, **variables):
        env = {n: v for n, v in os.environ.items() if n not in settings.variables()}
        paths = [str(HERE), *filter(None, [env.get("PYTHONPATH")])]
        env.update(PYTHONPATH=os.pathsep.join(paths), **variables)
        super().__init__(
            [*by, sys.executable, *map(str, command)],
            env=env,
            text=True,
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
        )

    @classmethod
    def node(cls, role, address, action=""):
        return cls("-c", NODE, role, address, action)

    @classmethod
    def scheduler(cls, num_workers, num_servers, host="127.0.0.1", **options):
        """A scheduler as a program, and its address."""
        read_fd, write_fd = os.pipe()
        found = cls(
            "-m",
            "kvstore.server",
            pass_fds=[write_fd],
            KVSTORE_ROLE="scheduler",
            KVSTORE_SCHEDULER=settings.join_address(host, 0),
            KVSTORE_NUM_WORKERS=str(num_workers),
            KVSTORE_NUM_SERVERS=str(num_servers),
            KVSTORE_ANNOUNCE_FD=str(write_fd),
            **options,
        )
        os.close(write_fd)
        with os.fdopen(read_fd) as file:
            told = json.loads(file.readline())
        return found, settings.join_address(told["host"], told["port"])

    def says(self, line):
        assert self.stdout.readline() == f"{line}\n"

    def ends(self, status=0):
        """Wait for its end; what it said on stdout and stderr since."""
        out, err = self.communicate(timeout=LONG)
        assert self.returncode == status, (out, err)
        return out, err

    def stop(self):
        if self.poll() is None:
            self.kill()
        self.communicate()


def until(condition, timeout=LONG):
    """Wait until a condition of another thread's making holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        threading.Event().wait(0.005)
