"""Hints of a teacher whose channels are projected: the formulas, the matrices, and what a continued run has of them."""

from __future__ import annotations

import numpy as np
import objective_oracles as losses
import pytest
import torch
from stand_ins import check_interruption, work
from tiny_objectives import OBJECTIVES, connected, network, offline

from dfkd_cli.config import build
from dfkd_cli.errors import ConfigError
from dfkd_cli.objectives.base import Outputs
from dfkd_cli.objectives.fitnets import FitNets
from dfkd_cli.regimes import base
from dfkd_cli.stages.calibrate import calibrate

RNG = np.random.default_rng(0)
PRINCIPAL = {"project": "both", "projection": "principal"}


def fitnets(student: tuple[int, ...], teacher: tuple[int, ...], seed: int = 0, **values) -> FitNets:
    """Between features of these shapes, at a place ``0`` of each network."""
    objective = FitNets(build(OBJECTIVES["fitnets"].config, values))
    objective.pairs = (("0", "0"),)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        objective.prepare(student, teacher)
    return objective.double()


def maps(values: np.ndarray) -> np.ndarray:
    return values.reshape(*values.shape[:2], *(values.shape[2:] or (1, 1)))


def principal(features: np.ndarray, count: int) -> np.ndarray:
    """Directions (count, C) of the largest variance of maps (B, C, H, W), the mean on the positive side of each."""
    rows = features.transpose(0, 2, 3, 1).reshape(-1, features.shape[1])
    directions = np.linalg.eigh(np.cov(rows.T, bias=True))[1][:, ::-1][:, :count].T
    return directions * np.sign(directions @ rows.mean(0))[:, None]


# -- the formulas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((3, 4, 6), (5, 4, 6)), ((6, 4, 6), (4, 4, 6)), ((3, 4, 5), (4, 7, 5)), ((3, 6, 6), (5, 4, 4)), ((3,), (7,))],
)
@pytest.mark.parametrize("project", ["teacher", "both"])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_hints_of_projected_channels(student, teacher, project, variant):
    own, target = RNG.normal(size=(4, *student)), RNG.normal(size=(4, *teacher))
    objective = fitnets(student, teacher, project=project, variant=variant)
    found = objective.compare(0, torch.tensor(own), torch.tensor(target))["hint"].item()
    matrix = objective.get_buffer("projection0").numpy()
    assert matrix.shape == (student[0] if project == "teacher" else min(student[0], teacher[0]), teacher[0])
    own, target = maps(own), np.einsum("ij,bjhw->bihw", matrix, maps(target))
    if project == "both":  # no ReLU: what is projected is negative as often as not
        weight, bias = (p.detach().numpy() for p in objective.regressors[0][0].parameters())
        own = losses.batch_normalised(losses.convolved(own, weight, bias, 1, 0))
    assert found == pytest.approx(losses.hint(*losses.smaller(own, target), variant), rel=1e-9)
    assert bool(list(objective.parameters())) == (project == "both")


def test_a_width_that_is_given_is_that_of_both():
    objective = fitnets((3, 2, 2), (5, 2, 2), project="both", width=2)
    assert objective.get_buffer("projection0").shape == (2, 5)
    assert objective.regressors[0](torch.randn(4, 3, 2, 2).double()).shape == (4, 2, 2, 2)


def test_the_default_projects_the_student_alone():
    objective = fitnets((3, 2, 2), (5, 2, 2))
    assert "projection0" not in objective.state_dict()
    torch.manual_seed(0)
    expected = torch.nn.Conv2d(3, 5, 1)
    assert torch.equal(objective.regressors[0][0].weight, expected.weight.double())  # the seed gives what it gave
    assert isinstance(objective.regressors[0][-1], torch.nn.ReLU)


# -- the matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), [(3, 5), (6, 4)])
def test_random_directions_are_orthonormal_and_follow_the_seed(student, teacher):
    first, same, other = (
        fitnets((student,), (teacher,), seed, project="teacher").get_buffer("projection0") for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    gram = first @ first.T if student < teacher else first.T @ first
    torch.testing.assert_close(gram, torch.eye(min(student, teacher)).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3, 2), (5,)])
