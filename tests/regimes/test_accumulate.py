"""Several passes for one step, and memory for images that do not fit: what stays the same, and what does not."""

from __future__ import annotations

import threading

import numpy as np
import oracles
import pytest
import torch
from pipeline import finish_on_two
from stand_ins import Given, check_interruption, work
from tiny_regimes import inputs, linear, network, pixels, regime, response
from torch import nn

from dfkd_cli import catalog
from dfkd_cli.config import build
from dfkd_cli.data.sources import Images, Source
from dfkd_cli.errors import ConfigError, RunFailed
from dfkd_cli.stages.distill import Inputs

PLAIN = {"schedule": "constant", "optimizer": "sgd", "lr": 0.5, "momentum": 0.9}
LABELS = torch.tensor([0, 1, 2, 3, 0, 2])


@pytest.mark.parametrize("accumulate", [1, 2, 4, 6])
def test_several_passes_are_one_step_on_all_images(accumulate, tmp_path):
    """Parts of unequal size too: of six images four passes have 1, 2, 1 and 2."""
    loss = response(temperature=2.0)
    learner = regime("offline", objectives=[(1.0, loss)], steps=4, accumulate=accumulate, weight_decay=0.1, **PLAIN)
    x, teacher, start = inputs(pixels()), linear(learner.teacher), linear(learner.student)

    def gradient(weights):
        return oracles.response_gradient(x @ weights.T, x @ teacher.T, 2.0).T @ x

    work(learner, tmp_path)
    expected = oracles.sgd(start, gradient, 0.5, 0.9, 0.1, 4, True)
    np.testing.assert_allclose(linear(learner.student), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["supervised", "virtual-teacher"])
def test_parts_of_unequal_size_count_by_their_images(name, tmp_path):
    source = Given(pixels(5), LABELS[:5])
    learners = [regime(name, source, steps=3, accumulate=passes, **PLAIN) for passes in (1, 2)]
    for index, learner in enumerate(learners):
        learner.view = lambda images: images
        work(learner, tmp_path / str(index))
    np.testing.assert_allclose(linear(learners[0].student), linear(learners[1].student), atol=1e-5)


def test_batchnorm_sees_each_pass_by_itself(tmp_path):
    student = network(1, nn.BatchNorm1d(9, momentum=0.3))
    learner = regime("offline", student=student, steps=1, accumulate=3, **PLAIN)
    shown: list[torch.Tensor] = []
    student.net[1].register_forward_pre_hook(lambda _, values: shown.append(values[0].double()))
    work(learner, tmp_path)
    assert [len(values) for values in shown[:3]] == [2, 2, 2]
    mean = torch.zeros(9, dtype=torch.double)
    for values in shown[:3]:
        mean = 0.7 * mean + 0.3 * values.mean(0)
    np.testing.assert_allclose(student.net[1].running_mean, mean, atol=1e-6)


def test_terms_are_logged_as_means_over_the_step(tmp_path):
    learners = [regime("offline", Given(pixels(5)), steps=1, accumulate=passes, **PLAIN) for passes in (1, 2)]
    logs = []
    for index, learner in enumerate(learners):
        work(learner, tmp_path / str(index))
        logs.append((tmp_path / str(index) / "metrics.csv").read_text().splitlines())
    assert logs[0][0] == logs[1][0]
    first, second = ([float(value) for value in rows[1].split(",")] for rows in logs)
    np.testing.assert_allclose(first, second, rtol=1e-5)


@pytest.mark.parametrize(("name", "tolerance"), [("sp", 1e-4), ("pkt", 0.1), ("information-flow", 0.2)])
def test_what_falls_with_the_size_of_a_batch_pulls_as_the_whole_batch_would(name, tolerance, tmp_path):
    """Parts with the same images: of two copies of each the similarities are halved, and their squares' mean is too."""
    images = torch.cat([pixels(8), pixels(8)])
    lengths = []
    for passes in (1, 2):
        entry = catalog.entries("objectives")[name]
        objective = entry.load()(build(entry.config, {"taps": ("logits",)}))
        student, teacher = network(1), network(2)
        objective.connect(student, teacher)
        learner = regime("offline", Given(images), student, [(1.0, objective)], teacher=teacher, accumulate=passes)
        losses = [learner.loss(part)[0] for part in learner.parts(Given(images).all())]
        lengths.append(float(sum(losses)) / passes)
    assert lengths[1] == pytest.approx(lengths[0], rel=tolerance)


def test_objectives_count_steps_and_not_passes(tmp_path):
    loss, steps = response(), []
    loss.after_step = lambda: steps.append(1)
    work(regime("offline", objectives=[(1.0, loss)], steps=3, accumulate=2, **PLAIN), tmp_path)
    assert len(steps) == 3


