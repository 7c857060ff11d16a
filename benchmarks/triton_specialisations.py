"""Compile the Triton kernels as the library can launch them, for GPUs that need not be there, and list what they need.

    python benchmarks/triton_specialisations.py [--target cuda:80 cuda:90 hip:gfx942] [--quick]

Each line is one specialisation: the kernel; the dtype of x; planes or rows, and a tile's lines x columns; the dtype of
weight and bias, and of the running statistics with how they move ("-" where absent); the activation, and whether there
is a residual; whether x and its sizes are multiples of 16, which vector loads need; and registers a thread, bytes of
shared memory, and bytes of registers that were spilled. Exits with 1 if one does not compile or spills.

The kernels are compiled for dtypes, tiles and layouts in all combinations, without an epilogue, and with a residual and
relu. The other epilogues (a residual alone, relu alone, and each other activation with a residual, which takes more
than without) are compiled for each dtype with one tile of planes and one of rows; each dtype of the parameters, and
each way in which the running statistics move, with one dtype and tile. (What the library can launch is the product of
all. The last two are code of their own: per channel, before the loop or in another program.) --quick takes a few.

Not measured here: time. Nothing runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: it has no compiler then

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncbn.kernels import _triton
from syncbn.kernels import _triton_code as code

KERNELS = ("moments", "normalize", "backward_sums", "backward_input")
PLANES, ROWS = (False, 1024), (True, 64)  # the tiles of large tensors
DTYPES = ("fp32", "fp64", "bf16", "fp16")
WARPS = {"cuda": 32, "hip": 64}
MOVES = ("number", "tensor", "average", "not tracked")
INTEGERS = ("outer", "inner", "channels", "per", "splits", "mean_stride", "var_stride")


class Specialisation(NamedTuple):
    """What one compilation depends on."""

    kernel: str
    x: str
    rows: bool
    columns: int
    parameters: str = "fp32"
    buffers: str = "fp32"
    moves: str = "number"
    aligned: bool = True
    wide: bool = False  # sizes beyond int32
    activation: str = ""
    residual: bool = False  # in backward_sums: and dz

    def __str__(self) -> str:
        tile = f"{'rows' if self.rows else 'planes'} {_triton.TILE // self.columns}x{self.columns}"
        layout = ("aligned" if self.aligned else "any") + (" int64" if self.wide else "")
        has_weight = self.kernel in ("normalize", "backward_input") or self.activation
        running = f"{self.buffers} {self.moves}" if self.kernel == "normalize" else "-"
        epilogue = " ".join(filter(None, (self.activation, "residual" if self.residual else ""))) or "-"
        return (
            f"{self.kernel:14} {self.x:4} {tile:15} {self.parameters if has_weight else '-':4} {running:18} "
            f"{epilogue:19} {layout:13}"
        )


def specialisations(quick: bool) -> Iterator[Specialisation]:
    """Yield them, without repetition."""
    if quick:
        for kernel in KERNELS:
            yield Specialisation(kernel, "bf16", *PLANES)
            yield Specialisation(kernel, "fp32", *ROWS)
        for kernel, tile in zip(KERNELS[1:], (PLANES, ROWS, PLANES), strict=True):
            yield fused(kernel, "bf16", *tile, "silu")
        yield Specialisation("normalize", "fp64", *ROWS, "bf16", "bf16", "average")
        return
    tiles = [(False, columns) for columns in _triton._COLUMNS] + [(True, columns) for columns in _triton._ROW_COLUMNS]
    for kernel, x, tile, aligned in itertools.product(KERNELS, DTYPES, tiles, (True, False)):
        yield Specialisation(kernel, x, *tile, aligned=aligned)
        if kernel != "moments":
            yield fused(kernel, x, *tile, "relu", aligned=aligned)
    for x, tile in itertools.product(DTYPES, (PLANES, ROWS)):
        for kernel, activation in itertools.product(KERNELS[1:], ("leaky_relu", "silu", "hardswish")):
            yield fused(kernel, x, *tile, activation)
        for kernel in ("normalize", "backward_sums"):
            yield Specialisation(kernel, x, *tile, activation="relu")
        yield Specialisation("normalize", x, *tile, residual=True)
    for kernel, rows in itertools.product(KERNELS, (False, True)):
        yield Specialisation(kernel, "fp32", rows, 64, wide=True)
    for parameters in ("-", "fp64", "bf16", "fp16"):
        for kernel in ("normalize", "backward_input"):
            yield Specialisation(kernel, "bf16", False, 256, parameters)
    for buffers, moves in itertools.product(DTYPES, MOVES):
        if (buffers, moves) != ("fp32", "number"):
            yield Specialisation("normalize", "bf16", False, 256, "fp32", buffers, moves)


def fused(kernel: str, x: str, rows: bool, columns: int, activation: str, *, aligned: bool = True) -> Specialisation:
    """Return the kernel with an activation and, unless it never has one, a residual."""
    residual = kernel != "backward_input"
    return Specialisation(kernel, x, rows, columns, aligned=aligned, activation=activation, residual=residual)


def compiled(of: Specialisation, target: GPUTarget, **options: Any) -> Any:
    """Compile one kernel, with Triton's usual options but for these."""
    kernel = getattr(code, of.kernel)
    values = {"rows": of.rows, "lines": _triton.TILE // of.columns, "columns": of.columns}
    values.update(average=of.moves == "average", activation=of.activation or None)
    tracked = of.moves != "not tracked"
    parameters = None if of.parameters == "-" else f"*{of.parameters}"
    types = {
        **dict.fromkeys(("x", "y", "dy", "dx"), f"*{of.x}"),
        **dict.fromkeys(("residual", "dz"), f"*{of.x}" if of.residual else None),
        **dict.fromkeys(("total", "statistics", "partial", "payload", "sums"), "*fp64"),
        **dict.fromkeys(("momentum", "eps", "slope"), "fp64"),
        # as the library gives them: no more than is needed
        "weight": parameters if of.activation or of.kernel != "backward_sums" else None,
        "bias": parameters if of.activation or of.kernel == "normalize" else None,
        **dict.fromkeys(("running_mean", "running_var"), f"*{of.buffers}" if tracked else None),
        **dict.fromkeys(INTEGERS, "i64" if of.wide else "i32"),
        "tickets": "*i32",
        "batches": "*i64" if tracked else None,
        "momentum_at": "*fp32" if of.moves == "tensor" else None,
    }
    names = kernel.arg_names
    signature = {name: types.get(name) or "constexpr" for name in names}
    constants = {(names.index(name),): values.get(name) for name in names if signature[name] == "constexpr"}
    if of.rows and not of.wide:  # as a 1 is compiled in
        signature["inner"], constants[(names.index("inner"),)] = "constexpr", 1
    sized = ("channels",) if of.rows else ("inner",)
    vectors = ("x", "y", "dy", "dx", "residual", "dz", *sized) if of.aligned else ()
    multiples = [name for name in vectors if signature.get(name, "constexpr") != "constexpr"]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    options = {**_triton.options(target.backend), **options}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


class Needs(NamedTuple):
    """What a compiled kernel takes of a GPU: registers a thread, bytes of shared memory, bytes spilled a thread."""

    registers: int
    shared: int
    spills: int


def needs(kernel: Any, target: GPUTarget) -> Needs:
    """Read it from what was compiled: the machine code of NVIDIA, or AMD's assembly."""
    if target.backend == "hip":
        assembly = kernel.asm["amdgcn"]
        registers, spills = (
            sum(int(n) for n in re.findall(pattern, assembly))
            for pattern in (r"\.vgpr_count:\s+(\d+)", r"\.[sv]gpr_spill_count:\s+(\d+)")
        )
        return Needs(registers, kernel.metadata.shared, spills)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    return Needs(registers, kernel.metadata.shared, stack)  # nothing else of these kernels is on the stack


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=["cuda:80", "cuda:90", "hip:gfx942"])
    parser.add_argument("--quick", action="store_true", help="a few of them")
    arguments = parser.parse_args()
    wrong = 0
    for name in arguments.target:
        backend, arch = name.split(":")
        target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, WARPS[backend])
        found = []
        print(f"# Triton {triton.__version__}, {name}: registers, shared memory, spills")
        for of in specialisations(arguments.quick):
            try:
                found.append(needs(compiled(of, target), target))
            except Exception as error:
                wrong += 1
                print(f"{of} failed: {error}")
                continue
            wrong += found[-1].spills > 0
            print(f"{of} {found[-1].registers:4} {found[-1].shared:6} {found[-1].spills:4}", flush=True)
        print(
            f"# {name}: {len(found)} specialisations, at most {max(n.registers for n in found)} registers and "
            f"{max(n.shared for n in found)} bytes of shared memory, {sum(n.spills > 0 for n in found)} with spills"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
