"""Metadata and the images made from it: against NumPy formulas, and as commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from stand_ins import random_images, statistics_of, synthesizer
from torch import nn

from dfkd_cli.artifacts.metadata import Metadata, read_metadata, write_metadata
from dfkd_cli.data import datasets
from dfkd_cli.errors import ArtifactError, RunFailed
from dfkd_cli.models.activations import outputs_of, pre_activations
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import identity, load_model
from dfkd_cli.stages.collect_metadata import Covariance, collect, last_layers
from dfkd_cli.synthesizers.lopes import Lopes, fixed_dropout, leading_eigenvectors, square_root

CPU = torch.device("cpu")
TEMPERATURE = 8.0
FAST = ("--batch-size", "4", "--iterations", "2", "--num-images", "8")
FEW = ("--num-images", "40", "--covariance-units", "100")  # of LeNet-5: fc2 and head
VARIANTS = ("top", "all", "all-dropout", "spectral-all", "spectral-pairs")


def small_teacher(dropout: float = 0.5, classes: int = 3) -> Classifier:
    """5x5 images; layers of 18, 5 and K units, activations in place."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(18, 5), nn.ReLU(inplace=True), nn.Linear(5, classes),
        )  # fmt: skip
    return Classifier(net, ModelInfo("small", classes, (1, 5, 5), mean=(0.2,), std=(0.5,))).eval()


