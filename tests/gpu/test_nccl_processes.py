"""Stores of kind `nccl` over several processes, each with its own emulation of CUDA. The stand-in
for NCCL carries values between them in files."""

import itertools
import json
import shutil
import signal
import sys
import time

import numpy as np
import pytest

import plugin

sys.path.insert(0, str(plugin.ROOT / "tests" / "cluster"))
from fakes import LONG, Child
from placing import torchrun

import kvstore
from kvstore import optimizer

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the emulation is built with g++, which is missing here"
)
SOON_S = 30  # for what is due at once, on a loaded machine; less than the stores' timeout
seeds = itertools.count()


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    return {
        "KVSTORE_CUDA_PLUGIN": str(plugin.link(plugin.objects().values(), folder / "emulated.so")),
        "KVSTORE_NCCL": str(plugin.nccl(folder / "libnccl.so.2")),
    }


class Workers:
    """Workers with so many devices each, and their scheduler; or as torchrun starts them."""

    def __init__(self, folder, libraries, devices, timeout=LONG, create=True, by_torchrun=False):
        size = len(devices)
        self.others = []
        if by_torchrun:
            own = [torchrun(rank, size, 1, str(folder)) for rank in range(size)]
        else:
            scheduler, address = Child.scheduler(size, 0)
            self.others = [scheduler]
            own = [{"KVSTORE_SCHEDULER": address, "KVSTORE_RANK": rank} for rank in range(size)]
        self.all = [
            Child(
                plugin.HERE / "nccl_steps.py",
                talks=True,
                **libraries,
                EMU_NCCL_SHARED=str(folder),
                EMU_DEVICES=str(number),
                EMU_SEED=str(next(seeds)),
                KVSTORE_TIMEOUT=str(timeout),
                **{name: str(value) for name, value in own[rank].items()},
            )
            for rank, number in enumerate(devices)
        ]
        for rank in range(len(devices)):
            assert self.hear(rank) == {"value": "here"}
        if create:
            self.each("kv = kvstore.create('nccl')")

    def tell(self, rank, line):
        self.all[rank].stdin.write(line.replace("\n", " ") + "\n")
        self.all[rank].stdin.flush()

    def hear(self, rank):
        line = self.all[rank].stdout.readline()
        assert line, self.all[rank].communicate()
        return json.loads(line)

    def ask(self, rank, line):
        self.tell(rank, line)
        return self.hear(rank)

    def each(self, *lines):
        """What all workers answer to their lines, or all to the same line."""
        lines = lines * len(self.all) if len(lines) == 1 else lines
        for rank, line in enumerate(lines):
            self.tell(rank, line)
        told = [self.hear(rank) for rank in range(len(self.all))]
        assert all("value" in one for one in told), (lines, told)
        return [one["value"] for one in told]

    def fails(self, rank, line, kind, *words):
        told = self.ask(rank, line)
        assert told.get("error") == kind and all(word in told["text"] for word in words), told

    def all_fail(self, kind, word, *lines):
        lines = lines * len(self.all) if len(lines) == 1 else lines
        for rank, line in enumerate(lines):
            self.tell(rank, line)
        for rank in range(len(self.all)):
            told = self.hear(rank)
            assert told.get("error") == kind and word in told["text"], told

    def kill(self, rank):
        self.all[rank].send_signal(signal.SIGKILL)
        self.all[rank].wait()

    def finish(self):
        """All close; nobody has made a mistake on his devices."""
        self.each("kv.close()")
        for one in self.all:
            out, err = one.ends(0)
            assert json.loads(out) == {"value": [0, ""]}, err
        for one in self.others:
            one.ends(0)

    def stop(self):
        for one in (*self.all, *self.others):
            one.stop()


@pytest.fixture
def make(tmp_path, libraries):
    made = []

    def start(*devices, **options):
        made.append(Workers(tmp_path, libraries, devices, **options))
        return made[-1]

    yield start
    for workers in made:
        workers.stop()


def rows_of(rank, step, devices):
    """What a worker pushes: eighths, which are added up without rounding."""
    base = np.random.default_rng([rank, step]).integers(-16, 17, 6).astype("float32") / 8
    return [base * (d + 1) for d in range(devices)]


