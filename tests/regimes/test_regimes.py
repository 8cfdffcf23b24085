"""Training regimes: the optimiser's steps, the schedule, augmentation, and independence of how steps are cut."""

from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import importlib
import re
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from stand_ins import Given, check_interruption, work
from tiny_regimes import CLASSES, REGIMES, inputs, linear, network, pixels, regime, response
from torch import Tensor, nn

from dfkd_cli import catalog
from dfkd_cli.artifacts.shards import ShardReader
from dfkd_cli.config import hints, options
from dfkd_cli.data.sources import ANSWERS, Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.objectives.base import Objective, Outputs, ask
from dfkd_cli.regimes import base, kcd
from dfkd_cli.regimes.base import Regime
from dfkd_cli.settings import recipe_layer, resolve
from dfkd_cli.stages.distill import opened
from dfkd_cli.stages.distill import run as run_distill
from dfkd_cli.stages.grid.planner import plan
from dfkd_cli.ui import Terminal

# -- the steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "momentum", "decay", "batch", "nesterov"),
    [(1, 0.0, 0.0, 6, True), (1, 0.9, 0.0, 6, True), (4, 0.9, 0.05, 6, True), (4, 0.9, 0.05, 6, False),
     (3, 0.0, 0.0, 100, True)],
)  # fmt: skip
def test_offline_is_gradient_descent_on_the_response(tmp_path, steps, momentum, decay, batch, nesterov):
    tau, lr, weight = 4.0, 0.5, 0.7
    learner = regime(
        "offline", objectives=[(weight, response(temperature=tau))], batch_size=batch, steps=steps, schedule="constant",
        optimizer="sgd", lr=lr, momentum=momentum, weight_decay=decay, nesterov=nesterov,
    )  # fmt: skip
    x, teacher, start = inputs(pixels()), linear(learner.teacher), linear(learner.student)

    def gradient(w):
        return weight * oracles.response_gradient(x @ w.T, x @ teacher.T, tau).T @ x

    expected = oracles.sgd(start, gradient, lr, momentum, decay, steps, nesterov)
    work(learner, tmp_path / "run")
    assert np.abs(expected - start).max() > 0.01
    np.testing.assert_allclose(linear(learner.student), expected, atol=1e-5)
    np.testing.assert_array_equal(linear(learner.teacher), teacher)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_offline_takes_the_steps_of_adam(tmp_path, optimizer):
    tau, lr, decay, steps = 4.0, 0.05, 0.2, 5
    learner = regime(
        "offline", objectives=[(1.0, response(temperature=tau))], steps=steps, schedule="constant",
        optimizer=optimizer, lr=lr, weight_decay=decay,
    )  # fmt: skip
    x, teacher, start, before = inputs(pixels()), linear(learner.teacher), linear(learner.student), []

    def gradient(w):
        before.append(w)
        decayed = decay * w if optimizer == "adam" else 0.0  # AdamW shrinks the weights beside the step
        return oracles.response_gradient(x @ w.T, x @ teacher.T, tau).T @ x + decayed

    def shrunk(w):
        return w - lr * decay * before[-1] if optimizer == "adamw" else w

    expected = oracles.adam(start, gradient, lr, steps, shrunk)
    work(learner, tmp_path / "run")
    np.testing.assert_allclose(linear(learner.student), expected, atol=1e-5)


class Seen(Objective):
    """The mean of the teacher's answers."""

    kind = "response"

    def __init__(self, mode: str) -> None:
        super().__init__(SimpleNamespace(seen=1.0))
        self.teacher_mode = mode

    def forward(self, student, teacher, images):
        return {"seen": teacher.logits.mean() + 0 * student.logits.mean()}


