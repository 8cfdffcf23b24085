"""Objectives between features against their papers' formulas, and what objectives promise between two networks."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Literal

import numpy as np
import objective_oracles as losses
import oracles
import pytest
import torch
from pipeline import finish, kill_after_saving
from safetensors import safe_open
from test_regimes import STILL, Given, train
from torch import Tensor, nn

from dfkd_cli import catalog
from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.config import build, hints
from dfkd_cli.data.sources import Batches, Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.layers import chain, global_pool
from dfkd_cli.models.taps import Taps, find_taps
from dfkd_cli.objectives.base import Objective, Outputs, PairwiseObjective, ask
from dfkd_cli.objectives.crd import draw
from dfkd_cli.objectives.fitnets import regressor
from dfkd_cli.objectives.ofd import margin, partial_distance
from dfkd_cli.objectives.reviewkd import hierarchical
from dfkd_cli.regimes.base import Task
from dfkd_cli.regimes.offline import Config, Offline
from dfkd_cli.resolve import Component, recipe_layer, resolve
from dfkd_cli.stages.calibrate import BATCHES, calibrate, check
from dfkd_cli.stages.distill import Inputs as Distill
from dfkd_cli.stages.distill import connect
from dfkd_cli.stages.grid import plan

OBJECTIVES = catalog.entries("objectives")
ALL = pytest.mark.parametrize("name", OBJECTIVES)


def variants(name: str) -> list[dict]:
    """Settings of an objective: none, and each other choice that its options leave."""
    found: list[dict] = [{}]
    for key, hint in hints(OBJECTIVES[name].config).items():
        default = getattr(OBJECTIVES[name].config(), key)
        choices = (True, False) if hint is bool else typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        found += [{key: choice} for choice in choices if choice != default]
    return [*found, {"hard": 1.0, "label_smoothing": 0.2}] if hasattr(OBJECTIVES[name].config, "hard") else found


EVERY = pytest.mark.parametrize(
    ("name", "values"), [(name, values) for name in OBJECTIVES for values in variants(name)]
)
RNG = np.random.default_rng(0)
SIZE, CLASSES = (2, 8, 8), 5
# Of one pair of features: batch 1, fewer and more channels, larger and smaller maps, none but single pixels square.
MAPS = [((1, 3, 4, 5), (1, 5, 4, 5)), ((4, 3, 8, 6), (4, 5, 4, 3)), ((3, 6, 2, 3), (3, 2, 6, 5)), ((5, 2, 1, 1),) * 2]
VECTORS = [((2, 3), (2, 7)), ((6, 9), (6, 4))]


def network(seed: int, first: int, second: int) -> Classifier:
    """Two stages of these widths."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = chain(
            stage1=nn.Sequential(nn.Conv2d(SIZE[0], first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(inplace=True)),
            stage2=nn.Sequential(nn.Conv2d(first, second, 3, 2, 1), nn.BatchNorm2d(second), nn.ReLU(inplace=True)),
            pool=global_pool(),
            head=nn.Linear(second, CLASSES),
        )
        for layer in (net.stage1[1], net.stage2[1]):  # nothing about a trained teacher is standard
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.3, 0.3)
        net.head.bias.data[0] += 1  # what two networks agree on
    return Classifier(net, ModelInfo("test", CLASSES, SIZE, (0.4,) * 2, (0.3,) * 2))


