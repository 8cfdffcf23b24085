"""What is finished is kept: kills, signals, the same command again, damage, several processes. Real processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Fork
from pipeline import HANGS, OUTPUTS, PIPELINE, edit, finish, hashes, kill_after_saving, meeting, run, run_in_turn, start


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, str]], list[float], Path]:
    """An uninterrupted pipeline: the hashes of each output, the seconds of each command, where it is."""
    directory = tmp_path_factory.mktemp("reference")
    for command in PIPELINE:
        finish(command, directory)
    seconds = [json.loads((directory / output / "run.json").read_text())["seconds"] for output in OUTPUTS]
    return {output: hashes(directory / output) for output in OUTPUTS}, seconds, directory


@pytest.mark.parametrize("stage", range(len(PIPELINE)), ids=OUTPUTS)
def test_killed_pipeline_equals_uninterrupted(stage: int, reference: tuple, tmp_path: Path) -> None:
    """kill -9 at a random moment of every stage, then the same command again; `make kill-test` tries more."""
    expected, seconds, source = reference
    moments, output, latest, killed = random.Random(stage), OUTPUTS[stage], seconds[stage], False
    directory = tmp_path / "killed"
    while not killed:  # a command that has ended before is begun again, and killed earlier
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for name in OUTPUTS[:stage]:
            (directory / name).symlink_to(source / name)
        process, latest = start(PIPELINE[stage], directory), moments.uniform(0, latest)
        try:
            process.communicate(timeout=latest)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed = process.returncode == -signal.SIGKILL
    finish(PIPELINE[stage], directory)
    assert hashes(directory / output) == expected[output]


@pytest.mark.parametrize("stage", [0, 2], ids=["teacher", "student"])
def test_killed_again_and_again(stage: int, reference: tuple, tmp_path: Path) -> None:
    """A network whose training is killed as soon as it has saved something new, until it is finished."""
    expected, _, source = reference
    for name in OUTPUTS[:stage]:
        (tmp_path / name).symlink_to(source / name)
    output = tmp_path / OUTPUTS[stage]
    for status in ("running", "running", "running", "done"):  # of three rounds each is saved once
        process = Fork(PIPELINE[stage], tmp_path, (output / "checkpoints" / "last.ckpt", signal.SIGKILL))
        _, err = process.communicate(timeout=HANGS)
        assert process.returncode == (0 if status == "done" else -signal.SIGKILL), err
        assert json.loads((output / "run.json").read_text())["status"] == status
    assert hashes(output) == expected[OUTPUTS[stage]]


def test_a_new_process_does_what_this_one_does(reference, tmp_path, monkeypatch, cli) -> None:
    """The commands that the other tests call here and in forks."""
    for name in OUTPUTS:
        (tmp_path / name).symlink_to(reference[2] / name)
    monkeypatch.chdir(tmp_path)
    commands = [
        line.split()
        for line in ("evaluate --json", "collect-metadata --covariance-units 20 --json", "compare student --json")
    ]

    def what_counts(answer: str) -> object:
        """Not where it lies, nor how long it took."""
        places = {"artifacts", "seconds", "latency_ms"}
        return json.loads(answer, object_hook=lambda part: {key: part[key] for key in part.keys() - places})

    for command, new in zip(
        commands, run_in_turn([[*command, "--out", f"{command[0]}-new"] for command in commands], tmp_path), strict=True
    ):
        code, out, err = cli(*command, "--out", f"{command[0]}-here")
        assert new.returncode == code == 0, new.stderr + err
        assert what_counts(new.stdout) == what_counts(out)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_the_run_and_keep_the_state(reference: tuple, tmp_path: Path, signum: int, code: int) -> None:
    """Ctrl-C, SIGTERM and a hang-up: the contract's exit codes, a status on disk, and the same result afterwards."""
    expected, _, source = reference
    (tmp_path / "teacher").symlink_to(source / "teacher")
    process = Fork([*PIPELINE[1], "--json"], tmp_path, (tmp_path / "shards" / "shard-00001.safetensors", signum))
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == code, err
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert "Traceback" not in err
    assert json.loads((tmp_path / "shards" / "run.json").read_text())["status"] == "interrupted"
    finish(PIPELINE[1], tmp_path)
    assert hashes(tmp_path / "shards") == expected["shards"]


