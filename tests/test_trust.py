"""Whose word counts: which code runs, which recipe may overwrite, and where the paths lie that are named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from pipeline import edit

from dfkd_cli import catalog
from dfkd_cli.config import options
from dfkd_cli.models.registry import build
from dfkd_cli.settings import recipe_layer, resolve
from dfkd_cli.trust import PATHS, READ, of_artifact, placed, read_recipe

NET = """
from pathlib import Path
from torch import nn
from layers import WIDTH
if not (ran := Path(f"ran-{WIDTH}")).exists():  # what is sealed cannot write it
    ran.touch()
def build(num_classes, input_size):
    return nn.Sequential(nn.AvgPool2d(WIDTH), nn.Flatten(), nn.Linear((32 // WIDTH) ** 2, num_classes))
"""
FOREIGN = {"input_size": [1, 32, 32], "num_classes": 10}
STEP = ("--steps", "1", "--batch-size", "4", "--device", "cpu")
NOISE = ("--transfer-set", "noise:4")


def network(folder: str, width: int) -> None:
    """``net.py`` with a sibling of its own, and weights that fit; whoever imports it leaves ``ran-WIDTH``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "net.py").write_text(NET)
    Path(folder, "layers.py").write_text(f"WIDTH = {width}\n")
    torch.manual_seed(width)
    torch.save({"2.weight": torch.rand(10, (32 // width) ** 2), "2.bias": torch.rand(10)}, f"{folder}/net.pt")


def write(path: str, values: dict) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(values))
    return path


def refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    """The exit code, one line on stderr with these words, and that no code ran."""
    exit_code, _, err = result
    assert exit_code == code, err
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err
    assert not list(Path().glob("ran-*"))


@pytest.fixture
def here(teacher, tmp_path, monkeypatch) -> Path:
    """A teacher, and a directory from somebody else with code in it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, "teacher")
    network("received", 4)
    write("received/run.json", {"command": "compare", "status": "done"})
    Path("received/run.json").write_text(json.dumps({"command": "compare", "status": "done", "identity": {}}))
    return tmp_path


def grid(**values) -> dict:
    rows = {"noise": {"distill": {"transfer_set": ["noise:4"], "steps": 1}}}
    return {"command": "compare", "grid": {"rows": rows} | values, **FOREIGN, "weights": "net.pt"}


# -- code --------------------------------------------------------------------------------------------------------------

CODE = "net.py:build"
NAMING = {  # each names the code in the directory that somebody gave
    "teacher": {**grid(), "teacher": CODE},
    "grid.teacher": grid(teacher=CODE),
    "teachers.NAME": grid(teachers={"other": CODE}),
    "teachers.NAME.path": grid(teachers={"other": {"path": CODE}}),
    "grid.student": grid(teacher="teacher", student={"student": CODE}) | dict.fromkeys([*FOREIGN, "weights"]),
    "grid.teacher.model": grid(teacher={"model": CODE}) | dict.fromkeys([*FOREIGN, "weights"]),
    "nested": grid(teacher="teacher", student={"recipe": "HERE/inner.yaml"}) | dict.fromkeys([*FOREIGN, "weights"]),
}


@pytest.mark.parametrize("name", NAMING)
def test_code_that_an_artifact_names_is_not_run(name, here, cli):
    """As `compare DIR`, as a recipe in it, under any name, and through a link; a recipe named there is its word too."""
    write("inner.yaml", {"student": "received/net.py:build"})
    values = json.loads(json.dumps(NAMING[name]).replace("HERE", str(here)))
    write("received/config.yaml", values)
    write("received/runs/mine.yaml", values)
    Path("link.yaml").symlink_to("received/runs/mine.yaml")
    for typed in (["received"], *(["--recipe", recipe] for recipe in ("received/config.yaml", "link.yaml"))):
        if typed == ["received"] and name in ("grid.student", "grid.teacher.model", "nested"):
            refused(cli("compare", *typed, "--out", "c"), 3, "code, which is not run", "--allow-code")
            continue
        refused(cli("compare", *typed, "--dataset", "digits", "--out", "c"), 3, "net.py:build", "--allow-code")
    assert not Path("c").exists()


def test_a_word_that_is_typed_elsewhere_allows_no_other(here, cli):
    """A directory's code is not the user's for the directory's path being typed, nor for that of other code."""
    typed = "./received/net.py:build"
    write("received/config.yaml", grid(teacher=CODE))
    refused(cli("compare", "received", "--dataset", typed, "--out", "c"), 3, "--allow-code")
    record = json.loads(Path("teacher/model.json").read_text())
    Path("teacher/model.json").write_text(json.dumps({**record, "spec": typed}))
    refused(cli("distill", *NOISE, "--student", typed.replace("received", "teacher"), "--out", "s"), 3, "--allow-code")


def test_with_permission_it_is(here, cli):
    write("received/config.yaml", grid(teacher=CODE))
    code, _, err = cli("compare", "received", "--dataset", "digits", "--allow-code", "--device", "cpu", "--out", "c")
    assert (code, Path("ran-4").exists()) == (0, True), err


@pytest.mark.parametrize("recipe", ["own.yaml", "mine/own.yaml"])
def test_code_that_the_users_recipe_names_is_run(recipe, here, cli):
    """Its paths are found beside it, and another recipe that it names is the user's as well."""
    network("mine", 8)
    folder = "mine/" if recipe == "own.yaml" else ""
    weights = {"teacher": f"{folder}net.py:build", "weights": f"{folder}net.pt", **FOREIGN}
    write(recipe, weights | {"student": f"./{folder}net.py:build"})
    code, _, err = cli("distill", "--recipe", recipe, *NOISE, *STEP, "--out", "s")
    assert (code, Path("ran-8").exists()) == (0, True), err
    write(f"{Path(recipe).parent}/inner.yaml", {"student": f"{folder}net.py:build"})
    write(recipe, grid(student={"recipe": "inner.yaml"}) | weights | {"dataset": "digits"})
    code, _, err = cli("compare", "--recipe", recipe, "--device", "cpu", "--out", "c")
    assert code == 0, err
    # What was written is an artifact's word, and says where all lies: with permission it is complete.
    again = ("compare", "--recipe", "c/config.yaml", "--device", "cpu", "--out", "c")
    code, _, err = cli(*again)
    assert (code, "--allow-code" in err) == (3, True), err
    code, _, err = cli(*again, "--allow-code")
    assert (code, "already complete" in err) == (0, True), err


def test_a_replayed_configuration_names_code_only_with_permission(here, cli):
    network(".", 8)
    run = ("distill", *NOISE, *STEP, "--out", "s")
    assert cli(*run, "--set", "student=./net.py:build")[0] == 0
    Path("ran-8").unlink()
    replay = ("distill", "--recipe", "s/config.yaml")
    refused(cli(*replay), 3, "net.py:build", "--allow-code")
    for typed in (["--allow-code"], ["--student", "./net.py:build"]):
        code, _, err = cli(*replay, *typed)
        assert (code, "already complete" in err) == (0, True), err
    assert cli(*replay, "--student", "lenet5-half", "--out", "other")[0] == 0


def test_a_recipe_is_an_artifacts_word_inside_one(here):
    write("mine.yaml", {})
    assert not of_artifact(Path("mine.yaml"))
    for name in ("config.yaml", "received/x.yaml", "received/runs/a/x.yaml", "teacher/x.yaml"):
        assert of_artifact(Path(name)), name
    assert not any(of_artifact(path) for path in catalog.recipes().values())


# -- what destroys or permits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"overwrite": True},
        {"overwrite": "yes"},
        {"run.overwrite": True},
        {"allow_code": True},
        {"run.allow_code": True},
        {"code_dir": "received"},
    ],
    ids=str,
)
def test_only_the_command_line_overwrites_and_permits(values, here, cli):
    assert cli("distill", *NOISE, *STEP, "--out", "s")[0] == 0
    before = {path: path.read_bytes() for path in Path("s").rglob("*") if path.is_file()}
    flag = "--" + next(iter(values)).removeprefix("run.").replace("_", "-")
    command = ("distill", *NOISE, "--steps", "2", "--out", "s", "--recipe", write("r.yaml", values))
    refused(cli(*command), 2, "r.yaml: no recipe may", f"type {flag}")
    assert {path: path.read_bytes() for path in Path("s").rglob("*") if path.is_file()} == before
    key = next(iter(values)).removeprefix("run.")
    rows = {"noise": {"distill": {"transfer_set": ["noise:4"], **values}}}
    write("g.yaml", {"grid": {"teacher": "teacher", "rows": rows}})
    refused(cli("compare", "--recipe", "g.yaml", "--out", "c"), 2, "grid.rows.noise.distill", key.split("_")[0])


def test_a_recipe_may_say_that_nothing_is_overwritten(here, cli):
    recipe = write("r.yaml", {"overwrite": False, "allow_code": "off", "code_dir": None})
    assert cli("distill", *NOISE, *STEP, "--out", "s", "--recipe", recipe)[0] == 0


@pytest.mark.parametrize("file", ["config.yaml", "run.json", "metrics.csv", "model.json"])
@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--dry-run"]], ids=str)
@pytest.mark.parametrize("text", ['{"lr": 0.1}', "[1]", ""])
def test_files_of_the_users_own_are_neither_deleted_nor_overwritten(text, file, more, here, cli):
    Path("mine").mkdir()
    Path("mine", file).write_text(text)
    refused(cli("distill", *NOISE, *STEP, "--out", "mine", *more), 2, "mine is not empty and was not made by dfkd")
    assert Path("mine", file).read_text() == text
    assert [path.name for path in Path("mine").iterdir()] == [file]


def test_what_the_user_hid_in_an_output_stays(here, cli):
    """Of a run that failed before it learned anything only its records make room for another one."""
    assert cli("distill", *NOISE, *STEP, "--out", "mine")[0] == 0
    for path in Path("mine").iterdir():  # as if it had failed early
        if path.name not in ("run.json", "config.yaml", ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    edit(Path("mine/run.json"), status="failed", artifacts=[])
    Path("mine/.git").mkdir()
    for name in (".git/HEAD", ".gitignore"):
        Path("mine", name).write_text("mine")
    assert cli("distill", *NOISE, *STEP, "--lr", "0.123", "--out", "mine")[0] == 0
    assert [Path("mine", name).read_text() for name in (".git/HEAD", ".gitignore")] == ["mine"] * 2


def test_an_output_has_a_name(here, cli):
    for command in (("distill", *NOISE, *STEP), ("evaluate", "teacher")):
        refused(cli(*command, "--out", "", "--overwrite"), 2, "no directory has an empty name")


# -- where paths lie ---------------------------------------------------------------------------------------------------


def test_every_option_that_says_what_is_read_has_relative_paths():
    names = set(PATHS)
    for command in catalog.commands().values():
        for name, traits in options(command.inputs).items():
            says = re.search(r"\b(SPEC|DIR|director|folder|where datasets lie|weights of a)", traits.get("help", ""))
            assert not says or name in names or traits.get("typed"), f"{command.name} --{name}"  # or in no recipe


def test_relative_paths_are_those_beside_who_names_them(here):
    for name in ("there/net.py", "there/a:b", "there/digits", "both/net.py", "net.py"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    there = [Path("there"), Path("both")]
    assert placed("net.py:build", there) == "there/net.py:build"
    assert placed("./net.py:build", there[1:]) == "both/net.py:build"
    assert placed("a:b", there) == "there/a:b"
    for name in ("digits", "absent.py:build", "package.module:build", "noise:8", "", str(here / "net.py")):
        assert placed(name, there) == name
    assert placed("./net.py:build", [here]) == "./net.py:build"  # the same from here: a spelling is an identity


def test_names_that_yaml_reads_as_something_else(here, cli):
    Path("r.yaml").write_text("teacher: 2024-05-01\n")
    Path("2024-05-01").mkdir()
    assert read_recipe(Path("r.yaml")) == {"teacher": "2024-05-01"}
    for value in ("2024", "[2024, 5]"):
        Path("r.yaml").write_text(f"teacher: {value}\n")
        refused(cli("distill", *NOISE, *STEP, "--recipe", "r.yaml"), 3, "no teacher at 2024")


def test_the_users_home_is_where_a_recipe_says_so(here, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    write("r.yaml", {"teacher": "~/net.py:build", "student": "w8a8:~/net.py:build", "weights": "~/net.pt"})
    place = "/home/of/somebody/net"
    assert read_recipe(Path("r.yaml")) == {
        "teacher": f"{place}.py:build",
        "student": f"w8a8:{place}.py:build",
        "weights": f"{place}.pt",
    }
    write("out.yaml", {"out": "~/results"})
    assert resolve("distill", [recipe_layer("out.yaml", "distill")]).out == Path("/home/of/somebody/results")


@pytest.mark.parametrize("key", READ)
def test_what_may_lie_at_a_url_may_lie_beside_the_recipe(key, here):
    network("there", 4)
    write("there/r.yaml", {key: "net.py:build"})
    write("there/list.yaml", {"grid": {"rows": {"a": {key: ["net.py:build", "noise:8"]}}}})
    assert read_recipe(Path("there/r.yaml")) == {key: "there/net.py:build"}
    rows = read_recipe(Path("there/list.yaml"))["grid"]["rows"]
    assert rows == {"a": {key: ["there/net.py:build", "noise:8"]}}


def test_own_code_is_found_when_all_is_moved(here, cli, monkeypatch):
    network(".", 8)
    own = ("--student", "./net.py:build")
    assert cli("distill", *NOISE, *STEP, *own, "--out", "s")[0] == 0
    identity = json.loads(cli("evaluate", "s", "--allow-code", "--json", "--device", "cpu")[1])
    Path("moved").mkdir()
    for name in ("s", "teacher", "net.py", "layers.py"):
        shutil.move(name, f"moved/{name}")
    evaluate = ("evaluate", "moved/s", "--teacher", "moved/teacher", "--allow-code", "--device", "cpu", "--json")
    beside = cli(*evaluate)
    Path("elsewhere").mkdir()
    for name in ("net.py", "layers.py"):
        shutil.move(f"moved/{name}", f"elsewhere/{name}")
    code, _, err = cli(*evaluate)
    assert (code, "no such file" in err, "--code-dir" in err) == (3, True, True), err
    pointed = cli(*evaluate, "--code-dir", "elsewhere")
    refused_code, _, err = cli(*[word for word in evaluate if word != "--allow-code"], "--code-dir", "elsewhere")
    assert (refused_code, "--allow-code" in err) == (3, True), err
    for name in ("net.py", "layers.py"):
        shutil.move(f"elsewhere/{name}", f"moved/s/{name}")
    inside = cli(*evaluate)
    for code, out, err in (beside, pointed, inside):
        assert code == 0, err
        assert json.loads(out)["results"][0]["nll"] == identity["results"][0]["nll"]
    # A student of its architecture, in which it has no file of its own.
    again = ("distill", "--teacher", "moved/teacher", *NOISE, *STEP, "--student", "moved/s", "--allow-code")
    assert cli(*again, "--out", "next")[0] == 0
    assert cli("evaluate", "next", "--teacher", "moved/teacher", "--allow-code", "--device", "cpu")[0] == 0


# -- imports -----------------------------------------------------------------------------------------------------------


def test_files_with_siblings_of_one_name_have_their_own(here, cli):
    network("a", 4)
    network("b", 8)
    nets = [build(f"{name}/net.py:build", 10, (1, 32, 32), allow_code=True) for name in "abab"]
    assert [net[2].in_features for net in nets] == [64, 16, 64, 16]
    foreign = ["--teacher", "a/net.py:build", "--weights", "a/net.pt", "--num-classes", "10"]
    foreign += ["--input-size", "1", "32", "32"]
    command = ("distill", *foreign, "--student", "b/net.py:build", *NOISE, *STEP, "--out", "s")
    code, _, err = cli(*command)
    assert code == 0, err
    code, out, err = cli("evaluate", "s", *foreign, "--dataset", "digits", "--allow-code", "--device", "cpu", "--json")
    assert code == 0, err
    assert json.loads(out)["results"][0]["parameters"] == 16 * 10 + 10


def test_packages_beside_files_and_what_they_import_later(here):
    for folder, classes in (("a", 3), ("b", 4)):
        Path(folder, "parts").mkdir(parents=True)
        Path(folder, "parts/__init__.py").touch()
        Path(folder, "parts/size.py").write_text(f"CLASSES = {classes}\n")
        Path(folder, "net.py").write_text(
            "from dataclasses import dataclass\nfrom torch import nn\nimport parts.size\n"
            "@dataclass\nclass Size:\n    classes: int\n"
            "def build():\n    from parts.size import CLASSES\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(4, Size(CLASSES).classes))\n"
        )
    for _ in range(2):
        assert build("a/net.py:build", 3, (1, 2, 2), allow_code=True)[1].out_features == 3
        assert build("b/net.py:build", 4, (1, 2, 2), allow_code=True)[1].out_features == 4