def connected(
    name: str, student: Classifier, teacher: Classifier, seed: int = 0, count: int = 8, **values
) -> Objective:
    entry = OBJECTIVES[name]
    objective = connect([Component(entry, build(entry.config, values))], student, teacher, seed)[name][1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        objective.expect(count)
    return objective


def images(count: int, labels: Tensor | None = None) -> Images:
    """The first images of a source."""
    generator = torch.Generator().manual_seed(3)
    return Images(torch.rand(count, *SIZE, generator=generator), labels, torch.arange(count))


def offline(
    names: Mapping[str, float | None],
    student: Classifier,
    teacher: Classifier,
    count: int = 6,
    values: Mapping[str, dict] = MappingProxyType({}),
    **training,
):
    """A regime with these objectives and their settings, and labelled images for it."""
    given = images(count, torch.arange(count) // 2 % CLASSES)
    chosen = [
        Component(entry, build(entry.config, values.get(name, {})), entry.weight if weight is None else weight)
        for name, weight in names.items()
        for entry in [OBJECTIVES[name]]
    ]
    settings = build(Distill, STILL | {"holdout": 0, "batch_size": count, "warmup": 0} | training)
    objectives = connect(chosen, student, teacher, 0)
    task = Task(student, teacher, Given(given.pixels, given.labels), objectives, settings, 0)
    return Offline(task, Config()), given


def features(shapes, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Of the student and of the teacher, partly zero as after a ReLU."""
    student, teacher = (np.maximum(RNG.normal(0.3, scale, size=shape), 0) + 0.01 for shape in shapes)
    return student, teacher


def prepared(name: str, *shapes, **values) -> Objective:
    """One for pairs of features of these shapes, the student's and the teacher's, at places ``0``, ``1``, ..."""
    objective = OBJECTIVES[name].load()(build(OBJECTIVES[name].config, values))
    objective.pairs = tuple((str(place),) * 2 for place in range(len(shapes)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for pair in shapes:
            objective.prepare(*pair)
        objective.expect(9)
    return objective.double()


def at_places(values: list[np.ndarray]) -> Outputs:
    """Features at places ``0``, ``1``, ..."""
    logits = torch.tensor(RNG.normal(size=(len(values[0]), CLASSES)))
    return Outputs(logits, {str(place): torch.tensor(value) for place, value in enumerate(values)})


def terms_of(name: str, student: np.ndarray, teacher: np.ndarray, **values) -> dict[str, float]:
    """The terms of one pair of features."""
    objective: PairwiseObjective = prepared(name, (student.shape[1:], teacher.shape[1:]), **values)
    terms = objective.compare(0, torch.tensor(student), torch.tensor(teacher))
    return {term: value.item() for term, value in terms.items()}


def flow_of(student: list[np.ndarray], teacher: list[np.ndarray], variant: str) -> float:
    """FSP's term."""
    objective = prepared(
        "fsp", *((s.shape[1:], t.shape[1:]) for s, t in zip(student, teacher, strict=True)), variant=variant
    )
    return objective(at_places(student), at_places(teacher), images(len(student[0])))["flow"].item()


# -- the papers' formulas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", MAPS)
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_attention_transfer(shapes, variant):
    student, teacher = features(shapes)
    expected = losses.at(student, teacher, variant)
    assert terms_of("at", student, teacher, variant=variant) == {"attention": pytest.approx(expected, rel=1e-9)}


@pytest.mark.parametrize("shapes", MAPS + VECTORS)
def test_similarity_preserving(shapes):
    student, teacher = features(shapes)
    assert terms_of("sp", student, teacher) == {"similarity": pytest.approx(losses.sp(student, teacher), rel=1e-9)}


@pytest.mark.parametrize("shapes", MAPS[1:] + VECTORS)
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_rkd(shapes, scale):
    student, teacher = features(shapes, scale)
    assert terms_of("rkd", student, teacher) == pytest.approx(losses.rkd(student, teacher), rel=1e-6, abs=1e-12)


def test_equal_images_of_the_student_pull_no_harder_than_the_smallest_length_allows():
    student, teacher = (torch.tensor(values, dtype=torch.float32) for values in features(VECTORS[1]))
    student[1] = student[0]
    terms = OBJECTIVES["rkd"].load()(OBJECTIVES["rkd"].config()).compare(0, student.requires_grad_(), teacher)
    sum(terms.values()).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e7


def test_rkd_without_angles_has_none():
    student, teacher = features(VECTORS[1])
    assert terms_of("rkd", student, teacher, angle=0).keys() == {"distance"}


@pytest.mark.parametrize("shapes", MAPS + VECTORS)
def test_pkt(shapes):
    student, teacher = features(shapes)
    found = terms_of("pkt", student, teacher)["neighbours"]
    assert found == pytest.approx(losses.pkt(student, teacher), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize(
    ("count", "channels", "sizes", "target_sizes"),
    [(1, (4, 4, 6), [(8, 8), (8, 8), (4, 4)], [(8, 8), (8, 8), (4, 4)]),
     (3, (5, 2), [(6, 9), (4, 4)], [(8, 6), (8, 3)]), (2, (1, 3), [(2, 3), (5, 2)], [(7, 5), (1, 1)])],
)  # fmt: skip
def test_fsp(variant, count, channels, sizes, target_sizes):
    student, teacher = (
        [RNG.normal(size=(count, width, *size)) for width, size in zip(channels, shapes, strict=True)]
        for shapes in (sizes, target_sizes)
    )
    expected = losses.fsp(student, teacher, variant)
    assert flow_of(student, teacher, variant) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_flow_does_not_say_where_or_at_which_of_two_places_maps_are_strong(variant):
    student, teacher = ([RNG.normal(size=(3, width, 4, 6)) for width in (2, 5)] for _ in range(2))
    found = flow_of(student, teacher, variant)
    turned = [values[:, :, ::-1, ::-1].copy() for values in student]
    for same in (turned, [3 * student[0], student[1] / 3]):
        assert flow_of(same, teacher, variant) == pytest.approx(found, rel=1e-9)
    assert flow_of([turned[0], student[1]], teacher, variant) != pytest.approx(found, rel=1e-3)


def test_fsp_is_learned_alone_and_then_not_at_all():
    learner, images = offline({"fsp": 7.0, "response": 0.5}, network(1, 3, 4), network(2, 3, 4))
    found = []
    for epoch in (0, 29, 30, 31):
        for objective in learner.losses.values():
            objective.epoch = epoch
        loss, terms = learner.loss(images)
        found.append(loss.item())
    assert found == pytest.approx([7 * terms["fsp.flow"].item()] * 2 + [0.5 * terms["response.soft"].item()] * 2)


def test_fsp_refuses_what_has_no_flow_or_other_channels():
    with pytest.raises(ConfigError, match="same channels in both networks, not 3 and 4"):
        connected("fsp", network(1, 3, 4), network(2, 4, 4))
    with pytest.raises(ConfigError, match="there is one only"):
        connected("fsp", network(1, 3, 4), network(2, 3, 4), taps="last")


@pytest.mark.parametrize("shapes", MAPS[1:] + VECTORS)
@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("scale", [0.001, 1.0])
def test_information_flow(shapes, variant, scale):
    student, teacher = (scale * values for values in features(shapes))
    expected = losses.information_flow(student, teacher, variant)
    for one, other in ((student, teacher), (teacher, student)):  # the divergence is symmetric
        found = terms_of("information-flow", one, other, variant=variant)["flow"]
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-18)


@pytest.mark.parametrize(
    ("name", "values"), [(name, v) for name in ("sp", "rkd", "pkt", "information-flow") for v in variants(name)]
)
def test_one_image_has_no_relations_to_others(name, values):
    student = torch.rand(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    terms = prepared(name, ((3, 2, 4), (6,)), **values).compare(0, student, torch.rand(1, 6, dtype=torch.float64))
    sum(terms.values()).backward()
    assert all(term.item() == pytest.approx(0, abs=1e-15) for term in terms.values())
    assert student.grad.abs().max() < 1e-15


def test_critical_periods_fade_where_features_are_formed():
    objective = connected("information-flow", network(1, 3, 4), network(2, 4, 6))
    assert [own for own, _ in objective.pairs] == ["stage1", "stage2", "penultimate"]
    values = [torch.tensor(value) for value in features(VECTORS[1])]
    last = objective.compare(2, *values)["flow"].item()
    for objective.epoch in (0, 1, 13):
        for index, expected in ((0, 100 * 0.7**objective.epoch), (1, 100 * 0.7**objective.epoch), (2, 1)):
            assert objective.compare(index, *values)["flow"].item() == pytest.approx(expected * last, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "student", "teacher", "convolved", "stride", "padding"),
    [(1, (3, 6, 4), (5, 6, 4), losses.convolved, 1, 0), (4, (3, 8, 6), (5, 4, 3), losses.convolved, 2, 1),
     (1, (2, 7, 5), (4, 3, 4), losses.convolved, 1, 0), (4, (2, 4, 4), (3, 7, 9), losses.convolved, 1, 0),
     (1, (3, 4, 2), (2, 8, 4), losses.transposed, 2, 1), (4, (2, 3, 3), (5, 6, 6), losses.transposed, 2, 1),
     (4, (7,), (5,), losses.convolved, 1, 0)],
)  # fmt: skip
@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("relu", [True, False])
def test_fitnets(count, student, teacher, convolved, stride, padding, variant, relu):
    maps, target = features([(count, *student), (count, *teacher)])
    objective = prepared("fitnets", (student, teacher), variant=variant, relu=relu)
    found = objective.compare(0, torch.tensor(maps), torch.tensor(target))["hint"].item()
    maps, target = (values.reshape(*values.shape[:2], *(values.shape[2:] or (1, 1))) for values in (maps, target))
    layer = objective.regressors[0][0]
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    guess = losses.batch_normalised(convolved(maps, weight, bias, stride, padding))
    expected = losses.hint(*losses.smaller(np.maximum(guess, 0) if relu else guess, target), variant)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("student", "teacher", "maps"),
    [((3, 4, 4), (5, 8, 8), (5, 8, 8)), ((3, 9, 8), (5, 4, 4), (5, 4, 4)), ((7,), (5,), (5, 1, 1)),
     ((3, 4, 4), (6,), (6, 1, 1))],
)  # fmt: skip
def test_regressors_give_the_teachers_shape(student, teacher, maps):
    x = torch.randn(2, *student, *(1,) * (3 - len(student)))
    assert regressor(student, teacher, relu=True)(x).shape == (2, *maps)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(3, [((8, 8), (8, 8)), ((4, 4), (4, 4))]), (1, [((8, 8), (8, 8)), ((4, 4), (4, 4))]),
     (3, [((8, 8), (4, 4)), ((3, 2), (6, 4))]), (1, [((8, 6), (4, 7)), ((2, 5), (4, 3))])],
)  # fmt: skip
@pytest.mark.parametrize(("seed", "widths", "target_widths"), [(1, (3, 4), (5, 6)), (2, (6, 5), (4, 3))])
def test_ofd(seed, widths, target_widths, count, sizes):
    student, teacher = network(seed, *widths), network(seed + 2, *target_widths)
    norms = [teacher.net.stage1[1], teacher.net.stage2[1]]
    for norm in norms:  # some channels are hardly ever negative, some most of the time
        nn.init.uniform_(norm.bias, -1, 4, generator=torch.Generator().manual_seed(seed))
    objective = connected("ofd", student, teacher.double()).double()
    expected, students, teachers = 0.0, {}, {}
    for index, (small, large) in enumerate(sizes):
        name, layer = f"stage{index + 1}.pre", objective.connectors[index][0]
        maps = RNG.normal(size=(count, layer.in_channels, *small))
        target = RNG.normal(size=(count, layer.out_channels, *large))
        weight = layer.weight.detach().numpy()
        guess = losses.batch_normalised(losses.convolved(maps, weight, np.zeros(len(weight)), 1, 0))
        gaussians = zip(norms[index].bias.tolist(), norms[index].weight.abs().tolist(), strict=True)
        margins = np.array([losses.margin(*gaussian) for gaussian in gaussians])
        expected += losses.ofd(*losses.smaller(guess, target), margins) / 2 ** (1 - index)
        students[name], teachers[name] = torch.tensor(maps), torch.tensor(target)
    logits = torch.zeros(count, CLASSES)
    found = objective(Outputs(logits, students), Outputs(logits, teachers), images(count))["distance"].item()
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "sizes", "target_sizes"),
    [(4, [(8, 8), (4, 4), (1, 1)], [(8, 8), (4, 4), (1, 1)]), (4, [(8, 8), (4, 4), (1, 1)], [(4, 4), (8, 2), (1, 1)]),
     (2, [(4, 6), (2, 3), (1, 1)], [(8, 6), (5, 9), (1, 1)]), (1, [(8, 8), (4, 4)], [(8, 8), (4, 4)]),
     (1, [(6, 4), (3, 2)], [(3, 8), (9, 4)])],
)  # fmt: skip
@pytest.mark.parametrize(("widths", "target_widths"), [((3, 4), (5, 6)), ((7, 2), (3, 5))])
def test_reviewkd(count, sizes, target_sizes, widths, target_widths):
    chosen = {"taps": ["stages"], "teacher_taps": ["stages.pre"]} if len(sizes) == 2 else {}
    objective = connected("reviewkd", network(1, *widths), network(2, *target_widths), **chosen).double()
    maps, targets = (
        [RNG.normal(size=(count, width, *shape)) for width, shape in zip(widths, shapes, strict=False)]
        for widths, shapes in (((*widths, widths[1]), sizes), ((*target_widths, target_widths[1]), target_sizes))
    )
    weights = [{key: value.numpy() for key, value in f.state_dict().items()} for f in objective.fusions]
    expected = losses.reviewkd(maps, targets, weights)
    (names, teacher_names), logits = zip(*objective.pairs, strict=True), torch.zeros(count, CLASSES)

    def outputs(keys, values):
        values = [torch.tensor(value).squeeze((2, 3)) for value in values]
        return Outputs(logits, dict(zip(keys, values, strict=True)))

    found = objective(outputs(names, maps), outputs(teacher_names, targets), images(count))["levels"].item()
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("width", "expected"), [(3, 3), (600, 512)])
def test_levels_hand_up_as_many_channels_as_the_deepest_has_but_512_at_most(width, expected):
    objective = connected("reviewkd", network(1, 2, width), network(2, 2, 2))
    assert {fusion.narrow[0].out_channels for fusion in objective.fusions} == {expected}


