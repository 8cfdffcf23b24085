"""Regimes in which labels teach: hand-made answers, partners of the same class, students that teach each other."""

from __future__ import annotations

import functools
import itertools
import json

import numpy as np
import oracles
import pytest
import stand_ins
import torch
from stand_ins import Given, work
from tiny_regimes import CLASSES, SIZE, inputs, linear, network, pixels, regime, response
from torch import nn

from dfkd_cli.catalog import entries
from dfkd_cli.data.batches import Batches
from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.regimes import base, kdcl

LABELS = torch.tensor([0, 1, 2, 3, 0, 2])
CPU = torch.device("cpu")
PLAIN = {"schedule": "constant", "optimizer": "sgd", "lr": 0.5, "momentum": 0}
RNG = np.random.default_rng(3)


def given() -> Given:
    return Given(pixels(), LABELS)


def hard_gradient(logits: oracles.Array, labels: torch.Tensor = LABELS) -> oracles.Array:
    """The gradient of the mean cross-entropy in logits (B, K)."""
    return (oracles.softmax(logits) - np.eye(CLASSES)[labels]) / len(logits)


# -- answers that are made by hand -------------------------------------------------------------------------------------


def virtual(variant: str, correct: float, flatten: float) -> oracles.Array:
    """The virtual teacher's logits (B, K), by the paper's piecewise definition."""
    p = np.array([[correct if k == y else (1 - correct) / (CLASSES - 1) for k in range(CLASSES)] for y in LABELS])
    return np.log(p) if variant == "paper" else p / flatten


@pytest.mark.parametrize(("variant", "tau"), [("paper", 20.0), ("paper", 1.0), ("released", 1.0), ("released", 3.0)])
def test_a_virtual_teacher_is_gradient_descent_on_its_answers(variant, tau, tmp_path):
    learner = regime(
        "virtual-teacher", given(), objectives=[(0.7, response(temperature=tau, soft=0.3, hard=0.9))], steps=5,
        config={"variant": variant, "correct": 0.9, "flatten": 5.0}, **PLAIN,
    )  # fmt: skip
    x, start, answers = inputs(pixels()), linear(learner.student), virtual(variant, 0.9, 5.0)

    def gradient(w):
        logits = x @ w.T
        soft = oracles.response_gradient(logits, answers, tau)
        return 0.7 * (0.3 * soft + 0.9 * hard_gradient(logits)).T @ x

    expected = oracles.sgd(start, gradient, 0.5, 0, 0, 5, True)
    work(learner, tmp_path / "run")
    assert np.abs(expected - start).max() > 0.01
    np.testing.assert_allclose(linear(learner.student), expected, atol=1e-5)


def test_the_papers_softened_answers():
    """0.99 for one of 100 classes, at temperature 20: 1.574 %; probabilities in the place of logits: 1.050 %."""
    p = np.full(100, 0.01 / 99)
    p[7] = 0.99
    assert (p ** (1 / 20) / (p ** (1 / 20)).sum())[7] == pytest.approx(0.01574, abs=1e-5)
    assert oracles.softmax(np.log(p)[None] / 20)[0, 7] == pytest.approx(0.01574, abs=1e-5)
    assert oracles.softmax(p[None] / 20)[0, 7] == pytest.approx(0.01050, abs=1e-5)


# -- partners ----------------------------------------------------------------------------------------------------------


def test_partners_are_of_the_class_and_any_image_of_it_alike():
    labels = torch.tensor([0, 0, 0, 1, 2, 2] * 5)
    images = torch.arange(30.0).view(30, 1, 1, 1)
    batches = Batches(Given(images, labels), 30, seed=0, device=CPU)
    (batch,) = batches.steps(0, 1)
    torch.manual_seed(0)
    counts = torch.zeros(30, 30)
    for _ in range(600):
        partners = batches.partners(batch)
        assert torch.equal(partners.true_labels, batch.true_labels)
        counts[batch.pixels.flatten().long(), partners.pixels.flatten().long()] += 1
    for image, label in enumerate(labels):
        same = labels == label
        assert counts[image, ~same].sum() == 0
        share = 600 / int(same.sum())  # itself included
        assert (counts[image, same] - share).abs().max() < 6 * share**0.5


