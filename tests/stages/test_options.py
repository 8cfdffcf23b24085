"""Options that change what a command reads, computes or leaves, and nothing else that another test would see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

from dfkd_cli.artifacts.files import sha256_file

SMALL = ("--steps", 3, "--batch-size", 8, "--device", "cpu")


def test_a_dataset_is_looked_for_where_data_dir_says_first(tmp_path, monkeypatch, cli):
    monkeypatch.setenv("DFKD_DATA", str(tmp_path / "usual"))
    for root, classes in (("mine", "ab"), ("usual", "abc")):
        for place in (f"{split}/{label}" for split in ("train", "test") for label in classes):
            (tmp_path / root / "mnist" / place).mkdir(parents=True)
            save_image(torch.rand(1, 28, 28), tmp_path / root / "mnist" / place / "0.png")
    for option, classes in (((), "abc"), (("--data-dir", tmp_path / "mine"), "ab")):
        out = tmp_path / classes
        code, _, err = cli("train-teacher", "--dataset", "mnist", *option, *SMALL, "--out", out)
        assert code == 0, err
        assert json.loads((out / "model.json").read_text())["classes"] == list(classes)


def weights(cli, *arguments: object, out: Path) -> str:
    """The hash of the weights that a command leaves."""
    code, _, err = cli(*arguments, *SMALL, "--out", out)
    assert code == 0, err
    return sha256_file(out / "model.safetensors")


@pytest.mark.parametrize("command", ["train-teacher", "distill"])
def test_a_network_learns_with_the_precision_that_is_said(command, teacher, tmp_path, cli):
    arguments = (command, *(("--teacher", teacher, "--transfer-set", "noise:16") if command == "distill" else ()))
    usual, same = (weights(cli, *arguments, *say, out=tmp_path / str(len(say))) for say in ((), ("--precision", "32")))
    assert usual == same != weights(cli, *arguments, "--precision", "bf16", out=tmp_path / "bf16")


def test_a_student_learns_the_mean_of_teachers_that_is_said(make_teacher, tmp_path, cli):
    arguments = (
        "distill",
        "--teacher",
        make_teacher("lenet5"),
        make_teacher("lenet5-half"),
        "--transfer-set",
        "noise:16",
    )
    usual, same = (
        weights(cli, *arguments, *say, out=tmp_path / str(len(say))) for say in ((), ("--combine", "probabilities"))
    )
    assert usual == same != weights(cli, *arguments, "--combine", "logits", out=tmp_path / "logits")


@pytest.mark.parametrize(("logger", "there"), [("csv", False), ("tensorboard", True)])
def test_curves_are_left_for_tensorboard_too_where_that_is_said(logger, there, tmp_path, cli):
    code, _, err = cli("train-teacher", *SMALL, "--logger", logger, "--out", tmp_path / "teacher")
    assert code == 0, err
    assert (tmp_path / "teacher" / "metrics.csv").is_file()
    assert bool([*(tmp_path / "teacher").rglob("events.out.tfevents.*")]) == there
