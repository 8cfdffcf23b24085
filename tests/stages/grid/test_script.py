"""Grids as scripts of SLURM jobs: each is the planned command, and starts after those that it waits for."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_comparisons import results_in, students

from dfkd_cli import urls
from dfkd_cli.catalog import recipes
from dfkd_cli.cli import app
from dfkd_cli.errors import ConfigError
from dfkd_cli.settings import Layer, assigned_layer, recipe_layer, resolve
from dfkd_cli.stages.grid.planner import plan
from dfkd_cli.stages.grid.script import command_line, script

SBATCH = """#!/bin/sh
# Does what it is asked to do at once, where the jobs that it is to come after were done, and well.
set -eu
for word in "$@"; do
  case "$word" in
    --dependency=afterok:*)
      for id in $(printf %s "${word#*:}" | tr : ' '); do
        test -f "$JOBS/$id.done" || { echo "sbatch: no job $id" >&2; exit 1; }
      done ;;
    --wrap=*) command=${word#--wrap=} ;;
  esac
done
id=$(($(ls "$JOBS" | wc -l) + 100))
printf '%s\\n' "$@" > "$JOBS/$id.asked"
sh -c "$command" >&2
: > "$JOBS/$id.done"
echo "$id;cluster"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Where the jobs of a machine are seen whose ``sbatch`` carries them out, with the ``dfkd`` of these tests."""
    programs, jobs = tmp_path / "programs", tmp_path / "jobs"
    programs.mkdir()
    jobs.mkdir()
    (programs / "sbatch").write_text(SBATCH)
    (programs / "dfkd").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m dfkd_cli "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    root = str(Path(app.__file__).parents[2])
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.setenv("JOBS", str(jobs))
    return jobs


@pytest.mark.slow
def test_every_grid_of_the_recipes_can_be_planned_and_its_jobs_have_the_planned_settings(monkeypatch, capsys):
    """What a job waits for comes before it. Settings are those of each method, and with each objective, in a recipe."""
    understood = []
    monkeypatch.setattr(app, "run_stage", lambda settings, *_: understood.append(settings))
    seen = set()
    for name in sorted(name for name in recipes() if name.startswith("compare/")):
        before = set()
        for run in plan(resolve("compare", [recipe_layer(name, "compare")]), Path("a place")).runs:
            assert run.waits_for <= before, str(run)
            before.add(run.out)
            chosen = [part.entry.name for parts in run.settings.components.values() for part in parts]
            if (kind := (run.settings.command, *chosen)) not in seen:
                seen.add(kind)
                assert app.main(command_line(run.settings)[1:]) == 0, capsys.readouterr().err
                assert understood.pop().plain() == run.settings.plain()
    assert len(seen) > 40


def test_the_jobs_of_a_script_make_the_grid(slurm, teacher, tmp_path, monkeypatch, cli):
    place = tmp_path / "it's here"
    place.mkdir()
    monkeypatch.chdir(place)
    rows = {
        "zskd": {"synthesize": {"method": "zskd", "num_images": 8, "batch_size": 4, "iterations": 1, "beta": [1, 0.1]}}
    }
    grid = {"student": {"steps": 2, "batch_size": 4, "objective": {"response": {"weight": 0.5, "temperature": 3}}}}
    Path("grid.yaml").write_text(json.dumps({"grid": {"teacher": str(teacher), **grid, "rows": rows}}))
    command = ("compare", "--recipe", "grid.yaml", "--out", "out")
    code, _, err = cli(*command, "--dry-run", "--script", "jobs.sh")
    assert (code, "jobs.sh, and the record of out, were written" in err) == (0, True), err
    assert sorted(os.listdir()) == ["grid.yaml", "jobs.sh", "out"]
    done = subprocess.run(
        ["sh", place / "jobs.sh", "--partition=some where"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    asked = [(slurm / f"{number}.asked").read_text().splitlines() for number in (100, 102)]
    assert [line[1] for line in asked] == ["--job-name=zskd, seed 0: synthesize", "--job-name=zskd, seed 0: distill"]
    assert all("--partition=some where" in line for line in asked)
    assert ["--dependency=afterok:100" in line for line in asked] == [False, True]
    made = {path: path.stat().st_mtime_ns for path in Path("out/runs").rglob("model.safetensors")}
    code, _, err = cli(*command)
    assert code == 0, err
    assert made == {path: path.stat().st_mtime_ns for path in Path("out/runs").rglob("model.safetensors")} != {}
    assert cli(*command[:-1], "here")[0] == 0
    assert students(place / "out") == students(place / "here") != {}
    assert next(row["settings"] for row in results_in(place / "out")["sections"][0]["rows"][1:])["steps"] == 2
    record = json.loads((place / "out/runs/zskd/seed0/shards/run.json").read_text())
    assert record["argv"][1:4] == ["synthesize", "--method", "zskd"]

    code, _, err = cli(*command, "--dry-run", "--script", "jobs.sh")
    assert (code, "--script jobs.sh exists" in err) == (2, True)
    for wrong in (("--recipe", "grid.yaml"), ("--dry-run", "out")):
        code, _, err = cli("compare", *wrong, "--script", "more.sh")
        assert (code, "--script: is of a grid's plan" in err) == (2, True), err


def test_a_job_waits_for_what_it_reads_whatever_its_name(tmp_path, monkeypatch, slurm):
    """And a script that names a job that was never handed over fails: so does every one after it."""
    made = plan(resolve("compare", [recipe_layer("digits", "compare")]), tmp_path)
    text = script(made, "jobs.sh")
    (tmp_path / "jobs.sh").write_text(text.replace("--wrap='dfkd ", "--wrap='true "))
    done = subprocess.run(["sh", tmp_path / "jobs.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(slurm.glob("*.done"))) == len(made.runs)
    (tmp_path / "jobs.sh").write_text(text.replace("--wrap='dfkd ", "--wrap='false "))
    assert subprocess.run(["sh", tmp_path / "jobs.sh"], capture_output=True).returncode == 1


def test_what_lies_at_a_url_is_one_word_of_a_job(monkeypatch):
    """A URL is a stranger's text, and a script runs what is not quoted."""
    url = "https://host/x';touch$IFS/tmp/there;'y z"
    monkeypatch.setenv(urls.COPIES, json.dumps({url: "/cache/urls/12"}))
    rows = {"noise": {"synthesize": {"method": "noise"}}}
    settings = resolve("compare", [("", {"grid": {"teacher": "/cache/urls/12", "rows": rows}})])
    text = script(plan(settings, Path("out")), "jobs.sh")
    assert "/cache/urls" not in text
    (line, *_) = [line for line in text.splitlines() if line.startswith("job1=")]
    (wrapped,) = [
        word for word in shlex.split(line.partition("=$(")[2].removesuffix(")")) if word.startswith("--wrap=")
    ]
    assert f"inputs.teacher={url}" in shlex.split(wrapped.removeprefix("--wrap="))


def test_a_job_may_run_the_code_that_the_plan_named():
    settings = resolve("distill", [assigned_layer(['inputs.teacher=["./net.py:build"]'])])
    assert settings.code.may_run("./net.py:build")


@pytest.mark.parametrize("key", ["script", "engine", "address", "estimate", "gpus_per_run"])
def test_no_recipe_says_where_a_grid_runs_or_what_is_written(key):
    with pytest.raises(ConfigError, match=f"no recipe may say --{key}".replace("_", "-")):
        resolve(
            "compare",
            [Layer("their.yaml: ", {key: {"engine": "ray", "gpus_per_run": 1, "estimate": True}.get(key, "x")})],
        )
