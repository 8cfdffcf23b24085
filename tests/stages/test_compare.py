"""``dfkd compare``: tables and pages of finished directories, and grids of pipelines. Tiny artifacts, real commands."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.benchmark import Timer

from dfkd_cli import catalog
from dfkd_cli.data import datasets
from dfkd_cli.models.directory import load_model
from dfkd_cli.report.readme import fill
from dfkd_cli.report.results import spread
from dfkd_cli.resolve import recipe_layer, resolve
from dfkd_cli.stages.grid import plan

SMALL = ("--steps", "2", "--batch-size", "8")
EVERYTHING = ("student0", "student1", "real", "baseline", "shards0")
GRID = """
command: compare
grid:
  seeds: [0, 1]
  teacher: {steps: 3, batch_size: 8}
  synthesize: {num_images: 8}
  student: {steps: 3, batch_size: 4}
  rows:
    zskd: {synthesize: {method: zskd, batch_size: 4, iterations: 2}}
    zskd-hot: {shards: zskd, distill: {temperature: 2}}
    growing: {shards: zskd, sizes: [6, 4], seeds: [1]}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, module_cli) -> Path:
    """A teacher, two shard sets that differ by seed, a student from each, a student from real images, a baseline."""
    place = tmp_path_factory.mktemp("made")
    commands = [
        ["train-teacher", "--steps", "60", "--batch-size", "32"],
        ["train-teacher", *SMALL, "--model", "lenet5-half", "--out", "baseline"],
        ["distill", *SMALL, "--transfer-set", "real:50", "--out", "real"],
    ]
    zskd = ["--method", "zskd", "--num-images", "32", "--batch-size", "32", "--iterations", "10"]
    learn = ["--steps", "40", "--batch-size", "16", "--rotate", "0", "--translate", "0", "--scale", "0"]
    for seed in ("0", "1"):
        commands.append(["synthesize", *zskd, "--out", f"shards{seed}", "--seed", seed])
        commands.append(
            ["distill", *learn, "--transfer-set", f"shards{seed}", "--out", f"student{seed}", "--seed", seed]
        )
    for command in commands:
        assert module_cli(place, *command) == 0, command
    return place


