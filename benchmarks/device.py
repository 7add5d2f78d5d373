"""Measures stores over GPU memory against what the GPU can do and against PyTorch.

    python benchmarks/device.py             on a GPU with PyTorch; a table, and
                                            benchmarks/results/device.json
    python benchmarks/device.py --emulated  the same calls, small, on the emulation of CUDA that
                                            the tests have: their results are checked, nothing is
                                            measured

Rounds are interleaved: in each round every subject does the job right after the others, and the
ratios are taken within a round. Quoted are medians over the rounds. Times are those of the GPU,
between two events, but for `host`, which is the time until a call returns.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROUNDS, REPEATS = 9, 20
sys.path.insert(0, str(HERE / "subjects"))
from cluster import resnet50  # noqa: E402

SUM, ADAM = "sum of 4 arrays", "Adam on ResNet-50's 161 keys, 4 gradients each"


class Emulated:
    """The tests' own tensors. Small, and checked."""

    def __init__(self):
        gpu = HERE.parent / "tests" / "gpu"
        sys.path.insert(0, str(gpu))
        import plugin

        library = HERE.parent / "build" / "benchmarks-emulated.so"
        plugin.link(plugin.objects().values(), library)
        os.environ["KVSTORE_CUDA_PLUGIN"] = str(library)
        import cuda_tensor

        self.new = cuda_tensor.TableTensor
        self.count, self.shapes = 1000, [(3, 5), (7,), (2, 2, 2)]

    def tensor(self, array):
        return self.new(np.asarray(array, "float32"))

    def check(self, tensor, due):
        np.testing.assert_allclose(tensor.numpy(), due, rtol=1e-6, atol=1e-6)


class Real:
    def __init__(self):
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("PyTorch finds no GPU here: --emulated runs without one")
        self.torch = torch
        self.count, self.shapes = 16 << 20, [(size,) for size in resnet50()]

    def tensor(self, array):
        return self.torch.as_tensor(np.asarray(array, "float32"), device="cuda")

    def check(self, tensor, due):
        np.testing.assert_allclose(tensor.cpu().numpy(), due, rtol=1e-5, atol=1e-5)

    def gpu_seconds(self, call):
        """Of the GPU, for one of REPEATS calls."""
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPEATS):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / REPEATS

    def host_seconds(self, call):
        self.torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(REPEATS):
            call()
        taken = time.perf_counter() - start
        self.torch.cuda.synchronize()
        return taken / REPEATS


# -------------------------------------------------------------------------------------- the jobs


def store(on, shapes, optimizer=None, compression=None):
    import kvstore

    kv = kvstore.create("device")
    kv.init(list(range(len(shapes))), [on.tensor(np.zeros(shape)) for shape in shapes])
    if optimizer is not None:
        kv.set_optimizer(optimizer)
    if compression is not None:
        kv.set_gradient_compression(compression)
    return kv


def jobs(on):
    """Name, bytes that count, subjects by name, and what a pull must give after one call."""
    import kvstore

    n, optimizer = on.count, kvstore.optimizer
    random = np.random.default_rng(1)
    host = [random.standard_normal(n, "float32") for _ in range(4)]
    given = [on.tensor(array) for array in host]
    total = host[0] + host[1] + host[2] + host[3]

    plain = store(on, [(n,)])
    yield SUM, 5 * 4 * n, {"kvstore": lambda: plain.push(0, given)}, (plain, [total])

    coded = store(on, [(n,)], compression={"type": "2bit", "threshold": 0.5})
    codes = np.where(host[0] >= 0.5, 0.5, np.where(host[0] <= -0.5, -0.5, 0))
    subjects = {"kvstore": lambda: coded.push(0, given[0])}
    yield "2-bit codes of one array", 3 * 4 * n, subjects, (coded, [codes])

    for name, made, states in (
        ("momentum SGD", optimizer.SGD(learning_rate=0.1, momentum=0.9), 1),
        ("Adam", optimizer.Adam(learning_rate=0.1, epsilon=1e-8), 2),
    ):
        kv = store(on, [(n,)], made)
        first = -0.1 * total if states == 1 else -0.1 * np.sign(total)
        subjects = {"kvstore": lambda kv=kv: kv.push(0, given)}
        due = (kv, [first]) if states == 1 else None
        yield f"{name} fused with the sum of 4", (4 + 2 + 2 * states) * 4 * n, subjects, due

    shapes = on.shapes
    lists = [[on.tensor(np.ones(shape)) for _ in range(4)] for shape in shapes]
    outs = [on.tensor(np.zeros(shape)) for shape in shapes]
    adam = store(on, shapes, optimizer.Adam(learning_rate=0.1))
    keys = list(range(len(shapes)))
    subjects = {"kvstore": lambda: adam.pushpull(keys, lists, outs)}
    yield ADAM, None, subjects, None

    small = store(on, [(16,)])
    gradient = on.tensor(np.ones(16))
    yield (
        "host: a push of 16 numbers",
        None,
        {"kvstore": lambda: small.push(0, gradient)},
        (small, [np.ones(16)]),
    )


def peers(on, name):
    """What PyTorch does for the same end."""
    torch = on.torch
    if name == SUM:
        given = [torch.randn(on.count, device="cuda") for _ in range(4)]
        return {"torch": lambda: torch.stack(given).sum(0)}
    if name == ADAM:
        weights = [torch.zeros(shape, device="cuda", requires_grad=True) for shape in on.shapes]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        return {"torch": torch.optim.Adam(weights, fused=True).step}
    return {}


def copy_rate(on):
    """Bytes a second, read and written, of a copy within the device."""
    torch = on.torch
    source = torch.empty(on.count * 4, device="cuda")
    target = torch.empty_like(source)
    seconds = on.gpu_seconds(lambda: target.copy_(source))
    return 2 * source.numel() * source.element_size() / seconds


# ------------------------------------------------------------------------------------------ runs


def check(on, due):
    if due is None:
        return
    kv, values = due
    for key, value in enumerate(values):
        out = on.tensor(np.zeros(value.shape))
        kv.pull(key, out=out)
        on.check(out, value)


def measure(on, name, counted, subjects):
    timer = on.host_seconds if name.startswith("host") else on.gpu_seconds
    rows = {subject: [] for subject in subjects}
    copies = []
    for _ in range(ROUNDS):
        copies.append(copy_rate(on))
        for subject, call in subjects.items():
            rows[subject].append(timer(call))
    seconds = {subject: statistics.median(times) for subject, times in rows.items()}
    row = {"job": name, "seconds": seconds}
    if counted is not None:
        shares = [counted / t / rate for t, rate in zip(rows["kvstore"], copies, strict=True)]
        row["of a copy"] = statistics.median(shares)
    for peer in subjects.keys() - {"kvstore"}:
        pairs = zip(rows[peer], rows["kvstore"], strict=True)
        row[f"against {peer}"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emulated", action="store_true")
    options = parser.parse_args()
    on = Emulated() if options.emulated else Real()
    rows = []
    for name, counted, subjects, due in jobs(on):
        subjects["kvstore"]()
        check(on, due)
        if options.emulated:
            print(f"{name}: right")
            continue
        rows.append(measure(on, name, counted, {**subjects, **peers(on, name)}))
        print(json.dumps(rows[-1]), flush=True)
    if rows:
        record = {
            "device": on.torch.cuda.get_device_name(),
            "torch": on.torch.__version__,
            "date": datetime.date.today().isoformat(),
            "rounds": ROUNDS,
            "jobs": rows,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "device.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
