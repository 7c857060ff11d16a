"""The digit detector resumes exactly: what its checkpoint holds, what is refused, and jobs that are killed."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_job
from torch import Tensor, nn

import syncbn

sys.path.insert(0, str(ROOT / "examples"))
import detect_digits
from digits.checkpoint import check_identity, load_checkpoint, lock, save_checkpoint

CPU = torch.device("cpu")

# ---- files


def test_a_write_that_is_cut_off_leaves_the_file_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def half(state: object, file) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}


def test_bytes_are_on_the_disk_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1})
    assert calls == ["fsync", "replace"]


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"step": SimpleNamespace()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="remove it, and train anew"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_one_job_writes_to_a_folder_and_its_death_sets_it_free(tmp_path: Path) -> None:
    code = "import sys, time; from digits.checkpoint import lock; lock(sys.argv[1]); print(flush=True); time.sleep(50)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")], cwd=ROOT / "examples", stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"\n"
        with pytest.raises(ValueError, match=r"another job writes to .*: end it, or give another --output"):
            lock(tmp_path / "lock")
        holder.kill()
        holder.wait(10)
        lock(tmp_path / "lock")


def test_what_differs_is_named() -> None:
    with pytest.raises(ValueError, match=r"made with lr 0.1 \(asked for: 0.2\), seed None \(asked for: 3\): ask for"):
        check_identity({"lr": 0.1, "norm": "sync"}, {"lr": 0.2, "norm": "sync", "seed": 3})


# ---- states


def arguments(folder: Path, **changed: object) -> argparse.Namespace:
    usual = {"norm": "sync", "images_per_process": 1, "steps": 4, "seed": 0, "dtype": "float64", "lr": 5e-3}
    return argparse.Namespace(**{**usual, "output": folder, "resume": True, **changed})


def starts(rank: int, size: int, folder: Path, changed: dict[str, object], own_folder: bool = False) -> str:
    args = arguments(folder / str(rank) if own_folder else folder, **changed)
    training = detect_digits.new_training(args, CPU)
    try:
        detect_digits.start_together(training, args, syncbn.world(), CPU)
    except SystemExit as error:
        return str(error)
    return f"after step {len(training.losses)}"


def saved(folder: Path, steps: int = 2, **changed: object) -> None:
    """Leave a checkpoint of two processes."""
    args = arguments(folder, images_per_process=2, **changed)
    training = detect_digits.new_training(args, CPU)
    for _ in range(steps):
        detect_digits.train_step(training, args, syncbn.world())
    folder.mkdir(exist_ok=True)
    identity = detect_digits.identity(args, syncbn.world())
    save_checkpoint(folder / "checkpoint.pt", {"identity": identity, **training.state()})


def test_every_rank_starts_where_the_checkpoint_ends(gloo, tmp_path: Path) -> None:
    assert gloo(2, starts, tmp_path, {}) == ["after step 0"] * 2
    saved(tmp_path / "other")
    assert gloo(2, starts, tmp_path / "other", {}) == ["after step 2"] * 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 7}, "made with seed 0 (asked for: 7): ask for the same"),
        ({"dtype": "float32"}, "made with dtype float64 (asked for: float32)"),
        ({"images_per_process": 2}, "made with global_batch 2 (asked for: 4)"),
        ({"norm": "none"}, "made with norm sync (asked for: none)"),
        ({"steps": 1}, "the checkpoint is 2 steps old already"),
    ],
)
def test_other_settings_are_refused_alike_on_every_rank(gloo, tmp_path: Path, changed, message) -> None:
    saved(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    one, other = gloo(2, starts, tmp_path, changed)
    assert one == other
    assert message in one
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_ranks_that_see_different_folders_do_not_start(gloo, tmp_path: Path) -> None:
    saved(tmp_path / "0")
    one, other = gloo(2, starts, tmp_path, {}, True)
    assert one.replace("/0:", "/1:") == other
    assert "the ranks found checkpoints of steps 2, 0" in one


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_checkpoint_holds_all_that_determines_the_run(tmp_path: Path, dtype: str) -> None:
    """With a layer that draws random numbers, and other numbers drawn in between."""
    args = arguments(tmp_path, dtype=dtype)

    def training() -> detect_digits.Training:
        new = detect_digits.new_training(args, CPU)
        new.model.backbone.append(nn.Dropout(0.2))
        return new

    undisturbed, killed, resumed = training(), training(), training()
    for _ in range(4):
        detect_digits.train_step(undisturbed, args, syncbn.world())
    for _ in range(2):
        detect_digits.train_step(killed, args, syncbn.world())
    save_checkpoint(tmp_path / "checkpoint.pt", killed.state())
    torch.manual_seed(12345)
    resumed.load(load_checkpoint(tmp_path / "checkpoint.pt"))
    for _ in range(2):
        detect_digits.train_step(resumed, args, syncbn.world())
    assert resumed.losses == undisturbed.losses
    assert same_bits(resumed.model.state_dict(), undisturbed.model.state_dict())


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match=r"lock cannot be locked \(.*\): see that no other job writes there"):
        lock(tmp_path / "lock")


# ---- jobs


STEPS, SECONDS = 5, 150
DETECTOR = ("--dtype", "float64", "--steps", str(STEPS), "--checkpoint-every", "2", "--test-canvases", "1", "--resume")


def job(folder: Path, images: int, *, step: int = STEPS, rank: int = 1, who: str = "rank") -> list[str]:
    """Return a job's script and arguments. It is killed where `step` begins, once, if there is such a step."""
    folder.mkdir(exist_ok=True)
    killed = ["tests/jobs/killed_job.py", str(step), str(rank), "0", who, str(folder / "killed")]
    return [*killed, "--images-per-process", str(images), *DETECTOR, "--output", str(folder)]


