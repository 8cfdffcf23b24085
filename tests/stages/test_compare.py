"""``dfkd compare``: tables and pages of finished directories and of grids. Tiny artifacts, real commands."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import readme
import torch
from PIL import Image
from pipeline import edit
from readme import fill
from tiny_comparisons import SMALL, accuracy, check_self_contained, results_in, tree

from dfkd_cli.artifacts.integrity import write_run
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.directory import load_model, save_model
from dfkd_cli.report import html
from dfkd_cli.report.results import spread
from dfkd_cli.urls import COPIES

EVERYTHING = ("student0", "student1", "real", "baseline", "shards0")


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
    best = max((row for row in rows.values() if row["role"] == "student"), key=lambda row: row["gap"]["mean"])
    assert answer["metrics"] == {"best": best["label"], "top1": best["top1"]["mean"], "gap": best["gap"]["mean"]}

    teacher, zskd = accuracy(made / "teacher"), [accuracy(made / f"student{seed}") for seed in (0, 1)]
    assert zskd[0] != zskd[1], "equal values have no spread to test"
    row = rows["zskd -> response"]
    assert row["seeds"] == [0, 1]
    assert row["top1"]["values"] == pytest.approx(zskd)
    assert row["top1"]["mean"] == pytest.approx(np.mean(zskd))
    assert row["top1"]["sd"] == pytest.approx(np.std(zskd, ddof=1))
    assert row["gap"]["mean"] == pytest.approx(np.mean(zskd) - teacher)
    assert (row["data_free"], row["num_images"], row["parameters"]) == (True, 32, 35820)
    assert row["latency_ms"]["sd"] is None, "it is measured once"
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
    assert "; data kept out by python; " in lines[0]
    assert f"top-1 {100 * teacher:.2f} %" in lines[0]
    cells = next(line for line in lines if line.startswith("| zskd")).split(" | ")
    assert cells[2] == f"{100 * np.mean(zskd):.2f} ± {100 * np.std(zskd, ddof=1):.2f}"
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1

    page = check_self_contained((made / "all" / "report.html").read_text())
    assert page.addresses.count(page.addresses[0]) == 1
    assert len(page.addresses) == 1 + 4 + 4  # the chart, curves of four rows, images and terms of shards0 and shards1
    for text in ("zskd -> response", "data-free", "loss terms", cells[2], runs["student0"]["versions"]["torch"]):
        assert any(text in shown for shown in page.texts), text


def test_what_lies_at_a_url_is_drawn_from_its_copy(made, compared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = {f"s3://bucket/{name}": str(made / name) for name in ("student0", "student1", "shards0", "shards1")}
    monkeypatch.setenv(COPIES, json.dumps(known | {"s3://other/": str(made)}))
    text = (made / "all" / "results.json").read_text()
    for name in ("student0", "student1", "shards0", "shards1"):
        text = text.replace(f'"path": "{name}"', f'"path": "s3://bucket/{name}"')
    for name in ("teacher", "real", "baseline"):
        text = text.replace(f'"path": "{name}"', f'"path": "s3://other/{name}"')
    page = check_self_contained(html.page(json.loads(text)))
    assert len(page.addresses) == 1 + 4 + 4 and "s3://bucket/shards0" in page.texts


def test_snapshots_tell_what_other_stopping_points_would_have_given(here, compared, tmp_path, cli):
    student, out = tmp_path / "student", tmp_path / "out"
    learn = ("--steps", "420", "--batch-size", "8", "--holdout", "0.5", "--snapshots", "3")
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
        edit(moved / "model.json", **record)
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
    assert (code, "the transfer sets have 32" in err) == (2, True)
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


def test_a_large_model_is_shown_few_images_at_once(here, cli):
    """It takes eight of the 360 at most, and says of more what PyTorch says."""
    code = "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    code += "        self.last = torch.nn.Linear(1024, 10)\n    def forward(self, x):\n        if len(x) > 8:\n"
    code += "            raise RuntimeError('out of memory')\n        return self.last(x.flatten(1))\n"
    (here / "large.py").write_text(code)
    torch.save({"last.weight": torch.eye(10, 1024), "last.bias": torch.zeros(10)}, here / "large.pt")
    seen = ("--teacher", "./large.py:Net", "--weights", "large.pt", "--input-size", "1", "32", "32")
    command = ("compare", "student0", *seen, "--num-classes", "10", "--dataset", "digits", "--out", "few")
    code, _, err = cli(*command)
    assert (code, "out of memory -- lower --batch-size" in err) == (4, True), err
    code, _, err = cli(*command, "--batch-size", "8")
    assert code == 0, err
    (section,) = results_in(here / "few")["sections"]
    assert section["rows"][1]["top1"]["mean"] == pytest.approx(accuracy(here / "student0"))


def test_measures_are_taken_once(here, compared, cli):
    shutil.copytree("all", "once")
    file = here / "once" / "measurements.json"
    known = json.loads(file.read_text())
    for measures in known.values():
        measures["top1"] = 0.125
    (here / "once" / "report.html").unlink()
    shutil.copytree("once", "damaged")
    edit(file, **known)
    (here / "damaged" / "measurements.json").write_bytes(file.read_bytes())  # but not whom they are by
    for out, believed in (("once", True), ("damaged", False)):
        assert cli("compare", *EVERYTHING, "--out", out)[0] == 0
        shown = {row["top1"]["mean"] for row in results_in(here / out)["sections"][0]["rows"]}
        assert (shown == {0.125}) == believed
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
    # Where one model judges both, they are no repeats of one another either, alike as their settings are.
    assert cli("distill", *SMALL, *arguments[2:4], "--out", "own-student")[0] == 0
    assert cli("compare", "own-student", "others-student", "--teacher", "teacher", "--out", "judged")[0] == 0
    (section,) = results_in(here / "judged")["sections"]
    assert sorted(row["runs"][0]["path"] for row in section["rows"][1:]) == ["others-student", "own-student"]
    assert len({row["label"] for row in section["rows"]}) == 3
    # Nor is what a student has taught, alone or in a committee, a repeat of that student.
    for name, teachers in (("pupil", ["others-student"]), ("of-both", ["other", "others-student"])):
        assert cli("distill", *SMALL, "--teacher", *teachers, *arguments[2:4], "--out", name)[0] == 0
    assert cli("compare", "others-student", "pupil", "of-both", "--teacher", "other", "--out", "taught")[0] == 0
    (section,) = results_in(here / "taught")["sections"]
    assert [row["seeds"] for row in section["rows"][1:]] == [[0]] * 3
    assert len({row["label"] for row in section["rows"]}) == 4


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


def test_a_model_may_count_its_classes_in_another_order(here, cli):
    """It is compared by their names: as if it counted them like the others, by this command and by evaluate."""
    classifier, record = load_model(here / "student0")
    head, info = classifier.head(), classifier.info
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter.flip(0))
    reverse = Classifier(classifier.net, dataclasses.replace(info, classes=info.classes[::-1]))
    save_model(here / "reversed", reverse, metrics={}, provenance=record["provenance"])
    unnamed = Classifier(load_model(here / "student0")[0].net, dataclasses.replace(info, classes=None))
    save_model(here / "unnamed", unnamed, metrics={}, provenance=record["provenance"])
    code, _, err = cli("compare", "reversed", "unnamed", "student0", "--out", "orders")
    assert code == 0, err
    assert err.count("matched by position") == err.count("unnamed: no class names, or not the dataset's") == 1
    (section,) = results_in(here / "orders")["sections"]
    measures = {run["path"]: run["measures"] for row in section["rows"] for run in row["runs"]}
    assert set(measures) == {"teacher", "reversed", "unnamed", "student0"}
    for name in ("top1", "agreement", "per_class"):
        assert measures["reversed"][name] == measures["unnamed"][name] == measures["student0"][name]
    assert 0 < measures["reversed"]["agreement"] < 1
    assert measures["reversed"]["top1"] != accuracy(here / "reversed"), "numbers of classes would do as well as names"
    assert section["classes"] == list(info.classes)
    code, out, err = cli("evaluate", *measures, "--json")
    assert (code, err.count("matched by position")) == (0, 1)
    for result in json.loads(out)["results"]:
        known = measures[result["path"]]
        assert {name: result[name] for name in known if name not in ("latency_ms", "snapshots")} == {
            name: value for name, value in known.items() if name not in ("latency_ms", "snapshots")
        }


def test_students_in_the_loop_are_what_their_shards_say(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    tiny = ("--steps", "2", "--batch-size", "4")
    assert cli("train-teacher", *tiny, "--out", "mentor")[0] == 0
    made = ("synthesize", "--method", "zskt", "--student", "lenet5-half", "--num-images", "4", *tiny)
    for seed in ("0", "1"):
        assert cli(*made, "--teacher", "mentor", "--seed", seed, "--out", f"shards{seed}")[0] == 0
    code, _, err = cli("compare", "shards0/student", "shards1/student", "--out", "found")
    assert code == 0, err
    teacher, row = results_in(tmp_path / "found")["sections"][0]["rows"]
    assert [run["path"] for run in teacher["runs"] + row["runs"]] == ["mentor", "shards0/student", "shards1/student"]
    assert (row["label"], row["seeds"], row["cotrained"]) == ("zskt", [0, 1], True)
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("shards0", "shards1")]
    took = [run["seconds"] for run in runs]
    assert {name: known and known["values"] for name, known in row["seconds"].items()} == {
        "synthesis": took,
        "training": None,
        "total": took,
    }
    assert [run["argv"] for run in row["runs"]] == [run["argv"] for run in runs]
    assert [facts["path"] for run in row["runs"] for facts in run["shards"]] == ["shards0", "shards1"]


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["missing"], 3, "missing"),
        (["student0", "missing"], 3, "missing"),
        ([], 2, "no models to compare"),
        (["shards0"], 2, "no models to compare"),
        (["student0", "--dataset", "digitz"], 2, "did you mean 'digits'"),
        (["student0", "--dataset", ""], 2, "dataset '': neither a known name nor a directory"),
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


@pytest.mark.parametrize(
    ("option", "values", "told"),
    [("temperature", ("3", "20"), ("3.0", "20.0")), ("student", ("lenet5", "lenet5-half"), ("lenet5", "lenet5-half"))],
)
def test_equal_labels_are_told_apart_by_what_differs(here, cli, option, values, told):
    for value in values:
        arguments = ("--transfer-set", "noise:8", f"--{option}", value, "--out", f"of-{value}")
        assert cli("distill", *SMALL, *arguments)[0] == 0
    assert cli("compare", *(f"of-{value}" for value in values), "--out", f"labels-{option}")[0] == 0
    labels = {row["label"] for row in results_in(here / f"labels-{option}")["sections"][0]["rows"]}
    assert labels == {"teacher", *(f"noise:8 -> response ({option} {value})" for value in told)}


def test_a_typed_teacher_judges_whoever_taught(here, cli):
    for name in (("student0", "--teacher", "baseline"), ("student0", "baseline", "--teacher", "baseline")):
        assert cli("compare", *name, "--out", "judged", "--overwrite")[0] == 0
        (section,) = results_in(here / "judged")["sections"]
        head, row = section["rows"]
        assert (head["role"], head["runs"][0]["path"], row["runs"][0]["path"]) == ("teacher", "baseline", "student0")
        assert row["gap"]["mean"] == pytest.approx(accuracy(here / "student0") - accuracy(here / "baseline"))
        assert row["runs"][0]["teacher"] == head["runs"][0]["sha256"]
    for named, judge in (
        (("baseline",), "teacher"),
        (("--teacher", "baseline"), "baseline"),
        (("baseline",), "teacher"),
    ):
        code, _, err = cli("compare", "student0", *named, "--out", "judged-again")
        (section,) = results_in(here / "judged-again")["sections"]
        assert (code, section["rows"][0]["runs"][0]["path"]) == (0, judge), err
    record = json.loads((here / "judged-again" / "run.json").read_text())
    write_run(here / "judged-again", {key: value for key, value in record.items() if key != "judge"})  # of an older one
    assert cli("compare", "student0", "--teacher", "baseline", "--out", "judged-again")[0] == 0
    assert results_in(here / "judged-again")["sections"][0]["rows"][0]["runs"][0]["path"] == "baseline"
    assert cli("compare", "student0", "student1", "real", "--teacher", "student1", "--out", "by-a-student")[0] == 0
    (section,) = results_in(here / "by-a-student")["sections"]
    assert section["rows"][0]["runs"][0]["path"] == "student1"
    assert {row["runs"][0]["path"] for row in section["rows"][1:]} == {"student0", "real"}


def test_pictures_say_nothing_and_have_every_name(here, cli, recwarn):
    shutil.copytree("student0", "_데이터$")
    assert cli("compare", "_데이터$", "real", "--out", "pictures")[0] == 0
    assert cli("evaluate", "_데이터$", "real", "--line", "--out", "lines")[0] == 0
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.75], [0.9, 0.8, 0.85, 0.1]])
def test_spread_is_mean_and_sample_deviation(values):
    made = spread(values)
    assert made["mean"] == pytest.approx(np.mean(values))
    assert made["sd"] == (pytest.approx(np.std(values, ddof=1)) if len(values) > 1 else None)
    assert spread([None]) is spread([*values, None]) is None  # of all seeds, or of none


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
    grid |= {"teacher": {"path": "teacher"}, "seeds": [0]}  # whose recipe says of what they report
    (here / "path.yaml").write_text(json.dumps({"about": about, "grid": grid}))
    assert cli("compare", "--recipe", "path.yaml", "--rows", "real", "--out", "path")[0] == 0
    teacher, _ = results_in(here / "path")["sections"][0]["rows"]
    assert teacher["published"] == pytest.approx(0.993)

    (here / "kept").mkdir()
    shutil.copy(here / "published" / "results.json", here / "kept" / "tiny.json")
    page = here / "page.md"
    page.write_text("before\n<!-- kept/tiny.json -->\n98.77 by hand\n<!-- end of results -->\nafter\n")
    made = subprocess.run([sys.executable, readme.__file__, page], cwd=here.parent, check=False)
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