def test_without_another_image_of_its_class_one_is_its_own_partner():
    batches = Batches(Given(pixels(2), torch.tensor([1, 1])), 2, seed=0, device=CPU)
    (batch,) = batches.steps(0, 1)
    alone = Images(1 - pixels(4), torch.tensor([0, 1, 2, 3]))
    partners = batches.partners(alone)
    assert [bool((partners.pixels[i] == alone.pixels[i]).all()) for i in range(4)] == [True, False, True, True]
    assert any(torch.equal(partners.pixels[1], image) for image in batch.pixels)


def test_class_wise_is_gradient_descent_towards_the_answers_to_partners(tmp_path):
    learner = regime(
        "cs-kd", given(), objectives=[(1.0, response(temperature=4, soft=1.5, hard=1.0))], steps=6, batch_size=4,
        **PLAIN,
    )  # fmt: skip
    start, pairs, original = linear(learner.student), [], Batches.partners

    def partners(self: Batches, images: Images) -> Images:
        pairs.append((inputs(images.pixels), images.labels, inputs((chosen := original(self, images)).pixels)))
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "partners", partners)
        work(learner, tmp_path / "run")
    assert len(pairs) == 6
    w = start
    for x, labels, other in pairs:
        logits = x @ w.T
        soft = oracles.response_gradient(logits, other @ w.T, 4.0)  # the partner's answers are constants
        w = w - 0.5 * (1.5 * soft + hard_gradient(logits, labels)).T @ x
    assert np.abs(w - start).max() > 0.01
    np.testing.assert_allclose(linear(learner.student), w, atol=1e-5)


def test_partners_are_changed_as_images_are(tmp_path):
    learner = regime("cs-kd", given(), objectives=[(1.0, response(hard=1.0))], steps=1, **PLAIN, noise=0.3)
    shown, chosen, original = [], [], Batches.partners
    learner.student.register_forward_pre_hook(lambda _, args: shown.append(args[0]))

    def partners(self: Batches, images: Images) -> Images:
        chosen.append(original(self, images))
        return chosen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "partners", partners)
        work(learner, tmp_path / "run")
    change = shown[-1] - chosen[0].pixels
    assert (change.flatten(1).abs().amax(1) > 0.1).all()


def test_both_halves_are_normalised_apart_and_remembered_in_turn(tmp_path):
    student = network(1, nn.BatchNorm1d(9, momentum=0.25))
    learner = regime("cs-kd", given(), student, [(1.0, response(hard=1.0))], steps=1, **PLAIN)
    seen = []
    student.register_forward_pre_hook(lambda _, args: seen.append(inputs(args[0])[:, :-1]))
    work(learner, tmp_path / "run")
    x, other = seen[-2:]  # those before looked at the network
    assert not np.allclose(x, other)
    expected = 0.25 * other.mean(0) + 0.75 * 0.25 * x.mean(0)
    np.testing.assert_allclose(student.net[1].running_mean.numpy(), expected, atol=1e-6)


# -- students that teach each other ------------------------------------------------------------------------------------


def answers(students: int, images: int = 40, classes: int = 5) -> tuple[oracles.Array, oracles.Array]:
    return 2 * RNG.normal(size=(students, images, classes)), RNG.integers(classes, size=images)


def losses(logits: oracles.Array, labels: oracles.Array) -> oracles.Array:
    """The cross-entropy of each image (B,)."""
    return -np.log(oracles.softmax(logits))[np.arange(len(labels)), labels]


def probabilities(logits) -> oracles.Array:
    """Those of each student (M, B, K)."""
    return np.stack([oracles.softmax(each) for each in logits])


def said(rule: str, logits: oracles.Array, labels: oracles.Array) -> oracles.Array:
    return kdcl.ENSEMBLES[rule](torch.from_numpy(logits), torch.from_numpy(labels)).numpy()


@pytest.mark.parametrize("students", [2, 3, 5])
def test_naive_and_min_logit_image_by_image(students):
    logits, labels = answers(students)
    naive, least = said("naive", logits, labels), said("min-logit", logits, labels)
    for n, y in enumerate(labels):
        best = min(range(students), key=lambda i: losses(logits[i], labels)[n])
        np.testing.assert_array_equal(naive[n], logits[best, n])
        for c in range(logits.shape[2]):
            assert least[n, c] == min(logits[i, n, c] - logits[i, n, y] for i in range(students))
    assert (losses(least, labels) <= losses(naive, labels) + 1e-12).all()  # as the paper says of it


