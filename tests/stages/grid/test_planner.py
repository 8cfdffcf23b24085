"""The commands that a grid comes to, and which of them wait for which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_comparisons import GRID

from dfkd_cli import catalog
from dfkd_cli.settings import recipe_layer, resolve
from dfkd_cli.stages.grid.planner import plan

LOOP = '''"""A student in the loop."""
from dataclasses import dataclass
from dfkd_cli.synthesis_options import ImageOptimization

@dataclass(frozen=True, kw_only=True)
class Config(ImageOptimization):
    pass

class Loop:
    kind = "generator"
    needs = ("student",)
'''
LOOPS = """
grid:
  student: {student: alexnet}
  rows:
    loop: {synthesize: {method: loop}, cotrained: true}
    after: {shards: loop, distill: {student: alexnet-half}}
    both: {synthesize: {method: loop}, distill: {student: alexnet-half}}
    other: {synthesize: {method: loop, student: lenet5}}
    alone: {synthesize: {method: zskd}}
"""


def test_dry_run_plans_and_writes_nothing(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    code, out, _ = cli("compare", "--recipe", "grid.yaml", "--dry-run", "--json", "--device", "cpu")
    assert code == 0
    plan = json.loads(out)["plan"]
    assert [step["config"]["command"] for step in plan[:3]] == ["train-teacher", "synthesize", "distill"]
    assert len(plan) == 1 + 2 * 2 + 2 + 2
    assert all(step["config"]["device"] == "cpu" for step in plan)
    assert plan[2]["config"]["transfer_set"] == [plan[1]["out"]]
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


def test_what_is_typed_reaches_every_command_a_default_too(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(GRID)
    recipe["grid"]["student"]["precision"] = "bf16"
    (tmp_path / "grid.yaml").write_text(json.dumps(recipe))
    for flags, precision in (((), "bf16"), (("--precision", "32"), "32"), (("--set", "precision=32"), "32")):
        code, out, err = cli("compare", "--recipe", "grid.yaml", "--dry-run", "--json", *flags)
        assert code == 0, err
        configs = [step["config"] for step in json.loads(out)["plan"]]
        assert {config["precision"] for config in configs if config["command"] == "distill"} == {precision}


def test_how_commands_run_reaches_all_that_have_the_flag(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    typed = {"threads": 1, "logger": "tensorboard", "data_dir": "d", "code_dir": "c"}
    flags = [text for name, value in typed.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    code, out, err = cli("compare", "--recipe", "grid.yaml", "--dry-run", "--json", *flags)
    assert code == 0, err
    for config in (step["config"] for step in json.loads(out)["plan"]):
        wanted = typed | ({"data_dir": None} if config["command"] == "synthesize" else {})  # which opens no dataset
        assert {name: config.get(name) for name in typed} == wanted, config["command"]


@pytest.mark.parametrize("there", [False, True])
def test_each_run_waits_for_those_whose_results_it_reads(tmp_path, there):
    grid = {
        "seeds": [3, 4],
        "teacher": {"path": "lenet5"} if there else {"per_seed": True},
        "rows": {
            "again": {"taught_by": "loop", "shards": "lopes", "sizes": [4, 8], "distill": {"transfer_set": "noise:4"}},
            "lopes": {"synthesize": {"method": "lopes"}, "export": None},
            "loop": {"synthesize": {"method": "dfad"}, "cotrained": True, "export": {"bits": 8}},
            "own": {"export": {"model": "teacher"}, "synthesize": {"method": "noise"}},
            "real": {"taught_by": "lopes", "distill": {"transfer_set": ["real"]}},
        },
    }
    (tmp_path / "grid.yaml").write_text(json.dumps({"grid": grid}))
    runs = plan(resolve("compare", [recipe_layer(str(tmp_path / "grid.yaml"), "compare")]), Path("out")).runs
    reads = {}
    for seed in ("seed3", "seed4"):
        teacher, metadata = (set(), {"metadata"}) if there else ({f"teacher/{seed}"}, {f"metadata/{seed}"})
        reads |= {name: set() for name in teacher} | dict.fromkeys(metadata, teacher)
        reads |= {f"lopes/{seed}/shards": teacher | metadata, f"loop/{seed}/shards": teacher}
        reads[f"lopes/{seed}/student"] = teacher | {f"lopes/{seed}/shards"}
        reads[f"real/{seed}/student"] = {f"lopes/{seed}/student"}
        shards = {f"own/{seed}/shards"}
        reads |= {f"own/{seed}/shards": teacher, f"own/{seed}/export": teacher | shards}
        reads[f"loop/{seed}/export"] = {f"loop/{seed}/shards"}
        reads[f"lopes/{seed}/export"] = {f"lopes/{seed}/student", f"lopes/{seed}/shards"}
        reads |= {f"again@{n}/{seed}/student": {f"loop/{seed}/shards", f"lopes/{seed}/shards"} for n in (4, 8)}
    root = Path("out", "runs")
    assert {run.out: run.waits_for for run in runs} == {
        root / name: {root / place for place in places} for name, places in reads.items()
    }
    sets = {run.label: run.settings.inputs.calibrate for run in runs if run.settings.command == "export"}
    assert sets == {
        name: str(root / name.partition("/")[0] / "seed4/shards") for name in ("own", "loop/export", "lopes/export")
    }


@pytest.mark.parametrize(
    "rows, steps",
    [
        (["zskd-hot"], ["teacher", "zskd 0 synthesize", "zskd-hot 0", "zskd 1 synthesize", "zskd-hot 1"]),
        (["zskd"], ["teacher", "zskd 0 synthesize", "zskd 0", "zskd 1 synthesize", "zskd 1"]),
    ],
)
def test_chosen_rows_bring_what_they_are_made_from(tmp_path, monkeypatch, cli, rows, steps):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    code, out, err = cli("compare", "--recipe", "grid.yaml", "--dry-run", "--json", "--rows", *rows)
    assert code == 0, err
    planned = json.loads(out)["plan"]
    short = {"train-teacher": "teacher", "synthesize": "{row} {seed} synthesize", "distill": "{row} {seed}"}
    assert sorted(short[step["config"]["command"]].format(**step) for step in planned) == sorted(steps)


def test_rows_may_be_chosen_for_one_of_several_teachers(here, cli):
    text = """
