"""Compare runs of detect_digits.py; the first is the reference.

    python examples/compare_runs.py runs/whole-batch runs/local runs/sync --output runs

Prints a table, and writes it as comparison.json with two pictures: curves.png and detections.png.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from digits.checkpoint import load_checkpoint, save_json
from digits.data import CANVAS, Canvas, make_canvas
from digits.evaluate import Detections, detect
from digits.model import Detector
from matplotlib.axes import Axes
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

MUST_AGREE = ("seed", "global_batch", "lr")  # or the loss curves could not agree either
WINDOW = 15  # steps of the smoothed loss
SCORE = 0.3  # detections below it are not drawn
COLUMNS = 6  # test canvases drawn


@dataclass(frozen=True)
class Run:
    """What one output folder of detect_digits.py holds."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def losses(self) -> NDArray[np.float64]:
        return np.array(self.metrics["losses"])

    @property
    def label(self) -> str:
        return f"{self.name} ({self.metrics['processes']} × {self.metrics['images_per_process']})"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    run: str
    processes: int
    images_per_process: int
    norm: str
    average_precision: float  # at IoU 0.5, at the end
    largest_loss_difference: float  # from the reference run's loss curve, relative
    seconds: float


def read_run(folder: Path) -> Run:
    try:
        return Run(folder, json.loads((folder / "metrics.json").read_text()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"compare_runs: no metrics in {folder} ({error}): train into it first") from None


def check_comparable(runs: Sequence[Run]) -> None:
    reference = runs[0]
    for run in runs[1:]:
        for key in MUST_AGREE:
            if run.metrics[key] != reference.metrics[key]:
                values = f"{run.metrics[key]} in {run.name} but {reference.metrics[key]} in {reference.name}"
                raise SystemExit(f"compare_runs: {key} is {values}: train both with the same")
        if len(run.losses) != len(reference.losses):
            steps = f"{run.name} has {len(run.losses)} steps and {reference.name} {len(reference.losses)}"
            raise SystemExit(f"compare_runs: {steps}: train both to the same step, with --resume if need be")


def loss_difference(run: Run, reference: Run) -> NDArray[np.float64]:
    """Return the relative difference of the loss at each step."""
    return np.abs(run.losses - reference.losses) / np.abs(reference.losses)


def row_of(run: Run, reference: Run) -> Row:
    metrics = run.metrics
    precision = metrics["average_precision"][-1][1]
    difference = float(loss_difference(run, reference).max())
    shape = metrics["processes"], metrics["images_per_process"], metrics["norm"]
    return Row(run.name, *shape, precision, difference, metrics["seconds"])


def print_table(rows: Sequence[Row]) -> None:
    table = Table(title=f"The same training {len(rows)} ways; the first is the reference")
    for heading in ("run", "processes\n× images", "norm"):
        table.add_column(heading)
    for heading in ("AP at IoU 0.5", "largest relative\nloss difference", "seconds"):
        table.add_column(heading, justify="right")
    for number, row in enumerate(rows):
        difference = "reference" if number == 0 else f"{row.largest_loss_difference:.1e}"
        shape = f"{row.processes} × {row.images_per_process}"
        table.add_row(row.run, shape, row.norm, f"{row.average_precision:.3f}", difference, f"{row.seconds:.0f}")
    Console().print(table)


def draw_loss(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw raw losses pale and running means strong, later runs thinner: equal curves all stay visible."""
    for number, run in enumerate(runs):
        window = min(WINDOW, len(run.losses))
        smooth = np.convolve(run.losses, np.full(window, 1 / window), mode="valid")
        axes.plot(np.arange(1, len(run.losses) + 1), run.losses, color=f"C{number}", alpha=0.2, linewidth=0.7)
        middle = np.arange(len(smooth)) + (window + 1) / 2
        axes.plot(middle, smooth, color=f"C{number}", label=run.label, linewidth=width_of(number, runs))
    axes.set(title=f"Loss (pale: each step; strong: mean of {WINDOW})", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()


def draw_precision(axes: Axes, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs):
        steps, precision = np.array(run.metrics["average_precision"]).T
        axes.plot(steps, precision, "o-", color=f"C{number}", markersize=4, linewidth=width_of(number, runs))
    axes.set(title="AP at IoU 0.5 on held-out digits", ylim=(0, 1))


def draw_difference(axes: Axes, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs[1:], start=1):
        difference = np.maximum(loss_difference(run, runs[0]), 1e-17)  # a log scale has no place for equal
        axes.plot(np.arange(1, len(difference) + 1), difference, color=f"C{number}", linewidth=1)
    axes.set(title=f"Relative difference of the loss from {runs[0].name}", yscale="log", ylim=(5e-18, 10))


def width_of(number: int, runs: Sequence[Run]) -> float:
    return 1.2 + 1.6 * (len(runs) - 1 - number)


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    for axes, draw in zip(panels, (draw_loss, draw_precision, draw_difference), strict=True):
        draw(axes, runs)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def detections_of(run: Run, canvases: Sequence[Canvas]) -> list[Detections]:
    """Run the trained detector; in evaluation a synchronised layer is a plain one, so no world is needed."""
    try:
        state = load_checkpoint(run.folder / "checkpoint.pt")
    except ValueError as error:
        raise SystemExit(f"compare_runs: {error}") from None
    model = Detector(norm=run.metrics["norm"] != "none").to(getattr(torch, run.metrics["dtype"]))
    model.load_state_dict(state["model"])
    return detect(model, canvases)


def best_at_each_place(found: Detections) -> Detections:
    """Drop what scores too little, and what has its centre in a better box: a second guess at the same digit."""
    kept: list[NDArray[np.float64]] = []
    for guess in found[found[:, 4] >= SCORE]:
        centre = (guess[:2] + guess[2:4]) / 2
        if not any((better[:2] < centre).all() and (centre < better[2:4]).all() for better in kept):
            kept.append(guess)
    return np.array(kept).reshape(-1, 6)


def draw_box(axes: Axes, box: NDArray[np.float64], color: str) -> None:
    left, top, right, bottom = box - 0.5  # pixel i reaches from i - 0.5 to i + 0.5
    axes.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=1.5))


def write(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    shade = {"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 0.5}
    axes.text(x, y, text, color=color, fontsize=8, weight="bold", ha="left", va="bottom", bbox=shade)


def draw_canvas(axes: Axes, canvas: Canvas, found: Detections) -> None:
    """Show each canvas with its own contrast: the eye would not see the dim ones beside the bright."""
    axes.imshow(canvas.image, cmap="gray")
    for box, label in zip(canvas.boxes, canvas.labels, strict=True):
        draw_box(axes, box, "limegreen")
        write(axes, box[2], box[3], str(label), "limegreen")
    for guess in best_at_each_place(found):
        draw_box(axes, guess[:4], "orange")
        write(axes, guess[0], guess[1] - 1, f"{guess[5]:.0f}: {guess[4]:.2f}", "orange")
    # The margin holds the labels of boxes at the edge.
    axes.set(xticks=[], yticks=[], xlim=(-3, CANVAS + 3), ylim=(CANVAS + 1, -6), facecolor="black")


def draw_detections(runs: Sequence[Run], path: Path) -> None:
    """One row of test canvases for each run: the first ones, not chosen ones."""
    canvases = [make_canvas(runs[0].metrics["seed"], "test", index) for index in range(COLUMNS)]
    size = (2.6 * COLUMNS, 2.75 * len(runs) + 0.5)
    figure, grid = plt.subplots(len(runs), COLUMNS, figsize=size, layout="constrained", squeeze=False)
    for run, row in zip(runs, grid, strict=True):
        for axes, canvas, found in zip(row, canvases, detections_of(run, canvases), strict=True):
            draw_canvas(axes, canvas, found)
        row[0].set_ylabel(run.label)
    figure.suptitle(f"Test canvases. Green: the truth. Orange: the best guess at each place, score {SCORE} or more.")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of detect_digits.py; first, the reference")
    parser.add_argument("--output", type=Path, default=Path("runs"), metavar="DIR", help="for pictures and table")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    check_comparable(runs)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [row_of(run, runs[0]) for run in runs]
    save_json(args.output / "comparison.json", [asdict(row) for row in rows])
    draw_curves(runs, args.output / "curves.png")
    draw_detections(runs, args.output / "detections.png")
    print_table(rows)
    print(f"curves.png, detections.png and comparison.json are in {args.output}")


if __name__ == "__main__":
    main()
