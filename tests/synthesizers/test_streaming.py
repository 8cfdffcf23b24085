"""Generators trained with a student in the loop: their terms against the papers' formulas, the loop, the artifacts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import oracles
import pytest
import stand_ins
import torch
from tiny_synthesizers import synthesizer
from torch import nn

from dfkd_cli import catalog
from dfkd_cli.artifacts.shards import ShardWriter
from dfkd_cli.config import build
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import load_model
from dfkd_cli.models.generators import Generator, Generators, load_generators, save_generators
from dfkd_cli.objectives.response import soft_loss
from dfkd_cli.stages.synthesize import rare_classes
from dfkd_cli.stages.training import fresh
from dfkd_cli.synthesizers.base import Look, SynthesisTask
from dfkd_cli.synthesizers.dafl import information, one_hot
from dfkd_cli.synthesizers.dfq import answer_entropy
from dfkd_cli.synthesizers.pooled import agreed_divergence
from dfkd_cli.synthesizers.terms import mean_answer_entropy
from dfkd_cli.trust import Code

METHODS = catalog.entries("synthesizers")
RNG = np.random.default_rng(0)
SMALL = ["--student", "lenet5-half", "--num-images", "10", "--batch-size", "4", "--latent", "5", "--width", "0.05"]


@pytest.fixture
def make_method(tmp_path, make_teacher):
    """``make_method(name, **values)``: a method with a small generator, on a random teacher."""

    def make(name: str, **values):
        teacher, _ = load_model(make_teacher("resnet8" if "batchnorm" in METHODS[name].needs else "lenet5"))
        config = build(METHODS[name].config, {"batch_size": 4, "latent": 5, "width": 0.05, "steps": 2, **values})
        info = teacher.info
        head = {"shape": list(info.input_size), "dtype": "float16", "num_classes": 10, "teacher": {"sha256": "0"}}
        student = fresh(dataclasses.replace(info, spec="lenet5-half"), "student", 0, Code())
        task = SynthesisTask(teacher, 4, 0, ShardWriter(tmp_path, head, 1), student=student)
        return METHODS[name].load()(task, config)

    return make


def softmax(logits: np.ndarray) -> np.ndarray:
    exponential = np.exp(logits - logits.max(1, keepdims=True))
    return exponential / exponential.sum(1, keepdims=True)


# -- terms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (7, 10), (32, 100)])
def test_terms_of_dafl_and_dfq_are_the_papers(shape):
    logits = 3 * RNG.normal(size=shape)
    p = softmax(logits)
    given = torch.from_numpy(logits)
    np.testing.assert_allclose(one_hot(given), np.mean(-np.log(p.max(1))))
    mean = p.mean(0)
    np.testing.assert_allclose(information(given), (mean * np.log10(mean)).sum())
    np.testing.assert_allclose(answer_entropy(given), (-(p * np.log(p)).sum(1)).mean())
    np.testing.assert_allclose(mean_answer_entropy(given), -(mean * np.log(mean)).sum())


def test_information_is_smallest_for_even_answers():
    even, one_class = 9 * torch.eye(4), torch.tensor([[9.0, 0, 0, 0]]).expand(4, -1)
    assert information(even) < information(one_class)
    torch.testing.assert_close(information(even), -torch.tensor(4.0).log10())  # -1 for ten classes


def test_terms_survive_sure_answers():
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = one_hot(logits) + information(logits) + answer_entropy(logits) + agreed_divergence(2 * logits, logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_distances(make_method):
    student, teacher = (torch.from_numpy(2 * RNG.normal(size=(6, 10))) for _ in range(2))
    p, q = softmax(teacher.numpy()), softmax(student.numpy())
    divergence = (p * np.log(p / q)).sum(1).mean()
    np.testing.assert_allclose(make_method("dfq").distance(student, teacher), divergence)
    np.testing.assert_allclose(make_method("zskt").distance(student, teacher), divergence / 10)
    np.testing.assert_allclose(
        make_method("dfad").distance(student, teacher), np.abs((student - teacher).numpy()).mean()
    )
    np.testing.assert_allclose(soft_loss(student, teacher, "kl", 1), divergence)


@pytest.mark.parametrize(("name", "factor"), [("dfq", 1.0), ("zskt", 0.25)])
def test_generator_seeks_the_students_distance_at_the_same_temperature(name, factor, tmp_path):
    method = synthesizer(name, tmp_path, student_temperature=3.0, **({"attention": 0} if name == "zskt" else {}))
    images, teacher = torch.rand(6, 1, 3, 3), torch.from_numpy(4 * RNG.normal(size=(6, 4))).float()
    student = method.student(images).detach().double().numpy()
    term = method.generator_terms(Look(images, teacher))["adversarial"].item()
    assert term == pytest.approx(-factor * oracles.response(student, teacher.double().numpy(), "kl", 3), rel=1e-4)


# -- the generator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 28, 28), (3, 33, 18), (3, 64, 64), (3, 100, 40)])
@pytest.mark.parametrize("end", ["tanh", "normal", "sigmoid"])
def test_generators_make_images_of_the_teachers_size(size, end):
    channels = size[0]
    info = ModelInfo("x", 10, size, (0.3, 0.4, 0.5)[:channels], (0.2, 0.3, 0.4)[:channels])
    torch.manual_seed(0)
    images = Generator(info, 7, end, width=0.1)(torch.randn(9, 7))
    assert images.shape == (9, *size)
    if end == "sigmoid":
        assert images.min() >= 0
        assert images.max() <= 1
    else:  # BatchNorm's output in the space of the teacher's net
        torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor(info.mean), atol=1e-4, rtol=0)
        torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(info.std), atol=1e-3, rtol=0)


def test_methods_take_their_papers_end_or_another(make_method):
    ends = {name: make_method(name).generators[0].end for name in ("dafl", "dfad", "dfq", "zskt")}
    assert ends == {"dafl": "tanh", "dfad": "tanh", "dfq": "tanh", "zskt": "normal"}
    assert make_method("zskt", end="sigmoid", generators=2).generators[1].end == "sigmoid"


def test_a_sigmoid_starts_at_the_teachers_mean():
    info = ModelInfo("x", 10, (3, 8, 8), (0.12, 0.0, 1.0), (0.2, 1.0, 1.0))
    generator = Generator(info, 3, "sigmoid", width=0.1)
    torch.nn.init.zeros_(generator.body[-1].weight)
    torch.nn.init.zeros_(generator.body[-1].bias)
    images = generator(torch.randn(4, 3))
    torch.testing.assert_close(images, torch.tensor((0.12, 0.5, 0.5)).view(1, 3, 1, 1).expand(4, 3, 8, 8))


def test_width_of_the_paper():
    parameters = sum(
        p.numel() for p in Generator(ModelInfo("x", 10, (1, 32, 32), (0.0,), (1.0,)), 100, "tanh").parameters()
    )
    linear, norm, first, second, last = 101 * 128 * 64, 2 * 128, 128 * 9 * 128 + 128, 128 * 9 * 64 + 64, 64 * 9 + 1
    assert parameters == linear + norm + first + 2 * 128 + second + 2 * 64 + last


def test_large_images_are_doubled_more_often():
    info = ModelInfo("x", 10, (3, 224, 224), (0.3,) * 3, (0.2,) * 3)
    generator = Generator(info, 2, "sigmoid", width=0.05)
    assert generator.linear.out_features == 6 * 14 * 14  # 0.05 * 128 maps
    assert [layer.out_channels for layer in generator.body if isinstance(layer, torch.nn.Conv2d)] == [6, 3, 3, 3, 3]


def test_a_generator_directory_gives_the_same_images(tmp_path):
    info = ModelInfo("x", 10, (3, 8, 8), (0.3,) * 3, (0.2,) * 3)
    torch.manual_seed(0)
    generators = Generators(info, 5, "tanh", 0.1, 0.8, 3).to(memory_format=torch.channels_last)
    provenance = {"teacher": "0", "num_images": 8, "config": {"batch_size": 4}}
    save_generators(tmp_path, generators, provenance)
    loaded, record = load_generators(tmp_path)
    latents = torch.randn(4, 5)
    torch.testing.assert_close(loaded(latents), generators(latents))
    assert record["provenance"] == provenance
    record_file = tmp_path / "generator.json"
    whole = record_file.read_text()
    for schema, hint in ((2, "make it again"), (4, "update dfkd")):
        record_file.write_text(whole.replace('"schema": 3', f'"schema": {schema}'))
        with pytest.raises(ArtifactError, match=f"schema {schema}") as caught:
            load_generators(tmp_path)
        assert caught.value.hint == hint
    for strange in ({"num_images": 10**12}, {"num_images": "8"}, {"config": {}}, {"teacher": 3}):
        record_file.write_text(json.dumps(json.loads(whole) | {"provenance": provenance | strange}))
        with pytest.raises(ArtifactError, match=f"generator.json is damaged: provenance.{next(iter(strange))}"):
            load_generators(tmp_path)
    with_more = json.loads(whole)
    record_file.write_text(json.dumps(with_more | {"settings": with_more["settings"] | {"later": 1}}))
    torch.testing.assert_close(load_generators(tmp_path)[0](latents), generators(latents))
    record_file.write_text(whole)
    weights = tmp_path / "generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="damaged"):
        load_generators(tmp_path)


def test_samples_are_of_all_generators():
    info = ModelInfo("x", 10, (1, 8, 8), (0.3,), (0.2,))
    generators = Generators(info, 5, "normal", 0.1, count=3)
    latents = torch.randn(12, 5)  # rows 0 to 3 are of the first generator, and so on
    everything = generators(latents)
    torch.testing.assert_close(generators.sample(latents, 12), everything)
    torch.testing.assert_close(generators.sample(latents, 4), everything[[0, 3, 6, 9]])


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_what_lasts_is_said_once_and_recorded(tmp_path, make_teacher, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--teacher", str(make_teacher("lenet5")), *SMALL, "--steps", "41"]  # a random teacher is sure of nothing
    code, _, err = cli("synthesize", "--method", "dfad", *small)
    assert code == 0, err
    assert err.count("warning: round 2: the teacher is sure of none") == 1  # it has lasted since round 0
    assert len(json.loads(Path("shards", "run.json").read_text())["concerns"]) == 1
    assert cli("distill", *small[:2], "--steps", "1", "--student", "lenet5-half")[0] == 0
    assert cli("compare", "student", *small[:2], "--out", "c")[0] == 0
    assert "they are noise to it" in Path("c", "report.html").read_text()


def test_what_a_run_leaves_can_be_used(tmp_path, make_teacher, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = ["--teacher", str(make_teacher("lenet5"))]
    assert cli("synthesize", "--method", "dfad", *teacher, *SMALL, "--steps", "3", "--generators", "2")[0] == 0
    small = ["--student", "lenet5-half", "--steps", "2", "--batch-size", "5"]
    for transfer_set in ("shards", "shards/generator"):
        code, _, err = cli(
            "distill", *teacher, "--transfer-set", transfer_set, *small, "--out", f"from-{transfer_set[-6:]}"
        )
        assert code == 0, err
        run = json.loads(Path(f"from-{transfer_set[-6:]}", "run.json").read_text())
        assert run["data_free"]
        assert run["num_images"] == 10
    code, out, err = cli("evaluate", "shards/student", *teacher, "--json")
    assert code == 0, err
    assert 0 <= json.loads(out)["results"][0]["agreement"] <= 1
    lines = [json.loads(cli("info", path, "--json")[1])["info"]["lineage"] for path in ("shards", "shards/generator")]
    assert lines[0] == lines[1] and [parent["role"] for parent in lines[0]] == ["teacher"]
    other = ["--teacher", str(make_teacher("resnet8"))]
    code, _, err = cli("distill", *other, "--transfer-set", "shards/generator", *small, "--out", "x")
    assert code == 3
    assert "another teacher" in err


@pytest.mark.parametrize(
    ("histogram", "said"),
    [
        ([100] * 10, None),
        ([107, 3] * 5, None),  # a twentieth of an even share is just enough of 550 images: 2.75
        ([197, 3] * 5, "5 of 10 classes have hardly any of the 1000 images (b: 3, d: 3, f: 3, h: 3, j: 3)"),
        ([250] * 4 + [0] * 6, "6 of 10 classes have hardly any of the 1000 images (e: 0, f: 0, g: 0, h: 0, i: 0, ...)"),
        ([995, 0, 5], "2 of 3 classes have hardly any of the 1000 images (b: 0, c: 5)"),
        ([0] * 5 + [38] * 5, "5 of 10 classes have hardly any of the 190 images (a: 0, b: 0, c: 0, d: 0, e: 0)"),
        ([0, 1] * 5, None),  # of so few images a class may have none by chance: 6.1 of ten
        ([0, 0, 0] + [3] * 7, None),  # 1.2 by chance, and three deviations above
        ([20] + [0] * 9, "9 of 10 classes have hardly any of the 20 images (b: 0, c: 0, d: 0, e: 0, f: 0, ...)"),
    ],
)
def test_classes_that_hardly_any_image_has_are_named(histogram, said):
    concern = rare_classes(histogram, "abcdefghij"[: len(histogram)])
    assert concern == (said and f"{said}: a student may miss them")


def test_a_run_that_misses_classes_says_so(tmp_path, make_teacher, cli):
    teacher = ["--teacher", str(make_teacher("lenet5")), "--device", "cpu"]  # noise is all one to a random teacher
    code, _, err = cli("synthesize", "--method", "noise", *teacher, "--num-images", "300", "--out", tmp_path / "s")
    assert code == 0, err
    record = json.loads((tmp_path / "s" / "run.json").read_text())
    [concern] = record["concerns"]
    rare = sum(images < 1.5 for images in record["metrics"]["class_histogram"])
    assert concern.startswith(f"{rare} of 10 classes have hardly any of the 300 images (")
    assert f"warning: {concern}" in err
    again = cli("synthesize", "--method", "noise", *teacher, "--num-images", "300", "--out", tmp_path / "s", "--json")
    assert f"warning: {concern}" in again[2]
    assert json.loads(again[1])["concerns"] == [concern]


@pytest.mark.parametrize(
    ("classes", "batch", "seen", "word"),
    [
        (10, 50, range(10), None),
        (10, 50, [3], "variety"),
        (10, 50, [3, 4], "variety"),
        (10, 50, [3, 4, 5], None),
        (2, 50, [0, 1], None),
        (2, 50, [1], "variety"),
        (1000, 20, range(20), None),  # there cannot be more than there are images
        (1000, 20, range(3), "variety"),
    ],
)
def test_collapse_is_told_from_variety(classes, batch, seen, word, tmp_path):
    """A teacher whose answers are the images' own pixels, and how sure it is."""
    info = ModelInfo("pixels", classes, (1, 1, classes), (0.0,), (1.0,))
    teacher = Classifier(nn.Flatten(), info)
    student = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(classes, classes)), info)
    method = stand_ins.synthesizer("adaptive-deepinversion", tmp_path, teacher, {}, student=student)
    answers = torch.tensor(list(seen))[torch.arange(batch) % len(seen)]
    for sure, expected in ((30.0, word), (0.0, word or "confidence")):
        pixels = sure * torch.eye(classes)[answers] + 1e-3 * torch.eye(classes)[answers]
        health = method.health(pixels.view(batch, 1, 1, classes), pixels)
        measures = {name: float(value) for name, value in health.items()}
        concern = method.concern(measures)
        assert (concern is None) if expected is None else (f"({expected})" in concern), (sure, measures)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("zskt", ["--precision", "bf16"]),  # gradients are cut, which fused optimisers refuse in mixed precision
        ("dfq", ["--generators", "3", "--students", "2", "--batch-size", "4"]),  # parts of 2, 1 and 1
        ("dfad", ["--generators", "4", "--dry-run"]),  # which makes batches of 2
        ("dfad", ["--adversarial", "0"]),  # nothing for the generator to learn
        ("zskt", ["--adversarial", "0", "--attention", "0"]),
    ],
)
def test_settings_at_the_edge(name, more, tmp_path, make_teacher, cli):
    teacher = make_teacher("resnet8" if name == "dfq" else "lenet5")
    code, _, err = cli(
        "synthesize", "--method", name, "--teacher", teacher, *SMALL, "--steps", "2", *more, "--out", tmp_path / "s"
    )
    assert code == 0, err


