"""`dfkd distill` with objectives: their state, their phases, in one process and in two."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from PIL import Image
from pipeline import finish, finish_on_two, kill_after_saving
from safetensors import safe_open
from safetensors.torch import load_file

from dfkd_cli import catalog
from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.shards import ShardReader
from dfkd_cli.settings import recipe_layer, resolve, typed_layer


def distill(teacher, *args) -> list[str]:
    return [str(a) for a in ("distill", "--teacher", teacher, "--transfer-set", "noise:64", "--device", "cpu", *args)]


@pytest.mark.parametrize("name", ["fitnets", "reviewkd"])
def test_one_image_of_one_pixel_cannot_be_normalised(cli, teacher, tmp_path, name):
    args = ["--objective", name, "--taps", "penultimate", "--teacher-taps", "penultimate", "--steps", 1]
    code, _, err = cli(*distill(teacher, *args, "--batch-size", 1, "--out", tmp_path / "s"))
    assert code == 2
    assert "BatchNorm cannot learn from one image with maps of one pixel -- raise --batch-size" in err


def test_crd_refuses_images_that_are_not_of_the_transfer_set(cli, teacher, tmp_path):
    args = ["--method", "pseudo-examples", "--objective", "crd", "--steps", 1, "--out", tmp_path / "s"]
    code, _, err = cli(*distill(teacher, *args))
    assert code == 2
    assert "crd remembers images of the transfer set" in err


def test_objectives_combine(cli, teacher, tmp_path):
    out = tmp_path / "s"
    args = ["--objective", "response=1", "at=1000", "fitnets", "--steps", 2, "--batch-size", 8, "--out", out]
    code, _, err = cli(*distill(teacher, *args))
    assert code == 0, err
    with (out / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {"response.soft", "at.attention", "fitnets.hint"} < row.keys()
    config = catalog.parse_yaml((out / "config.yaml").read_text(), "config")
    assert {name: values["weight"] for name, values in config["objective"].items()} == {
        "response": 1.0, "at": 1000.0, "fitnets": 100.0,
    }  # fmt: skip
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"stage1", "stage2", "fc1", "fc2", "head"}  # noqa: SIM118


@pytest.mark.parametrize("mode", [[], ["--dry-run"]])
def test_features_alone_are_learned_beside_the_labels_where_there_are_any(cli, teacher, tmp_path, mode):
    def student(out, *args):
        base = distill(teacher, "--steps", 2, "--batch-size", 16, "--out", tmp_path / out, "--json", *args, *mode)
        base[base.index("noise:64")] = "real:20" if out.startswith("real") else "noise:64"
        code, answer, err = cli(*base)
        assert code == 0, err
        return json.loads(answer), err

    said = "at: from features alone the student's head learns nothing"
    answer, err = student("real", "--objective", "at")
    assert f"{said}: it learns the labels beside them" in err
    for out, objectives in (("real0", ["at", "response=0"]), ("noise", ["at"])):
        _, err = student(out, "--objective", *objectives)
        assert "from features alone the student's head learns nothing: add --objective response" in err
    for out, objectives in (("real-both", ["at", "response"]), ("real-logits", ["fitnets", "--taps", "logits"])):
        _, err = student(out, "--objective", *objectives)
        assert "features alone" not in err
    if mode:
        assert answer["config"]["objective"]["response"]["hard"] == 1
        return
    recipe = tmp_path / "real" / "config.yaml"
    recorded = catalog.parse_yaml(recipe.read_text(), "config")["objective"]
    assert (recorded["response"]["weight"], recorded["response"]["soft"], recorded["response"]["hard"]) == (1, 0, 1)
    assert "already complete" in student("real", "--objective", "at")[1]
    assert "already complete" in student("real", "--recipe", recipe)[1]
    heads = [load_file(tmp_path / out / "model.safetensors")["head.weight"] for out in ("real", "real0", "noise")]
    assert torch.equal(heads[1], heads[2])  # as it was made
    assert not torch.equal(heads[0], heads[1])


def test_a_student_that_has_learned_nothing_is_a_concern(cli, teacher, tmp_path):
    args = ["--steps", 1, "--lr", 1e-9, "--rotate", 45, "--out", tmp_path / "s", "--json"]
    command = [a.replace("noise:64", "real:200") for a in distill(teacher, *args)]
    for _ in range(2):  # it is said of a finished run again
        code, out, err = cli(*command)
        assert code == 0, err
        [concern] = json.loads(out)["concerns"]
        share, _, what = concern.partition("% agreement with the teacher on the transfer set is ")
        assert what.startswith(f"{'hardly' if float(share) > 10 else 'not'} above chance (10.00%)")
        assert "change the images less than by --rotate 45" in concern
        assert f"warning: {concern}" in err
    assert json.loads((tmp_path / "s" / "run.json").read_text())["concerns"] == [concern]


def test_two_processes_train_a_student_whose_head_learns_nothing(teacher, tmp_path):
    args = ["--objective", "at", "fitnets", "crd", "--negatives", 16, "--steps", 3, "--batch-size", 8, "--out", "s"]
    finish_on_two(distill(teacher, *args), tmp_path)
    with (tmp_path / "s" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["at.attention"]) > 0
    state = torch.load(tmp_path / "s" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert (state["objectives.crd.classes"] >= 0).sum() == 3 * 8  # each process remembers what the other saw


@pytest.mark.parametrize("taps", [["stage7"], ["stage1", "nonsense"], ["stage1.pre"]])
def test_taps_that_are_not_there_are_refused_before_anything_is_written(cli, teacher, tmp_path, taps):
    code, out, err = cli(*distill(teacher, "--objective", "at", "--taps", *taps, "--out", tmp_path / "s"))
    assert (code, out) == (2, "")
    assert f"has no features {taps[-1]!r}" in err
    assert not (tmp_path / "s").exists()


def test_dry_run_names_every_term_and_what_is_far_off(cli, teacher, tmp_path):
    args = ["--objective", "response", "at=0.001", "--batch-size", 16, "--out", tmp_path / "s", "--dry-run"]
    code, out, err = cli(*distill(teacher, *args, "--json"))
    assert code == 0, err
    answer, attention = json.loads(out)["terms"]
    assert (answer["objective"], answer["term"], answer["suggested"]) == ("response", "soft", None)
    assert attention["suggested"] > 10
    assert not (tmp_path / "s").exists()
    code, out, _ = cli(*distill(teacher, *args))
    assert code == 0
    assert "try --set objective.at.attention=" in out


def test_dry_run_stops_at_a_term_that_teaches_nothing(cli, teacher, tmp_path):
    args = ["--objective", "rkd", "--batch-size", 2, "--out", tmp_path / "s", "--dry-run"]
    code, _, err = cli(*distill(teacher, *args))
    assert code == 2
    assert "distance is 0 on the first batches" in err


@pytest.mark.parametrize("mode", [[], ["--dry-run"]])
def test_a_phase_that_leaves_nothing_for_the_others_is_refused(cli, teacher, tmp_path, mode):
    args = ["--objective", "response", "fsp", "--student", "lenet5", "--batch-size", 16, "--out", tmp_path / "s", *mode]
    code, _, err = cli(*distill(teacher, *args))
    assert code == 2
    assert "fsp is learned alone for 30 epochs" in err
    assert not (tmp_path / "s").exists()
    code, _, err = cli(*distill(teacher, *args, "--pretraining", 1, "--epochs", 2))
    assert code == 0, err


@pytest.mark.parametrize("objectives", [["response", "sp", "pkt", "rkd", "information-flow=100"], ["dist"]])
def test_two_processes_compare_the_images_of_a_whole_batch(teacher, tmp_path, objectives):
    """They learn what one does, whose weights belong to the size of its batches; 63 images have two unequal shares."""
    args = ["--objective", *objectives, "--steps", 3, "--batch-size", 63, "--holdout", 0, "--optimizer", "sgd"]
    still = [part for name in ("rotate", "translate", "scale", "noise") for part in (f"--{name}", 0)]
    finish(distill(teacher, *args, *still, "--out", "s1"), tmp_path)
    finish_on_two(distill(teacher, *args, *still, "--out", "s2"), tmp_path)
    rows, weights = [], []
    for out in (tmp_path / "s1", tmp_path / "s2"):
        with (out / "metrics.csv").open() as file:
            (row,) = csv.DictReader(file)
        rows.append({name: float(value) for name, value in row.items() if not name.startswith("response")})
        weights.append(load_file(out / "model.safetensors"))
    assert rows[1] == pytest.approx(rows[0], rel=1e-2)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-2, atol=1e-4)


def test_two_processes_train_in_phases(teacher, tmp_path):
    """What does not count yet has no gradient in either, and is waited for by both."""
    args = ["--objective", "fsp", "response", "fitnets", "--pretraining", 1, "--student", "lenet5", "--epochs", 2]
    finish_on_two(distill(teacher, *args, "--batch-size", 16, "--out", "s"), tmp_path)
    with (tmp_path / "s" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["fsp.flow"]) > 0


def test_a_killed_run_continues_with_the_state_of_its_objectives(tmp_path, teacher):
    """kill -9 after a saved round, the same command again: the bytes of a run that nothing interrupted."""
    flags = ["--objective", "fitnets", "crd", "--negatives", "16", "--schedule", "step"]
    flags += ["--steps", "280", "--batch-size", "8"]  # the last milestone is in the second round
    command = [*distill(teacher, *flags), "--out"]
    finish([*command, "whole"], tmp_path)
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    kill_after_saving([*command, "killed"], tmp_path, checkpoint)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    states = ("fitnets.regressors.0.0.weight", "crd.embeddings.0.weight", "crd.memory", "crd.classes", "crd.scale")
    assert all(f"objectives.{name}" in saved for name in states)
    finish([*command, "killed"], tmp_path)
    for name in ("model.safetensors", "metrics.csv"):
        assert sha256_file(tmp_path / "killed" / name) == sha256_file(tmp_path / "whole" / name), name
    with safe_open(tmp_path / "whole" / "model.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if key.startswith("objectives")]  # noqa: SIM118


@pytest.mark.parametrize(
    ("train", "test"), [("train", "val"), ("train", "valid"), ("Train", "Test"), ("training_set", "test_set")]
)
def test_test_images_of_a_dataset_are_not_learned_from(cli, teacher, tmp_path, train, test):
    """Of a folder nobody says what it is, but one with both halves says enough."""
    for half in (train, test):
        (tmp_path / "data" / half / "cat").mkdir(parents=True)
        Image.new("L", (32, 32)).save(tmp_path / "data" / half / "cat" / "1.png")
    command = ["distill", "--teacher", teacher, "--steps", 1, "--batch-size", 1, "--out", tmp_path / "student"]
    code, _, err = cli(*command, "--transfer-set", tmp_path / "data")
    assert (code, f"data has {train}/ and {test}/ -- give {tmp_path}/data/{train}" in err) == (2, True), err


def test_what_a_recipe_says_of_its_teacher_is_not_said_of_another(tmp_path, caplog):
    """Which is told, but of a directory, which says itself what it is."""
    (tmp_path / "net.yaml").write_text("teacher: elsewhere\nmean: [0.5]\nnum_classes: 3\n")
    recipe = recipe_layer(str(tmp_path / "net.yaml"), "distill")
    for teacher, told in (("./other.py:build", True), (str(tmp_path), False)):
        caplog.clear()
        inputs = resolve("distill", [recipe, typed_layer({"teacher": [teacher], "num_classes": 4})]).inputs
        assert (inputs.mean, inputs.num_classes) == (None, 4)
        assert ("--teacher: the recipe speaks of another, so not of its mean" in caplog.text) == told


@pytest.mark.parametrize("typed", ["net.py:build", "./net.py:build", "here/../net.py:build", "{cwd}/net.py:build"])
def test_a_recipes_own_teacher_may_be_named_again(typed, tmp_path, monkeypatch, caplog):
    """However its path is written, what the recipe says of it holds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "net.py").touch()
    (tmp_path / "net.yaml").write_text("teacher: ./net.py:build\nweights: net.pt\nmean: [0.5]\n")
    flags = typed_layer({"teacher": [typed.format(cwd=tmp_path)]})
    inputs = resolve("distill", [recipe_layer("net.yaml", "distill"), flags]).inputs
    assert (inputs.mean, inputs.weights, caplog.text) == ((0.5,), "net.pt", "")