def test_each_objective_is_shown_the_teacher_in_its_own_mode():
    learner, images = regime("offline", objectives=[(1.0, Seen("eval")), (1.0, Seen("train"))]), Images(pixels())
    logits = torch.zeros(6, CLASSES)
    terms = learner.terms(Outputs(logits), {"train": Outputs(logits + 1), "eval": Outputs(logits + 2)}, images)
    assert {name: term["seen"].item() for name, term in terms.items()} == {"loss0": 2, "loss1": 1}


def test_weights_of_objectives_and_of_their_terms_add_up():
    objectives = [
        (0.9, response(temperature=4, soft=0.5, hard=2.0)),
        (0.1, response(form="mse", soft=3.0)),
    ]
    learner, images = regime("offline", objectives=objectives), pixels()
    x = inputs(images)
    student, teacher = x @ linear(learner.student).T, x @ linear(learner.teacher).T
    hard = oracles.cross_entropy(np.eye(CLASSES)[teacher.argmax(1)], oracles.softmax(student))
    first = 0.5 * oracles.response(student, teacher, "kl", 4) + 2 * hard
    expected = 0.9 * first + 0.1 * 3 * oracles.response(student, teacher, "mse", 1)
    loss, _ = learner.loss(Images(images))
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


def test_terms_are_of_any_students_answers_and_their_total_asks_no_network():
    objectives = [(0.5, response(temperature=4, soft=2.0)), (3.0, response(form="mse", soft=0.1))]
    learner, images, other = regime("offline", objectives=objectives), Images(pixels()), network(3)
    terms = learner.terms(ask(other, images.pixels, {}), learner.ask_teacher(images), images)
    student, teacher = (inputs(images.pixels) @ linear(net).T for net in (other, learner.teacher))
    for name, (form, temperature) in {"loss0": ("kl", 4), "loss1": ("mse", 1)}.items():
        expected = oracles.response(student, teacher, form, temperature)
        np.testing.assert_allclose(terms[name]["soft"].item(), expected, rtol=1e-5)
    ones = {name: {"soft": torch.ones(())} for name in terms}
    assert learner.total(ones).item() == pytest.approx(0.5 * 2 + 3 * 0.1)
    assert learner.named(terms) == {"loss0.soft": terms["loss0"]["soft"], "loss1.soft": terms["loss1"]["soft"]}


class Early(Objective):
    """Learned alone in the first two epochs."""

    kind = "response"
    phase = 2

    def forward(self, student, teacher, images):
        return {"early": student.logits.mean()}


@pytest.mark.parametrize(("epoch", "expected"), [(0, 0.5 * 4), (1, 0.5 * 4), (2, 3.0), (9, 3.0)])
def test_only_what_counts_in_an_epoch_is_in_the_total(epoch, expected):
    early = Early(SimpleNamespace(early=4.0))
    learner = regime("offline", objectives=[(0.5, early), (3.0, response())])
    for objective in learner.losses.values():
        objective.epoch = epoch
    total = learner.total({"loss0": {"early": torch.ones(())}, "loss1": {"soft": torch.ones(())}})
    assert total.item() == pytest.approx(expected)


def test_no_gradient_reaches_the_teacher():
    learner, images = regime("offline"), pixels().requires_grad_()
    learner.loss(Images(images))[0].backward()
    assert all(p.grad is None for p in learner.teacher.parameters())
    assert all(p.grad is not None for p in learner.student.parameters())
    through_student = learner.student.head().weight.detach()
    x = inputs(images.detach())
    expected = oracles.response_gradient(x @ linear(learner.student).T, x @ linear(learner.teacher).T, 20.0)
    expected = expected @ through_student.double().numpy() / 0.5
    np.testing.assert_allclose(images.grad.flatten(1), expected, atol=1e-6)


