"""Activation statistics of a population, however it is cut; and metadata as commands and grids use them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dropout_network import TEMPERATURE, forward, small_teacher
from pipeline import edit
from stand_ins import random_images, statistics_of, synthesizer
from torch import nn

from dfkd_cli.artifacts.metadata import read_metadata
from dfkd_cli.data import datasets
from dfkd_cli.data.sources import RealSource
from dfkd_cli.errors import RunFailed
from dfkd_cli.models.activations import Tap, pre_activations, values_at
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import identity, load_model
from dfkd_cli.models.statistics import Covariance
from dfkd_cli.stages.collect_metadata import collect, last_layers
from dfkd_cli.synthesizers.lopes import fixed_dropout

CPU = torch.device("cpu")
FAST = ("--batch-size", "4", "--iterations", "2", "--num-images", "8")
FEW = ("--num-images", "40", "--covariance-units", "100")  # of LeNet-5: fc2 and head


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("units", [1, 8, 26])
def test_statistics_are_those_of_the_population_however_the_images_are_cut(batch_size, chunk, units):
    teacher, classes = small_teacher(), 3
    source = random_images(teacher.info, 31, chunk)
    images = source.all()
    values, labels = forward(teacher, images.pixels.double().numpy() / 255), images.true_labels.numpy()
    seen = []
    metadata = collect(teacher, source, CPU, batch_size, TEMPERATURE, units, seen.append)
    assert (seen[-1], seen == sorted(seen)) == (31, True)
    assert list(metadata.layers) == list(values)
    assert metadata.counts == np.bincount(labels).tolist()
    assert metadata.joint == {1: ("6",), 8: ("4", "6"), 26: ("0", "4", "6")}[units]
    stacked = np.concatenate([values[name] for name in metadata.joint], axis=1)
    for label in range(classes):
        mine = labels == label
        for name, layer in metadata.layers.items():
            assert layer.shape == {"0": (2, 3, 3), "4": (5,), "6": (3,)}[name]
            np.testing.assert_allclose(layer.mean[label], values[name][mine].mean(0), atol=2e-6)
            np.testing.assert_allclose(layer.std[label], values[name][mine].std(0), atol=2e-6)
        covariance = np.cov(stacked[mine].T, bias=True)
        np.testing.assert_allclose(metadata.covariance[label], covariance, atol=2e-6)
        last = metadata.block(metadata.joint[-1:])[label]
        np.testing.assert_allclose(last, covariance[-classes:, -classes:], atol=2e-6)


@pytest.mark.parametrize("batches", [[50], [1] * 50, [1, 30, 19]])
def test_streamed_covariance_loses_no_digits_far_from_zero(batches):
    rows = np.random.default_rng(0).normal(size=(50, 4)) @ np.diag([1, 2, 3, 0]) + 1e6
    seen = Covariance(4)
    assert not seen.covariance.any()
    for part in torch.split(torch.from_numpy(rows), batches):
        seen.add(part)
    exact = np.cov((rows - 1e6).T, bias=True)
    np.testing.assert_allclose(seen.covariance, exact, atol=1e-7)
    np.testing.assert_allclose(seen.variance, np.diag(exact), atol=1e-7)
    np.testing.assert_allclose(seen.mean, rows.mean(0), rtol=1e-14)


@pytest.mark.parametrize(("limit", "expected"), [(1, "c"), (9, "c"), (10, "c"), (29, "c"), (30, "bc"), (35, "abc")])
def test_the_covariance_takes_the_last_layers_that_fit(limit, expected):
    assert last_layers({"a": 5, "b": 20, "c": 10}, limit) == list(expected)
    assert last_layers({"a": 1, "b": 100, "c": 10}, 20) == ["c"]  # nothing beyond a layer that does not fit


def test_a_class_without_images_has_no_statistics_and_is_never_made(tmp_path):
    teacher = small_teacher()
    source = random_images(teacher.info, 30)
    source.dataset.labels[source.dataset.labels == 1] = 2
    metadata = collect(teacher, source, CPU, 10, TEMPERATURE, 8)
    assert metadata.counts == [10, 0, 20]
    assert not any(layer.mean[1].any() or layer.std[1].any() for layer in metadata.layers.values())
    targets = synthesizer("lopes", tmp_path, teacher, {"batch_size": 6}, metadata=metadata).targets(1, 4).labels
    assert targets.argmax(1).tolist() == [2, 0, 2, 0]


def test_values_that_are_not_finite_stop_the_collection():
    teacher = small_teacher()
    with torch.no_grad():
        teacher.net[4].weight[0] = torch.inf
    with pytest.raises(RunFailed, match="not finite"):
        statistics_of(teacher)


def test_statistics_that_cannot_fit_are_refused_before_an_image_is_read(monkeypatch):
    teacher, read = small_teacher(), []
    monkeypatch.setattr(RealSource, "chunk", lambda _, index: read.append(index))
    said = {"SC_PAGE_SIZE": 1024, "SC_PHYS_PAGES": 1}
    monkeypatch.setattr(os, "sysconf", said.__getitem__)
    source = RealSource(datasets.load("digits", "train", image_shape=teacher.info.input_size))
    with pytest.raises(RunFailed, match=r"statistics of [\d,]+ units by \d+ classes take .* GiB") as refused:
        collect(teacher, source, torch.device("cpu"), 4, TEMPERATURE, 8)
    assert "--covariance-units" in refused.value.hint and not read


def test_layers_are_found_in_the_order_they_run_and_normalised_ones_by_their_batchnorm(make_teacher):
    resnet, _ = load_model(make_teacher("resnet8"))
    found = pre_activations(resnet)
    kinds = [type(layer) for layer in found.values()]
    assert kinds == [nn.BatchNorm2d] * (len(kinds) - 1) + [nn.Linear]
    assert len([m for m in resnet.net.modules() if isinstance(m, nn.Conv2d)]) == len(kinds) - 1
    assert all(resnet.net.get_submodule(name) is layer for name, layer in found.items())

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.unused, self.body = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(9, 4)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)).relu_())

    made = Classifier(Backwards(), ModelInfo("b", 2, (1, 3, 3), mean=(0.0,), std=(1.0,)))
    assert list(pre_activations(made)) == ["body", "head"]
    with values_at({name: Tap(layer) for name, layer in pre_activations(made).items()}) as outputs:
        images = torch.randn(8, 1, 3, 3)
        made(images)
    assert (outputs["body"] < 0).any()  # what was there before the activation in place
    torch.testing.assert_close(outputs["body"], made.net.body(images.flatten(1)))


@pytest.mark.parametrize("watch", [lambda layer: values_at({"3": Tap(layer)}), lambda layer: fixed_dropout([layer])])
def test_hooks_are_gone_however_the_block_ends(watch):
    teacher = small_teacher()
    with pytest.raises(ZeroDivisionError), watch(teacher.net[3]):
        assert teacher.net[3]._forward_hooks
        raise ZeroDivisionError
    assert not teacher.net[3]._forward_hooks


# -- as commands -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_teacher, dfkd) -> Path:
    """A teacher, metadata, shards and a student; each command in a process of its own. No test may change them."""
    path = tmp_path_factory.mktemp("lopes")
    shutil.copytree(make_teacher("lenet5"), path / "teacher")
    for command in (
        ["collect-metadata", *FEW],
        ["synthesize", "--method", "lopes", "--metadata", "metadata", *FAST],
        ["distill", "--steps", "2", "--batch-size", "4"],
    ):
        done = dfkd(*command, cwd=path)
        assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_metadata_is_of_the_teachers_own_training_images(here):
    teacher, record = load_model(Path("teacher"))
    metadata, _ = read_metadata(Path("metadata"), identity(record))
    assert (sum(metadata.counts), metadata.temperature, metadata.joint) == (40, 8.0, ("fc2.0", "head"))
    assert set(metadata.counts) == {4}
    dataset = datasets.load("digits", "train", image_shape=(1, 32, 32))
    chosen = datasets.class_balanced(dataset.labels, 40, 0)
    assert dataset.labels[chosen].bincount().tolist() == [4] * 10
    run = json.loads(Path("metadata/run.json").read_text())
    assert run["data_free"] is False
    assert [(p["role"], p.get("spec")) for p in run["parents"]] == [("teacher", None), ("dataset", "digits")]
    assert teacher.num_parameters == 61_706


def test_collecting_again_changes_nothing_and_something_else_is_refused(here, cli, tmp_path):
    def stamps():
        return {p.name: p.stat().st_mtime_ns for p in Path("metadata").iterdir()}

    before = stamps()
    code, _, err = cli("collect-metadata", *FEW)
    assert (code, "already complete" in err, stamps()) == (0, True, before)
    code, _, err = cli("collect-metadata", *FEW, "--temperature", 4)
    assert (code, "temperature: 8.0 -> 4.0" in err, stamps()) == (2, True, before)
    assert cli("collect-metadata", *FEW, "--out", tmp_path / "again")[0] == 0
    for name in ("metadata.safetensors", "metadata.json"):
        assert (tmp_path / "again" / name).read_bytes() == (here / "metadata" / name).read_bytes()
    assert cli("collect-metadata", *FEW, "--temperature", 4, "--out", tmp_path / "hot")[0] == 0
    _, record = load_model(Path("teacher"))
    usual, hot = (read_metadata(path, identity(record))[0] for path in (here / "metadata", tmp_path / "hot"))
    assert (usual.temperature, hot.temperature) == (8.0, 4.0)
    torch.testing.assert_close(hot.layers["head"].mean, 2 * usual.layers["head"].mean)
    (tmp_path / "again" / "metadata.json").unlink()  # as if it had been stopped before the end
    assert cli("collect-metadata", *FEW, "--out", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "metadata.json").read_bytes() == (here / "metadata" / "metadata.json").read_bytes()
    code, out, _ = cli("collect-metadata", "--out", tmp_path / "dry", "--dry-run", "--json")
    assert (code, json.loads(out)["dry_run"], (tmp_path / "dry").exists()) == (0, True, False)


def test_a_teacher_whose_dataset_is_not_known_needs_one(here, cli, tmp_path):
    foreign = ["--teacher", "lenet5", "--weights", "teacher/model.safetensors", "--input-size", 1, 32, 32]
    command = ["collect-metadata", *foreign, "--num-classes", 10, *FEW, "--out", tmp_path / "m"]
    code, _, err = cli(*command)
    assert (code, "--dataset" in err) == (2, True)
    code, _, err = cli(*command, "--dataset", "digits")
    assert code == 0, err


def test_the_same_seed_gives_the_same_bytes_in_another_process(here, dfkd, tmp_path):
    shutil.copytree(here / "teacher", tmp_path / "teacher")
    shutil.copytree(here / "metadata", tmp_path / "elsewhere")
    command = ["synthesize", "--method", "lopes", "--metadata", "elsewhere", *FAST]
    assert dfkd(*command, cwd=tmp_path).returncode == 0
    assert dfkd(*command, "--seed", "1", "--out", "other", cwd=tmp_path).returncode == 0
    for file in ("manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"):
        assert (tmp_path / "shards" / file).read_bytes() == (here / "shards" / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (here / "shards" / file).read_bytes()


def test_other_metadata_is_another_run(here, cli, tmp_path):
    shutil.copytree("metadata", tmp_path / "metadata")
    edit(tmp_path / "metadata" / "metadata.json", temperature=4.0)
    code, _, err = cli("synthesize", "--method", "lopes", "--metadata", tmp_path / "metadata", *FAST)
    assert (code, "another metadata" in err) == (2, True)
    code, _, err = cli("synthesize", "--method", "lopes", "--metadata", here / "metadata", *FAST)
    assert (code, "already complete" in err) == (0, True)  # where it lies does not matter


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [("lopes", None, "collect-metadata"), ("noise", "metadata", "no metadata"), ("lopes", "nowhere", "nowhere")],
)
def test_metadata_is_given_where_it_is_used_and_nowhere_else(method, given, words, here, cli):
    code, out, err = cli("synthesize", "--method", method, "--out", "x", *(["--metadata", given] if given else []))
    assert (code, out, (here / "x").exists()) == (3 if given == "nowhere" else 2, "", False)
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_no_dataset_can_be_opened_while_images_are_made_from_metadata(here, cli, tmp_path, monkeypatch):
    shutil.copytree("metadata", tmp_path / "data" / "metadata")
    monkeypatch.setenv("DFKD_DATA", str(tmp_path / "data"))
    code, _, err = cli(
        "synthesize", "--method", "lopes", "--metadata", tmp_path / "data" / "metadata", "--out", "x", *FAST
    )
    assert (code != 0, "data-free" in err) == (True, True)
    assert cli("synthesize", "--method", "lopes", "--metadata", "metadata", "--out", tmp_path / "y", *FAST)[0] == 0


def test_that_metadata_was_used_is_said_wherever_the_images_or_the_student_are_shown(here, cli, tmp_path):
    manifest = json.loads(Path("shards/manifest.json").read_text())
    assert (manifest["uses"], manifest["data_free"]) == (["metadata"], True)
    run = json.loads(Path("shards/run.json").read_text())
    assert run["uses"] == ["metadata"]
    assert [p["role"] for p in run["parents"]] == ["teacher", "metadata"]
    for record in (json.loads(Path("student/model.json").read_text())["provenance"],
                   json.loads(Path("student/run.json").read_text())):  # fmt: skip
        assert (record["uses"], record["data_free"]) == (["metadata"], True)

    learn = ("distill", "--steps", 2, "--batch-size", 4)
    assert cli(*learn, "--transfer-set", "noise:8", "--out", tmp_path / "free")[0] == 0
    assert cli(*learn, "--transfer-set", "noise:8", "shards", "--out", tmp_path / "mixed")[0] == 0
    paths = ["student", tmp_path / "free", tmp_path / "mixed", "shards"]
    code, out, err = cli("compare", *paths, "--out", tmp_path / "c", "--json")
    assert code == 0, err
    rows = {row["label"]: row for row in json.loads(out)["sections"][0]["rows"]}
    uses = {"lopes -> response": ["metadata"], "noise:8 + lopes -> response": ["metadata"], "noise:8 -> response": []}
    assert {label: row["uses"] for label, row in rows.items()} == uses | {"teacher": []}
    table = (tmp_path / "c" / "table.md").read_text().splitlines()
    shown = [line.rstrip(" |").split(" | ")[-1] for line in table if "->" in line]
    assert sorted(shown) == ["data-free", "uses metadata", "uses metadata"]
    page = (tmp_path / "c" / "report.html").read_text()
    assert page.count("uses metadata") == 3  # two rows and the images

    code, out, _ = cli("evaluate", "student", "shards", "teacher", "--json")
    assert [result["uses"] for result in json.loads(out)["results"]] == [["metadata"], ["metadata"], []]
    assert "USES" in cli("evaluate", "student")[1]
    for path in ("shards", "student"):
        assert "uses:\n  - metadata" in cli("info", path)[1]
    assert "kind: metadata" in cli("info", "metadata")[1]


# -- grids -------------------------------------------------------------------------------------------------------------


GRID = {
    "seeds": [0, 3],
    "synthesize": {"num_images": 4},
    "student": {"steps": 1, "batch_size": 4},
    "rows": {
        "zskd": {"synthesize": {"method": "zskd", "batch_size": 4, "iterations": 1}},
        "lopes": {"synthesize": {"method": "lopes", "batch_size": 4, "iterations": 1}},
    },
}


def planned(cli, tmp_path, *flags, **changes) -> list[dict]:
    (tmp_path / "grid.yaml").write_text(json.dumps({"grid": GRID | changes}))
    code, out, err = cli("compare", "--recipe", tmp_path / "grid.yaml", *flags, "--dry-run", "--json", "--out", "c")
    assert code == 0, err
    return json.loads(out)["plan"]


def test_a_grid_collects_metadata_for_each_teacher_and_gives_it_to_the_rows_that_use_it(tmp_path, cli):
    metadata = {"num_images": 20, "covariance_units": 100}
    plan = planned(cli, tmp_path, metadata=metadata, teacher={"steps": 1})
    assert [step["config"]["command"] for step in plan[:3]] == ["train-teacher", "collect-metadata", "synthesize"]
    assert sum(step["config"]["command"] == "collect-metadata" for step in plan) == 1
    assert (plan[1]["row"], plan[1]["config"]["teacher"], plan[1]["config"]["num_images"]) == ("", plan[0]["out"], 20)
    given = {(step["row"], step["config"]["metadata"]) for step in plan if step["config"]["command"] == "synthesize"}
    assert given == {("zskd", None), ("lopes", plan[1]["out"])}

    plan = planned(cli, tmp_path, teacher={"steps": 1, "per_seed": True})
    made = {s["seed"]: s for s in plan if s["config"]["command"] == "collect-metadata"}
    teachers = {s["seed"]: s for s in plan if s["config"]["command"] == "train-teacher"}
    used = {s["seed"]: s["config"]["metadata"] for s in plan if s["row"] == "lopes" and "metadata" in s["config"]}
    assert list(made) == list(teachers) == [0, 3]
    assert all(made[seed]["config"]["teacher"] == teachers[seed]["out"] for seed in made)
    assert used == {seed: step["out"] for seed, step in made.items()}
    assert len({step["out"] for step in made.values()}) == 2

    free = planned(cli, tmp_path, teacher={"steps": 1}, rows={"zskd": GRID["rows"]["zskd"]})
    assert not [step for step in free if step["config"]["command"] == "collect-metadata"]


def test_a_grid_runs_with_metadata_made_or_given(here, cli, tmp_path):
    rows = {"lopes": GRID["rows"]["lopes"]}
    for name, metadata in (("made", {"num_images": 20, "covariance_units": 100}), ("given", str(here / "metadata"))):
        grid = GRID | {"seeds": [0], "rows": rows, "metadata": metadata}
        (tmp_path / "grid.yaml").write_text(json.dumps({"grid": grid}))
        command = ["compare", "--recipe", tmp_path / "grid.yaml", "--teacher", "teacher", "--out", tmp_path / name]
        code, _, err = cli(*command)
        assert code == 0, err
        assert (tmp_path / name / "runs" / "metadata").exists() == (name == "made")
        (section,) = json.loads((tmp_path / name / "results.json").read_text())["sections"]
        assert [(row["label"], row["uses"]) for row in section["rows"]] == [("teacher", []), ("lopes", ["metadata"])]
    code, _, err = cli(*command)
    assert (code, "already complete" in err) == (0, True)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"metadata": {"temprature": 3}}, "temperature"),
        ({"metadata": {"teacher": "x"}}, "grid itself"),
        ({"rows": {"metadata": GRID["rows"]["zskd"]}}, "not a name"),
        ({"rows": {"a": {"synthesize": {"method": "lopes", "metadata": "m"}}}}, "grid itself"),
    ],
)
def test_grids_check_metadata_settings(changes, word, tmp_path, cli):
    (tmp_path / "grid.yaml").write_text(json.dumps({"grid": GRID | changes}))
    code, _, err = cli("compare", "--recipe", tmp_path / "grid.yaml", "--dry-run", "--out", tmp_path / "c")
    assert (code, word in err) == (2, True), err
