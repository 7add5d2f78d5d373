"""The scenes: each trains with a bar of its progress, shows what came of it, and judges.

Those about digits share a list of runs, from which the plot is drawn at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kvstore.demo import cluster, digits, report, words, words_cluster

ENOUGH = 0.95
ENOUGH_LOSS = 0.6 * words.UNTRAINED_LOSS
SHOWN = ("tuple", "mutable", "hash", "key", "exception", "except", "coroutine", "global", "float")


def bar(console: Console, fields: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn(fields),
        console=console,
    )


def verdict(console: Console, text: str, good: bool) -> bool:
    console.print(text, style="green" if good else "red")
    return good


LEARNING = "loss {task.fields[loss]:.4f}  test accuracy {task.fields[accuracy]:.1%}"


def learn(
    progress: Progress, training: digits.Training | cluster.Training, epochs: int, way: digits.Way
) -> tuple[list[digits.Step], list[float]]:
    """All steps, and the test accuracy after each epoch."""
    steps: list[digits.Step] = []
    accuracies: list[float] = []
    task = progress.add_task(way.name, total=epochs, loss=0.0, accuracy=0.0)
    for _ in range(epochs):
        epoch = list(training.epoch())
        steps.extend(epoch)
        accuracies.append(training.test_accuracy())
        loss = sum(step.loss for step in epoch) / len(epoch)
        progress.update(task, advance=1, loss=loss, accuracy=accuracies[-1])
    return steps, accuracies


def told(images: digits.Images, workers: str) -> str:
    learned, tested = len(images.train_labels), len(images.test_labels)
    return f"{learned:,} images to learn, {tested} to test, {workers}"


def several(number: int, what: str, ending: str = "s") -> str:
    return f"{number} {what}{ending * (number > 1)}"


def judge_digits(console: Console, worst: float, what: str) -> bool:
    good = worst >= ENOUGH
    return verdict(
        console, f"{what} {worst:.1%}, {'at least' if good else 'below'} {ENOUGH:.0%}.", good
    )


def show_digits(
    console: Console, epochs: int, workers: int, seed: int, runs: list[report.Run]
) -> bool:
    images = digits.load_images()
    console.print(told(images, several(workers, "worker thread")))
    with bar(console, LEARNING) as progress:
        for way in digits.WAYS:
            with digits.Training(images, workers, seed, way) as training:
                found = learn(progress, training, epochs, way)
                runs.append(report.Run(way, training.gradient_bytes, *found))
                bytes_per_call = training.bytes_per_call
    console.print(report.table(runs[0].steps, bytes_per_call, workers))
    console.print(report.ways(runs, ENOUGH))
    worst = min(run.accuracies[-1] for run in runs)
    return judge_digits(console, worst, "Lowest test accuracy")


def show_cluster(
    console: Console, epochs: int, workers: int, seed: int, runs: list[report.Run]
) -> bool:
    """By threads too, if `runs` has no run to compare with."""
    images = digits.load_images()
    nodes = (
        f"{several(workers, 'worker process', 'es')}, {several(cluster.SERVERS, 'server')}, "
        "a scheduler"
    )
    console.print(told(images, nodes))
    same = [run for run in runs if run.way == cluster.SAME]
    with bar(console, LEARNING) as progress:
        if not same:
            with digits.Training(images, workers, seed, cluster.SAME) as threads:
                found = learn(progress, threads, epochs, cluster.SAME)
            same = [report.Run(cluster.SAME, threads.gradient_bytes, *found)]
            runs.extend(same)
        of_cluster = []
        for way in cluster.WAYS:
            with cluster.Training(images, workers, seed, way) as processes:
                found = learn(progress, processes, epochs, way)
                wire = processes.wire()
            of_cluster.append(report.Run(way, same[0].gradient_bytes, *found, wire))
    runs.extend(of_cluster)
    console.print(report.wire(of_cluster))
    worst = min(run.accuracies[-1] for run in of_cluster)
    what = f"Test accuracy by threads {same[0].accuracies[-1]:.1%}, lowest by processes"
    return judge_digits(console, worst, what)


def save_plot(console: Console, runs: Sequence[report.Run], output: Path) -> bool:
    try:
        figure = report.draw(runs)
        figure.savefig(output, dpi=150)
    except OSError as error:
        return verdict(console, f"The plot could not be saved: {error}", False)
    console.print(f"Plot: {output}")
    return True


def show_words(console: Console, epochs: int, seed: int) -> bool:
    text = words.load_text()
    steps: list[words.Step] = []
    with words.Training(text, seed) as training:
        rows, columns = training.shape
        console.print(
            f"{len(text.words):,} words of Python's language reference; {rows:,} different ones, "
            f"so two row-sparse keys of {rows:,} × {columns}"
        )
        with bar(console, "loss {task.fields[loss]:.4f}") as progress:
            task = progress.add_task("word vectors", total=epochs, loss=words.UNTRAINED_LOSS)
            for _ in range(epochs):
                epoch = list(training.epoch())
                steps.extend(epoch)
                loss = sum(step.loss for step in epoch) / sum(step.pairs for step in epoch)
                progress.update(task, advance=1, loss=loss)
        console.print(
            report.neighbours(training, [word for word in SHOWN if word in text.vocabulary])
        )
        console.print(report.moved(steps, training.dense_bytes))
    return judge_words(console, loss)


def show_words_cluster(console: Console, epochs: int, workers: int, seed: int) -> bool:
    text = words.load_text()
    steps: list[words.Step] = []
    sent = received = 0
    with (
        words_cluster.Cluster(text, workers, seed) as processes,
        bar(console, "loss {task.fields[loss]:.4f}") as progress,
    ):
        title = f"word vectors, {several(workers, 'process', 'es')}"
        task = progress.add_task(title, total=epochs, loss=words.UNTRAINED_LOSS)
        for _ in range(epochs):
            of_workers = processes.epoch()
            epoch = [step for one in of_workers for step in one.steps]
            steps.extend(epoch)
            sent += sum(one.wire.sent for one in of_workers)
            received += sum(one.wire.received for one in of_workers)
            loss = sum(step.loss for step in epoch) / sum(step.pairs for step in epoch)
            progress.update(task, advance=1, loss=loss)
    asked = sum(step.pulled + step.pushed for step in steps)
    console.print(
        f"{several(workers, 'worker')} and {several(cluster.SERVERS, 'server')}: "
        f"{report.size(sent)} sent and {report.size(received)} received by the workers, "
        f"{(sent + received) / asked:.2f} times the rows that they pulled and pushed."
    )
    return judge_words(console, loss)


def judge_words(console: Console, loss: float) -> bool:
    good = loss <= ENOUGH_LOSS
    return verdict(
        console,
        f"Loss of a pair {words.UNTRAINED_LOSS:.2f} untrained, {loss:.2f} in the last epoch, "
        f"{'at most' if good else 'above'} {ENOUGH_LOSS:.2f}.",
        good,
    )
