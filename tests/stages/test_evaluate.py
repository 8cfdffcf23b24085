"""`dfkd evaluate` on directories that are made here."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from digit_images import digits, top1_of
from stand_ins import write_shards
from torch import nn
from torchvision.io import write_png
from torchvision.utils import save_image

from dfkd_cli.artifacts.shards import MANIFEST, ShardReader
from dfkd_cli.cli.app import main
from dfkd_cli.data import datasets
from dfkd_cli.models.classifier import Classifier, ModelInfo, is_batch_norm
from dfkd_cli.models.directory import identity, load_model, save_model
from dfkd_cli.models.registry import build
from dfkd_cli.report import evaluation
from dfkd_cli.stages.measures import Examination
from dfkd_cli.urls import COPIES

DIGITS = tuple("0123456789")


def make_model(path: Path, spec: str, seed: int = 0, classes: int = 10, **provenance) -> str:
    """A random model that gives digits various classes. Returns its sha256."""
    info = ModelInfo(spec, classes, (1, 32, 32), (0.3,), (0.4,), DIGITS[:classes])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = Classifier(build(spec, classes, info.input_size), info).eval()
        model.head().bias -= model(digits()[0][:50]).mean(0)
    return save_model(path, model, metrics={}, provenance=provenance)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """teacher/ and student/ as the pipeline leaves them, shards/ of resnet/, and things that do not fit."""
    root = tmp_path_factory.mktemp("pipeline")
    teacher = make_model(root / "teacher", "lenet5", dataset="digits")
    make_model(root / "student", "lenet5-half", dataset="digits", teacher=teacher)
    make_model(root / "orphan", "lenet5-half", seed=1, dataset="digits", teacher="f" * 64)
    make_model(root / "three", "lenet5-half", classes=3, dataset="digits")
    make_model(root / "nameless", "lenet5-half")
    resnet = make_model(root / "resnet", "resnet8", dataset="digits")
    write_shards(root / "shards", load_model(root / "resnet")[0], resnet)
    (root / "empty").mkdir()
    return root


@pytest.fixture
def here(pipeline, tmp_path, monkeypatch) -> Path:
    """A copy of the pipeline, as the working directory."""
    shutil.copytree(pipeline, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nothing_named_is_the_student_beside_the_teacher(pipeline, dfkd):
    before = sorted(pipeline.rglob("*"))
    done = dfkd("evaluate", "--json", cwd=pipeline)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)  # one document and nothing else
    assert set(answer) == {"schema", "ok", "command", "artifacts", "metrics", "results", "seconds"}
    assert (answer["schema"], answer["ok"], answer["command"], answer["artifacts"]) == (1, True, "evaluate", {})
    teacher, student = answer["results"]
    for result in (teacher, student):
        assert set(result) == {
            "path", "kind", "spec", "uses", "dataset", "count", "top1", "top5", "nll", "ece", "per_class", "agreement",
            "parameters", "bytes", "macs", "latency_ms", "device",
        }  # fmt: skip
        assert tuple(result["per_class"]) == DIGITS
        assert (result["count"], result["dataset"]) == (360, "digits")
    (accuracy, given), (student_accuracy, student_given) = (top1_of(pipeline / n) for n in ("teacher", "student"))
    assert (teacher["path"], teacher["top1"], teacher["agreement"]) == ("teacher", accuracy, 1.0)
    assert (student["path"], student["top1"]) == ("student", student_accuracy)
    assert student["agreement"] == (given == student_given).mean()
    assert 0 < student["agreement"] < 1
    assert student["parameters"] == 78 + 608 + 24120 + 10164 + 850
    assert {k: answer["metrics"][k] for k in ("top1", "macs")} == {k: student[k] for k in ("top1", "macs")}
    assert sorted(pipeline.rglob("*")) == before


def test_gate_and_out(here, dfkd):
    done = dfkd("evaluate", "teacher", "student", "--min-top1", "1", "--out", "out", "--json", cwd=here)
    assert done.returncode == 5, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["ok"], answer["error"]["code"]) == (False, "gate")
    assert f"student {top1_of(here / 'student')[0]:.6g}" in answer["error"]["message"]
    written = json.loads((here / "out" / "results.json").read_text())
    assert [result["path"] for result in written["results"]] == ["teacher", "student"]
    assert json.loads((here / "out" / "run.json").read_text())["status"] == "done"


def test_gate_at_the_very_accuracy_is_met(here, cli):
    exact = top1_of(here / "student")[0]
    assert cli("evaluate", "student/", "--min-top1", repr(exact))[0] == 0
    code, out, err = cli("evaluate", "student/", "--min-top1", repr(exact + 1e-9))
    assert code == 5
    assert f"{exact:.2%}" in out  # the results are shown all the same
    assert "top-1 is below" in err


def test_out_again_and_replayed(here, cli):
    code, first, _ = cli("evaluate", "shards", "student", "--out", "out", "--json")
    assert code == 0
    assert json.loads(first)["artifacts"] == {"results": "out/results.json"}
    before = (here / "out" / "results.json").read_bytes()
    code, again, messages = cli("evaluate", "shards", "student", "--out", "out", "--json", "--min-top1", "0")
    assert code == 0
    assert "already complete" in messages
    assert json.loads(again)["results"] == json.loads(first)["results"] == json.loads(before)["results"]
    assert cli("evaluate", "shards", "orphan", "--out", "out")[0] == 2  # something else is there
    assert (here / "out" / "results.json").read_bytes() == before
    code, replayed, _ = cli("evaluate", "--recipe", "out/config.yaml", "--out", "other", "--json")
    assert code == 0
    assert [result["path"] for result in json.loads(replayed)["results"]] == ["shards", "student"]


def test_what_is_named_twice_and_then_once_is_measured_again(here, cli):
    for paths in (["student", "shards", "student"], ["student", "shards"]):
        code, out, err = cli("evaluate", *paths, "--out", "out", "--json")
        assert (code, [result["path"] for result in json.loads(out)["results"]]) == (0, paths)
        assert "already complete" not in err
    assert "already complete" in cli("evaluate", *paths, "--out", "out")[2]


def test_shards_and_models_mix(here, cli):
    code, out, err = cli("evaluate", "shards", "student/", "--teacher", "resnet", "--json")
    assert code == 0, err
    shards, student = json.loads(out)["results"]
    assert set(shards) == {
        "path", "kind", "method", "uses", "teacher", "count", "confidence", "class_balance", "class_histogram",
        "target_match", "target_divergence", "diversity", "value_range", "bn_distance", "bn_distance_layers",
        "bn_divergence", "bn_divergence_layers", "logits_ok", "agreement",
    }  # fmt: skip
    assert shards["agreement"] is None  # it is their own teacher
    assert (shards["path"], shards["kind"], shards["method"], shards["count"]) == ("shards", "shards", "zskd", 13)
    assert shards["logits_ok"] is True
    assert len(shards["bn_distance_layers"]) == len(load_model(here / "resnet")[0].batch_norms())
    assert shards["bn_distance"] == pytest.approx(sum(shards["bn_distance_layers"].values()))
    assert (student["path"], student["kind"]) == ("student/", "model")
    assert student["agreement"] == (top1_of(here / "student")[1] == top1_of(here / "resnet")[1]).mean()
    code, out, _ = cli("evaluate", "shards", "student/", "--teacher", "resnet")
    assert code == 0
    assert " ".join(out.splitlines()[0].split()) == "MODEL TOP-1 TOP-5 NLL ECE AGREEMENT PARAMS BYTES MACS LATENCY"
    heads = "SET IMAGES CONFIDENCE BALANCE TARGET MATCH DIVERSITY BN DISTANCE BN DIVERGENCE"
    assert " ".join(out.splitlines()[2].split()) == heads
    assert f"{student['top1']:.2%}" in out.splitlines()[1]
    assert f"{shards['bn_distance']:.3f}" in out.splitlines()[3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A directory with the teacher and some of its training images as files."""
    root = tmp_path_factory.mktemp("trained")
    code = main(
        ["train-teacher", "--model", "resnet8", "--steps", "30", "--batch-size", "32", "--out", f"{root}/teacher"]
    )
    assert code == 0
    train = datasets.load("digits", "train")
    (root / "photos").mkdir()
    for index, pixels in enumerate(train.images(torch.arange(60))):
        write_png(pixels, str(root / "photos" / f"{index}.png"))
    return root


