"""A small pipeline in processes of its own, for tests that kill it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from dfkd_cli.artifacts.files import sha256_file

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
OUTPUTS = ["teacher", "shards", "student"]


def start(arguments: list[str], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """A command in a process of its own, with more variables in its environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
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


def hashes(output: Path) -> dict[str, str]:
    """The hash of every result of a stage; run.json, with when it ran and for how long, is none."""
    files = (path for path in output.glob("[!.]*") if path.is_file() and path.name != "run.json")
    return {path.name: sha256_file(path) for path in files}
