"""The demo: what it computes, what it tells, how it ends."""

import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from kvstore.demo import __main__ as command
from kvstore.demo import digits, report


@pytest.fixture(scope="module")
def images():
    return digits.load_images()


def train(images, epochs, **options):
    with digits.Training(images, **options) as training:
        steps = [step for _ in range(epochs) for step in training.epoch()]
        return steps, training


def test_the_gradients_are_those_of_the_loss(images):
    rng = np.random.default_rng(3)
    weights = {key: w.astype(np.float64) for key, w in digits.first_weights(rng).items()}
    shard, labels = images.train[:16].astype(np.float64), images.train_labels[:16]
    _, gradients = digits.gradients(weights, shard, labels, batch=32)
    for key, weight in weights.items():
        direction = rng.normal(size=weight.shape)

        def loss_at(distance, key=key, weight=weight, direction=direction):
            moved = {**weights, key: weight + distance * direction}
            return digits.gradients(moved, shard, labels, batch=32)[0]

        slope = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
        assert slope == pytest.approx(float((gradients[key] * direction).sum()), rel=1e-5)


def test_training_gives_the_bits_of_the_same_training_without_a_store(images):
    seed, workers = 5, 3
    _, training = train(images, 2, workers=workers, seed=seed)

    rng = np.random.default_rng(seed)
    weights = digits.first_weights(rng)
    update = digits.Momentum()
    for _ in range(2):
        order = rng.permutation(len(images.train_labels))
        for start in range(0, training.steps_per_epoch * digits.BATCH, digits.BATCH):
            batch = order[start : start + digits.BATCH]
            parts = [
                digits.gradients(weights, images.train[shard], images.train_labels[shard])[1]
                for shard in np.array_split(batch, workers)
            ]
            for key in digits.KEYS:
                update(key, sum((part[key] for part in parts[1:]), parts[0][key]), weights[key])
    for copy in training.weights:
        for key in digits.KEYS:
            np.testing.assert_array_equal(copy[key], weights[key])


def test_a_seed_decides_every_bit(images):
    first, again, other = (train(images, 2, seed=seed)[1].weights for seed in (0, 0, 1))
    for key in digits.KEYS:
        np.testing.assert_array_equal(first[0][key], again[0][key])
    assert not np.array_equal(first[0]["w1"], other[0]["w1"])


def test_the_number_of_workers_changes_the_result_by_rounding_only(images):
    alone, shared = (train(images, 2, workers=workers)[0] for workers in (1, 4))
    np.testing.assert_allclose([s.loss for s in alone], [s.loss for s in shared], rtol=1e-3)


def test_test_images_are_not_learned_from(images):
    assert len(images.train) + len(images.test) == 1797
    assert not {row.tobytes() for row in images.train} & {row.tobytes() for row in images.test}


def test_the_table_adds_up():
    steps = [digits.Step(loss=1, gradients=2e-3, push=3e-4, updater=1e-4, pull=2e-4)] * 10
    table = report.table(steps, bytes_per_call=1536, workers=4)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert ("push", "10", "15.0 KiB", "3 ms", "300 µs", "12%") in rows
    assert rows[-1] == ("the store: push + pull", "20", "30.0 KiB", "5 ms", "500 µs", "19%")


def test_a_call_moves_every_weight_once_a_worker(images):
    with digits.Training(images, workers=3) as training:
        assert training.bytes_per_call == 3 * 4 * (64 * 128 + 128 + 128 * 10 + 10)


def test_the_demo_learns_the_digits_and_saves_its_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 0
    out = capsys.readouterr().out
    found = re.search(r"Test accuracy ([\d.]+)%, at least 95%", out)
    assert found and 95 <= float(found[1]) <= 100
    assert "push" in out and "pull" in out and "MiB" in out
    assert (tmp_path / "kvstore_demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_network_that_has_not_learned_is_a_failure(tmp_path, capsys):
    assert command.main(["--epochs", "1", "--output", str(tmp_path / "plot.svg")]) == 1
    assert "below 95%" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_a_plot_that_cannot_be_saved_is_said(tmp_path, capsys):
    (tmp_path / "plot.png").mkdir()
    assert command.main(["--epochs", "1", "--output", str(tmp_path / "plot.png")]) == 1
    assert "could not be saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "'0' is no whole number from 1 to 10000"),
        (["--workers", "four"], "'four' is no whole number from 1 to 64"),
        (["--seed", "-1"], "'-1' is no whole number"),
        (["--output", "plot.txt"], "must end in .png, .pdf, .svg"),
        (["--output", "no/such/folder/plot.png"], "there is no such folder"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn"])
def test_a_missing_package_is_named_with_the_way_to_get_it(package, tmp_path):
    hide = (
        f"import sys, runpy; sys.modules[{package!r}] = None; sys.argv[1:] = ['--epochs', '1']; "
        "runpy.run_module('kvstore.demo', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert repr(package) in done.stderr and "Traceback" not in done.stderr
    assert "pip install -e '.[demo]'" in done.stderr
    assert "pip install 'mlkvstore[demo]'" in done.stderr


def test_ctrl_c_ends_the_demo_without_a_traceback(tmp_path):
    # A job that a shell put into the background ignores SIGINT, and so would its children.
    program = (
        "import signal, sys, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv[1:] = ['--epochs', '10000']; "
        "runpy.run_module('kvstore.demo', run_name='__main__')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        try:
            assert "worker threads" in demo.stdout.readline()  # the training has begun
            demo.send_signal(signal.SIGINT)
            _, errors = demo.communicate(timeout=20)
        finally:
            demo.kill()
    assert demo.returncode == 130
    assert errors.strip() == "Interrupted."
    assert not list(tmp_path.iterdir())
