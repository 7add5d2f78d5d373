"""The two scenes: each trains with a bar of its progress, shows what came of it, and judges."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kvstore.demo import digits, report, words

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


def show_digits(console: Console, epochs: int, workers: int, seed: int, output: Path) -> bool:
    images = digits.load_images()
    console.print(
        f"{len(images.train_labels):,} images to learn, {len(images.test_labels)} to test, "
        f"{workers} worker thread{'s' * (workers > 1)}"
    )
    runs: list[report.Run] = []
    with bar(
        console, "loss {task.fields[loss]:.4f}  test accuracy {task.fields[accuracy]:.1%}"
    ) as progress:
        for way in digits.WAYS:
            steps: list[digits.Step] = []
            accuracies: list[float] = []
            task = progress.add_task(way.name, total=epochs, loss=0.0, accuracy=0.0)
            with digits.Training(images, workers, seed, way) as training:
                for _ in range(epochs):
                    epoch = list(training.epoch())
                    steps.extend(epoch)
                    accuracies.append(training.test_accuracy())
                    loss = sum(step.loss for step in epoch) / len(epoch)
                    progress.update(task, advance=1, loss=loss, accuracy=accuracies[-1])
                runs.append(report.Run(way, training.gradient_bytes, steps, accuracies))
                bytes_per_call = training.bytes_per_call

    first = runs[0]
    console.print(report.table(first.steps, bytes_per_call, workers))
    console.print(report.ways(runs, ENOUGH))
    try:
        figure = report.draw(first.steps, {run.way.name: run.accuracies for run in runs})
        figure.savefig(output, dpi=150)
    except OSError as error:
        return verdict(console, f"The plot could not be saved: {error}", False)
    console.print(f"Plot: {output}")
    worst = min(run.accuracies[-1] for run in runs)
    good = worst >= ENOUGH
    text = f"Lowest test accuracy {worst:.1%}, {'at least' if good else 'below'} {ENOUGH:.0%}."
    return verdict(console, text, good)


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
    good = loss <= ENOUGH_LOSS
    return verdict(
        console,
        f"Loss of a pair {words.UNTRAINED_LOSS:.2f} untrained, {loss:.2f} in the last epoch, "
        f"{'at most' if good else 'above'} {ENOUGH_LOSS:.2f}.",
        good,
    )
