"""What every objective promises, with each of its options."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import work
from tiny_objectives import CLASSES, OBJECTIVES, connected, gradients, images, network, offline, variants
from torch import Tensor

from dfkd_cli import catalog
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.taps import Taps
from dfkd_cli.objectives.base import Objective, Outputs
from dfkd_cli.regimes.offline import Config
from dfkd_cli.settings import recipe_layer, resolve
from dfkd_cli.stages.grid.planner import plan

ALL = pytest.mark.parametrize("name", OBJECTIVES)
EVERY = pytest.mark.parametrize(
    ("name", "values"), [(name, values) for name in OBJECTIVES for values in variants(name)]
)


def networks(name: str) -> tuple[Classifier, Classifier]:
    """A student and a wider teacher, or one of the same width where the objective takes no other."""
    student, teacher = network(1, 2, 3), network(2, 3, 4)
    try:
        connected(name, student, teacher)
    except ConfigError:
        teacher = network(2, 2, 3)
    return student, teacher


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
def test_a_teacher_may_stop(name, tmp_path):
    student, teacher = networks(name)
    learner, _ = offline({name: None}, student, teacher, config=Config(teacher_epochs=1), batch_size=3, epochs=2)
    asked = []
    learner.teacher.register_forward_pre_hook(lambda *_: asked.append(True))
    work(learner, tmp_path / "run")
    assert asked


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
    given = given.changed(given.pixels.double())

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
        answers = learner.ask_student(images.pixels), learner.ask_teacher(images)
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
    outputs = learner.ask_student(given.pixels), learner.ask_teacher(given)[first.teacher_mode]

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
def test_the_tables_of_objectives_have_all_that_were_measured_in_the_weights_of_their_papers(recipe):
    grid = plan(resolve("compare", [recipe_layer(recipe, "compare")]), Path("out"))
    students = [run.settings for run in grid.runs if run.settings.command == "distill" and run.seed == 0]
    chosen = [chosen for settings in students for chosen in settings.components["objective"]]
    kept = json.loads((Path(__file__).parents[2] / "results" / f"{recipe}.json").read_text(encoding="utf-8"))
    measured = [row["settings"].get("objective") or {} for section in kept["sections"] for row in section["rows"]]
    assert {c.entry.name for c in chosen} == {name for objectives in measured for name in objectives}
    assert all(c.weight == c.entry.weight for c in chosen if c.entry.name != "reviewkd")  # it differs between pairs
    assert {len(settings.components["objective"]) for settings in students} == {0, 1, 2}
