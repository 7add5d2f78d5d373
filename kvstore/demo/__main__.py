"""`python -m kvstore.demo`: train, show, judge.

Exit status: 0 when what was trained has learned, 1 when it has not or a package is missing, 2 for
wrong arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

PICTURES = (".png", ".pdf", ".svg")
SCENES = ("digits", "cluster", "words")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse_number(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)

    return parse_number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore.demo",
        description="Three scenes of training with a kvstore. digits: a small network learns "
        "scikit-learn's digits images, data-parallel over threads, in three ways. cluster: it "
        "learns them data-parallel over processes. words: word vectors learn Python's language "
        "reference through row-sparse keys, in one process and over several.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("scene", nargs="?", choices=(*SCENES, "all"), default="all")
    for name, default, low, high, what in (
        ("--epochs", 40, 1, 10_000, "how often to go through the images, or the text"),
        (
            "--workers",
            4,
            1,
            64,
            "of digits and cluster: threads or processes, each with a shard of every batch",
        ),
        ("--seed", 0, 0, 2**32 - 1, "of first weights and batches; same seed, same result"),
    ):
        parser.add_argument(
            name, type=whole_number(low, high), default=default, metavar="N", help=what
        )
    parser.add_argument(
        "--output",
        type=Path,
        default="kvstore_demo.png",
        metavar="FILE",
        help="the plot of digits and cluster",
    )
    options = parser.parse_args(arguments)
    if options.output.suffix.lower() not in PICTURES:
        parser.error(f"--output {options.output}: the name must end in {', '.join(PICTURES)}")
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output {options.output}: there is no such folder")
    return options


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from kvstore import NotBuiltError
    from kvstore.demo import report, scenes
    from kvstore.demo.words import NoTextError

    console = Console()
    shown = SCENES if options.scene == "all" else (options.scene,)
    runs: list[report.Run] = []
    of_digits = options.epochs, options.workers, options.seed, runs
    good = True

    def leave_out(scene: str, why: Exception) -> bool:
        text = f"{why}".rstrip(".")
        console.print(f"{text}. The scene '{scene}' is left out.", style="yellow")
        return bool(options.scene == "all")

    if "digits" in shown:
        good &= scenes.show_digits(console, *of_digits)
    if "cluster" in shown:
        try:
            good &= scenes.show_cluster(console, *of_digits)
        except NotBuiltError as error:
            good &= leave_out("cluster", error)
    if runs:
        good &= scenes.save_plot(console, runs, options.output)
    if "words" in shown:
        try:
            good &= scenes.show_words(console, options.epochs, options.seed)
            good &= scenes.show_words_cluster(
                console, options.epochs, options.workers, options.seed
            )
        except NoTextError as error:
            good &= leave_out("words", error)
        except NotBuiltError as error:
            good &= leave_out("words, by processes", error)
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
