"""Runs that leave several models: each is measured, found and checked like any other. Tiny artifacts, real commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pipeline import edit
from readme import fill
from tiny_comparisons import accuracy, results_in

TOGETHER = ("--method", "kdcl", "--students", "lenet5-half", "lenet5", "--temperature", "2", "--batch-size", "16")
PAIRS = ("pair0", "pair1")
RECIPE = """
grid:
  seeds: [0, 1]
  teacher: {method: kdcl, students: [lenet5, lenet5-half], steps: 20, batch_size: 16}
  student: {steps: 4, batch_size: 8, transfer_set: ['real:40']}
  rows:
    pair: {distill: {method: kdcl, students: [lenet5-half, lenet5-half-dafl]}, sizes: [20, 40]}
    chain: {distill: {method: takd, assistants: [lenet5-half], student: lenet5-half-dafl}}
about: {published: {teacher: 99, chain: 88, pair@20: 77}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, session_cli) -> Path:
    """A teacher, and two runs of a pair that learned together."""
    place = tmp_path_factory.mktemp("pairs")
    assert session_cli(place, "train-teacher", "--steps", "60", "--batch-size", "32") == 0
    for seed, name in enumerate(PAIRS):
        learn = ("distill", *TOGETHER, "--transfer-set", "real:64", "--steps", "30")
        assert session_cli(place, *learn, "--seed", str(seed), "--out", name) == 0
    return place


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(place: Path) -> dict:
    return json.loads((place / "run.json").read_text())


def test_students_that_learned_together_are_rows_of_one_table(here, cli):
    for name in PAIRS:
        edit(here / name / "run.json", concerns=[f"{name} is strange"])
    code, _, err = cli("compare", *PAIRS, "--out", "both")
    assert code == 0, err
    (section,) = results_in(here / "both")["sections"]
    rows = {row["label"]: row for row in section["rows"]}
    assert rows.keys() == {"teacher", "real:64 -> kdcl: response", "real:64 -> kdcl: response (peer-1)"}
    runs = [record(here / name) for name in PAIRS]
    for (label, row), model in zip(sorted(rows.items())[:2], ("lenet5-half", "lenet5"), strict=True):
        places = [Path(name, "peer-1" if "peer" in label else "") for name in PAIRS]
        assert [run["path"] for run in row["runs"]] == [str(place) for place in places]
        assert (row["role"], row["model"], row["seeds"]) == ("student", model, [0, 1])
        assert row["top1"]["values"] == pytest.approx([accuracy(here / place) for place in places])
        assert row["seconds"]["training"]["values"] == [run["seconds"] for run in runs]
        for run, said in zip(row["runs"], runs, strict=True):
            assert {key: run[key] for key in ("argv", "concerns", "device")} == {
                key: said[key] for key in ("argv", "concerns", "device")
            }
            assert run["rounds"] == 1
    page = (here / "both" / "report.html").read_text()
    assert page.count("Warning: seed 0</b> pair0 is strange") == 1, "of the run, however many models it left"
    # One by itself is the same row; the time of a run that left two counts once.
    assert cli("compare", "pair0/peer-1", "pair0", "--out", "named")[0] == 0
    results = results_in(here / "named")
    assert {row["label"] for row in results["sections"][0]["rows"]} == rows.keys()
    assert sum(len(row["runs"]) for row in results["sections"][0]["rows"]) == 3
    took = {path: s for row in results["sections"][0]["rows"] for run in row["runs"] for path, s in run["work"].items()}
    assert took == {name: record(here / name)["seconds"] for name in ("teacher", "pair0")}
    assert cli("compare", "pair1/peer-1", "--out", "alone")[0] == 0
    (_, row) = results_in(here / "alone")["sections"][0]["rows"]
    assert (row["label"], row["seeds"]) == ("real:64 -> kdcl: response (peer-1)", [1])