@pytest.mark.parametrize("variant", ["exact", "relax"])
@pytest.mark.parametrize("shapes", [((4,), (6,)), ((2, 3, 5), (3, 2, 1))])
def test_crd(variant, shapes):
    """Three steps: what one writes into the memories is what the next compares with."""
    options = {"variant": variant, "negatives": 5, "dimensions": 7, "temperature": 0.2, "memory_momentum": 0.3}
    objective = prepared("crd", shapes, **options)
    memories, classes, scale = objective.memory.numpy().copy(), np.full(9, -1), None
    assert np.abs(memories).max() <= np.sqrt(3 / 7) < 1.1 * np.abs(memories).max()
    every = images(9, torch.arange(9) % 3)
    for given in (images(4, torch.tensor([0, 1, 0, 2])), every[torch.tensor([2, 8, 3])], every[torch.tensor([3])]):
        count = len(given.positions)
        values = [value.reshape(count, -1) for value in features([(count, *shape) for shape in shapes])]
        outputs = (at_places([value.reshape(count, *shape)]) for value, shape in zip(values, shapes, strict=True))
        layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in objective.embeddings]
        embedded = [losses.normalised(v @ w.T + b) for v, (w, b) in zip(values, layers, strict=True)]
        torch.manual_seed(4)
        drawn = draw(given.positions, given.labels, objective.classes, 5, variant == "relax").numpy()
        if scale is None:
            scale = losses.crd_scales(embedded, memories, drawn, 0.2)
        torch.manual_seed(4)
        found = objective(*outputs, given)["contrast"].item()
        assert found == pytest.approx(losses.crd(embedded, memories, drawn, 0.2, scale), rel=1e-6)
        objective.after_step()
        for side, index in np.ndindex(2, count):
            row = given.positions[index].item()
            mixed = 0.3 * memories[side, row] + 0.7 * embedded[side][index]
            memories[side, row] = mixed / np.sqrt(mixed @ mixed)
            classes[row] = given.labels[index]
        np.testing.assert_allclose(objective.memory, memories, atol=1e-12)
        np.testing.assert_array_equal(objective.classes, classes)
        np.testing.assert_allclose(objective.scale, scale, rtol=1e-6)