def test_principal_directions_are_those_of_all_batches_together(shape):
    features = maps(RNG.normal(size=(40, *shape)) @ np.eye(shape[-1]))
    features = np.einsum("ij,bjhw->bihw", RNG.normal(size=(5, 5)), features) + RNG.normal(size=(5, 1, 1))
    objective = fitnets((3,), shape, **PRINCIPAL)
    parts = np.split(features.reshape(40, *shape), [7, 8, 30])
    objective.observe(Outputs(torch.zeros(len(part), 1), {"0": torch.tensor(part)}) for part in parts)
    np.testing.assert_allclose(objective.get_buffer("projection0"), principal(features, 3), rtol=0, atol=1e-9)


@pytest.mark.parametrize("values", [{"project": "student"}, {"project": "both"}])
def test_a_teacher_is_not_asked_where_no_directions_are_wanted(values):
    outputs = iter([Outputs(torch.zeros(1, 1))])
    fitnets((3,), (5,), **values).observe(outputs)
    assert next(outputs)


def test_a_training_takes_the_directions_of_its_own_images_before_the_first_step(tmp_path):
    student, teacher = network(1, 3, 4), network(2, 4, 6)
    settings = {"batch_size": 3, "steps": 4, "holdout": 0.3, "noise": 0.2}
    learner, _ = offline({"fitnets": None}, student, teacher, 12, {"fitnets": PRINCIPAL}, **settings)
    assert learner.losses["fitnets"].get_buffer("projection0").isnan().all()
    work(learner, tmp_path / "run")
    pixels = learner.train_source.all().pixels.double()
    assert len(pixels) == 8
    net = teacher.double().eval().net
    with torch.no_grad():
        features = net.stage2(net.stage1(teacher.normalise(pixels))).numpy()
    found = learner.losses["fitnets"].get_buffer("projection0")
    np.testing.assert_allclose(found, principal(features, 4), rtol=0, atol=1e-5)


def test_a_continued_training_has_the_directions_of_the_first_process(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "STEPS_PER_ROUND", 2)
    observed, observe = [], FitNets.observe
    monkeypatch.setattr(FitNets, "observe", lambda self, teacher: (observed.append(self), observe(self, teacher)))

    def run(path, *callbacks):
        networks = network(1, 3, 4), network(2, 4, 6)
        learner, _ = offline({"fitnets": None}, *networks, 8, {"fitnets": PRINCIPAL}, batch_size=3, steps=8)
        return work(learner, path, *callbacks)

    whole, continued = check_interruption(run, tmp_path)
    first, second = (learner.losses["fitnets"] for learner in (whole, continued))
    assert torch.equal(first.get_buffer("projection0"), second.get_buffer("projection0"))
    assert first in observed and second not in observed and len(observed) == 2


# -- what a user meets -------------------------------------------------------------------------------------------------


def test_a_rehearsal_has_an_impression_of_the_directions():
    learner, _ = offline({"fitnets": None}, network(1, 3, 4), network(2, 4, 6), values={"fitnets": PRINCIPAL})
    task = base.Task(
        learner.student, learner.teacher, learner.source, {"fitnets": (1.0, learner.losses["fitnets"])},
        learner.training_config, 0,
    )  # fmt: skip
    (term,) = calibrate(task)
    assert 0 < term.value < np.inf


def test_what_cannot_be_projected():
    student, teacher = network(1, 3, 6), network(2, 4, 5)
    with pytest.raises(ConfigError, match="5 channels of the teacher have no 6 principal directions"):
        connected("fitnets", student, teacher, project="teacher", projection="principal")


@pytest.mark.parametrize("values", [{"width": 2}, {"width": 2, "project": "teacher"}, {"projection": "principal"}])
def test_options_of_another_projection_are_refused(values):
    with pytest.raises(ConfigError, match=f"{next(iter(values))} is "):
        connected("fitnets", network(1, 3, 4), network(2, 4, 6), **values)


def test_flags_of_both_sides(cli, teacher, tmp_path):
    command = ["distill", "--teacher", teacher, "--transfer-set", "noise:64", "--device", "cpu", "--steps", 2]
    command += ["--objective", "response", "fitnets", "--project", "both", "--projection", "principal"]
    for mode in (["--dry-run"], []):
        code, _, err = cli(*command, "--width", 3, "--out", tmp_path / "student", *mode)
        assert code == 0, err
    state = torch.load(tmp_path / "student" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["objectives.fitnets.projection0"].shape[0] == 3
    assert state["objectives.fitnets.projection0"].isfinite().all()
    code, _, err = cli(*command, "--width", 99, "--out", tmp_path / "wide")
    assert code == 2
    assert "principal directions" in err and err.count("\n") <= 2
