"""Distillation objectives against their papers' formulas, and what every one of them promises."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import re

import numpy as np
import objective_oracles as losses
import oracles
import pytest
import torch
from torch import Tensor, nn

from dfkd_cli import catalog
from dfkd_cli.config import build, hints, options
from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.objectives.base import Objective, Outputs
from dfkd_cli.objectives.dist import correlation
from dfkd_cli.objectives.response import Response, soft_loss

OBJECTIVES = catalog.entries("objectives")
ANSWERS = [name for name, entry in OBJECTIVES.items() if "standardise" in hints(entry.config)]
FORMS = ("kl", "ce", "mse")
RNG = np.random.default_rng(0)


def pair(batch: int = 4, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a student and of a teacher."""
    return RNG.normal(scale=3, size=(batch, classes)), RNG.normal(scale=5, size=(batch, classes))


def response(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **values) -> dict[str, Tensor]:
    return Response(build(OBJECTIVES["response"].config, values))(Outputs(student), Outputs(teacher), labelled(labels))


def labelled(labels: Tensor | None = None) -> Images:
    """Images of which nobody needs the pixels."""
    return Images(torch.empty(0), labels)


# -- the soft term -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 2), (1, 10), (7, 2), (5, 100)])
@pytest.mark.parametrize("tau", [1.0, 4.0, 20.0])
def test_soft_loss_is_the_papers(form, shape, tau):
    student, teacher = pair(*shape)
    terms = response(torch.tensor(student), torch.tensor(teacher), form=form, temperature=tau)
    assert terms.keys() == {"soft"}
    np.testing.assert_allclose(terms["soft"].item(), oracles.response(student, teacher, form, tau), rtol=1e-10)


@pytest.mark.parametrize("tau", [1.0, 20.0])
def test_kl_and_ce_have_the_analytic_gradient(tau):
    student, teacher = pair()
    for form in ("kl", "ce"):
        z = torch.tensor(student, requires_grad=True)
        soft_loss(z, torch.tensor(teacher), form, tau).backward()
        np.testing.assert_allclose(z.grad, oracles.response_gradient(student, teacher, tau), atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_soft_loss_passes_gradcheck(form):
    student, teacher = (torch.tensor(logits) for logits in pair(3, 5))
    assert torch.autograd.gradcheck(lambda z: soft_loss(z, teacher, form, 4.0), student.requires_grad_())


def test_equal_answers_cost_nothing():
    logits = torch.tensor(pair()[0])
    for form in ("kl", "mse"):
        assert abs(soft_loss(logits, logits.clone(), form, 20.0)) < 1e-12


@pytest.mark.parametrize(("name", "values"), [*((name, {}) for name in ANSWERS), ("response", {"form": "ce"})])
def test_answers_do_not_change_when_all_logits_of_an_image_are_shifted(name, values):
    student, teacher = pair()
    shifted = (logits + RNG.normal(scale=5, size=(4, 1)) for logits in (student, teacher))
    assert terms_of(name, *shifted, **values) == pytest.approx(terms_of(name, student, teacher, **values), rel=1e-9)


def test_at_high_temperature_kl_is_the_squared_difference_of_centred_logits():
    student, teacher = pair(5, 10)
    difference = student - teacher
    difference -= difference.mean(axis=1, keepdims=True)
    limit = (difference**2).sum(axis=1).mean() / (2 * 10)
    loss = soft_loss(torch.tensor(student), torch.tensor(teacher), "kl", 1e4)
    np.testing.assert_allclose(loss.item(), limit, rtol=1e-3)


def test_direction_is_teacher_to_student():
    sure, unsure = np.array([[8.0, 0.0]]), np.array([[1.0, 0.0]])
    for student, teacher in ((sure, unsure), (unsure, sure)):
        (p,), (q,) = oracles.softmax(teacher), oracles.softmax(student)
        expected = p[0] * np.log(p[0] / q[0]) + p[1] * np.log(p[1] / q[1])
        found = soft_loss(torch.tensor(student), torch.tensor(teacher), "kl", 1.0).item()
        assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("name", "values"),
    [*((name, {"standardise": z}) for name in ANSWERS for z in (False, True)),
     *(("response", {"form": form}) for form in FORMS[1:])],
)  # fmt: skip
def test_extreme_logits_stay_finite(name, values):
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 200.0, -200.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [300.0, -300.0, 0.0]])
    terms = objective(name, temperature=1.0, hard=1.0, **values)(Outputs(student), Outputs(teacher), labelled())
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_autocast_keeps_the_precision_of_the_loss(form):
    student, teacher = (torch.tensor(logits, dtype=torch.float32) for logits in pair(4, 100))
    exact = soft_loss(student, teacher, form, 20.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_loss(student, teacher, form, 20.0)
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=0)


