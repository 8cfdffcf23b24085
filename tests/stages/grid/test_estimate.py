"""How long a grid is said to take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfkd_cli.rounds.pilot import Pilot
from dfkd_cli.settings import recipe_layer, resolve
from dfkd_cli.stages.grid.estimate import _Pilots, simulate
from dfkd_cli.stages.grid.planner import plan

GRID = {
    "seeds": [0, 1],
    "teacher": {"steps": 401, "batch_size": 4},
    "synthesize": {"num_images": 8},
    "student": {"steps": 3, "batch_size": 4},
    "rows": {
        "zskd": {"synthesize": {"method": "zskd", "batch_size": 4, "iterations": 2}},
        "few": {"shards": "zskd", "sizes": [6], "seeds": [1]},
        "chain": {
            "distill": {"method": "takd", "assistants": ["lenet5-half"], "transfer_set": "noise:8"},
            "seeds": [0],
        },
        "long": {"synthesize": {"method": "zskd", "batch_size": 4, "iterations": 10_000_000}},
    },
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(json.dumps({"grid": GRID}))
    return tmp_path


def planned():
    return plan(resolve("compare", [recipe_layer("grid.yaml", "compare")]), Path("grid"))


def test_a_makespan_is_that_of_the_schedule(here):
    """By hand: teacher 10 s, shards 5 s, students 3 s; the others nothing. Each row has two seeds."""
    grid = planned()
    taken = {"train-teacher": 10.0, "synthesize": 5.0, "distill": 3.0}
    seconds = {run.out: taken[run.settings.command] if run.row in ("", "zskd") else 0.0 for run in grid.runs}
    assert simulate(grid, 1, seconds) == 10 + 2 * (5 + 3)
    assert simulate(grid, 2, seconds) == simulate(grid, 64, seconds) == 10 + 5 + 3
    uneven = seconds | {run.out: 9.0 for run in grid.runs if run.row == "few@6"}
    assert simulate(grid, 1, uneven) == 10 + 2 * (5 + 3) + 9
    assert simulate(grid, 2, uneven) == 10 + 5 + 3 + 9  # both students of zskd come first in the plan
    assert simulate(grid, 64, uneven) == 10 + 5 + 9


def test_rounds_that_were_done_stand_for_all():
    pilot = Pilot()
    pilot.rounds, pilot.starts = 10, [100.0, 103.0, 104.0, 106.0]  # the first takes 3 s, the others 1 s and 2 s
    assert pilot.seconds() == 3 + 9 * 1.5
    pilot.rounds, pilot.starts = 5, [100.0, 112.0]
    assert pilot.seconds() == 5 * 12


@pytest.mark.parametrize(("share", "expected"), [(0.25, 0.25 * 10 + 0.75 * 50), (0.0, 50), (1.0, 10)])
def test_rounds_in_which_a_student_rests_are_timed_apart(share, expected, tmp_path):
    class Timed(_Pilots):
        def _time_alike(self, settings):
            return {1.0: 10.0, 0.0: 50.0}[settings.method.config.warmup_share]

    typed = {"method": "nayer", "student": "resnet8", "warmup_share": share}
    assert Timed(tmp_path)._time(resolve("synthesize", [("--", typed)])) == expected


def test_an_estimate_times_each_command_once_and_writes_nothing(here, cli):
    code, out, err = cli("compare", "--recipe", "grid.yaml", "--out", "grid", "--dry-run", "--estimate", "--json")
    assert code == 0, err
    assert sorted(path.name for path in here.iterdir()) == ["grid.yaml"]
    estimate = json.loads(out)["estimate"]
    rows = {row["row"]: row for row in estimate["rows"]}
    assert set(rows) == {"teacher", "zskd", "few@6", "chain", "long"}
    assert list(estimate["unknown"]) == [str(run) for run in planned().runs if run.row == "chain"]
    assert rows["chain"]["seconds"] == 0 < rows["few@6"]["seconds"]
    # The others' commands are over within seconds here; ten million inner steps would not be: a few stand for all.
    assert rows["long"]["seconds"] > 100 * sum(rows[name]["seconds"] for name in ("teacher", "zskd", "few@6"))
    assert estimate["makespan"]["1"] == pytest.approx(sum(row["seconds"] for row in rows.values()), abs=1)
    spans = [estimate["makespan"][count] for count in ("1", "2", "8", "64")]
    assert spans == sorted(spans, reverse=True)
    assert spans[0] < 2.2 * spans[1]

    for wrong in (("--recipe", "grid.yaml"), ("--dry-run", "student")):
        code, _, err = cli("compare", *wrong, "--estimate")
        assert (code, "--estimate: is of a grid's plan" in err) == (2, True), err
