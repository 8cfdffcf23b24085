"""Grids that are run: killed, continued, several commands at a time, with rows that fail."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from pipeline import edit, start
from tiny_comparisons import GRID, TEACHERS, accuracy, check_self_contained, results_in, students, tree

from dfkd_cli.regimes.virtual_teacher import VirtualTeacher
from dfkd_cli.settings import recipe_layer, resolve
from dfkd_cli.stages.grid.commands import carry_out
from dfkd_cli.stages.grid.planner import plan
from dfkd_cli.ui import NORMAL, QUIET


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, session_cli) -> Path:
    """A grid that nothing has stopped; no test may change it."""
    place = tmp_path_factory.mktemp("uninterrupted")
    (place / "grid.yaml").write_text(GRID)
    assert session_cli(place, "compare", "--recipe", "grid.yaml", "--out", "whole") == 0
    return place / "whole"


@pytest.fixture
def whole(uninterrupted, tmp_path, monkeypatch) -> dict[str, str]:
    """The hashes of its models; it lies in the working directory, which has its recipe."""
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(GRID)
    Path("whole").symlink_to(uninterrupted)
    return students(uninterrupted)


def test_a_grid_killed_in_the_middle_ends_as_if_it_had_not_been(whole, tmp_path, cli):
    assert len(whole) == 1 + 2 * 2 + 2
    assert len(set(whole.values())) == len(whole)
    (section,) = results_in(tmp_path / "whole")["sections"]
    rows = {row["label"]: row for row in section["rows"]}
    assert set(rows) == {"teacher", "zskd", "zskd-hot", "growing@4", "growing@6"}
    assert [rows[name]["seeds"] for name in ("zskd", "zskd-hot", "growing@4", "growing@6")] == [[0, 1]] * 2 + [[1]] * 2
    assert [rows[f"growing@{count}"]["num_images"] for count in (4, 6)] == [4, 6]
    lines = (tmp_path / "whole" / "table.md").read_text().splitlines()
    curve = [f"{100 * rows[f'growing@{count}']['top1']['mean']:.2f}" for count in (4, 6)]
    assert lines[-3:] == ["| IMAGES | 4 | 6 |", "| :-- | --: | --: |", f"| growing | {' | '.join(curve)} |"]
    assert not any("growing@" in line for line in lines)
    check_self_contained((tmp_path / "whole" / "report.html").read_text())
    assert rows["zskd"]["runs"][0]["shards"] == rows["zskd-hot"]["runs"][0]["shards"] != []
    assert rows["zskd-hot"]["settings"]["objective"]["response"]["temperature"] == 2

    command = ["compare", "--recipe", "grid.yaml", "--out", "killed"]
    process = start(command, tmp_path)
    while not (tmp_path / "killed" / "runs" / "zskd" / "seed1" / "shards" / "run.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finished = students(tmp_path / "killed")
    assert 0 < len(finished) < len(whole)
    code, _, err = cli("compare", "killed", "--out", "so-far")
    assert (code, "of 9 steps are finished" in err) == (0, True), err
    (section,), (full,) = (results_in(tmp_path / name)["sections"] for name in ("so-far", "whole"))
    known = {run["path"].partition("/")[2]: run["measures"] for row in full["rows"] for run in row["runs"]}
    seen = {run["path"].partition("/")[2]: run["measures"] for row in section["rows"] for run in row["runs"]}
    assert 0 < len(seen) == len(finished) < len(known)
    for name, measures in seen.items():
        assert measures["top1"] == known[name]["top1"]
    code, _, err = cli("compare", "so-far")
    assert (code, "so-far: a comparison without a grid" in err) == (3, True)
    code, _, err = cli("compare", "whole", "killed", "--out", "both")
    assert code == 0, err
    assert [s["teacher"] for s in results_in(tmp_path / "both")["sections"]] == ["whole", "killed"]
    stamps = {name: (tmp_path / "killed" / "runs" / name).stat().st_mtime_ns for name in finished}

    code, shown, err = cli("compare", "--recipe", "grid.yaml", "--out", "killed")
    assert code == 0, err
    assert "zskd-hot" in shown
    assert students(tmp_path / "killed") == whole
    assert stamps == {name: (tmp_path / "killed" / "runs" / name).stat().st_mtime_ns for name in finished}
    top1 = [[row["top1"] for row in results_in(tmp_path / name)["sections"][0]["rows"]] for name in ("whole", "killed")]
    assert top1[0] == top1[1]

    again = ("compare", "--recipe", "killed/config.yaml", "--out", "killed")
    code, _, err = cli(*again)
    assert (code, "already complete" in err) == (0, True)
    shutil.rmtree(tmp_path / "killed" / "runs" / "zskd-hot")
    code, _, err = cli(*again)
    told = "killed is already complete"
    assert (code, told in err, students(tmp_path / "killed") == whole) == (0, False, True), err
    assert told in cli(*again)[2]
    (tmp_path / "grid.yaml").write_text(GRID.replace("temperature: 2", "temperature: 3"))
    for option in ((), ("--dry-run",)):
        code, _, err = cli("compare", "--recipe", "grid.yaml", "--out", "killed", *option)
        place = Path("killed", "runs", "zskd-hot", "seed0", "student")
        assert (code, f"{place} holds another run: objective.response.temperature: 2.0 -> 3.0" in err) == (2, True), err

    grown = GRID + "    colder: {shards: zskd, seeds: [0], distill: {temperature: 3}}\n"
    (tmp_path / "grid.yaml").write_text(grown.replace("    growing: {shards: zskd, sizes: [6, 4], seeds: [1]}\n", ""))
    code, _, err = cli("compare", "--recipe", "grid.yaml", "--out", "killed")
    assert code == 0, err
    (section,) = results_in(tmp_path / "killed")["sections"]
    assert {row["label"] for row in section["rows"]} == {"teacher", "zskd", "zskd-hot", "colder"}
    kept = students(tmp_path / "killed")
    assert {name: sha for name, sha in kept.items() if name in whole} == whole
    assert stamps == {name: (tmp_path / "killed" / "runs" / name).stat().st_mtime_ns for name in finished}
    assert len(kept) == len(whole) + 1


def test_chosen_rows_of_a_grid_are_run_alone_and_are_the_same_in_the_whole(whole, tmp_path, cli):
    command = ["compare", "--recipe", "grid.yaml", "--out", "parts"]
    code, _, err = cli(*command, "--rows", "growing")
    assert code == 0, err
    first = students(tmp_path / "parts")
    assert {row["label"] for row in results_in(tmp_path / "parts")["sections"][0]["rows"]} == {
        "teacher", "growing@4", "growing@6",
    }  # fmt: skip
    made = {path.parent.relative_to(tmp_path / "parts" / "runs") for path in tmp_path.glob("parts/runs/**/run.json")}
    places = ("teacher", "zskd/seed1/shards", "growing@4/seed1/student", "growing@6/seed1/student")
    assert made == {Path(place) for place in places}
    assert "rows:\n- growing" in (tmp_path / "parts" / "config.yaml").read_text()
    code, _, err = cli(*command, "--rows", "growing")
    assert (code, "already complete" in err) == (0, True), err
    code, _, err = cli(*command)
    assert code == 0, err
    assert students(tmp_path / "parts") == whole
    assert first.items() < whole.items()


def test_two_commands_of_a_grid_at_a_time_make_what_one_makes(whole, tmp_path, cli):
    """Killed, continued and stopped, continued by one process: each time the others end too, and the same is made."""
    (tmp_path / "grid.yaml").write_text(GRID.replace("    growing: {shards: zskd, sizes: [6, 4], seeds: [1]}\n", ""))
    command = ["compare", "--recipe", "grid.yaml", "--out", "two"]
    for signum, what in ((signal.SIGKILL, "shards"), (signal.SIGTERM, "student")):
        process = start([*command, "--devices", "2"], tmp_path)
        while len(list((tmp_path / "two" / "runs" / "zskd").glob(f"seed?/{what}/run.json"))) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(signum)
        _, err = process.communicate()
        assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), err
        # Python itself complains where a process was being started when this one was killed.
        assert signum == signal.SIGKILL or "Traceback" not in err
    code, _, err = cli(*command)
    assert (code, "[7/7] zskd-hot, seed 1" in err) == (0, True), err
    assert students(tmp_path / "two") == {name: sha for name, sha in whole.items() if not name.startswith("growing")}


@pytest.mark.parametrize(("verbosity", "notes"), [(NORMAL, 1), (QUIET, 0)])
def test_what_a_row_notes_is_said_in_a_process_of_its_own_too(verbosity, notes, tmp_path, teacher, capsys):
    """Where nobody hears it yet, as here. Python would say it on stderr in any case, and bare."""
    net = "from torch import nn\ndef build(): return nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), nn.Softmax(1))\n"
    (tmp_path / "net.py").write_text(net)
    typed = {"teacher": str(teacher), "student": f"{tmp_path}/net.py:build", "transfer_set": ["noise:4"], "steps": 1}
    typed |= {"batch_size": 2, "out": str(tmp_path / "student"), "allow_code": True}
    settings = resolve("distill", [("--", typed)])
    carry_out(settings.plain(), settings.code.typed, verbosity, silent=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if "ends in probabilities" in line]
    assert len(lines) == notes and all(line.startswith("note: ") for line in lines), lines


def test_a_row_that_fails_does_not_lose_the_others(here, cli, monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal instruction\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(VirtualTeacher, "loss", refuse)
    grid = {"seeds": [0], "student": {"steps": 2, "batch_size": 4}}
    grid["rows"] = {
        "bad": {"distill": {"transfer_set": ["later"]}},
        "large": {"synthesize": {"method": "dfad", "num_images": 4, "latent": 10**13}, "cotrained": True},
        "broken": {"distill": {"method": "virtual-teacher", "transfer_set": ["real:20"]}},
        "real": {"distill": {"transfer_set": ["real:20"]}},
    }
    (here / "bad.yaml").write_text(json.dumps({"command": "compare", "grid": grid}))
    command = ("compare", "student0", "--recipe", "bad.yaml", "--teacher", "teacher", "--out", "partly")
    code, out, err = cli(*command)
    assert (code, "failed: bad, large, broken" in err) == (4, True), err
    assert "Compile with TORCH_USE_CUDA_DSA" in err  # its traceback
    assert "no transfer set at later" in out
    (section,) = results_in(here / "partly")["sections"]
    images = {row["label"]: row["num_images"] for row in section["rows"]}
    assert images == {"teacher": None, "real": 20, "zskd -> response": 32}
    assert [(f["row"], f["code"]) for f in section["failed"]] == [
        ("bad", "artifact"), ("large", "run_failed"), ("broken", "run_failed"),
    ]  # fmt: skip
    assert section["failed"][2]["message"] == "RuntimeError: CUDA error: an illegal instruction"
    for name in ("table.md", "report.html"):
        assert "no transfer set at later" in (here / "partly" / name).read_text()
    shutil.copytree(here / "shards0", here / "later")
    del grid["rows"]["large"], grid["rows"]["broken"]
    (here / "bad.yaml").write_text(json.dumps({"command": "compare", "grid": grid}))
    code, _, err = cli(*command)
    assert code == 0, err
    (section,) = results_in(here / "partly")["sections"]
    assert {row["label"] for row in section["rows"]} == {"teacher", "real", "bad", "zskd -> response"}
    assert section["failed"] == []


def test_a_rows_recipe_says_nothing_that_the_grid_decides(here, cli):
    """And a row does not compute otherwise than it says, as a command of its own does not."""
    (here / "made.yaml").write_text("method: noise\nnum_images: 8\nbatch_size: 4\ndeadline: 0s\nseed: 7\nout: other\n")
    row = {"synthesize": {"recipe": "made.yaml"}, "distill": {"steps": 1, "batch_size": 4}}
    half = {"distill": {"transfer_set": ["noise:4"], "steps": 1, "batch_size": 4, "precision": "16"}}
    (here / "own.yaml").write_text(
        json.dumps({"command": "compare", "grid": {"seeds": [0], "rows": {"a": row, "b": half}}})
    )
    code, _, err = cli("compare", "--recipe", "own.yaml", "--teacher", "teacher", "--device", "cpu", "--out", "own")
    assert (code, "failed: b" in err) == (4, True), err
    (section,) = results_in(here / "own")["sections"]
    assert [row["num_images"] for row in section["rows"]] == [None, 8]
    assert "--precision 16: not on a CPU" in section["failed"][0]["message"]


def test_no_row_is_begun_where_the_grids_own_teacher_fails(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    rows = {"noise": {"distill": {"transfer_set": ["noise:8"], "steps": 1}}}
    grid = {"seeds": [0], "teacher": {"steps": 50, "batch_size": 8, "lr": 1e30}, "rows": rows}
    Path("grid.yaml").write_text(json.dumps({"grid": grid}))
    code, out, err = cli("compare", "--recipe", "grid.yaml", "--out", "c", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (4, "run_failed"), err
    assert "teacher, seed 0: train-teacher -> c/runs/teacher failed" in err
    assert err.splitlines()[-1].startswith("error: round 0: cross_entropy is not finite -- lower --lr")
    assert json.loads(Path("c/run.json").read_text())["status"] == "failed"
    assert [path.name for path in Path("c/runs").iterdir()] == ["teacher"]
    assert not Path("c/results.json").exists()


def test_a_seed_is_not_typed_for_a_grid_which_has_its_own(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(GRID)
    for option in ((), ("--dry-run",)):
        code, _, err = cli("compare", "--recipe", "grid.yaml", "--seed", "3", *option)
        assert (code, err) == (2, "error: --seed 3: the grid has seeds of its own -- change grid.seeds\n")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


def test_rows_that_need_a_failed_one_are_not_run(here, cli):
    grid = {"seeds": [0, 1], "student": {"steps": 2, "batch_size": 4}}
    grid["rows"] = {
        "bad": {"distill": {"transfer_set": "nowhere,real:20"}, "export": {"calibrate": "noise:8"}},
        "second": {"taught_by": "bad", "distill": {"transfer_set": ["real:20"]}, "export": {}},
        "third": {"taught_by": "second", "distill": {"transfer_set": ["real:20"]}},
    }
    (here / "needs.yaml").write_text(json.dumps({"command": "compare", "grid": grid}))
    code, out, err = cli("compare", "--recipe", "needs.yaml", "--teacher", "teacher", "--out", "needs", "--json")
    assert (code, "failed: bad, second, third" in err) == (4, True)
    assert json.loads(out)["sections"] == results_in(here / "needs")["sections"]
    (section,) = results_in(here / "needs")["sections"]
    said = {(f["row"], f["seed"]): f["message"] for f in section["failed"]}
    assert len(said) == len(section["failed"]) == 6
    for seed in (0, 1):
        assert said["bad", seed].startswith("no transfer set at nowhere")
        assert said["second", seed] == "not run: it needs bad, which failed"
        assert said["third", seed] == "not run: it needs second, which failed"
    assert not (here / "needs" / "runs" / "second").exists()


def test_another_source_makes_another_run(here, tmp_path, cli, monkeypatch):
    """Paths of sources are no part of what a run is; in a grid they are what tells its rows apart."""
    shutil.copytree(here / "teacher", tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    grid = {"seeds": [0], "student": {"steps": 1, "batch_size": 4}}
    grid["synthesize"] = {"method": "noise", "num_images": 4}
    real = {"distill": {"transfer_set": ["real:20"]}}
    grid["rows"] = {"a": real, "b": {"synthesize": {}}, "c": {"shards": "b"}}
    assert cli("synthesize", "--teacher", "teacher", "--method", "noise", "--num-images", "5", "--out", "set")[0] == 0
    net = "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))\n"
    (tmp_path / "net.py").write_text(net)
    grid["rows"]["d"] = {"distill": {"transfer_set": ["set"], "student": "./net.py:net"}}
    recipe, teacher = tmp_path / "own.yaml", "teacher"

    def compare(*more: str) -> tuple[int, str]:
        recipe.write_text(json.dumps({"command": "compare", "grid": grid}))
        code, _, err = cli("compare", "--recipe", "own.yaml", "--teacher", teacher, *more)
        return code, err

    assert compare("--out", "own")[0] == 0
    before = tree(tmp_path, "own")
    for row, other, words in (
        ("a", {"distill": {"transfer_set": ["real:10"]}}, "transfer-set: real:20 instead of real:10"),
        ("c", {"taught_by": "b", "shards": "b"}, "teacher: what lies elsewhere instead of b/seed0/student"),
        ("c", {"distill": {"transfer_set": ["noise:4"]}}, "transfer-set: b/seed0/shards instead of noise:4"),
    ):
        usual, grid["rows"][row] = grid["rows"][row], other
        code, err = compare("--out", "own")
        directory = f"own/runs/{row}/seed0/student"
        assert (code, f"{directory} holds another run: {words}" in err, f"remove {directory}" in err) == (2, True, True)
        grid["rows"][row] = usual
    for more in (("--rows", "a", "--overwrite"), ("--dry-run", "--script", "jobs.sh", "--overwrite")):
        code, err = compare("--out", "own", *more)
        assert (code, "every row in own would be removed" in err) == (2, True)
    assert tree(tmp_path, "own") == before
    record = tmp_path / "own" / "runs" / "a" / "seed0" / "student"
    for left in record.iterdir():  # as if it had failed before it learned anything: there is nothing to lose
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name not in ("run.json", "config.yaml"):
            left.unlink()
    edit(record / "run.json", status="failed", artifacts=[])
    grid["rows"]["a"] = {"distill": {"transfer_set": ["real:10"]}}
    code, err = compare("--out", "own")
    assert code == 0, err
    shutil.copytree("own/runs/c/seed0/student", "outside")
    judge = "own/runs/a/seed0/student"  # of what is no grid's
    assert cli("compare", "own", "outside", "--teacher", judge, "--out", "both", "--allow-code")[0] == 0
    ranked, judged = results_in(tmp_path / "both")["sections"]
    assert sorted(row["label"] for row in ranked["rows"]) == ["a", "b", "c", "d", "teacher"]
    assert [row["runs"][0]["path"] for row in judged["rows"]] == [judge, "outside"]
    shutil.move("own", "elsewhere")  # and seen from there it is the same
    teacher = str(tmp_path / "teacher")
    code, err = compare("--out", str(tmp_path / "elsewhere"))
    assert (code, "elsewhere is already complete" in err) == (0, True)

    # What has changed outside is said by the row's own command; the others are none the worse.
    held = "elsewhere/runs/d/seed0/student holds another run: another"
    (tmp_path / "net.py").write_text(net.replace("(nn.F", "(nn.Dropout(), nn.F"))
    code, err = compare("--out", "elsewhere")
    assert (code, f"{held} architecture" in err) == (4, True), err
    (tmp_path / "net.py").write_text(net)
    (tmp_path / "set").rename(tmp_path / "former")
    assert cli("synthesize", "--teacher", "teacher", "--method", "noise", "--num-images", "6", "--out", "set")[0] == 0
    code, err = compare("--out", "elsewhere")
    assert (code, f"{held} transfer-set" in err) == (4, True), err


def test_a_row_that_cannot_be_made_again_is_not_shown_as_it_was(here, tmp_path, cli, monkeypatch):
    shutil.copytree(here / "teacher", tmp_path / "teacher")
    shutil.copytree(here / "shards0", tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    rows = {
        "a": {"distill": {"transfer_set": ["./shards"]}, "export": {}},
        "b": {"distill": {"transfer_set": "noise:4"}},
    }
    grid = {"seeds": [0], "student": {"steps": 1, "batch_size": 4}, "rows": rows}
    (tmp_path / "own.yaml").write_text(json.dumps({"command": "compare", "grid": grid}))
    assert cli("compare", "--recipe", "own.yaml", "--teacher", "teacher", "--out", "own")[0] == 0
    shutil.rmtree("shards")
    shutil.copytree(here / "shards1", "shards")
    edit(tmp_path / "own" / "run.json", status="failed")
    code, _, err = cli("compare", "--recipe", "own.yaml", "--teacher", "teacher", "--out", "own")
    assert (code, "failed: a" in err) == (4, True)
    assert [row["label"] for row in results_in(tmp_path / "own")["sections"][0]["rows"]] == ["teacher", "b"]


def test_a_foreign_teacher_needs_a_dataset_before_anything_runs(here, cli):
    (here / "foreign.yaml").write_text(
        '{"grid": {"rows": {"noise": {"distill": {"transfer_set": "noise:8", "steps": 2}}}}}'
    )
    teacher = ["--weights", "teacher/model.safetensors", "--input-size", "1", "32", "32", "--num-classes", "10"]
    command = ["compare", "--recipe", "foreign.yaml", "--teacher", "lenet5", *teacher, "--out", "foreign"]
    code, _, err = cli(*command)
    assert (code, "--dataset" in err, (here / "foreign").exists()) == (2, True, False)
    assert cli(*command, "--dataset", "digits")[0] == 0
    (section,) = results_in(here / "foreign")["sections"]
    assert [(row["label"], row["model"]) for row in section["rows"]] == [
        ("teacher", "lenet5"),
        ("noise", "lenet5-half"),
    ]


def test_a_teacher_per_seed_is_still_one_ranking(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    grid = {"seeds": [0, 3], "teacher": {"per_seed": True, "steps": 2, "batch_size": 4}}
    grid |= {"student": {"steps": 2, "batch_size": 4}, "rows": {"noise": {"distill": {"transfer_set": ["noise:8"]}}}}
    (tmp_path / "grid.yaml").write_text(json.dumps({"grid": grid}))
    assert cli("compare", "--recipe", "grid.yaml")[0] == 0
    (section,) = results_in(tmp_path / "comparison")["sections"]
    teacher, noise = section["rows"]
    assert teacher["seeds"] == noise["seeds"] == [0, 3]
    assert noise["gap"]["values"] == pytest.approx(np.subtract(noise["top1"]["values"], teacher["top1"]["values"]))
    assert len({run["sha256"] for run in teacher["runs"]}) == 2


def test_rows_are_run_with_every_teacher_and_ranked_by_teacher(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(TEACHERS)
    code, shown, err = cli("compare", "--recipe", "grid.yaml", "--out", "out")
    assert (code, "failed: large/bad" in err) == (4, True)
    runs = tmp_path / "out" / "runs"
    made = {str(path.parent.relative_to(runs)) for path in runs.rglob("model.json")}
    rows = {f"{name}/zskd/seed{seed}" for name in ("large", "small") for seed in (0, 1)} | {"small/again/seed1"}
    teachers = {"large/teacher/seed0", "large/teacher/seed1", "small/teacher"}
    assert made == teachers | {f"{row}/student" for row in rows}

    results = results_in(tmp_path / "out")
    large, small = results["sections"]
    assert (large["teacher"], small["teacher"]) == ("large", "small")
    assert {row["label"] for row in large["rows"]} == {"teacher", "zskd"}
    assert {row["label"] for row in small["rows"]} == {"teacher", "zskd", "again"}
    assert [[failure["row"] for failure in section["failed"]] for section in (large, small)] == [["bad"], []]
    zskd = [next(row for row in section["rows"] if row["label"] == "zskd") for section in (large, small)]
    assert [row["model"] for row in zskd] == ["lenet5-half", "lenet5-half-dafl"]
    assert [row["settings"]["steps"] for row in zskd] == [3, 2]
    top1 = {name: accuracy(runs / name) for name in sorted(teachers)}
    assert len(set(top1.values())) == 3, "equal teachers would hide a mistake"
    gaps = [run["gap"] for row in zskd for run in row["runs"]]
    students = [accuracy(tmp_path / run["path"]) for row in zskd for run in row["runs"]]
    assert gaps == pytest.approx(np.subtract(students, [*top1.values(), top1["small/teacher"]]).tolist())
    for text in (shown, *((tmp_path / "out" / name).read_text() for name in ("table.md", "report.html"))):
        assert "teacher large (lenet5): top-1" in text
        assert "teacher small (lenet5-half): top-1" in text


def test_a_students_student_is_ranked_by_the_grids_teacher(tmp_path, monkeypatch, cli):
    """Also where that teacher is a student itself, and with images made from it."""
    monkeypatch.chdir(tmp_path)
    small = {"steps": 2, "batch_size": 4}
    noise, made = {"transfer_set": ["noise:8"]}, {"method": "zskd", "num_images": 4, "iterations": 1}
    rows = {
        "second": {"taught_by": "first", "distill": {**noise, "temperature": 2}},
        "first": {"distill": noise},
        "third": {"taught_by": "second", "synthesize": made},
        "points": {"taught_by": "loop", "shards": "third", "sizes": [2]},
        "loop": {
            "synthesize": {"method": "dfad", "num_images": 4, **small, "width": 0.05, "latent": 4},
            "cotrained": True,
        },
        "pool": {"synthesize": made, "seeds": [1]},
        "both": {"taught_by": ["second", "teacher", "pool"], "shards": "pool"},
    }
    (tmp_path / "grid.yaml").write_text(json.dumps({"grid": {"seeds": [0, 1], "student": small, "rows": rows}}))
    assert cli("train-teacher", "--steps", "2", "--batch-size", "4", "--out", "root")[0] == 0
    assert cli("distill", "--teacher", "root", "--transfer-set", "noise:4", "--steps", "1", "--out", "given")[0] == 0
    code, _, err = cli("compare", "--recipe", "grid.yaml", "--teacher", "given", "--out", "grid")
    assert code == 0, err
    (section,) = results_in(tmp_path / "grid")["sections"]
    teacher, *students = section["rows"]
    assert [run["path"] for run in teacher["runs"]] == ["given"]
    assert {row["label"] for row in students} == {"first", "second", "third", "loop", "points@2", "pool", "both"}
    for row in students:
        seeds = 1 if row["label"] == "pool" else 2
        assert [run["teacher"] for run in row["runs"]] == [teacher["runs"][0]["sha256"]] * seeds
    taught = {
        "second": ["grid/runs/first/seed{}/student"],
        "third": ["grid/runs/second/seed{}/student"],
        "points@2": ["grid/runs/loop/seed{}/shards/student"],
        "both": ["grid/runs/second/seed{}/student", "given", "grid/runs/pool/seed1/student"],
    }
    sets = {"points@2": "third/seed{}/shards", "both": "pool/seed1/shards"}  # what a row of one seed makes serves all
    roles = ("teacher", "transfer-set")
    for row, places in taught.items():
        for seed in range(2):
            record = json.loads(Path("grid", "runs", row, f"seed{seed}", "student", "run.json").read_text())
            read = {role: [p.get("path") for p in record["parents"] if p["role"] == role] for role in roles}
            assert read["teacher"] == [place.format(seed) for place in places]
            assert row not in sets or read["transfer-set"] == [f"grid/runs/{sets[row].format(seed)}"]
    assert cli("compare", "grid", "--out", "again")[0] == 0
    assert {row["label"] for row in results_in(tmp_path / "again")["sections"][0]["rows"]} > set(taught)
    planned = plan(resolve("compare", [recipe_layer("grid.yaml", "compare")]), Path("grid")).runs
    loop, points = (next(run for run in planned if run.row == row and run.seed == 0) for row in ("loop", "points@2"))
    assert loop.out in points.waits_for and points.out not in loop.waits_for  # its teacher lies in the loop's shards
    (tmp_path / "grid.yaml").write_text((tmp_path / "grid.yaml").read_text().replace('"first", "d', '"loop", "d'))
    code, _, err = cli("compare", "--recipe", "grid.yaml", "--teacher", "given", "--out", "grid")
    words = "second/seed0/student holds another run: teacher: first/seed0/student instead of loop/seed0/shards/student"
    assert code == 2 and words in err, err
