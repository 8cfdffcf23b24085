"""Whole commands with networks and weights that other people wrote."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from dfkd_cli.settings import resolve
from dfkd_cli.stages.grid.commands import carry_out
from dfkd_cli.ui import NORMAL

CODE = """
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

class Net(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, end=lambda y: y, start=lambda x: x, classes=10):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 5, 4), norm(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc, self.start, self.end = nn.Linear(6, classes), start, end
    def forward(self, x):
        return self.end(self.fc(self.body(self.start(x))))

class View(nn.Module):
    def forward(self, x):
        return x.view(-1, 6 * 7 * 7)

plain = lambda: Net()
viewed = lambda: nn.Sequential(nn.Conv2d(1, 6, 5, 4), nn.BatchNorm2d(6), View(), nn.Linear(6 * 7 * 7, 10))
writes = lambda: Net(start=lambda x: x.sub_(0.5))
rectified = lambda: Net(start=nn.ReLU(inplace=True))
probable = lambda: Net(end=nn.Softmax(1))
logged = lambda: Net(end=nn.LogSoftmax(1))
talks = lambda: print("made") or Net(start=lambda x: print("asked") or x)
packed = lambda: Net(end=lambda y: {"logits": y})
frozen = lambda: Net(norm=FrozenBatchNorm2d)
unkept = lambda: Net(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
single = lambda: Net(classes=1)
normed = lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(1, 6, 5, 4)), nn.Flatten(), nn.Linear(294, 10))
class Hidden(Net):
    def __init__(self, way):
        super().__init__()
        self.way = way
    def forward(self, x):
        if self.way == "called":
            return super().forward(x)
        if self.way == "plain":
            conv, norm, *rest = self.body
            x = conv(x)
            x = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            return self.fc(nn.Sequential(*rest)(x))
        with torch.no_grad() if self.way == "backbone" else torch.inference_mode():
            features = self.body(x)
        return self.fc(features.clone()) if self.way == "backbone" else features[:, :1] * self.fc.bias

called = lambda: Hidden("called")
backbone = lambda: Hidden("backbone")
inference = lambda: Hidden("inference")
by_hand = lambda: Hidden("plain")

class Frozen(Net):
    forward = torch.no_grad()(Net.forward)

frozen_answers = lambda: Frozen()

class Filtered(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(32, 17, dtype=torch.complex64))
        self.register_buffer("band", torch.ones(32, 17, dtype=torch.complex64))
    def forward(self, x):
        return torch.fft.irfft2(torch.fft.rfft2(x) * self.gain * self.band, s=x.shape[2:])

filtered = lambda: nn.Sequential(Filtered(), Net())
rounded = lambda: Net(start=lambda x: (x * 255).round() / 255)