def test_sets_of_images_are_ranked_by_their_likeness_to_the_training_data(trained, dfkd):
    paths = ["noise:100", "real:100", "photos/", "digits"]
    done = dfkd("evaluate", *paths, "--out", "out", "--json", cwd=trained)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert json.loads((trained / "out" / "results.json").read_text())["results"] == results
    assert [(r["path"], r["kind"], r["count"]) for r in results] == [
        ("noise:100", "images", 100), ("real:100", "images", 100),
        ("photos/", "images", 60), ("digits", "images", 1437),
    ]  # fmt: skip
    noise, *real = [result["bn_divergence"] for result in results]
    assert noise > 1.5 * max(real)
    layers = [
        name for name, m in load_model(trained / "teacher")[0].net.named_modules() if isinstance(m, nn.BatchNorm2d)
    ]
    for result in results:
        assert sorted(result["bn_divergence_layers"]) == sorted(layers)
        assert result["bn_divergence"] == pytest.approx(np.mean(list(result["bn_divergence_layers"].values())))


def test_ranks_are_shown_and_by_layer_where_more_is_asked_for(trained, monkeypatch, cli):
    monkeypatch.chdir(trained)
    paths = ["teacher", "noise:40", "digits:40"]
    code, out, err = cli("evaluate", *paths, "--teacher", "teacher", "-v")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[:5]] == ["MODEL", "teacher", "SET", "digits:40", "noise:40"]
    layers = load_model(trained / "teacher")[0].batch_norms()
    assert lines[5] == ["BN", "DIVERGENCE", "digits:40", "noise:40"]
    assert len(lines) == 6 + len(layers)
    assert len(cli("evaluate", *paths)[1].splitlines()) == 5