def test_every_generator_needs_an_image(tmp_path, make_teacher, cli):
    teacher, out = ["--teacher", make_teacher("lenet5")], tmp_path / "s"
    few = ["--generators", "5", "--batch-size", "4", "--out", out]
    code, _, err = cli("synthesize", "--method", "dfad", *teacher, *SMALL, *few)
    assert code == 2, err
    assert "--generators 5: more than the 4 images of a step" in err


def test_networks_of_other_stages_are_paired_by_their_taps(make_method):
    names = {"taps": ["stage1"], "teacher_taps": ["stage2"]}
    made = make_method("zskt", **names)
    assert made.maps.pairs == (("stage1", "stage2"),)
    assert list(made.student_taps[0]) == ["stage1"] and list(made.teacher_taps) == ["stage2"]


def test_dafl_takes_features_by_any_name_of_one_place(make_method):
    assert list(make_method("dafl", features="last").taps) == ["stage2"]
    with pytest.raises(ConfigError, match="--features stages: more than one place -- give one of stage1, stage2"):
        make_method("dafl", features="stages")


@pytest.mark.parametrize("features", ["last", "penultimate", "stage1"])
def test_dafls_activation_is_that_of_its_place(features, make_method):
    made = make_method("dafl", features=features)
    with made.looking() as show:
        look = show(torch.rand(4, *made.teacher.info.input_size))
    (values,) = look.features.values()
    np.testing.assert_allclose(made.generator_terms(look)["activation"].item(), -values.abs().mean().item(), rtol=1e-6)


