"""Train a detector of handwritten digits: alone, or under torchrun, mpirun or horovodrun, without a change.

    python examples/detect_digits.py --images-per-process 8 --norm batch
    torchrun --standalone --nproc-per-node 4 examples/detect_digits.py --images-per-process 2 --norm sync

The two see the same batches and compute the same losses. With `--norm batch` the second would normalise every two
images by themselves. Writes checkpoint.pt, metrics.json and TensorBoard scalars to the output folder. With --resume
the same command starts a training and goes on with one that was killed, to the same result: see docs/resume.md.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits.checkpoint import check_identity, load_checkpoint, lock, save_checkpoint, save_json
from digits.data import make_canvas, training_share
from digits.evaluate import average_precision, detect
from digits.model import Detector, images_of, summed_losses, targets_of
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import syncbn
from syncbn.comm import Communicator

LOSS_PARTS = ("heatmap", "size", "offset")


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {text}")
        return int(text)

    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--norm", choices=("batch", "sync", "none"), default="sync", help="local, synchronised or no batch norm")
    add("--images-per-process", type=at_least(1), default=2, metavar="N")
    add("--steps", type=at_least(1), default=500, metavar="N", help="training steps in all, resumed ones included")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of the data and the first parameters")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--lr", type=float, default=5e-3, help="highest learning rate of AdamW")
    add("--output", type=Path, default=Path("runs/digits"), metavar="DIR", help="must be seen by all processes")
    add("--resume", action="store_true", help="go on from the checkpoint in the output folder, if there is one")
    add("--checkpoint-every", type=at_least(1), default=50, metavar="N", help="steps; one more follows the last")
    add("--eval-every", type=at_least(1), default=50, metavar="N", help="steps; one more follows the last")
    add("--test-canvases", type=at_least(1), default=200, metavar="N")
    return parser.parse_args()


def identity(args: argparse.Namespace, comm: Communicator) -> dict[str, Any]:
    """Return what makes two trainings the same; with synchronised statistics, the number of processes does not."""
    batch = args.images_per_process * comm.size
    return {
        "norm": args.norm,
        "global_batch": batch,
        "images_per_statistics": args.images_per_process if args.norm == "batch" else batch,
        "seed": args.seed,
        "dtype": args.dtype,
        "lr": args.lr,
    }


@dataclass
class Training:
    """All that changes while training, and so all that a checkpoint holds.

    Batches, random numbers and the learning rate are functions of the step, which is the number of losses.
    """

    model: Detector
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # of each step, over the whole batch
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, average precision)
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        modules = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**modules, "losses": self.losses, "curve": self.curve, "seconds": self.seconds}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.curve, self.seconds = state["losses"], state["curve"], state["seconds"]

    def parameters_sha256(self) -> str:
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()


def new_training(args: argparse.Namespace, device: torch.device) -> Training:
    torch.manual_seed(args.seed)  # the same first parameters in a world of any size
    model = Detector(norm=args.norm != "none").to(device, getattr(torch, args.dtype))
    if args.norm == "sync":
        syncbn.convert_sync_batchnorm(model)
        syncbn.fuse_activations(model)
    syncbn.broadcast_parameters(model)
    return Training(model, torch.optim.AdamW(model.parameters(), lr=args.lr))


def stop_together(problem: str | None, comm: Communicator, device: torch.device) -> None:
    """Exit on every replica if any has a problem: one that left alone would leave its peers waiting."""
    problems = comm.all_reduce(torch.tensor([float(problem is not None)], device=device))
    if problems.item() > 0:
        raise SystemExit(f"detect_digits: {problem or 'another process cannot start; it says why'}")


def prepare(training: Training, args: argparse.Namespace, comm: Communicator) -> str | None:
    """Claim the output folder and take up its checkpoint if asked to; return what is in the way, if anything is."""
    path = args.output / "checkpoint.pt"
    try:
        if comm.rank == 0:
            args.output.mkdir(parents=True, exist_ok=True)
            lock(args.output / "lock")
        if args.resume and path.exists():
            state = load_checkpoint(path, next(training.model.parameters()).device)
            check_identity(state.get("identity", {}), identity(args, comm))
            # With local statistics every replica gets rank 0's running mean and variance, which training never reads.
            training.load(state)
    except (OSError, ValueError) as error:
        return str(error)
    if len(training.losses) > args.steps:
        return f"the checkpoint is {len(training.losses)} steps old already: ask for more than --steps {args.steps}"
    return None


def start_together(training: Training, args: argparse.Namespace, comm: Communicator, device: torch.device) -> None:
    """Resume on every replica from the same step, or exit on every one; rank 0 says which."""
    stop_together(prepare(training, args, comm), comm, device)
    steps = torch.zeros(comm.size, device=device)
    steps[comm.rank] = len(training.losses)
    steps = comm.all_reduce(steps)
    if (steps != steps[0]).any():
        each = ", ".join(f"{step:.0f}" for step in steps.tolist())
        raise SystemExit(
            f"detect_digits: the ranks found checkpoints of steps {each} in {args.output}: give a folder that all see"
        )
    if args.resume and comm.rank == 0:
        print(f"resuming after step {len(training.losses)} of {args.steps}" if training.losses else "no checkpoint yet")


def learning_rate(highest: float, step: int) -> float:
    """Warm-up, then decay; a function of the step alone, so that a resumed run can go further than was planned."""
    return highest * min((step + 1) / 20, (100 / (step + 1)) ** 0.5, 1.0)


def train_step(training: Training, args: argparse.Namespace, comm: Communicator) -> Tensor:
    """Take one step, and return the parts of the whole batch's loss, (3,), the same on every replica."""
    step = len(training.losses)
    # For layers that draw, like dropout; this detector has none. There is then no generator's state to save.
    torch.manual_seed(int(np.random.SeedSequence([args.seed, step, comm.rank]).generate_state(1)[0]))
    canvases = training_share(args.seed, step, comm.rank, comm.size, args.images_per_process)
    like = next(training.model.parameters())
    targets = targets_of(canvases, like)
    # Replicas hold unequal numbers of digits: divide by the whole batch's number, not by each one's own.
    parts = syncbn.global_mean(summed_losses(training.model(images_of(canvases, like)), targets), targets.count)
    training.optimizer.zero_grad()
    parts.sum().backward()
    syncbn.average_gradients(training.model)
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(args.lr, step)
    training.optimizer.step()
    training.losses.append(parts.sum().item())
    if not torch.isfinite(parts).all():
        raise SystemExit(f"detect_digits: the loss is {training.losses[-1]} at step {step}: lower --lr")
    return parts.detach()


