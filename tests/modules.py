"""What makes up a module, and the ways to copy one."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import nn


def snapshot(module: nn.Module) -> list[Any]:
    """All that makes up a module: class, attributes, children and tensors by identity."""
    return [
        (
            m.__class__,
            {key: id(value) for key, value in m.__dict__.items()},
            {key: id(child) for key, child in m.named_children()},
            {key: id(value) for key, value in m.state_dict(keep_vars=True).items()},
        )
        for m in module.modules()
    ]


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": saved_and_loaded}
