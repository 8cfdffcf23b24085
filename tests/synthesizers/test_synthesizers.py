"""Synthesizers against their papers' formulas, and what every one of them promises."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re

import numpy as np
import oracles
import pytest
import safetensors.torch
import synthesis_oracles
import torch
from comparisons import assert_same_state, state
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from stand_ins import work
from tiny_synthesizers import METHODS, linear_teacher, synthesizer, teacher_spec, tiny
from torch import Tensor, nn

from dfkd_cli import catalog
from dfkd_cli.artifacts.shards import MANIFEST, ShardReader
from dfkd_cli.config import hints, options
from dfkd_cli.errors import ArtifactError, RunFailed
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import load_model
from dfkd_cli.settings import resolve
from dfkd_cli.synthesizers.base import Synthesizer
from dfkd_cli.synthesizers.terms import tempered_cross_entropy, total_variation
from dfkd_cli.synthesizers.zskd import class_similarity, dirichlet_targets

INDEPENDENT = [name for name, entry in METHODS.items() if entry.load().stateless and "student" not in entry.needs]
RNG = np.random.default_rng(0)


def shards(method: Synthesizer) -> list[dict[str, Tensor]]:
    """Do every round, and read what was written."""
    for index in range(method.rounds):
        method.round(index)
    return [safetensors.torch.load_file(path) for path in sorted(method.writer.directory.glob("*.safetensors"))]


def targets_of(method: Synthesizer, batches: list[int]) -> Tensor:
    """The targets of consecutive batches of these sizes."""
    starts = np.cumsum([0, *batches])
    return torch.cat([method.targets(int(first), count) for first, count in zip(starts, batches, strict=False)])


@pytest.mark.parametrize("name", ["zskd", "soft-target"])
def test_targets_are_exact_in_any_precision(name, tmp_path):
    method = synthesizer(name, tmp_path)
    torch.manual_seed(0)
    exact = method.soft_labels(method.targets(0, 6))
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        rounded = method.soft_labels(method.targets(0, 6))
        torch.manual_seed(0)
        made = method.make(0, 6).targets
    assert torch.equal(made, exact)
    assert name == "zskd" or not torch.equal(rounded, exact)  # what it would be otherwise


# -- class similarity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3), (10, 84), (100, 64)])
def test_class_similarity_is_the_papers(shape):
    weight = RNG.normal(size=shape) * RNG.uniform(0.1, 10, size=(shape[0], 1))
    similarity = class_similarity(torch.from_numpy(weight).float())
    np.testing.assert_allclose(similarity, oracles.class_similarity(weight), atol=2e-5)
    np.testing.assert_allclose(similarity.diagonal(), 1, atol=1e-6)
    assert (similarity.amin(1) == 0).all()


def test_class_similarity_is_scaled_by_row():
    # The first class is near the second and far from the third: rows have different minima.
    similarity = class_similarity(torch.tensor([[1.0, 0.0], [0.9, 0.4], [-0.2, 1.0]]))
    assert not torch.allclose(similarity, similarity.T, atol=0.05)  # scaling the columns would transpose it
    assert (similarity == 0).sum() == 3  # one minimum for all would leave two zeros
    assert similarity[0, 2] == similarity[1, 2] == similarity[2, 0] == 0


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.1, 5.0])
@pytest.mark.parametrize("epsilon", [1e-4, 0.5])
def test_dirichlet_targets_have_the_moments_of_the_distribution(beta, epsilon):
    count, similarity = 100_000, torch.tensor([1.0, 0.5, 0.2, 0.0])
    torch.manual_seed(0)
    drawn = dirichlet_targets(similarity.expand(count, -1), torch.full((count,), beta), epsilon).double().numpy()
    assert (drawn >= 0).all()
    np.testing.assert_allclose(drawn.sum(1), 1, atol=1e-6)
    mean, variance, fourth = oracles.dirichlet_moments(beta * similarity.double().numpy() + epsilon)
    np.testing.assert_array_less(np.abs(drawn.mean(0) - mean), 5 * np.sqrt(variance / count))
    np.testing.assert_array_less(np.abs(drawn.var(0) - variance), 5 * np.sqrt((fourth - variance**2) / count))


def test_beta_is_per_row_and_epsilon_as_published():
    similarity, beta = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([1e4, 1e-1]).repeat(20_000)
    torch.manual_seed(0)
    calm, peaked = dirichlet_targets(similarity.expand(len(beta), -1), beta).double().view(-1, 2, 3).unbind(1)
    for drawn, scale in ((calm, 1e4), (peaked, 1e-1)):
        _, variance, fourth = oracles.dirichlet_moments(np.array([scale, scale, 0]) + 1e-4)
        error = 5 * np.sqrt((fourth - variance**2) / len(drawn))
        np.testing.assert_array_less(np.abs(drawn.numpy().var(0) - variance), error)
    _, wrong, _ = oracles.dirichlet_moments(np.array([1.0, 1.0, 0]) + 1e-4)
    assert peaked.var(0)[0] > 1.5 * wrong[0]  # the released code's beta, which has no effect


def test_classes_and_betas_have_equal_shares_over_rounds_of_any_size(tmp_path):
    teacher, betas = linear_teacher(), (1e7, 1e-3)
    method = synthesizer("zskd", tmp_path, teacher, batch_size=7, beta=betas)
    torch.manual_seed(0)
    targets = targets_of(method, [7] * 5 + [5]).view(-1, 2, 4, 4)  # image n = 8 i + 4 b + k
    similarity = oracles.class_similarity(teacher.head().weight.double().numpy())
    for k in range(4):
        calm = np.broadcast_to(similarity[k] / similarity[k].sum(), (5, 4))  # beta so large that only the mean is left
        np.testing.assert_allclose(targets[:, 0, k], calm, atol=5e-3)
        assert (np.abs(targets[:, 1, k].numpy() - calm).max(1) > 0.1).all()


def test_class_impressions_aim_at_one_class_each_in_equal_shares(tmp_path):
    method = synthesizer("class-impressions", tmp_path)
    targets = targets_of(method, [3, 3, 3, 3])
    assert torch.equal(targets, torch.eye(4).repeat(3, 1))


# -- terms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (5, 10), (3, 100)])
@pytest.mark.parametrize("tau", [1.0, 20.0])
def test_tempered_cross_entropy_is_the_papers(shape, tau):
    logits, target = RNG.normal(scale=10, size=shape), RNG.dirichlet(np.ones(shape[1]), size=shape[0])
    z = torch.tensor(logits, requires_grad=True)
    loss = tempered_cross_entropy(z, torch.from_numpy(target), tau)
    loss.backward()
    np.testing.assert_allclose(loss.item(), oracles.impression_loss(logits, target, tau), rtol=1e-12)
    np.testing.assert_allclose(z.grad, oracles.impression_gradient(logits, target, tau), atol=1e-14)
    assert torch.autograd.gradcheck(lambda a: tempered_cross_entropy(a, torch.from_numpy(target), tau), z)


def test_tempered_cross_entropy_takes_class_indices_too():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    one_hot = torch.eye(4)[labels]
    torch.testing.assert_close(tempered_cross_entropy(logits, labels, 3), tempered_cross_entropy(logits, one_hot, 3))


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 4, 5), (1, 1, 1, 4)])
def test_total_variation_is_the_sum_over_neighbours(shape):
    pixels = RNG.normal(size=shape)
    images = torch.tensor(pixels, requires_grad=True)
    value = total_variation(images)
    value.backward()
    expected, gradient = oracles.total_variation(pixels)
    np.testing.assert_allclose(value.item(), expected, rtol=1e-12)
    np.testing.assert_allclose(images.grad, gradient, atol=1e-12)
    assert torch.autograd.gradcheck(total_variation, images)


# -- the inner loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"total_variation": 0.01},
        {"range": "rescale"},
        {"clamp": True},
        {"cross_entropy": 0.5},
        {"soften": 0.6, "soften_every": 2},
        {"soften": 1.5, "soften_every": 1, "clamp": True},
    ],
)
def test_inner_loop_is_adam_on_the_pixels(tmp_path, values):
    count, tau, lr, iterations = 3, 5.0, 0.1, 5
    teacher = linear_teacher()
    method = synthesizer("zskd", tmp_path, teacher, temperature=tau, lr=lr, iterations=iterations, **values)
    torch.manual_seed(3)
    made = method.make(0, count)
    torch.manual_seed(3)  # the same draws: first the targets, then the start
    targets, start = method.targets(0, count).double().numpy(), method.start(count).double().numpy()

    weight, bias = (p.double().numpy() for p in teacher.net.parameters())

    def gradient(x):
        logits = ((x - 0.2) / 0.5).reshape(count, -1) @ weight.T + bias
        through = oracles.impression_gradient(logits, targets, tau) @ weight / 0.5
        smooth = values.get("total_variation", 0.0) * oracles.total_variation(x)[1]
        return values.get("cross_entropy", 1.0) * through.reshape(x.shape) + smooth

    steps = itertools.count(1)

    def project(x):
        if values.get("soften") and next(steps) % values["soften_every"] == 0:
            blur = synthesis_oracles.blur_matrix(3, values["soften"])
            x = blur @ x @ blur.T
        if values.get("clamp"):
            return np.clip(x, 0, 1)
        return (x - x.min()) / (x.max() - x.min()) if values.get("range") == "rescale" else x

    expected = oracles.adam(start, gradient, lr, iterations, project)
    assert np.abs(expected - start).max() > 0.05
    assert not values.get("soften") or next(steps) == iterations + 1
    np.testing.assert_allclose(made.pixels, expected, atol=2e-5)
    np.testing.assert_allclose(made.targets, targets)


def test_colour_images_follow_their_own_gradient(tmp_path):
    """Convolutions give gradients channels last, images are not: the optimiser must not mix the pixels up."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 4))
    teacher = Classifier(net, ModelInfo("colour", 4, (3, 8, 8), (0.5,) * 3, (0.2,) * 3))
    method = synthesizer("class-impressions", tmp_path, teacher, iterations=1)
    torch.manual_seed(3)
    made = method.make(0, 2).pixels
    torch.manual_seed(3)
    start = method.start(2).requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(teacher(start), method.targets(0, 2)), start)
    clear = gradient.abs() > 1e-6
    assert clear.float().mean() > 0.9
    assert torch.equal((made - start)[clear].sign(), -gradient[clear].sign())