# -- the hard term -----------------------------------------------------------------------------------------------------


def test_hard_term_is_cross_entropy_with_the_true_label():
    student, teacher = pair()
    labels = np.array([3, 1, 4, 1])
    terms = response(torch.tensor(student), torch.tensor(teacher), torch.tensor(labels), hard=0.1)
    expected = oracles.cross_entropy(np.eye(10)[labels], oracles.softmax(student))
    np.testing.assert_allclose(terms["hard"].item(), expected, rtol=1e-10)


def test_hard_term_without_labels_takes_the_teachers_class():
    student, teacher = pair()
    terms = response(torch.tensor(student), torch.tensor(teacher), hard=0.1)
    expected = oracles.cross_entropy(np.eye(10)[teacher.argmax(1)], oracles.softmax(student))
    np.testing.assert_allclose(terms["hard"].item(), expected, rtol=1e-10)


# -- z-scores, decoupled and correlated answers ------------------------------------------------------------------------


def objective(name: str, **values) -> Objective:
    """One that asks the networks nothing more."""
    values |= {"boundary": 0.0} if name == "bss" else {}
    return OBJECTIVES[name].load()(build(OBJECTIVES[name].config, values))


def terms_of(name: str, student: np.ndarray, teacher: np.ndarray, labels=None, **values) -> dict[str, float]:
    outputs = Outputs(torch.tensor(student)), Outputs(torch.tensor(teacher))
    terms = objective(name, **values)(*outputs, labelled(None if labels is None else torch.tensor(labels)))
    return {term: value.item() for term, value in terms.items()}


@pytest.mark.parametrize("shape", [(1, 3), (1, 10), (7, 5), (4, 100)])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_dkd_is_the_papers(shape, tau):
    student, teacher = pair(*shape)
    labels = RNG.integers(shape[1], size=shape[0])
    found = terms_of("dkd", student, teacher, labels, temperature=tau)
    assert found == pytest.approx(losses.dkd(student, teacher, labels, tau), rel=1e-8)


def test_dkd_takes_hintons_loss_apart():
    student, teacher = pair(1)
    found = terms_of("dkd", student, teacher, [3], temperature=4.0)
    other = 1 - oracles.softmax(teacher / 4)[0, 3]
    whole = oracles.response(student, teacher, "kl", 4.0)
    assert found["target"] + other * found["non_target"] == pytest.approx(whole, rel=1e-9)


def test_dkd_without_labels_takes_the_teachers_classes():
    student, teacher = pair()
    assert terms_of("dkd", student, teacher) == terms_of("dkd", student, teacher, teacher.argmax(1))
    assert terms_of("dkd", student, teacher) != terms_of("dkd", student, teacher, teacher.argmin(1))


def test_dkd_decouples_the_target_from_the_others():
    student, teacher = pair()
    found = terms_of("dkd", student, teacher, [9] * 4)
    surer, elsewhere = student.copy(), student.copy()
    surer[:, 9] += 2
    elsewhere[:, :9] = elsewhere[:, [1, 2, 3, 4, 5, 6, 7, 8, 0]]
    for changed, same, other in ((surer, "non_target", "target"), (elsewhere, "target", "non_target")):
        terms = terms_of("dkd", changed, teacher, [9] * 4)
        assert terms[same] == pytest.approx(found[same], rel=1e-9)
        assert terms[other] != pytest.approx(found[other], rel=1e-2)