@pytest.fixture(scope="module")
def module_cli():
    """``module_cli(cwd, *args)``: the command line in this process, somewhere else; its exit code."""
    from dfkd_cli.cli.app import main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(cwd: Path, *args: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            return main([*args, "-q"])

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def quick_latency(monkeypatch) -> None:
    """No test here reads the latency; measuring it well would take most of the time."""
    quick = functools.partialmethod(Timer.blocked_autorange, min_run_time=0.01)
    monkeypatch.setattr(Timer, "blocked_autorange", quick)


@pytest.fixture
def here(made, monkeypatch) -> Path:
    """The artifacts' directory as the working directory."""
    monkeypatch.chdir(made)
    return made


def results_in(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def accuracy(path: Path) -> float:
    """Top-1 on the digits test images, by hand."""
    test = datasets.load("digits", "test")
    classifier, _ = load_model(path)
    with torch.no_grad():
        given = classifier.eval()(test.images(torch.arange(len(test))).float() / 255).argmax(1)
    return float(np.mean(given.numpy() == test.labels.numpy()))


def tree(root: Path, *names: str) -> dict[str, str]:
    """The hash of every file below some directories."""
    files = sorted(file for name in names for file in (root / name).rglob("*") if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Page(HTMLParser):
    """What a browser would fetch, run and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)


def check_self_contained(text: str) -> Page:
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    return page


# -- finished directories ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(made, dfkd) -> subprocess.CompletedProcess:
    """Everything that was made, compared into all/."""
    before = tree(made, ".")
    done = dfkd("compare", *EVERYTHING, "--out", "all", "--json", cwd=made)
    assert done.returncode == 0, done.stderr
    after = tree(made, ".")
    assert {name: sha for name, sha in after.items() if not name.startswith("all/")} == before, "an input changed"
    return done


def test_directories_become_table_json_markdown_and_page(made, compared):
    answer = json.loads(compared.stdout)
    assert answer["ok"]
    assert answer["command"] == "compare"
    results = results_in(made / "all")
    assert results["schema"] == 1
    assert answer["sections"] == results["sections"]

    (section,) = results["sections"]
    assert section["dataset"] == "digits"
    assert section["test_images"] == 360
    rows = {row["label"]: row for row in section["rows"]}
    assert section["rows"][0]["label"] == "teacher"
    assert set(rows) == {"teacher", "zskd -> response", "real:50 -> response", "supervised"}
    means = [row["top1"]["mean"] for row in section["rows"][1:]]
    assert means == sorted(means, reverse=True)

    teacher, zskd = accuracy(made / "teacher"), [accuracy(made / f"student{seed}") for seed in (0, 1)]
    assert zskd[0] != zskd[1], "equal values have no spread to test"
    row = rows["zskd -> response"]
    assert row["seeds"] == [0, 1]
    assert row["top1"]["values"] == pytest.approx(zskd)
    assert row["top1"]["mean"] == pytest.approx(np.mean(zskd))
    assert row["top1"]["sd"] == pytest.approx(np.std(zskd, ddof=1))
    assert row["gap"]["mean"] == pytest.approx(np.mean(zskd) - teacher)
    assert (row["data_free"], row["num_images"], row["parameters"]) == (True, 32, 35820)
    names = ("shards0", "shards1", "student0", "student1")
    runs = {name: json.loads((made / name / "run.json").read_text()) for name in names}
    synthesis = [runs["shards0"]["seconds"], runs["shards1"]["seconds"]]
    assert row["seconds"]["synthesis"]["values"] == synthesis
    assert row["seconds"]["training"]["values"][0] == runs["student0"]["seconds"]
    assert row["seconds"]["total"]["values"] == pytest.approx(
        [runs[f"shards{seed}"]["seconds"] + runs[f"student{seed}"]["seconds"] for seed in (0, 1)]
    )
    assert [row["runs"][0]["device"], row["runs"][0]["shards"][0]["device"]] == ["cpu", "cpu"]
    with (made / "student0" / "metrics.csv").open() as file:
        assert row["runs"][0]["last"]["soft"] == pytest.approx(float(list(csv.DictReader(file))[-1]["soft"]))
    real = rows["real:50 -> response"]
    assert (real["data_free"], real["num_images"], real["seconds"]["synthesis"]) == (False, 50, None)
    assert real["top1"]["sd"] is None
    assert real["seconds"]["total"]["values"] == real["seconds"]["training"]["values"]
    assert (rows["supervised"]["role"], rows["supervised"]["runs"][0]["path"]) == ("baseline", "baseline")
    assert rows["teacher"]["runs"][0]["measures"]["agreement"] == 1

    lines = (made / "all" / "table.md").read_text().splitlines()
    assert "360 test images of digits" in lines[0]
    assert "2 seeds" in lines[0]
    assert lines[0].endswith(" of work on cpu")
    assert f"top-1 {100 * teacher:.2f} %" in lines[0]
    cells = next(line for line in lines if line.startswith("| zskd")).split(" | ")
    assert cells[2] == f"{100 * np.mean(zskd):.2f} ± {100 * np.std(zskd, ddof=1):.2f}"
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1

    page = check_self_contained((made / "all" / "report.html").read_text())
    assert page.addresses.count(page.addresses[0]) == 1
    assert len(page.addresses) == 1 + 4 + 4  # the chart, curves of four rows, images and terms of shards0 and shards1
    for text in ("zskd -> response", "data-free", "loss terms", cells[2], runs["student0"]["versions"]["torch"]):
        assert any(text in shown for shown in page.texts), text


def test_snapshots_tell_what_other_stopping_points_would_have_given(here, compared, tmp_path, cli):
    student, out = tmp_path / "student", tmp_path / "out"
    learn = ("--steps", "600", "--batch-size", "8", "--holdout", "0.5", "--snapshots", "3")
    assert cli("distill", *learn, "--transfer-set", "shards0", "--out", student)[0] == 0
    kept = sorted((student / "snapshots").iterdir())
    assert [path.name for path in kept] == [f"round-0000{index}.safetensors" for index in range(3)]
    assert kept[-1].read_bytes() == (student / "model.safetensors").read_bytes()

    assert cli("compare", student, "student0", "--out", out)[0] == 0
    row, plain = (r for r in results_in(out)["sections"][0]["rows"] if r["role"] == "student")
    if row["runs"][0]["path"] != str(student):
        row, plain = plain, row
    assert plain["selected"] is plain["best_test"] is None
    with (student / "metrics.csv").open() as file:
        agreement = [float(line["agreement"]) for line in csv.DictReader(file)]
    by_hand = {}
    for index, path in enumerate(kept):
        moved = shutil.copytree(student, tmp_path / path.stem)
        shutil.copy(path, moved / "model.safetensors")
        record = json.loads((moved / "model.json").read_text())
        record["weights"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (moved / "model.json").write_text(json.dumps(record))
        by_hand[index] = accuracy(moved)
    assert by_hand[0] != by_hand[2], "equal values would hide a mistake"
    chosen = max(by_hand, key=lambda index: (agreement[index], index))
    assert row["runs"][0]["selected"] == {"round": chosen, "top1": pytest.approx(by_hand[chosen])}
    assert row["best_test"]["values"] == [pytest.approx(max(by_hand.values()))]
    assert row["top1"]["values"] == [pytest.approx(by_hand[2])]
    heads = (out / "table.md").read_text(), (here / "all" / "table.md").read_text()
    assert ["BEST TEST %" in head for head in heads] == [True, False]


def test_a_student_may_learn_from_the_first_images_only(here, tmp_path, cli):
    learn = ("distill", *SMALL, "--transfer-set", "shards0", "--out", tmp_path / "student")
    code, _, err = cli(*learn, "--num-images", "33")
    assert (code, "the transfer sets have 32 images" in err) == (2, True)
    assert cli(*learn, "--num-images", "12")[0] == 0
    assert json.loads((tmp_path / "student" / "run.json").read_text())["num_images"] == 12


def test_a_gate_closes_after_everything_was_written(here, cli):
    code, out, err = cli("compare", "student0", "--out", "gate", "--fail-below", "0.999")
    assert code == 5
    assert "student0" in err
    assert "zskd -> response" in out
    assert (here / "gate" / "report.html").is_file()
    code, out, err = cli("compare", "student0", "--out", "gate", "--fail-below", "0")
    assert (code, "already complete" in err) == (0, True)
    assert "zskd -> response" in out
    code, _, err = cli("compare", "baseline", "--out", "no-student", "--fail-below", "0.999")
    assert (code, "there is no student" in err) == (2, True)


def test_measures_are_taken_once(here, compared, cli):
    shutil.copytree("all", "once")
    file = here / "once" / "measurements.json"
    known = json.loads(file.read_text())
    for measures in known.values():
        measures["top1"] = 0.125
    file.write_text(json.dumps(known))
    (here / "once" / "report.html").unlink()
    assert cli("compare", *EVERYTHING, "--out", "once")[0] == 0
    assert {row["top1"]["mean"] for row in results_in(here / "once")["sections"][0]["rows"]} == {0.125}
    assert (here / "once" / "report.html").is_file()
    code, _, err = cli("compare", "student1", "teacher", "--out", "once")
    assert (code, "holds another run" in err) == (2, True)


def test_a_copy_is_no_repeat(here, cli):
    shutil.copytree("student0", "copy")
    assert cli("compare", "student0", "copy", "teacher", "--out", "copies")[0] == 0
    (row,) = (row for row in results_in(here / "copies")["sections"][0]["rows"] if row["role"] == "student")
    assert (len(row["runs"]), row["top1"]["sd"]) == (1, None)


def test_students_of_two_teachers_are_never_ranked_together(here, cli):
    assert cli("train-teacher", *SMALL, "--seed", "7", "--out", "other")[0] == 0
    arguments = ("--teacher", "other", "--transfer-set", "real:50", "--out", "others-student")
    assert cli("distill", *SMALL, *arguments)[0] == 0
    assert cli("compare", "student0", "others-student", "--out", "mixed")[0] == 0
    sections = results_in(here / "mixed")["sections"]
    found = [[row["runs"][0]["path"] for row in section["rows"]] for section in sections]
    assert found == [["teacher", "student0"], ["other", "others-student"]]
    assert (here / "mixed" / "table.md").read_text().count("| ROW |") == 2


def test_a_student_finds_its_teacher_from_anywhere_or_says_what_to_do(made, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    assert cli("compare", made / "student0")[0] == 0
    (row,) = [r for r in results_in(tmp_path / "comparison")["sections"][0]["rows"] if r["role"] == "student"]
    assert row["seconds"]["synthesis"] is not None
    shutil.copytree(made / "student0", tmp_path / "lonely" / "student")
    code, _, err = cli("compare", "lonely/student", "--out", "no")
    assert (code, "--teacher" in err, (tmp_path / "no").exists()) == (3, True, False)
    assert cli("compare", "lonely/student", "--teacher", made / "teacher", "--out", "yes")[0] == 0
    (row,) = [r for r in results_in(tmp_path / "yes")["sections"][0]["rows"] if r["role"] == "student"]
    assert row["seconds"]["training"] is not None
    assert row["seconds"]["total"] is None, "nobody knows how long its shards took"


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["missing"], 3, "missing"),
        (["student0", "missing"], 3, "missing"),
        ([], 2, "no models to compare"),
        (["shards0"], 2, "no models to compare"),
        (["student0", "--dataset", "digitz"], 2, "did you mean 'digits'"),
    ],
)
def test_what_cannot_be_compared_is_refused(here, cli, arguments, code, words):
    got, out, err = cli("compare", *arguments, "--out", "refused")
    assert (got, out) == (code, "")
    assert words in err
    assert not (here / "refused" / "results.json").exists()


def test_hostile_names_are_only_text(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    hostile = "<img src=x onerror=alert(1)>&"
    for half in ("train", "test"):
        for label in (hostile, "b|`[bold]"):
            (tmp_path / "data" / half / label).mkdir(parents=True)
            for number in range(2):
                Image.new("L", (32, 32), 40 * number).save(tmp_path / "data" / half / label / f"{number}.png")
    assert cli("train-teacher", "--dataset", "data", "--steps", "1", "--batch-size", "2")[0] == 0
    out = "<script>$x$|[red]"
    assert cli("distill", "--transfer-set", "noise:4", "--steps", "1", "--batch-size", "2", "--out", out)[0] == 0
    (tmp_path / out / "run.json").unlink()  # without it, the row is called by its path
    code, shown, err = cli("compare", out)
    assert code == 0, err
    assert out in shown
    page = check_self_contained((tmp_path / "comparison" / "report.html").read_text())
    assert hostile in page.texts
    assert out in page.texts
    lines = (tmp_path / "comparison" / "table.md").read_text().splitlines()
    head, line = (next(x for x in lines if word in x) for word in ("| ROW |", "script"))
    assert len(re.findall(r"(?<!\\)\|", line)) == head.count("|")


def test_equal_labels_are_told_apart_by_what_differs(here, cli):
    for temperature in ("3", "20"):
        arguments = ("--transfer-set", "noise:8", "--temperature", temperature, "--out", f"t{temperature}")
        assert cli("distill", *SMALL, *arguments)[0] == 0
    assert cli("compare", "t3", "t20", "--out", "labels")[0] == 0
    labels = {row["label"] for row in results_in(here / "labels")["sections"][0]["rows"]}
    assert labels == {"teacher", "noise:8 -> response (temperature 20.0)", "noise:8 -> response (temperature 3.0)"}


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.75], [0.9, 0.8, 0.85, 0.1]])
def test_spread_is_mean_and_sample_deviation(values):
    made = spread([*values, None])
    assert made["mean"] == pytest.approx(np.mean(values))
    assert made["sd"] == (pytest.approx(np.std(values, ddof=1)) if len(values) > 1 else None)
    assert spread([None]) is None


# -- grids -------------------------------------------------------------------------------------------------------------


def students(directory: Path) -> dict[str, str]:
    """The hash of every model of a grid."""
    runs = directory / "runs"
    return {name: sha for name, sha in tree(runs, ".").items() if name.endswith("model.safetensors")}


def test_a_grid_killed_in_the_middle_ends_as_if_it_had_not_been(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    code, shown, err = cli("compare", "--recipe", "grid.yaml", "--out", "whole")
    assert code == 0, err
    whole = students(tmp_path / "whole")
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
    assert "zskd-hot" in shown

    command = [sys.executable, "-m", "dfkd_cli", "compare", "--recipe", "grid.yaml", "--out", "killed"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "runs" / "zskd" / "seed1" / "shards" / "run.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
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

    code, _, err = cli("compare", "--recipe", "grid.yaml", "--out", "killed")
    assert code == 0, err
    assert students(tmp_path / "killed") == whole
    assert stamps == {name: (tmp_path / "killed" / "runs" / name).stat().st_mtime_ns for name in finished}
    top1 = [[row["top1"] for row in results_in(tmp_path / name)["sections"][0]["rows"]] for name in ("whole", "killed")]
    assert top1[0] == top1[1]

    code, _, err = cli("compare", "--recipe", "killed/config.yaml", "--out", "killed")
    assert (code, "already complete" in err) == (0, True)
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


def test_chosen_rows_of_a_grid_are_run_alone_and_are_the_same_in_the_whole(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    assert cli("compare", "--recipe", "grid.yaml", "--out", "whole")[0] == 0
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
    assert students(tmp_path / "parts") == students(tmp_path / "whole")
    assert first.items() < students(tmp_path / "whole").items()


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


def test_two_commands_of_a_grid_at_a_time_make_what_one_makes(tmp_path, monkeypatch, cli):
    """Killed, continued and stopped, continued by one process: each time the others end too, and the same is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID.replace("    growing: {shards: zskd, sizes: [6, 4], seeds: [1]}\n", ""))
    assert cli("compare", "--recipe", "grid.yaml", "--out", "one")[0] == 0
    command = ["compare", "--recipe", "grid.yaml", "--out", "two"]
    for signum, what in ((signal.SIGKILL, "shards"), (signal.SIGTERM, "student")):
        process = subprocess.Popen(
            [sys.executable, "-m", "dfkd_cli", *command, "--devices", "2"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        while len(list((tmp_path / "two" / "runs" / "zskd").glob(f"seed?/{what}/run.json"))) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)  # until nobody has its stderr open any more
        assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), err
        assert "Traceback" not in err
    code, _, err = cli(*command)
    assert (code, "[7/7] zskd-hot, seed 1" in err) == (0, True), err
    assert students(tmp_path / "two") == students(tmp_path / "one")


def test_a_row_that_fails_does_not_lose_the_others(here, cli):
    grid = {"seeds": [0], "student": {"steps": 2, "batch_size": 4}}
    grid["rows"] = {
        "bad": {"distill": {"transfer_set": ["later"]}},
        "large": {"synthesize": {"method": "dfad", "num_images": 4, "latent": 10**13}, "cotrained": True},
        "real": {"distill": {"transfer_set": ["real:20"]}},
    }
    (here / "bad.yaml").write_text(json.dumps({"command": "compare", "grid": grid}))
    command = ("compare", "student0", "--recipe", "bad.yaml", "--teacher", "teacher", "--out", "partly")
    code, out, err = cli(*command)
    assert (code, "failed: bad, large" in err) == (4, True)
    assert "no transfer set at later" in out
    (section,) = results_in(here / "partly")["sections"]
    images = {row["label"]: row["num_images"] for row in section["rows"]}
    assert images == {"teacher": None, "real": 20, "zskd -> response": 32}
    assert [(f["row"], f["code"]) for f in section["failed"]] == [("bad", "artifact"), ("large", "run_failed")]
    for name in ("table.md", "report.html"):
        assert "no transfer set at later" in (here / "partly" / name).read_text()
    shutil.copytree(here / "shards0", here / "later")
    del grid["rows"]["large"]
    (here / "bad.yaml").write_text(json.dumps({"command": "compare", "grid": grid}))
    code, _, err = cli(*command)
    assert code == 0, err
    (section,) = results_in(here / "partly")["sections"]
    assert {row["label"] for row in section["rows"]} == {"teacher", "real", "bad", "zskd -> response"}
    assert section["failed"] == []


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


def test_published_numbers_and_wall_time_reach_every_table(here, cli):
    grid = {"seeds": [0, 1], "student": {"steps": 2, "batch_size": 4}}
    grid["rows"] = {name: {"distill": {"transfer_set": [f"{name}:8"]}} for name in ("real", "noise")}
    grid["rows"]["noise"]["sizes"] = [4]
    about = {"published": {"teacher": 99.3, "real": 87.65, "noise@4": 12.5}}
    (here / "published.yaml").write_text(json.dumps({"about": about, "grid": grid}))
    command = ("compare", "--recipe", "published.yaml", "--teacher", "teacher", "--out", "published")
    assert cli(*command)[0] == 0
    results = results_in(here / "published")
    rows = {row["label"]: row for row in results["sections"][0]["rows"]}
    # The given teacher is not the paper's.
    assert {label: row["published"] for label, row in rows.items()} == {
        "teacher": None,
        "real": pytest.approx(0.8765),
        "noise@4": pytest.approx(0.125),
    }
    run = json.loads((here / "published" / "run.json").read_text())
    made = list((here / "published" / "runs").rglob("run.json"))
    assert len(made) == 4
    seconds = [json.loads(path.read_text())["seconds"] for path in (*made, here / "teacher" / "run.json")]
    assert sum(seconds[:-1]) < results["seconds"] <= run["seconds"]
    took = f"{timedelta(seconds=round(sum(seconds)))} of work on cpu"
    for name in ("table.md", "report.html"):
        text = (here / "published" / name).read_text()
        assert all(word in text for word in ("PUBLISHED %", "87.65", took)), name
    assert "already complete" in cli(*command)[2]

    (here / "kept").mkdir()
    shutil.copy(here / "published" / "results.json", here / "kept" / "tiny.json")
    page = here / "page.md"
    page.write_text("before\n<!-- kept/tiny.json -->\n98.77 by hand\n<!-- end of results -->\nafter\n")
    made = subprocess.run([sys.executable, "-m", "dfkd_cli.report.readme", page], cwd=here.parent, check=False)
    assert made.returncode == 0
    text = page.read_text()
    assert re.fullmatch(r"before\n<!-- kept/tiny.json -->\n.*\n<!-- end of results -->\nafter\n", text, re.DOTALL)
    assert "98.77" not in text
    assert took in text
    mean, sd = (
        100 * function(rows["real"]["top1"]["values"]) for function in (np.mean, functools.partial(np.std, ddof=1))
    )
    (line,) = (line for line in text.splitlines() if line.startswith("| real "))
    assert line.replace("\N{NO-BREAK SPACE}", " ").split(" | ")[1:4] == [
        "lenet5-half",
        f"{mean:.2f} ± {sd:.2f}",
        "87.65",
    ]
    assert fill(text, here) == text
    assert fill(text.replace("87.65", "87.66"), here) == text

    written = {path: path.stat().st_mtime_ns for path in (here / "published" / "runs").rglob("*") if path.is_file()}
    (here / "published.yaml").write_text(json.dumps({"about": {"published": {"real": 87.6}}, "grid": grid}))
    assert cli(*command)[0] == 0
    assert "87.60" in (here / "published" / "table.md").read_text()
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what a paper reports decides no run"


@pytest.mark.parametrize(
    "published, words",
    [
        ({"zksd": {"large": 98}}, "about.published.zksd: unknown key -- did you mean 'zskd'"),
        ({"zskd": {"larg": 98}}, "about.published.zskd.larg: unknown key -- did you mean 'large'"),
        ({"zskd": 98}, "about.published.zskd: must be a mapping"),
        ({"zskd": {"large": 9877}}, "about.published.zskd.large: 9877.0 is out of range"),
        ({"zskd": {"large": "most"}}, "about.published.zskd.large: 'most' is not a number"),
    ],
)
def test_wrong_published_numbers_are_refused(tmp_path, monkeypatch, cli, published, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(f"about: {json.dumps({'published': published})}\n{TEACHERS}")
    code, _, err = cli("compare", "--recipe", "grid.yaml", "--dry-run")
    assert (code, words in err) == (2, True), err


def test_every_grid_of_the_recipes_can_be_planned(cli):
    recipes = [name for name in catalog.recipes() if name.startswith("compare/")]
    assert recipes
    for name in recipes:
        code, _, err = cli("compare", "--recipe", name, "--dry-run")
        assert code == 0, err


LOOP = '''"""A student in the loop."""
from dataclasses import dataclass
from dfkd_cli.settings import ImageOptimization

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


def test_a_student_that_its_shards_brought_along_took_their_time(here, tmp_path, cli):
    shards = shutil.copytree("shards0", tmp_path / "shards")
    student = shards / "student"
    student.mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(here / "student0" / name, student / name)
    assert cli("compare", student, "--out", tmp_path / "out")[0] == 0
    (row,) = [r for r in results_in(tmp_path / "out")["sections"][0]["rows"] if r["role"] == "student"]
    took = json.loads((shards / "run.json").read_text())["seconds"]
    assert {name: known and known["values"] for name, known in row["seconds"].items()} == {
        "synthesis": [took],
        "training": None,
        "total": [took],
    }
    assert [facts["path"] for facts in row["runs"][0]["shards"]] == [str(shards)]


TEACHERS = """
grid:
  seeds: [0, 1]
  teachers:
    large: {steps: 20, batch_size: 16, per_seed: true}
    small: {model: lenet5-half, steps: 10, batch_size: 16, student: {student: lenet5-half-dafl, steps: 2}}
  synthesize: {num_images: 8}
  student: {steps: 3, batch_size: 4}
  rows:
    zskd: {synthesize: {method: zskd, batch_size: 4, iterations: 2}}
    again: {teachers: [small], shards: zskd, seeds: [1]}
    bad: {teachers: [large], distill: {transfer_set: [nowhere]}, seeds: [0]}
"""


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


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("  teachers:", "  teacher: other\n  teachers:", "both teacher and teachers"),
        ("teachers: [large]", "teachers: [larg]", "did you mean 'large'"),
        ("teachers: [large]", "teachers: []", "grid.rows.bad.teachers"),
        ("teachers: [large]", "teachers: {}", "grid.rows.bad.teachers"),
        ("teachers: [large]", "teachers: {larg: }", "did you mean 'large'"),
        ("teachers: [large]", "teachers: {large: {shards: zskd}}", "grid.rows.bad.teachers.large.shards: unknown key"),
        ("teachers: [large]", "teachers: {large: {distill: 3}}", "grid.rows.bad.teachers.large.distill: must be"),
        ("teachers: [large]", "teachers: {large: {synthesize: {lr: 1}}}", "large.synthesize: the row has none"),
        ("distill: {transfer_set: [nowhere]}", "distill: 3", "grid.rows.bad.distill: must be"),
        ("    zskd: {", "    zskd: {teachers: [large], ", "no row 'zskd' with synthesize and teacher small"),
        ("    large:", "    ../large:", "not a name for a row or a teacher"),
        ("{model: lenet5-half, ", "{path: other, ", "grid.teachers.small.steps: the teacher is already there"),
        ("{student: lenet5-half-dafl", "{studnt: x", "grid.teachers.small.student.studnt: unknown key"),
        ("  synthesize: {num", "  metadata: somewhere\n  synthesize: {num", "give it as grid.teachers.large.metadata"),
    ],
)
def test_wrong_teachers_are_refused_before_anything_runs(tmp_path, monkeypatch, cli, old, new, words):
    monkeypatch.chdir(tmp_path)
    assert old in TEACHERS
    (tmp_path / "grid.yaml").write_text(TEACHERS.replace(old, new))
    code, out, err = cli("compare", "--recipe", "grid.yaml")
    assert (code, out) == (2, "")
    assert words in err
    assert not (tmp_path / "comparison").exists()


def test_a_teacher_that_is_not_used_is_refused(here, cli):
    grid = {"teachers": {"a": "teacher", "b": "teacher"}}
    grid["rows"] = {"noise": {"teachers": ["a"], "distill": {"transfer_set": ["noise:4"]}}}
    (here / "unused.yaml").write_text(json.dumps({"grid": grid}))
    code, _, err = cli("compare", "--recipe", "unused.yaml", "--dry-run")
    assert (code, "grid.teachers.b: no row is run with it" in err) == (2, True)


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
    steps = plan(resolve("compare", [recipe_layer("own.yaml", "compare")]), Path("out")).steps
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
        assert sorted(str(step.out) for step in grid.steps) == sorted(f"out/runs/{place}" for place in places)
        assert set(grid.given) == ({"given"} if any("given" in place for place in places) else set())


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


def test_a_typed_teacher_is_not_one_of_several(here, cli):
    (here / "several.yaml").write_text(TEACHERS)
    code, _, err = cli("compare", "--recipe", "several.yaml", "--teacher", "teacher", "--out", "several")
    assert (code, "--teacher teacher: the grid has teachers of its own: large, small" in err) == (2, True)
    assert not (here / "several").exists()


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
    }
    (tmp_path / "grid.yaml").write_text(json.dumps({"grid": {"seeds": [0, 1], "student": small, "rows": rows}}))
    assert cli("train-teacher", "--steps", "2", "--batch-size", "4", "--out", "root")[0] == 0
    assert cli("distill", "--teacher", "root", "--transfer-set", "noise:4", "--steps", "1", "--out", "given")[0] == 0
    code, _, err = cli("compare", "--recipe", "grid.yaml", "--teacher", "given", "--out", "grid")
    assert code == 0, err
    (section,) = results_in(tmp_path / "grid")["sections"]
    teacher, *students = section["rows"]
    assert [run["path"] for run in teacher["runs"]] == ["given"]
    assert {row["label"] for row in students} == {"first", "second", "third", "loop", "points@2"}
    for row in students:
        assert [run["teacher"] for run in row["runs"]] == [teacher["runs"][0]["sha256"]] * 2
    taught = {
        "second": "first/seed{}/student",
        "third": "second/seed{}/student",
        "points@2": "loop/seed{}/shards/student",
    }
    for row, place in taught.items():
        for seed in range(2):
            record = json.loads(Path("grid", "runs", row, f"seed{seed}", "student", "run.json").read_text())
            parent = next(parent for parent in record["parents"] if parent["role"] == "teacher")
            assert parent["path"] == str(Path("grid", "runs", place.format(seed)))
    assert cli("compare", "grid", "--out", "again")[0] == 0
    assert {row["label"] for row in results_in(tmp_path / "again")["sections"][0]["rows"]} > set(taught)
    steps = plan(resolve("compare", [recipe_layer("grid.yaml", "compare")]), Path("grid")).steps
    loop, points = (next(s for s in steps if s.row == row and s.seed == 0) for row in ("loop", "points@2"))
    assert points.waits_for({loop.out}) and not loop.waits_for({points.out})  # its teacher lies in the loop's shards
    (tmp_path / "grid.yaml").write_text((tmp_path / "grid.yaml").read_text().replace('"first", "d', '"loop", "d'))
    code, _, err = cli("compare", "--recipe", "grid.yaml", "--teacher", "given", "--out", "grid")
    assert code == 4 and "second/seed0/student holds another run: another teacher" in err, err


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("seeds: [0, 1]", "seedz: [0]", "grid.seedz: unknown key -- did you mean 'seeds'"),
        ("seeds: [0, 1]", "seeds: [1, 1]", "grid.seeds"),
        ("seeds: [0, 1]", "seeds: [-1]", "grid.seeds"),
        ("steps: 3, batch_size: 8", "stepz: 3", "grid.teacher.stepz: unknown key -- did you mean 'steps'"),
        ("iterations: 2", "iterationz: 2", "grid.rows.zskd.synthesize.iterationz: unknown key"),
        ("{temperature: 2}", "{temperature: warm}", "grid.rows.zskd-hot.distill.temperature"),
        ("{shards: zskd,", "{shards: zksd,", "did you mean 'zskd'"),
        ("{shards: zskd,", "{", "nothing to distill from"),
        ("distill: {temperature", "distil: {temperature", "did you mean 'distill'"),
        ("zskd-hot: {", "../zskd: {", "not a name for a row"),
        ("sizes: [6, 4]", "sizes: [9, 4]", "row growing: a student from 9 images, of 8"),
        ("{num_images: 8}", "{num_images: 8, out: x}", "grid.synthesize.out"),
        ("{num_images: 8}", "[8]", "grid.synthesize: must be a mapping"),
        ("{num_images: 8}", "{recipe: nothing-of-the-kind}", "unknown recipe"),
        ("{shards: zskd,", "{teachers: [lenet5], shards: zskd,", "the grid has one"),
        ("hot: {shards: zskd,", "hot: {taught_by: zksd, shards: zskd,", "did you mean 'zskd'"),
        ("hot: {shards: zskd,", "hot: {taught_by: growing, shards: zskd,", "row 'growing' has no student of seed 0"),
        ("hot: {shards: zskd,", "hot: {taught_by: zskd-hot, shards: zskd,", "rows that wait for each other"),
        (
            "zskd: {synthesize",
            "zskd: {seeds: [1], synthesize",
            "row 'zskd' has no shards of seed 0 -- give `seeds: [1]`",
        ),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(tmp_path, monkeypatch, cli, old, new, words):
    monkeypatch.chdir(tmp_path)
    assert old in GRID
    (tmp_path / "grid.yaml").write_text(GRID.replace(old, new))
    code, out, err = cli("compare", "--recipe", "grid.yaml")
    assert (code, out) == (2, "")
    assert words in err
    assert not (tmp_path / "comparison").exists()


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
