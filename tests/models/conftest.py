"""A user's own network, and one whose weights are in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dfkd_cli.models.registry import build

FACTORY = """
from torch import nn
import helper
def make(num_classes, input_size):
    c, h, w = input_size
    return nn.Sequential(nn.Flatten(), helper.linear(c * h * w, num_classes))
def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
def broken(num_classes):
    raise ValueError("two\\nlines")
def text():
    return "no module"
def square(num_classes=5, input_size=32):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * input_size * (input_size % 2), num_classes))
class Zoo:
    make = staticmethod(fixed)
    class Inner:
        @classmethod
        def make(cls, num_classes):
            return fixed()
net = fixed()
"""


@pytest.fixture
def user_code(tmp_path, monkeypatch) -> Path:
    (tmp_path / "user_net.py").write_text(FACTORY)
    (tmp_path / "helper.py").write_text("from torch import nn\nlinear = nn.Linear\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A network with other weights than those of one that a test draws, which is after seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build("resnet8", 10, (1, 8, 8))