def test_a_loss_that_explodes_is_a_concern_of_continued_runs_too(tmp_path):
    learner = regime("offline", batch_size=6, steps=450, schedule="constant", optimizer="sgd", lr=0.5, warmup=0)
    work(learner, tmp_path / "run")
    [(term, first)] = learner.first.items()
    assert learner.concern({term: 100.0}) is None
    assert learner.concern({term: 6.8e13}) == f"{term} was {first:.2g} and has exploded to 6.8e+13: lower --lr"
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    continued = regime("offline")
    continued.on_load_checkpoint(checkpoint)
    assert continued.concern({term: 6.8e13}) == learner.concern({term: 6.8e13})
    continued.first[term] = 1e11  # a sum over large maps starts high
    assert continued.concern({term: 6.8e13}) is None


@pytest.mark.parametrize(("momentum", "steps", "words"), [(0.01, 300, "by 0.01 a step, are 5%"), (0.1, 30, "are 4%")])
def test_averages_that_lag_behind_are_named_where_nothing_seems_learned(momentum, steps, words):
    learner = regime("offline", student=network(1, nn.BatchNorm1d(9, momentum=momentum)))
    learner.student.net[1].num_batches_tracked.fill_(steps)
    concern = learner.concern({"agreement_on_transfer_set": 0.01})
    assert words in concern and "train for longer" in concern and "momentum" in concern
    learner.student.net[1].num_batches_tracked.fill_(steps * 2)
    assert "BatchNorm" not in learner.concern({"agreement_on_transfer_set": 0.01})
    assert learner.concern({"agreement_on_transfer_set": 0.9}) is None


@pytest.mark.parametrize(
    ("objectives", "training", "advice"),
    [(None, {}, "train for longer (--epochs, --steps), or try another --lr"),
     (None, {"rotate": 45, "noise": 0.2}, "change the images less than by --rotate 45 --noise 0.2, train for longer"),
     ([(0.0, response())], {}, "the head learned nothing: add --objective response")],
)  # fmt: skip
def test_answers_hardly_above_chance_are_a_concern(objectives, training, advice):
    learner = regime("offline", **({"objectives": objectives} if objectives else {}), **training)
    chance = 1 / CLASSES
    limit = 0.1 + 0.9 * chance
    concern = learner.concern({"agreement_on_transfer_set": limit - 0.01})
    what = f"{limit - 0.01:.2%} agreement with the teacher on the transfer set is hardly above chance ({chance:.2%})"
    assert concern.startswith(f"{what}: ")
    assert advice in concern
    assert learner.concern({"agreement_on_transfer_set": limit + 0.01}) is None
    assert learner.concern({"agreement": 0.0}) is None  # of images held out, while training goes on
    assert "top-1" in learner.concern({"top1": chance})


@pytest.mark.parametrize(
    ("share", "count", "told"), [(1.0, 100, True), (0.995, 200, True), (0.98, 100, False), (1.0, 99, False)]
)
def test_images_of_one_class_are_a_concern(share, count, told):
    learner = regime("offline", source=Given(pixels(count)))
    concern = learner.concern({"agreement_on_transfer_set": 1.0, "largest_class_of_transfer_set": share})
    assert (concern is not None and f"{share:.2%} of the images are of one class" in concern) == told


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_supervised_is_smoothed_cross_entropy(smoothing):
    images, labels = pixels(), torch.tensor([0, 1, 2, 3, 0, 1])
    learner = regime("supervised", Given(images, labels), config={"label_smoothing": smoothing})
    loss, _ = learner.loss(Images(images, labels))
    logits = inputs(images) @ linear(learner.student).T
    expected = oracles.smoothed_cross_entropy(logits, labels.numpy(), smoothing)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-6)


def test_supervised_training_learns(tmp_path):
    images = pixels(8)
    labels = (inputs(images) @ linear(network(5)).T).argmax(1)  # classes that a linear student can tell apart
    source = Given(images, torch.from_numpy(labels))
    learner = work(regime("supervised", source, steps=300, lr=0.1, optimizer="adam"), tmp_path / "run")
    assert torch.equal(learner.student(images).argmax(1), source.images.labels)


