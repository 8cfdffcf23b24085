"""Boundary supporting samples against the paper's formulas: who is moved, where to, and what is learned there."""

from __future__ import annotations

import math

import numpy as np
import objective_oracles as losses
import oracles
import pytest
import torch
from torch import Tensor, nn

from dfkd_cli import catalog
from dfkd_cli.config import build
from dfkd_cli.data.sources import Images
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.objectives import bss
from dfkd_cli.objectives.base import Outputs
from dfkd_cli.objectives.bss import BSS, Config, across, candidates, other_class

CLASSES, SIZE, MEAN, STD = 4, (2, 3, 4), (0.375, 0.625, 0.5), (0.25, 0.5, 0.125)
ENTRY = catalog.find("objectives", "bss", "objective")


def classifier(seed: int, *hidden: nn.Module, width: int = 24, size: tuple[int, int, int] = SIZE) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(*hidden, nn.Flatten(), nn.Linear(width, CLASSES))
    return Classifier(net, ModelInfo("test", CLASSES, size, MEAN[: size[0]], STD[: size[0]])).double()


def pixels(count: int, size: tuple[int, int, int] = SIZE) -> Tensor:
    return torch.rand(count, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def channels(values: tuple[float, ...], size: tuple[int, int, int] = SIZE) -> np.ndarray:
    return np.repeat(values[: size[0]], size[1] * size[2])


def logits(network: Classifier, flat: np.ndarray) -> np.ndarray:
    """Of a linear network, for flat pixels (B, D)."""
    layer = network.head()
    x = (flat - channels(MEAN)) / channels(STD)
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def objective(student: Classifier, teacher: Classifier, **values) -> BSS:
    made = BSS(build(ENTRY.config, values))
    made.connect(student, teacher.freeze())
    return made


# -- the attack --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, (3, 5, 2), (1, 1, 7)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("step", [0.3, 2.0])
@pytest.mark.parametrize("beyond", [0.0, 0.4])
def test_images_move_as_in_the_paper(beyond, size, iterations, step):
    """Impressions may be beyond [0,1]: they get no further, and are not drawn back, which would change their class."""
    teacher, images = classifier(0, width=math.prod(size), size=size), pixels(12, size)
    images = images * (1 + 2 * beyond) - beyond
    mean, std = channels(MEAN, size), channels(STD, size)
    start = (images.flatten(1).numpy() - mean) / std
    head = teacher.head()
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    base = (start @ weight.T + bias).argmax(1)
    target = (base + 1 + np.arange(12) % 3) % CLASSES
    found = across(
        teacher, images, torch.tensor(base), torch.tensor(target), Config(iterations=iterations, attack_step=step)
    )
    low, high = -mean / std, (1 - mean) / std
    moved = [
        losses.boundary_sample(x, weight, bias, b, k, step, iterations, np.minimum(low, x), np.maximum(high, x))
        for x, b, k in zip(start, base, target, strict=True)
    ]
    np.testing.assert_allclose(found.flatten(1), np.stack(moved) * std + mean, atol=1e-10)
    assert not found.requires_grad


def test_the_teachers_answer_changes_just_across_the_boundary():
    teacher = classifier(3, nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), width=96).freeze()
    images = pixels(40)
    answers = teacher(images)
    base, target = answers.argmax(1), answers.topk(2).indices[:, 1]
    found = across(teacher, images, base, target, Config(iterations=200, attack_step=1.0))
    assert found.min() >= 0 and found.max() <= 1
    after = teacher(found)
    assert (after.argmax(1) != base).float().mean() > 0.9
    gap = after.gather(1, base[:, None]) - after.gather(1, target[:, None])
    assert gap.abs().median() < 0.02 * (answers.gather(1, base[:, None]) - answers.gather(1, target[:, None])).median()
    assert all(p.grad is None for p in teacher.parameters())


def test_where_nothing_leads_away_images_stay():
    teacher, images = classifier(0), pixels(3)
    nn.init.zeros_(teacher.head().weight)
    base = teacher(images).argmax(1)
    torch.testing.assert_close(across(teacher, images, base, (base + 1) % CLASSES, Config()), images)