def test_the_same_command_again_changes_nothing(reference: tuple, monkeypatch, cli) -> None:
    """A finished result: exit 0, a message, untouched files."""
    _, _, directory = reference
    monkeypatch.chdir(directory)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}
    for arguments in PIPELINE:
        code, _, err = cli(*arguments)
        assert code == 0
        assert "already complete" in err
    assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file() and p.name != ".lock"}


def test_another_configuration_is_refused(reference: tuple, monkeypatch, cli) -> None:
    """Something else in --out: exit 2, naming what differs."""
    monkeypatch.chdir(reference[2])
    code, out, err = cli(*PIPELINE[1], "--temperature", "5")
    assert code == 2
    assert out == ""
    assert "temperature: 20.0 -> 5.0" in err
    assert len(err.strip().splitlines()) == 1


def test_a_damaged_shard_is_remade(reference: tuple, tmp_path: Path, monkeypatch, cli) -> None:
    """A finished set with a flipped bit heals by running its command again."""
    expected, _, source = reference
    (tmp_path / "teacher").symlink_to(source / "teacher")
    shutil.copytree(source / "shards", tmp_path / "shards")
    shard = tmp_path / "shards" / "shard-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    assert cli(*PIPELINE[1])[0] == 0
    assert hashes(tmp_path / "shards") == expected["shards"]
    metrics = [json.loads((place / "shards" / "run.json").read_text())["metrics"] for place in (tmp_path, source)]
    assert metrics[0] == metrics[1]  # of shards that were there and the one that was made


