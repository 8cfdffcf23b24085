"""What is finished is kept: signals, the same command again, damage, several processes. Real processes."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pipeline import PIPELINE, finish, start


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


@pytest.mark.parametrize("method", ["zskd", "deepinversion"])
def test_two_processes_make_the_shards_of_one(method: str, make_teacher, tmp_path: Path, cli) -> None:
    """--devices 2 on the CPU: rounds are shared, bytes are the same, the statistics of a batch included."""
    command = ["synthesize", "--method", method, "--teacher", str(make_teacher("resnet8")), "--num-images", "6"]
    command += ["--batch-size", "2", "--iterations", "2", "--device", "cpu", "--out"]
    assert cli(*command, tmp_path / "one")[0] == 0
    finish([*command, "two", "--devices", "2"], tmp_path)
    names = [f"shard-0000{index}.safetensors" for index in range(3)]  # one more than processes have equal shares of
    for name in (*names, "manifest.json", "metrics.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


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