@pytest.mark.parametrize("name", [name for name, entry in OBJECTIVES.items() if "ramp" in hints(entry.config)])
def test_what_has_a_ramp_rises_over_epochs(name):
    """But for hard labels: they are the task, which the paper's ramp is not on."""
    rising = objective(name, ramp=4)
    for term in rising.terms:
        strengths = []
        for rising.epoch in range(6):
            strengths.append(rising.strength(term))
        assert strengths == ([1] * 6 if term == "hard" else [0.25, 0.5, 0.75, 1, 1, 1]), term


@pytest.mark.parametrize("name", [n for n, entry in OBJECTIVES.items() if "label_smoothing" in hints(entry.config)])
def test_smoothing_of_labels_without_a_weight_is_refused(name):
    with pytest.raises(ConfigError, match=r"--label-smoothing 0\.3 smooths hard labels, which have no weight"):
        objective(name, label_smoothing=0.3)
    assert objective(name, label_smoothing=0.3, hard=0.1).config.label_smoothing == 0.3


@pytest.mark.parametrize("shape", [(1, 10), (2, 2), (7, 5), (4, 100)])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_dist_is_the_papers(shape, tau):
    student, teacher = pair(*shape)
    assert terms_of("dist", student, teacher, temperature=tau) == pytest.approx(
        losses.dist(student, teacher, tau), rel=1e-6, abs=1e-9
    )


def test_dist_of_one_image_has_nothing_to_correlate_over_images():
    student, teacher = pair(1)
    assert terms_of("dist", student, teacher, temperature=2.0)["intra"] == 4.0


def test_correlation_is_blind_to_scale_and_shift():
    a, b = torch.randn(3, 6), torch.randn(3, 6)
    torch.testing.assert_close(correlation(a, b), correlation(5 * a - 1, 0.2 * b + 3))
    torch.testing.assert_close(correlation(a, -a), torch.tensor(-1.0))


@pytest.mark.parametrize("alike", [True, False])
def test_dist_costs_nothing_where_probabilities_are_the_teachers_in_other_units(alike):
    """Units of the whole batch, or of each image: then the classes correlate, and the images do not."""
    teacher = RNG.normal(size=(6, 10))
    scale = np.full((6, 1), 0.3) if alike else np.linspace(0.1, 0.9, 6)[:, None]
    student = np.log(scale * oracles.softmax(teacher) + (1 - scale) / 10)
    found = terms_of("dist", student, teacher, temperature=1.0)
    assert found["inter"] == pytest.approx(0, abs=1e-4)
    assert (found["intra"] == pytest.approx(0, abs=1e-4)) == alike


@pytest.mark.parametrize("shape", [(1, 2), (1, 10), (7, 5), (4, 100)])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_bss_has_softened_answers_without_the_square_of_the_temperature(shape, tau):
    student, teacher = pair(*shape)
    expected = oracles.response(student, teacher, "ce", tau) / tau**2
    assert terms_of("bss", student, teacher, temperature=tau) == {"soft": pytest.approx(expected, rel=1e-9)}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("shape", [(1, 3), (4, 10), (3, 100)])
def test_standardised_answers_are_compared_as_z_scores(name, shape):
    student, teacher = pair(*shape)
    scores = losses.standardised(student), losses.standardised(teacher)
    found = terms_of(name, student, teacher, standardise=True, temperature=2.0)
    assert found == pytest.approx(terms_of(name, *scores, temperature=2.0), rel=1e-9)
    assert found == pytest.approx(
        terms_of(name, 3 * student + 1, 0.1 * teacher - 5, standardise=True, temperature=2.0), rel=1e-5
    )


