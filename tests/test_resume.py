"""Killed at any moment, the same command finishes the work with the same bytes. Real processes, real signals."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = int(os.environ.get("DFKD_KILLS", "4"))  # `make kill-test` asks for more
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


def hashes(directory: Path) -> dict[str, str]:
    """The hash of every result."""
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in RESULTS}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[float], Path]:
    """The hashes and durations of an uninterrupted pipeline."""
    directory = tmp_path_factory.mktemp("reference")
    seconds = []
    for arguments in PIPELINE:
        begin = time.monotonic()
        finish(arguments, directory)
        seconds.append(time.monotonic() - begin)
    return hashes(directory), seconds, directory


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


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_run_and_keep_the_state(reference: tuple, tmp_path: Path, signum: int, code: int) -> None:
    """Ctrl-C and SIGTERM: the contract's exit codes, a status on disk, and the same result afterwards."""
    expected, _, source = reference
    (tmp_path / "teacher").symlink_to(source / "teacher")
    process = start([*PIPELINE[1], "--json"], tmp_path)
    while not (tmp_path / "shards" / "shard-00001.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signum)
    out, err = process.communicate()
    assert process.returncode == code, err
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert "Traceback" not in err
    assert json.loads((tmp_path / "shards" / "run.json").read_text())["status"] == "interrupted"
    finish(PIPELINE[1], tmp_path)
    assert (
        hashlib.sha256((tmp_path / "shards/manifest.json").read_bytes()).hexdigest() == expected["shards/manifest.json"]
    )


def test_the_same_command_again_changes_nothing(reference: tuple) -> None:
    """A finished result: exit 0, a message, untouched files."""
    _, _, directory = reference
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}
    for arguments in PIPELINE:
        process = start(arguments, directory)
        _, err = process.communicate()
        assert process.returncode == 0
        assert "already complete" in err
    assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file() and p.name != ".lock"}


def test_another_configuration_is_refused(reference: tuple) -> None:
    """Something else in --out: exit 2, naming what differs."""
    _, _, directory = reference
    process = start([*PIPELINE[1], "--temperature", "5"], directory)
    out, err = process.communicate()
    assert process.returncode == 2
    assert out == ""
    assert "temperature: 20.0 -> 5.0" in err
    assert len(err.strip().splitlines()) == 1


def test_a_damaged_shard_is_remade(reference: tuple, tmp_path: Path) -> None:
    """A finished set with a flipped bit heals by running its command again."""
    expected, _, source = reference
    (tmp_path / "teacher").symlink_to(source / "teacher")
    subprocess.run(["cp", "-r", source / "shards", tmp_path / "shards"], check=True)
    shard = tmp_path / "shards" / "shard-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    finish(PIPELINE[1], tmp_path)
    assert (
        hashlib.sha256((tmp_path / "shards/manifest.json").read_bytes()).hexdigest() == expected["shards/manifest.json"]
    )


def test_two_processes_make_the_shards_of_one(reference: tuple, tmp_path: Path) -> None:
    """--devices 2 on the CPU: rounds are shared, bytes are the same."""
    expected, _, source = reference
    (tmp_path / "teacher").symlink_to(source / "teacher")
    finish([*PIPELINE[1], "--device", "cpu", "--devices", "2"], tmp_path)
    assert (
        hashlib.sha256((tmp_path / "shards/manifest.json").read_bytes()).hexdigest() == expected["shards/manifest.json"]
    )


def test_dropped_and_reordered_inputs_are_another_run(reference: tuple, tmp_path: Path) -> None:
    """Every difference between two lists of inputs counts: one less, one more, another order."""
    _, _, source = reference
    for name in ("teacher", "shards"):
        (tmp_path / name).symlink_to(source / name)
    first = ["distill", "--steps", "1", "--transfer-set", "shards", "noise:10"]
    finish(first, tmp_path)
    for other in (["shards"], ["noise:10", "shards"], ["shards", "noise:10", "noise:20"]):
        process = start([*first[:4], *other], tmp_path)
        _, err = process.communicate()
        assert process.returncode == 2, other
        assert "holds another run" in err