@pytest.mark.parametrize("students", [2, 3, 4])
def test_linear_is_the_best_convex_combination(students):
    logits, labels = answers(students, 25)
    combined = said("linear", logits, labels)
    steps = 40 if students < 4 else 12
    grid = [np.array(a) / steps for a in itertools.product(range(steps + 1), repeat=students) if sum(a) == steps]
    tried = np.stack([losses(np.einsum("m,mbk->bk", a, logits), labels) for a in grid])
    assert (losses(combined, labels) <= tried.min(0) + 1e-4).all()
    for n in range(len(labels)):  # and it is one
        a, residual, *_ = np.linalg.lstsq(
            np.vstack([logits[:, n].T, np.full(students, 1e3)]), np.append(combined[n], 1e3), rcond=None
        )
        assert a.min() > -1e-6
        assert residual.size == 0 or residual < 1e-12


def test_linear_reaches_corners_and_equal_students():
    logits, labels = answers(2, 30)
    better = np.stack([logits[0]] * 2)
    better[1, np.arange(30), labels] += 2
    np.testing.assert_allclose(said("linear", better, labels), better[1], atol=1e-12)
    same = np.stack([logits[0]] * 3)
    np.testing.assert_allclose(said("linear", same, labels), logits[0], atol=1e-12)


def test_general_has_the_weights_of_lagrange():
    logits, labels = answers(3, 200)
    logits[0, np.arange(200), labels] += 2  # all of them of use
    logits[1, np.arange(200), labels] += 2
    p, t = probabilities(logits), np.eye(5)[labels]
    c = np.array([[((p[i] - t) * (p[j] - t)).sum(1).mean() for j in range(3)] for i in range(3)])
    c += 1e-4 * np.eye(3)
    system = np.block([[2 * c, np.ones((3, 1))], [np.ones((1, 3)), np.zeros((1, 1))]])
    w = np.linalg.solve(system, [0, 0, 0, 1])[:3]  # the stationary point of w^T C w with sum 1
    w = np.maximum(w, 0) / np.maximum(w, 0).sum()
    weights = kdcl.weights(torch.from_numpy(p), torch.from_numpy(labels))
    np.testing.assert_allclose(weights.numpy(), w, rtol=1e-9)
    mixed = kdcl.mixed(torch.from_numpy(logits), weights).numpy()
    np.testing.assert_allclose(mixed, np.einsum("m,mbk->bk", w, p), rtol=1e-9)
    flipped = kdcl.weights(torch.from_numpy(np.stack([t, p[0]])), torch.from_numpy(labels)).numpy()
    assert flipped.min() >= 0
    assert flipped.sum() == pytest.approx(1)


@pytest.mark.parametrize("rule", ["naive", "linear", "min-logit"])
def test_students_descend_towards_what_they_say_together(rule, tmp_path):
    tau, weight = 2.0, 0.6
    learner = regime(
        "kdcl", given(), objectives=[(weight, response(temperature=tau))], peers=[network(5), network(6)], steps=4,
        config={"ensemble": rule, "labels": 0.8}, **PLAIN,
    )  # fmt: skip
    x, begin = inputs(pixels()), [linear(student) for student in learner.students]
    ws = begin
    for _ in range(4):
        z = np.stack([x @ w.T for w in ws])
        together = said(rule, z, LABELS.numpy())
        step = [0.8 * hard_gradient(own) + weight * oracles.response_gradient(own, together, tau) for own in z]
        ws = [w - 0.5 * g.T @ x for w, g in zip(ws, step, strict=True)]
    work(learner, tmp_path / "run")
    for student, w, start in zip(learner.students, ws, begin, strict=True):
        assert np.abs(w - start).max() > 0.01
        np.testing.assert_allclose(linear(student), w, atol=2e-4 if rule == "linear" else 1e-5)