def test_crd_draws_negatives_of_other_classes():
    classes = torch.tensor([0, 0, 1, 2, -1, 0])
    drawn = draw(torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0]), classes, 500, relax=False)
    assert drawn[:, 0].tolist() == [0, 2, 4]
    assert [set(row[1:].tolist()) for row in drawn] == [{2, 3, 4}, {0, 1, 3, 4, 5}, {2, 3}]
    relaxed = torch.stack([draw(torch.tensor([0]), torch.tensor([0]), classes, 1, relax=True)[0] for _ in range(100)])
    assert set(relaxed[:, 0].tolist()) == {0, 1, 5}
    same = draw(torch.tensor([1]), torch.tensor([3]), torch.full((3,), 3), 100, relax=False)
    assert set(same[0, 1:].tolist()) == {0, 1, 2}


def test_crd_draws_no_negative_twice_where_there_are_enough():
    classes = torch.tensor([0, 0, 1, 2, -1, 0, 2])
    for relax in (False, True):
        drawn = draw(torch.tensor([0, 2, 6]), torch.tensor([0, 1, 2]), classes, 5, relax)[:, 1:]
        assert set(drawn[0].tolist()) <= {2, 3, 4, 6}  # four, of which one comes again
        assert sorted(drawn[2].tolist()) == [0, 1, 2, 4, 5]
        assert len(set(drawn[1].tolist())) == 5
        assert 2 not in drawn[1]
    counts = torch.bincount(
        torch.cat([draw(torch.tensor([2]), torch.tensor([1]), classes, 3, relax=False)[0, 1:] for _ in range(2000)])
    )
    np.testing.assert_allclose(counts / 2000, [0.5, 0.5, 0, 0.5, 0.5, 0.5, 0.5], atol=0.05)


def test_crd_without_labels_takes_the_teachers_classes():
    objective = prepared("crd", ((3,), (7,)))
    student, teacher = (at_places([values]) for values in features([(3, 3), (3, 7)]))
    objective(student, teacher, images(3))
    objective.after_step()
    assert objective.classes.tolist() == [*teacher.logits.argmax(1).tolist(), -1, -1, -1, -1, -1, -1]


def test_memories_are_made_for_the_images_that_train():
    made = [offline({"crd": None}, network(1, 3, 4), network(2, 4, 6), count=20, holdout=0.25)[0] for _ in range(2)]
    memory = made[0].losses["crd"].memory
    assert memory.shape == (2, 15, 128)
    assert torch.equal(memory, made[1].losses["crd"].memory)
    assert not torch.equal(memory[0], memory[1])


def test_crd_refuses_images_that_are_not_of_the_transfer_set(cli, teacher, tmp_path):
    args = ["--method", "pseudo-examples", "--objective", "crd", "--steps", 1, "--out", tmp_path / "s"]
    code, _, err = cli(*distill(teacher, *args))
    assert code == 2
    assert "crd remembers images of the transfer set" in err


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_hierarchical_distance_weighs_each_level(side):
    student, teacher = RNG.normal(size=(2, 3, 5, side, side))
    expected = losses.hierarchical(student, teacher)
    assert hierarchical(torch.tensor(student), torch.tensor(teacher)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("mean", "deviation", "expected"), [(0, 1, -0.798), (-0.1, 0.2, -0.202), (0.1, 0.2, -0.128), (0.7, 0.2, -0.6)]
)
def test_margins_of_known_gaussians(mean, deviation, expected):
    norm = nn.BatchNorm2d(1)
    nn.init.constant_(norm.bias, mean)
    nn.init.constant_(norm.weight, -deviation)
    assert margin(norm).item() == pytest.approx(expected, abs=6e-4)
    assert losses.margin(mean, deviation) == pytest.approx(expected, abs=6e-4)


def test_what_the_activation_cuts_off_costs_nothing():
    student = torch.tensor([[[[-2.0, -0.5, -2.0, 1.0]]]], requires_grad=True)
    loss = partial_distance(student, torch.tensor([[[[-1.0, -1.0, 1.0, -1.0]]]]))
    loss.backward()
    assert loss.item() == 0.25 + 9 + 4
    assert student.grad.flatten().tolist() == [0, 1, -6, 4]


def test_how_far_the_teacher_is_below_its_margins_does_not_matter():
    objective = connected("ofd", network(1, 3, 4), network(2, 4, 6))
    maps, target = torch.randn(3, 3, 5, 4), torch.randn(3, 4, 5, 4)
    below = target < objective.margin0
    assert below.any() and not below.all()
    targets = (target, target - 5 * below, target - 5 * ~below)
    found, deeper, other = (objective.compare(0, maps, values)["distance"].item() for values in targets)
    assert deeper == pytest.approx(found, rel=1e-6)
    assert other != pytest.approx(found, rel=1e-3)


def test_the_teachers_statistics_are_the_batchs_where_an_objective_wants_them():
    learner, images = offline({"ofd": None, "response": None}, network(1, 3, 4), network(2, 4, 6))
    with torch.no_grad():
        outputs = learner.ask_teacher(images.pixels)
        expected = copy.deepcopy(learner.teacher.net).train()(learner.teacher.normalise(images.pixels))
    torch.testing.assert_close(outputs["train"].logits, expected)
    torch.testing.assert_close(outputs["eval"].logits, learner.teacher(images.pixels))
    assert not torch.allclose(outputs["train"].logits, outputs["eval"].logits, atol=1e-2)


