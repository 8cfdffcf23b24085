"""What only a GPU can show: images as on the CPU, two methods of each shape, 16 bits, going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pipeline import HANGS, kill_after_saving, start_fresh
from safetensors.torch import load_file

from dfkd_cli.data import landlock
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.graphs import _GRAPHS, RECORDED_AFTER, logits_of
from dfkd_cli.models.registry import build

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


def classifier(net=None) -> Classifier:
    """A small residual network, or another."""
    torch.manual_seed(0)
    info = ModelInfo("resnet8", 10, (1, 16, 16), (0.3,), (0.2,))
    return Classifier(build("resnet8", 10, (1, 16, 16)) if net is None else net, info).cuda().lay_out()


def trained(ask, net: Classifier, steps: int, precision: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The state of a network that learned random labels; two batches' gradients are added in every third step."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    torch.manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(2 if step % 3 == 2 else 1):
            pixels, labels = torch.rand(32, 1, 16, 16, device="cuda"), torch.randint(10, (32,), device="cuda")
            with torch.autocast("cuda", precision, enabled=precision is not None):
                logits = ask(net, pixels).float()
            torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    return {name: value.float() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_repeated_passes_train_like_launched_ones(precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    repeated, launched = classifier(), classifier()
    found = trained(logits_of, repeated, RECORDED_AFTER + 10, precision)
    assert len(_GRAPHS[repeated].recorded) == 1
    for name, value in trained(Classifier.__call__, launched, RECORDED_AFTER + 10, precision).items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=4e-3 if precision else 2e-4, msg=name)


def test_passes_in_other_modes_and_of_moved_weights_are_recorded_anew(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net, pixels = classifier(), torch.rand(32, 1, 16, 16, device="cuda")

    @torch.no_grad()
    def repeat(recordings: int) -> None:
        for _ in range(2 * RECORDED_AFTER):
            torch.testing.assert_close(logits_of(net, pixels), net(pixels), rtol=1e-3, atol=1e-3)
        assert len(_GRAPHS[net].recorded) == recordings

    repeat(1)
    net.eval()
    repeat(2)
    net.cpu()
    elsewhere = [parameter.data.cuda() for parameter in net.parameters()]  # in the memory that was theirs
    for parameter in net.parameters():
        parameter.data.mul_(1.5)
    net.cuda()
    repeat(3)
    assert elsewhere


def test_a_pass_before_the_backward_of_the_last_one_does_not_overwrite_it():
    net = classifier()
    for _ in range(RECORDED_AFTER):
        logits_of(net, torch.rand(32, 1, 16, 16, device="cuda")).sum().backward()
    one, two = (torch.rand(32, 1, 16, 16, device="cuda") for _ in range(2))
    found = torch.autograd.grad((logits_of(net, one) - logits_of(net, two)).square().sum(), list(net.parameters()))
    wanted = torch.autograd.grad((net(one) - net(two)).square().sum(), list(net.parameters()))
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_a_network_that_decides_by_values_is_launched_each_time():
    class Deciding(torch.nn.Linear):
        def forward(self, pixels):
            logits = super().forward(pixels.flatten(1))
            return logits if logits.sum() > 0 else -logits

    net = classifier(Deciding(256, 10))
    for _ in range(2 * RECORDED_AFTER):
        pixels = torch.rand(4, 1, 16, 16, device="cuda")
        assert torch.equal(logits_of(net, pixels), net(pixels))
    assert not _GRAPHS[net].recorded


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_a_student_learns_on_the_gpu(gpu, precision):
    arguments = ("--transfer-set", "real", "--student", "resnet8", "--epochs", "30", "--precision", precision)
    answer = gpu("distill", *arguments, "--rotate", "5", "--translate", "0", "--scale", "0", "--out", f"s{precision}")
    assert answer["metrics"]["agreement_on_transfer_set"] > 0.85
    assert gpu("evaluate", f"s{precision}")["metrics"]["top1"] > 0.85


@pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
@pytest.mark.usefixtures("gpu")  # which has trained a teacher
def test_a_process_that_can_open_no_data_uses_the_gpu(place):
    process = start_fresh(["synthesize", "--method", "zskd", "--num-images", "8", *SMALL["zskd"], *GPU], place)
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err
    run = json.loads((place / "shards" / "run.json").read_text())
    assert (run["sealed"], run["device"]) == ("landlock", "cuda:0")


@pytest.mark.parametrize("method", ["fast-dfkd", "zskt", "zskd"])
def test_a_killed_run_goes_on(gpu, place, method):
    size = ("--steps", "60") if method == "zskt" else ("--student-steps", "40") if method == "fast-dfkd" else ()
    arguments = ["synthesize", "--method", method, "--num-images", "960", "--batch-size", "16", *SMALL[method], *size]
    arguments += ["--out", f"killed-{method}"]
    state = "shard-00003.safetensors" if method == "zskd" else "checkpoints/last.ckpt"
    kill_after_saving([*arguments, "--device", "cuda"], place, place / f"killed-{method}" / state)
    assert gpu(*arguments)["metrics"]["count"] == 960
