"""`python -m syncbn doctor`: what this installation can do, and whether the cluster that it runs on is fit."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from syncbn._launcher import Launch, detect
from syncbn.comm import Communicator
from syncbn.errors import LaunchError

from ._cluster import Collective, Facts, Finding, by_host, collectives, facts, findings, merged
from ._installation import Part, parts
from ._job import Deadline, end, exchange, join, plural, table
from ._network import network


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
        show = _as_json if as_json else _text
        print(show(fit, launch, comm, world, outcomes, wrong), flush=True)
    deadline.doing = "waiting for rank 0 to print"
    comm.all_reduce(torch.zeros(1))  # the first rank that exits with 1 ends the job
    return fit


def _facts(told: Sequence[dict[str, Any]]) -> list[Facts]:
    if any(rank.keys() != told[0].keys() for rank in told):
        versions = "; ".join(f"{rank['syncbn']} on rank {rank['rank']}" for rank in told)
        raise LaunchError(f"different versions of syncbn: {versions}. Install the same everywhere")
    return [Facts(**rank) for rank in told]


def _installation_text(found: Sequence[Part]) -> str:
    rows = [[part.name, part.state, part.what] for part in found]
    remedies = [f"{part.name}: {part.remedy}" for part in found if part.remedy]
    broken = [part.name for part in found if part.state == "broken"]
    return "\n".join(
        [
            table(["part", "state", "what"], rows),
            *(["", "what to do, where you need it"] if remedies else []),
            *(f"  {remedy}" for remedy in remedies),
            "",
            f"broken: {', '.join(broken)}"
            if broken
            else "fit. To examine a cluster: launch/torchrun.sh ... -- -m syncbn doctor",
        ]
    )


def _as_json(
    fit: bool, launch: Launch, comm: Communicator, world: Sequence[Facts], outcomes: Sequence[Collective],
    wrong: Sequence[Finding],
) -> str:  # fmt: skip
    return json.dumps(
        {
            "fit": fit,
            "launcher": launch.launcher,
            "world": type(comm).__name__,
            "ranks": [asdict(rank) for rank in world],
            "collectives": [asdict(outcome) for outcome in outcomes],
            "findings": [asdict(finding) for finding in wrong],
        }
    )


def _text(
    fit: bool, launch: Launch, comm: Communicator, world: Sequence[Facts], outcomes: Sequence[Collective],
    wrong: Sequence[Finding],
) -> str:  # fmt: skip
    ranks = [
        [
            str(r.rank),
            r.host,
            r.device,
            r.interface or "-",
            r.address or "-",
            str(r.threads),
            r.python,
            r.torch,
            r.syncbn,
        ]
        for r in world
    ]
    shape = f"{plural(comm.size, 'rank')} on {plural(len(by_host(world)), 'host')}, started by {launch.launcher}"
    return "\n".join(
        [
            shape,
            "",
            table(["rank", "host", "device", "interface", "address", "threads", "python", "torch", "syncbn"], ranks),
            "",
            table(["all-reduce over", "tensor", "µs", ""], [_collective_row(outcome) for outcome in outcomes]),
            "",
            *(f"{finding.severity}: {finding.text}" for finding in wrong),
            "fit" if fit else "not fit",
        ]
    )


def _collective_row(outcome: Collective) -> list[str]:
    if outcome.seconds is None:
        return [outcome.name, "-", "-", outcome.note]
    verdict = f"FAILED: {outcome.note}" if outcome.failed else "sum is right"
    return [outcome.name, outcome.device, f"{outcome.seconds * 1e6:.0f}", verdict]
