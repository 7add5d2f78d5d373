"""The demo's scene of a cluster: processes learn what threads learn, and it is told."""

import re

import numpy as np
import pytest

from kvstore.demo import __main__ as command
from kvstore.demo import cluster, digits, scenes, words, words_cluster

pytestmark = pytest.mark.ucx

EPOCHS = 3


@pytest.fixture(scope="module")
def images():
    return digits.load_images()


def test_processes_end_with_the_bits_of_threads(images):
    with digits.Training(images, workers=3, seed=5, way=cluster.SAME) as threads:
        losses = [step.loss for _ in range(EPOCHS) for step in threads.epoch()]
        accuracy = threads.test_accuracy()
    with cluster.Training(images, workers=3, seed=5) as processes:
        steps = [step for _ in range(EPOCHS) for step in processes.epoch()]
        assert processes.test_accuracy() == accuracy
        found = processes.weights()
        wire = processes.wire()
    assert [step.loss for step in steps] == losses
    assert len(found) == 3
    for weights in found:
        for key in digits.KEYS:
            np.testing.assert_array_equal(weights[key], threads.weights[0][key])
    for one in wire:
        for bytes_ in one:
            # All gradients and all sums once a step, and little more.
            assert 1 < bytes_ / len(steps) / threads.gradient_bytes < 1.05


def test_the_scene_tells_accuracies_and_bytes_and_draws_all_curves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scenes, "ENOUGH", 0.3)  # of so few epochs
    drawn = []
    draw = scenes.report.draw
    monkeypatch.setattr(scenes.report, "draw", lambda runs: drawn.append(runs) or draw(runs))
    plot = tmp_path / "plot.png"
    arguments = ["--workers", "2", "--epochs", str(EPOCHS), "--output", str(plot)]
    assert command.main(["cluster", *arguments]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 worker processes, 2 servers, a scheduler" in out
    assert re.search(r"Test accuracy by threads [\d.]+%, lowest by processes [\d.]+%", out)
    for way, sent in zip(cluster.WAYS, ("38.1", "3.1", "38.1"), strict=True):
        row = rf"│ {way.name} +│ {way.kind} +│ +{sent} KiB │ 38.2 KiB │"
        assert re.search(row, out), (row, out)
    assert "the model has 37.5 KiB" in out
    ((threads, *processes),) = drawn
    assert [run.way for run in processes] == list(cluster.WAYS)
    assert threads.accuracies == processes[0].accuracies and len(threads.accuracies) == EPOCHS
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_cluster_that_has_not_learned_is_a_failure(tmp_path, capsys):
    output = ["--output", str(tmp_path / "plot.png")]
    assert command.main(["cluster", "--workers", "1", "--epochs", "1", *output]) == 1
    assert "below 95%" in capsys.readouterr().out


def test_word_vectors_over_processes_learn_what_one_process_learns():
    text = words.load_text()
    with words.Training(text, seed=3) as alone:
        due = list(alone.epoch())
    with words_cluster.Cluster(text, workers=3, seed=3) as processes:
        epochs = processes.epoch()
    assert [len(epoch.steps) for epoch in epochs] == [len(due)] * 3
    for own, *shares in zip(due, *(epoch.steps for epoch in epochs), strict=True):
        assert sum(step.pairs for step in shares) == own.pairs
        # The sums are taken in another order.
        np.testing.assert_allclose(sum(step.loss for step in shares), own.loss, rtol=1e-3)
    for epoch in epochs:
        moved = sum(step.pulled + step.pushed for step in epoch.steps)
        assert 1 < sum(epoch.wire) / moved < 1.1
