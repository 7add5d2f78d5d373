"""What the demo shows when a training has ended: tables and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from kvstore.demo import words
from kvstore.demo.cluster import Wire
from kvstore.demo.digits import WAYS, Step, Way

BLUE, ORANGE, GREEN = "#2166ac", "#d6604d", "#1b7837"
CURVES = (BLUE, ORANGE, GREEN, "#762a83", "#b8860b", "#1a9ba1")
GREY = "#666666"


def size(bytes_: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if bytes_ < 1024:
            return f"{bytes_:.0f} {unit}" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1024
    return f"{bytes_:.1f} GiB"


def table(steps: Sequence[Step], bytes_per_call: int, workers: int) -> Table:
    """Where the time of the first way went, and what the store moved."""
    parts = {
        f"gradients, {workers} thread{'s' * (workers > 1)}": sum(s.gradients for s in steps),
        "updater, inside push": sum(s.updater for s in steps),
        "push": sum(s.push for s in steps),
        "pull": sum(s.pull for s in steps),
    }
    total = sum(parts.values())
    title = f"Where the time went: {WAYS[0].name}"
    result = Table(title=title, title_justify="left", title_style="bold")
    result.add_column("work")
    for name in ("calls", "bytes", "time", "a step", "share"):
        result.add_column(name, justify="right")
    for name, seconds in parts.items():
        through_store = name in ("push", "pull")
        result.add_row(
            name,
            f"{len(steps):,}" if through_store else "",
            size(bytes_per_call * len(steps)) if through_store else "",
            f"{seconds * 1e3:.0f} ms",
            f"{seconds / len(steps) * 1e6:.0f} µs",
            f"{seconds / total:.0%}",
            end_section=name.startswith("updater"),
        )
    store = parts["push"] + parts["pull"]
    result.add_section()
    result.add_row(
        "the store: push + pull",
        f"{2 * len(steps):,}",
        size(2 * bytes_per_call * len(steps)),
        f"{store * 1e3:.0f} ms",
        f"{store / len(steps) * 1e6:.0f} µs",
        f"{store / total:.0%}",
        style="bold",
    )
    return result


class Run(NamedTuple):
    """One way of learning the digits."""

    way: Way
    gradient_bytes: int
    steps: Sequence[Step]
    accuracies: Sequence[float]
    wire: Sequence[Wire] = ()  # of each worker, by processes

    @property
    def sent(self) -> float:
        """Bytes that a worker has sent in a step, on average."""
        return sum(one.sent for one in self.wire) / len(self.wire) / len(self.steps)

    @property
    def received(self) -> float:
        return sum(one.received for one in self.wire) / len(self.wire) / len(self.steps)


def ways(runs: Sequence[Run], enough: float) -> Table:
    """The ways of learning the digits, side by side."""
    result = Table(title="The ways side by side", title_justify="left", title_style="bold")
    result.add_column("way")
    result.add_column("store")
    for name in ("gradients", "a step", f"{enough:.0%} after", "at the end"):
        result.add_column(name, justify="right")
    for run in runs:
        seconds = sum(step.store + step.updater for step in run.steps)
        there = [i for i, accuracy in enumerate(run.accuracies, 1) if accuracy >= enough]
        result.add_row(
            run.way.name,
            run.way.kind,
            size(run.gradient_bytes),
            f"{seconds / len(run.steps) * 1e6:.0f} µs",
            f"epoch {there[0]}" if there else "never",
            f"{run.accuracies[-1]:.1%}",
        )
    result.caption = "gradients: of one worker; a step: push, update and pull"
    result.caption_justify = "left"
    return result


def wire(runs: Sequence[Run]) -> Table:
    """What went over the wire at a worker in a step."""
    result = Table(title="Over the wire", title_justify="left", title_style="bold")
    result.add_column("way")
    result.add_column("store")
    for name in ("sent", "received", "a step", "at the end"):
        result.add_column(name, justify="right")
    for run in runs:
        result.add_row(
            run.way.name,
            run.way.kind,
            size(run.sent),
            size(run.received),
            f"{sum(step.store for step in run.steps) / len(run.steps) * 1e6:.0f} µs",
            f"{run.accuracies[-1]:.1%}",
        )
    model = size(runs[0].gradient_bytes)
    result.caption = f"sent, received: by one worker in a step; the model has {model}"
    result.caption_justify = "left"
    return result


def neighbours(training: words.Training, shown: Sequence[str]) -> Table:
    result = Table(title="Nearest neighbours", title_justify="left", title_style="bold")
    result.add_column("word", style="bold")
    result.add_column("its neighbours, nearest first")
    for word in shown:
        result.add_row(word, ", ".join(training.neighbours(word)))
    return result


def moved(steps: Sequence[words.Step], dense_bytes: int) -> str:
    """What went through the store against whole tables; `dense_bytes` is that of a step."""
    pulled, pushed = sum(step.pulled for step in steps), sum(step.pushed for step in steps)
    dense = dense_bytes * len(steps)
    return (
        f"Moved in {len(steps):,} steps: {size(pulled)} of rows pulled and {size(pushed)} pushed, "
        f"row ids included. Whole tables, pulled and pushed, would have been {size(dense)}, "
        f"{dense / (pulled + pushed):.1f} times as much."
    )


def draw(runs: Sequence[Run], figure: Figure | None = None) -> Figure:
    """Loss and time of every step of the first run, and the accuracies of all, one an epoch."""
    if figure is None:
        figure = Figure()
    figure.set_size_inches(9, 10)
    figure.set_layout_engine("constrained")
    upper, lower, ways = figure.subplots(3, 1)
    upper.sharex(lower)
    upper.tick_params(labelbottom=False)
    first, of_first, steps = runs[0].way.name, runs[0].accuracies, runs[0].steps
    number = np.arange(1, len(steps) + 1)
    epochs = len(of_first)
    per_epoch = len(steps) // epochs
    epoch_ends = per_epoch * np.arange(1, epochs + 1)

    loss = np.array([step.loss for step in steps])
    upper.plot(number, loss, color=BLUE, alpha=0.3, linewidth=1, label="each step")
    upper.plot(
        epoch_ends - (per_epoch - 1) / 2,
        loss.reshape(epochs, per_epoch).mean(axis=1),
        color=BLUE,
        linewidth=2,
        label="mean of an epoch",
    )
    upper.set_yscale("log")
    upper.set_ylabel("training loss")
    upper.set_title(
        f"Digits ({first}): {of_first[-1]:.1%} of the test images right after {epochs} epochs",
        loc="left",
        fontweight="bold",
    )
    upper.legend(frameon=False)

    for label, color, seconds in (
        ("gradients (worker threads)", GREY, [step.gradients for step in steps]),
        ("updater (NumPy, inside push)", ORANGE, [step.updater for step in steps]),
        ("the store: push + pull", GREEN, [step.store for step in steps]),
    ):
        micros = np.array(seconds) * 1e6
        if not micros.any():
            continue  # it has no updater
        lower.plot(number, micros, ".", color=color, markersize=3, alpha=0.35)
        middle = float(np.median(micros))
        lower.axhline(middle, color=color, linewidth=2, label=f"{label}: median {middle:.0f} µs")
    lower.set_yscale("log")
    lower.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    lower.set_ylabel("time of a step (µs)")
    lower.set_xlabel("step")
    lower.set_xlim(0, len(steps) + 1)
    # The legend gets a band of its own above the points.
    low, high = lower.get_ylim()
    lower.set_ylim(low, high * (high / low) ** 0.3)
    lower.legend(frameon=False, loc="upper right")

    for color, run in zip(CURVES, runs, strict=False):
        label = f"{run.way.name}: {run.accuracies[-1]:.1%}"
        style = {"marker": "."}
        if run.wire:
            label += f", {size(run.sent)} sent a step"
            # Processes end where threads do: open circles leave the other curve to be seen.
            style = {"marker": "o", "ls": "", "mfc": "none"}
        ways.plot(np.arange(1, epochs + 1), run.accuracies, color=color, label=label, **style)
    ways.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ways.set_ylabel("test images right")
    ways.set_xlabel("epoch")
    ways.legend(frameon=False, loc="lower right")
    for axes in (upper, lower, ways):
        axes.grid(True, axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