@pytest.mark.parametrize("name", ["at", "sp", "rkd", "pkt"])
def test_features_of_another_scale_are_the_same(name):
    student, teacher = features(MAPS[1])
    found = terms_of(name, student, teacher)
    assert min(found.values()) > 1e-6
    assert found == pytest.approx(terms_of(name, 3 * student, 0.2 * teacher), rel=1e-5)
    own = np.array([0.3, 2, 1, 5])[:, None, None, None]  # a scale of each image
    assert (found == pytest.approx(terms_of(name, own * student, teacher), rel=1e-5)) == (name in {"at", "pkt"})
    assert terms_of(name, student, 5 * student) == pytest.approx(dict.fromkeys(found, 0), abs=1e-7)


@pytest.mark.parametrize("name", ["sp", "rkd", "pkt", "information-flow"])
def test_relations_do_not_change_when_features_are_turned(name):
    student, teacher = features(VECTORS[1])
    turn = np.linalg.qr(RNG.normal(size=(9, 9)))[0]
    found = terms_of(name, student, teacher)
    assert found == pytest.approx(terms_of(name, student @ turn, teacher), rel=1e-6)
    moved = terms_of(name, student + 1, teacher)
    assert (found == pytest.approx(moved, rel=1e-6)) == (name == "rkd")


def test_attention_sees_positions_and_no_channels():
    student, teacher = features(MAPS[1])
    found = terms_of("at", student, teacher)
    assert found == pytest.approx(terms_of("at", -student[:, ::-1], teacher), rel=1e-9)
    assert found != pytest.approx(terms_of("at", student[..., ::-1].copy(), teacher), rel=1e-3)


# -- what every objective promises -------------------------------------------------------------------------------------


def networks(name: str) -> tuple[Classifier, Classifier]:
    """A student and a wider teacher, or one of the same width where the objective takes no other."""
    student, teacher = network(1, 2, 3), network(2, 3, 4)
    try:
        connected(name, student, teacher)
    except ConfigError:
        teacher = network(2, 2, 3)
    return student, teacher


def gradients(learner: Offline) -> Tensor:
    return torch.cat([p.grad.flatten() for p in learner.student.parameters() if p.grad is not None])


@EVERY
def test_the_student_learns_and_the_teacher_does_not(name, values):
    learner, images = offline({name: None}, *networks(name), values={name: values})
    learner.teacher.requires_grad_()  # that it is frozen is not what keeps gradients away
    teacher = copy.deepcopy(learner.teacher.state_dict())
    loss, terms = learner.loss(images)
    loss.backward()
    assert loss.item() > 0
    assert all(term.ndim == 0 and term.dtype == torch.float32 for term in terms.values())
    assert gradients(learner).isfinite().all() and gradients(learner).any()
    assert all(p.grad is None for p in learner.teacher.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.objectives.parameters())
    assert all(torch.equal(value, teacher[key]) for key, value in learner.teacher.state_dict().items())


@ALL
def test_every_term_has_its_weight_and_is_there(name):
    student, teacher = networks(name)
    weights = dict.fromkeys(OBJECTIVES[name].load().terms, 1.0)
    learner, images = offline({name: None}, student, teacher, values={name: weights})
    objective = learner.losses[name]
    assert set(objective.optional) <= set(objective.terms)
    found = {term.rpartition(".")[2] for term in learner.loss(images)[1]}
    assert found == set(objective.terms)  # these images have what is optional


@EVERY
def test_gradients_are_those_of_the_loss(name, values):
    """In random directions of what the student says, of the objective's own parts, and of the student itself."""
    student, teacher = (net.double() for net in networks(name))
    objective = connected(name, student, teacher.freeze(), **values).double()
    generator = torch.Generator().manual_seed(1)

    def draw(places, names):
        found = [torch.rand(3, *places.shape(name), dtype=torch.float64, generator=generator) for name in names]
        found[0][:, 0] += 2  # the class that the networks agree on
        return found

    names, teachers = ([pair[side] for pair in objective.pairs] for side in (0, 1))
    own, *inside = draw(Taps(student), ["logits", *names])
    logits, *guide = draw(Taps(teacher), ["logits", *teachers])
    outputs = (
        Outputs(own, dict(zip(names, inside, strict=True))),
        Outputs(logits, dict(zip(teachers, guide, strict=True))),
    )
    given = images(3)
    given.pixels = given.pixels.double()

    def terms(*_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # what is drawn at random is drawn again
        return tuple(objective(*outputs, given).values())

    terms()
    objective.after_step()  # what the first step settles is settled
    leaves = [*(value.requires_grad_() for value in (own, *inside)), *objective.parameters(), *student.parameters()]
    for term in terms():
        assert any(grad.any() for grad in torch.autograd.grad(term, leaves, retain_graph=True, materialize_grads=True))
    assert torch.autograd.gradcheck(terms, leaves, atol=1e-8, fast_mode=True)


@EVERY
def test_losses_under_autocast_are_those_without(name, values):
    learner, images = offline({name: None}, *networks(name), count=8, values={name: values})

    def drawn(call, *args):  # what is drawn at random is drawn again
        torch.manual_seed(0)
        return call(*args)

    exact, _ = drawn(learner.loss, images)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = drawn(learner.loss, images)
        answers = learner.ask_student(images.pixels), learner.ask_teacher(images.pixels)
        inside = drawn(learner.terms, *answers, images)
    loss.backward()
    assert all(term.dtype == torch.float32 for term in terms.values())
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0)
    assert gradients(learner).isfinite().all()
    torch.testing.assert_close(inside, drawn(learner.terms, *answers, images), rtol=1e-6, atol=0)  # of equal answers


@EVERY
@pytest.mark.parametrize("count", [1, 4])
def test_a_perfect_student_and_a_single_image_are_no_trouble(name, values, count):
    learner, images = offline({name: None}, network(1, 3, 4), network(1, 3, 4), count, {name: values})
    learner.eval()
    loss, terms = learner.loss(images)
    loss.backward()
    assert all(term.isfinite() for term in terms.values())
    assert gradients(learner).isfinite().all()