PUSH = "kv.push('w', tensors(np.random.default_rng([kv.rank, {}]).integers(-16, 17, 6)"
PUSH += ".astype('float32') / 8))"


# ----------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("devices", [(1, 1), (2, 2), (2, 1), (1, 2, 1)])
@pytest.mark.parametrize("rule", [None, "sgd", "adam"])
def test_all_workers_have_the_sum_of_all_and_take_the_same_step(make, devices, rule):
    workers = make(*devices)
    local = kvstore.create("local")
    start = np.arange(6, dtype="float32")
    assert workers.each("(kv.type, kv.rank, kv.num_workers)") == [
        ["nccl", rank, len(devices)] for rank in range(len(devices))
    ]
    workers.each("kv.init('w', cuda.TableTensor(np.arange(6, dtype='float32') + 100 * kv.rank, 0))")
    local.init("w", start)
    assert workers.each("values(kv, 'w')") == [start.tolist()] * len(devices)
    if rule is not None:
        workers.each(f"kv.set_optimizer(optimizer.create({rule!r}, learning_rate=0.25))")
        local.set_optimizer(optimizer.create(rule, learning_rate=0.25))
    for step in range(3):
        workers.each(PUSH.format(step))
        local.push("w", [v for r, n in enumerate(devices) for v in rows_of(r, step, n)])
        wanted = local.pull("w").asnumpy().astype("float64").tolist()
        assert workers.each("values(kv, 'w')") == [wanted] * len(devices)
    workers.finish()


def test_keys_of_a_list_all_types_and_pushpull(make):
    workers = make(1, 2)
    types = ("float64", "float32", "float16", "int8", "int32", "int64")
    workers.each(f"types = {types}; keys = list(range(len(types)))")
    workers.each("kv.init(keys, [at(7, 0, (3, 2), t) for t in types])")
    workers.each(
        "kv.push(keys, [[at(kv.rank + 1, d, (3, 2), t) for d in range(cuda.num_devices)]"
        " for t in types])"
    )
    assert workers.each("[values(kv, key) for key in keys]") == [[[5] * 6] * len(types)] * 2
    workers.each("outs = [[at(0, d, (3, 2), t) for d in range(cuda.num_devices)] for t in types]")
    workers.each(
        "kv.pushpull(keys, [[at(2, d, (3, 2), t) for d in range(cuda.num_devices)]"
        " for t in types], out=outs)"
    )
    assert workers.each("values(kv, 0)[0]") == [6, 6]  # which waits for it
    workers.each("pulled = [[one.numpy().tolist() for one in out] for out in outs]")
    assert workers.each("all(one == [[6, 6]] * 3 for out in pulled for one in out)") == [True] * 2
    workers.finish()


def test_new_keys_have_the_bits_of_worker_0_wherever_they_come_from(make):
    """From the host, from a device, before and after the first push, and by broadcast."""
    workers = make(1, 2)
    workers.each("kv.init(['a', 'b'], [np.full(4, kv.rank + 1, 'float32'), at(kv.rank + 2)])")
    assert workers.each("values(kv, 'a')[0], values(kv, 'b')[0]") == [[1, 2]] * 2
    workers.each("outs = [at(0, d) for d in range(cuda.num_devices)] + [np.zeros(4, 'float32')]")
    workers.each("kv.broadcast('c', at(kv.rank + 5), out=outs)")
    workers.each("host = outs.pop().tolist()")
    assert workers.each("host") == [[5] * 4] * 2
    assert workers.each("[out.numpy().tolist() == [5] * 4 for out in outs]") == [[True], [True] * 2]
    workers.each("kv.push('a', [at(1, d) for d in range(cuda.num_devices)])")
    assert workers.each("values(kv, 'a')[0]") == [3, 3]
    workers.each("kv.init('d', kvstore.array(np.full(4, kv.rank + 8, 'float32')))")
    workers.each("kv.init('e', at(kv.rank + 9))")
    assert workers.each("values(kv, 'd')[0], values(kv, 'e')[0]") == [[8, 9]] * 2
    workers.each("kv.delete('e')")
    workers.each("kv.init('e', at(kv.rank + 3, 0, (2, 2)))")
    assert workers.each("values(kv, 'e')") == [[3] * 4] * 2
    workers.finish()