command: compare
grid:
  teachers:
    given: {path: teacher}
    own: {recipe: digits}
  rows:
    zskd: {synthesize: {method: zskd}}
    noise: {synthesize: {method: noise}}
"""
    (here / "several.yaml").write_text(text)
    for rows, places in (
        (["given/zskd"], ["given/zskd/seed0/shards", "given/zskd/seed0/student"]),
        (["own/noise"], ["own/teacher", "own/noise/seed0/shards", "own/noise/seed0/student"]),
        (
            ["noise"],
            [f"{t}/noise/seed0/{w}" for t in ("given", "own") for w in ("shards", "student")] + ["own/teacher"],
        ),
    ):
        settings = resolve("compare", [recipe_layer("several.yaml", "compare")]).replace(rows=tuple(rows))
        grid = plan(settings, Path("out"))
        assert sorted(str(run.out) for run in grid.runs) == sorted(f"out/runs/{place}" for place in places)
        assert set(grid.existing) == ({"given"} if any("given" in place for place in places) else set())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--recipe", "grid.yaml", "--rows", "zksd"], "--rows: the grid has no row 'zksd' -- did you mean 'zskd'?"),
        (["student0", "--rows", "zskd"], "--rows: there is no grid"),
    ],
)
def test_rows_that_are_not_there_are_refused(here, cli, arguments, words):
    (here / "grid.yaml").write_text(GRID)
    code, _, err = cli("compare", *arguments, "--out", "rows")
    assert (code, words in err) == (2, True), err
    assert not (here / "rows").exists()


@pytest.mark.parametrize("student", ["student0", "w8a8:student0"])
def test_a_student_may_be_called_as_a_directory_that_is_there(here, cli, student):
    rows = {"noise": {"distill": {"transfer_set": ["noise:4"], "student": student}}}
    (here / "directory.yaml").write_text(json.dumps({"grid": {"rows": rows}}))
    code, _, err = cli("compare", "--recipe", "directory.yaml", "--teacher", "teacher", "--dry-run", "--out", "named")
    assert code == 0, err


def test_every_teacher_has_metadata_and_settings_of_its_own(here, cli):
    grid = {
        "teachers": {
            "made": {"steps": 5, "synthesize": {"num_images": 6}},
            "given": {"path": "teacher", "metadata": {"num_images": 40}, "student": {"student": "lenet5"}},
            "told": {"path": "teacher", "metadata": "some-metadata"},
        },
        "metadata": {"num_images": 30, "batch_size": 7},
        "synthesize": {"num_images": 8},
        "rows": {"lopes": {"synthesize": {"method": "lopes"}}, "noise": {"distill": {"transfer_set": ["noise:4"]}}},
    }
    grid["rows"]["noise"]["teachers"] = ["given"]
    (here / "metadata.yaml").write_text(json.dumps({"grid": grid}))
    code, out, _ = cli("compare", "--recipe", "metadata.yaml", "--dry-run", "--json")
    assert code == 0
    plan = [(step["teacher"], step["row"], step["config"]) for step in json.loads(out)["plan"]]
    commands = [(teacher, row, config["command"]) for teacher, row, config in plan]
    pair = [("lopes", "synthesize"), ("lopes", "distill")]
    assert commands == [
        *(("made", *step) for step in [("", "train-teacher"), ("", "collect-metadata"), *pair]),
        *(("given", *step) for step in [("", "collect-metadata"), *pair, ("noise", "distill")]),
        *(("told", *step) for step in pair),
    ]
    read = {(teacher, config["command"]): config for teacher, _, config in plan}
    collected = [read[name, "collect-metadata"] for name in ("made", "given")]
    assert [(c["teacher"], c["num_images"], c["batch_size"]) for c in collected] == [
        ("comparison/runs/made/teacher", 30, 7),
        ("teacher", 40, 7),
    ]
    synthesized = [read[name, "synthesize"] for name in ("made", "given", "told")]
    assert [s["metadata"] for s in synthesized] == [*(c["out"] for c in collected), "some-metadata"]
    assert [s["num_images"] for s in synthesized] == [6, 8, 8]
    students = [read[name, "distill"]["student"] for name in ("made", "given", "told")]
    assert students == ["lenet5-half", "lenet5", "lenet5-half"]


def test_a_row_may_be_other_with_one_teacher_key_by_key(here):
    text = """