def test_more_iterations_come_nearer_to_the_targets(tmp_path):
    few = synthesizer("class-impressions", tmp_path / "few", iterations=1, num_images=8, batch_size=8)
    many = synthesizer("class-impressions", tmp_path / "many", iterations=50, num_images=8, batch_size=8)
    assert many.round(0)["cross_entropy"] < 0.5 * few.round(0)["cross_entropy"]


def test_starting_images_and_noise_are_uniform(tmp_path):
    method = synthesizer("zskd", tmp_path, linear_teacher(size=(3, 8, 8)))
    (stored,) = shards(synthesizer("noise", tmp_path / "noise", linear_teacher(size=(3, 8, 8)), 200, batch_size=200))
    torch.manual_seed(0)
    for drawn in (method.start(200), stored["images"].float()):
        assert drawn.shape == (200, 3, 8, 8)
        assert drawn.min() >= 0
        assert drawn.max() <= 1
        standard_error = (1 / 12 / drawn.numel()) ** 0.5
        assert abs(drawn.mean() - 0.5) < 5 * standard_error
        np.testing.assert_allclose(drawn.flatten().quantile(torch.tensor([0.25, 0.75])), [0.25, 0.75], atol=0.01)


def test_images_that_overflow_their_storage_fail_the_run(tmp_path):
    method = synthesizer("zskd", tmp_path, lr=1e6, dtype="float16")
    with pytest.raises(RunFailed):
        method.round(0)
    assert not list(tmp_path.glob("*.safetensors"))


