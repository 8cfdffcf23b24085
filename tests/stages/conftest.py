"""What comparisons are tested with: finished directories."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_comparisons import SMALL


@pytest.fixture(scope="session")
def made(tmp_path_factory, session_cli) -> Path:
    """A teacher, two shard sets that differ by seed, a student from each, a student from real images, a baseline."""
    place = tmp_path_factory.mktemp("made")
    commands = [
        ["train-teacher", "--steps", "60", "--batch-size", "32"],
        ["train-teacher", *SMALL, "--model", "lenet5-half", "--out", "baseline"],
        ["distill", *SMALL, "--transfer-set", "real:50", "--out", "real"],
    ]
    zskd = ["--method", "zskd", "--num-images", "32", "--batch-size", "32", "--iterations", "10"]
    learn = ["--steps", "40", "--batch-size", "16", "--rotate", "0", "--translate", "0", "--scale", "0"]
    for seed in ("0", "1"):
        commands.append(["synthesize", *zskd, "--out", f"shards{seed}", "--seed", seed])
        commands.append(
            ["distill", *learn, "--transfer-set", f"shards{seed}", "--out", f"student{seed}", "--seed", seed]
        )
    for command in commands:
        assert session_cli(place, *command) == 0, command
    return place


@pytest.fixture
def here(made, monkeypatch) -> Path:
    """The artifacts' directory as the working directory."""
    monkeypatch.chdir(made)
    return made
