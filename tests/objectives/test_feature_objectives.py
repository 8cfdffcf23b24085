"""Objectives between features against their papers' formulas."""

from __future__ import annotations

import copy

import numpy as np
import objective_oracles as losses
import pytest
import torch
from tiny_objectives import CLASSES, OBJECTIVES, connected, images, network, offline, variants
from torch import nn

from dfkd_cli.config import build
from dfkd_cli.errors import ConfigError
from dfkd_cli.objectives.base import Objective, Outputs, PairwiseObjective
from dfkd_cli.objectives.crd import draw
from dfkd_cli.objectives.fitnets import regressor
from dfkd_cli.objectives.ofd import margin, partial_distance
from dfkd_cli.objectives.reviewkd import hierarchical

RNG = np.random.default_rng(0)
# Of one pair of features: batch 1, fewer and more channels, larger and smaller maps, none but single pixels square.
MAPS = [((1, 3, 4, 5), (1, 5, 4, 5)), ((4, 3, 8, 6), (4, 5, 4, 3)), ((3, 6, 2, 3), (3, 2, 6, 5)), ((5, 2, 1, 1),) * 2]
VECTORS = [((2, 3), (2, 7)), ((6, 9), (6, 4))]


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


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (30.0, 1.0), (1.0, 0.01)])
def test_information_flow_has_the_formulas_gradient_in_float32(variant, offset, spread):
    """Of features whose differences are small beside them too: an image is at no distance from itself."""
    student, teacher = (offset + spread * RNG.normal(size=(12, size)) for size in (40, 30))
    student = student.astype(np.float32)
    own = torch.tensor(student, requires_grad=True)
    objective = OBJECTIVES["information-flow"].load()(
        build(OBJECTIVES["information-flow"].config, {"variant": variant})
    )
    objective.pairs = (("0", "0"),)
    objective.compare(0, own, torch.tensor(teacher, dtype=torch.float32))["flow"].backward()
    for direction in own.grad.double().numpy(), RNG.normal(size=student.shape):
        step = 1e-4 * spread * direction / np.sqrt((direction**2).sum())
        ends = (losses.information_flow(student.astype(float) + end * step, teacher, variant) for end in (1, -1))
        expected = (next(ends) - next(ends)) / 2
        assert (own.grad.double().numpy() * step).sum() == pytest.approx(expected, rel=2e-3, abs=1e-12)


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


@pytest.mark.parametrize("ratio", [-20.0, -3.0, 0.0, 2.9, 3.05, 3.09])
def test_margins_are_as_good_as_float32_holds_them(ratio):
    norm = nn.BatchNorm2d(1)
    nn.init.constant_(norm.weight, 0.7)
    nn.init.constant_(norm.bias, 0.7 * ratio)
    expected = losses.margin(norm.bias.item(), norm.weight.item())
    assert margin(norm).dtype == torch.float32
    assert margin(norm).item() == pytest.approx(expected, rel=2e-7)


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
        outputs = learner.ask_teacher(images)
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
