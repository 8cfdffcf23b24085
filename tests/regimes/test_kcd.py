"""Condensation: rankings and blends against their formulas, whole trainings, kills, and the set that is left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from pipeline import finish, kill_after_saving
from stand_ins import Given, check_interruption, work
from tiny_regimes import CLASSES, SIZE, inputs, linear, network, regime, response
from torch import nn

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.shards import ShardReader
from dfkd_cli.errors import ConfigError
from dfkd_cli.regimes import base, kcd
from dfkd_cli.regimes.kcd import sizes
from dfkd_cli.rounds.trainer import CHECKPOINT

COUNT = 40
PLAIN = {"schedule": "constant", "optimizer": "sgd", "lr": 0.5, "momentum": 0}


def pictures(dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    numbers = torch.randint(256, (COUNT, *SIZE), generator=torch.Generator().manual_seed(3))
    return numbers.to(torch.uint8) if dtype == torch.uint8 else (numbers / 255).to(dtype)


def given(dtype: torch.dtype = torch.uint8) -> Given:
    return Given(pictures(dtype), torch.arange(COUNT) % CLASSES)


def test_sizes_are_those_of_the_released_schedule():
    """Of 50,000 images, six times, to 70 per cent: as its authors print them."""
    assert sizes(50_000, 0.7, 6) == [50_000, 47_500, 45_000, 42_500, 40_000, 37_500, 35_000]
    assert sizes(10, 0.7, 6) == [10] * 7  # a sixth of three is none
    assert sizes(10, 1.0, 2) == [10, 10, 10]
    assert sizes(10, 0.9, 1) == [10, 9] and sizes(100, 0.29, 1)[-1] == 29  # 1 - 0.9 and 29 per cent are less in binary


def test_more_images_may_fall_out_than_are_left(tmp_path):
    learner = regime("kcd", given(), batch_size=5, epochs=1, config={"keep": 0.2, "period": 1}, **PLAIN)
    work(learner, tmp_path)
    (left,) = learner.made().values()
    assert learner.sizes == [COUNT, 8] and len(left) == 8


class Paper:
    """The set by the paper's formulas and the released code's choices, image by image, in float64."""

    def __init__(self, pixels: torch.Tensor, blend: float, reclaim: bool) -> None:
        self.pixels, self.blend, self.reclaim = pixels.numpy().astype(np.float64), blend, reclaim
        self.whole = pixels.dtype == torch.uint8
        self.entropies: dict[int, list[float]] = {i: [] for i in range(len(pixels))}
        self.kept = list(range(len(pixels)))

    def see(self, image: int, logits: oracles.Array) -> None:
        p = oracles.softmax(logits[None])[0]
        self.entropies[image].append(float(-(p * np.log(p)).sum()))

    def rank(self, left: int) -> None:
        def score(image: int) -> float:
            seen = self.entropies[image]
            return np.mean(seen) * len(seen) ** 0.03 if seen else np.inf

        candidates = range(len(self.pixels)) if self.reclaim else self.kept
        order = sorted(candidates, key=lambda image: -score(image))
        lost, kept = order[left : len(self.kept)], order[:left]
        tail = kept[-len(lost) :]
        mixed = [(1 - self.blend * j / len(lost)) * self.pixels[a] + self.blend * j / len(lost) * self.pixels[b]
                 for j, (a, b) in enumerate(zip(tail, lost, strict=True))]  # fmt: skip
        for image, pixels in zip(tail, mixed, strict=True):
            self.pixels[image] = np.floor(pixels + 1e-6) if self.whole else pixels
        self.kept = sorted(kept)


@pytest.mark.parametrize("reclaim", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_training_is_the_papers(dtype, reclaim, tmp_path):
    """Each batch by hand: the student's step, the entropies before it, and rankings between epochs."""
    tau, batch, epochs, period = 3.0, 5, 7, 2
    learner = regime(
        "kcd", given(dtype), objectives=[(0.7, response(temperature=tau, hard=0.2))], batch_size=batch, epochs=epochs,
        config={"period": period, "keep": 0.6, "blend": 0.5, "reclaim": reclaim}, **PLAIN,
    )  # fmt: skip
    assert learner.sizes == [40, 35, 30, 25]
    assert learner.per_epoch == [8, 8, 7, 7, 6, 6, 5]
    batches, original = [], type(learner).loss

    def loss(self, images):
        batches.append((images.positions, images.pixels))
        return original(self, images)

    start, teacher = linear(learner.student), linear(learner.teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(learner), "loss", loss)
        work(learner, tmp_path / "run")
    paper, w, scale = Paper(pictures(dtype), 0.5, reclaim), start, 255 if dtype == torch.uint8 else 1
    steps = iter(batches)
    for epoch in range(epochs):
        if epoch and epoch % period == 0:
            paper.rank(learner.sizes[epoch // period])
        seen: list[int] = []
        for _ in range(len(paper.kept) // batch):
            images, pixels = next(steps)
            np.testing.assert_allclose(pixels.numpy(), paper.pixels[images.numpy()] / scale, atol=1e-6)
            x = inputs(pixels)
            logits, answers = x @ w.T, x @ teacher.T
            for image, row in zip(images.tolist(), logits, strict=True):
                paper.see(image, row)
            soft = oracles.response_gradient(logits, answers, tau)
            hard = (oracles.softmax(logits) - np.eye(CLASSES)[images.numpy() % CLASSES]) / batch
            w = w - 0.5 * 0.7 * (soft + 0.2 * hard).T @ x
            seen += images.tolist()
        assert len(seen) == len({*seen})
        assert {*seen} <= {*paper.kept}
    assert next(steps, None) is None
    np.testing.assert_allclose(linear(learner.student), w, atol=1e-5)
    paper_left = learner.made()["condensed"].all()
    assert learner.store.kept.tolist() == paper.kept  # seven epochs: the third ranking was before the last one
    np.testing.assert_allclose(paper_left.pixels.numpy(), paper.pixels[paper.kept], atol=1e-6)
    assert paper_left.true_labels.tolist() == [image % CLASSES for image in paper.kept]
    left = [{*kept.tolist()} for kept, *_ in learner.store.rankings]
    assert reclaim or left[2] < left[1] < left[0]


def test_what_fell_out_can_return_if_it_may():
    for reclaim in (True, False):
        learner = regime("kcd", given(), batch_size=5, epochs=3, config={"period": 1, "keep": 0.7, "reclaim": reclaim})
        learner.on_fit_start()
        learner.seen[:], learner.entropy[:] = 1, torch.arange(COUNT).double()
        learner.rank()
        assert learner.store.kept.tolist() == list(range(4, COUNT))
        learner.entropy[0], learner.entropy[10] = 99, 0  # as if a later look had made it so
        learner.rank()
        assert (0 in learner.store.kept.tolist()) == reclaim
        assert 10 not in learner.store.kept.tolist()


def test_sure_answers_have_an_entropy_and_no_nan():
    learner = regime("kcd", given(), batch_size=5, epochs=2, config={"period": 1})
    learner.on_fit_start()
    (images,) = learner.draw(0, 1)
    learner.record(images, torch.tensor([[1e4, 0.0, -1e4, 0.0]] * 5))
    assert learner.entropy.isfinite().all()
    assert learner.seen.sum() == 5


def test_images_that_are_all_held_are_blended_in_parts(monkeypatch):
    sets, source = [], given()
    for at_once in (64, 3):
        monkeypatch.setattr(kcd, "AT_ONCE", at_once)
        store = kcd.Store(source)
        store.condense(torch.arange(20), torch.arange(30, 40), torch.arange(10, 20), 0.5)
        sets.append(store.chunk(0).pixels)
    assert torch.equal(*sets) and not torch.equal(sets[0], pictures()[:20])
    assert torch.equal(source.images.pixels, pictures())  # they are not the source's own


def test_memory_is_refused_where_all_images_are_held():
    with pytest.raises(ConfigError, match=r"--memory 0.5: --method kcd .* holds them all"):
        regime("kcd", given(), batch_size=5, epochs=2, memory=0.5)


@pytest.mark.parametrize(
    ("config", "word"), [({"keep": 0.1}, "leaves 4 images"), ({"keep": 0.1, "period": 1}, "no batch of 5")]
)
def test_a_set_that_would_be_no_batch(config, word):
    with pytest.raises(ConfigError, match=word):
        regime("kcd", given(), batch_size=5, epochs=2, config=config)


@pytest.mark.parametrize(("epochs", "said"), [(3, True), (4, False)])
def test_a_training_that_ends_before_the_first_ranking_says_so(epochs, said):
    learner = regime("kcd", given(), batch_size=5, epochs=epochs, config={"period": 3})
    assert (learner.note is not None and "every 3 epochs, and it learns for 3" in learner.note) == said


@pytest.mark.parametrize(("steps", "per_epoch"), [(5, [8]), (16, [8, 6, 4]), (40, [8, 7, 6, 5, 4, 4, 4, 4])])
def test_steps_are_as_many_as_are_given_and_so_is_their_schedule(steps, per_epoch, tmp_path):
    learner = regime("kcd", given(), batch_size=5, steps=steps, config={"period": 1, "keep": 0.5}, schedule="cosine")
    assert (learner.steps, learner.span(0), learner.per_epoch) == (steps, (0, steps), per_epoch)
    rates: list[float] = []  # after each step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(learner), "after_step", lambda self: rates.append(self.optimizers().param_groups[0]["lr"]))
        work(learner, tmp_path)
    falling = 4e-3 * (1 + np.cos(np.pi * np.arange(1, steps + 1) / steps)) / 2
    assert rates == pytest.approx(falling.tolist(), abs=1e-9)


def test_too_few_queries_for_all_blends_are_refused_before_the_first(tmp_path, teacher, cli):
    counted = regime("kcd", given(), batch_size=5, epochs=3, holdout=0.25, config={"period": 1, "keep": 0.6})
    assert (counted.sizes, counted.queries) == ([30, 26, 22, 18], 40 + 3 * 3)
    learn = ("--transfer-set", "noise:40", "--batch-size", 5, "--epochs", 3, "--period", 1, "--keep", 0.6)
    args = ("distill", "--teacher", teacher, "--method", "kcd", *learn, "--holdout", 0.25, "--answers", "label")
    for more in (["--dry-run"], []):
        code, _, err = cli(*args, "--queries", 48, "--out", tmp_path / "poor", *more)
        assert (code, "--queries 48: 49 images are to be" in err, err.count("\n")) == (2, True, 1), err
    assert not (tmp_path / "poor" / "queries").exists()
    code, _, err = cli(*args, "--queries", 49, "--out", tmp_path / "rich")
    assert code == 0, err
    assert 40 < json.loads((tmp_path / "rich" / "run.json").read_text())["metrics"]["queries"] <= 49


def test_no_steps_condense_nothing(tmp_path, teacher, cli):
    learner = regime("kcd", given(), batch_size=50, steps=0)
    assert (learner.sizes, learner.rounds, learner.made()) == ([COUNT], 0, {})
    args = ("--transfer-set", "noise:20", "--student", "w8a8:", "--steps", "0", "--out", tmp_path / "copy")
    for more in (["--dry-run"], []):
        code, _, err = cli("distill", "--teacher", teacher, "--method", "kcd", *args, *more)
        assert code == 0, err
    assert not (tmp_path / "copy" / "condensed").exists()


@pytest.mark.parametrize(("batch", "fits"), [(100, True), (101, False)])
def test_a_dry_run_asks_whether_enough_is_kept_of_all_images(teacher, cli, batch, fits):
    learn = ("--transfer-set", "noise:400", "--holdout", 0, "--batch-size", batch, "--epochs", 1)
    args = ("--method", "kcd", "--keep", 0.25, "--period", 1, "--dry-run")
    code, _, err = cli("distill", "--teacher", teacher, *learn, *args)
    assert (code, "--keep 0.25 leaves 100 images, no batch of 101" in err) == ((0, False) if fits else (2, True)), err


def test_an_interruption_between_rankings_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "STEPS_PER_ROUND", 9)

    def run(path, *callbacks):
        torch.manual_seed(3)
        student = network(1, nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3))
        learner = regime("kcd", given(), student, batch_size=5, epochs=6, noise=0.1, config={"period": 1, "keep": 0.5})
        return work(learner, path, *callbacks)

    whole, resumed = check_interruption(run, tmp_path)
    for (kept, *_), (same, *_) in zip(whole.store.rankings, resumed.store.rankings, strict=True):
        assert torch.equal(kept, same)
    assert torch.equal(whole.store.images.pixels, resumed.store.images.pixels)
    assert torch.equal(whole.entropy, resumed.entropy)


def test_a_killed_condensation_ends_alike_and_its_set_teaches_others(teacher, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    common = ("--teacher", str(teacher), "--batch-size", "20", "--device", "cpu")
    command = [
        "distill",
        "--method",
        "kcd",
        "--transfer-set",
        "real:400",
        "--epochs",
        "30",
        "--period",
        "5",
        "--holdout",
        "0",
        *common,
    ]
    finish([*command, "--out", "whole"], tmp_path)
    kill_after_saving([*command, "--out", "killed"], tmp_path, tmp_path / "killed" / CHECKPOINT)
    finish([*command, "--out", "killed"], tmp_path)
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.safetensors"))
    assert len(files) == 2
    for file in [*files, "condensed/manifest.json"]:
        assert sha256_file(tmp_path / "whole" / file) == sha256_file(tmp_path / "killed" / file), file
    reader = ShardReader(tmp_path / "whole" / "condensed")
    reader.verify()
    assert (sum(reader.sizes), reader.manifest["data_free"], reader.dtype) == (280, False, torch.uint8)
    learn = ("distill", "--transfer-set", "whole/condensed", *common, "--steps", "5", "--out", "taught")
    code, _, err = cli(*learn)
    assert code == 0, err
    code, out, err = cli("evaluate", "whole/condensed", "--teacher", teacher, "--json")
    assert code == 0, err
    assert json.loads(out)["ok"]
    info = json.loads(cli("info", "whole/condensed", "--json")[1])["info"]
    assert "unverified" not in info
    assert [parent["role"] for parent in info["lineage"]] == ["teacher", "transfer-set"]
    code, out, err = cli("compare", "taught", "--json")
    assert code == 0, err
    seconds = json.loads(out)["sections"][0]["rows"][1]["seconds"]
    took = [json.loads(Path(name, "run.json").read_text())["seconds"] for name in ("whole", "taught")]
    assert (seconds["synthesis"]["mean"], seconds["training"]["mean"]) == (took[0], took[1])