@EVERY
@pytest.mark.parametrize(("scale", "steepest"), [(0.0, 1e4), (6e4, np.inf)])
def test_dead_equal_and_huge_features_are_no_trouble(name, values, scale, steepest):
    """Huge is what 16 bits just hold, whose squares they do not."""
    student, teacher = networks(name)
    objective, places = connected(name, student, teacher, **values), (Taps(student), Taps(teacher))
    students = {name: (scale * torch.rand(4, *places[0].shape(name))).requires_grad_() for name, _ in objective.pairs}
    teachers = {name: (scale or 1) * torch.rand(4, *places[1].shape(name)) for _, name in objective.pairs}
    logits = torch.zeros(4, CLASSES, requires_grad=True)
    terms = objective(Outputs(logits, students), Outputs(torch.randn(4, CLASSES), teachers), images(4))
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert logits.grad is None or logits.grad.isfinite().all()
    assert all(value.grad.isfinite().all() and value.grad.abs().max() < steepest for value in students.values())


@ALL
def test_trained_parts_are_state(name):
    student, teacher = networks(name)
    first, same, other = (connected(name, student, teacher, seed) for seed in (0, 0, 1))
    state = first.state_dict()
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in state.items())
    trained = [key for key, _ in first.named_parameters() if state[key].ndim > 1]
    assert not any(torch.equal(state[key], other.state_dict()[key]) for key in trained)
    learner, given = offline({name: None}, student, teacher)
    outputs = learner.ask_student(given.pixels), learner.ask_teacher(given.pixels)[first.teacher_mode]

    def terms(objective: Objective) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return objective(*outputs, given)

    terms(first)
    first.after_step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    fresh = terms(other.eval())
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(terms(other), terms(first.eval()), rtol=0, atol=0)
    assert not state or terms(other) != fresh


@ALL
def test_some_recipe_uses_it(name):
    uses = [path for path in catalog.recipes().values() if name in (catalog.read_recipe(path).get("objective") or {})]
    assert uses
    for path in uses:
        assert catalog.read_recipe(path)["about"]["summary"]


@pytest.mark.parametrize("recipe", ["objectives-fashion-mnist", "objectives-synthetic-fashion-mnist"])
def test_the_tables_of_objectives_have_all_of_them_in_the_weights_of_their_papers(recipe):
    grid = plan(resolve("compare", [recipe_layer(recipe, "compare")]), Path("out"))
    students = [step.settings for step in grid.steps if step.settings.command == "distill" and step.seed == 0]
    chosen = [chosen for settings in students for chosen in settings.components["objective"]]
    assert {c.entry.name for c in chosen} == OBJECTIVES.keys()
    assert all(c.weight == c.entry.weight for c in chosen if c.entry.name != "reviewkd")  # it differs between pairs
    assert {len(settings.components["objective"]) for settings in students} == {0, 1, 2}


# -- between networks --------------------------------------------------------------------------------------------------


def test_objectives_add_up_and_share_taps():
    names = {"response": 0.5, "at": 10.0, "fitnets": 2.0}
    learner, images = offline(names, network(1, 3, 4), network(2, 4, 6))
    loss, terms = learner.loss(images)
    assert terms.keys() == {"response.soft", "at.attention", "fitnets.hint"}
    weights = dict(zip(terms, names.values(), strict=True))
    assert loss.item() == pytest.approx(sum(weights[n] * t.item() for n, t in terms.items()), rel=1e-5)
    assert list(learner.student_taps) == ["stage1", "stage2"]


def test_answers_hook_nothing():
    learner, _ = offline({"response": 1.0, "dkd": 1.0, "dist": 1.0}, network(1, 3, 4), network(2, 4, 6))
    assert learner.student_taps == learner.teacher_taps == {}


@pytest.mark.parametrize("hard", [0.0, 1.5])
def test_strength_multiplies_the_weight(hard):
    learner, images = offline({"dkd": None}, network(1, 3, 4), network(2, 4, 6), values={"dkd": {"hard": hard}})
    with torch.no_grad():
        student, teacher = (net(images.pixels).double().numpy() for net in (learner.student, learner.teacher))
    labels = images.labels.numpy()
    parts = losses.dkd(student, teacher, labels, 4.0)
    soft = parts["target"] + 8 * parts["non_target"]
    task = hard * oracles.cross_entropy(np.eye(CLASSES)[labels], oracles.softmax(student))
    for learner.losses["dkd"].epoch, strength in ((0, 1 / 20), (9, 1 / 2), (19, 1), (30, 1)):
        assert learner.loss(images)[0].item() == pytest.approx(strength * soft + task, rel=1e-4)


def test_epochs_are_counted_for_objectives(tmp_path):
    learner, _ = offline({"dkd": None}, network(1, 3, 4), network(2, 4, 6), batch_size=3, steps=5)
    train(learner, tmp_path / "run")
    assert learner.losses["dkd"].epoch == 2


def test_regressors_train_with_the_student(tmp_path):
    learner, _ = offline({"fitnets": None}, network(1, 3, 4), network(2, 4, 6), steps=3)
    before = copy.deepcopy(learner.objectives.state_dict())
    train(learner, tmp_path / "run")
    weights = "fitnets.regressors.0.0.weight"
    assert not torch.equal(before[weights], learner.objectives.state_dict()[weights])


def test_pairs_are_as_many_and_of_the_kind_that_is_compared():
    student, teacher = network(1, 3, 4), network(2, 4, 6)
    assert connected("at", student, teacher).pairs == (("stage1", "stage1"), ("stage2", "stage2"))
    crossed = connected("fitnets", student, teacher, taps=["stage1", "head"], teacher_taps=["last", "logits"])
    assert crossed.pairs == (("stage1", "stage2"), ("head", "logits"))
    with pytest.raises(ConfigError, match="cannot pair stage1, stage2 of the student with stage2 of the teacher"):
        connected("at", student, teacher, taps="stages", teacher_taps="last")
    with pytest.raises(ConfigError, match="at compares feature maps"):
        connected("at", student, teacher, taps="penultimate")


@pytest.mark.parametrize("name", ["at", "fitnets", "fsp", "ofd", "reviewkd"])
def test_features_of_tokens_are_refused(name):
    objective = OBJECTIVES[name].load()(OBJECTIVES[name].config())
    for shapes in (((16, 8), (16, 8)), ((8, 4, 4), (16, 8)), ((16, 8), (8,))):
        with pytest.raises(ConfigError, match=rf"{name} compares feature maps.* not features of shape \(16, 8\)"):
            objective.prepare(*shapes)


def phased(epochs: int = 3, **settings) -> tuple[Offline, Images]:
    """Flow alone for some epochs of two steps, then answers; a regressor that only counts then."""
    names, values = {"fsp": 1.0, "response": 1.0, "fitnets": 1.0}, {"fsp": {"pretraining": epochs}}
    return offline(names, network(1, 3, 4), network(2, 3, 4), values=values, batch_size=3, **settings)


