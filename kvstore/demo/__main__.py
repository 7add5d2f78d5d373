"""`python -m kvstore.demo`: train, show, judge.

Exit status: 0 when the network has learned the digits, 1 when it has not or a package is missing,
2 for wrong arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ENOUGH = 0.95
PICTURES = (".png", ".pdf", ".svg")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse_number(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)

    return parse_number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore.demo",
        description="Trains a small network on scikit-learn's digits images, data-parallel over "
        "threads, with the weights in a kvstore.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default, low, high, what in (
        ("--epochs", 40, 1, 10_000, "how often to go through the images"),
        ("--workers", 4, 1, 64, "threads, each with a shard of every batch"),
        ("--seed", 0, 0, 2**32 - 1, "of first weights and batches; same seed, same result"),
    ):
        parser.add_argument(
            name, type=whole_number(low, high), default=default, metavar="N", help=what
        )
    parser.add_argument(
        "--output", type=Path, default="kvstore_demo.png", metavar="FILE", help="the plot"
    )
    options = parser.parse_args(arguments)
    if options.output.suffix.lower() not in PICTURES:
        parser.error(f"--output {options.output}: the name must end in {', '.join(PICTURES)}")
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output {options.output}: there is no such folder")
    return options


def run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from kvstore.demo import digits, report

    console = Console()
    images = digits.load_images()
    steps: list[digits.Step] = []
    accuracies: list[float] = []
    progress = Progress(
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  test accuracy {task.fields[accuracy]:.1%}"),
        console=console,
    )
    with digits.Training(images, options.workers, options.seed) as training:
        console.print(
            f"{len(images.train_labels):,} images to learn, {len(images.test_labels)} to test, "
            f"{options.workers} worker thread{'s' * (options.workers > 1)}, "
            f"store of kind '{training.kv.type}'"
        )
        with progress:
            task = progress.add_task("", total=options.epochs, loss=0.0, accuracy=0.0)
            for _ in range(options.epochs):
                steps.extend(training.epoch())
                accuracies.append(training.test_accuracy())
                loss = sum(step.loss for step in steps[-training.steps_per_epoch :])
                progress.update(
                    task,
                    advance=1,
                    loss=loss / training.steps_per_epoch,
                    accuracy=accuracies[-1],
                )
        bytes_per_call = training.bytes_per_call

    console.print(report.table(steps, bytes_per_call, options.workers))
    try:
        report.draw(steps, accuracies).savefig(options.output, dpi=150)
    except OSError as error:
        console.print(f"The plot could not be saved: {error}", style="red")
        return 1
    console.print(f"Plot: {options.output}")
    good = accuracies[-1] >= ENOUGH
    console.print(
        f"Test accuracy {accuracies[-1]:.1%}, {'at least' if good else 'below'} {ENOUGH:.0%}.",
        style="green" if good else "red",
    )
    return 0 if good else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return run(options)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "kvstore"):
            raise
        print(
            f"The demo needs the package {missing!r}, which is not installed.\n"
            "In a checkout:  pip install -e '.[demo]'\n"
            "Elsewhere:      pip install 'mlkvstore[demo]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