def test_one_device_each_needs_one_group(make):
    workers = make(1, 1)
    workers.each("kv.init('w', at(0))")
    workers.each("kv.push('w', at(1))")
    assert workers.each("values(kv, 'w')[0]") == [2, 2]
    assert workers.each("counter('inits')") == [1, 1]
    workers.finish()


def test_a_barrier_and_the_options_of_a_cluster(make):
    workers = make(1, 1, create=False)
    workers.fails(0, "kvstore.create('nccl', num_workers=0)", "InvalidArgumentError", "num_workers")
    workers.each("kv = kvstore.create('NCCL', num_workers=2, num_servers=0, timeout=50)")
    workers.each("kv.barrier()")
    workers.fails(0, "kvstore.create('nccl')", "InvalidArgumentError", "already is a worker")
    workers.fails(0, "kv.send_command_to_servers(1, '')", "InvalidArgumentError", "no server")
    assert workers.ask(0, "kv.num_dead_node('worker')") == {"value": 0}
    workers.finish()


def test_torchruns_processes_need_no_servers(make):
    workers = make(1, 1, create=False, by_torchrun=True)
    workers.each("kvstore.cluster.from_environment(num_servers=0)")
    workers.each("kv = kvstore.create('nccl')")
    workers.each("kv.init('w', at(kv.rank))")
    workers.each("kv.push('w', at(kv.rank + 1))")
    assert workers.each("values(kv, 'w')[0]") == [3, 3]
    workers.finish()


# ---------------------------------------------------------------------------------- what is refused


def test_what_one_process_cannot_do_alone_is_refused_and_nothing_has_happened(make):
    workers = make(2, 1)
    workers.each("kv.init(['w', 'v'], [at(0), at(0)])")
    workers.each("kv.push('w', [at(1, d) for d in range(cuda.num_devices)])")
    for line, *words in (
        ("kv.push('w', np.ones(4, 'float32'))", "'w'", "host memory", "dist kinds"),
        ("kv.push('w', kvstore.ones(4))", "host memory"),
        ("kv.pushpull('w', [at(1, 0), np.ones(4, 'float32')])", "host memory"),
        ("kv.push('w', [at(1, 0), at(1, 0)])", "several on one GPU"),
        ("kv.push('w', at(1, 1))", "GPUs 0, 1", "first push"),
        ("kv.push(['w', 'v'], [[at(1, 0), at(1, 1)], [at(1, 0)]])", "not all as many"),
        ("kv.push('w', kvstore.RowSparse.zeros(4))", "row-sparse"),
        ("kv.init('r', kvstore.RowSparse.zeros((4, 2)))", "'r'", "row-sparse"),
        ("kv.set_updater(lambda key, recv, stored: None)", "built-in one"),
        ("kv.set_optimizer(Doubling())", "Doubling", "built-in one"),
    ):
        workers.fails(0, line, "InvalidArgumentError", *words)
    workers.each("kv.set_gradient_compression({'type': '2bit', 'threshold': 0.5})")
    workers.fails(0, "kv.push('w', [at(1, 0), at(1, 1)])", "InvalidArgumentError", "compressed")
    workers.each("kv.set_gradient_compression({'type': 'none'})")
    assert workers.each("values(kv, 'w')[0], values(kv, 'v')[0]") == [[3, 0]] * 2
    workers.each("kv.push('w', [at(2, d) for d in range(cuda.num_devices)])")
    assert workers.each("values(kv, 'w')[0]") == [6, 6]
    workers.finish()


def test_workers_that_differ_hear_of_it(make):
    workers = make(1, 1)
    refused = "InvalidArgumentError"
    workers.all_fail(refused, "differ", "kv.init('w', at(0))", "kv.init('w', at(0, 0, (5,)))")
    workers.all_fail(refused, "differ", "kv.init('w', at(0))", "kv.init('v', at(0))")
    workers.all_fail(refused, "at a barrier", "kv.init('w', at(0))", "kv.barrier()")
    sgd = "kv.set_optimizer(optimizer.SGD(learning_rate={}))"
    workers.all_fail(refused, "set_optimizer of SGD", sgd.format(0.1), sgd.format(0.2))
    workers.each("kv.init(['w', 'v'], [at(0), at(0)])")
    workers.all_fail(refused, "first push of key 'v'", "kv.push('w', at(1))", "kv.push('v', at(1))")
    workers.each(sgd.format(1))
    workers.each("kv.push(['v', 'w'], [at(1), at(1)])")
    assert workers.each("values(kv, 'w')[0]") == [-2, -2]
    workers.finish()


