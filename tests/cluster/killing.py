"""Clusters of real processes, one of which is to be killed or stopped, and the worker's program.

Every process is a child of the test and not of a launcher, which would end the others itself. A
worker prints a line of JSON before it waits and one for each error; times are of the machine's
monotonic clock, so that the test can tell how long after a kill something was raised.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time

import numpy as np
import summing
from fakes import LONG, Child

import kvstore
from kvstore.cluster import control
from kvstore.cluster.member import of_this_process

SMALL, LARGE = 1 << 8, 1 << 22  # elements of 4 bytes: 16 MiB are cut into slices for all servers
KEYS = {"small": SMALL, "large": LARGE}
COMMAND_S = 6
INSIDE_S = 0.2  # a thread that stands at one place for so long waits in a call of the core
# What a worker can be in. The victim takes part in none of them, so none can end by itself.
WAITS = (
    "first init",
    "second init",
    "push small",
    "push large",
    "pull small",
    "pull large",
    "pushpull small",
    "pushpull large",
    "barrier",
    "command",
    "handle",
    "idle",
)


def say(**news):
    print(json.dumps({"at": time.monotonic(), **news}), flush=True)


def controller(head, body):
    """Of a command that outlasts the kill. It must end: a server ends after its controller only."""
    threading.Event().wait(float(body))


def ones(size):
    return np.ones(size, "float32")


def wait_in(kv, situation):
    what, _, name = situation.partition(" ")
    if situation == "first init":
        for i in range(1 << 30):
            kv.init(f"more {i}", ones(LARGE if i % 4 == 0 else SMALL))
    elif situation == "second init":
        kv.init("never", ones(SMALL))
    elif what == "push":
        for _ in range(1 << 30):  # a key's second round waits for its first one
            kv.push(name, ones(KEYS[name]))
            kv.pull(name, out=np.empty(KEYS[name], "float32"))
    elif what == "pull":
        kv.push(name, ones(KEYS[name]), async_op=True)
        kv.pull(name, out=np.empty(KEYS[name], "float32"))
    elif what == "pushpull":
        kv.pushpull(name, ones(KEYS[name]), out=np.empty(KEYS[name], "float32"))
    elif what == "barrier":
        kv.barrier()
    elif what == "command":
        kv.send_command_to_servers(1, str(COMMAND_S))
    elif what == "handle":
        out = np.empty(LARGE, "float32")
        kv.pushpull("large", ones(LARGE), out=out, async_op=True).wait()
    else:
        sys.stdin.readline()  # until the test has seen a death
        while True:
            kv.pull("small", out=np.empty(SMALL, "float32"))


LATER = {
    "init": lambda kv: kv.init("new", ones(SMALL)),
    "push": lambda kv: kv.push("small", ones(SMALL)),
    "pull": lambda kv: kv.pull("small", out=np.empty(SMALL, "float32")),
    "pushpull": lambda kv: kv.pushpull("large", ones(LARGE), out=ones(LARGE)),
    "handle": lambda kv: kv.pushpull("small", ones(SMALL), out=ones(SMALL), async_op=True).wait(),
    "barrier": lambda kv: kv.barrier(),
    "command": lambda kv: kv.send_command_to_servers(2, "0"),
}


def tell(kv, call, function):
    try:
        function(kv)
    except kvstore.KVStoreError as error:
        say(call=call, error=type(error).__name__, text=str(error))
    else:
        say(call=call, error=None, text="")


def waiter(kv, situation):
    for name, size in KEYS.items():
        kv.init(name, np.zeros(size, "float32"))
    kv.barrier()
    say(inside=situation)
    tell(kv, situation, lambda kv: wait_in(kv, situation))
    for call, function in LATER.items():
        tell(kv, call, function)


LOADS = ("plain", "optimizer", "2bit", "2bit optimizer", "python optimizer")
AGAIN = 40  # steps after which the same optimizer is set again


def load(kv, argument):
    """Rounds of pushes and pulls in a random order that is every worker's, until an error.

    All numbers are such that nothing is rounded: halves, which 2-bit codes stand for as they are.
    With an optimizer they are added up.
    """
    seed, _, kind = argument.partition(" ")
    make = summing.Summing if "python" in kind else kvstore.optimizer.SGD
    same, size = np.random.default_rng(int(seed)), {}
    adds, total = "optimizer" in kind, {}
    for i in range(8):
        size[f"k{i}"] = int(same.choice([1, 100, 5000, 300_000, 1_500_000]))
    if adds:
        kv.set_optimizer(make(learning_rate=-1.0))
    for key, number in size.items():
        kv.init(key, np.zeros(number, "float32"))
    if "2bit" in kind:
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
    say(inside="load")
    with contextlib.suppress(kvstore.PeerLostError):
        for step in range(1 << 30):
            key = f"k{same.integers(8)}"
            number = (step % 3 - 1) / 2 if "2bit" in kind else step % 1000
            total[key] = number * kv.num_workers + (total.get(key, 0) if adds else 0)
            value, out = np.full(size[key], number, "float32"), np.full(size[key], -1, "float32")
            if adds and step % AGAIN == AGAIN - 1:
                kv.set_optimizer(make(learning_rate=-1.0))
            if same.integers(2):
                kv.push(key, value)
                kv.pull(key, out=out)
            else:
                kv.pushpull(key, value, out=out)
            if not (out == total[key]).all():
                say(wrong=key, step=step)
                return
    tell(kv, "load", lambda kv: kv.pull("k0", out=np.empty(size["k0"], "float32")))


def norms(kv, _):
    """Rounds whose steps take norms of slices on both servers, until an error."""
    kv.set_optimizer(kvstore.optimizer.LAMB())
    kv.init("large", ones(LARGE))
    out = ones(LARGE)
    say(inside="norms")
    with contextlib.suppress(kvstore.PeerLostError):
        for step in range(1 << 30):
            kv.push("large", ones(LARGE))
            kv.pull("large", out=out)
            if not (out == out[0]).all():
                say(wrong="large", step=step)
                return
    tell(kv, "norms", lambda kv: kv.pull("large", out=out))


TABLE, LIFE = (2000, 16), 50  # of the rows; steps after which keys are made anew


def soak(kv, states):
    """All kinds of traffic until the test has had enough, every value compared. Worker 0 hears of
    that, and the others by a value that it pushes."""
    enough, same = threading.Event(), np.random.default_rng(1)
    threading.Thread(target=lambda: (sys.stdin.readline(), enough.set()), daemon=True).start()
    kv.set_optimizer(kvstore.optimizer.SGD(learning_rate=-1.0))
    kv.init("enough", np.zeros(1, "float32"))
    say(inside="soak")
    asked, rate, step = np.zeros(1, "float32"), 1, 0
    while asked[0] == 0:
        if step % LIFE == 0:
            if step > 0:
                kv.delete(["dense", "rows"])
            make = summing.Summing if step // LIFE % 3 == 2 else kvstore.optimizer.SGD
            if kv.rank == 0:
                kv.set_optimizer(make(learning_rate=-float(rate)))
            size = int(same.choice([1, 5000, 300_000, 1_500_000]))
            kv.init("dense", np.zeros(size, "float32"))
            kv.init("rows", kvstore.RowSparse.zeros(TABLE))
            total, table = 0.0, np.zeros(TABLE, "float32")
            kv.set_gradient_compression({"type": same.choice(["2bit", "none"]), "threshold": 0.5})
        if step % 100 == 60:
            rate = 3 - rate  # 1 or 2
            if kv.rank == 0:
                kv.set_optimizer_params(learning_rate=-float(rate))
        number = (step % 3 - 1) / 2  # 2-bit codes stand for it as it is
        total += number * kv.num_workers * rate
        out = np.empty(size, "float32")
        kv.pushpull("dense", np.full(size, number, "float32"), out=out)
        ids = np.sort(same.choice(TABLE[0], 50, replace=False))
        table[ids] += number * kv.num_workers * rate
        kv.push("rows", kvstore.RowSparse(np.full((50, TABLE[1]), number, "float32"), ids, TABLE))
        rows = kv.row_sparse_pull("rows", row_ids=ids)
        if not ((out == total).all() and (rows.data == table[ids]).all()):
            say(wrong=step)
            return
        if kv.rank == 0 and step % 40 == 30 and make is kvstore.optimizer.SGD:
            kv.save_optimizer_states(states)
        asked_here = kv.rank == 0 and enough.is_set()
        kv.pushpull("enough", np.array([asked_here], "float32"), out=asked)
        step += 1
    say(steps=step)


def main():
    what, argument, timeout = sys.argv[1:]
    kvstore.create("dist_sync")  # joining has the longer deadline of the environment
    kv = kvstore.KVStore("dist_sync", _member=of_this_process(), timeout=float(timeout))
    programs = {"waiter": waiter, "load": load, "norms": norms, "soak": soak, "steps": steps}
    programs[what](kv, argument)
    kv.close()
    say(closed=True)


def interrupted(call):
    """The seconds from Ctrl-C in the middle of a wait of this call to its KeyboardInterrupt."""
    main, sent, ended = threading.main_thread().ident, [], threading.Event()

    def interrupt():
        place, since = None, time.monotonic()
        while time.monotonic() - since < INSIDE_S:
            frame = sys._current_frames()[main]
            now = frame.f_code, frame.f_lasti
            if now != place:
                place, since = now, time.monotonic()
            if ended.wait(0.001):
                return
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        call()
        ended.set()
        thread.join()
    except KeyboardInterrupt:
        assert not ended.is_set(), "the call ended by itself"
        return time.monotonic() - sent[0]
    raise AssertionError("the call did not wait")


def steps(kv, _):
    """Calls that the test asks for by lines; `kv` and `np` are what they may use."""
    names = {"kv": kv, "np": np, "time": time, "sys": sys, "control": control}
    names["interrupted"] = interrupted
    say(inside="steps", rank=kv.rank)
    for line in sys.stdin:
        try:
            say(value=eval(line, names))
        except kvstore.KVStoreError as error:
            say(error=type(error).__name__, text=str(error))


class Processes:
    """The processes of a cluster by name: `scheduler`, `server 0`, `worker 0`."""

    def __init__(self, workers, num_servers, timeout=LONG):
        self.all, self.killed_at = {}, None
        self.news = {}
        try:
            scheduler, address = Child.scheduler(len(workers), num_servers)
            self.all["scheduler"] = scheduler
            place = {
                "KVSTORE_SCHEDULER": address,
                "KVSTORE_NUM_WORKERS": str(len(workers)),
                "KVSTORE_NUM_SERVERS": str(num_servers),
                "KVSTORE_TIMEOUT": str(LONG),
            }
            for i in range(num_servers):
                role = {"KVSTORE_ROLE": "server", "KVSTORE_RANK": str(i), **place}
                command = ("-m", "kvstore.server", "--controller", "killing:controller")
                allowed = ("--allow-import", "summing")
                self.all[f"server {i}"] = Child(*command, *allowed, **role)
            for i, (what, argument) in enumerate(workers):
                role = {"KVSTORE_ROLE": "worker", "KVSTORE_RANK": str(i), **place}
                command = (__file__, what, argument, timeout)
                self.all[f"worker {i}"] = Child(*command, talks=True, **role)
            for name in self.workers():
                assert "inside" in self.hear(name), name
        except BaseException:
            self.close()
            raise

    def workers(self):
        return [name for name in self.all if name.startswith("worker")]

    def hear(self, name):
        line = self.all[name].stdout.readline()
        assert line, (name, self.all[name].communicate()[1])
        return json.loads(line)

    def tell(self, name, line=""):
        self.all[name].stdin.write(line + "\n")
        self.all[name].stdin.flush()

    def ask(self, name, line):
        self.tell(name, line)
        return self.hear(name)

    def signal(self, name, number):
        os.kill(self.all[name].pid, number)

    def kill(self, name):
        self.killed_at = time.monotonic()
        self.all[name].kill()
        return self.killed_at

    def end(self, dead=None):
        """Wait for all to end. The news of each worker; status 0 of workers, 1 of the others where
        one was killed."""
        found = {}
        for name, process in self.all.items():
            out, err = process.communicate(timeout=LONG)
            if name == dead:
                continue
            expected = 0 if name.startswith("worker") or dead is None else 1
            assert process.returncode == expected, (name, process.returncode, out[-2000:], err)
            if name.startswith("worker"):
                assert err == "", (name, err)
                found[name] = [json.loads(line) for line in out.splitlines()]
            elif dead is not None:
                assert f"{dead} (" in err or f"the {dead} at" in err, (name, dead, err)
        return found

    def finish(self, dead=None):
        """Let the workers that take steps end, and wait for all."""
        for name in self.workers():
            self.all[name].stdin.close()
            self.all[name].stdin = None
        return self.end(dead)

    def close(self):
        for process in self.all.values():
            process.stop()


def until_asleep(process):
    """Wait until the process's main thread sleeps: it is inside of what it was about to call."""
    deadline = time.monotonic() + LONG
    seen = 0
    while seen < 5:
        assert time.monotonic() < deadline
        with open(f"/proc/{process.pid}/stat") as file:
            seen = seen + 1 if file.read().rpartition(")")[2].split()[0] == "S" else 0
        threading.Event().wait(0.002)


if __name__ == "__main__":
    main()
