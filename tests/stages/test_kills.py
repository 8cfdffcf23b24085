"""Killed at any moment, the same command finishes the work with the same bytes. Real processes, kill -9."""

from __future__ import annotations

import bisect
import itertools
import os
import random
import subprocess
import time
from pathlib import Path

from pipeline import OUTPUTS, PIPELINE, finish, hashes, start

KILLS = int(os.environ.get("DFKD_KILLS", "4"))  # `make kill-test` asks for more


def test_killed_pipeline_equals_uninterrupted(reference: tuple, tmp_path: Path) -> None:
    """kill -9 at random moments over the three stages, then the same command again."""
    expected, seconds, source = reference
    ends = list(itertools.accumulate(seconds))
    moments = random.Random(0)
    hits = 0
    for kill in range(KILLS):
        directory = tmp_path / f"kill{kill}"
        directory.mkdir()
        at = moments.uniform(0, ends[-1])
        stage = bisect.bisect(ends, at)
        for output in OUTPUTS[:stage]:
            (directory / output).symlink_to(source / output)
        process = start(PIPELINE[stage], directory)
        try:
            process.communicate(timeout=at - (ends[stage] - seconds[stage]))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            hits += 1
        finish(PIPELINE[stage], directory)
        output = OUTPUTS[stage]
        assert hashes(directory / output) == expected[output], f"kill {kill}: {output}"
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
    assert hashes(tmp_path / "student") == expected["student"]
