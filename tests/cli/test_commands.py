"""What commands say of themselves: the command lines in their help work."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from dfkd_cli import catalog

GRID = """
grid:
  teacher: {steps: 1, batch_size: 2}
  synthesize: {num_images: 4}
  student: {steps: 1, batch_size: 2}
  rows: {noise: {synthesize: {method: noise}}}
"""


def write_mnist(root: Path, count: int) -> None:
    """So many images of noise in each half, in the files of MNIST."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for half in ("train", "t10k"):
        for kind, values in (("images-idx3", pixels), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
            (raw / f"{half}-{kind}-ubyte").write_bytes(head + values.tobytes())


@pytest.fixture
def pipeline(cli, teacher, tmp_path, monkeypatch) -> None:
    """The working directory of somebody who has come to the end, by the shortest way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFKD_DATA", str(tmp_path / "data"))
    write_mnist(tmp_path / "data", 20)
    shutil.copytree(teacher, "teacher")
    (tmp_path / "grid.yaml").write_text(GRID)
    for line in (
        "collect-metadata --num-images 20 --covariance-units 10",
        "synthesize --method noise --num-images 4",
        "distill --steps 1 --batch-size 2",
        "compare --recipe grid.yaml --out grid",
        "export --images 2",
    ):
        code, _, err = cli(*line.split())
        assert code == 0, err


@pytest.mark.usefixtures("pipeline")
def test_examples_and_what_is_said_to_come_next_can_be_typed(cli, tmp_path):
    lines = [line for command in catalog.commands().values() for line in (*command.examples, command.next)]
    assert sum(line.startswith("dfkd ") for line in lines) > len(catalog.commands())
    before = sorted(tmp_path.iterdir())
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "dfkd":  # else it is something to look at
            out = () if "out" in catalog.command(arguments[0]).ignores else ("--out=new",)
            code, _, err = cli(*arguments, *out, "--dry-run")
            assert code == 0, (line, err)
    assert sorted(tmp_path.iterdir()) == before