@pytest.mark.parametrize(("optimizer", "decay"), [("sgd", 0.1), ("adam", 0.1), ("adamw", 0.1), ("sgd", 0.0)])
def test_what_a_phase_does_not_depend_on_is_left_alone_in_it(tmp_path, optimizer, decay):
    settings = {"optimizer": optimizer, "weight_decay": decay, "lr": 0.05}
    names = {"net.head.weight", "net.head.bias", "fitnets.regressors.0.0.weight"}

    def moved(steps: int) -> set[str]:
        learner, _ = phased(steps=steps, **settings)
        state = {**learner.student.state_dict(), **learner.objectives.state_dict()}
        before = {key: value.clone() for key, value in state.items() if "num_batches" not in key}
        train(learner, tmp_path / str(steps))
        return {key for key, value in before.items() if not torch.equal(value, state[key])}

    assert not moved(6) & names
    assert {"net.stage1.0.weight", "net.stage2.0.weight", "net.stage2.1.bias"} <= moved(6)
    assert names <= moved(7)


def test_in_a_phase_the_flow_is_descended(tmp_path):
    """One step of gradient descent with weight decay, on what the flow depends on."""
    learner, _ = phased(steps=1, optimizer="sgd", weight_decay=0.1, momentum=0, nesterov=False, lr=0.5, warmup=0)
    copied = copy.deepcopy(learner.student)
    (batch,) = Batches(learner.train_source, 3, 0, torch.device("cpu")).steps(0, 1)
    copied.train()
    objective, teacher = learner.losses["fsp"], learner.ask_teacher(batch.pixels)["eval"]
    student = ask(copied, batch.pixels, find_taps(copied, [own for own, _ in objective.pairs]))
    objective(student, teacher, batch)["flow"].backward()
    train(learner, tmp_path / "run")
    for (name, old), new in zip(copied.named_parameters(), learner.student.parameters(), strict=True):
        expected = old if old.grad is None else old - 0.5 * (old.grad + 0.1 * old)
        assert (old.grad is None) == name.startswith("net.head"), name
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["fitnets", "reviewkd"])
def test_one_image_of_one_pixel_cannot_be_normalised(cli, teacher, tmp_path, name):
    args = ["--objective", name, "--taps", "penultimate", "--teacher-taps", "penultimate", "--steps", 1]
    code, _, err = cli(*distill(teacher, *args, "--batch-size", 1, "--out", tmp_path / "s"))
    assert code == 2
    assert "BatchNorm cannot learn from one image with maps of one pixel -- raise --batch-size" in err


def test_two_classes_cannot_be_decoupled():
    two = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(128, 2)), ModelInfo("t", 2, SIZE, (0.0,) * 2, (1.0,) * 2))
    with pytest.raises(ConfigError, match="dkd needs three classes"):
        connected("dkd", two, two)


# -- calibration -------------------------------------------------------------------------------------------------------


def task(names: Mapping[str, float | None], same: bool = False, **training) -> tuple[Task, Offline, Images]:
    """Of a teacher that is wider, or of the same width."""
    learner, images = offline(names, network(1, 3, 4), network(2, *((3, 4) if same else (4, 6))), **training)
    objectives = {name: (learner.weights[name], learner.losses[name]) for name in names}
    return (
        Task(learner.student, learner.teacher, learner.source, objectives, learner.training_config, 0),
        learner,
        images,
    )


def test_pull_of_a_term_is_the_gradient_that_it_gives_the_student():
    found, learner, images = task({"response": 0.5, "at": 30.0})
    pulls = {f"{pull.objective}.{pull.term}": pull for pull in calibrate(found)}
    assert pulls.keys() == {"response.soft", "at.attention"}
    learner.student.train()
    for name, term in learner.loss(images)[1].items():
        learner.zero_grad()
        term.backward(retain_graph=True)
        assert pulls[name].value == pytest.approx(term.item(), rel=1e-3)
        assert pulls[name].gradient == pytest.approx(pulls[name].weight * gradients(learner).norm().item(), rel=1e-3)


def test_a_suggested_weight_pulls_as_hard_as_the_answers():
    answer, far = calibrate(task({"response": 1.0, "at": 1e-3})[0])
    assert answer.suggested is None
    assert f"--set objective.at.attention={far.suggested:.2g}" in str(far)
    assert far.gradient * far.suggested == pytest.approx(answer.gradient, rel=1e-5)  # the term's own weight is 1
    _, near = calibrate(task({"response": 1.0, "at": 1e-3 * far.suggested * 5})[0])
    assert near.suggested is None
    _, strong = calibrate(task({"response": 1.0, "at": 1e-3 * far.suggested * 20})[0])
    assert strong.suggested == pytest.approx(1 / 20, rel=1e-4)


def test_without_answers_there_is_nothing_to_compare_with():
    assert [pull.suggested for pull in calibrate(task({"at": 1e-9, "sp": 1e9})[0])] == [None, None]


def test_a_term_that_teaches_nothing_is_an_error():
    with pytest.raises(ConfigError, match="rkd: the value of distance is 0 on the first batches"):
        calibrate(task({"rkd": None}, count=2)[0])


def test_pulls_are_means_over_the_first_batches():
    found, learner, _ = task({"response": 0.5}, count=15, batch_size=4)
    values, norms = [], []
    learner.student.train()
    for batch in Batches(learner.train_source, 4, 0, torch.device("cpu")).steps(0, BATCHES):
        learner.zero_grad()
        student, teacher = learner.student(batch.pixels), learner.teacher(batch.pixels).detach()
        values.append(oracles.response(student.detach().double().numpy(), teacher.double().numpy(), "kl", 20))
        direction = oracles.response_gradient(student.detach().double().numpy(), teacher.double().numpy(), 20)
        student.backward(torch.tensor(direction, dtype=torch.float32))
        norms.append(gradients(learner).norm().item())
    (pull,) = calibrate(found)
    assert pull.batches == BATCHES == len(values)
    assert np.ptp(values) > 0.01 * np.mean(values)
    assert pull.value == pytest.approx(np.mean(values), rel=1e-4)
    assert pull.gradient == pytest.approx(0.5 * np.mean(norms), rel=1e-4)


