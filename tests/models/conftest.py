"""A user's own network."""

from __future__ import annotations

from pathlib import Path

import pytest

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