@pytest.mark.parametrize("rule", ["naive", "linear", "min-logit", "general"])
def test_what_they_say_together_is_not_rounded_where_networks_are(rule):
    more = {"holdout": 0.25} if rule == "general" else {}
    learner = regime("kdcl", given(), peers=[network(5), network(6)], config={"ensemble": rule}, **more)
    images = Images(torch.zeros(len(LABELS), *SIZE), LABELS)
    logits = 30 * torch.randn(3, len(LABELS), CLASSES, generator=torch.Generator().manual_seed(0))
    exact = learner.ensemble(logits, images)["eval"].logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(learner.ensemble(logits, images)["eval"].logits, exact)


def test_general_is_measured_in_each_epoch_on_images_held_out(tmp_path):
    source = Given(pixels(20), torch.arange(20) % CLASSES)
    learner = regime(
        "kdcl", source, objectives=[(1.0, response(temperature=3.0))], peers=[network(5)], holdout=0.25, batch_size=15,
        epochs=3, config={"ensemble": "general"}, **PLAIN,
    )  # fmt: skip
    (held, train), ws = (inputs(part.all().pixels) for part in (learner.held_out, learner.train_source)), []
    labels = [part.all().true_labels for part in (learner.held_out, learner.train_source)]
    ws = [linear(student) for student in learner.students]
    for _ in range(3):
        p, t = probabilities([held @ w.T for w in ws]), np.eye(CLASSES)[labels[0]]
        c = np.array([[((a - t) * (b - t)).sum(1).mean() for b in p] for a in p]) + 1e-4 * np.eye(2)
        a = np.linalg.solve(c, np.ones(2))
        a = np.maximum(a / a.sum(), 0)
        z = np.stack([train @ w.T for w in ws])
        mixture = np.einsum("m,mbk->bk", a / a.sum(), probabilities(z / 3.0))
        step = [hard_gradient(own, labels[1]) + oracles.response_gradient(own, 3.0 * np.log(mixture), 3.0) for own in z]
        ws = [w - 0.5 * g.T @ train for w, g in zip(ws, step, strict=True)]
    work(learner, tmp_path / "run")
    for student, w in zip(learner.students, ws, strict=True):
        np.testing.assert_allclose(linear(student), w, atol=1e-5)


def test_each_student_has_its_own_view_and_nothing_flows_through_the_target(tmp_path):
    learner = regime("kdcl", given(), peers=[network(5)], noise=0.3, steps=1, **PLAIN)
    seen: list[torch.Tensor] = []
    for student in learner.students:
        student.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    work(learner, tmp_path / "run")
    assert len(seen) == 2
    assert not torch.equal(*seen)
    learner = regime("kdcl", given(), peers=[network(5)], config={"labels": 0, "ensemble": "naive"})
    learner.on_fit_start()
    learner.loss(given().all())[0].backward()
    own = {index: p.grad.abs().sum() for index, s in enumerate(learner.students) for p in s.parameters()}
    assert all(value > 0 for value in own.values())  # each from its own answers only: checked above by whole steps


@pytest.mark.parametrize(
    ("config", "more", "word"),
    [({}, {"peers": []}, "one student"), ({"ensemble": "general"}, {"peers": [network(5)]}, "--holdout")],
)
def test_what_collaborative_students_need(config, more, word):
    with pytest.raises(ConfigError, match=word):
        regime("kdcl", given(), config=config, **more)


def test_general_of_images_too_few_to_hold_one_out_has_equal_weights(tmp_path, teacher, cli):
    learner = regime("kdcl", given(), peers=[network(5)], holdout=0.01, steps=1, config={"ensemble": "general"})
    assert learner.held_out is None
    assert work(learner, tmp_path / "run").mixture.tolist() == [0.5, 0.5]
    wanted = ("--transfer-set", "noise:50", "--method", "kdcl", "--ensemble", "general", "--holdout", "0.1")
    code, _, err = cli("distill", "--teacher", teacher, *wanted, "--out", tmp_path / "out", "--dry-run")
    assert code == 0, err


