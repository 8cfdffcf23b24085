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
"""


@pytest.fixture
def user_code(tmp_path, monkeypatch) -> Path:
    (tmp_path / "user_net.py").write_text(FACTORY)
    (tmp_path / "helper.py").write_text("from torch import nn\nlinear = nn.Linear\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path
