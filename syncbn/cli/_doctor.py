"""`syncbn doctor`: what this installation can do, and whether the cluster that it runs on is fit."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from syncbn._launcher import Launch, detect
from syncbn.cluster._network import network
from syncbn.errors import LaunchError

from ._cluster import Collective, Facts, Finding, by_host, collectives, facts, findings, merged
from ._installation import Part, parts
from ._job import Deadline, end, exchange, join, plural, table


@dataclass(frozen=True)
class Report:
    """What was found out about a cluster."""

    fit: bool
    launcher: str
    world: str  # the class of its communicator
    ranks: list[Facts]
    collectives: list[Collective]
    findings: list[Finding]


def add_command(commands: Any) -> None:
    """Add `doctor` to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="tell what this installation can do; under a launcher, whether the cluster is fit",
        description="Alone: what this installation can do, with the remedy for what is absent; the exit status is 1 if "
        "a part is installed but broken. Under torchrun, mpirun, horovodrun or srun: the ranks with hosts, devices, "
        "addresses and versions, and an all-reduce over each communicator, its sum checked; the exit status is 0 if "
        "the cluster is fit. Warnings do not make it unfit. A rank that cannot meet the others says why on stderr.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (rank 0) instead of tables")
    parser.add_argument("--timeout", type=float, default=60, metavar="S", help="seconds for all of it (60)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Examine the installation, or the cluster if a launcher started this process."""
    try:
        launch = detect(os.environ)
    except LaunchError as error:
        end(Launch("unknown"), str(error))
    if launch.launcher == "none":
        found = parts()
        report = {"fit": all(part.state != "broken" for part in found), "parts": [asdict(part) for part in found]}
        print(json.dumps(report) if arguments.json else _installation_text(found), flush=True)
        fit = report["fit"]
    else:
        with Deadline(arguments.timeout, launch) as deadline:
            fit = _examine(launch, deadline, as_json=arguments.json)
    if not fit:
        sys.exit(1)


def _examine(launch: Launch, deadline: Deadline, *, as_json: bool) -> bool:
    comm = join(launch, deadline)
    try:
        deadline.doing = "exchanging what each rank knows of itself"
        mine = asdict(facts(launch, network(launch, os.environ)))
        world = _facts([json.loads(text) for text in exchange(comm, json.dumps(mine))])
        deadline.doing = "running the collectives"
        results = [asdict(outcome) for outcome in collectives(comm, launch, world, deadline.patience)]
        everybodys = exchange(comm, json.dumps(results))
    except Exception as error:  # said, and the process ends: an exception alone would leave MPI's other ranks waiting
        end(launch, f"while {deadline.doing}: {error}")
    outcomes = merged([[Collective(**outcome) for outcome in json.loads(text)] for text in everybodys])
    wrong = findings(world)
    fit = not any(finding.severity == "error" for finding in wrong) and not any(o.failed for o in outcomes)
    if comm.rank == 0:
        report = Report(fit, launch.launcher, type(comm).__name__, world, outcomes, wrong)
        print(json.dumps(asdict(report)) if as_json else _cluster_text(report), flush=True)
    deadline.doing = "waiting for rank 0 to print"
    comm.all_reduce(torch.zeros(1, device="cpu"))  # the first rank that exits with 1 ends the job
    return fit


def _facts(told: Sequence[dict[str, Any]]) -> list[Facts]:
    if any(rank.keys() != told[0].keys() for rank in told):
        versions = "; ".join(f"{rank['syncbn']} on rank {rank['rank']}" for rank in told)
        raise LaunchError(f"different versions of syncbn: {versions}. Install the same everywhere")
    return [Facts(**rank) for rank in told]


def _installation_text(found: Sequence[Part]) -> str:
    remedies = [f"  {part.name}: {part.remedy}" for part in found if part.remedy]
    broken = [part.name for part in found if part.state == "broken"]
    return "\n".join(
        [
            table(["part", "state", "what"], [[part.name, part.state, part.what] for part in found]),
            *(["", "what to do, where you need it", *remedies] if remedies else []),
            "",
            f"broken: {', '.join(broken)}"
            if broken
            else "fit; to examine a cluster: syncbn launch torchrun --procs-per-node 2 -- -m syncbn doctor",
        ]
    )


def _cluster_text(report: Report) -> str:
    names = ["rank", "host", "device", "interface", "address", "threads", "kernels", "python", "torch", "syncbn"]
    ranks = [[str(getattr(rank, name)) or "-" for name in names] for rank in report.ranks]
    hosts = plural(len(by_host(report.ranks)), "host")
    return "\n".join(
        [
            f"{plural(len(ranks), 'rank')} on {hosts}, started by {report.launcher}",
            "",
            table(names, ranks),
            "",
            table(
                ["all-reduce over", "tensor", "µs", ""], [_collective_row(outcome) for outcome in report.collectives]
            ),
            "",
            *(f"{finding.severity}: {finding.text}" for finding in report.findings),
            "fit" if report.fit else "not fit",
        ]
    )


def _collective_row(outcome: Collective) -> list[str]:
    took = "-" if outcome.seconds is None else f"{outcome.seconds * 1e6:.0f}"
    if outcome.failed:
        return [outcome.name, outcome.device, took, f"FAILED: {outcome.note}"]
    if outcome.seconds is None:
        return [outcome.name, "-", took, outcome.note]
    return [outcome.name, outcome.device, took, "sum is right"]