@pytest.mark.parametrize("method", ["zskd", "deepinversion"])
def test_two_processes_make_the_shards_of_one(method: str, make_teacher, tmp_path: Path, cli) -> None:
    """--devices 2 on the CPU: rounds are shared, bytes are the same, the statistics of a batch included.

    Where something is replaced too: the place of temporary files, which the other process is told, is still there.
    """
    command = ["synthesize", "--method", method, "--teacher", str(make_teacher("resnet8")), "--num-images", "6"]
    command += ["--batch-size", "2", "--iterations", "2", "--device", "cpu", "--out"]
    assert cli(*command, tmp_path / "one")[0] == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    finish([*command, "two", "--devices", "2", "--overwrite"], tmp_path)
    names = [f"shard-0000{index}.safetensors" for index in range(3)]  # one more than processes have equal shares of
    for name in (*names, "manifest.json", "metrics.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.parametrize("lost", [0, 1, None])
def test_two_machines_make_the_shards_of_one(make_teacher, tmp_path: Path, cli, lost: int | None) -> None:
    """--num-nodes 2: the same command twice, each with its number; the first writes the records.

    Where a machine is lost, the other one's command fails, and the same commands go on.
    """
    names = [f"shard-0000{index}.safetensors" for index in range(4)]
    command = ["synthesize", "--method", "zskd", "--teacher", str(make_teacher("lenet5")), "--num-images", "8"]
    command += ["--batch-size", "2", "--iterations", "2", "--device", "cpu", "--out"]
    assert cli(*command, tmp_path / "one")[0] == 0
    both, where = [*command, "two", "--num-nodes", "2"], meeting()

    def machine(number: int, signal_at: tuple[Path, int] | None = None) -> Fork:
        return Fork(both, tmp_path, signal_at, NODE_RANK=str(number), **where)

    if lost is not None:
        first_of_it = tmp_path / "two" / names[lost]
        machines = [machine(number, (first_of_it, signal.SIGKILL) if number == lost else None) for number in (1, 0)]
        ends = {1 - index: process.communicate(timeout=HANGS)[1] for index, process in enumerate(machines)}
        assert machines[1 - lost].returncode == -signal.SIGKILL
        assert machines[lost].returncode == 4
        assert "error: a process was killed" in ends[1 - lost]
        assert not (tmp_path / "two" / names[2 + lost]).exists()
    for process in [machine(1), machine(0)]:
        _, err = process.communicate(timeout=HANGS)
        assert process.returncode == 0, err
    for name in (*names, "manifest.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    late = machine(1)  # all is done: it waits for nobody
    assert "already complete" in late.communicate(timeout=HANGS)[1]


@pytest.mark.parametrize(
    ("variables", "more", "words"),
    [
        ({}, [], "NODE_RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"NODE_RANK": "2"}, [], "NODE_RANK is 2 -- the machines' numbers are 0 to 1"),
        ({"NODE_RANK": "0"}, ["--overwrite"], "remove the directory first"),
    ],
)
def test_machines_that_cannot_meet(variables, more, words, teacher: Path, tmp_path: Path, monkeypatch, cli) -> None:
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | variables if variables else {}).items():
        monkeypatch.setenv(name, value)
    command = ["synthesize", "--method", "zskd", "--teacher", str(teacher), "--out", str(tmp_path / "s")]
    code, _, err = cli(*command, "--num-nodes", "2", *more)
    assert code == 2
    assert words in err
    assert not (tmp_path / "s").exists()
    assert cli("evaluate", teacher, "--num-nodes", "2")[0] == 2


def test_dropped_and_reordered_inputs_are_another_run(reference: tuple, tmp_path: Path, monkeypatch, cli) -> None:
    """Every difference between two lists of inputs counts: one less, one more, another order."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "shards"):
        Path(name).symlink_to(reference[2] / name)
    command = ["distill", "--steps", "1", "--transfer-set"]
    assert cli(*command, "shards", "noise:10")[0] == 0
    for other in (["shards"], ["noise:10", "shards"], ["shards", "noise:10", "noise:20"]):
        code, _, err = cli(*command, *other)
        assert code == 2, other
        assert "holds another run" in err


def test_a_training_that_goes_on_in_more_processes_says_so(reference: tuple, tmp_path: Path) -> None:
    """They share its batches, which is another result; how many there were is on record."""
    (tmp_path / "teacher").symlink_to(reference[2] / "teacher")
    command = ["distill", "--transfer-set", "noise:40", "--steps", "401", "--batch-size", "8", "--out", "student"]
    kill_after_saving(command, tmp_path, tmp_path / "student" / "checkpoints" / "last.ckpt")
    shutil.copytree(tmp_path / "student", tmp_path / "same")
    for out, before, told in (("student", 2, True), ("same", 1, False)):
        edit(tmp_path / out / "run.json", processes=before)
        done = run([*command[:-1], out], tmp_path)
        assert (done.returncode, f"begun in {before} and goes on in 1 processes" in done.stderr) == (0, told)
        record = json.loads((tmp_path / out / "run.json").read_text())
        assert record["processes"] == 1
        assert any("begun in" in concern for concern in record["concerns"]) == told


def test_a_run_goes_on_with_the_threads_it_began_with(reference: tuple, tmp_path: Path) -> None:
    """Killed with two, continued where one is the default: two, and the same bits; or one, where that is typed."""
    (tmp_path / "teacher").symlink_to(reference[2] / "teacher")
    few = ["synthesize", "--method", "zskd", "--num-images", "32", "--batch-size", "8", "--iterations", "5"]
    finish([*few, "--threads", "2", "--out", "whole"], tmp_path)
    command = [*few, "--out", "killed"]
    kill_after_saving([*command, "--threads", "2"], tmp_path, tmp_path / "killed" / "shard-00001.safetensors")
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    done = run(command, tmp_path)
    assert done.returncode == 0 and "goes on with 2 threads" in done.stderr, done.stderr
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["versions"]["threads"] == 2
    found, expected = hashes(tmp_path / "killed"), hashes(tmp_path / "whole")
    assert found | {"config.yaml": ""} == expected | {"config.yaml": ""}  # which says what was typed
    done = run([*few, "--threads", "1", "--out", "other"], tmp_path)
    assert done.returncode == 0 and "goes on with" not in done.stderr
    assert json.loads((tmp_path / "other" / "run.json").read_text())["versions"]["threads"] == 1


def test_processes_of_a_run_have_the_threads_that_are_recorded(make_teacher, tmp_path: Path) -> None:
    """Lightning would share the cores between them, whatever was typed."""
    command = ["synthesize", "--method", "zskd", "--teacher", str(make_teacher("lenet5")), "--num-images", "8"]
    command += ["--batch-size", "4", "--iterations", "1", "--device", "cpu", "--devices", "2", "--threads", "3"]
    (tmp_path / "told.py").write_text(TOLD)
    done = subprocess.run(
        [sys.executable, "told.py", *command], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS,
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("computes with 3 threads") == 2
    assert json.loads((tmp_path / "shards" / "run.json").read_text())["versions"]["threads"] == 3


TOLD = """
import sys
import torch
from dfkd_cli.synthesizers.base import Synthesizer

made = Synthesizer._stored
def told(self, *arguments):
    print(f"computes with {torch.get_num_threads()} threads", file=sys.stderr)
    return made(self, *arguments)
Synthesizer._stored = told
from dfkd_cli.__main__ import main

main()
"""
