"""Clusters inside one process: servers and workers connected by the transport for tests.

The data plane is the real one, from the store's calls down to messages; no sockets, no processes
and no control plane, so these run under every sanitizer.
"""

import contextlib
import itertools
import threading
import types
import weakref
from collections import deque

import kvstore
from kvstore import _core, _dist
from kvstore._declared import Declared
from kvstore.cluster.member import Command

SESSION = bytes(range(16))


class Place:
    """A node's place in the cluster: it runs the package's own commands."""

    role = "server"

    def __init__(self, core, allow_import=()):
        self.core, self.declared = core, Declared()
        self.settings = types.SimpleNamespace(allow_import=allow_import)
        self.departed = set()  # nobody leaves early here
        self.results = {}

    def done(self, command, failure=None, answer=""):
        self.results[command.number] = failure, answer


class Member(Place):
    """A worker's place in the cluster, as far as one process needs it."""

    role = "worker"

    def __init__(self, cluster, rank):
        super().__init__(cluster.node("worker", rank))
        self.cluster, self.rank = cluster, rank
        self.num_workers = cluster.num_workers
        self.closed = False
        self.store = None
        self.asynchronous = "async" in cluster.kind
        self.loads, self.taking = deque(maxlen=16), {}

    def command(self, head, body, timeout_s, workers=None):
        if workers is None:
            return self.cluster.command(head, body)
        members = [self.cluster.members[rank] for rank in workers]
        return self.cluster.run_command([m for m in members if not m.closed], head, body)

    def barrier(self, timeout_s):
        self.cluster.barrier.wait(timeout_s)
        return [""] * self.num_workers

    def await_loss(self, seconds):
        """Nobody else tells of losses here."""

    def close(self, timeout_s, together=None):
        if not self.closed:
            self.closed = True
            for node in self.cluster.servers:
                node.left(self.rank, self.is_finished())
            self.core.close()

    def is_finished(self):
        try:
            self.core.drain(0.001)
        except (kvstore.TimeoutError, kvstore.PeerLostError):
            return False
        return True


def each(stores, function):
    """``function(kv)`` for each store, in a thread each; the results in order."""
    results, errors = [None] * len(stores), [None] * len(stores)

    def work(i):
        try:
            results[i] = function(stores[i])
        except BaseException as error:
            errors[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
    return results


class Cluster:
    """``with Cluster(2, 2) as cluster: kv = cluster.store(rank)``.

    With `allow_import` a thread of each server runs optimizers in Python from these modules."""

    def __init__(
        self,
        num_workers=1,
        num_servers=2,
        kind="dist_sync",
        transport="inproc",
        allow_import=(),
        **options,
    ):
        self.kind, self.num_workers, self.num_servers = kind, num_workers, num_servers
        self.options = {"transport": transport, "session": SESSION, **options}
        self.barrier = threading.Barrier(num_workers)
        self.closing, self.updating = False, []
        self.commands, self.numbers = threading.Lock(), itertools.count(1)
        self.members, self.servers, self.stores = [], [], []
        try:
            self.servers = [self.node("server", i) for i in range(num_servers)]
            self.serving = [Place(node, allow_import) for node in self.servers]
            self.members = [Member(self, i) for i in range(num_workers)]
            self._connect()
            self.updating = [threading.Thread(target=self._update, args=(s,)) for s in self.serving]
            for thread in self.updating if allow_import else []:
                thread.start()
        except BaseException:
            self.close()
            raise

    def node(self, role, rank):
        asynchronous = role == "server" and "async" in self.kind
        return _core.Node(
            role,
            rank,
            self.num_workers,
            self.num_servers,
            asynchronous=asynchronous,
            **self.options,
        )

    def _connect(self):
        workers = [
            (i, f"worker {i}", member.core.address()) for i, member in enumerate(self.members)
        ]
        servers = [
            (self.num_workers + i, f"server {i}", node.address())
            for i, node in enumerate(self.servers)
        ]
        for i, node in enumerate(self.servers):
            node.connect(workers + servers[:i] + servers[i + 1 :])
        for member in self.members:
            member.core.connect(servers)
        for node in self.nodes():
            node.wait_ready(10)

    def _update(self, place):
        with contextlib.suppress(kvstore.ClosedError):
            while not self.closing:
                update = place.core.next_update(60)
                if update is not None:
                    place.declared.served.run(place.core, update)

    def command(self, head, body):
        """What all servers answer to it."""
        with self.commands:
            return self.run_command(self.serving, head, body)

    def run_command(self, places, head, body):
        """What these nodes answer to it, which may ask others meanwhile."""
        command = Command(next(self.numbers), head, body)
        for place in places:
            _dist.run_command(place, command, None)
        results = [place.results.pop(command.number) for place in places]
        failures = [failure for failure, _ in results if failure is not None]
        if failures:
            raise kvstore.KVStoreError("; ".join(failures))
        return [answer for _, answer in results]

    def nodes(self):
        return [*self.servers, *(member.core for member in self.members)]

    def store(self, rank=0, **options):
        store = kvstore.KVStore(self.kind, _member=self.members[rank], **{"timeout": 20, **options})
        self.stores.append(store)
        self.members[rank].store = weakref.ref(store)
        return store

    def all_stores(self, **options):
        """A store of each worker, by rank."""
        return [self.store(rank, **options) for rank in range(self.num_workers)]

    def run(self, function, **options):
        """``function(kv)`` with a store of each worker, in a thread each; the results by rank."""
        return each(self.all_stores(**options), function)

    def close(self):
        for store in self.stores:
            store.close()
        self.closing = True
        for node in self.servers:
            node.wake()
        for thread in self.updating:
            if thread.ident is not None:
                thread.join()
        for node in self.nodes():
            node.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