scripted = lambda: nn.Sequential(torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))))
deep = lambda: nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), nn.BatchNorm1d(10))
"""
SMALL = ["--num-images", "20", "--batch-size", "20", "--iterations", "2"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A directory with a user's code, and weights of each network in it."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(CODE)
    spec = importlib.util.spec_from_file_location("net", "net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("plain", "viewed", "frozen", "unkept", "single", "normed", "scripted"):
        net = getattr(module, name)()
        torch.save({"net": net.state_dict(), "ema": getattr(module, name)().state_dict()}, f"{name}.bin")
    return tmp_path


def teacher(name: str, weights: str = "plain.bin", classes: int = 10) -> list[str]:
    size = ["--input-size", "1", "32", "32", "--num-classes", str(classes)]
    return ["--teacher", f"net.py:{name}", "--weights", weights, *size]


@pytest.mark.parametrize("name", ["writes", "rectified", "probable", "logged", "packed"])
def test_a_users_network_teaches_through_the_whole_pipeline(here, cli, name):
    code, _, err = cli("synthesize", "--method", "zskd", *teacher(name), *SMALL)
    assert code == 0, err
    assert err.count("note: net.py") == (name in ("probable", "packed"))
    student = ["--student", f"net.py:{name}", "--epochs", "1"]
    code, _, err = cli("distill", *teacher(name), *student)
    assert code == 0, err
    assert json.loads(Path("student/run.json").read_text())["status"] == "done"


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_network_of_complex_numbers_learns_and_teaches(here, cli, optimizer):
    """What was trained can be read: numbers that a buffer holds may be complex as those of a parameter."""
    student = ["--student", "net.py:filtered", "--transfer-set", "noise:8", "--steps", "2", "--batch-size", "4"]
    code, _, err = cli("distill", *teacher("plain"), *student, "--optimizer", optimizer)
    assert code == 0, err
    code, _, err = cli("synthesize", "--method", "zskd", "--teacher", "student", "--allow-code", *SMALL)
    assert (code, "UserWarning" in err) == (0, False), err


@pytest.mark.parametrize(("name", "said"), [("rounded", True), ("plain", False)])
@pytest.mark.parametrize("mode", [[], ["--dry-run"]])
def test_a_gradient_of_nothing_but_zeros_is_said(here, cli, name, said, mode):
    """The images stay the noise that they began as."""
    code, _, err = cli("synthesize", "--method", "class-impressions", *teacher(name), *SMALL, *mode)
    assert (code, f"net.py:{name}: the gradient that comes back to images of noise is 0" in err) == (0, said), err


def test_a_network_whose_values_must_lie_contiguously(here, cli):
    """``view`` of what comes out of a convolution, as in textbooks, after BatchNorm."""
    arguments = teacher("viewed", "viewed.bin")
    for command in (
        ["synthesize", "--method", "deepinversion", *arguments, *SMALL],
        ["distill", *arguments, "--student", "w8a8:net.py:viewed", "--epochs", "1"],
        ["train-teacher", "--model", "net.py:viewed", "--steps", "1"],
        ["bench", *arguments[1:], "--min-time", "0.01", "--batch-size", "2"],
    ):
        code, out, err = cli(*command)
        assert code == 0, err
    assert "channels last" not in out


def test_a_dataset_by_its_name_where_the_teacher_names_none(here, cli):
    few = ["distill", *teacher("plain"), "--method", "supervised", "--epochs", "1"]
    code, _, err = cli(*few, "--transfer-set", "real:50", "--out", "none")
    assert code == 2
    assert "name it, such as" in err
    code, _, err = cli(*few, "--transfer-set", "digits:50")
    assert code == 0, err
    record = json.loads(Path("student/run.json").read_text())
    assert [parent["spec"] for parent in record["parents"] if parent["role"] == "transfer-set"] == ["digits:50"]
    assert not json.loads(Path("student/model.json").read_text())["provenance"]["data_free"]


def test_frozen_statistics_and_none_at_all(here, cli):
    arguments = ["synthesize", "--method", "deepinversion", *SMALL]
    code, _, err = cli(*arguments, *teacher("frozen", "frozen.bin"))
    assert code == 0, err
    code, _, err = cli(*arguments, *teacher("unkept", "unkept.bin"), "--out", "other")
    assert code == 3
    assert "net.py:unkept keeps no statistics in it (track_running_stats=False)" in err


def test_the_weights_that_are_taken_are_part_of_the_teachers_hash(here, cli):
    hashes = []
    for key in ([], ["--weights-key", "ema"]):
        code, _, err = cli(
            "synthesize", "--method", "noise", *teacher("plain"), *key, *SMALL[:4], "--out", f"s{len(key)}"
        )
        assert code == 0, err
        assert ("took net; ema would fit too" in err) == (not key)
        hashes.append(json.loads(Path(f"s{len(key)}/manifest.json").read_text())["teacher"]["sha256"])
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    ("arguments", "expected", "words"),
    [
        (teacher("single", "single.bin", 1), 2, "of one class there is nothing to learn"),
        (teacher("single", "single.bin", 10), 3, "gives (1, 1) for an image instead of logits (1, 10)"),
        ([*teacher("plain"), "--weights-key", "emma"], 2, "did you mean 'ema'?"),
        ([*teacher("plain", "nan.bin")], 3, "not finite: fc.bias"),
    ],
)
def test_what_is_no_teacher(here, cli, arguments, expected, words):
    state = torch.load("plain.bin")["net"]
    state["fc.bias"][2] = torch.nan
    torch.save(state, "nan.bin")
    code, _, err = cli("synthesize", "--method", "zskd", *arguments, *SMALL)
    assert code == expected, err
    assert words in err


@pytest.mark.parametrize("more", [["--transfer-set", "noise:1"], ["--transfer-set", "noise:5", "--batch-size", "1"]])
def test_batches_of_one_image_where_batchnorm_sees_one_value(here, cli, more):
    few = ["distill", *teacher("plain"), "--epochs", "1", "--holdout", "0", *more]
    code, _, err = cli(*few, "--student", "net.py:deep")
    assert code == 2, err
    assert "net.py:deep: cannot be trained on 1 images at once" in err
    code, _, err = cli(*few, "--student", "lenet5-half", "--out", "other")
    assert code == 0, err


def test_a_teacher_is_known_by_its_code_from_anywhere(here, cli, monkeypatch):
    arguments = ["--method", "noise", *SMALL[:4], "--out", str(here / "shards")]
    code, _, err = cli("synthesize", *teacher("plain", str(here / "plain.bin")), *arguments)
    assert code == 0, err
    named = teacher("plain", str(here / "plain.bin"))
    student = ["--student", "lenet5-half", "--epochs", "1", "--transfer-set", str(here / "shards")]
    Path("below").mkdir()
    monkeypatch.chdir("below")
    code, _, err = cli("distill", "--teacher", "../net.py:plain", *named[2:], *student)
    assert code == 0, err
    monkeypatch.chdir(here)
    Path("net.py").write_text(CODE.replace("nn.ReLU(), nn.Ada", "nn.Sigmoid(), nn.Ada"))
    code, _, err = cli("synthesize", *named, *arguments)
    assert code == 2, err
    assert "shards holds another run: another teacher" in err
    code, _, err = cli("distill", *named, *student)
    assert code == 3
    assert "was made from another teacher" in err


def test_few_bits_of_a_network_with_weights_that_are_computed(here, cli):
    named = teacher("normed", "normed.bin")
    few = ["--student", "w8a8:", "--epochs", "1", "--transfer-set", "noise:40", "--holdout", "0"]
    code, _, err = cli("distill", *named, *few)
    assert code == 0, err
    assert "computed in float" in err
    code, _, err = cli("export", *named[1:], "--bits", "8", "--calibrate", "noise:20")
    assert code == 0, err
    assert json.loads(Path("export/export.json").read_text())["computed_in_float"] == ["0"]


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("backbone", "deepinversion", "no gradient comes back to its images -- leave torch.no_grad()"),
        ("backbone", "zskd", "no gradient comes back"),
        ("backbone", "dafl", "no gradient comes back"),
        ("inference", "class-impressions", "fails where gradients are taken: Inference tensors"),
        ("by_hand", "deepinversion", "its BatchNorm layers are not called, so what goes into them is not seen"),
        ("by_hand", "bn-statistics", "its BatchNorm layers are not called"),
        ("scripted", "zskd", "is TorchScript inside: no layer can be looked into"),
        ("by_hand", "class-impressions", None),
        ("called", "deepinversion", None),
        ("backbone", "noise", None),
    ],
)
def test_what_does_not_let_a_method_look_inside_is_refused_before_anything_is_made(name, method, words, here, cli):
    """Images would be made of the other terms alone, and nobody would know."""
    more = ["--student", "lenet5-half"] if method == "dafl" else [] if method == "noise" else SMALL[4:]
    for mode in ([], ["--dry-run"]):
        weights = "scripted.bin" if name == "scripted" else "plain.bin"
        command = [
            "synthesize",
            "--method",
            method,
            *teacher(name, weights),
            "--weights-key",
            "net",
            *SMALL[:4],
            *more,
            *mode,
        ]
        code, _, err = cli(*command)
        if words is None:
            assert code == 0, err
            return
        assert (code, words in err, len(err.strip().splitlines())) == (3, True, 1), err
        assert not Path("shards").exists()
    assert "these work without" not in err or "deepinversion" not in err.partition("without: ")[2]


@pytest.mark.parametrize("mode", [[], ["--dry-run"]])
def test_a_student_that_cannot_learn_is_refused_before_anything_is_made(here, cli, mode):
    student = ["--student", "net.py:frozen_answers", "--transfer-set", "noise:8", "--steps", "1", "--batch-size", "4"]
    code, _, err = cli("distill", *teacher("plain"), "--weights-key", "net", *student, *mode)
    assert (code, "net.py:frozen_answers: no gradient comes back from its answers -- leave torch.no_grad()" in err) == (
        2, True,
    ), err  # fmt: skip
    assert not Path("student").exists()


def test_what_has_no_gradients_is_not_timed(here, cli):
    _, *named = teacher("backbone")
    code, _, err = cli("bench", *named, "--weights-key", "net")
    assert (code, "net.py:backbone: no gradient comes back to its images" in err) == (3, True), err


def test_signals_of_one_row_have_a_preview(here, cli):
    layers = "nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)"
    Path("signal.py").write_text(f"from torch import nn\ndef net(): return nn.Sequential({layers})\n")
    torch.save({"2.weight": torch.ones(3, 4), "2.bias": torch.zeros(3)}, "signal.bin")
    said = ["--teacher", "./signal.py:net", "--weights", "signal.bin", "--input-size", "1", "1", "900"]
    code, _, err = cli("synthesize", "--method", "noise", *said, "--num-classes", "3", *SMALL[:4])
    assert code == 0, err
    assert Path("shards", "preview.png").stat().st_size > 0


def test_what_a_network_prints_is_no_answer(here, cli, capsys):
    """Not of a command, nor of one in a grid."""
    command = ["distill", *teacher("talks"), "--transfer-set", "noise:8", "--student", "net.py:talks", "--steps", "1"]
    code, out, err = cli(*command, "--batch-size", "4", "--json")
    assert code == 0, err
    assert json.loads(out)["ok"] and err.splitlines().count("made") >= 2 and "asked" in err.splitlines()
    typed = {"teacher": "student", "transfer_set": ["noise:4"], "student": "net.py:talks", "steps": 1, "batch_size": 2}
    settings = resolve("distill", [("--", typed | {"out": "again", "allow_code": True})])
    carry_out(settings.plain(), settings.code.typed, NORMAL, silent=False)
    out, err = capsys.readouterr()
    assert out == "" and "made" in err.splitlines()