@pytest.mark.parametrize("name", ANSWERS)
def test_z_scores_of_two_logits_say_nothing(name):
    two = Classifier(nn.Linear(3, 2), ModelInfo("test", 2, (1, 1, 3), (0.0,), (1.0,)))
    with pytest.raises(ConfigError, match="z-scores of two logits"):
        objective(name, standardise=True).connect(two, two)
    if name not in ("dkd", "dist"):  # which need three classes in any case
        objective(name).connect(two, two)


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("shape", [(1, 3), (4, 10), (3, 100)])
def test_hard_labels_are_learned_from_plain_logits(name, shape):
    student, teacher = pair(*shape)
    labels = RNG.integers(shape[1], size=shape[0])
    for given, classes in ((labels, labels), (None, teacher.argmax(1))):
        found = terms_of(name, student, teacher, given, standardise=True, hard=1.0, label_smoothing=0.2)
        assert found["hard"] == pytest.approx(oracles.smoothed_cross_entropy(student, classes, 0.2), rel=1e-9)


# -- what every objective promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", OBJECTIVES.values(), ids=OBJECTIVES)
def test_documentation(entry):
    title = entry.doc.partition("\n")[0]
    assert title.endswith(".")
    assert entry.summary == title.rstrip(".")
    assert entry.paper
    assert re.search(r"\b(19|20)\d\d\b", entry.doc), "year and venue"
    assert re.search(r"^ {4}.*=", entry.doc, re.MULTILINE), "an equation"
    for name, said in options(entry.config).items():
        assert said.get("help"), name


@pytest.mark.parametrize("entry", OBJECTIVES.values(), ids=OBJECTIVES)
def test_what_is_read_without_torch_is_what_runs(entry):
    cls = entry.load()
    assert issubclass(cls, Objective)
    assert (cls.kind, tuple(cls.needs)) == (entry.kind, entry.needs)
    config = importlib.import_module(cls.__module__).Config
    assert hints(config) == hints(entry.config)
    for real, read in zip(dataclasses.fields(config), dataclasses.fields(entry.config), strict=True):
        assert (real.name, real.default, real.metadata) == (read.name, read.default, read.metadata)
    assert options(config) == options(entry.config)


@pytest.mark.parametrize("entry", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_tiny_run_logs_finite_terms_that_are_configuration_keys(entry, tmp_path, cli, make_teacher):
    spec = "resnet8"  # has all that objectives ask for
    sets = ["real:8"] if "labels" in entry.needs else ["noise:8"]
    args = ["--steps", 1, "--batch-size", 4, "--holdout", 0.5, "--out", tmp_path / "s", "--json"]
    args += ["--teacher", make_teacher(spec), "--student", spec, "--transfer-set", *sets]
    args += ["--pretraining", 0] if "pretraining" in hints(entry.config) else []  # one step has no phases
    code, out, err = cli("distill", "--objective", entry.name, *args)
    assert code == 0, err
    assert json.loads(out)["ok"]
    with (tmp_path / "s" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {key.rpartition(".")[2] for key in row} - {"round", "agreement"} <= set(hints(entry.config))
    assert all(np.isfinite(float(value)) for value in row.values())


@pytest.mark.parametrize(
    ("sets", "hard", "said"),
    [(["noise:8"], 1, "hard labels of response: the images have no labels, the teacher's classes are taken"),
     (["noise:8", "real:8"], 1, "not all transfer sets have labels, so also for real images, the teacher's"),
     (["real:8"], 1, None), (["noise:8"], 0, None)],
)  # fmt: skip
def test_it_is_said_whose_labels_are_taken(sets, hard, said, tmp_path, cli, teacher):
    args = ["--teacher", teacher, "--steps", 1, "--batch-size", 4, "--out", tmp_path / "s", "--hard", hard]
    code, _, err = cli("distill", *args, "--transfer-set", *sets)
    assert code == 0, err
    shown = " ".join(err.split())  # lines are broken at the width of the terminal
    assert shown.count("hard labels of response") == (said is not None)
    assert said is None or said in shown


@pytest.mark.parametrize("chosen", [["response=0"], ["response=0", "at=0"], ["response", "--soft", "0"]])
def test_objectives_without_any_weight_are_refused(chosen, tmp_path, cli, teacher):
    args = ["--teacher", teacher, "--transfer-set", "noise:8", "--out", tmp_path / "s"]
    for mode in ([], ["--dry-run"]):
        code, _, err = cli("distill", *args, *mode, "--objective", *chosen)
        assert code == 2
        assert "nothing is learned: no term of response" in err
    assert not (tmp_path / "s").exists()