# -- the schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 101])
def test_learning_rate(steps, warmup, schedule):
    falls = {"milestones": (0.3, 0.625, 0.75, 0.755), "gamma": 0.2}
    learner = regime("offline", steps=steps, warmup=warmup, schedule=schedule, lr=0.3, **falls)
    (optimizer,), (scheduler,) = learner.configure_optimizers()
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(
        rates, [oracles.learning_rate(s, steps, 0.3, warmup, schedule, **falls) for s in range(steps)], atol=1e-9
    )
    if schedule == "cosine" and steps == 101 and warmup < 1:
        assert max(rates) == pytest.approx(0.3, rel=1e-3)
        assert rates[-1] < 1e-3


OWN = ("train-teacher/virtual-teacher-cifar100", "train-teacher/cs-kd-cifar100", "train-teacher/kdcl-cifar100")
CONDENSED = "distill/sre2l-cifar100", "synthesize/sre2l-cifar100"


@pytest.mark.parametrize(
    "recipe",
    [
        n
        for n in catalog.recipes()
        if n.endswith("cifar100") and not n.startswith("compare/") and n not in OWN + CONDENSED
    ],
)
def test_recipes_fall_after_the_epochs_of_the_protocol(recipe):
    command, name = recipe.split("/")
    assert falls(resolve(command, [recipe_layer(name, command)])) == [-90, -60, -30]


def test_rows_of_a_condensing_grid_fall_after_the_same_epochs(tmp_path):
    grid = plan(resolve("compare", [recipe_layer("kcd-cifar100", "compare")]), tmp_path)
    students = [run.settings for run in grid.runs if run.settings.command == "distill"]
    assert {settings.method.entry.name for settings in students} == {"offline", "kcd"}
    for settings in students:
        assert falls(settings) == [-90, -60, -30]


