"""Active Mixup: pairs, shares and choices against their formulas, whole trainings, kills, and the set that is left."""

from __future__ import annotations

import itertools
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
from dfkd_cli.models.black_box import BlackBox
from dfkd_cli.options import MEASURED_AT_ONCE
from dfkd_cli.regimes import active_mixup, base
from dfkd_cli.regimes.active_mixup import Mixed, pairs_of
from dfkd_cli.rounds.trainer import CHECKPOINT

COUNT = 9
PLAIN = {"schedule": "step", "milestones": (0.5,), "optimizer": "sgd", "lr": 0.5, "momentum": 0.9, "nesterov": False}
SHARES = [0.30, 0.34, 0.38, 0.42, 0.46, 0.50, 0.54, 0.58, 0.62, 0.66, 0.70]


def pictures(dtype: torch.dtype = torch.uint8, count: int = COUNT) -> torch.Tensor:
    numbers = torch.randint(256, (count, *SIZE), generator=torch.Generator().manual_seed(3))
    return numbers.to(torch.uint8) if dtype == torch.uint8 else (numbers / 255).to(dtype)


def mixup(source, student=None, *, seen: str = "probabilities", config=None, **training):
    inner = network(2)
    teacher = BlackBox(inner, inner.info, seen)
    return regime("active-mixup", source, student, config=config or {}, teacher=teacher, **training)


