"""Whether two networks, or one network before and after, are the same in all that matters."""

from __future__ import annotations

import torch
from torch import nn

from dfkd_cli.models.classifier import Classifier


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether the second has all tensors of the first, bit for bit."""
    other = b.state_dict()
    return all(torch.equal(value, other[key]) for key, value in a.state_dict().items())


def state(teacher: Classifier) -> dict:
    """All that a method that asks a teacher could change in it."""
    hooks = [
        sum(len(v) for k, v in vars(m).items() if k.endswith("hooks")) + ("forward" in vars(m))
        for m in teacher.modules()
    ]
    tensors = {name: value.clone() for name, value in [*teacher.named_parameters(), *teacher.named_buffers()]}
    modes = [m.training for m in teacher.modules()], [p.requires_grad for p in teacher.parameters()]
    return {"hooks": hooks, "modes": modes, "grads": [p.grad for p in teacher.parameters()], "tensors": tensors}


def assert_same_state(after: dict, before: dict) -> None:
    """That two results of ``state`` are equal."""
    for name, value in before["tensors"].items():
        assert torch.equal(value, after["tensors"][name]), name
    for part in ("hooks", "modes", "grads"):
        assert after[part] == before[part], part
