"""Killed at any moment, the same command finishes the work with the same bytes. Real processes, kill -9."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

from pipeline import PIPELINE, finish, hashes, start

KILLS = int(os.environ.get("DFKD_KILLS", "4"))  # `make kill-test` asks for more


def test_killed_pipeline_equals_uninterrupted(reference: tuple, tmp_path: Path) -> None:
    """kill -9 at random moments over the three stages, then the same commands again."""
    expected, seconds, _ = reference
    moments = random.Random(0)
    hits = 0
    for kill in range(KILLS):
        directory = tmp_path / f"kill{kill}"
        directory.mkdir()
        at = moments.uniform(0, sum(seconds))
        for arguments, duration in zip(PIPELINE, seconds, strict=True):
            if 0 <= at < duration:
                process = start(arguments, directory)
                try:
                    process.communicate(timeout=at)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    hits += 1
            at -= duration
            finish(arguments, directory)
        assert hashes(directory) == expected, f"kill {kill}"
    assert hits, "no kill hit a running command"


def test_killed_again_and_again(reference: tuple, tmp_path: Path) -> None:
    """A student whose training is killed as soon as it has saved something new, until it is finished."""
    expected, _, source = reference
    for name in ("teacher", "shards"):
        (tmp_path / name).symlink_to(source / name)
    checkpoint = tmp_path / "student" / "checkpoints" / "last.ckpt"
    kills = 0
    while True:
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start(PIPELINE[2], tmp_path)
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    assert kills >= 2
    finish(PIPELINE[2], tmp_path)
    assert {k: v for k, v in hashes(tmp_path).items() if k.startswith("student")} == {
        k: v for k, v in expected.items() if k.startswith("student")
    }