class Reporter:
    """What rank 0 does beside training: evaluating, checkpoints, metrics, TensorBoard."""

    def __init__(self, args: argparse.Namespace, comm: Communicator, training: Training) -> None:
        self.began = time.perf_counter() - training.seconds
        self.output: Path = args.output
        self.identity = identity(args, comm)
        self.start = {
            "communicator": type(comm).__name__,
            "processes": comm.size,
            "images_per_process": args.images_per_process,
        }
        self.canvases = [make_canvas(args.seed, "test", index) for index in range(args.test_canvases)]
        self.writer = SummaryWriter(str(self.output), purge_step=len(training.losses))  # no lost step twice

    def losses(self, step: int, parts: Tensor) -> None:
        for name, part in zip(LOSS_PARTS, parts.tolist(), strict=True):
            self.writer.add_scalar(f"loss/{name}", part, step)
        self.writer.add_scalar("loss/total", parts.sum().item(), step)

    def evaluate(self, training: Training) -> None:
        """Average precision with rank 0's running statistics, as is usual; local batch norm has others elsewhere."""
        precision = average_precision(self.canvases, detect(training.model, self.canvases))
        training.curve.append((len(training.losses), precision))
        self.writer.add_scalar("AP at IoU 0.5", precision, len(training.losses))
        self.writer.flush()
        tqdm.write(f"step {len(training.losses)}: loss {training.losses[-1]:.4f}, AP at IoU 0.5 {precision:.3f}")

    def finish(self, training: Training) -> None:
        if not training.curve or training.curve[-1][0] < len(training.losses):
            self.evaluate(training)
        self.save(training)

    def save(self, training: Training) -> None:
        training.seconds = time.perf_counter() - self.began
        metrics = {
            **self.identity,
            **self.start,
            "seconds": training.seconds,
            "average_precision": training.curve,  # at IoU 0.5
            "losses": training.losses,
            "parameters_sha256": training.parameters_sha256(),
        }
        save_json(self.output / "metrics.json", metrics)
        save_checkpoint(self.output / "checkpoint.pt", {"identity": self.identity, **training.state()})


def train(training: Training, args: argparse.Namespace, comm: Communicator) -> None:
    """Train up to `args.steps`; only rank 0 evaluates and writes, and its peers wait for it in the next collective."""
    first = len(training.losses)
    reporter = Reporter(args, comm, training) if comm.rank == 0 else None
    # disable=None: no bar where there is no terminal.
    bar = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps, disable=None if reporter else True)
    for step in bar:
        parts = train_step(training, args, comm)
        if reporter is None:
            continue
        reporter.losses(step, parts)
        if step % args.eval_every == 0:
            reporter.evaluate(training)
        if step % args.checkpoint_every == 0:
            reporter.save(training)
    if reporter is not None:
        reporter.finish(training)


def main() -> None:
    args = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True)  # launchers read a pipe; show each line when it is printed
    comm = syncbn.init()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the GPUs, init has chosen ours
    torch.backends.cudnn.deterministic = True  # a resumed run repeats the uninterrupted one bit for bit
    training = new_training(args, device)
    start_together(training, args, comm, device)
    if comm.rank == 0:
        batch = f"{comm.size} x {args.images_per_process} = {comm.size * args.images_per_process} images a step"
        print(f"{type(comm).__name__} on {device}, {args.dtype}, --norm {args.norm}: {batch}")
    train(training, args, comm)
    if comm.rank == 0:
        loss, precision = training.losses[-1], training.curve[-1][1]
        print(f"final loss {loss:.6f}, AP at IoU 0.5 {precision:.3f} in {training.seconds:.0f} s; see {args.output}")


if __name__ == "__main__":
    main()