@pytest.mark.parametrize("line", ["kv.init('w', at(0))", "kv.push('v', at(1))"])
def test_who_does_not_come_is_named_at_the_deadline(make, line):
    workers = make(1, 1, timeout=2)
    workers.each("kv.init('v', at(0))")
    workers.fails(0, line, "TimeoutError", "worker 1 (")
    workers.each(line)
    workers.each("kv.push('v', at(1))")
    workers.finish()


@pytest.mark.parametrize(
    "line",
    ["kv.init('w', at(0))", "kv.push('v', at(1))", "kv.pushpull('u', at(1), out=np.zeros(4))"],
)
def test_ctrl_c_ends_a_wait_for_the_others(make, line):
    workers = make(1, 1)
    workers.each("kv.init(['v', 'u'], [at(0), at(0, 0, (4,), 'float64')])")
    line = line.replace("at(1), out", "at(1, 0, (4,), 'float64'), out")
    workers.ask(0, "interrupted_soon()")
    assert workers.ask(0, line)["error"] == "KeyboardInterrupt"
    workers.each(line)
    workers.finish()


def test_a_sum_in_which_one_does_not_take_part_is_over_by_the_timeout(make):
    workers = make(1, 1, timeout=2)
    workers.each("kv.init('w', at(0))")
    workers.each("kv.push('w', at(1))")
    assert workers.ask(0, "kv.push('w', at(1))") == {"value": None}
    workers.fails(0, "values(kv, 'w')", "TimeoutError", "has not come to the end of its work")
    workers.fails(0, "values(kv, 'w')", "DeviceError", "lost to this store")


# -------------------------------------------------------------------------------- who is lost


WAITS = {
    "a sum": ("kv.push('w', at(1, 0, (6,)))", "values(kv, 'w')"),
    "a pushpull": ("out = np.zeros(6, 'float32')", "kv.pushpull('w', at(1, 0, (6,)), out=out)"),
    "an init": ("None", "kv.init('new', at(1))"),
    "a pull": ("kv.push('w', at(1, 0, (6,)))", "kv.pull('w').asnumpy().tolist()"),
    "a barrier": ("None", "kv.barrier()"),
    "set_optimizer": ("None", "kv.set_optimizer(optimizer.SGD(learning_rate=1))"),
}
LATER = (
    "kv.push('w', at(1, 0, (6,)))",
    "kv.pull('w', out=np.zeros(6, 'float32'))",
    "kv.init('later', at(1))",
    "kv.barrier()",
)


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("count", [2, 3])
def test_a_killed_worker_is_named_by_all_calls_of_the_others(make, wait, count):
    workers = make(*[1] * count)
    workers.each("kv.init('w', at(0, 0, (6,)))")
    workers.each("kv.push('w', at(1, 0, (6,)))")
    first, then = WAITS[wait]
    others = range(count - 1)
    for rank in others:
        assert "value" in workers.ask(rank, first)
        workers.tell(rank, then)
    began = time.monotonic()
    workers.kill(count - 1)
    for rank in others:
        told = workers.hear(rank)
        assert time.monotonic() - began < SOON_S
        assert told["error"] == "PeerLostError", told
        assert f"worker {count - 1} (" in told["text"] and "is gone" in told["text"], told
        for line in LATER:
            workers.fails(rank, line, "PeerLostError", f"worker {count - 1} (")
    for rank in others:
        assert workers.ask(rank, "kv.close()") == {"value": None}
        workers.all[rank].ends(0)


def test_a_worker_that_dies_while_a_group_begins_is_named(make):
    workers = make(2, 1)
    workers.each("kv.init('w', at(0))")
    workers.ask(0, "fault('init never')")
    workers.tell(0, "kv.push('w', [at(1, 0), at(1, 1)])")
    assert workers.ask(1, "kv.push('w', at(1))") == {"value": None}
    began = time.monotonic()
    workers.kill(1)
    told = workers.hear(0)
    assert time.monotonic() - began < SOON_S
    assert told["error"] == "PeerLostError" and "worker 1 (" in told["text"], told
    workers.fails(0, "kv.pull('w', out=at(0))", "PeerLostError", "worker 1 (")


