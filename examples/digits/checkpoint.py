"""Files that are whole or absent, whenever the process is killed."""

import errno
import fcntl
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path` and rename at the end: a reader finds the old file or the new one, never a half."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # the bytes before the name, should the machine stop too
    os.replace(beside, path)


def lock(path: Path) -> None:
    """Claim `path` until this process ends, however it ends, or raise ValueError with the remedy.

    Two jobs would mix their files: plain torchrun, killed by SIGKILL, leaves its ranks behind, which train on. Where a
    file system has no locks, a warning is all.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)  # never closed: the lock goes with it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another job writes to {path.parent}: end it, or give another --output") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"{path} cannot be locked ({error.strerror}): see that no other job writes there", stacklevel=2)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    _write_atomically(path, lambda file: torch.save(state, file))


def save_json(path: Path, content: object) -> None:
    _write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint, or raise ValueError with the remedy."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: train into that folder first") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove it, and train anew") from error
    return dict(state)


def check_identity(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError if the checkpoint belongs to another training than the one that was asked for."""
    differing = [name for name in wanted if saved.get(name) != wanted[name]]
    if differing:
        found = ", ".join(f"{name} {saved.get(name)} (asked for: {wanted[name]})" for name in differing)
        raise ValueError(f"the checkpoint was made with {found}: ask for the same, or start afresh without --resume")
