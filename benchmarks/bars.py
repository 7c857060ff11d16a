"""`syncbn bench` with the project's own bars beside what it measured. See launch/bench.sh.

The bars are for 2 ranks of one thread; "one rank" is each by itself, without peers.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from syncbn import world
from syncbn.cli import _bench
from syncbn.cli._bench import DEEP, LARGE, SMALL, WIDE, Case
from syncbn.cli._measure import paired_ratio
from syncbn.cli._report import _ratio, _table

Record = dict[str, Any]

# (what, at most)
BARS = {
    "large contiguous / nn.BatchNorm2d": 0.75,
    "large channels_last / nn.BatchNorm2d": 0.85,
    "large contiguous / (floor + collectives)": 1.3,
    "(2, 2048, 7, 7) contiguous, one rank / nn.BatchNorm2d": 1.0,
    "(8, 32, 32, 32) contiguous, one rank / nn.BatchNorm2d": 1.0,
    "(8, 32, 32, 32) channels_last, one rank / nn.BatchNorm2d": 1.0,
    "small layer, one rank / nn.BatchNorm2d": 1.4,
    "small layer / one Gloo all-reduce": 0.3,
    "large bfloat16, one rank / nn.BatchNorm2d": 1.0,
    "large float16, one rank / nn.BatchNorm2d": 1.0,
    "large bfloat16 / float32": 0.8,
    "large float16 / float32": 0.8,
    "large contiguous, norm + ReLU fused / unfused with nn.BatchNorm2d": 0.45,
    "large channels_last, norm + ReLU fused / unfused with nn.BatchNorm2d": 0.55,
    "large contiguous, norm + addition + ReLU fused / unfused with nn.BatchNorm2d": 0.5,
    "large contiguous, norm + ReLU fused / (floor + collectives)": 1.2,
    "large contiguous, norm + addition + ReLU fused / (floor + collectives)": 1.2,
    "ResNet step, sync / local": 1.02,
    "ResNet step, sync with fused activations / local": 0.98,
    "large norm + ReLU, compiled / eager": 1.2,
    "small norm + ReLU, compiled / eager": 2.0,
    "large norm + ReLU fused, compiled / eager and unfused": 1.0,
    "small norm + ReLU fused, compiled / eager and unfused": 2.0,
}


def measured(results: Record) -> dict[str, float | None]:
    """The ratio for each bar; None where there was nothing to measure."""
    layers: dict[str, Record] = {row["case"]: row for row in results["layer"]}
    fused: dict[str, Record] = {row["case"]: row for row in results["fused"]}

    def row(shape: tuple[int, int, int, int], memory_format: str = "contiguous", dtype: str = "float32") -> Record:
        return layers[str(Case(shape, memory_format, dtype))]

    large, wide_last = row(LARGE), row(WIDE, "channels_last")
    bfloat16, float16 = row(LARGE, dtype="bfloat16"), row(LARGE, dtype="float16")
    relu, relu_last = fused[str(Case(LARGE))], fused[str(Case(LARGE, "channels_last"))]
    added = fused[f"{Case(LARGE)} with addition"]
    in_large, in_small = results["compiled"]
    return {
        "large contiguous / nn.BatchNorm2d": large["to_batch_norm"],
        "large channels_last / nn.BatchNorm2d": row(LARGE, "channels_last")["to_batch_norm"],
        "large contiguous / (floor + collectives)": large["to_floor"],
        "(2, 2048, 7, 7) contiguous, one rank / nn.BatchNorm2d": row(DEEP)["one_rank_to_batch_norm"],
        "(8, 32, 32, 32) contiguous, one rank / nn.BatchNorm2d": row(WIDE)["one_rank_to_batch_norm"],
        "(8, 32, 32, 32) channels_last, one rank / nn.BatchNorm2d": wide_last["one_rank_to_batch_norm"],
        "small layer, one rank / nn.BatchNorm2d": row(SMALL)["one_rank_to_batch_norm"],
        "small layer / one Gloo all-reduce": row(SMALL)["to_backend"],
        "large bfloat16, one rank / nn.BatchNorm2d": bfloat16["one_rank_to_batch_norm"],
        "large float16, one rank / nn.BatchNorm2d": float16["one_rank_to_batch_norm"],
        "large bfloat16 / float32": paired_ratio(bfloat16["times"], large["times"]),
        "large float16 / float32": paired_ratio(float16["times"], large["times"]),
        "large contiguous, norm + ReLU fused / unfused with nn.BatchNorm2d": relu["to_unfused"],
        "large channels_last, norm + ReLU fused / unfused with nn.BatchNorm2d": relu_last["to_unfused"],
        "large contiguous, norm + addition + ReLU fused / unfused with nn.BatchNorm2d": added["to_unfused"],
        "large contiguous, norm + ReLU fused / (floor + collectives)": relu["to_floor"],
        "large contiguous, norm + addition + ReLU fused / (floor + collectives)": added["to_floor"],
        "ResNet step, sync / local": results["resnet"]["sync_to_local"],
        "ResNet step, sync with fused activations / local": results["resnet"]["fused_to_local"],
        "large norm + ReLU, compiled / eager": in_large["to_eager"],
        "small norm + ReLU, compiled / eager": in_small["to_eager"],
        "large norm + ReLU fused, compiled / eager and unfused": in_large["fused_to_eager"],
        "small norm + ReLU fused, compiled / eager and unfused": in_small["fused_to_eager"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    _bench.add_arguments(parser)
    results = _bench.run(parser.parse_args())
    if world().rank == 0:
        table = _table("The bars (for 2 ranks of one thread)", "what", "at most", "measured", "")
        for what, value in measured(results).items():
            verdict = "not measured" if value is None else "ok" if value <= BARS[what] else "missed"
            table.add_row(what, _ratio(BARS[what]), _ratio(value), verdict)
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
