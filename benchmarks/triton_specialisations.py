"""Compile the Triton kernels as the library can launch them, for GPUs that need not be there, and list what they need.

    python benchmarks/triton_specialisations.py [--target cuda:80 cuda:90 hip:gfx942] [--quick]

Each line is one specialisation: the kernel; the dtype of x; planes or rows, and a tile's lines x columns; the dtype of
weight and bias, and of the running statistics with how they move ("-" where absent); whether x and its sizes are
multiples of 16, which vector loads need; and registers a thread, bytes of shared memory, and bytes of registers that
were spilled. Exits with 1 if one does not compile or spills.

The kernels are compiled for dtypes, tiles and layouts in all combinations, and for each dtype of the parameters and
each way in which the running statistics move with one of these. (What the library can launch is the product of both,
of which the second part is code of its own: per channel, before the loop or in another program.) --quick takes a few.

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

    def __str__(self) -> str:
        tile = f"{'rows' if self.rows else 'planes'} {_triton.TILE // self.columns}x{self.columns}"
        layout = ("aligned" if self.aligned else "any") + (" int64" if self.wide else "")
        parameters = self.parameters if self.kernel in ("normalize", "backward_input") else "-"
        running = f"{self.buffers} {self.moves}" if self.kernel == "normalize" else "-"
        return f"{self.kernel:14} {self.x:4} {tile:15} {parameters:4} {running:18} {layout:13}"


def specialisations(quick: bool) -> Iterator[Specialisation]:
    """Yield them, without repetition."""
    kernels = ("moments", "normalize", "backward_sums", "backward_input")
    tiles = [(False, columns) for columns in _triton._COLUMNS] + [(True, columns) for columns in _triton._ROW_COLUMNS]
    if quick:
        for kernel in kernels:
            yield Specialisation(kernel, "bf16", False, 1024)
            yield Specialisation(kernel, "fp32", True, 64)
        yield Specialisation("normalize", "fp64", True, 64, "bf16", "bf16", "average")
        return
    for kernel, x, (rows, columns), aligned in itertools.product(kernels, DTYPES, tiles, (True, False)):
        yield Specialisation(kernel, x, rows, columns, aligned=aligned)
    for kernel, rows in itertools.product(kernels, (False, True)):
        yield Specialisation(kernel, "fp32", rows, 64, wide=True)
    for parameters in ("-", "fp64", "bf16", "fp16"):
        for kernel in ("normalize", "backward_input"):
            yield Specialisation(kernel, "bf16", False, 256, parameters)
    for buffers, moves in itertools.product(DTYPES, MOVES):
        if (buffers, moves) != ("fp32", "number"):
            yield Specialisation("normalize", "bf16", False, 256, "fp32", buffers, moves)


def compiled(of: Specialisation, target: GPUTarget, **options: Any) -> Any:
    """Compile one kernel, with Triton's usual options but for these."""
    kernel = getattr(code, of.kernel)
    values = {"rows": of.rows, "lines": _triton.TILE // of.columns, "columns": of.columns}
    values["average"] = of.moves == "average"
    tracked = of.moves != "not tracked"
    types = {
        **dict.fromkeys(("x", "y", "dy", "dx"), f"*{of.x}"),
        **dict.fromkeys(("total", "statistics", "partial", "payload", "sums"), "*fp64"),
        **dict.fromkeys(("weight", "bias"), f"*{of.parameters}" if of.parameters != "-" else None),
        **dict.fromkeys(("running_mean", "running_var"), f"*{of.buffers}" if tracked else None),
        **dict.fromkeys(INTEGERS, "i64" if of.wide else "i32"),
        "tickets": "*i32",
        "batches": "*i64" if tracked else None,
        "momentum": "fp64",
        "momentum_at": "*fp32" if of.moves == "tensor" else None,
        "eps": "fp64",
    }
    names = kernel.arg_names
    signature = {name: types.get(name) or "constexpr" for name in names}
    constants = {(names.index(name),): values.get(name) for name in names if signature[name] == "constexpr"}
    if of.rows and not of.wide:  # as a 1 is compiled in
        signature["inner"], constants[(names.index("inner"),)] = "constexpr", 1
    sized = ("channels",) if of.rows else ("inner",)
    multiples = [name for name in ("x", "y", "dy", "dx", *sized) if name in names] if of.aligned else []
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    options = {"num_warps": _triton.WARPS, **options}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


class Needs(NamedTuple):
    """What a compiled kernel takes of a GPU: registers a thread, bytes of shared memory, bytes spilled a thread."""

    registers: int
    shared: int
    spills: int


def needs(kernel: Any, target: GPUTarget) -> Needs:
    """Read it from the assembler: ptxas -v, or the AMD assembly's own account."""
    if target.backend == "hip":
        assembly = kernel.asm["amdgcn"]
        registers, spills = (
            sum(int(n) for n in re.findall(pattern, assembly))
            for pattern in (r"\.vgpr_count:\s+(\d+)", r"\.[sv]gpr_spill_count:\s+(\d+)")
        )
        return Needs(registers, kernel.metadata.shared, spills)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        arch = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
        command = [ptxas, "-v", f"--gpu-name={arch}", source, "-o", os.devnull]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = int(re.search(r"Used (\d+) registers", text)[1])
    spills = sum(int(n) for n in re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups())
    return Needs(registers, kernel.metadata.shared, spills)


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
