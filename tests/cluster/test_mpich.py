"""launch/mpirun.sh with MPICH, over two hosts. The project's environment has Open MPI: MPICH gets one of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cluster.lab import OWN_NAMES, ROOT

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def mpich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with launch/ and what it runs, without an environment, and one with MPICH before all we have."""
    folder = tmp_path_factory.mktemp("mpich")
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copytree(ROOT / "syncbn" / "cluster", folder / "syncbn" / "cluster")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--ignore-installed"]
    subprocess.run([*pip, "--prefix", str(folder / "env"), "mpich", "mpi4py"], check=True, timeout=100)
    ours = sysconfig.get_path("purelib")
    theirs = sysconfig.get_path("purelib", vars={"base": str(folder / "env")})
    Path(theirs, "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    return folder


@pytest.mark.parametrize("own_name", OWN_NAMES)
def test_mpich(hosts, mpich: Path, own_name: str) -> None:
    first, _ = hosts(2, own_name=own_name)
    env = {"PATH": f"{mpich}/env/bin:{os.environ['PATH']}"}
    command = ["timeout", "-k", "5", "60", "bash", f"{mpich}/launch/mpirun.sh", "--hosts", "node1:2,node2:2"]
    version = first.run("mpirun", "--version", env=env)
    assert "HYDRA" in version.stdout
    job = first.run(*command, "--", "tests/jobs/steps_job.py", "20", "10", env=env, seconds=70)
    assert job.returncode == 0, job.stdout
    assert all(f"rank {rank} of 4 trains on node{1 + rank // 2}" in job.stdout for rank in range(4))