# -- what every independent method promises ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_stored_logits_are_the_teachers_on_the_stored_images(name, dtype, tmp_path):
    method = synthesizer(name, tmp_path, num_images=5, dtype=dtype)
    for shard in shards(method):
        assert shard["images"].dtype == getattr(torch, dtype)
        assert shard["images"].isfinite().all()
        with torch.no_grad():
            torch.testing.assert_close(shard["logits"], method.teacher(shard["images"].float()), rtol=0, atol=0)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_round_depends_on_seed_and_index_only(name, tmp_path):
    first = shards(synthesizer(name, tmp_path))
    last = tmp_path / "shard-00002.safetensors"
    before = last.read_bytes()
    last.unlink()
    torch.manual_seed(99)
    shards(synthesizer(name, tmp_path))  # makes the third shard alone, after nothing
    assert last.read_bytes() == before
    assert not torch.equal(first[0]["images"], first[1]["images"])
    other = shards(synthesizer(name, tmp_path / "other", seed=1))
    assert not any(torch.equal(a["images"], b["images"]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("fails", [False, True])
def test_the_teacher_is_left_as_it_was(name, fails, tmp_path, make_teacher):
    teacher = load_model(make_teacher("resnet8"))[0].train()
    before = state(teacher.freeze())
    method = synthesizer(name, tmp_path, teacher, num_images=2)
    assert not teacher.training
    if fails:
        with teacher.net.stem[0].register_forward_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
            work(method, tmp_path)
    else:
        work(method, tmp_path)
    assert_same_state(state(teacher), before)


def test_the_manifest_is_kept_from_the_first_shard_on_and_whole_after_the_last(tmp_path):
    named: list[int | None] = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: Synthesizer) -> None:
            path = tmp_path / MANIFEST
            named.append(len(json.loads(path.read_bytes())["shards"]) if path.exists() else None)
            if path.exists():
                with pytest.raises(ArtifactError, match="not finished"):
                    ShardReader(tmp_path)

    method = synthesizer("noise", tmp_path, num_images=8)
    method.keep()
    work(method, tmp_path, Look())
    assert named[:2] == [None, 1]
    assert all(1 <= count <= index for index, count in enumerate(named[1:], 1))  # how many is a matter of time
    assert ShardReader(tmp_path).sizes == [2, 2, 2, 2]


# -- what every method promises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", METHODS.values(), ids=METHODS)
def test_documentation(entry):
    title = entry.doc.partition("\n")[0]
    assert title.endswith(".")
    assert entry.summary == title.rstrip(".")
    if entry.paper:
        assert re.search(r"\b(19|20)\d\d\b", entry.doc), "year and venue"
        assert re.search(r"^ {4}.*=", entry.doc, re.MULTILINE), "an equation"
    else:
        assert "baseline" in entry.doc, "a method without a paper is a baseline"
    for name, said in options(entry.config).items():
        assert said.get("help"), name


@pytest.mark.parametrize("entry", METHODS.values(), ids=METHODS)
def test_what_is_read_without_torch_is_what_runs(entry):
    cls = entry.load()
    assert issubclass(cls, Synthesizer)
    assert (cls.kind, tuple(cls.needs)) == (entry.kind, entry.needs)
    config = importlib.import_module(cls.__module__).Config
    assert hints(config) == hints(entry.config)
    for real, read in zip(dataclasses.fields(config), dataclasses.fields(entry.config), strict=True):
        assert (real.name, real.default, real.metadata) == (read.name, read.default, read.metadata)
    assert {"batch_size", "dtype"} <= set(hints(config))


@pytest.mark.parametrize("entry", METHODS.values(), ids=METHODS)
def test_a_tiny_run_gives_whole_shards_whose_terms_are_configuration_keys(
    entry, tmp_path, cli, make_teacher, make_metadata
):
    spec = teacher_spec(entry)
    teacher = make_teacher(spec)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in tiny(entry.name).items()]
    flags += ["--student", "lenet5-half"] if "student" in entry.needs else []
    flags += ["--metadata", make_metadata(spec)] if "metadata" in entry.needs else []
    args = ["synthesize", "--method", entry.name, "--teacher", teacher, "--out", tmp_path / "s", "--num-images", 3]
    code, out, err = cli(*args, *flags, "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["count"] == 3
    reader = ShardReader(tmp_path / "s")
    reader.verify()
    assert sum(reader.sizes) == 3
    assert reader.manifest["method"] == entry.name
    for row in reader.manifest["shards"]:
        assert set(row["terms"]) <= set(hints(entry.config))
    assert (tmp_path / "s" / "preview.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if not entry.needs])
def test_methods_that_need_nothing_work_on_a_vision_transformer(name, make_teacher, cli, tmp_path):
    pytest.importorskip("timm")
    args = ["synthesize", "--method", name, "--teacher", make_teacher("timm:vit_tiny_patch16_224"), "--out", tmp_path]
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in tiny(name).items()]
    code, _, err = cli(*args, "--num-images", 2, *flags)
    assert code == 0, err
    assert sum(ShardReader(tmp_path).sizes) == 2


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_recipe(name):
    paths = [path for key, path in catalog.recipes().items() if key.startswith("synthesize/")]
    layers = [(str(path), catalog.read_recipe(path)) for path in paths]
    assert name in {resolve("synthesize", [layer]).method.entry.name for layer in layers}
