"""Every method with a student in the loop: what the student learns; as a command, better than from noise, resumed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

import oracles
import pytest
import torch
from pipeline import finish, kill_after_saving
from stand_ins import work
from tiny_synthesizers import linear_teacher, synthesizer
from torch import Tensor, nn

from dfkd_cli.models.generators import load_generators
from dfkd_cli.rounds.trainer import CHECKPOINT
from dfkd_cli.synthesizers.cotraining import CoTrainer

NETWORK = "small_network:build"
COMMON = ["--device", "cpu", "--allow-code", "--student", NETWORK, "--width", "0.15", "--student-lr", "0.1"]
STREAMED = [*COMMON, "--num-images", "64", "--batch-size", "64", "--latent", "50", "--student-optimizer", "sgd"]
STREAM = [*STREAMED, "--student-steps", "5", "--steps"]
POOLED = [*COMMON, "--student-batch-size", "64", "--view-crop", "1", "--crop", "1", "--no-view-flip", "--no-flip"]
POOL = [*POOLED, "--num-images", "480", "--batch-size", "60", "--student-steps", "30", "--warmup-share", "0.25"]
METHODS = {
    "dafl": [*STREAM, "60"],
    "dfad": [*STREAM, "80"],
    "zskt": [*STREAM, "80", "--student-temperature", "4"],
    "dfq": [*STREAM, "50"],
    "cmi": [*POOL, "--iterations", "20", "--negatives", "60"],
    "fast-dfkd": [*POOL, "--iterations", "10"],
    "nayer": [*POOL, "--iterations", "10", "--latent", "50"],
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory, session_cli) -> Path:
    """A teacher that reads digits of 16x16 pixels, and a student that it has taught with noise."""
    path = tmp_path_factory.mktemp("digits")
    small = ["--model", NETWORK, "--input-size", "1", "16", "16", "--epochs", "6", "--batch-size", "64"]
    assert session_cli(path, "train-teacher", "--out", str(path / "teacher"), *small, "--device", "cpu") == 0
    plain = ["--rotate", "0", "--translate", "0", "--scale", "0", "--noise", "0", "--optimizer", "sgd", "--lr", "0.1"]
    models = ["--teacher", str(path / "teacher"), "--allow-code", "--student", NETWORK, "--out", str(path / "noise")]
    noise = ["--transfer-set", "noise:480", "--steps", "120", "--batch-size", "64"]
    assert session_cli(path, "distill", *models, *noise, *plain, "--device", "cpu") == 0
    return path


@pytest.mark.parametrize("name", METHODS)
def test_student_in_the_loop_beats_one_taught_with_noise(name, digits, tmp_path, cli):
    """Noise teaches one class of ten, or two: 0.10 to 0.17 over seeds and processors. Methods reach 0.54 to 0.96."""
    teacher, out = digits / "teacher", tmp_path / "shards"
    code, _, err = cli("synthesize", "--method", name, "--teacher", teacher, "--out", out, *METHODS[name])
    assert code == 0, err
    models = [out / "student", digits / "noise"]
    code, answer, err = cli("evaluate", *models, "--teacher", teacher, "--allow-code", "--device", "cpu", "--json")
    assert code == 0, err
    ours, noise = (result["top1"] for result in json.loads(answer)["results"])
    assert ours > noise + 0.2


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("fast-dfkd", [*POOLED, "--num-images", "100", "--batch-size", "20", "--student-steps", "10"]),
        ("zskt", [*STREAMED, "--steps", "41", "--student-steps", "2"]),
    ],
)
def test_killed_and_continued_is_uninterrupted(name, more, digits, tmp_path):
    """kill -9 between two rounds, in a process of its own."""
    arguments = ["synthesize", "--method", name, "--teacher", str(digits / "teacher"), *more, "--seed", "3"]
    arguments += ["--snapshots", "3"]
    finish([*arguments, "--out", "whole"], tmp_path)
    kill_after_saving([*arguments, "--out", "killed"], tmp_path, tmp_path / "killed" / CHECKPOINT)
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["status"] != "done"
    finish([*arguments, "--out", "killed"], tmp_path)
    snapshots = sorted(str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("round-*"))
    assert len(snapshots) == 3
    files = ["manifest.json", "metrics.csv", "student/model.safetensors", "generator/generator.safetensors"]
    for file in [*files, *snapshots]:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), file
    load_generators(tmp_path / "killed" / "generator")


def test_other_stopping_points_of_a_student_in_the_loop(digits, tmp_path, cli):
    teacher, out = str(digits / "teacher"), tmp_path / "shards"
    arguments = ("--teacher", teacher, "--out", out, *STREAMED, "--steps", "80", "--student-steps", "2")
    assert cli("synthesize", "--method", "dafl", *arguments, "--snapshots", "4")[0] == 0
    student = out / "student"
    snapshots = sorted((student / "snapshots").iterdir())
    assert [path.stem for path in snapshots] == [f"round-0000{index}" for index in (1, 2, 3, 4)]  # and one of a shard
    assert snapshots[-1].read_bytes() == (student / "model.safetensors").read_bytes()
    compare = ("compare", student, "--teacher", teacher, "--allow-code", "--device", "cpu")
    code, answer, err = cli(*compare, "--out", tmp_path / "all", "--json")
    assert code == 0, err
    row = json.loads(answer)["sections"][0]["rows"][1]
    assert row["best_test"]["mean"] >= row["top1"]["mean"]
    assert row["runs"][0]["selected"] is None  # it is measured before a round, and kept after it
    data = bytearray(snapshots[1].read_bytes())
    data[-1] ^= 1
    snapshots[1].write_bytes(data)
    code, _, err = cli(*compare, "--out", tmp_path / "again")
    assert (code, "round-00002.safetensors is damaged" in err) == (3, True), err
    code, _, err = cli("synthesize", "--method", "noise", "--teacher", teacher, "--allow-code", "--snapshots", "4")
    assert (code, "--snapshots keeps weights of a student in the loop" in err) == (2, True), err


# -- the student's steps -----------------------------------------------------------------------------------------------

POOLING = ["adaptive-deepinversion", "cmi", "fast-dfkd", "nayer"]


class Answer(NamedTuple):
    """What a network was asked, and in which mode."""

    network: nn.Module
    training: bool
    images: Tensor
    logits: Tensor


def in_the_loop(name: str, directory: Path, **values) -> CoTrainer:
    """A method whose networks have BatchNorm, and a teacher whose answers are far from even."""
    teacher, student = linear_teacher(batch_norm=True), linear_teacher(batch_norm=True, seed=2)
    for parameter in teacher.net[-1].parameters():
        parameter.data *= 30
    pool = {"student_batch_size": 2, "warmup_share": 0}
    only = pool if name in POOLING else {"attention": 0} if name == "zskt" else {}
    method = synthesizer(name, directory, teacher, **{"crop": 0, "flip": False} | only | values)
    method.student = student
    return method


def one_step(name: str, directory: Path, **values) -> tuple[list[Answer], Answer, float]:
    """One step of the student: what the teacher was asked up to it, what the student said, and the loss."""
    one = {"num_images": 2} if name in POOLING else {"steps": 1}
    method = in_the_loop(name, directory, student_steps=1, **one, **values)
    answers: list[Answer] = []
    for network in (method.teacher, method.student):

        def note(net: nn.Module, inputs: tuple[Tensor], logits: Tensor, network: nn.Module = network) -> None:
            answers.append(Answer(network, net.training, inputs[0].detach().clone(), logits.detach().clone()))

        network.net.register_forward_hook(note)
    work(method, directory)
    own = max(index for index, answer in enumerate(answers) if answer.network is method.student and answer.training)
    [soft] = [float(row["soft"]) for row in curves(directory) if row.get("soft")]
    return [answer for answer in answers[:own] if answer.network is method.teacher], answers[own], soft


def curves(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["nayer", "adaptive-deepinversion", "dafl", "zskt"])
def test_what_is_frozen_in_a_student_stays(name, tmp_path):
    method = in_the_loop(name, tmp_path, student_steps=1, student_lr=0.3)
    frozen, *trained = method.student.net.parameters()
    frozen.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in (frozen, *trained)]
    work(method, tmp_path)
    assert torch.equal(frozen, before[0])
    assert not any(torch.equal(now, then) for now, then in zip(trained, before[1:], strict=True))


@pytest.mark.parametrize(
    ("name", "factor"), [*((name, 1.0) for name in POOLING), ("dafl", 1.0), ("dfq", 1.0), ("zskt", 0.25)]
)
def test_student_learns_the_teachers_answers_at_its_temperature(name, factor, tmp_path):
    """Divergences are multiplied by the square of the temperature; zero-shot transfer has their mean over classes."""
    (*_, teacher), student, soft = one_step(name, tmp_path, student_temperature=5.0)
    logits = student.logits.double().numpy(), teacher.logits.double().numpy()
    assert soft == pytest.approx(factor * oracles.response(*logits, "kl", 5), rel=1e-4)


@pytest.mark.parametrize("name", [*POOLING, "dafl", "dfq"])
def test_teacher_is_asked_about_the_changed_images_that_the_student_sees(name, tmp_path):
    """Noise makes them differ from all that the teacher saw before, the stored ones among these."""
    (*before, teacher), student, _ = one_step(name, tmp_path, noise=0.3)
    assert torch.equal(teacher.images, student.images)
    earlier = torch.cat([answer.images for answer in before])
    assert torch.cdist(student.images.flatten(1), earlier.flatten(1)).min() > 0.1


@pytest.mark.parametrize("name", POOLING)
def test_students_schedule_and_adversary_begin_after_the_warm_up(name, tmp_path):
    method = in_the_loop(name, tmp_path, num_images=6, warmup_share=0.34, student_steps=4, student_lr=0.3)
    work(method, tmp_path)
    adversary = "competition" if name == "adaptive-deepinversion" else "adversarial"
    assert [bool(row[adversary]) for row in curves(tmp_path)] == [False, True, True]
    [optimizer, schedule], *_ = method.pairs
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert schedule.last_epoch == 8


@pytest.mark.parametrize(
    ("name", "passes"), [*((name, 2) for name in POOLING), ("dafl", 2), ("dfad", 3), ("zskt", 3), ("dfq", 3)]
)
def test_students_batchnorm_learns_in_each_pass_of_its_own_and_of_a_generator_in_turns(name, passes, tmp_path):
    """Two steps of its own, and one of an adversary; inner steps on a batch of images leave it as it is."""
    rounds = {"num_images": 6} if name in POOLING else {"steps": 3}
    method = in_the_loop(name, tmp_path, student_steps=2, **rounds)
    work(method, tmp_path)
    assert method.student.net[1].num_batches_tracked == 3 * passes