def falls(settings):
    """The epochs after which the learning rate falls to a tenth, from the end, as CIFAR-100's recipes have it."""
    training, method = settings.inputs, settings.method
    images = [50_000] * training.epochs
    if method.entry.name == "kcd":  # whose later epochs have fewer images
        rankings = training.epochs // method.config.period
        left = kcd.sizes(50_000, method.config.keep, rankings)
        images = [left[epoch // method.config.period] for epoch in range(training.epochs)]
    starts = np.cumsum([count // training.batch_size for count in images])
    assert (training.schedule, training.gamma, training.nesterov) == ("step", 0.1, False)
    epochs = [np.searchsorted(starts, round(share * starts[-1])) + 1 for share in training.milestones]
    return [epoch - training.epochs for epoch in epochs]


@pytest.mark.parametrize(
    ("recipe", "length", "optimizer", "images", "loss", "weight"),
    [  # epochs, batch; crop or window, CutMix, MixUp; temperature, the teacher's mode; of the plain divergence
        ("sre2l-cifar100", (400, 128), ("adamw", 1e-3, 0.01, 0), (4, 0, 0, 0.8), (30, "train"), 1),
        ("sre2l-tiny-imagenet", (100, 256), ("sgd", 0.2, 1e-4, 0.05), (0, 0.08, 0, 0), (20, "eval"), 400),
        ("sre2l-imagenet", (300, 1024), ("adamw", 1e-3, 0.01, 0), (0, 0.08, 1, 0), (20, "eval"), 1),
    ],
)
def test_recipes_of_condensed_images_have_the_released_protocols(recipe, length, optimizer, images, loss, weight):
    settings = resolve("distill", [recipe_layer(recipe, "distill")])
    c, response = settings.inputs, settings.components["objective"][0].config
    assert ((c.epochs, c.batch_size), c.schedule) == (length, "cosine")
    assert c.student.endswith("resnet18")
    assert (c.optimizer, c.lr, c.weight_decay, c.warmup) == optimizer
    assert (c.crop, c.resized_crop, c.cutmix, c.mixup) == images and c.flip
    assert (response.temperature, response.teacher_mode) == loss
    assert response.soft * response.temperature**2 == pytest.approx(weight, rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("sre2l-imagenet", (0.25, 0.01, 4000, 0.08, 0, 16, True)),
        ("cda-imagenet", (0.25, 0.01, 4000, 0.08, 1, 16, True)),
        ("sre2l-tiny-imagenet", (0.1, 1, 4000, 0.08, 0, 4, True)),
        ("cda-tiny-imagenet", (0.4, 0.05, 4000, 0.08, 1, 2, True)),
        ("sre2l-cifar100", (0.25, 0.01, 1000, 1, 0, 2, False)),
    ],
)
def test_recipes_that_condense_have_the_released_settings(recipe, expected):
    c = resolve("synthesize", [recipe_layer(recipe, "synthesize")]).method.config
    assert (c.lr, c.statistics, c.iterations, c.crop, c.curriculum, c.jitter, c.view_flip) == expected
    assert (c.first_layer, c.betas, c.batch_size, c.clamp, c.schedule) == (10, (0.5, 0.9), 100, True, "cosine")


@pytest.mark.parametrize(
    ("recipe", "epochs", "gamma"), [(OWN[0], [60, 120, 160], 0.2), (OWN[1], [101, 151], 0.1), (OWN[2], [100, 150], 0.1)]
)
def test_recipes_of_papers_with_protocols_of_their_own(recipe, epochs, gamma):
    command, name = recipe.split("/")
    training = resolve(command, [recipe_layer(name, command)]).inputs
    assert [round(share * training.epochs) for share in training.milestones] == epochs
    assert (training.epochs, training.batch_size, training.gamma, training.nesterov) == (200, 128, gamma, False)


def test_epochs_count_whole_batches_and_steps_override_them():
    assert regime("offline", epochs=5, batch_size=2).steps == 15
    assert regime("offline", epochs=5, batch_size=4).steps == 5  # the incomplete batch is left out
    assert regime("offline", epochs=5, batch_size=100).steps == 5
    assert regime("offline", epochs=5, batch_size=2, steps=7).steps == 7


class Timed(Objective):
    """Terms that tell the time; one of them is there in the first epoch only."""

    kind = "response"

    def forward(self, student, teacher, images):
        terms = {"passes": self.epoch, "progress": self.progress} | ({} if self.epoch else {"early": 5.0})
        return {name: student.logits.sum() * 0 + value for name, value in terms.items()}


def test_objectives_know_the_time_and_terms_are_logged_where_they_are(tmp_path):
    weights = SimpleNamespace(passes=1.0, progress=1.0, early=1.0)
    work(regime("offline", objectives=[(1.0, Timed(weights))], batch_size=2, steps=8), tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    means = {name: float(row[name]) for name in ("passes", "progress", "early")}
    assert means == pytest.approx({"passes": (0 * 3 + 1 * 3 + 2 * 2) / 8, "progress": 3.5 / 8, "early": 5.0})


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_how_steps_are_cut_into_rounds_does_not_change_the_result(tmp_path, monkeypatch):
    results, fresh = [], network(1, nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5))
    for length in (1, 3, 200):
        monkeypatch.setattr(base, "STEPS_PER_ROUND", length)
        student = copy.deepcopy(fresh)
        augmentation = {"noise": 0.1, "rotate": 10, "translate": 0.1}
        learner = regime(
            "offline", Given(pixels(20)), student, holdout=0.2, batch_size=5, steps=7, warmup=0.3, **augmentation
        )
        assert learner.rounds == -(-7 // length)
        work(learner, tmp_path / str(length))
        results.append(student.state_dict())
    assert not torch.equal(results[0]["net.1.weight"], fresh.net[1].weight)
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())


def test_held_out_images_are_never_trained_on(tmp_path):
    images, student, seen = pixels(20), network(1), []
    student.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0])))
    work(regime("offline", Given(images), student, holdout=0.25, batch_size=5, steps=6), tmp_path / "run")
    trained, measured = (
        {tuple(image.flatten().tolist()) for training, batch in seen for image in batch if training is mode}
        for mode in (True, False)
    )
    assert (len(trained), len(measured)) == (15, 5)
    assert trained | measured == {tuple(image.flatten().tolist()) for image in images}