# -- whom it is about --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 64])
def test_candidates_are_right_for_both_and_differ_most_elsewhere(count):
    generator = np.random.default_rng(5)
    student, teacher = generator.normal(size=(2, 30, CLASSES))
    labels = teacher.argmax(1)
    labels[:5] = (labels[:5] + 1) % CLASSES
    found = candidates(torch.tensor(student), torch.tensor(teacher), torch.tensor(labels), count)
    assert found.tolist() == losses.boundary_candidates(student, teacher, labels, count)


def test_the_other_class_is_drawn_with_the_teachers_probabilities():
    z, base = torch.tensor([[2.0, 1.0, -0.5, 0.3]], dtype=torch.float64), torch.tensor([0])
    torch.manual_seed(0)
    drawn = other_class(z.expand(20000, -1), base.expand(20000))
    p = oracles.softmax(z.numpy())[0]
    expected = np.array([0, *p[1:]]) / (1 - p[0])
    np.testing.assert_allclose(np.bincount(drawn, minlength=CLASSES) / 20000, expected, atol=0.012)
    assert other_class(torch.tensor([[1000.0, 0.0, -500.0]]), base).item() == 1  # a sure teacher


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
def test_bss_is_the_papers(labelled):
    student, teacher, images = classifier(1), classifier(2), pixels(24)
    own, target = student(images), teacher(images).detach()
    flat = images.flatten(1).numpy()
    labels = logits(teacher, flat).argmax(1)
    if labelled:
        labels[::3] = (labels[::3] + 1) % CLASSES
    made = objective(student, teacher, hard=1.0, temperature=3.0)
    torch.manual_seed(4)
    terms = made(Outputs(own), Outputs(target), Images(images, torch.tensor(labels) if labelled else None))
    z_s, z_t = logits(student, flat), logits(teacher, flat)
    chosen = losses.boundary_candidates(z_s, z_t, labels, 64)
    assert 1 < len(chosen) < 24
    torch.manual_seed(4)
    others = other_class(target[chosen], torch.tensor(labels[chosen]))
    moved = across(teacher, images[chosen], torch.tensor(labels[chosen]), others, made.config).flatten(1).numpy()

    def soft(x: np.ndarray) -> float:
        return oracles.cross_entropy(oracles.softmax(logits(teacher, x) / 3), oracles.softmax(logits(student, x) / 3))

    expected = {
        "soft": soft(flat),
        "boundary": soft(moved),
        "hard": oracles.cross_entropy(np.eye(CLASSES)[labels], oracles.softmax(z_s)),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-9)
    assert expected["boundary"] != pytest.approx(soft(flat[chosen]), rel=1e-3)
    (gradient,) = torch.autograd.grad(terms["boundary"], student.head().bias)
    residual = oracles.softmax(logits(student, moved) / 3) - oracles.softmax(logits(teacher, moved) / 3)
    np.testing.assert_allclose(gradient, residual.mean(0) / 3, atol=1e-12)


@pytest.mark.parametrize("standardise", [False, True])
def test_the_papers_boundary_is_the_mean_over_what_the_code_draws(standardise):
    student, teacher, images = classifier(1), classifier(2), pixels(24)
    flat = images.flatten(1).numpy()
    z_s, z_t = logits(student, flat), logits(teacher, flat)
    labels = z_t.argmax(1)
    made = objective(student, teacher, variant="paper", boundary_images=5, standardise=standardise)
    terms = made(Outputs(student(images)), Outputs(teacher(images).detach()), Images(images))
    head = teacher.head()
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    low, high = ((bound - channels(MEAN)) / channels(STD) for bound in (0, 1))
    chosen, total = losses.boundary_candidates(z_s, z_t, labels, 5), 0.0
    assert len(chosen) == 5
    for i in chosen:
        probabilities = oracles.softmax(z_t[i : i + 1])[0]
        for k in set(range(CLASSES)) - {labels[i]}:
            start = (flat[i] - channels(MEAN)) / channels(STD)
            x = losses.boundary_sample(start, weight, bias, labels[i], k, 0.3, 10, low, high)
            moved = (x * channels(STD) + channels(MEAN))[None]
            answers = [logits(network, moved) for network in (teacher, student)]
            p, q = (oracles.softmax((losses.standardised(z) if standardise else z) / 3) for z in answers)
            total += probabilities[k] / (1 - probabilities[labels[i]]) * oracles.cross_entropy(p, q)
    assert terms["boundary"].item() == pytest.approx(total / len(chosen), rel=1e-9)