def test_images_by_the_class(cli, make_teacher, tmp_path):
    """So many times the classes, which take turns; of two counts the later word is the one that counts."""
    teacher = make_teacher("lenet5")
    made = ["synthesize", "--method", "class-impressions", "--iterations", 1, "--batch-size", 8, "--teacher", teacher]
    (tmp_path / "made.yaml").write_text("command: synthesize\nmethod: class-impressions\nnum_images: 5\n")
    made += ["--recipe", tmp_path / "made.yaml"]
    assert cli(*made, "--images-per-class", 3, "--out", tmp_path / "set")[0] == 0
    reader = ShardReader(tmp_path / "set")
    targets = torch.cat([reader.read(index)["targets"] for index in range(len(reader.sizes))])
    assert targets.sum(0).tolist() == [3] * 10
    for more in ([], ["--dry-run"]):  # the same command again is the same run
        code, _, err = cli(*made, "--images-per-class", 3, "--out", tmp_path / "set", *more)
        assert code == 0, err
    (tmp_path / "made.yaml").write_text("command: synthesize\nmethod: class-impressions\nimages_per_class: 3\n")
    assert cli(*made, "--num-images", 5, "--out", tmp_path / "five")[0] == 0
    code, _, err = cli(*made, "--num-images", 5, "--images-per-class", 3, "--out", tmp_path / "both")
    assert (code, "--num-images and --images-per-class are two words on one thing" in err) == (2, True)
    code, _, err = cli("distill", "--set", "num_images=9", "--set", "images_per_class=2")
    assert (code, "--set num_images and --set images_per_class are two words on one thing" in err) == (2, True)
    assert sum(ShardReader(tmp_path / "five").sizes) == 5
    taught = ["distill", "--teacher", teacher, "--transfer-set", tmp_path / "set", "--steps", 1, "--holdout", 0]
    assert cli(*taught, "--images-per-class", 2, "--out", tmp_path / "student")[0] == 0
    assert json.loads((tmp_path / "student" / "run.json").read_text())["num_images"] == 20
    code, _, err = cli(*taught, "--images-per-class", 4, "--out", tmp_path / "more")
    assert code == 2 and "--images-per-class 4: of class 0 the transfer sets have 3 images" in err
    taught[4] = "noise:100"
    code, _, err = cli(*taught, "--images-per-class", 4, "--out", tmp_path / "more")
    assert code == 2 and "--images-per-class 4: the images have no labels" in err
    code, _, err = cli(*made, "--images-per-class", 20_000_000, "--out", tmp_path / "many")
    assert code == 2 and "--images-per-class" in err