def forward(teacher: Classifier, pixels: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What goes into each activation of the small teacher, float64; the mask is that of its dropout layer."""
    kernel, bias, weight1, bias1, weight2, bias2 = (p.detach().double().numpy() for p in teacher.net.parameters())
    x = (pixels - 0.2) / 0.5
    conv = np.empty((len(x), 2, 3, 3))
    for filter_, row, column in np.ndindex(2, 3, 3):
        window = x[:, 0, row : row + 3, column : column + 3]
        conv[:, filter_, row, column] = (window * kernel[filter_, 0]).sum((1, 2)) + bias[filter_]
    first = conv.reshape(len(x), -1)
    second = (np.maximum(first, 0) * (1 if mask is None else mask)) @ weight1.T + bias1
    return {"0": first, "4": second, "6": (np.maximum(second, 0) @ weight2.T + bias2) / TEMPERATURE}


def method(teacher: Classifier, directory: Path, metadata: Metadata, cls: type[Lopes] = Lopes, **values) -> Lopes:
    values = {"batch_size": 6, "iterations": 3} | values
    return synthesizer("lopes", directory, teacher, values, values["batch_size"], cls=cls, metadata=metadata)


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("units", [1, 8, 26])
def test_statistics_are_those_of_the_population_however_the_images_are_cut(batch_size, chunk, units):
    teacher, classes = small_teacher(), 3
    source = random_images(teacher.info, 31, chunk)
    images = source.all()
    values, labels = forward(teacher, images.pixels.double().numpy() / 255), images.true_labels.numpy()
    seen = []
    metadata = collect(teacher, source, CPU, batch_size, TEMPERATURE, units, seen.append)
    assert (seen[-1], seen == sorted(seen)) == (31, True)
    assert list(metadata.layers) == list(values)
    assert metadata.counts == np.bincount(labels).tolist()
    assert metadata.joint == {1: ("6",), 8: ("4", "6"), 26: ("0", "4", "6")}[units]
    stacked = np.concatenate([values[name] for name in metadata.joint], axis=1)
    for label in range(classes):
        mine = labels == label
        for name, layer in metadata.layers.items():
            assert layer.shape == {"0": (2, 3, 3), "4": (5,), "6": (3,)}[name]
            np.testing.assert_allclose(layer.mean[label], values[name][mine].mean(0), atol=2e-6)
            np.testing.assert_allclose(layer.std[label], values[name][mine].std(0), atol=2e-6)
        covariance = np.cov(stacked[mine].T, bias=True)
        np.testing.assert_allclose(metadata.covariance[label], covariance, atol=2e-6)
        last = metadata.block(metadata.joint[-1:])[label]
        np.testing.assert_allclose(last, covariance[-classes:, -classes:], atol=2e-6)


@pytest.mark.parametrize("batches", [[50], [1] * 50, [1, 30, 19]])
def test_streamed_covariance_loses_no_digits_far_from_zero(batches):
    rows = np.random.default_rng(0).normal(size=(50, 4)) @ np.diag([1, 2, 3, 0]) + 1e6
    seen = Covariance(4)
    assert not seen.covariance.any()
    for part in torch.split(torch.from_numpy(rows), batches):
        seen.add(part)
    exact = np.cov((rows - 1e6).T, bias=True)
    np.testing.assert_allclose(seen.covariance, exact, atol=1e-7)
    np.testing.assert_allclose(seen.variance, np.diag(exact), atol=1e-7)
    np.testing.assert_allclose(seen.mean, rows.mean(0), rtol=1e-14)


@pytest.mark.parametrize(("limit", "expected"), [(1, "c"), (9, "c"), (10, "c"), (29, "c"), (30, "bc"), (35, "abc")])
def test_the_covariance_takes_the_last_layers_that_fit(limit, expected):
    assert last_layers({"a": 5, "b": 20, "c": 10}, limit) == list(expected)
    assert last_layers({"a": 1, "b": 100, "c": 10}, 20) == ["c"]  # nothing beyond a layer that does not fit


def test_a_class_without_images_has_no_statistics_and_is_never_made(tmp_path):
    teacher = small_teacher()
    source = random_images(teacher.info, 30)
    source.dataset.labels[source.dataset.labels == 1] = 2
    metadata = collect(teacher, source, CPU, 10, TEMPERATURE, 8)
    assert metadata.counts == [10, 0, 20]
    assert not any(layer.mean[1].any() or layer.std[1].any() for layer in metadata.layers.values())
    targets = method(teacher, tmp_path, metadata).targets(1, 4).labels
    assert targets.argmax(1).tolist() == [2, 0, 2, 0]


def test_values_that_are_not_finite_stop_the_collection():
    teacher = small_teacher()
    with torch.no_grad():
        teacher.net[4].weight[0] = torch.inf
    with pytest.raises(RunFailed, match="not finite"):
        statistics_of(teacher)


def test_layers_are_found_in_the_order_they_run_and_normalised_ones_by_their_batchnorm(make_teacher):
    resnet, _ = load_model(make_teacher("resnet8"))
    found = pre_activations(resnet)
    kinds = [type(layer) for layer in found.values()]
    assert kinds == [nn.BatchNorm2d] * (len(kinds) - 1) + [nn.Linear]
    assert len([m for m in resnet.net.modules() if isinstance(m, nn.Conv2d)]) == len(kinds) - 1
    assert all(resnet.net.get_submodule(name) is layer for name, layer in found.items())

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.unused, self.body = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(9, 4)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)).relu_())

    made = Classifier(Backwards(), ModelInfo("b", 2, (1, 3, 3), mean=(0.0,), std=(1.0,)))
    assert list(pre_activations(made)) == ["body", "head"]
    with outputs_of(pre_activations(made)) as outputs:
        images = torch.randn(8, 1, 3, 3)
        made(images)
    assert (outputs["body"] < 0).any()  # what was there before the activation in place
    torch.testing.assert_close(outputs["body"], made.net.body(images.flatten(1)))


@pytest.mark.parametrize("watch", [outputs_of, lambda layers: fixed_dropout(list(layers.values()))])
def test_hooks_are_gone_however_the_block_ends(watch):
    teacher = small_teacher()
    layers = {"3": teacher.net[3]}
    with pytest.raises(ZeroDivisionError), watch(layers):
        assert teacher.net[3]._forward_hooks
        raise ZeroDivisionError
    assert not teacher.net[3]._forward_hooks


# -- what is on disk ---------------------------------------------------------------------------------------------------


def test_metadata_is_read_as_it_was_written(tmp_path):
    metadata = statistics_of(small_teacher(), covariance_units=8)
    write_metadata(tmp_path, metadata, {"teacher": {"sha256": "t"}})
    read, _ = read_metadata(tmp_path, "t")
    assert list(read.layers) == list(metadata.layers)
    assert (list(read.counts), read.temperature, read.joint) == (metadata.counts, TEMPERATURE, ("4", "6"))
    assert torch.equal(read.covariance, metadata.covariance)
    for name, layer in metadata.layers.items():
        assert (read.layers[name].shape, read.layers[name].joint) == (layer.shape, layer.joint)
        assert torch.equal(read.layers[name].mean, layer.mean)
        assert torch.equal(read.layers[name].std, layer.std)
    first = (tmp_path / "metadata.safetensors").read_bytes()
    write_metadata(tmp_path, metadata, {"teacher": {"sha256": "t"}})
    assert (tmp_path / "metadata.safetensors").read_bytes() == first


def change_record(path: Path, change) -> None:
    record = json.loads((path / "metadata.json").read_text())
    change(record)
    (path / "metadata.json").write_text(json.dumps(record))


def flip(path: Path) -> None:
    data = bytearray((path / "metadata.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "metadata.safetensors").write_bytes(data)


DAMAGE = {
    "flipped": (flip, "damaged"),
    "no tensors": (lambda path: (path / "metadata.safetensors").unlink(), "missing"),
    "no record": (lambda path: (path / "metadata.json").unlink(), "dfkd collect-metadata"),
    "not JSON": (lambda path: (path / "metadata.json").write_text("{"), "damaged"),
    "another kind": (lambda path: change_record(path, lambda r: r.update(kind="model")), "not metadata"),
    "newer": (lambda path: change_record(path, lambda r: r.update(schema=2)), "schema 1"),
    "no layers": (lambda path: change_record(path, lambda r: r.pop("layers")), "damaged"),
    "a layer too many": (lambda path: change_record(path, lambda r: r["layers"][0].update(name="x")), "damaged"),
    "another shape": (lambda path: change_record(path, lambda r: r["layers"][0].update(shape=[7])), "damaged"),
    "another teacher": (lambda path: change_record(path, lambda r: r["teacher"].update(sha256="0")), "--teacher"),
}


@pytest.mark.parametrize(("damage", "word"), DAMAGE.values(), ids=DAMAGE)
def test_metadata_that_does_not_fit_is_refused(damage, word, make_teacher, make_metadata, tmp_path, cli):
    shutil.copytree(make_metadata("lenet5"), tmp_path / "metadata")
    damage(tmp_path / "metadata")
    command = ("synthesize", "--method", "lopes", "--teacher", make_teacher("lenet5"), *FAST)
    code, out, err = cli(*command, "--metadata", tmp_path / "metadata", "--out", tmp_path / "s")
    assert (code, out) == (3, "")
    assert len(err.strip().splitlines()) == 1
    assert word in err
    assert not (tmp_path / "s").exists()


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["gaussian", "code"])
def test_samples_have_the_recorded_moments(sampling, tmp_path):
    metadata = statistics_of(small_teacher(), count=9, covariance_units=8)  # three images a class: singular
    made = method(small_teacher(), tmp_path, metadata, sampling=sampling, variant="all")
    labels, count = torch.arange(3).repeat(20_000), 20_000
    torch.manual_seed(0)
    drawn = made.sample(labels)
    for label in range(3):
        for name, layer in metadata.layers.items():
            rows = drawn[name][labels == label].double().numpy()
            if layer.joint:
                wanted = metadata.block((name,))[label].double().numpy()
                assert np.linalg.matrix_rank(wanted, tol=1e-6) < len(wanted)
                wanted = wanted if sampling == "gaussian" else wanted @ wanted
            else:
                wanted = np.diag(layer.std[label].double().numpy() ** 2)
            deviation = np.sqrt(np.diag(wanted))
            np.testing.assert_array_less(
                np.abs(rows.mean(0) - layer.mean[label].numpy()), 5 * deviation / count**0.5 + 1e-6
            )
            error = 5 * np.sqrt((np.outer(deviation**2, deviation**2) + wanted**2) / count) + 1e-6
            np.testing.assert_array_less(np.abs(np.cov(rows.T, bias=True) - wanted), error)


def test_spectral_variants_sample_their_layers_together(tmp_path):
    metadata = statistics_of(small_teacher(), covariance_units=8)
    labels = torch.zeros(20_000, dtype=torch.int64)
    wanted = metadata.covariance[0, :5, 5:].double().numpy()
    for variant, together in (("spectral-all", 1), ("spectral-pairs", 1), ("all", 0)):
        torch.manual_seed(0)
        drawn = method(small_teacher(), tmp_path, metadata, variant=variant).sample(labels)
        a, b = drawn["4"].double().numpy(), drawn["6"].double().numpy()
        error = 5 * np.outer(a.std(0), b.std(0)) * (2 / len(a)) ** 0.5
        np.testing.assert_array_less(np.abs(np.cov(a.T, b.T, bias=True)[:5, 5:] - together * wanted), error)
        assert (np.abs(wanted) > 2 * error).any(), "too weak to tell"


def test_roots_and_eigenvectors():
    rows = np.random.default_rng(0).normal(size=(4, 6))
    covariance = rows.T @ rows  # rank 4 of 6
    root = square_root(torch.from_numpy(covariance)).double().numpy()
    np.testing.assert_allclose(root, root.T, atol=1e-6)
    np.testing.assert_allclose(root @ root, covariance, atol=1e-5)
    values, vectors = np.linalg.eigh(covariance)
    for share, kept in ((0.1, 1), (0.3, 2), (0.5, 3), (1.0, 6)):
        basis = leading_eigenvectors(torch.from_numpy(covariance), share).double().numpy()
        assert basis.shape == (6, kept)
        np.testing.assert_allclose(basis.T @ basis, np.eye(kept), atol=1e-6)
        best = vectors[:, -kept:]
        np.testing.assert_allclose(basis @ basis.T, best @ best.T, atol=1e-5)
        assert values[-kept] > 1e-3 or kept == 6


def test_starting_images_have_the_teachers_mean_and_deviation(tmp_path):
    teacher = small_teacher()
    torch.manual_seed(0)
    start = method(teacher, tmp_path, statistics_of(teacher)).start(2000)
    assert start.shape == (2000, 1, 5, 5)
    assert abs(start.mean() - 0.2) < 5 * 0.5 / start.numel() ** 0.5
    assert abs(start.std() - 0.5) < 5 * 0.5 / (2 * start.numel()) ** 0.5


# -- what is minimised -------------------------------------------------------------------------------------------------


def distance(variant: str, aims: dict, given: dict, metadata: Metadata, labels: np.ndarray, share: float) -> float:
    """The objective from its formula, image by image."""
    gaps = {name: np.maximum(aims[name], 0) - np.maximum(given[name], 0) for name in aims}
    if variant == "top":
        return float((gaps["6"] ** 2).mean())
    if not variant.startswith("spectral"):
        return float(sum((gap**2).mean() / gap.shape[1] for gap in gaps.values()))
    joint = metadata.joint
    parts = [joint] if variant == "spectral-all" else [joint[i : i + 2] for i in range(len(joint) - 1)]
    total = 0.0
    for names in parts:
        stacked, covariance = np.concatenate([gaps[n] for n in names], axis=1), metadata.block(names).double().numpy()
        kept = int(np.ceil(share * stacked.shape[1]))
        for gap, label in zip(stacked, labels, strict=True):
            vectors = np.linalg.eigh(covariance[label])[1][:, ::-1][:, :kept]
            total += ((vectors.T @ gap) ** 2).mean() / len(stacked) / len(parts)
    return total


class Watched(Lopes):
    """Starts from given images and remembers the first value and gradient."""

    pixels: torch.Tensor
    value: float | None = None

    def start(self, count):
        return self.pixels.clone()

    def terms(self, look, targets):
        terms, self.aims = super().terms(look, targets), targets.values
        if self.value is None:
            (self.gradient,) = torch.autograd.grad(terms["reconstruction"], look.images, retain_graph=True)
            self.value = float(terms["reconstruction"].detach())
        return terms


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("units", [8, 26])
def test_every_variant_minimises_its_formula(variant, units, tmp_path):
    teacher, share = small_teacher(), 0.3
    metadata = statistics_of(teacher, count=60, covariance_units=units)
    made = method(teacher, tmp_path, metadata, Watched, variant=variant, spectrum=share)
    torch.manual_seed(0)
    made.pixels = torch.randn(6, 1, 5, 5)
    after_dropout = []
    with teacher.net[4].register_forward_pre_hook(lambda _, inputs: after_dropout.append(inputs[0].detach())):
        made.make(1, 6)
    pixels, labels = made.pixels.double().numpy(), made.labels(1, 6).numpy()
    assert labels.tolist() == [1, 2, 0, 1, 2, 0]
    aims = {name: aim.double().numpy() for name, aim in made.aims.items()}
    matched = {"top": {"6"}, "all": {"0", "4", "6"}, "all-dropout": {"0", "4", "6"}}
    assert set(aims) == matched.get(variant, set(metadata.joint))
    mask = (after_dropout[0] != 0).numpy() / (1 - teacher.net[3].p) if variant == "all-dropout" else None
    value = distance(variant, aims, forward(teacher, pixels, mask), metadata, labels, share)
    assert made.value == pytest.approx(value, rel=1e-4)
    assert value > 1e-6
    for place in [(0, 0, 1, 2), (4, 0, 3, 3), (5, 0, 2, 2)]:
        near = []
        for step in (1e-6, -1e-6):
            moved = pixels.copy()
            moved[place] += step
            near.append(distance(variant, aims, forward(teacher, moved, mask), metadata, labels, share))
        assert made.gradient[place].item() == pytest.approx((near[0] - near[1]) / 2e-6, rel=1e-3, abs=1e-7)


def test_the_whole_spectrum_is_the_plain_distance(tmp_path):
    metadata = statistics_of(small_teacher(), count=60, covariance_units=26)
    made = method(small_teacher(), tmp_path, metadata, Watched, variant="spectral-all", spectrum=1.0)
    made.pixels = torch.randn(6, 1, 5, 5)
    made.make(0, 6)
    given = forward(small_teacher(), made.pixels.double().numpy())
    gaps = [np.maximum(aim.double().numpy(), 0) - np.maximum(given[name], 0) for name, aim in made.aims.items()]
    assert made.value == pytest.approx((np.concatenate(gaps, axis=1) ** 2).mean(), rel=1e-4)


def test_the_inner_loop_is_adam_on_the_matched_logits(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    teacher = Classifier(net, ModelInfo("linear", 4, (1, 3, 3), mean=(0.2,), std=(0.5,)))
    made = method(teacher, tmp_path, statistics_of(teacher), Watched, variant="top", lr=0.07, iterations=5)
    torch.manual_seed(0)
    made.pixels = torch.randn(6, 1, 3, 3)
    result = made.make(0, 6)
    weight, bias = (p.double().numpy() for p in net.parameters())
    aim = np.maximum(made.aims["1"].double().numpy(), 0)

    def gradient(x):
        logits = (((x - 0.2) / 0.5).reshape(6, -1) @ weight.T + bias) / TEMPERATURE
        through = 2 * (np.maximum(logits, 0) - aim) * (logits > 0) / logits.size / TEMPERATURE
        return (through @ weight / 0.5).reshape(x.shape)

    start = made.pixels.double().numpy()
    expected = oracles.adam(start, gradient, 0.07, 5, lambda x: x)
    assert np.abs(expected - start).max() > 0.05
    np.testing.assert_allclose(result.pixels, expected, atol=2e-4)
    assert torch.equal(result.targets, torch.eye(4)[[0, 1, 2, 3, 0, 1]])


def test_dropout_masks_are_fixed_and_new_in_every_batch_and_scaled_as_in_training():
    layer, images = nn.Dropout(0.2).eval(), torch.randn(50, 400)
    drawn = []
    for _ in range(2):
        with fixed_dropout([layer]):
            first = layer(images)
            assert torch.equal(layer(images), first)
        drawn.append(first != 0)
        torch.testing.assert_close(first, images * drawn[-1] / 0.8)
        kept = float(drawn[-1].double().mean())
        assert abs(kept - 0.8) < 5 * (0.8 * 0.2 / images.numel()) ** 0.5
    assert not torch.equal(*drawn)
    assert torch.equal(layer(images), images)


@pytest.mark.parametrize(
    ("variant", "units", "word"),
    [
        ("spectral-pairs", 3, "covariance-units"),
        ("spectral-all", 3, "covariance-units"),
        ("all-dropout", 26, "dropout"),
    ],
)
def test_a_variant_that_does_not_fit_the_teacher_is_refused(variant, units, word, tmp_path):
    teacher = small_teacher()
    if variant == "all-dropout":
        teacher.net[3] = nn.Identity()
    with pytest.raises(ArtifactError, match=word):
        method(teacher, tmp_path, statistics_of(teacher, covariance_units=units), variant=variant)


# -- as commands -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_teacher, dfkd) -> Path:
    """A teacher, metadata, shards and a student; each command in a process of its own. No test may change them."""
    path = tmp_path_factory.mktemp("lopes")
    shutil.copytree(make_teacher("lenet5"), path / "teacher")
    for command in (
        ["collect-metadata", *FEW],
        ["synthesize", "--method", "lopes", "--metadata", "metadata", *FAST],
        ["distill", "--steps", "2", "--batch-size", "4"],
    ):
        done = dfkd(*command, cwd=path)
        assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_metadata_is_of_the_teachers_own_training_images(here):
    teacher, record = load_model(Path("teacher"))
    metadata, _ = read_metadata(Path("metadata"), identity(record))
    assert (sum(metadata.counts), metadata.temperature, metadata.joint) == (40, 8.0, ("fc2.0", "head"))
    assert set(metadata.counts) == {4}
    dataset = datasets.load("digits", "train", image_shape=(1, 32, 32))
    chosen = datasets.class_balanced(dataset.labels, 40, 0)
    assert dataset.labels[chosen].bincount().tolist() == [4] * 10
    run = json.loads(Path("metadata/run.json").read_text())
    assert run["data_free"] is False
    assert [(p["role"], p.get("spec")) for p in run["parents"]] == [("teacher", None), ("dataset", "digits")]
    assert teacher.num_parameters == 61_706


def test_collecting_again_changes_nothing_and_something_else_is_refused(here, cli, tmp_path):
    def stamps():
        return {p.name: p.stat().st_mtime_ns for p in Path("metadata").iterdir()}

    before = stamps()
    code, _, err = cli("collect-metadata", *FEW)
    assert (code, "already complete" in err, stamps()) == (0, True, before)
    code, _, err = cli("collect-metadata", *FEW, "--temperature", 4)
    assert (code, "temperature: 8.0 -> 4.0" in err, stamps()) == (2, True, before)
    assert cli("collect-metadata", *FEW, "--out", tmp_path / "again")[0] == 0
    for name in ("metadata.safetensors", "metadata.json"):
        assert (tmp_path / "again" / name).read_bytes() == (here / "metadata" / name).read_bytes()
    (tmp_path / "again" / "metadata.json").unlink()  # as if it had been stopped before the end
    assert cli("collect-metadata", *FEW, "--out", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "metadata.json").read_bytes() == (here / "metadata" / "metadata.json").read_bytes()
    code, out, _ = cli("collect-metadata", "--out", tmp_path / "dry", "--dry-run", "--json")
    assert (code, json.loads(out)["dry_run"], (tmp_path / "dry").exists()) == (0, True, False)


def test_a_teacher_whose_dataset_is_not_known_needs_one(here, cli, tmp_path):
    foreign = ["--teacher", "lenet5", "--weights", "teacher/model.safetensors", "--input-size", 1, 32, 32]
    command = ["collect-metadata", *foreign, "--num-classes", 10, *FEW, "--out", tmp_path / "m"]
    code, _, err = cli(*command)
    assert (code, "--dataset" in err) == (2, True)
    code, _, err = cli(*command, "--dataset", "digits")
    assert code == 0, err


def test_the_same_seed_gives_the_same_bytes_in_another_process(here, dfkd, tmp_path):
    shutil.copytree(here / "teacher", tmp_path / "teacher")
    shutil.copytree(here / "metadata", tmp_path / "elsewhere")
    command = ["synthesize", "--method", "lopes", "--metadata", "elsewhere", *FAST]
    assert dfkd(*command, cwd=tmp_path).returncode == 0
    assert dfkd(*command, "--seed", "1", "--out", "other", cwd=tmp_path).returncode == 0
    for file in ("manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"):
        assert (tmp_path / "shards" / file).read_bytes() == (here / "shards" / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (here / "shards" / file).read_bytes()


def test_other_metadata_is_another_run(here, cli, tmp_path):
    shutil.copytree("metadata", tmp_path / "metadata")
    change_record(tmp_path / "metadata", lambda record: record.update(temperature=4.0))
    code, _, err = cli("synthesize", "--method", "lopes", "--metadata", tmp_path / "metadata", *FAST)
    assert (code, "another metadata" in err) == (2, True)
    code, _, err = cli("synthesize", "--method", "lopes", "--metadata", here / "metadata", *FAST)
    assert (code, "already complete" in err) == (0, True)  # where it lies does not matter


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [("lopes", None, "collect-metadata"), ("noise", "metadata", "no metadata"), ("lopes", "nowhere", "nowhere")],
)
def test_metadata_is_given_where_it_is_used_and_nowhere_else(method, given, words, here, cli):
    code, out, err = cli("synthesize", "--method", method, "--out", "x", *(["--metadata", given] if given else []))
    assert (code, out, (here / "x").exists()) == (3 if given == "nowhere" else 2, "", False)
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_no_dataset_can_be_opened_while_images_are_made_from_metadata(here, cli, tmp_path, monkeypatch):
    shutil.copytree("metadata", tmp_path / "data" / "metadata")
    monkeypatch.setenv("DFKD_DATA", str(tmp_path / "data"))
    code, _, err = cli(
        "synthesize", "--method", "lopes", "--metadata", tmp_path / "data" / "metadata", "--out", "x", *FAST
    )
    assert (code != 0, "data-free" in err) == (True, True)
    assert cli("synthesize", "--method", "lopes", "--metadata", "metadata", "--out", tmp_path / "y", *FAST)[0] == 0


def test_that_metadata_was_used_is_said_wherever_the_images_or_the_student_are_shown(here, cli, tmp_path):
    manifest = json.loads(Path("shards/manifest.json").read_text())
    assert (manifest["uses"], manifest["data_free"]) == (["metadata"], True)
    run = json.loads(Path("shards/run.json").read_text())
    assert run["uses"] == ["metadata"]
    assert [p["role"] for p in run["parents"]] == ["teacher", "metadata"]
    for record in (json.loads(Path("student/model.json").read_text())["provenance"],
                   json.loads(Path("student/run.json").read_text())):  # fmt: skip
        assert (record["uses"], record["data_free"]) == (["metadata"], True)

    learn = ("distill", "--steps", 2, "--batch-size", 4)
    assert cli(*learn, "--transfer-set", "noise:8", "--out", tmp_path / "free")[0] == 0
    assert cli(*learn, "--transfer-set", "noise:8", "shards", "--out", tmp_path / "mixed")[0] == 0
    paths = ["student", tmp_path / "free", tmp_path / "mixed", "shards"]
    code, out, err = cli("compare", *paths, "--out", tmp_path / "c", "--json")
    assert code == 0, err
    rows = {row["label"]: row for row in json.loads(out)["sections"][0]["rows"]}
    uses = {"lopes -> response": ["metadata"], "noise:8 + lopes -> response": ["metadata"], "noise:8 -> response": []}
    assert {label: row["uses"] for label, row in rows.items()} == uses | {"teacher": []}
    table = (tmp_path / "c" / "table.md").read_text().splitlines()
    shown = [line.rstrip(" |").split(" | ")[-1] for line in table if "->" in line]
    assert sorted(shown) == ["data-free", "uses metadata", "uses metadata"]
    page = (tmp_path / "c" / "report.html").read_text()
    assert page.count("uses metadata") == 3  # two rows and the images

    code, out, _ = cli("evaluate", "student", "shards", "teacher", "--json")
    assert [result["uses"] for result in json.loads(out)["results"]] == [["metadata"], ["metadata"], []]
    assert "USES" in cli("evaluate", "student")[1]
    for path in ("shards", "student"):
        assert "uses:\n  - metadata" in cli("info", path)[1]
    assert "kind: metadata" in cli("info", "metadata")[1]


# -- grids -------------------------------------------------------------------------------------------------------------


GRID = {
    "seeds": [0, 3],
    "synthesize": {"num_images": 4},
    "student": {"steps": 1, "batch_size": 4},
    "rows": {
        "zskd": {"synthesize": {"method": "zskd", "batch_size": 4, "iterations": 1}},
        "lopes": {"synthesize": {"method": "lopes", "batch_size": 4, "iterations": 1}},
    },
}


def planned(cli, tmp_path, *flags, **changes) -> list[dict]:
    (tmp_path / "grid.yaml").write_text(json.dumps({"grid": GRID | changes}))
    code, out, err = cli("compare", "--recipe", tmp_path / "grid.yaml", *flags, "--dry-run", "--json", "--out", "c")
    assert code == 0, err
    return json.loads(out)["plan"]


def test_a_grid_collects_metadata_for_each_teacher_and_gives_it_to_the_rows_that_use_it(tmp_path, cli):
    metadata = {"num_images": 20, "covariance_units": 100}
    plan = planned(cli, tmp_path, metadata=metadata, teacher={"steps": 1})
    assert [step["config"]["command"] for step in plan[:3]] == ["train-teacher", "collect-metadata", "synthesize"]
    assert sum(step["config"]["command"] == "collect-metadata" for step in plan) == 1
    assert (plan[1]["row"], plan[1]["config"]["teacher"], plan[1]["config"]["num_images"]) == ("", plan[0]["out"], 20)
    given = {(step["row"], step["config"]["metadata"]) for step in plan if step["config"]["command"] == "synthesize"}
    assert given == {("zskd", None), ("lopes", plan[1]["out"])}

    plan = planned(cli, tmp_path, teacher={"steps": 1, "per_seed": True})
    made = {s["seed"]: s for s in plan if s["config"]["command"] == "collect-metadata"}
    teachers = {s["seed"]: s for s in plan if s["config"]["command"] == "train-teacher"}
    used = {s["seed"]: s["config"]["metadata"] for s in plan if s["row"] == "lopes" and "metadata" in s["config"]}
    assert list(made) == list(teachers) == [0, 3]
    assert all(made[seed]["config"]["teacher"] == teachers[seed]["out"] for seed in made)
    assert used == {seed: step["out"] for seed, step in made.items()}
    assert len({step["out"] for step in made.values()}) == 2

    free = planned(cli, tmp_path, teacher={"steps": 1}, rows={"zskd": GRID["rows"]["zskd"]})
    assert not [step for step in free if step["config"]["command"] == "collect-metadata"]


def test_a_grid_runs_with_metadata_made_or_given(here, cli, tmp_path):
    rows = {"lopes": GRID["rows"]["lopes"]}
    for name, metadata in (("made", {"num_images": 20, "covariance_units": 100}), ("given", str(here / "metadata"))):
        grid = GRID | {"seeds": [0], "rows": rows, "metadata": metadata}
        (tmp_path / "grid.yaml").write_text(json.dumps({"grid": grid}))
        command = ["compare", "--recipe", tmp_path / "grid.yaml", "--teacher", "teacher", "--out", tmp_path / name]
        code, _, err = cli(*command)
        assert code == 0, err
        assert (tmp_path / name / "runs" / "metadata").exists() == (name == "made")
        (section,) = json.loads((tmp_path / name / "results.json").read_text())["sections"]
        assert [(row["label"], row["uses"]) for row in section["rows"]] == [("teacher", []), ("lopes", ["metadata"])]
    code, _, err = cli(*command)
    assert (code, "already complete" in err) == (0, True)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"metadata": {"temprature": 3}}, "temperature"),
        ({"metadata": {"teacher": "x"}}, "grid itself"),
        ({"rows": {"metadata": GRID["rows"]["zskd"]}}, "not a name"),
        ({"rows": {"a": {"synthesize": {"method": "lopes", "metadata": "m"}}}}, "grid itself"),
    ],
)
def test_grids_check_metadata_settings(changes, word, tmp_path, cli):
    (tmp_path / "grid.yaml").write_text(json.dumps({"grid": GRID | changes}))
    code, _, err = cli("compare", "--recipe", tmp_path / "grid.yaml", "--dry-run", "--out", tmp_path / "c")
    assert (code, word in err) == (2, True), err