def in_parts(student: Classifier, teacher: Classifier, at_once: int) -> tuple[Tensor, list[Tensor], list[int]]:
    """The boundary's value, its gradients, and the images of each pass, where so many numbers are moved together."""
    made, images, passes = objective(student, teacher, variant="paper", boundary_images=5), pixels(24), []
    own, target = student(images), teacher(images).detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bss, "AT_ONCE", at_once)
        hooks = [net.net.register_forward_pre_hook(lambda _, x: passes.append(len(x[0]))) for net in (student, teacher)]
        value = made(Outputs(own), Outputs(target), Images(images))["boundary"]
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(2 * value, [*student.parameters()], allow_unused=True)
    return value.detach(), [gradient for gradient in gradients if gradient is not None], passes


@pytest.mark.parametrize(("at_once", "most"), [(1, 5), (8 * math.prod(SIZE), 8)])
def test_images_that_are_too_many_for_one_pass_take_turns(at_once, most):
    unused = nn.Linear(1, 1)
    student, teacher = (classifier(seed, nn.Conv2d(2, 2, 1), nn.Tanh()) for seed in (1, 2))
    student.register_module("unused", unused)
    whole, gradients, passes = in_parts(student, teacher, 2**22)
    parted, summed, shorter = in_parts(student, teacher, at_once)
    assert max(passes) == 5 * (CLASSES - 1) and max(shorter) == most
    torch.testing.assert_close(parted, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(summed, gradients, rtol=1e-9, atol=1e-12)
    assert len(summed) == 4


def test_batchnorm_learns_from_the_first_part_of_images_that_take_turns():
    student, teacher = classifier(1, nn.BatchNorm2d(2)), classifier(2)
    layer, seen = student.net[0], []
    layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].mean((0, 2, 3))))
    in_parts(student, teacher, 1)
    assert len(seen) == 1 + CLASSES - 1  # the batch, and each image towards one class after the other
    torch.testing.assert_close(layer.running_mean, 0.9 * 0.1 * seen[0] + 0.1 * seen[1])
    assert layer.track_running_stats and layer.num_batches_tracked == 2


@pytest.mark.parametrize(("count", "right"), [(1, 1), (8, 0), (8, 1), (8, 2)])
def test_the_boundary_takes_two_images_of_which_both_networks_are_right(count, right):
    student, teacher, images = classifier(2), classifier(2), pixels(count)
    labels = teacher(images).argmax(1)
    labels[right:] = (labels[right:] + 1) % CLASSES
    terms = objective(student, teacher)(Outputs(student(images)), Outputs(teacher(images)), Images(images, labels))
    assert terms.keys() == ({"soft", "boundary"} if right > 1 else {"soft"})


def test_weights_fall_over_the_training():
    student, teacher, images = classifier(1), classifier(1), pixels(8)
    made, found = objective(student, teacher), []
    for made.progress in (0, 0.25, 0.5, 0.75, 0.9):
        terms = made(Outputs(student(images)), Outputs(teacher(images)), Images(images))
        found.append({term: made.strength(term) * getattr(made.config, term) for term in terms})
    soft, boundary = [4, 3.25, 2.5, 1.75, 1.3], [2, 4 / 3, 2 / 3]
    assert [weights["soft"] for weights in found] == pytest.approx(soft)
    assert [weights["boundary"] for weights in found[:3]] == pytest.approx(boundary)
    assert all(weights.keys() == {"soft"} for weights in found[3:])  # at no weight nothing is moved
    assert made.strength("hard") == 1