def test_a_student_beside_others_is_the_first_of_them(tmp_path, teacher, cli):
    learn = ("distill", "--teacher", teacher, "--transfer-set", "noise:50", "--method", "kdcl", "--dry-run")
    both = ("--students", "lenet5", "lenet5-half", "--out", tmp_path / "out", "--student")
    code, _, err = cli(*learn, *both, "resnet8")
    assert (code, "--student resnet8: of --students lenet5 lenet5-half the first is written as that" in err) == (
        2,
        True,
    )
    code, _, err = cli(*learn, *both, "lenet5")
    assert code == 0, err


@pytest.mark.parametrize("name", ["at", "bss", "crd"])
def test_objectives_that_look_into_a_teacher_need_one(name):
    entry = entries("objectives")[name]
    with pytest.raises(ConfigError, match="looks into a teacher network"):
        regime("cs-kd", given(), objectives=[(1.0, entry.load()(entry.config()))])


def test_a_network_that_learns_from_itself_alone_says_so():
    for weight, noted in ((0.0, True), (1.0, False)):
        learner = regime("cs-kd", given(), objectives=[(1.0, response()), (weight, response(hard=1.0))])
        assert ("give --hard 1" in (learner.note or "")) == noted


@pytest.mark.parametrize(("method", "more"), [("kdcl", {"peers": [network(1)]}), ("pseudo-examples", {})])
def test_every_network_is_asked_whether_it_learns_from_one_image(method, more, tmp_path):
    """The first one does; a peer, or the pseudo image alone, is refused in one line."""
    norm = network(3, nn.Linear(9, 9), nn.BatchNorm1d(9))
    single = {"peers": [norm]} if more else {"student": norm, "config": {"pseudo_images": 1}}
    learner = regime(method, given(), objectives=[(1.0, response())], batch_size=1 if more else 4, steps=1, **single)
    with pytest.raises(ConfigError, match="cannot be trained on 1 images at once"):
        work(learner, tmp_path / "run")


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "peers"),
    [("virtual-teacher", {}, 0), ("cs-kd", {}, 0), ("kdcl", {"ensemble": "general"}, 2), ("kdcl", {}, 1)],
)
def test_an_interrupted_run_continues_bit_for_bit(name, config, peers, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "STEPS_PER_ROUND", 4)

    def run(path, *callbacks):
        torch.manual_seed(4)
        nets = [network(i, nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3)) for i in range(peers + 1)]
        source = Given(pixels(24), torch.arange(24) % CLASSES)
        learner = regime(
            name, source, nets[0], [(1.0, response(hard=0.5, temperature=3))], config, nets[1:], holdout=0.25,
            batch_size=6, steps=14, noise=0.1,
        )  # fmt: skip
        return work(learner, path, *callbacks)

    stand_ins.check_interruption(functools.partial(run), tmp_path)


@pytest.mark.parametrize(
    ("method", "more", "made"),
    [("virtual-teacher", ("--temperature", "4"), ()), ("cs-kd", ("--temperature", "4", "--hard", "1"), ()),
     ("kdcl", ("--students", "lenet5-half", "lenet5", "--temperature", "2"), ("peer-1",))],
)  # fmt: skip
def test_they_train_teachers_and_students(method, more, made, teacher, tmp_path, cli):
    common = (*more, "--steps", "40", "--batch-size", "32", "--method", method, "--device", "cpu")
    code, _, err = cli("train-teacher", "--model", "lenet5-half", *common, "--out", tmp_path / "taught")
    assert code == 0, err
    learn = ("distill", "--teacher", teacher, "--transfer-set", "real:200", *common, "--out", tmp_path / "student")
    code, _, err = cli(*learn)
    assert code == 0, err
    for place in ("taught", "student"):
        models = [tmp_path / place, *(tmp_path / place / role for role in made)]
        code, out, err = cli("evaluate", *models, "--json")
        assert code == 0, err
        results = json.loads(out)["results"]
        assert all(result["top1"] > 0.2 for result in results), results
        metrics = json.loads((tmp_path / place / "run.json").read_text())["metrics"]
        assert {name.partition(".")[0] for name in metrics if "." in name} == {*made}


def test_sizes_of_students_that_learn_together(tmp_path):
    assert SIZE == (1, 3, 3)
    learner = regime("kdcl", given(), peers=[network(5, nn.Linear(9, 9))])
    assert [*learner.models()] == ["student", "peer-1"]
