"""Model directories: the same bits again, and every kind of damage is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comparisons import same_weights
from stand_ins import classifier

from dfkd_cli.errors import ArtifactError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import identity, load_model, save_model
from dfkd_cli.models.registry import build


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Classifier]:
    size = (1, 8, 8)
    info = ModelInfo("resnet8", 3, size, (0.1,), (0.3,), classes=("a", "b", "ü"))
    model = Classifier(build("resnet8", 3, size), info)
    model(torch.rand(4, *size))  # moves the BatchNorm statistics
    model.eval()
    save_model(tmp_path / "teacher", model, metrics={"top1": 0.5}, provenance={"dataset": "digits"})
    return tmp_path / "teacher", model


def edit(directory: Path, **values) -> None:
    record = json.loads((directory / "model.json").read_text())
    (directory / "model.json").write_text(json.dumps(record | values))


def test_round_trip_is_bit_identical(saved):
    directory, model = saved
    random = torch.random.get_rng_state()
    loaded, record = load_model(directory)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert loaded.info == model.info
    assert same_weights(loaded, model)
    pixels = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.eval()(pixels), model(pixels))
    assert record["metrics"] == {"top1": 0.5}
    assert record["provenance"] == {"dataset": "digits"}
    assert sorted(path.name for path in directory.iterdir()) == ["model.json", "model.safetensors"]
    again = save_model(directory.parent / "copy", loaded, metrics={}, provenance={})
    assert again == identity(record)
    assert again != identity({**record, "mean": [0.9]}), "how the weights are used is part of what a model is"


def test_shared_and_strided_weights_are_stored(tmp_path, user_code):
    (user_code / "tied.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))\n"
        "    net[1].weight = nn.Parameter(net[1].weight.detach().t())\n"
        "    net[2].weight = net[1].weight\n"
        "    return net\n"
    )
    spec = "./tied.py:make"
    model = classifier(build(spec, 4, (1, 2, 2), allow_code=True), spec, (1, 2, 2), classes=4)
    save_model(tmp_path / "m", model, metrics={}, provenance={})
    with pytest.raises(ArtifactError, match="--allow-code"):
        load_model(tmp_path / "m")
    loaded, _ = load_model(tmp_path / "m", allow_code=True)
    assert same_weights(loaded, model)
    assert loaded.net[1].weight is loaded.net[2].weight


def test_a_flipped_bit_is_noticed(saved):
    weights = saved[0] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        load_model(saved[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema": 2}, "model schema 2"),
        ({"kind": "shards"}, "holds 'shards', not 'model'"),
        ({"num_classes": 5, "classes": None}, r"head.weight \(3, 64\) instead of \(5, 64\)"),
        ({"num_classes": 5}, "3 class names for 5 classes"),
        ({"num_classes": "3"}, "model.json is damaged: num_classes is '3', not a whole number"),
        ({"mean": None}, "model.json is damaged: mean is None, not a list"),
        ({"weights": None}, "model.json is damaged: weights is None, not a mapping"),
        ({"spec": "resnet14"}, "missing stage1.1"),
        ({"spec": "resnet9"}, "unknown model"),
    ],
)
def test_records_that_do_not_hold(saved, values, message):
    edit(saved[0], **values)
    with pytest.raises(ArtifactError, match=message):
        load_model(saved[0])


def test_directories_that_are_none(saved):
    directory, _ = saved
    for path, message in [
        (directory / "absent", "no such directory"),
        (directory.parent, "no model.json"),
        (directory / "model.json", "a file, not a model directory"),
    ]:
        with pytest.raises(ArtifactError, match=message) as caught:
            load_model(path)
        assert caught.value.hint
    (directory / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="incomplete"):
        load_model(directory)
    (directory / "model.json").write_text("hello")
    with pytest.raises(ArtifactError, match="not readable as JSON"):
        load_model(directory)


@pytest.mark.parametrize(
    "values", [{"num_classes": 10**6, "input_size": [1, 32, 32]}, {"num_classes": 3, "input_size": [1, 8000, 8000]}]
)
def test_a_size_beyond_its_weights_takes_no_memory(saved, values):
    edit(saved[0], spec="lenet5", classes=None, **values)
    with pytest.raises(ArtifactError, match="need far more of them"):
        load_model(saved[0])
