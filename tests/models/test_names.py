"""What names of models mean: what is opened, what is built, and what is said of the others."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from dfkd_cli.artifacts.files import digest, sha256_file
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.classifier import ModelInfo
from dfkd_cli.models.directory import identity, load_model
from dfkd_cli.models.names import Architecture, ForeignWeights, LoadedModel, ModelDirectory, architecture, locate
from dfkd_cli.options import ForeignModel
from dfkd_cli.stages.training import fresh
from dfkd_cli.trust import Code

CODE = """
import torch
def net(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, num_classes))
"""
DIGITS = {"weights": "net.safetensors", "input_size": (1, 32, 32), "num_classes": 10}


@pytest.fixture
def here(teacher, tmp_path, monkeypatch) -> Path:
    """A model directory called like nothing else, one called like a built-in model, weights, and code."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, "mine")
    shutil.copytree(teacher, "resnet8")
    shutil.copy(teacher / "model.safetensors", "net.safetensors")
    Path("net.py").write_text(CODE)
    return tmp_path


@pytest.mark.parametrize("name", ["mine", "mine/", "./mine", "resnet8"])
def test_a_directory_is_a_model(here, name):
    location = locate(name, ForeignModel())
    assert location == ModelDirectory(name)
    model = location.open(Code())
    classifier, record = load_model(Path(name))
    assert (model.path, model.sha256, model.record, model.dataset) == (name, identity(record), record, "digits")
    assert model.classifier.info == classifier.info
    assert model.ancestry == (model.sha256,)


def test_ancestry_is_of_all_teachers(here):
    model = locate("mine", ForeignModel()).open(Code())
    for provenance, ancestry in (
        ({"teacher": "a"}, ["a"]),  # as before ancestries were recorded
        ({"teacher": "a", "line": ["a", "b"]}, ["a", "b"]),
    ):
        student = dataclasses.replace(model, record=model.record | {"provenance": provenance})
        assert student.ancestry == (model.sha256, *ancestry)


def test_a_spec_with_weights_is_a_model(here):
    location = locate("lenet5", ForeignModel(**DIGITS, std=(0.5,)))
    info = ModelInfo("lenet5", 10, (1, 32, 32), (0.0,), (0.5,))
    assert location == ForeignWeights("lenet5", Path("net.safetensors"), info)
    model = location.open(Code())
    facts = dataclasses.asdict(info)
    assert model.sha256 == digest([sha256_file(Path("net.safetensors")), facts])
    assert model.record == facts | {"provenance": {}}
    assert (model.path, model.dataset, model.ancestry) == ("lenet5", None, (model.sha256,))
    own, theirs = model.classifier.net.state_dict(), load_model(Path("mine"))[0].net.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)


def test_a_users_own_code_is_run_and_its_spelling_does_not_count(here):
    torch.save({"1.weight": torch.zeros(10, 1024), "1.bias": torch.zeros(10)}, "net.pt")
    said = ForeignModel(**DIGITS | {"weights": "net.pt"})
    plain, dotted = (locate(name, said).open(Code(frozenset({name}))) for name in ("net.py:net", "./net.py:net"))
    with pytest.raises(ArtifactError, match="--allow-code"):  # a SPEC that nobody typed, or typed otherwise
        locate("net.py:net", said).open(Code(frozenset({"./net.py:net"})))
    assert plain.sha256 == dotted.sha256
    assert plain.classifier.info.spec == "net.py:net"
    assert locate("w8a8:./net.py:net", said).info.spec == "w8a8:net.py:net"


def test_the_code_of_a_teacher_counts_and_where_it_lies_does_not(here, monkeypatch):
    torch.save({"1.weight": torch.zeros(10, 1024), "1.bias": torch.zeros(10)}, "net.pt")
    said = ForeignModel(**DIGITS | {"weights": str(here / "net.pt")})

    def opened(name: str) -> LoadedModel:
        return locate(name, said).open(Code(frozenset({name})))

    first = opened("net.py:net")
    assert opened(f"{here}/net.py:net").sha256 == first.sha256
    Path("below").mkdir()
    monkeypatch.chdir("below")
    assert opened("../net.py:net").sha256 == first.sha256
    monkeypatch.chdir(here)
    Path("net.py").write_text(CODE + "other = net\n")
    assert opened("net.py:net").sha256 == first.sha256  # of the file, what it uses
    assert opened("net.py:other").sha256 != first.sha256
    facts = dataclasses.asdict(ModelInfo("net.py:net", 10, (1, 32, 32), (0.0,), (1.0,)))
    file = sha256_file(Path("net.py"))
    older = digest([sha256_file(Path("net.pt")), facts])  # as it was recorded before the code counted
    old = digest([sha256_file(Path("net.pt")), facts | {"spec": "net", "code": file}])  # and when the file did
    model, other = opened("net.py:net"), opened("net.py:other")
    assert (model.parent("teacher")["formerly"], model.ancestry) == (old, (first.sha256, old, older))
    assert not other.knows(older) and not other.knows(old) and not other.knows(first.sha256)
    Path("net.py").write_text(CODE.replace("torch.nn.Linear", "torch.nn.modules.Linear"))
    assert not opened("net.py:net").knows(first.sha256)