def test_held_out_images_stay_as_they_are_stored_and_the_teacher_is_asked_about_them_once(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "STEPS_PER_ROUND", 2)
    learner, asked = regime("offline", Given((255 * pixels(20)).byte()), holdout=0.25, batch_size=5, steps=6), []
    learner.teacher.register_forward_pre_hook(lambda _, args: asked.extend(args[0].flatten(1).tolist()))
    work(learner, tmp_path / "run")
    assert learner.rounds == 3
    held = learner.held_out.all().to(torch.device("cpu")).pixels.flatten(1).tolist()
    assert sorted(image for image in asked if image in held) == sorted(held)
    assert learner.held.pixels.dtype == torch.uint8


# -- augmentation ------------------------------------------------------------------------------------------------------


def test_teacher_and_student_see_the_same_augmented_images(tmp_path):
    images, learner, seen = pixels(), regime("offline", steps=2, noise=0.3), {"student": [], "teacher": []}
    for role, batches in seen.items():
        getattr(learner, role).register_forward_pre_hook(lambda _, args, batches=batches: batches.append(args[0]))
    work(learner, tmp_path / "run")
    assert len(seen["student"]) == 2
    for student, teacher in zip(seen["student"], seen["teacher"], strict=True):
        assert torch.equal(student, teacher)
        assert torch.cdist(student.flatten(1), images.flatten(1)).min() > 0.1
    assert not torch.equal(*seen["student"])


@pytest.mark.parametrize("noise", [0, 0.3])
def test_stored_answers_reach_the_losses_unless_the_pixels_change(noise, tmp_path):
    class Stored(Given):
        answers = dict.fromkeys(ANSWERS, CLASSES)

        def chunk(self, index: int) -> Images:
            return dataclasses.replace(self.images, logits=self.images.pixels.flatten(1)[:, :4], targets=TARGETS)

    class Looking(type(response())):
        def forward(self, student, teacher, images: Images) -> dict[str, Tensor]:
            seen.append(images)
            return super().forward(student, teacher, images)

    TARGETS, seen = torch.rand(6, CLASSES), []
    objective = Looking(response().config)
    work(regime("offline", Stored(pixels()), objectives=[(1.0, objective)], steps=2, noise=noise), tmp_path / "run")
    assert len(seen) == 2
    for images in seen:
        if noise:
            assert images.logits is images.targets is None
        else:
            assert torch.equal(images.logits, images.pixels.flatten(1)[:, :4])
            assert torch.equal(images.targets, TARGETS[images.positions])


@pytest.mark.parametrize("needs", [(), ("labels",), ("logits",), ("logits", "targets")])
def test_shards_are_asked_for_the_answers_that_something_needs(needs, tmp_path, teacher, cli):
    """``noise`` stores the teacher's logits, and no targets: it aims at none."""
    args = ["--teacher", teacher, "--num-images", 3, "--out", tmp_path / "shards"]
    assert cli("synthesize", "--method", "noise", *args)[0] == 0
    settings = resolve("distill", [("", {"teacher": str(teacher), "transfer_set": [str(tmp_path / "shards")]})])
    (objective,) = settings.components["objective"]
    needing = dataclasses.replace(objective, entry=dataclasses.replace(objective.entry, needs=needs))
    settings = dataclasses.replace(settings, components=settings.components | {"objective": (needing,)})
    with opened(settings) as job:
        source = job.task(settings).source
        images, stored = source.all(), ShardReader(tmp_path / "shards").read(0)
    assert torch.equal(images.pixels, stored["images"])
    if "labels" in needs:  # of the teacher, which was asked about what is stored
        assert torch.equal(images.labels, stored["logits"].argmax(1))
    assert source.labelled == ("labels" in needs)
    assert source.answers == ({"logits": 10} if "logits" in needs else {})
    assert images.targets is None
    assert torch.equal(images.logits, stored["logits"]) if "logits" in needs else images.logits is None
    if lacking := " and ".join(need for need in needs if need == "targets"):
        with pytest.raises(ConfigError, match=f"response needs {lacking}, which this transfer set has not"):
            run_distill(settings, Terminal(silent=True))


