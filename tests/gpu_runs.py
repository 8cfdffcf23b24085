"""Runs for whoever has a GPU for ten minutes: the most useful first, each cut to fit, continued by the next call.

    python tests/gpu_runs.py [--minutes 10] [--recipe cifar10-gpu] [--out gpu] [--device cuda] [--at-once 1] [--plan]

First of all it is looked whether there is a GPU, and the data (CIFAR-10 where `DFKD_DATA` says). Then the tests that
need a GPU, until they have passed once; what fails is said, and the rest goes on. Then the rows of the recipe, teacher
by teacher, by `dfkd compare --rows ROW ...`. It is told to stop when the time is over, and goes on in the next call.
Rows that are finished are written to `results/RECIPE.json`. Says at the end what is done, and what the next call will
do. Any Python does that has the packages, where none can be installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dfkd_cli.data import datasets
from dfkd_cli.errors import DfkdError

ROOT = Path(__file__).parents[1]
DFKD = (sys.executable, "-m", "dfkd_cli")
RESERVE = 60.0  # seconds at the end of a call: a run saves its state, finished rows are measured and written
STOP = 20.0  # seconds of these for saving


def planned(compare: list[str]) -> tuple[dict[str, list[Path]], set[str]]:
    """The directories of each row's commands, its teacher's among them, in the recipe's order; teachers' datasets."""
    plan = [*compare, "--device", "cpu", "--dry-run", "--json"]  # on machines without a GPU too
    answer = subprocess.run(plan, capture_output=True, text=True, check=False)
    if answer.returncode:
        sys.exit(answer.stderr)
    rows: dict[str, list[Path]] = {}
    teachers: dict[str, list[Path]] = {}
    data = set()
    for run in json.loads(answer.stdout)["plan"]:
        if not run["row"]:
            teachers.setdefault(run["teacher"], []).append(Path(run["out"]))
            data |= {run["config"]["dataset"]} if "dataset" in run["config"] else set()
            continue
        name = f"{run['teacher']}/{run['row']}" if run["teacher"] else run["row"]
        rows.setdefault(name, list(teachers.get(run["teacher"], ()))).append(Path(run["out"]))
    return rows, data


def check_machine(device: str, data: set[str]) -> None:
    """End with a message where the runs would find no GPU, or the test images of a dataset are not here."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that this torch can use: nothing was run")
    for name in data:
        try:
            datasets.load(name, "test", download=False)
        except DfkdError as error:
            sys.exit(f"{error}: nothing was run")


def record(directory: Path) -> dict[str, Any]:
    """The record of a run, empty before it starts."""
    file = directory / "run.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def finished(directories: list[Path]) -> bool:
    """Whether all commands of a row are done."""
    return all(record(directory).get("status") == "done" for directory in directories)


def say(rows: dict[str, list[Path]]) -> None:
    """What is done, and what comes next."""
    waiting = [name for name, directories in rows.items() if not finished(directories)]
    for name, directories in rows.items():
        seconds = sum(record(directory).get("seconds", 0) for directory in directories)
        state = "done" if name not in waiting else "next" if name == waiting[0] else "later"
        sys.stdout.write(f"{state:6}{name:32}{seconds:8.0f} s so far\n")


def run_until(command: list[str], end: float) -> int:
    """Run a command; when the time is over it is told to stop, and saves its state."""
    process = subprocess.Popen(command)
    try:
        return process.wait(max(end - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main() -> None:
    """One call."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--recipe", default="cifar10-gpu")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--at-once", type=int, default=1, help="commands that share the GPU")
    parser.add_argument("--plan", action="store_true", help="only say what is done and what comes next")
    a = parser.parse_args()
    end = time.monotonic() + 60 * a.minutes - RESERVE
    name = Path(a.recipe).stem
    grid = a.out / name
    compare = [*DFKD, "compare", "--recipe", a.recipe, "--out", str(grid)]
    rows, data = planned(compare)
    if not a.plan:
        check_machine(a.device, data)
    tested = a.out / "tested"
    if not (a.plan or tested.exists()):
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_cuda.py")]
        if status := run_until(tests, end):
            sys.stderr.write(f"the GPU's tests have not all passed: exit {status}; the next call runs them again\n")
        else:
            a.out.mkdir(parents=True, exist_ok=True)
            tested.touch()
    compare += ["--device", a.device]
    waiting = [row for row, directories in rows.items() if not finished(directories)]
    for _, group in itertools.groupby(waiting, lambda row: rows[row][0]):  # its teacher's directory
        if not a.plan and time.monotonic() < end:
            names = list(group)
            status = run_until([*compare, "--devices", str(a.at_once), "--rows", *names], end)
            if status not in (0, 128 + signal.SIGTERM):
                sys.stderr.write(f"{', '.join(names)}: exit {status}; the others go on\n")
    if not a.plan and (done := [row for row, directories in rows.items() if finished(directories)]):
        subprocess.run([*compare, "--rows", *done], check=True)
        shutil.copyfile(grid / "results.json", ROOT / "results" / f"{name}.json")
    say(rows)


if __name__ == "__main__":
    main()
