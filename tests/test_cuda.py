"""What only a GPU can show: images as on the CPU, two methods of each shape, 16 bits, going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pipeline import kill_after_saving
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = ("--device", "cuda", "--json")
TEACHER = (
    "train-teacher",
    "--model",
    "resnet8",
    "--input-size",
    "1",
    "16",
    "16",
    "--steps",
    "400",
    "--batch-size",
    "64",
)
SMALL = {
    "zskd": ("--iterations", "5"),
    "deepinversion": ("--iterations", "5"),
    "adaptive-deepinversion": ("--iterations", "3", "--student", "resnet8", "--student-steps", "3"),
    "fast-dfkd": ("--iterations", "3", "--student", "resnet8", "--student-steps", "5", "--width", "0.25"),
    "nayer": ("--iterations", "3", "--student", "resnet8", "--student-steps", "5", "--width", "0.25"),
    "zskt": ("--steps", "30", "--student", "resnet8", "--width", "0.25"),
    "dafl": ("--steps", "30", "--student", "resnet8", "--width", "0.25"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a teacher that was trained on the GPU."""
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture
def gpu(place, cli, monkeypatch):
    """``gpu(*arguments)``: a command on the GPU beside the teacher; its JSON document."""
    monkeypatch.chdir(place)

    def run(*arguments: str):
        code, out, err = cli(*arguments, *GPU)
        assert code == 0, err
        return json.loads(out)

    if not (place / "teacher" / "model.json").exists():
        assert run(*TEACHER)["metrics"]["top1"] > 0.9
    return run


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_method_runs_on_the_gpu(gpu, place, method, precision):
    out = f"{method}-{precision}"
    arguments = ("--num-images", "96", "--batch-size", "48", *SMALL[method], "--precision", precision)
    answer = gpu("synthesize", "--method", method, *arguments, "--out", out)
    assert answer["metrics"]["count"] == 96
    assert json.loads((place / out / "run.json").read_text())["device"] == "cuda:0"
    assert gpu("evaluate", out)["results"][0]["logits_ok"] is True


@pytest.mark.parametrize("method", ["zskd", "deepinversion"])
def test_images_are_those_of_the_cpu(gpu, cli, place, method):
    """Targets, starting images and views do not depend on the device: after one step pixels differ by rounding."""
    arguments = ("synthesize", "--method", method, "--num-images", "32", "--batch-size", "32", "--iterations", "1")
    gpu(*arguments, "--dtype", "float32", "--out", f"{method}-one")
    code, _, err = cli(*arguments, "--dtype", "float32", "--out", f"{method}-cpu", "--device", "cpu")
    assert code == 0, err
    one, other = (load_file(place / f"{method}-{name}" / "shard-00000.safetensors") for name in ("one", "cpu"))
    # The first step of Adam moves by the learning rate whatever the gradient's size; its sign may flip near zero.
    assert ((one["images"] - other["images"]).abs() < 1e-3).float().mean() > 0.97
    assert torch.equal(one["targets"], other["targets"])


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_a_student_learns_on_the_gpu(gpu, precision):
    arguments = ("--transfer-set", "real", "--student", "resnet8", "--epochs", "10", "--precision", precision)
    answer = gpu("distill", *arguments, "--rotate", "5", "--translate", "0", "--scale", "0", "--out", f"s{precision}")
    assert answer["metrics"]["agreement_on_transfer_set"] > 0.85
    assert gpu("evaluate", f"s{precision}")["metrics"]["top1"] > 0.85


@pytest.mark.parametrize("method", ["fast-dfkd", "zskt", "zskd"])
def test_a_killed_run_goes_on(gpu, place, method):
    size = ("--steps", "2000") if method == "zskt" else ("--student-steps", "40") if method == "fast-dfkd" else ()
    arguments = ["synthesize", "--method", method, "--num-images", "960", "--batch-size", "16", *SMALL[method], *size]
    arguments += ["--out", f"killed-{method}"]
    state = "shard-00003.safetensors" if method == "zskd" else "checkpoints/last.ckpt"
    kill_after_saving([*arguments, "--device", "cuda"], place, place / f"killed-{method}" / state)
    assert gpu(*arguments)["metrics"]["count"] == 960
