"""Generators that are trained for each batch: CMI, Fast-DFKD and NAYER against their papers' formulas, and resumed."""

from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import oracles
import pytest
import safetensors.torch
import stand_ins
import torch
from lightning.pytorch.callbacks import Callback
from oracles import Array
from synthesis_oracles import Adam
from torch import Tensor, nn

from dfkd_cli import catalog
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.artifacts.shards import ShardWriter
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.moments import Moments
from dfkd_cli.models.statistics import AveragedMoments, batch_moments
from dfkd_cli.rounds.trainer import fit
from dfkd_cli.seeds import derive
from dfkd_cli.settings import Layer, resolve
from dfkd_cli.synthesizers.base import SynthesisTask
from dfkd_cli.synthesizers.cmi import contrastive_loss, initialise
from dfkd_cli.synthesizers.fast_dfkd import reset_first_layer
from dfkd_cli.synthesizers.memory import Memory
from dfkd_cli.synthesizers.nayer import NoisyLayers
from dfkd_cli.synthesizers.pooled import BatchGeneration, Candidate, PooledGenerator, agreed_divergence
from dfkd_cli.ui import Terminal

NAMES = ["cmi", "fast-dfkd", "nayer"]
METHODS = catalog.entries("synthesizers")
SIZE = (3, 10, 6)  # neither square nor a multiple of four
TINY = {
    "batch_size": 6,
    "iterations": 3,
    "latent": 5,
    "width": 0.05,
    "view_crop": 1,
    "student_steps": 2,
    "student_batch_size": 4,
    "warmup_share": 0.34,
}
RNG = np.random.default_rng(0)


def network(seed: int, size: tuple[int, int, int] = SIZE, classes: int = 4) -> Classifier:
    """A random network whose BatchNorm layers remember something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(size[0], 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, 7, 3, stride=2), nn.BatchNorm2d(7), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, classes),
        )  # fmt: skip
        for layer in (net[1], net[4]):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return Classifier(net, ModelInfo("tiny", classes, size, mean=(0.2,) * size[0], std=(0.5,) * size[0])).eval()


def flat_network(classes: int = 4, size: tuple[int, int, int] = (1, 2, 3)) -> Classifier:
    """BatchNorm and a linear layer: what a formula on paper can follow."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        units = int(np.prod(size))
        net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(units), nn.Linear(units, classes))
    return Classifier(net, ModelInfo("flat", classes, size, mean=(0.2,), std=(0.5,))).eval()


