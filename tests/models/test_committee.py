"""Several classifiers that answer as one."""

from __future__ import annotations

import json

import numpy as np
import oracles
import pytest
import torch
from torch import nn

from dfkd_cli.errors import ArtifactError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.committee import committee

CLASSES = ("cat", "dog", "elk")


def member(seed: int, mean: float, std: float, classes=CLASSES, size=(1, 2, 2)) -> Classifier:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(size[1] * size[2], 3)).double()
    return Classifier(net, ModelInfo(f"net{seed}", 3, size, (mean,), (std,), classes)).double()


def by_hand(members: list[Classifier], pixels: torch.Tensor, combine: str) -> oracles.Array:
    answers = []
    for each in members:
        weight, bias = (p.detach().numpy() for p in each.net[1].parameters())
        logits = (pixels.flatten(1).numpy() - each.info.mean[0]) / each.info.std[0] @ weight.T + bias
        names = each.info.classes or CLASSES
        answers.append(np.stack([logits[:, names.index(name)] for name in CLASSES], axis=1))
    if combine == "logits":
        return np.mean(answers, axis=0)
    return np.log(np.mean([oracles.softmax(logits) for logits in answers], axis=0))


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
@pytest.mark.parametrize("names", [CLASSES, ("elk", "cat", "dog"), None])
def test_the_mean_of_members_that_count_their_classes_as_they_like(combine, names):
    members = [member(0, 0.2, 0.5), member(1, 0.0, 1.0, names), member(2, 0.5, 2.0)]
    pixels = torch.rand(7, 1, 2, 2, dtype=torch.float64)
    together = committee(members, combine)
    np.testing.assert_allclose(together(pixels).detach().numpy(), by_hand(members, pixels, combine), rtol=1e-5)
    assert together.info.classes == CLASSES
    together.freeze()
    assert not any(parameter.requires_grad for each in members for parameter in each.parameters())


def test_sure_members_stay_finite():
    members = [member(0, 0.2, 1e-4), member(1, 0.2, 1e-4)]
    pixels = torch.rand(5, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    logits = committee(members, "probabilities")(pixels)
    assert logits.isfinite().all()
    assert torch.autograd.grad(logits[:, 0].sum(), pixels)[0].isfinite().all()


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (member(1, 0.2, 0.5, ("cat", "dog", "fox")), "does not know fox"),
        (member(1, 0.2, 0.5, size=(1, 3, 3)), "images"),
    ],
)
def test_members_that_cannot_answer_together(other, word):
    with pytest.raises(ArtifactError, match=word):
        committee([member(0, 0.2, 0.5), other], "logits")


def test_one_of_whom_only_answers_are_seen_hides_them_all():
    hidden = member(1, 0.2, 0.5)
    hidden.opaque = True
    assert [committee([member(0, 0.2, 0.5), other], "logits").opaque for other in (member(1, 0, 1), hidden)] == [0, 1]


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_a_student_of_several_teachers(combine, teacher, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").symlink_to(teacher)
    assert cli("train-teacher", "--steps", "30", "--seed", "5", "--out", "second")[0] == 0
    made = ("synthesize", "--method", "zskd", "--num-images", "32", "--batch-size", "16", "--iterations", "2")
    assert cli(*made, "--teacher", "second", "--out", "shards")[0] == 0
    learn = ("--transfer-set", "shards", "--steps", "40", "--batch-size", "16", "--temperature", "4", "--device", "cpu")
    several = ("distill", *learn, "--teacher", "first", "second", "--combine", combine, "--out", "student")
    code, _, err = cli(*several)
    assert code == 0, err
    run = json.loads((tmp_path / "student" / "run.json").read_text())
    assert [parent["path"] for parent in run["parents"] if parent["role"] == "teacher"] == ["first", "second"]
    assert run["data_free"] is True
    code, _, err = cli(*several)
    assert (code, "already complete" in err) == (0, True), err
    code, _, err = cli(
        *several[:-2], "--out", "student", "--combine", "logits" if combine != "logits" else "probabilities"
    )
    assert (code, "holds another run" in err) == (2, True), err
    code, out, err = cli("evaluate", "student", "--teacher", "first", "--json")
    assert code == 0, err
    assert json.loads(out)["results"][0]["agreement"] is not None
    code, _, err = cli("compare", "student", "--teacher", "first", "--out", "compared")
    assert code == 0, err
    code, _, err = cli("distill", *learn, "--teacher", "first", "shards", "--out", "stored")
    assert (code, "give it as the only teacher" in err) == (2, True), err
