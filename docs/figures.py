"""Draws docs/images/collectives.svg and house.svg: `python docs/figures.py`. Needs Python alone.

Each is narrow, for telephones, and stands on a white card, for dark pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
WIDTH = 460
INK, LINE, PAPER = "#1f2933", "#7b8794", "#ffffff"
LOCAL, SHARED, QUIET = "#e3f0fb", "#ffe3b3", "#eef1f4"


def text(x: float, y: float, words: str, *, size: int = 15, bold: bool = False, anchor: str = "middle") -> str:
    """A line of text about, or from, x."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, *lines: str, fill: str = LOCAL, bold: bool = False) -> str:
    """A room with lines in its middle; with more than one, or if `bold`, the first is bold."""
    first = y + height / 2 + 5 - 10 * (len(lines) - 1)
    words = (
        text(x + width / 2, first + 20 * n, line, size=14 if n else 15, bold=not n and (bold or len(lines) > 1))
        for n, line in enumerate(lines)
    )
    room = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="{LINE}"/>'
    return "\n".join([room, *words])


def arrow(x: float, y: float, end: float) -> str:
    """An arrow downwards."""
    return (
        f'<path d="M{x:g} {y:g}V{end - 7:g}" stroke="{LINE}" stroke-width="2"/>'
        f'<path d="M{x - 5:g} {end - 8:g}h10l-5 8z" fill="{LINE}"/>'
    )


def card(height: float, title: str, parts: Iterator[str]) -> str:
    """The whole picture: parts on a white card."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" role="img"'
            f' font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2:g}" rx="10" fill="{PAPER}" stroke="{LINE}"/>',
            *parts,
            "</svg>\n",
        ]
    )


COLUMNS = (16, 163, 310)  # a replica each
COLUMN = 134


def row(y: float, cells: tuple[str, ...], fill: str = LOCAL) -> Iterator[str]:
    """A box in each replica's column."""
    yield from (box(x, y, COLUMN, 36, cell, fill=fill) for x, cell in zip(COLUMNS, cells, strict=True))


def arrows(y: float, end: float) -> Iterator[str]:
    """An arrow in each replica's column."""
    yield from (arrow(x + COLUMN / 2, y, end) for x in COLUMNS)


def direction(y: float, given: str, sums: str, sent: str, made: str) -> Iterator[str]:
    """What goes in, what each replica sums of its own, the one collective, what comes out."""
    yield from row(y, (f"{given} of 4 images", f"{given} of 1 image", f"{given}: no image"))
    yield from arrows(y + 36, y + 60)
    yield from row(y + 60, (sums,) * 3, QUIET)
    yield from arrows(y + 96, y + 120)
    across = COLUMNS[2] + COLUMN - COLUMNS[0]
    yield box(COLUMNS[0], y + 120, across, 56, "ONE all-reduce: the sum over the replicas", sent, fill=SHARED)
    yield from arrows(y + 176, y + 200)
    yield from row(y + 200, (made,) * 3)


def collectives() -> Iterator[str]:
    """What goes into a layer's two sums, and what comes out of them."""
    for x, name in zip(COLUMNS, ("replica 0", "replica 1", "replica 2"), strict=True):
        yield text(x + COLUMN / 2, 30, name, bold=True)
    yield text(16, 62, "FORWARD", size=14, bold=True, anchor="start")
    yield from direction(72, "x", "Σx, Σx², n", "[Σx, Σx², N]: 2C + 1 numbers, float64", "y")
    yield text(230, 332, "y = γ·(x − μ)/√(σ² + ε) + β; μ, σ² and the running", size=14)
    yield text(230, 352, "statistics are the same bits on every replica", size=14)
    yield text(16, 392, "BACKWARD", size=14, bold=True, anchor="start")
    yield from direction(402, "dy", "Σdy, Σdy·x̂", "[Σdy, Σdy·x̂]: 2C numbers, float64", "dx")
    yield text(230, 662, "dβ and dγ are each replica's own Σdy and Σdy·x̂, before", size=14)
    yield text(230, 682, "the sum: DDP or average_gradients reduces all gradients", size=14)


FLOORS = (  # from the roof down; tests/test_figures.py says which modules live there
    ("cli/", "doctor, verify, bench, launch, ..."),
    ("cluster/", "addresses, hosts, how each launcher is started"),
    ("training", "init, average_gradients, uneven, recompute_statistics"),
    ("conversion", "another class for the same layer, and back; fusing"),
    ("_layer", "the state, and one call"),
    ("functional", "sync_batch_norm: one function"),
    ("_autograd, _operators", "the mathematics and its derivatives"),
    ("_checks, _recomputation, _names, ...", "refused before any collective; what repeats what"),
    ("comm/", "“sum this vector”"),
    ("kernels/", "“work on this tensor”"),
    ("arithmetic", "_statistics, _mask, ..."),
    ("errors, _plain, _compiled", "and csrc/: what comm and kernels have in C++"),
)


def house() -> Iterator[str]:
    """The floors, one above the other, and the wall between comm and kernels."""
    cli, *floors, comm, kernels, arithmetic, foundation = FLOORS
    yield f'<path d="M10 92L230 14L450 92z" fill="{QUIET}" stroke="{LINE}"/>'
    yield text(230, 60, cli[0], bold=True)
    yield text(230, 80, cli[1], size=14)
    for n, floor in enumerate(floors):
        yield box(20, 96 + 56 * n, 420, 52, *floor, fill=LOCAL if 2 < n < 6 else QUIET)
    ground = 96 + 56 * len(floors)
    members = ("torch.distributed, MPI,", "Horovod, shared memory", "knows no batch norm")
    yield box(20, ground, 205, 128, *comm, *members, fill=SHARED)
    yield box(235, ground, 205, 70, *kernels, "knows no replicas", fill=SHARED)
    yield box(235, ground + 74, 205, 54, *arithmetic, fill=QUIET)
    yield f'<path d="M230 {ground}V{ground + 128}" stroke="{INK}" stroke-width="5"/>'
    yield box(20, ground + 132, 420, 52, *foundation, fill=QUIET)
    yield text(230, ground + 208, "Who stands higher may know what is below;", size=14)
    yield text(230, ground + 228, "the wall has no door.", size=14)


def drawn() -> dict[str, str]:
    """The pictures by the names of their files."""
    return {
        "collectives.svg": card(700, "The two collectives of a layer: one forward, one backward", collectives()),
        "house.svg": card(738, "Which part of syncbn may know which", house()),
    }


if __name__ == "__main__":
    for name, svg in drawn().items():
        IMAGES.joinpath(name).write_text(svg, encoding="utf-8")