command: compare
grid:
  teachers:
    given: teacher
    second: baseline
    third: teacher
  student: {epochs: 7, lr: 0.5}
  rows:
    zskd:
      synthesize: {method: zskd, iterations: 9, beta: [2, 1]}
      distill: {steps: 5}
      teachers: {given: {synthesize: {iterations: 4}, distill: {steps: 6, lr: 0.25}}, second: }
    soft:
      synthesize: {recipe: zskd-digits}
      teachers: {given: , third: {synthesize: {recipe: class-impressions-digits}}}
"""
    (here / "own.yaml").write_text(text)
    steps = plan(resolve("compare", [recipe_layer("own.yaml", "compare")]), Path("out")).runs
    made = {(s.teacher, s.row, s.settings.command): s.settings for s in steps}
    assert len(made) == len(steps) == 8
    synthesis, learning = ({t: made[t, "zskd", c] for t in ("given", "second")} for c in ("synthesize", "distill"))
    assert {t: (s.method.config.iterations, s.method.config.beta) for t, s in synthesis.items()} == {
        "given": (4, (2.0, 1.0)), "second": (9, (2.0, 1.0)),
    }  # fmt: skip
    assert {t: (s.inputs.steps, s.inputs.lr, s.inputs.epochs) for t, s in learning.items()} == {
        "given": (6, 0.25, 7), "second": (5, 0.5, 7),
    }  # fmt: skip
    names = {t: made[t, "soft", "synthesize"].method.entry.name for t in ("given", "third")}
    assert names == {"given": "zskd", "third": "class-impressions"}


@pytest.fixture
def loop(tmp_path, monkeypatch) -> None:
    """A method file with a student in the loop, for planning."""
    (tmp_path / "loop.py").write_text(LOOP)
    known = catalog.entries("synthesizers")
    monkeypatch.setitem(known, "loop", catalog._read(tmp_path / "loop.py", "synthesizers"))
    (tmp_path / "loop.yaml").write_text(LOOPS)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("loop")
def test_a_row_may_end_in_the_student_of_its_synthesis(cli):
    code, out, err = cli("compare", "--recipe", "loop.yaml", "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)["plan"]
    made = {(step["row"], step["config"]["command"]): step["config"]["student"] for step in plan[1:]}
    assert made == {
        ("loop", "synthesize"): "alexnet",
        ("after", "distill"): "alexnet-half",
        ("both", "synthesize"): "alexnet-half",
        ("both", "distill"): "alexnet-half",
        ("other", "synthesize"): "lenet5",
        ("other", "distill"): "alexnet",
        ("alone", "synthesize"): None,
        ("alone", "distill"): "alexnet",
    }
    models = [step["model"] for step in plan if step["row"] in ("loop", "after")]
    assert models == [f"comparison/runs/{path}/student" for path in ("loop/seed0/shards", "after/seed0")]


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize(
    "old, new, words",
    [
        ("{method: loop}, cotrained", "{method: zskd}, cotrained", "loop.cotrained: the method trains no student"),
        (
            "cotrained: true",
            "cotrained: true, sizes: [2]",
            "both cotrained and sizes -- another row with `shards: loop`",
        ),
        ("cotrained: true", "cotrained: true, distill: {lr: 1}", "both cotrained and distill"),
        ("{shards: loop,", "{shards: loop, cotrained: true,", "after.cotrained: a student is trained along with"),
    ],
)
def test_a_wrong_student_in_the_loop_is_refused(tmp_path, cli, old, new, words):
    assert old in LOOPS
    (tmp_path / "loop.yaml").write_text(LOOPS.replace(old, new, 1))
    code, _, err = cli("compare", "--recipe", "loop.yaml", "--dry-run")
    assert (code, words in err) == (2, True), err