CURVED = ["synthesize", "--method", "dfad", *SMALL, "--steps", "41", "--out", "s", "--device", "cpu"]  # three rounds


@pytest.fixture(scope="module")
def curved(tmp_path_factory, make_teacher, session_cli) -> Path:
    """Where a run has left its curves."""
    place = tmp_path_factory.mktemp("curved")
    shutil.copytree(make_teacher("lenet5"), place / "teacher")
    assert session_cli(place, *CURVED) == 0
    return place


@pytest.mark.parametrize("left", [None, "", "a,b\n1,2\n", "round,soft\nx,1\n", "round,soft\n1,1\n"])
def test_lost_curves_are_made_again(left, curved, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(shutil.copytree(curved, tmp_path, dirs_exist_ok=True))
    curves = Path("s", "metrics.csv")
    whole = curves.read_bytes()
    curves.unlink() if left is None else curves.write_text(left)
    code, _, err = cli(*CURVED)
    assert code == 0, err
    assert err.count("what earlier rounds wrote is damaged or gone; all rounds are done again") == 1
    assert curves.read_bytes() == whole


def test_networks_that_are_not_finite_are_no_result(tmp_path, make_teacher, cli):
    """The last step of all is followed by no loss that would show it."""
    teacher, out = ["--teacher", make_teacher("resnet8")], tmp_path / "s"
    last = ["--num-images", "4", "--iterations", "1", "--student-steps", "1", "--lr", "1e38", "--warmup-share", "0"]
    code, _, err = cli("synthesize", "--method", "fast-dfkd", *teacher, *SMALL, *last, "--out", out)
    assert code == 4, err
    assert "generator.safetensors: the weights are not finite" in err
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