# -- what every regime promises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", REGIMES.values(), ids=REGIMES)
def test_documentation_and_traits(entry):
    assert entry.doc.partition("\n")[0].endswith(".")
    assert entry.paper or "baseline" in entry.doc or re.search(r"20\d\d, pages \d+", entry.doc)
    assert re.search(r"^ {4}.*=", entry.doc, re.MULTILINE), "an equation"
    cls = entry.load()
    assert issubclass(cls, Regime)
    assert (cls.kind, tuple(cls.needs)) == (entry.kind, entry.needs)
    assert isinstance(cls.measure, str)
    assert hints(importlib.import_module(cls.__module__).Config) == hints(entry.config)
    for name, said in options(entry.config).items():
        assert said.get("help"), name


@functools.cache
def regimes_of_recipes() -> set[str]:
    recipes = [
        (key.partition("/")[0], (str(path), catalog.read_recipe(path))) for key, path in catalog.recipes().items()
    ]
    trained = [resolve(command, [layer]) for command, layer in recipes if command in ("distill", "train-teacher")]
    return {settings.method.entry.name for settings in trained}


@pytest.mark.parametrize("name", REGIMES)
def test_every_regime_has_a_recipe(name):
    assert name in regimes_of_recipes()


@pytest.mark.parametrize("name", REGIMES)
def test_a_regime_that_is_stopped_goes_on_as_if_it_had_not_been(name, tmp_path, monkeypatch, make_teacher):
    """All that it has learned is in its state, chance is its step's alone, and its teacher stays as it is."""
    monkeypatch.setattr(base, "STEPS_PER_ROUND", 3)
    values = {"method": name, "teacher": [str(make_teacher("lenet5"))], "transfer_set": ["noise:24"]}
    values |= {"steps": 9, "batch_size": 4, "holdout": 0.2, "device": "cpu"}
    values |= {key: said["rehearsal"] for key, said in options(REGIMES[name].config).items() if "rehearsal" in said}
    if "answers" in REGIMES[name].needs:
        values["answers"] = "label"
    settings = resolve("distill", [("", values)])

    def run(directory, *callbacks):
        with opened(settings) as job:
            learner = settings.method.entry.load()(job.task(settings), settings.method.config)
            before = copy.deepcopy(job.teacher.classifier.state_dict())
            work(learner, directory, *callbacks)
            after = job.teacher.classifier.state_dict()
            assert all(torch.equal(value, after[key]) for key, value in before.items())
        return learner

    check_interruption(run, tmp_path)


@pytest.mark.parametrize("name", [name for name, entry in REGIMES.items() if "teacher" in entry.needs])
def test_a_regime_that_needs_a_teacher_cannot_make_one(name, cli, tmp_path):
    code, _, err = cli("train-teacher", "--method", name, "--steps", 1, "--out", tmp_path / "teacher")
    assert code == 2, err


@pytest.mark.parametrize("name", [name for name, entry in REGIMES.items() if "labels" in entry.needs])
def test_a_regime_that_needs_labels_takes_the_teachers_classes(name, cli, tmp_path, teacher):
    args = ["--teacher", teacher, "--transfer-set", "noise:8", "--steps", 1, "--out", tmp_path / "student"]
    code, _, err = cli("distill", "--method", name, *args)
    assert code == 0, err
    assert f"{name}: the images have no labels, the teacher's classes are taken" in " ".join(err.split())
