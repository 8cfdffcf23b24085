"""Commands in processes of their own, for tests that stop them; and a small pipeline of such commands."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forks import Fork

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.integrity import write_run

# Small enough for a test, long enough for a kill to hit every phase: start, rounds, checkpoints, the final writes.
# Of 401 steps, a training's third round has but one.
PIPELINE = [
    line.split()
    for line in (
        "train-teacher --steps 401 --batch-size 8",
        "synthesize --method zskd --beta 1.0 0.1 --num-images 80 --batch-size 8 --iterations 30",
        "distill --transfer-set shards/ --steps 401 --batch-size 8",
    )
]
OUTPUTS = ["teacher", "shards", "student"]
DRIVER = """
import contextlib, io, json, sys
from dfkd_cli.cli.app import main
done = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(command)
    done.append([command, code, out.getvalue(), err.getvalue()])
json.dump(done, sys.stdout)
"""
HANGS = 1200  # seconds after which nobody waits any longer: a hundred times what any of the commands takes


def start(arguments: list[str], cwd: Path) -> Fork:
    """A command in a process that is forked: it works at once."""
    return Fork(arguments, cwd)


def start_fresh(arguments: list[str], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """A command in a new process that imports all it needs, with more variables in its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "dfkd_cli", *arguments],
        cwd=cwd,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(arguments: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command to its end. With more variables in its environment it is a new process, as it may read them early."""
    process = start_fresh(arguments, cwd, **env) if env else start(arguments, cwd)
    try:
        out, err = process.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode or 0, out, err)


def run_in_turn(
    commands: list[list[str]], cwd: Path, env: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Commands one after the other in one new process, which imports but once what all of them need."""
    environment = {**os.environ, **(env or {})}
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return [subprocess.CompletedProcess(*done) for done in json.loads(driver.stdout)]


def finish(arguments: list[str], cwd: Path) -> None:
    """Run a command to its end, which is a good one."""
    done = run(arguments, cwd)
    assert done.returncode == 0, done.stdout + done.stderr


def meeting() -> dict[str, str]:
    """Where the machines of a run meet: variables of the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def finish_on_two(arguments: list[str], cwd: Path) -> None:
    """Run a command to its good end in two processes, as two machines do: none of them has to import anything."""
    where = meeting()
    processes = [Fork([*arguments, "--num-nodes", "2"], cwd, NODE_RANK=str(rank), **where) for rank in (1, 0)]
    for process, (out, err) in [(process, process.communicate(timeout=HANGS)) for process in processes]:
        assert process.returncode == 0, out + err


def kill_after_saving(arguments: list[str], cwd: Path, checkpoint: Path) -> None:
    """Run a command that is killed (-9) as soon as it has saved its state."""
    process = Fork(arguments, cwd, signal_at=(checkpoint, signal.SIGKILL))
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == -signal.SIGKILL, out + err


def hashes(output: Path) -> dict[str, str]:
    """The hash of every result of a stage; run.json, with when it ran and for how long, is none."""
    files = (path for path in output.glob("[!.]*") if path.is_file() and path.name != "run.json")
    return {path.name: sha256_file(path) for path in files}


def edit(file: Path, **values: Any) -> None:
    """Change a JSON file as its author would: the ``run.json`` beside it, if any, has its hash."""
    run = file.parent / "run.json"
    if file == run:
        write_run(file.parent, json.loads(file.read_text()) | values)
        return
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    if run.exists():
        record = json.loads(run.read_text())
        for row in record["artifacts"]:
            row["sha256"] = sha256_file(file) if row["path"] == file.name else row["sha256"]
        if file.name in record["kept"]:
            record["kept"][file.name] = sha256_file(file)
        write_run(file.parent, record)
