"""Grids on a Ray cluster of two nodes on this machine: stopped, a node lost, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline import start
from tiny_comparisons import results_in, students

GRID = """
command: compare
grid:
  teacher: {steps: 3, batch_size: 8}
  student: {steps: 3, batch_size: 4}
  rows:
    zskd: {synthesize: {method: zskd, num_images: 8, batch_size: 4, iterations: 2}}
    real: {distill: {transfer_set: ["real:64"], steps: 801, batch_size: 8}}
    bad: {distill: {transfer_set: [nowhere]}}
"""
SMALL = {"include_dashboard": False, "object_store_memory": 2**27}


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """A cluster whose head does no work, so that its other nodes do all."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**SMALL, "num_cpus": 0})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(GRID)
    return tmp_path


def wait_for(happens: Callable[[], Any], process: Any) -> None:
    while not happens():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def figures(directory: Path) -> list[tuple[Any, ...]]:
    (section,) = results_in(directory)["sections"]
    failed = [(f["row"], f["code"], f["message"].partition(":")[0]) for f in section["failed"]]
    return [*((row["label"], row["top1"], row["gap"], row["num_images"]) for row in section["rows"]), *failed]


def test_a_grid_that_is_stopped_and_loses_a_node_is_the_one_that_is_made_here(here, cluster, cli):
    node = cluster.add_node(num_cpus=2, **SMALL)
    command = ["compare", "--recipe", "grid.yaml", "--out", "ray", "--engine", "ray", "--address", cluster.address]
    record, state = (
        here / "ray" / "runs" / "real" / "seed0" / "student" / name for name in ("run.json", "checkpoints")
    )
    process = start(command, here)
    wait_for(lambda: list(state.glob("*.ckpt")), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err.splitlines()[-1][:14]) == (130, "error: stopped"), err
    assert "Traceback" not in err
    assert json.loads(record.read_text())["status"] == "interrupted"  # the task has ended its process, which saved
    assert json.loads(record.read_text())["argv"][1:] == command
    places = {place.name: place.stat().st_mtime_ns for place in state.glob("[!.]*")}

    process = start([*command, "--json"], here)
    wait_for(lambda: {place.name: place.stat().st_mtime_ns for place in state.glob("[!.]*")} != places, process)
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1, **SMALL)
    out, err = process.communicate()
    assert (process.returncode, json.loads(out)["error"]["message"]) == (4, "failed: bad"), err
    assert "retries remaining" in err
    assert "state-dump" not in err
    assert f"zskd, seed 0: distill -> {Path('ray', 'runs', 'zskd', 'seed0', 'student')}: done" in err

    assert cli("compare", "--recipe", "grid.yaml", "--out", "local")[0] == 4
    assert students(here / "ray") == students(here / "local")
    assert len(students(here / "ray")) == 3
    assert figures(here / "ray") == figures(here / "local")
    sealed = [json.loads((here / name / "runs/zskd/seed0/shards/run.json").read_text()) for name in ("ray", "local")]
    assert sealed[0]["sealed"] == "landlock" or sealed[1]["sealed"] == "python"


@pytest.mark.parametrize(
    "options, message",
    [
        (("--engine", "ray", "--devices", "2"), "--devices 2: a cluster runs as many commands as it has room for"),
        (("--engine", "ray", "--gpus-per-run", "1.5"), "--gpus-per-run 1.5: more than one are whole"),
        (("--engine", "ray", "--address", "nonsense"), "--address nonsense: not an address"),
        (("--address", "host:6379"), "--address host:6379: only on a Ray cluster"),
        (("--gpus-per-run", "0.5"), "--gpus-per-run 0.5: only on a Ray cluster"),
        (("--engine", "slurm"), "--engine: 'slurm' is not a choice"),
    ],
)
def test_what_does_not_fit_together_is_said_before_anything_is_written(here, cli, options, message):
    if "ray" in options:
        pytest.importorskip("ray")
    code, _, err = cli("compare", "--recipe", "grid.yaml", "--out", "out", *options)
    assert (code, err.startswith(f"error: {message}"), err.count("\n")) == (2, True, 1), err
    assert not (here / "out").exists()


def test_ray_that_is_not_installed_or_not_needed(here, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = cli("compare", "--recipe", "grid.yaml", "--engine", "ray")
    assert (code, err) == (2, "error: --engine ray: Ray is not installed -- pip install 'dfkd[ray]'\n")
    code, _, err = cli("compare", "student", "--engine", "ray")
    assert (code, "there is no grid to run" in err) == (2, True)


def test_a_cluster_that_is_not_there_is_said_at_once(here, cli):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code, _, err = cli("compare", "--recipe", "grid.yaml", "--out", "out", "--engine", "ray", "--address", address)
    assert (code, err.count("\n")) == (4, 1), err
    assert err.startswith(f"error: --address {address}: ") and "is a Ray cluster running there?" in err
    assert os.listdir("out/runs") == [] if Path("out/runs").exists() else True
    assert json.loads(Path("out/run.json").read_text())["status"] == "failed"
