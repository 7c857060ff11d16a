"""The benchmark's tables for a terminal and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
Record = dict[str, Any]

COLORS = {"nn.BatchNorm2d": "#9aa5b1", "composed": "#f2b872", "syncbn": "#2b6cb0", "floor": "#2f855a"}


def show(results: Record) -> None:
    """Print the tables."""
    console = Console(width=120)
    machine = results["machine"]
    console.print(
        f"{machine['ranks']} rank(s) x {machine['threads']} thread(s) over {machine['communicator']}, "
        f"{machine['device']} ({machine['isa']}, {machine['cores']} cores), torch {machine['torch']}"
    )
    for table in (
        _latency(results["latency"]),
        _layers(results["layer"]),
        _fused(results["fused"]),
        _compiled(results["compiled"]),
        _resnet(results),
        _errors(results["errors"]),
    ):
        console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _latency(rows: list[Record]) -> Table:
    names = list(dict.fromkeys(row["over"] for row in rows))
    table = _table("One all-reduce of float64 numbers, µs", "numbers", *names)
    for numel in dict.fromkeys(row["numel"] for row in rows):
        cells = [f"{row['seconds'] * 1e6:.1f}" for row in rows if row["numel"] == numel]
        table.add_row(str(numel), *cells)
    return table


def _layers(rows: list[Record]) -> Table:
    table = _table(
        "Forward + backward of one layer, ms; BN is nn.BatchNorm2d; ratios are medians of paired runs",
        "input", "BN", "composed", "floor", "one rank", "syncbn", "one rank / BN", "syncbn / BN", "/ (floor + sums)",
    )  # fmt: skip
    for row in rows:
        seconds = row["seconds"]
        cells = [_ms(seconds.get(name)) for name in ("nn.BatchNorm2d", "composed", "floor", "one rank", "syncbn")]
        ratios = [_ratio(row[name]) for name in ("one_rank_to_batch_norm", "to_batch_norm", "to_floor")]
        table.add_row(row["case"], *cells, *ratios)
    return table


def _fused(rows: list[Record]) -> Table:
    names = ("nn.BatchNorm2d + nn.ReLU", "floor", "one rank", "syncbn")
    ratios = {
        "one rank / unfused": "one_rank_to_unfused",
        "syncbn / unfused": "to_unfused",
        "/ (floor + sums)": "to_floor",
    }
    table = _table("Forward + backward of norm + ReLU in one, ms", "input", *names, *ratios)
    for row in rows:
        table.add_row(row["case"], *(_ms(row["seconds"][n]) for n in names), *(_ratio(row[n]) for n in ratios.values()))
    return table


def _compiled(rows: list[Record]) -> Table:
    names = ("fused, compiled", "compiled", "eager", "nn.BatchNorm2d compiled", "nn.BatchNorm2d eager")
    ratios = ("fused_to_eager", "to_eager", "to_eager_of_batch_norm", "to_batch_norm")
    columns = (
        *names, "fused, compiled / eager", "compiled / eager", "the same of nn.BatchNorm2d",
        "compiled / nn.BatchNorm2d compiled",
    )  # fmt: skip
    table = _table("Forward + backward of norm + ReLU under torch.compile, ms", "input", *columns)
    for row in rows:
        table.add_row(row["case"], *(_ms(row["seconds"].get(n)) for n in names), *(_ratio(row.get(n)) for n in ratios))
    return table


def _resnet(results: Record) -> Table:
    resnet, saved = results["resnet"], results["saved"]
    table = _table("A training step of a small ResNet, 2 images a rank; numbers kept for backward", "", "value")
    for name, seconds in resnet["seconds"].items():
        table.add_row(f"{name} norm, ms", _ms(seconds))
    table.add_row("sync / local", _ratio(resnet["sync_to_local"]))
    table.add_row("fused / local", _ratio(resnet["fused_to_local"]))
    for name, count in saved.items():
        table.add_row(f"kept at C = 64: {name}", str(count))
    return table


def _errors(rows: list[Record]) -> Table:
    """One replica's errors against float64, as multiples of those of nn.BatchNorm2d of the same dtype."""
    names = list(rows[0]["syncbn"])
    table = _table("Root mean square error against float64 / that of nn.BatchNorm2d, (8, 64, 56, 56)", "", *names)
    for row in rows:
        ratios = [_ratio(row["syncbn"][n] / row["nn.BatchNorm2d"][n]) for n in names]
        table.add_row(f"{row['dtype']} {row['memory_format']}", *ratios)
    return table


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def draw(results: Record, path: Path) -> None:
    """Draw the time of each layer relative to nn.BatchNorm2d, on a logarithmic axis."""
    rows, machine = results["layer"][::-1], results["machine"]
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(rows) + 1.6), layout="constrained")
    height = 0.2
    for offset, (name, color) in enumerate(COLORS.items()):
        drawn = [(i, row["seconds"]) for i, row in enumerate(rows) if name in row["seconds"]]
        values = [seconds[name] / seconds["nn.BatchNorm2d"] for _, seconds in drawn]
        places = [i + (1.5 - offset) * height for i, _ in drawn]
        bars = axes.barh(places, values, height, color=color, label=name if name != "floor" else "streaming floor")
        if name == "syncbn":
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8, color=color)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=9)
    axes.axvline(1, color="#4a5568", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("forward + backward relative to nn.BatchNorm2d without synchronisation (less is better)")
    axes.set_title(f"{machine['ranks']} ranks x {machine['threads']} thread, {machine['communicator']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