def test_a_device_that_dies_is_its_workers_error_and_a_loss_to_the_others(make):
    workers = make(1, 1)
    workers.each("kv.init('w', at(0))")
    workers.each("kv.push('w', at(1))")
    assert workers.each("values(kv, 'w')[0]") == [2, 2]
    workers.tell(0, "kv.pushpull('w', at(1), out=np.zeros(4, 'float32'))")
    workers.ask(1, "gradient = at(1)")
    workers.ask(1, "cuda.emu.kill_device(0, 0)")
    began = time.monotonic()
    for line in ("kv.push('w', gradient)", "kv.pull('w')", "kv.init('v', np.zeros(4))"):
        workers.fails(1, line, "DeviceError", "device 0")
    assert workers.ask(1, "kv.close()") == {"value": None}
    told = workers.hear(0)
    assert time.monotonic() - began < SOON_S
    assert told["error"] == "PeerLostError" and "worker 1 has left" in told["text"], told


def test_a_worker_that_leaves_has_had_its_part_and_takes_no_more(make):
    workers = make(1, 1)
    workers.each("kv.init('w', at(0))")
    workers.each("kv.push('w', at(1))")
    workers.ask(1, "kv.set_barrier_before_exit(False)")
    workers.tell(1, "kv.close()")
    assert workers.ask(0, "values(kv, 'w')[0]") == {"value": 2}
    assert workers.hear(1) == {"value": None}
    workers.all[1].ends(0)
    workers.fails(0, "kv.barrier()", "PeerLostError", "worker 1", "left")
    workers.fails(0, "kv.push('w', at(1))", "PeerLostError", "worker 1 has left")
    workers.fails(0, "kv.init('v', at(1))", "PeerLostError", "worker 1", "left")
    assert workers.ask(0, "values(kv, 'w')[0]") == {"value": 2}
    assert workers.ask(0, "kv.close()") == {"value": None}
    workers.all[0].ends(0)


def test_a_sum_that_waits_for_a_worker_that_has_left_is_ended(make):
    workers = make(1, 1)
    workers.each("kv.init('w', at(0))")
    workers.each("kv.push('w', at(1))")
    assert workers.each("values(kv, 'w')[0]") == [2, 2]
    assert workers.ask(0, "kv.push('w', at(1))") == {"value": None}
    workers.tell(0, "values(kv, 'w')")
    workers.ask(1, "kv.set_barrier_before_exit(False)")
    began = time.monotonic()
    assert workers.ask(1, "kv.close()") == {"value": None}
    told = workers.hear(0)
    assert time.monotonic() - began < SOON_S
    assert told["error"] == "PeerLostError" and "worker 1 has left" in told["text"], told


def test_a_script_that_ends_without_close_has_done_its_part(make):
    workers = make(1, 1)
    workers.each("kv.init('w', at(0))")
    workers.each("kv.push('w', at(3))")
    workers.all[1].stdin.close()
    workers.all[1].stdin = None
    assert workers.ask(0, "values(kv, 'w')[0]") == {"value": 6}
    workers.all[1].wait(SOON_S)
    assert workers.ask(0, "kv.close()") == {"value": None}
    assert workers.all[1].returncode == 0
    workers.all[0].ends(0)


def in_a_run():
    import cuda_tensor as cuda

    with kvstore.create("nccl") as kv:
        kv.init("w", cuda.TableTensor(np.zeros(3, "float32"), 0))
        kv.push("w", cuda.TableTensor(np.full(3, kv.rank + 1, "float32"), 0))
        return kv.pull("w").asnumpy().tolist()


def test_a_local_cluster_without_servers_runs_it(libraries, tmp_path, monkeypatch):
    for name, text in {**libraries, "EMU_DEVICES": "1", "EMU_NCCL_SHARED": str(tmp_path)}.items():
        monkeypatch.setenv(name, text)
    with kvstore.LocalCluster(num_workers=2, num_servers=0, timeout=LONG) as cluster:
        assert cluster.run(in_a_run) == [[3, 3, 3]] * 2
        assert cluster.run(in_a_run) == [[3, 3, 3]] * 2
