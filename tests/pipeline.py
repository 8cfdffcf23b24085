"""A small pipeline in processes of its own, for tests that kill it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

# Small enough for a test, long enough for a kill to hit every phase: start, rounds, checkpoints, the final writes.
PIPELINE = [
    ["train-teacher", "--steps", "1000", "--batch-size", "16"],
    [
        "synthesize",
        "--method",
        "zskd",
        "--beta",
        "1.0",
        "0.1",
        "--num-images",
        "160",
        "--batch-size",
        "8",
        "--iterations",
        "40",
    ],
    ["distill", "--transfer-set", "shards/", "--steps", "1000", "--batch-size", "16"],
]
RESULTS = ["teacher/model.safetensors", "teacher/model.json", "teacher/metrics.csv", "shards/manifest.json",
           "shards/metrics.csv", "shards/preview.png", "student/model.safetensors", "student/model.json",
           "student/metrics.csv"]  # fmt: skip


def start(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dfkd_cli", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(arguments: list[str], cwd: Path) -> None:
    """Run a command to its end."""
    process = start(arguments, cwd)
    out, err = process.communicate()
    assert process.returncode == 0, out + err


def kill_after_saving(arguments: list[str], cwd: Path, checkpoint: Path) -> None:
    """Start a command and kill -9 it once it has saved its state, before it has ended."""
    process = start(arguments, cwd)
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()


def hashes(directory: Path) -> dict[str, str]:
    """The hash of every result."""
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in RESULTS}