def test_interrupted_training_with_several_passes_and_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("dfkd_cli.regimes.base.STEPS_PER_ROUND", 2)

    threads = set()

    class Chunks(Source):
        """Four chunks that another thread may load; three of them fill half of the memory, and more."""

        sizes, shape, dtype, only_read = [6] * 4, (1, 3, 3), torch.float32, True

        def chunk(self, index: int) -> Images:
            threads.add(threading.current_thread().name)
            return Images(pixels(24)[6 * index : 6 * index + 6])

    def run(directory, *callbacks):
        source, how = Chunks(), {"steps": 10, "batch_size": 7, "accumulate": 3, "noise": 0.1}
        memory = 13 * source.bytes_per_image / 2**30
        return work(regime("offline", source, memory=memory, **how), directory, *callbacks)

    check_interruption(run, tmp_path)
    assert len(threads) == 2


def test_a_batchnorm_of_vectors_needs_two_images_in_every_pass(tmp_path):
    student = network(1, nn.BatchNorm1d(9))
    with pytest.raises(ConfigError):
        work(regime("offline", student=student, steps=1, accumulate=6), tmp_path)


def test_every_batch_has_as_many_passes_as_any_other():
    """Processes exchange gradients in each of them: one pass more would wait for ever."""
    learner = regime("offline", accumulate=4)
    for count in range(4, 14):
        sizes = [len(part.pixels) for part in learner.parts(Images(pixels(count)))]
        assert len(sizes) == 4 and sum(sizes) == count and max(sizes) - min(sizes) <= 1


def test_two_processes_share_the_passes_of_a_step(tmp_path):
    """Of nine images one has five and the other four."""
    args = ["--model", "lenet5", "--steps", "2", "--batch-size", "9", "--accumulate", "4", "--device", "cpu"]
    finish_on_two(["train-teacher", *args, "--out", "two"], tmp_path)
    assert (tmp_path / "two" / "model.safetensors").exists()


def test_what_is_remembered_of_a_step_is_what_all_its_passes_saw(tmp_path):
    """CRD's memory has every image of the batch after the step, and the mean of the scales."""
    entry = catalog.entries("objectives")["crd"]
    memories = []
    for passes in (1, 3):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss = entry.load()(build(entry.config, {"dimensions": 4, "negatives": 2}))
            student, teacher = network(1, nn.Linear(9, 9)), network(2, nn.Linear(9, 9))
            loss.connect(student, teacher)
        how = {"steps": 1, "accumulate": passes, "lr": 0.1}
        learner = regime("offline", Given(pixels(), LABELS), student, [(1.0, loss)], teacher=teacher, **how)
        before = loss.memory.clone()
        work(learner, tmp_path / str(passes))
        assert (loss.memory != before).all(2).all()
        assert torch.equal(loss.classes, LABELS)
        memories.append(loss.memory)
    torch.testing.assert_close(*memories)  # embeddings before the step are the same


@pytest.mark.parametrize(("batch", "passes"), [(6, 7), (3, 4)])
def test_each_pass_has_an_image(batch, passes):
    with pytest.raises(ConfigError, match=f"a batch has {batch} images"):
        regime("offline", batch_size=batch, accumulate=passes)


@pytest.mark.parametrize(("memory", "held"), [(None, 512 * 2**20), (0.25, 2**28), (3, 3 * 2**30)])
def test_memory_is_in_gibibytes(memory, held, tmp_path):
    learner = regime("offline", Given(pixels()), steps=1, memory=memory)
    work(learner, tmp_path)
    assert learner.batches.capacity == held // learner.train_source.bytes_per_image


def test_no_more_images_are_held_out_than_there_is_memory_for():
    source = Given(pixels(40))
    for fit, held in ((9, 9), (30, 20)):
        learner = regime("offline", source, holdout=0.5, memory=fit * source.bytes_per_image / 2**30)
        assert (len(learner.held_out), len(learner.train_source)) == (held, 40 - held)


@pytest.mark.parametrize(("memory", "lower"), [(None, "--batch-size;"), (2.0, "--batch-size or --memory;")])
def test_what_decides_how_much_memory_is_taken_is_named_where_there_is_too_little(memory, lower, tmp_path):
    class TooLarge(Given):
        def chunk(self, index):
            return Images(torch.empty(1 << 60))

    with pytest.raises(RunFailed, match=f"out of memory -- lower {lower}"):
        work(regime("offline", TooLarge(pixels()), memory=memory), tmp_path)


@pytest.mark.parametrize("values", [{"accumulate": 0}, {"memory": 0.0}])
def test_what_is_out_of_range(values):
    with pytest.raises(ConfigError):
        build(Inputs, values)
