"""How hard each term pulls at the student, before a training begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from tiny_objectives import gradients, network, offline

from dfkd_cli.data.batches import Batches
from dfkd_cli.data.sources import Images
from dfkd_cli.errors import ConfigError
from dfkd_cli.objectives.base import Objective
from dfkd_cli.regimes.base import Task
from dfkd_cli.regimes.offline import Offline
from dfkd_cli.stages.calibrate import BATCHES, calibrate, check


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


def test_nothing_is_measured_where_nothing_is_learned(cli, teacher, tmp_path):
    assert calibrate(task({"response": 1.0}, steps=0)[0]) == []
    args = ("--transfer-set", "noise:20", "--student", "w8a8:", "--steps", 0, "--out", tmp_path / "copy", "--dry-run")
    code, _, err = cli("distill", "--teacher", teacher, *args)
    assert code == 0, err


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