def method(
    name: str, path: Path, num_images: int = 18, teacher: Classifier | None = None, cls: type | None = None, **values
) -> tuple[PooledGenerator, RunDirectory]:
    """The method with tiny settings, and the directory of its run."""
    given = {"method": name, "student": "tiny", "num_images": num_images, "device": "cpu"}
    more = {"memory": 8, "negatives": 5} if name == "cmi" else {}
    settings = resolve("synthesize", [("", given | TINY | more | values)])
    config, teacher = settings.method.config, teacher or network(0)
    head = {"shape": list(teacher.info.input_size), "dtype": config.dtype}
    writer = ShardWriter(path, head, -(-num_images // config.batch_size))
    task = SynthesisTask(teacher, num_images, 0, writer, student=copy.deepcopy(network(1)))
    return (cls or METHODS[name].load())(task, config), RunDirectory(path, settings, [], {})


def run(name: str, path: Path, *callbacks: Callback, change: Callable = lambda _: None, **values) -> PooledGenerator:
    """The method after all its rounds."""
    made, directory = method(name, path, **values)
    change(made)
    directory.claim()
    with directory.guard():
        fit(made, directory, Terminal(silent=True), callbacks)
    return made


def images_of(made: PooledGenerator) -> Tensor:
    paths = sorted(made.writer.directory.glob("*.safetensors"))
    return torch.cat([safetensors.torch.load_file(path)["images"] for path in paths]).float()


# -- terms -------------------------------------------------------------------------------------------------------------


def test_agreed_divergence_counts_images_on_which_both_agree():
    student, teacher = RNG.normal(size=(2, 40, 3))
    agree = student.argmax(1) == teacher.argmax(1)
    assert 5 < agree.sum() < 35
    p, q = oracles.softmax(teacher), oracles.softmax(student)
    expected = -np.mean([(a * np.log(a / b)).sum() if same else 0.0 for a, b, same in zip(p, q, agree, strict=True)])
    s, t = (torch.tensor(x, requires_grad=True) for x in (student, teacher))
    np.testing.assert_allclose(agreed_divergence(s, t).item(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(agreed_divergence, (s, t))
    assert agreed_divergence(t, t).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("current", "rows"), [(5, 9), (5, 5), (1, 3)])
def test_contrastive_loss_adds_the_mean_over_the_memory(current, rows):
    queries, keys = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in RNG.normal(size=(2, rows, 4)))
    losses = []
    for i in range(rows):
        similar = [np.exp(queries[i] @ keys[j] / 0.3) for j in range(rows)]
        losses.append(-np.log(similar[i] / sum(similar)))
    expected = np.mean(losses[:current]) + (np.mean(losses[current:]) if rows > current else 0)
    q, k = torch.tensor(queries, requires_grad=True), torch.from_numpy(keys)
    np.testing.assert_allclose(contrastive_loss(q, k, current, 0.3).item(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(x, k, current, 0.3), q)


def test_contrast_projects_features_and_memory_and_stops_at_the_keys(tmp_path):
    cmi, _ = method("cmi", tmp_path, contrast_temperature=0.2, negatives=3)
    cmi.double()
    size = cmi.remembered.rows.shape[1] // 2
    assert size == 5 + 7  # what goes into the BatchNorm layers
    past = RNG.normal(size=(3, 2 * size))
    cmi.remembered.push(torch.from_numpy(past))
    local, whole = (torch.tensor(x, requires_grad=True) for x in RNG.normal(size=(2, 6, size)))
    torch.manual_seed(5)
    loss = cmi.contrast(local, whole)
    loss.backward()
    torch.manual_seed(5)
    past = past[torch.randperm(3).numpy()]

    first, _, second = cmi.projection
    w1, b1, w2, b2 = (p.detach().numpy() for p in (first.weight, first.bias, second.weight, second.bias))
    assert w1.shape == (size, size) and w2.shape == (256, size)

    def project(x: Array) -> Array:
        x = np.maximum(x @ w1.T + b1, 0) @ w2.T + b2
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    queries = project(np.concatenate([local.detach().numpy(), past[:, :size]]))
    keys = project(np.concatenate([whole.detach().numpy(), past[:, size:]]))
    p = oracles.softmax(queries @ keys.T / 0.2).diagonal()
    np.testing.assert_allclose(loss.item(), -np.log(p[:6]).mean() - np.log(p[6:]).mean(), rtol=1e-6)
    assert whole.grad is None
    assert local.grad.abs().min() > 0


def test_memory_forgets_the_oldest_first(tmp_path):
    memory = Memory(tmp_path, 5, 1)
    assert memory.sample(3).shape == (0, 1)
    kept: list[int] = []
    for first, last in ((0, 3), (3, 4), (4, 8), (8, 20), (20, 22)):
        memory.push(torch.arange(first, last)[:, None].float())
        kept = [*kept, *range(first, last)][-5:]
        drawn = memory.sample(99).flatten().tolist()
        assert sorted(drawn) == kept
    assert len(set(memory.sample(3).flatten().tolist())) == 3
    torch.manual_seed(0)
    assert len({tuple(memory.sample(5).flatten().tolist()) for _ in range(20)}) > 5


@pytest.mark.parametrize("count", range(6))
def test_a_continued_run_remembers_the_same(count, tmp_path):
    """Rounds of 3 rows, of which 7 are remembered: in the same order, which sampling depends on."""
    memory = Memory(tmp_path, 7, 2)
    for index in range(count):
        memory.push(rows := torch.randn(3, 2))
        memory.write(index, rows)
    memory.drop(memory.first(count, 3))
    assert len([*tmp_path.iterdir()]) == min(count, 3)
    again = Memory(tmp_path, 7, 2)
    assert again.read(count, 3)
    filled = min(3 * count, 7)
    assert (again.pushed, memory.pushed) == (3 * count, 3 * count)
    assert torch.equal(again.rows[:filled], memory.rows[:filled])
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        for damage in (content[:-1] + bytes([content[-1] ^ 1]), content[:-5], b""):
            path.write_bytes(damage)
            assert not Memory(tmp_path, 7, 2).read(count, 3)
        path.unlink()
        assert not Memory(tmp_path, 7, 2).read(count, 3)
        path.write_bytes(content)


def test_only_layers_that_run_are_averaged():
    """Networks with auxiliary heads have BatchNorm layers that do not run in evaluation."""
    teacher = network(0)
    teacher.net.add_module("idle", nn.BatchNorm2d(3))
    teacher.net.forward = lambda x: nn.Sequential(*list(teacher.net.children())[:-1])(x)
    average = AveragedMoments(teacher, 0.5)
    with batch_moments(teacher) as seen:
        teacher(torch.rand(4, *teacher.info.input_size))
    average.update(seen)
    assert set(average.blend(seen)) == set(seen) < {name for name, _ in teacher.net.named_modules()}


def test_averaged_moments_take_each_batch_once():
    teacher, r = network(0), 0.9
    average = AveragedMoments(teacher, r).double()
    seen = [{n: Moments(*torch.rand(2, c, dtype=torch.float64)) for n, c in (("1", 5), ("4", 7))} for _ in range(3)]
    expected = None
    for batch in seen:
        for name in ("1", "4"):
            for which in ("mean", "variance"):
                ours = getattr(batch[name], which).numpy()
                wanted = ours if expected is None else (1 - r) * ours + r * expected[name, which]
                np.testing.assert_allclose(getattr(average.blend(batch)[name], which), wanted, rtol=1e-12)
        blended = average.blend(batch)
        expected = {(n, w): getattr(m, w).numpy().copy() for n, m in blended.items() for w in ("mean", "variance")}
        average.update(batch)
    mean = torch.rand(7, dtype=torch.float64, requires_grad=True)
    average.blend(seen[0] | {"4": Moments(mean, mean)})["4"].mean.sum().backward()
    np.testing.assert_allclose(mean.grad, 1 - r, rtol=1e-12)
    restored = AveragedMoments(teacher, r).double()
    restored.load_state_dict(average.state_dict())
    assert torch.equal(restored.blend(seen[0])["1"].mean, average.blend(seen[0])["1"].mean)


def test_statistics_have_the_biased_variance_and_plain_norms(tmp_path):
    made, _ = method("fast-dfkd", tmp_path, view_crop=0, view_flip=False, teacher=flat_network())
    images = torch.rand(6, 1, 2, 3)
    x = (images.numpy().reshape(6, -1).astype(np.float64) - 0.2) / 0.5
    expected = np.linalg.norm(x.mean(0)) + np.linalg.norm(x.var(0) - 1)
    terms = made.candidate(images, torch.zeros(6, dtype=torch.int64)).terms
    np.testing.assert_allclose(terms["statistics"].item(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_terms_of_a_view_are_the_papers(name, tmp_path):
    """Both networks see the same view; its statistics are averaged with the batches' before."""
    made, _ = method(name, tmp_path, teacher=flat_network(), statistics_momentum=0.6, warmup_share=0)
    made.student = flat_network()
    made.student.net[2].weight.data *= 3  # mostly the same classes, surer
    torch.manual_seed(0)
    former, pixels, labels = torch.rand(6, 1, 2, 3), torch.rand(6, 1, 2, 3), torch.arange(6) % 4
    with batch_moments(made.teacher) as seen:
        made.teacher(former)
    made.average.update(seen)
    torch.manual_seed(3)
    terms = made.candidate(pixels, labels).terms
    torch.manual_seed(3)
    view = made.view(pixels)
    assert (view - pixels).abs().amax((1, 2, 3)).min() > 0

    x, past = ((images.flatten(1).double().numpy() - 0.2) / 0.5 for images in (view, former))
    mean, variance = (
        0.4 * now + 0.6 * then
        for now, then in zip(oracles.channel_moments(x), oracles.channel_moments(past), strict=True)
    )
    student, teacher = (
        x / np.sqrt(1 + 1e-5) @ net[2].weight.detach().double().numpy().T + net[2].bias.detach().double().numpy()
        for net in (made.student.net, made.teacher.net)
    )
    p, q, same = oracles.softmax(teacher), oracles.softmax(student), teacher.argmax(1) == student.argmax(1)
    expected = {
        "cross_entropy": oracles.cross_entropy(np.eye(4)[labels], p),
        "statistics": np.linalg.norm(mean) + np.linalg.norm(variance - 1),
        "adversarial": -((p * np.log(p / q)).sum(1) * same).mean(),
    }
    assert same.any()
    assert {key: terms[key].item() for key in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "term"), [*itertools.product(NAMES, ["cross_entropy", "statistics", "adversarial"]), ("cmi", "contrast")]
)
def test_each_term_reaches_the_generator_and_changes_the_images(name, term, tmp_path):
    whole = run(name, tmp_path / "whole", warmup_share=0)
    without = run(name, tmp_path / "without", warmup_share=0, **{term: 0})
    assert not torch.equal(images_of(whole)[:6], images_of(without)[:6])
    torch.manual_seed(0)
    labels = whole.labels(6)
    batch = whole.start(labels) if name == "nayer" else None
    images = batch.network(batch.inputs) if batch else whole.generator(whole.latents(6))
    whole.student.eval()
    terms = whole.candidate(images, labels).terms
    assert set(terms) == {"cross_entropy", "statistics", "adversarial", *(["contrast"] if name == "cmi" else [])}
    first = whole.generator[0].linear.weight
    assert torch.autograd.grad(terms[term], first)[0].abs().max() > 0
    with open(whole.writer.directory / "metrics.csv", newline="") as file:
        assert set(terms) <= set(next(csv.reader(file)))


# -- the frame ---------------------------------------------------------------------------------------------------------


GIVEN = ((5.0, 0.1), (1.0, 0.3), (0.2, 0.5))  # of three steps, cross-entropy and statistics


def given_losses(name: str, path: Path, losses: Sequence[tuple[float, float]], **values):
    """A method whose steps have given terms, with the gradients of its own; and the candidates that it will see."""

    class Given(METHODS[name].load()):
        def candidate(self, images: Tensor, labels: Tensor) -> Candidate:
            own = super().candidate(images, labels)
            given = dict(zip(("cross_entropy", "statistics"), losses[len(seen)], strict=True))
            terms = {key: own.terms[key] + (value - own.terms[key].detach()) for key, value in given.items()}
            seen.append(dataclasses.replace(own, terms=terms))
            return seen[-1]

    seen: list[Candidate] = []
    made, _ = method(name, path, iterations=len(losses), cls=Given, cross_entropy=1, **values)
    made.configure_optimizers()
    return made, seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("statistics", "order", "best"), [(10, (0, 1, 2), 1), (10, (1, 0, 2), 0), (10, (0, 2, 1), 2), (1, (0, 1, 2), 2)]
)
def test_the_images_with_the_lowest_loss_are_kept(statistics, order, best, name, tmp_path):
    """Weighted, the losses are 6, 4 and 5.2, with which the last terms go that are the smallest without weights."""
    losses = [GIVEN[step] for step in order]
    made, seen = given_losses(name, tmp_path, losses, statistics=statistics)
    batch = made.make(0, 6)
    assert [torch.equal(batch.pixels, each.pixels) for each in seen] == [step == best for step in range(3)]
    assert [term.item() for term in batch.terms.values()] == pytest.approx(losses[best])


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_leaves_the_last_steps_statistics_and_the_best_images_features(name, tmp_path):
    made, seen = given_losses(name, tmp_path, GIVEN, statistics=10)
    made.make(0, 6)
    expected = torch.cat([seen[2].look.moments[layer].mean for layer in ("1", "4")])
    torch.testing.assert_close(made.average.average[0], expected)
    if name == "cmi":
        torch.testing.assert_close(made.remembered.sample(99).sort(0).values, seen[1].features.sort(0).values)


@pytest.mark.parametrize("name", NAMES)
def test_student_rests_in_the_warm_up(name, tmp_path):
    class Watch(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            states.append(copy.deepcopy(module.student.state_dict()))

    states: list[dict[str, Tensor]] = []
    made = run(name, tmp_path, Watch())
    assert made.warmup_rounds == 1
    changed = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(states)]
    assert changed == [True, True]
    assert all(torch.equal(v, states[0][k]) for k, v in network(1).state_dict().items())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["adversarial"]) for row in rows] == [bool(row["soft"]) for row in rows] == [False, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_pool_is_labelled_in_range_and_as_large_as_wanted(name, tmp_path):
    made = run(name, tmp_path, num_images=14)
    shards = [safetensors.torch.load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert [len(shard["images"]) for shard in shards] == [6, 6, 2]
    for shard in shards:
        assert shard["images"].shape[1:] == SIZE
        assert shard["images"].min() >= 0 and shard["images"].max() <= 1
        assert torch.equal(shard["targets"].sum(1), torch.ones(len(shard["targets"])))
    assert set(made.models()) == {"student", "generator"}
    assert all(p.grad is None for p in made.teacher.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_continues_bit_for_bit(name, tmp_path):
    values = {"num_images": 30, "warmup_share": 0.2}
    whole, resumed = stand_ins.check_interruption(functools.partial(run, name, **values), tmp_path)
    assert torch.equal(images_of(whole), images_of(resumed))


# -- what a batch leaves to the next -----------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_meta_gradients_of_a_linear_generator(meta, tmp_path):
    """Two rounds of three inner steps by hand: x = z W^T, a linear teacher, cross-entropy alone."""
    teacher, units, count, steps, lr, latent_lr = flat_network(), 6, 4, 3, 0.01, 0.03

    def linear(made: PooledGenerator) -> None:
        made.student = flat_network()
        made.generator = nn.Sequential(nn.Linear(5, units, bias=False), nn.Unflatten(1, (1, 2, 3)))
        made.generator[0].weight.data.copy_(torch.from_numpy(start))

    start = 0.3 * RNG.normal(size=(units, 5))
    values = {"batch_size": count, "iterations": steps, "lr": lr, "latent_lr": latent_lr, "meta": meta, "statistics": 0}
    off = {"adversarial": 0, "student_steps": 0, "view_crop": 0, "view_flip": False, "cross_entropy": 0.7}
    made = run(
        "fast-dfkd", tmp_path, change=linear, teacher=teacher, num_images=2 * count, dtype="float32", **values, **off
    )

    classifier = teacher.net[2]
    weight, bias = (p.detach().double().numpy() for p in (classifier.weight, classifier.bias))
    theta, outer, kept = start, Adam((0.5, 0.999)), []
    for index in range(2):
        torch.manual_seed(derive("shard", 0, index))
        labels, z = torch.randint(4, (count,)).numpy(), torch.randn(count, 5).double().numpy()
        inner, of_inner, of_z, total = theta, Adam((0.5, 0.999)), Adam((0.5, 0.999)), np.zeros_like(theta)
        losses, images = [], []
        for _ in range(steps):
            x = z @ inner.T
            logits = (x - 0.2) / 0.5 / np.sqrt(1 + 1e-5) @ weight.T + bias
            p = oracles.softmax(logits)
            losses.append(-np.log(p[np.arange(count), labels]).mean())
            images.append(x)
            gradient = 0.7 * (p - np.eye(4)[labels]) / count @ weight / 0.5 / np.sqrt(1 + 1e-5)
            of_theta = gradient.T @ z
            total = total + of_theta
            z, inner = of_z.step(z, gradient @ inner, latent_lr), of_inner.step(inner, of_theta, lr)
        kept.append(images[int(np.argmin(losses))])
        theta = outer.step(theta, total if meta == "fomaml" else theta - inner, lr * steps)
    np.testing.assert_allclose(images_of(made).flatten(1), np.concatenate(kept), atol=2e-5)
    np.testing.assert_allclose(made.generator[0].weight.detach(), theta, atol=2e-5)
    assert np.abs(theta - start).max() > 0.03


def test_average_of_statistics_is_the_last_steps(tmp_path):
    made = run("fast-dfkd", tmp_path, num_images=6, iterations=1, view_crop=0, view_flip=False, dtype="float32")
    with torch.no_grad(), batch_moments(made.teacher) as seen:
        made.teacher(images_of(made))
    torch.testing.assert_close(made.average.average[0, 5:], seen["4"].mean)
    assert made.average.updates == 1


def test_first_layer_starts_anew_in_its_round(tmp_path):
    class Watch(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            weights.append(module.generator[0].linear.weight.detach().abs().mean().item())

    weights: list[float] = []
    run("fast-dfkd", tmp_path, Watch(), num_images=36, reset_first_layer=2, lr=1e-4, latent=50)  # warm-up: two rounds
    drop = [after / before for before, after in itertools.pairwise(weights)]
    assert [round(value) for value in drop] == [1, 1, 0, 1, 1]


def test_reset_and_initialise_have_the_codes_deviations(tmp_path):
    made, _ = method("cmi", tmp_path, width=1.0, latent=100)
    for layer in made.generator.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.fill_(7)
    initialise(made.generator)
    norm, conv = made.generator[0].body[1], made.generator[0].body[3]
    for values, mean in ((made.generator[0].linear.weight, 0), (conv.weight, 0), (norm.weight, 1)):
        assert values.mean().item() == pytest.approx(mean, abs=5 * 0.02 / values.numel() ** 0.5)
        assert values.std().item() == pytest.approx(0.02, rel=4 / values.numel() ** 0.5)
    assert not made.generator[0].linear.bias.any() and not norm.bias.any() and not norm.running_mean.any()
    nn.init.ones_(made.generator[0].linear.bias)
    reset_first_layer(made.generator)
    assert norm.weight.mean().abs() < 0.01 and not made.generator[0].linear.bias.any()


def trained_by(optimizers: Sequence[torch.optim.Optimizer]) -> set[Tensor]:
    return {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def test_cmi_starts_a_batch_anew_and_trains_all_parts(tmp_path):
    made, _ = method("cmi", tmp_path, width=1.0, latent=100)
    made.configure_optimizers()
    for parameter in made.generator.parameters():
        nn.init.constant_(parameter, 7)
    torch.manual_seed(0)
    batch = made.start(torch.arange(6))
    for layer in (made.generator[0].linear, made.generator[0].body[3]):
        count = layer.weight.numel()
        assert layer.weight.mean().item() == pytest.approx(0, abs=5 * 0.02 / count**0.5)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=4 / count**0.5)
    assert batch.network is made.generator
    assert trained_by(batch.optimizers) == {*made.generator.parameters(), batch.inputs, *made.projection.parameters()}
    assert not torch.equal(made.start(torch.arange(6)).inputs, batch.inputs)


def test_cmi_trains_its_projection_over_a_batch(tmp_path):
    made, _ = method("cmi", tmp_path)
    made.configure_optimizers()
    before = copy.deepcopy(made.projection)
    made.make(0, 6)
    for old, new in zip(before.parameters(), made.projection.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_cmi_remembers_the_enlarged_view_before_the_other(tmp_path):
    """The features of a network that begins with BatchNorm are its images."""
    made, _ = method("cmi", tmp_path, teacher=flat_network())
    torch.manual_seed(0)
    pixels = torch.rand(6, 1, 2, 3)
    torch.manual_seed(3)
    features = made.candidate(pixels, torch.arange(6) % 4).features
    torch.manual_seed(3)
    whole = made.view(pixels)
    local = made.second_view(pixels)
    assert (local - whole).abs().amax((1, 2, 3)).min() > 0.01
    torch.testing.assert_close(features, (torch.cat([local, whole], 1).flatten(1) - 0.2) / 0.5)


def test_noisy_layers_serve_one_block_each():
    torch.manual_seed(0)
    layers, rows = NoisyLayers(count=7, block=3, inputs=4, outputs=500).double(), RNG.normal(size=(7, 4))
    weight = layers.weight.detach().numpy()
    nn.init.normal_(layers.bias)
    expected = [rows[n] @ weight[n // 3] + layers.bias[n // 3, 0].detach().numpy() for n in range(7)]
    np.testing.assert_allclose(layers(torch.from_numpy(rows)).detach(), expected, rtol=1e-10)
    assert weight.shape == (3, 4, 500)
    assert weight.mean() == pytest.approx(0, abs=0.05) and weight.std() == pytest.approx(1, abs=0.05)


def test_nayers_latents_are_noisy_layers_of_normalised_embeddings_and_all_parts_are_trained(tmp_path):
    made, _ = method("nayer", tmp_path, embedding="random", embedding_size=9)
    batch = made.start(labels := torch.tensor([0, 1, 2, 3, 3, 1]))
    rows = made.embeddings[labels].double().numpy()
    mean, variance = oracles.channel_moments(rows)
    rows = (rows - mean) / np.sqrt(variance + 1e-5)
    weight, bias = (p.detach().double().numpy() for p in (batch.network[1].weight, batch.network[1].bias))
    latents = [row @ weight[n // 4] + bias[n // 4, 0] for n, row in enumerate(rows)]
    np.testing.assert_allclose(batch.network[:2](batch.inputs).detach(), latents, rtol=1e-4, atol=1e-4)
    assert len(batch.network) == 3 and batch.network[2] is made.generator
    parts = (made.norm, batch.network[1], made.generator)
    assert trained_by(batch.optimizers) == {parameter for part in parts for parameter in part.parameters()}


def test_nayers_noisy_layers_are_new_in_every_batch_and_the_rest_goes_on(tmp_path):
    class Watched(METHODS["nayer"].load()):
        def start(self, labels: Tensor) -> BatchGeneration:
            batch = super().start(labels)
            starts.append([p.detach().clone() for p in (batch.network[1].weight, self.norm.weight)])
            networks.append(batch.network)
            return batch

        def finish(self, batch: BatchGeneration, best: Candidate) -> None:
            ends.append([p.detach().clone() for p in (batch.network[1].weight, self.norm.weight)])

    starts, ends, networks = [], [], []
    made = run("nayer", tmp_path, cls=Watched, warmup_share=0)
    assert len(networks) == 3 and all(net[0] is made.norm and net[2] is made.generator for net in networks)
    for (noisy, norm), (trained, norm_trained), (following, norm_following) in zip(
        starts[:-1], ends[:-1], starts[1:], strict=True
    ):
        assert not torch.equal(noisy, trained) and (following - trained).abs().max() > 1
        assert not torch.equal(norm, norm_trained) and torch.equal(norm_following, norm_trained)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_the_student_has_two_images_at_least(name):
    """BatchNorm learns nothing of one."""
    with pytest.raises(ConfigError, match="student_batch_size: 1 is out of range"):
        resolve("synthesize", [Layer("", {"method": name, "student_batch_size": 1})])


def test_nayer_takes_all_classes_in_every_block(tmp_path):
    made, _ = method("nayer", tmp_path)
    labels = made.labels(11)
    assert labels[:8].tolist() == [0, 1, 2, 3] * 2
    assert len(set(labels[8:].tolist())) == 3


@pytest.mark.parametrize(("embedding", "size"), [("one-hot", 4), ("random", 9)])
def test_nayers_generator_takes_normal_latents(embedding, size, tmp_path):
    """Before a batch, a noisy layer's outputs are normal with the embedding's norm: the generator's first sums too."""
    made = run("nayer", tmp_path, embedding=embedding, embedding_size=9, num_images=6, latent=200)
    assert made.embeddings.shape == (4, size)
    generator = made.models()["generator"]
    with torch.no_grad():
        rows = made.norm.eval()(made.embeddings)
        sums = [NoisyLayers(4, 4, size, 200)(rows) @ made.generator[0].linear.weight.T for _ in range(200)]
        ours = torch.randn(800, 200) @ generator[0].linear.weight.T
    assert torch.cat(sums).std().item() == pytest.approx(ours.std().item(), rel=0.1)


def test_generators_life(tmp_path):
    class Watch(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            weights.append(module.generator[0].linear.weight.detach().clone())

    weights: list[Tensor] = []
    values = {"lr": 1e-5, "generator_life": [2, 3], "warmup_share": 0.4, "iterations": 1}
    run("nayer", tmp_path, Watch(), num_images=60, **values)
    same = [torch.allclose(a, b, atol=1e-3) for a, b in itertools.pairwise(weights)]
    assert same == [True, False, True, False, True, True, False, True, True]  # rounds 2, 4, 7