def test_what_is_drawn_while_pulls_are_measured_is_the_seeds():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(calibrate(task({"response": None, "crd": None, "bss": None}, count=12)[0]))
        state = torch.get_rng_state()
        assert torch.equal(state, torch.manual_seed(seed).get_state())
    assert found[0] == found[1]


def test_pulls_are_as_strong_as_when_their_terms_begin_to_count():
    rising = {"dkd": {"hard": 1e-4, "ramp": 4}}
    plain = {"dkd": {"hard": 1e-4, "ramp": 1}}
    found, full = (
        {pull.term: pull for pull in calibrate(task({"dkd": 1.0}, values=values)[0])} for values in (rising, plain)
    )
    for term, strength in (("target", 0.25), ("non_target", 0.25), ("hard", 1.0)):
        assert found[term].strength == strength
        assert found[term].gradient == pytest.approx(strength * full[term].gradient, rel=1e-5)
        # What rises does not matter for a suggestion.
        assert (found[term].suggested or 0) == pytest.approx(full[term].suggested or 0, rel=1e-5)
        assert (f"x {strength:.4g}, gradient" in str(found[term])) == (strength < 1)
    assert found["hard"].suggested > 1e-4
    values = rising | {"fsp": {"pretraining": 2}}
    later = {pull.term: pull for pull in calibrate(task({"dkd": 1.0, "fsp": 1e-9}, same=True, values=values)[0])}
    assert (later["flow"].strength, later["target"].strength) == (1, 0.75)  # of four epochs, the third
    assert later["flow"].suggested is None  # it is alone


def test_answers_are_compared_with_whatever_objective_they_are_of():
    pulls = calibrate(task({"bss": 1.0, "at": 1e-3}, count=12)[0])
    (attention,) = (pull for pull in pulls if pull.objective == "at")
    strongest = max(pull.gradient for pull in pulls if pull.objective == "bss")
    assert attention.gradient * attention.suggested == pytest.approx(strongest, rel=1e-4)


class Now(Objective):
    """A term that is always there and two that are in the batches that ``present`` counts."""

    terms = ("always", "here", "there")
    optional = ("there",)
    kind = "test"

    def forward(self, student, teacher, images):
        self.calls = getattr(self, "calls", 0) + 1
        names = ["always", *(name for name, calls in self.config.present.items() if self.calls in calls)]
        return {name: student.logits.square().sum() for name in names}


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_term_that_is_nowhere_is_noticed(weight):
    def pulls(**present):
        config = SimpleNamespace(always=1.0, here=weight, there=weight, present=present)
        found = task({"response": 1.0})[0]
        return {
            pull.term: pull for pull in calibrate(dataclasses.replace(found, objectives={"now": (1.0, Now(config))}))
        }

    if not weight:
        assert pulls().keys() == {"always"}
        return
    with pytest.raises(ConfigError, match="now gives no here on the first batches"):
        pulls(there=[1, 2, 3])
    found = pulls(here=[2], there=[])
    assert [found[name].batches for name in ("always", "here", "there")] == [3, 1, 0]
    assert str(found["there"]) == "now.there: there was nothing for it in any of the first 3 batches"
    assert str(found["here"]).endswith("in 1 of 3 batches")
    assert found["there"].gradient == 0
    assert found["here"].value > 0


@pytest.mark.parametrize(
    ("names", "pretraining", "training", "said"),
    [({"response": 0.0, "at": 0.0}, 0, {}, "nothing is learned: no term of response, at has a weight"),
     ({"fsp": 1.0}, 2, {"epochs": 9}, "fsp is learned alone for 2 epochs, and nothing after them"),
     ({"fsp": 1.0, "response": 0.0}, 2, {"epochs": 9}, "alone for 2 epochs, and nothing after them"),
     ({"fsp": 0.0, "response": 1.0}, 2, {"epochs": 9}, "alone for 2 epochs, and has no weight"),
     ({"fsp": 1.0, "response": 1.0}, 2, {"epochs": 2}, "for 2 epochs, 8 steps of 8, which leaves none for response"),
     ({"fsp": 1.0, "response": 1.0}, 2, {"steps": 7}, "for 2 epochs, 8 steps of 7, which leaves none for response"),
     ({"fsp": 1.0, "response": 1.0}, 2, {"steps": 6, "holdout": 0.3}, "6 steps of 6"),
     ({"fsp": 1.0, "response": 1.0}, 2, {"steps": 7, "holdout": 0.3}, None),
     ({"fsp": 1.0, "response": 1.0}, 2, {"epochs": 3}, None), ({"fsp": 1.0, "response": 1.0}, 2, {"steps": 9}, None),
     ({"fsp": 1.0}, 0, {"epochs": 1}, None), ({"response": 1.0, "at": 0.0}, 0, {}, None)],
)  # fmt: skip
def test_every_time_of_a_training_has_something_to_learn(names, pretraining, training, said):
    values = {"fsp": {"pretraining": pretraining}}
    found = task(names, same=True, values=values, count=17, **{"batch_size": 4} | training)[0]
    if said is None:
        check(found)
        return
    with pytest.raises(ConfigError, match=said):
        check(found)


# -- the command line --------------------------------------------------------------------------------------------------


def distill(teacher, *args) -> list[str]:
    return [str(a) for a in ("distill", "--teacher", teacher, "--transfer-set", "noise:64", "--device", "cpu", *args)]


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


def test_two_processes_train_a_student_whose_head_learns_nothing(teacher, tmp_path):
    args = ["--objective", "at", "fitnets", "crd", "--negatives", 16, "--steps", 3, "--batch-size", 8, "--out", "s"]
    finish(distill(teacher, *args, "--devices", 2), tmp_path)
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


def test_two_processes_train_in_phases(teacher, tmp_path):
    """What does not count yet has no gradient in either, and is waited for by both."""
    args = ["--objective", "fsp", "response", "fitnets", "--pretraining", 1, "--student", "lenet5", "--epochs", 2]
    finish(distill(teacher, *args, "--batch-size", 16, "--devices", 2, "--out", "s"), tmp_path)
    with (tmp_path / "s" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["fsp.flow"]) > 0


def test_a_killed_run_continues_with_the_state_of_its_objectives(tmp_path, teacher):
    """kill -9 after a saved round, the same command again: the bytes of a run that nothing interrupted."""
    flags = [
        "--objective",
        "fitnets",
        "crd",
        "--negatives",
        16,
        "--schedule",
        "step",
        "--steps",
        500,
        "--batch-size",
        8,
    ]
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