@pytest.mark.parametrize(
    ("count", "pairs"), [(1000, 499_000), (500, 124_500), (2000, 1_998_000), (7, 21), (8, 24), (2, 0)]
)
def test_pairs_are_those_of_the_released_code(count, pairs):
    """Numbers of pairs as its functions make them; each pair once, and none of an image with itself."""
    assert pairs_of(count) == pairs
    if count < 10:
        mixed = Mixed(torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1))
        first, second = mixed.partners(torch.arange(pairs))
        made = {frozenset((int(a), int(b))) for a, b in zip(first, second, strict=True)}
        assert len(made) == pairs
        assert all(len(pair) == 2 for pair in made)
        distances = {min((a - b) % count, (b - a) % count) for a, b in map(tuple, made)}
        assert distances == {*range(1, (count - 1) // 2 + 1)}


class Paper:
    """The set by the paper's formulas and the released code's choices, pair by pair, in float64."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.whole, self.top = pixels.dtype == torch.uint8, 255 if pixels.dtype == torch.uint8 else 1
        self.images = [image / self.top for image in pixels.numpy().astype(np.float64)]
        half = (len(pixels) - 1) // 2
        self.candidates = [(i, (i + s) % len(pixels)) for s in range(1, half + 1) for i in range(len(pixels))]
        self.set = [*self.images]

    def grow(self, w: oracles.Array, count: int) -> list[tuple[int, int, float]]:
        scored = []
        for i, j in self.candidates:
            confidences = []
            for share in SHARES:
                x = share * self.images[i] + (1 - share) * self.images[j]
                flat = np.append((x.ravel() - 0.2) / 0.5, 1)
                confidences.append(oracles.softmax((w @ flat)[None])[0].max())
            scored.append((min(confidences), (i, j), SHARES[int(np.argmin(confidences))]))
        best = sorted(scored)[:count]
        for _, (i, j), share in best:
            x = share * self.images[i] + (1 - share) * self.images[j]
            self.set.append(np.minimum(np.floor(256 * x), 255) / 255 if self.whole else x)
            self.candidates.remove((i, j))
        return [(*pair, share) for _, pair, share in best]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("seen", ["probabilities", "label"])
def test_a_training_is_the_papers(dtype, seen, tmp_path):
    """Each batch by hand: every training from the same start, with momentum and rates of its own; choices between."""
    batch, epochs, config = 3, 4, {"rounds": 2, "mixups": 5}
    learner = mixup(
        Given(pictures(dtype)), objectives=[(0.7, response(temperature=1.0))], batch_size=batch, epochs=epochs,
        config=config, seen=seen, **PLAIN,
    )  # fmt: skip
    assert learner.sizes == [9, 14, 19]
    assert (learner.queries, learner.starts) == (19, [0, 12, 28, 52])
    batches, original = [], type(learner).loss

    def loss(self, images):
        batches.append((self.current, images.positions, images.pixels))
        return original(self, images)

    start, teacher = linear(learner.student), linear(network(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(learner), "loss", loss)
        work(learner, tmp_path / "run")
    paper, steps, w = Paper(pictures(dtype)), iter(batches), start
    for training, size in enumerate(learner.sizes):
        if training:
            chosen = paper.grow(w, 5)
            pairs, shares = learner.mixed.added[training - 1]
            ours = [(int(p) % COUNT, (int(p) % COUNT + int(p) // COUNT + 1) % COUNT) for p in pairs]
            assert ours == [(i, j) for i, j, _ in chosen]
            np.testing.assert_allclose(shares.numpy(), [share for *_, share in chosen], atol=1e-12)
        w, velocity, per_epoch = start, np.zeros_like(start), size // batch
        for step in range(epochs * per_epoch):
            which, positions, pixels = next(steps)
            assert which == training
            expected = np.stack([paper.set[position] for position in positions.tolist()])
            np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)
            x = inputs(pixels)
            p = oracles.softmax(x @ teacher.T)
            if seen == "label":
                p = 0.9 * np.eye(CLASSES)[p.argmax(1)] + 0.1 / CLASSES
            gradient = 0.7 * ((oracles.softmax(x @ w.T) - p) / batch).T @ x
            velocity = 0.9 * velocity + gradient
            w = w - (0.5 if step < epochs * per_epoch / 2 else 0.05) * velocity
    assert next(steps, None) is None
    np.testing.assert_allclose(linear(learner.student), w, atol=1e-4)
    left = learner.made()["asked"].all()
    np.testing.assert_allclose(left.pixels.double().numpy() / paper.top, np.stack(paper.set), atol=1e-6)
    assert left.labels is None
    assert learner.teacher.ledger.asked == 19


def test_white_stays_white_and_eight_bits_are_kept():
    white = Mixed(torch.full((3, 1, 2, 2), 255, dtype=torch.uint8))
    assert (white.mixtures(torch.arange(3), torch.full((3,), 0.3, dtype=torch.float64)).pixels == 255).all()
    for value in range(256):
        same = Mixed(torch.full((3, 1, 1, 1), value, dtype=torch.uint8))
        assert (same.mixtures(torch.arange(3), torch.full((3,), 0.42, dtype=torch.float64)).pixels == value).all()


def test_mixtures_are_made_in_parts_and_held_in_chunks_however_many_there_are(monkeypatch):
    def mixed() -> Mixed:
        source = Mixed(pictures())
        for pairs in (torch.arange(4), torch.empty(0, dtype=torch.int64), torch.arange(4, 21)):
            source.add(pairs, torch.linspace(0.3, 0.7, len(pairs), dtype=torch.float64))
        return source

    whole, mixing = mixed().all().pixels, []
    monkeypatch.setattr(active_mixup, "AT_ONCE", 3)
    monkeypatch.setattr(active_mixup, "CHUNK", 8)
    source, partners = mixed(), Mixed.partners
    monkeypatch.setattr(Mixed, "partners", lambda self, pairs: mixing.append(len(pairs)) or partners(self, pairs))
    assert [len(source.chunk(index).pixels) for index in range(4)] == source.sizes == [8, 8, 8, 6]
    assert torch.equal(source.all().pixels, whole)
    assert max(mixing) == 3


def test_a_student_scores_few_mixtures_at_once(tmp_path):
    """No more than it learns from, or as few as there is room for in any case."""
    learner = mixup(Given(pictures()), batch_size=4, accumulate=2, epochs=1, config={"rounds": 1, "mixups": 5})
    shown: list[int] = []
    learner.student.register_forward_pre_hook(lambda _, args: shown.append(len(args[0])))
    work(learner, tmp_path)
    assert max(shown) == MEASURED_AT_ONCE[0]


@pytest.mark.parametrize(
    "config, said",
    [
        ({"rounds": 1, "mixups": 5, "candidates": 3}, "--candidates 3: no more are asked about in a round"),
        ({"rounds": 9, "mixups": 5}, "pairs, no more can be asked about"),
        ({"rounds": 1, "mixups": 3, "candidates": 3}, None),
    ],
)
def test_what_limits_the_mixtures_is_said(config, said):
    note = mixup(Given(pictures()), batch_size=3, epochs=1, config=config).note
    assert note is None if said is None else said in note


def test_some_candidates_are_drawn_without_those_that_are_taken(tmp_path):
    learner = mixup(Given(pictures()), batch_size=3, epochs=1, config={"rounds": 2, "mixups": 6, "candidates": 10})
    work(learner, tmp_path)
    (first, _), (second, _) = learner.mixed.added
    assert not {*first.tolist()} & {*second.tolist()}
    drawn = [learner._candidates(number) for number in (0, 1)]
    assert [len(pairs) for pairs in drawn] == [10, 10]
    assert not torch.isin(torch.cat(drawn), torch.cat([first, second])).any()
    assert drawn[0].tolist() != drawn[1].tolist()
    assert drawn[0].tolist() == sorted({*drawn[0].tolist()})


def test_few_images_make_few_pairs(tmp_path):
    learner = mixup(Given(pictures(count=5)), batch_size=2, epochs=1, config={"rounds": 3, "mixups": 7})
    assert learner.sizes == [5, 12, 15, 15]
    assert "5 images make 10 pairs" in learner.note
    work(learner, tmp_path)
    chosen = [pairs.tolist() for pairs, _ in learner.mixed.added]
    assert sorted(itertools.chain(*chosen)) == [*range(10)]


def test_no_steps_ask_about_no_mixtures(tmp_path, teacher, cli):
    learner = mixup(Given(pictures()), batch_size=3, steps=0)
    assert (learner.queries, learner.rounds, learner.made()) == (COUNT, 0, {})
    args = ("--transfer-set", "noise:20", "--student", "w8a8:", "--steps", "0", "--out", tmp_path / "copy")
    for more in (["--dry-run"], ["--queries", "20"]):
        asked = ("--method", "active-mixup", "--answers", "label")
        code, _, err = cli("distill", "--teacher", teacher, *asked, *args, *more)
        assert code == 0, err
    assert not (tmp_path / "copy" / "asked").exists()


@pytest.mark.parametrize("stopped", [False, True])
def test_each_training_has_the_rates_of_its_own_length(stopped, tmp_path, monkeypatch):
    """The first is too short for a warm-up, the second is not, also where that is continued."""
    rates, settings = [], {"warmup": 0.2, "schedule": "cosine", "optimizer": "sgd", "lr": 0.5, "epochs": 2}
    monkeypatch.setattr(base, "STEPS_PER_ROUND", 5)

    def run(path, *callbacks):
        learner = mixup(Given(pictures()), batch_size=5, config={"rounds": 1, "mixups": 27}, **settings)
        step = learner.after_step
        monkeypatch.setattr(
            learner, "after_step", lambda: (rates.append(learner.optimizers().param_groups[0]["lr"]), step())
        )
        return work(learner, path, *callbacks)

    if stopped:
        check_interruption(run, tmp_path)
        rates[:] = rates[-14 - 2 :]
    else:
        run(tmp_path / "run")
    first, second = 2, 14
    assert len(rates) == first + second
    alone = []
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    learner = mixup(Given(pictures()), batch_size=5, config={"rounds": 1, "mixups": 27}, **settings)
    schedule = learner.schedule(optimizer, 0, second)
    for _ in range(second):
        optimizer.step()
        schedule.step()
        alone.append(optimizer.param_groups[0]["lr"])
    assert rates[first:] == pytest.approx(alone, abs=1e-9)


def test_an_interruption_between_or_within_trainings_changes_nothing(tmp_path, monkeypatch):
    for steps in (4, 7):  # two rounds end within the first training, or within the second
        monkeypatch.setattr(base, "STEPS_PER_ROUND", steps)

        def run(path, *callbacks):
            torch.manual_seed(3)
            student = network(1, nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3))
            config = {"rounds": 2, "mixups": 6, "candidates": 20}
            learner = mixup(
                Given(pictures()), student, batch_size=3, epochs=3, noise=0.1, config=config, optimizer="adam"
            )
            return work(learner, path, *callbacks)

        whole, resumed = check_interruption(run, tmp_path / str(steps))
        for kept, same in zip(whole.mixed.added, resumed.mixed.added, strict=True):
            assert torch.equal(kept[0], same[0])
            assert torch.equal(kept[1], same[1])


def test_a_killed_run_ends_alike_and_its_set_teaches_others(teacher, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    few = ("--transfer-set", "real:100", "--rounds", "2", "--mixups", "60", "--candidates", "300")
    shared = ("--teacher", str(teacher), "--batch-size", "20", "--device", "cpu")
    command = ["distill", "--method", "active-mixup", "--answers", "top2", *few, *shared, "--epochs", "30"]
    finish([*command, "--out", "whole"], tmp_path)
    kill_after_saving([*command, "--out", "killed"], tmp_path, tmp_path / "killed" / CHECKPOINT)
    finish([*command, "--out", "killed"], tmp_path)
    for file in ("model.safetensors", "asked/manifest.json", "asked/shard-00000.safetensors"):
        assert sha256_file(Path("whole", file)) == sha256_file(Path("killed", file)), file
    run = json.loads(Path("killed", "run.json").read_text())
    assert run["metrics"]["queries"] == 220
    reader = ShardReader(Path("whole", "asked"))
    assert (sum(reader.sizes), reader.manifest["data_free"], reader.dtype) == (218, False, torch.uint8)  # two held out
    learn = ("distill", "--teacher", "whole/asked", "--transfer-set", "whole/asked", "--steps", "5", "--out", "taught")
    code, _, err = cli(*learn, "--batch-size", "20", "--device", "cpu")
    assert code == 0, err
    taught = json.loads(Path("taught", "run.json").read_text())
    assert (taught["metrics"]["queries"], taught["data_free"]) == (0, False)
    code, _, err = cli(*command, "--out", "poor", "--queries", "219")
    assert (code, "220 images are to be asked about" in err) == (2, True), err


def test_too_many_pairs_to_look_at():
    from dfkd_cli.errors import ConfigError

    with pytest.raises(ConfigError, match=r"20,000 images make 199,980,000 pairs -- give --candidates"):
        mixup(Given(torch.zeros(20_000, *SIZE, dtype=torch.uint8)), batch_size=3, epochs=1)


@pytest.mark.parametrize(("labels", "hard", "said"), [(True, 0.5, True), (True, 0.0, False), (False, 0.5, False)])
def test_that_true_labels_are_not_used_is_said(labels, hard, said):
    source = Given(pictures(), torch.arange(COUNT) % 3 if labels else None)
    learner = mixup(source, objectives=[(1.0, response(hard=hard))], config={"rounds": 1, "mixups": 2})
    assert ("of real images too" in (learner.note or "")) == said