def test_sets_of_several_teachers_are_ranked_by_teacher(trained, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "teacher", "b")
    make_model(tmp_path / "a", "resnet14", dataset="digits")
    for number, name in enumerate(["b", "a", "b"]):
        command = ["synthesize", "--method", "noise", "--num-images", "8", "--teacher", name, "--seed", str(number)]
        assert cli(*command, "--out", f"s{number}")[0] == 0
    code, out, err = cli("evaluate", "s0", "s1", "s2", "-v")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:3] == ["SET", "TEACHER", "IMAGES"]
    assert [line[1] for line in lines[1:4]] == ["a", "b", "b"]
    layers = {line[0]: line[1:] for line in lines[5:]}
    nets = [load_model(Path(name))[0].net for name in ("a", "b")]
    of_a, of_b = ({name for name, layer in net.named_modules() if is_batch_norm(layer)} for net in nets)
    assert set(layers) == of_a | of_b
    assert {layers[name].count("-") for name in of_a - of_b} == {2}
    assert "TEACHER" not in cli("evaluate", "s0", "s2")[1]


def test_images_without_batch_norm_or_without_a_teacher(pipeline, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(pipeline)
    code, out, _ = cli("evaluate", "noise:30", "digits:30")  # a LeNet-5
    assert code == 0
    assert " ".join(out.splitlines()[0].split()) == "SET IMAGES CONFIDENCE BALANCE DIVERSITY"
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["noise:30", "digits:30"]
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("evaluate", "noise:30")
    assert code == 2
    assert "give --teacher" in err


def test_a_table_in_a_file_has_whole_paths(here, cli):
    path = "runs/[red]of a very long name" + "x" * 70
    shutil.move(here / "shards", here / path)
    code, out, _ = cli("evaluate", path)
    assert code == 0
    assert path in out.splitlines()[1]


def test_false_logits_are_reported(here, cli):
    classifier, record = load_model(here / "teacher")
    write_shards(here / "false", classifier, identity(record), shift=1.0)
    code, out, err = cli("evaluate", "false", "--json")
    assert code == 0
    assert json.loads(out)["results"][0]["logits_ok"] is False
    assert "false: the stored logits" in err


def test_a_teacher_that_is_not_the_recorded_one(here, cli):
    code, out, err = cli("evaluate", "orphan", "shards", "--json")
    assert code == 0
    orphan, shards = json.loads(out)["results"]
    assert orphan["agreement"] is shards["logits_ok"] is None
    assert err.count("give --teacher") == 1
    assert "orphan, shards:" in err
    code, out, err = cli("evaluate", "orphan", "--teacher", "student", "--json")
    given = [top1_of(here / name)[1] for name in ("orphan", "student")]
    assert json.loads(out)["results"][0]["agreement"] == (given[0] == given[1]).mean()
    assert "give --teacher" not in err
    code, out, _ = cli("evaluate", "shards", "--teacher", "teacher", "--json")  # images like any others to it
    assert code == 0
    assert (shown := json.loads(out)["results"][0])["kind"] == "images"
    reader, teacher = ShardReader(Path("shards")), load_model(Path("teacher"))[0]
    with torch.no_grad():
        answers = torch.cat([teacher(reader.read(i)["images"].float()) for i in range(len(reader.sizes))])
    assert shown["class_histogram"] == answers.argmax(1).bincount(minlength=10).tolist() != shards["class_histogram"]
    stored = torch.cat([reader.read(i)["logits"] for i in range(len(reader.sizes))])
    assert shown["agreement"] == float((stored.argmax(1) == answers.argmax(1)).double().mean())


def test_agreement_is_of_classes_and_not_of_their_numbers(here, cli):
    """The same network, its classes counted backwards, agrees with itself everywhere."""
    model, _ = load_model(here / "teacher")
    with torch.no_grad():
        for parameter in model.head().parameters():
            parameter.copy_(parameter.flip(0))
    for name, classes in (("reversed", model.info.classes[::-1]), ("wrong", model.info.classes)):
        info = dataclasses.replace(model.info, classes=classes)
        save_model(here / name, Classifier(model.net, info), metrics={}, provenance={"dataset": "digits"})
    code, out, err = cli("evaluate", "teacher", "reversed", "wrong", "--teacher", "teacher", "--json")
    assert code == 0, err
    teacher, other, wrong = json.loads(out)["results"]
    assert other["top1"] == teacher["top1"] < 1
    assert other["agreement"] == 1
    given = top1_of(here / "teacher")[1]
    assert wrong["agreement"] == (given == 9 - given).mean() == 0  # although its weights are those of the other
    assert "matched by position" not in err


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [
        (("a", "b", "c"), ("c", "b", "a"), 1.0),
        (("a", "b", "c"), ("a", "b", "c"), 0.25),
        (("a", "b", "c"), ("a", "b", "d"), 0.25),  # other names: by position
        (("a", "a", "b"), ("a", "a", "b"), 0.25),  # names that tell nothing apart
    ],
)
def test_agreement_is_by_name_in_any_order(own, theirs, expected):
    student, teacher = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 2])
    assert Examination({}, student, own).agreement(Examination({}, teacher, theirs)) == expected