def torchrun(processes: int, *options: str) -> list[str]:
    return ["bash", "launch/torchrun.sh", "--procs-per-node", str(processes), *options, "--"]


def final(folder: Path) -> dict[str, Tensor]:
    state = load_checkpoint(folder / "checkpoint.pt")
    assert len(state["losses"]) == STEPS
    return state["model"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The final parameters and buffers of two processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run_job([*torchrun(2), *job(folder, 1)], seconds=SECONDS)
    assert ended.returncode == 0, ended.stdout
    return final(folder)


@pytest.mark.launcher
@pytest.mark.timeout(480)
def test_a_rank_is_killed_and_the_same_command_given_again(launch, tmp_path: Path, undisturbed) -> None:
    command = job(tmp_path, 1, step=3)
    ended = launch(2, *command, seconds=SECONDS)
    assert ended.returncode != 0
    assert (tmp_path / "killed").exists(), ended.stdout
    again = launch(2, *command, seconds=SECONDS)
    assert again.returncode == 0, again.stdout
    assert "resuming after step 2 of 5" in again.stdout
    assert same_bits(final(tmp_path), undisturbed)


@pytest.mark.launcher
@pytest.mark.timeout(480)
def test_torchrun_starts_the_ranks_again(tmp_path: Path, undisturbed) -> None:
    ended = run_job([*torchrun(2, "--max-restarts", "1"), *job(tmp_path, 1, step=4, rank=0)], seconds=SECONDS)
    assert ended.returncode == 0, ended.stdout
    assert (tmp_path / "killed").exists(), ended.stdout
    assert "resuming after step 4 of 5" in ended.stdout
    assert same_bits(final(tmp_path), undisturbed)


@pytest.mark.launcher
@pytest.mark.timeout(480)
def test_a_killed_job_is_resumed_by_another_number_of_processes(tmp_path: Path, undisturbed) -> None:
    ended = run_job([*torchrun(2), *job(tmp_path, 1, step=3, who="job")], seconds=SECONDS)
    assert ended.returncode == -signal.SIGKILL, ended.stdout
    again = run_job([sys.executable, *job(tmp_path, 2)], seconds=SECONDS)
    assert again.returncode == 0, again.stdout
    assert "resuming after step 2 of 5" in again.stdout
    ours, theirs = final(tmp_path), undisturbed
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) <= 1e-9