@pytest.mark.parametrize(
    ("name", "said", "error", "words"),
    [
        (
            "mine",
            DIGITS,
            ConfigError,
            "mine is a directory, which says what it is -- leave out --weights, --input-size",
        ),
        ("net.pt", {}, ArtifactError, "no teacher at net.pt -- a SPEC needs --weights"),
        ("teacher", {}, ArtifactError, "no teacher at teacher -- train one: dfkd train-teacher"),
        ("net.safetensors", {}, ArtifactError, "net.safetensors is a file, not a model directory"),
        ("student", {}, ArtifactError, "no student at student -- train one: dfkd distill"),
        ("lenet5", {}, ArtifactError, "no teacher at lenet5"),
        ("torchvision:resnet18", {}, ConfigError, "teacher torchvision:resnet18 has no weights -- give --weights FILE"),
        ("./absent.py:net", {"num_classes": 3}, ConfigError, "teacher ./absent.py:net has no weights"),
        ("lenet5", {"weights": "net.pt", "num_classes": 3}, ConfigError, "give --input-size"),
        ("lenet5", {"weights": "net.pt"}, ConfigError, "give --input-size and --num-classes"),
        ("lenet5", DIGITS | {"weights": "absent.pt"}, ArtifactError, "no weights file absent.pt"),
        ("lenet", DIGITS, ConfigError, "lenet: unknown model"),
        ("lenet5", DIGITS | {"mean": (0.1, 0.2)}, ConfigError, "1-channel images need 1 means"),
        ("lenet5", DIGITS | {"num_classes": 9}, ArtifactError, "the weights do not fit"),
    ],
)
def test_what_names_no_model(here, name, said, error, words):
    with pytest.raises(error) as caught:
        locate(name, ForeignModel(**said)).open(Code())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lenet5", Architecture("lenet5")),
        ("resnet8", Architecture("resnet8")),  # although a directory is called so, of another model
        ("./resnet8", Architecture("lenet5", "./resnet8")),
        ("mine", Architecture("lenet5", "mine")),
        ("torchvision:resnet18", Architecture("torchvision:resnet18")),
        ("package.module:factory", Architecture("package.module:factory")),
        ("./net.py:net", Architecture("./net.py:net")),
    ],
)
def test_what_architecture_a_name_means(here, name, expected):
    assert architecture(name) == expected


def test_an_architecture_counts_by_what_was_read(here):
    assert architecture("lenet5").parents == architecture("timm:x").parents == architecture("a.b:c").parents == []
    (parent,) = architecture("mine").parents
    assert parent == {"role": "architecture", "path": "mine", "sha256": digest("lenet5")}
    (parent,) = architecture("./net.py:net").parents
    whole, own = sha256_file(Path("net.py")), digest(CODE.strip())
    assert parent == {"role": "architecture", "path": "net.py", "sha256": own, "formerly": whole}
    with pytest.raises(ArtifactError, match=r"no model\.json in it"):
        architecture(str(here))


def test_code_is_built_where_the_user_names_it_and_not_where_a_directory_does(here):
    info = ModelInfo("./net.py:net", 10, (1, 32, 32), (0.0,), (1.0,))
    assert fresh(info, "student", 0, Code(frozenset({"./net.py:net"}))).info.spec == "./net.py:net"
    with pytest.raises(ArtifactError, match="this model is code, which is not run"):
        fresh(info, "student", 0, Code())
    record = json.loads(Path("mine/model.json").read_text())
    Path("mine/model.json").write_text(json.dumps({**record, "spec": "net.py:net"}))
    info = dataclasses.replace(info, spec="mine")
    with pytest.raises(ArtifactError, match="this model is code, which is not run"):
        fresh(info, "student", 0, Code(frozenset({"mine"})))
    assert fresh(info, "student", 0, Code(artifacts=True)).info.spec == "net.py:net"