def test_classes_without_names_are_matched_by_position_and_that_is_said(here, cli):
    model, record = load_model(here / "student")
    teacher = record["provenance"]["teacher"]
    for name, classes in (("unnamed", None), ("strange", tuple("abcdefghij"))):
        other = Classifier(model.net, dataclasses.replace(model.info, classes=classes))
        save_model(here / name, other, metrics={}, provenance={"dataset": "digits", "teacher": teacher})
    code, out, err = cli("evaluate", "student", "unnamed", "strange", "--json")
    assert code == 0, err
    named, *others = json.loads(out)["results"]
    for other in others:
        assert [other[key] for key in ("top1", "agreement", "per_class")] == [
            named[key] for key in ("top1", "agreement", "per_class")
        ]
    assert err.count("matched by position") == 1
    assert "unnamed, strange: no class names" in err
    assert "matched by position" not in cli("evaluate", "student")[2]
    learn = ("distill", "--transfer-set", "real:20", "--steps", "1", "--batch-size", "4", "--out", "learned")
    for teacher, said in (("unnamed", 1), ("teacher", 0)):
        code, _, err = cli(*learn, "--teacher", teacher, "--overwrite")
        assert (code, err.count("matched by position")) == (0, said), err


def test_images_that_changed_are_measured_anew(here, cli):
    for place in ("train/0", "train/1", "test/0", "test/1"):
        Path("photos", place).mkdir(parents=True)
        save_image(torch.rand(1, 32, 32), f"photos/{place}/0.png")
    make_model(here / "two", "lenet5-half", classes=2)
    command = ["evaluate", "two", "--dataset", "photos", "--out", "measured"]
    assert cli(*command)[0] == 0
    assert "already complete" in cli(*command)[2]
    save_image(torch.rand(1, 32, 32), "photos/test/0/1.png")
    code, _, err = cli(*command)
    assert (code, "another dataset" in err) == (2, True)