def test_each_of_them_is_a_model_with_a_lineage_and_a_teacher_itself(here, cli):
    code, out, err = cli("evaluate", "pair0/peer-1", "--json")
    assert code == 0, err
    (result,) = json.loads(out)["results"]
    assert result["top1"] == pytest.approx(accuracy(here / "pair0" / "peer-1"))
    assert 0 < result["agreement"] < 1
    told = [json.loads(cli("info", place, "--json")[1])["info"] for place in ("pair0", "pair0/peer-1")]
    assert told[1]["lineage"] == told[0]["lineage"]
    assert told[1]["lineage"][0]["found"] == "same"
    assert "unverified" not in told[1]
    assert told[1]["model.json"]["spec"] == "lenet5"
    learn = ("distill", "--teacher", "pair0/peer-1", "--transfer-set", "noise:16", "--steps", "2", "--out", "taught")
    code, _, err = cli(*learn)
    assert code == 0, err
    info = json.loads(cli("info", "taught", "--json")[1])["info"]
    assert info["lineage"][0]["lineage"] == told[0]["lineage"]
    code, _, err = cli("compare", "taught", "--out", "of-peer")
    assert code == 0, err
    (section,) = results_in(here / "of-peer")["sections"]
    assert [row["runs"][0]["path"] for row in section["rows"]] == ["pair0/peer-1", "taught"]


def test_a_model_that_was_copied_alone_is_of_no_run(here, cli):
    shutil.copytree("pair0/peer-1", "pair1/mine")
    shutil.copytree("pair0/peer-1", "copied")
    for place in ("copied", "pair1/mine"):
        info = json.loads(cli("info", place, "--json")[1])["info"]
        assert "nothing says" in info["unverified"]
        assert info["lineage"] == []


@pytest.mark.parametrize("file", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("gone", [True, False])
def test_damage_is_found_whatever_reads_it(file, gone, here, cli):
    path = here / "pair0" / "peer-1" / file
    if gone:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"0.3", b"0.4") if file == "model.json" else bytes(4))
    commands = [["compare", "pair0", "--out", "no"], ["info", "pair0"], ["evaluate", "pair0/peer-1"]]
    for command in [*commands, ["info", "pair0/peer-1"]]:
        code, _, err = cli(*command)
        assert code == 3, command
        assert "peer-1" in err
    code, _, err = cli("distill", *TOGETHER, "--transfer-set", "real:64", "--steps", "30", "--out", "pair0")
    assert code == 0, err
    assert "already complete" not in err
    assert cli("info", "pair0")[0] == 0


def test_a_grid_has_rows_of_all_that_its_commands_left(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    Path("several.yaml").write_text(RECIPE)
    code, out, err = cli("compare", "--recipe", "several.yaml")
    assert code == 0, err
    (section,) = results_in(tmp_path / "comparison")["sections"]
    rows = {row["label"]: row for row in section["rows"]}
    expected = {
        "teacher": ("lenet5", 0.99),
        "teacher/peer-1": ("lenet5-half", None),
        "pair@20": ("lenet5-half", 0.77),
        "pair@20/peer-1": ("lenet5-half-dafl", None),
        "pair@40": ("lenet5-half", None),
        "pair@40/peer-1": ("lenet5-half-dafl", None),
        "chain": ("lenet5-half-dafl", 0.88),
        "chain/assistants/lenet5-half": ("lenet5-half", None),
    }
    assert {label: (row["model"], row["published"]) for label, row in rows.items()} == expected
    assert {label: row["role"] for label, row in rows.items() if "teacher" in label} == {
        "teacher": "teacher",
        "teacher/peer-1": "baseline",
    }
    assert {label: row["series"] for label, row in rows.items() if row["series"]} == {
        label: "pair/peer-1" if "/" in label else "pair" for label in expected if "pair" in label
    }
    assert all(row["seeds"] == [0, 1] for label, row in rows.items() if "teacher" not in label)
    assert len({run["teacher"] for row in section["rows"][1:] for run in row["runs"]}) == 1
    for row in rows.values():
        assert row["top1"]["values"] == pytest.approx([accuracy(Path(run["path"])) for run in row["runs"]])
    assert "chain/assistants/lenet5-half" in out
    table = Path("comparison/table.md").read_text()
    assert "| chain/assistants/lenet5-half | lenet5-half | " in table
    assert "| pair/peer-1 | " in table
    # A comparison so far shows the same rows, and so does a page that names one.
    assert cli("compare", "comparison", "--out", "so-far")[0] == 0
    assert {row["label"] for row in results_in(tmp_path / "so-far")["sections"][0]["rows"]} == rows.keys()
    chosen = "comparison/results.json chain chain/assistants/lenet5-half: by a hop"
    page = f"<!-- rows ROW, STUDENT\n{chosen}\n-->\n<!-- end of results -->\n"
    assert "| chain/assistants/lenet5-half | lenet5-half |" in fill(page, tmp_path)