def test_a_teacher_alone(here, cli):
    shutil.rmtree(here / "student")
    code, out, err = cli("evaluate", "--json")
    assert [result["path"] for result in json.loads(out)["results"]] == ["teacher"]
    assert "give --teacher" not in err
    shutil.rmtree(here / "teacher")
    code, out, _ = cli("evaluate", "--json")
    assert code == 3
    assert json.loads(out)["error"]["code"] == "artifact"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent"], 3, "absent: no such directory"),
        (["empty"], 3, "empty: no image files in it"),
        (["student", "noise"], 2, "noise needs a number of images"),
        (["digits:many"], 2, "digits:many: 'many' is not a number of images"),
        (["digits:5000"], 2, "the dataset has 1437"),
        (["student", "absent"], 3, "absent"),
        (["three"], 3, "digits has 10 classes, three 3"),
        (["student", "--teacher", "three"], 3, "digits has 10 classes, three 3"),
        (["student", "--teacher", "absent"], 3, "no teacher at absent"),
        (["nameless"], 2, "give --dataset"),
        (["student", "--dataset", "digitz"], 2, "did you mean 'digits'"),
        (["student", "--dataset", ""], 2, "dataset '': neither a known name nor a directory"),
        (["shards", "--min-top1", "0.5"], 2, "these are images -- dfkd evaluate student/ --min-top1 0.97"),
        (["student", "--min-top1", "95"], 2, "at most 1"),
        pytest.param(
            ["student", "--device", "cuda"], 2, "--device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(pipeline, monkeypatch, cli, arguments, code, message):
    monkeypatch.chdir(pipeline)
    status, out, err = cli("evaluate", *arguments, "--json")
    assert status == code
    assert message in err
    assert json.loads(out)["ok"] is False


def test_a_dataset_where_the_record_names_none(pipeline, monkeypatch, cli):
    monkeypatch.chdir(pipeline)
    code, out, err = cli("evaluate", "nameless", "--dataset", "digits", "--json")
    assert code == 0, err
    assert json.loads(out)["results"][0]["agreement"] is None
    assert "give --teacher" not in err  # it records none


def test_a_damaged_shard(here, cli):
    name = json.loads((here / "shards" / MANIFEST).read_text())["shards"][1]["file"]
    data = bytearray((here / "shards" / name).read_bytes())
    data[-1] ^= 1
    (here / "shards" / name).write_bytes(data)
    code, _, err = cli("evaluate", "shards")
    assert code == 3
    assert name in err


def test_dry_run_opens_everything_and_writes_nothing(pipeline, monkeypatch, cli):
    monkeypatch.chdir(pipeline)
    before = sorted(pipeline.rglob("*"))
    code, out, _ = cli("evaluate", "student", "--dry-run", "--out", "out", "--json")
    assert code == 0
    assert json.loads(out)["config"]["paths"] == ["student"]
    code, _, err = cli("evaluate", "three", "--dry-run")
    assert (code, "has 10 classes, three 3" in err) == (3, True), err
    assert sorted(pipeline.rglob("*")) == before


def test_results_are_there_when_the_gate_is_not_met(here, cli):
    code, out, _ = cli("evaluate", "student", "--min-top1", "1", "--json")
    answer = json.loads(out)
    assert (code, answer["ok"], answer["error"]["code"]) == (5, False, "gate")
    assert answer["results"][0]["top1"] == answer["metrics"]["top1"] == top1_of(here / "student")[0]


# -- without labels ----------------------------------------------------------------------------------------------------


def answers_on(path: Path, shards: Path) -> np.ndarray:
    """The classes that a model gives to the images of shards, without the code under test."""
    reader = ShardReader(shards)
    images = torch.cat([reader.read(index)["images"].float() for index in range(len(reader.sizes))])
    with torch.no_grad():
        return load_model(path)[0].eval()(images).argmax(1).numpy()


def test_models_are_compared_on_images_without_labels(here, cli):
    code, out, err = cli("evaluate", "student", "teacher", "--unlabelled", "shards", "noise:20", "--json")
    assert code == 0, err
    student, teacher = json.loads(out)["results"]
    given, right = (answers_on(here / name, here / "shards") for name in ("student", "teacher"))
    assert student["agreement_on"]["shards"] == (given == right).mean()
    assert 0 <= student["agreement_on"]["noise:20"] <= 1 and teacher["agreement_on"] == {"shards": 1, "noise:20": 1}
    assert student["top1"] == top1_of(here / "student")[0]
    code, out, _ = cli("evaluate", "student", "--unlabelled", "shards")
    assert code == 0 and "AGREEMENT ON shards" in " ".join(out.split())


@pytest.mark.parametrize("name", ["shards[v2]", "sh[/x]"])
def test_the_heading_of_images_without_labels_is_their_name(name, here, cli):
    shutil.copytree("shards", name)
    code, out, err = cli("evaluate", "student", "--unlabelled", name)
    assert code == 0, err
    assert f"AGREEMENT ON {name}" in out


def test_the_heading_of_a_copy_is_its_url(monkeypatch):
    monkeypatch.setenv(COPIES, json.dumps({"s3://bucket/shards": "/copies/1"}))
    (columns,) = (columns for kinds, columns in evaluation.tables(["/copies/1"]).items() if "model" in kinds)
    table = evaluation.rows([{"path": "student", "agreement_on": {"s3://bucket/shards": 0.5}}], columns)
    assert table.columns == {"MODEL": ["student"], "AGREEMENT ON s3://bucket/shards": ["50.00%"]}


def test_nobody_has_to_have_test_images(here, cli):
    """A teacher whose data nobody may see has none: then agreement is what is left to measure, and to gate."""
    for name in ("teacher", "student"):
        model, record = load_model(here / name)
        provenance = {key: value for key, value in record["provenance"].items() if key != "dataset"}
        save_model(here / f"own-{name}", model, metrics={}, provenance=provenance)
    args = ["evaluate", "own-student", "--teacher", "own-teacher", "--json"]
    code, _, err = cli(*args)
    assert code == 2 and "--unlabelled" in err
    code, out, err = cli(*args, "--unlabelled", "shards", "--out", "out")
    assert code == 0, err
    (result,) = json.loads(out)["results"]
    expected = (answers_on(here / "student", here / "shards") == answers_on(here / "teacher", here / "shards")).mean()
    assert result["agreement_on"] == {"shards": expected} and 0 < expected < 1
    assert result["dataset"] is None and "top1" not in result and result["parameters"] > 0
    parents = json.loads((here / "out" / "run.json").read_text())["parents"]
    assert [parent["role"] for parent in parents] == ["teacher", "model", "transfer-set"]
    gates = (
        ("agreement", expected, 0, ""),
        ("agreement", expected + 1e-6, 5, "error: agreement is below"),
        ("top1", 0.1, 2, "its record names no dataset to test on"),
    )
    for gate, least, code, words in gates:
        got, _, err = cli(*args, "--unlabelled", "shards", f"--min-{gate}", least)
        assert (got, words in err) == (code, True), err


def test_classes_in_another_order_are_the_same_classes_without_labels_too(here, cli):
    model, record = load_model(here / "student")
    turned = dataclasses.replace(model.info, classes=DIGITS[::-1])
    model.head().weight.data, model.head().bias.data = (part.data.flip(0) for part in model.head().parameters())
    save_model(here / "turned", Classifier(model.net, turned), metrics={}, provenance=record["provenance"])
    code, out, err = cli("evaluate", "student", "turned", "--unlabelled", "shards", "--json")
    assert code == 0, err
    one, other = json.loads(out)["results"]
    assert one["agreement_on"] == other["agreement_on"] != {"shards": 1}


def model_of(path: str, seed: int, size: int, dataset: str, **provenance) -> str:
    """A random model of square grey images. Returns its sha256."""
    info = ModelInfo("resnet8", 2, (1, size, size), (0.3,), (0.4,), ("a", "b"))
    torch.manual_seed(seed)
    model = Classifier(build(info.spec, 2, info.input_size), info).eval()
    with torch.no_grad():
        model.head().bias -= model(torch.rand(50, *info.input_size)).mean(0)
    return save_model(Path(path), model, metrics={}, provenance={"dataset": dataset, **provenance})


def test_images_without_labels_are_opened_for_each_teacher(tmp_path, monkeypatch, cli):
    """What ``real`` is, and of which size noise is, a model's own teacher says."""
    monkeypatch.chdir(tmp_path)
    for size, count in ((32, 2), (64, 3)):
        for place in ("train/a", "train/b", "test/a", "test/b"):
            Path(f"photos{size}", place).mkdir(parents=True)
            for index in range(count):
                save_image(torch.rand(1, size, size), f"photos{size}/{place}/{index}.png")
        teacher = model_of(f"{size}/teacher", 0, size, f"photos{size}")
        model_of(f"{size}/pupil", 1, size, f"photos{size}", teacher=teacher)
    model_of("64/odd", 1, 32, "photos64", teacher=teacher)

    def agreed(*models: str) -> dict:
        code, out, err = cli("evaluate", *models, "--unlabelled", "real", "noise:40", "--json")
        assert code == 0, err
        return {result["path"]: result["agreement_on"] for result in json.loads(out)["results"]}

    alone = agreed("32/pupil") | agreed("64/pupil")
    assert alone["32/pupil"] != alone["64/pupil"], "equal shares would hide a mistake"
    assert agreed("32/pupil", "64/pupil") == alone
    code, _, err = cli("evaluate", "64/odd", "--unlabelled", "noise:40", "--dataset", "photos32")
    assert (code, "--unlabelled noise:40: its teacher is shown images of (1, 64, 64), 64/odd takes" in err) == (3, True)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["student", "--min-agreement", 0.5], 2, "on which images"),
        (["nameless", "--dataset", "digits", "--unlabelled", "shards"], 2, "has no teacher that is known here"),
        (["student", "--unlabelled", "nowhere"], 3, "nowhere"),
        (["shards", "--teacher", "resnet", "--unlabelled", "shards"], 2, "these are images"),
    ],
)
def test_what_cannot_be_compared_without_labels(args, code, message, here, cli):
    if "nameless" in args:
        shutil.rmtree("teacher")
    assert (found := cli("evaluate", *args))[0] == code
    assert message in found[2]
