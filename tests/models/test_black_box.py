"""Teachers of whom only answers are seen: what is made of them, what is asked and kept, what users' functions do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from PIL import Image
from pipeline import finish, start
from safetensors.torch import save_file
from torch import nn

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.ledger import Ledger
from dfkd_cli.errors import ArtifactError, RunFailed
from dfkd_cli.models.black_box import BlackBox, Function, as_seen
from dfkd_cli.models.classifier import Classifier, ModelInfo

K, SIZE = 5, (1, 2, 2)
INFO = ModelInfo("linear", K, SIZE, (0.4,), (0.5,))


class Counting(nn.Module):
    """A linear network that counts the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = nn.Sequential(nn.Flatten(), nn.Linear(4, K)), 0

    def forward(self, pixels):
        self.seen += len(pixels)
        return 5 * self.net(pixels)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(seed))


# -- what is made of answers -------------------------------------------------------------------------------------------


def by_hand(logits: oracles.Array, seen: str) -> oracles.Array:
    """The probabilities of the docstring, image by image."""
    rows = []
    for p in oracles.softmax(logits):
        order = sorted(range(K), key=lambda k: -p[k])
        if seen == "label":
            rows.append([0.9 * (k == order[0]) + 0.1 / K for k in range(K)])
        elif seen == "probabilities":
            rows.append(list(p))
        else:
            top = order[: int(seen[3:])]
            left = 1 - sum(p[k] for k in top)
            rows.append([p[k] if k in top else left / (K - len(top)) for k in range(K)])
    return np.array(rows)


@pytest.mark.parametrize("seen", ["probabilities", "top1", "top2", "top4", "top5", "top9", "label"])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_what_is_seen_of_an_answer(seen, tau):
    logits = torch.randn(20, K) * 3
    expected = by_hand(logits.double().numpy(), "probabilities" if seen in ("top5", "top9") else seen)
    softened = expected ** (1 / tau) / (expected ** (1 / tau)).sum(1, keepdims=True)
    np.testing.assert_allclose((as_seen(logits, seen) / tau).softmax(1).numpy(), softened, rtol=2e-4)


def test_probabilities_lose_nothing_at_any_temperature():
    logits = torch.randn(20, K) * 30
    seen = as_seen(logits, "probabilities")
    for tau in (0.5, 1.0, 20.0):
        torch.testing.assert_close((seen / tau).softmax(1), (logits / tau).softmax(1), rtol=1e-4, atol=1e-7)
    assert as_seen(logits * 1e4, "label").isfinite().all()
    assert as_seen(logits * 1e4, "top2").isfinite().all()


# -- what is asked, and kept -------------------------------------------------------------------------------------------


def box(budget: int | None = None, seen: str = "probabilities") -> tuple[BlackBox, Counting]:
    torch.manual_seed(3)
    net = Counting()
    return BlackBox(Classifier(net, INFO), INFO, seen, budget), net


def test_each_image_is_asked_about_once(tmp_path):
    asked, net = box()
    whole = net(((images(12)) - 0.4) / 0.5).log_softmax(1)
    net.seen = 0
    twice = torch.cat([images(12), images(12)[[3, 3, 0]]])
    torch.testing.assert_close(asked(twice), whole[[*range(12), 3, 3, 0]], rtol=1e-5, atol=1e-6)
    assert (net.seen, asked.ledger.asked) == (12, 12)
    asked(images(12)[5:7])
    assert net.seen == 12
    changed = images(12)[:1] + torch.finfo(torch.float32).eps
    asked(changed)
    assert (net.seen, asked.ledger.asked) == (13, 13), "another image, however alike"
    eight_bits = (images(12) * 255).round().to(torch.uint8)
    asked(eight_bits.float() / 255)
    asked(eight_bits.float().div_(255))
    assert net.seen == 25


def test_no_gradient_comes_out():
    asked, _ = box()
    pixels = images(3).requires_grad_()
    assert not asked(pixels).requires_grad


def test_answers_are_kept_and_found_again(tmp_path):
    asked, net = box()
    assert asked.ledger.open(tmp_path / "queries")
    first = asked(images(450))
    assert len(asked.ledger.files) == 3
    assert not asked.ledger.open(tmp_path / "elsewhere"), "it has a place"
    again, fresh = box()
    again.ledger.open(tmp_path / "queries")
    assert torch.equal(again(images(450).flip(0)), first.flip(0))
    assert (fresh.seen, again.ledger.asked, net.seen) == (0, 450, 450)
    again(images(2, seed=1))
    assert [path.name for path in again.ledger.files] == [f"asked-0000{i}.safetensors" for i in range(4)]


def test_a_damaged_file_is_named_and_can_be_given_up(tmp_path):
    asked, _ = box()
    asked.ledger.open(tmp_path)
    first = asked(images(450))
    damaged = tmp_path / "asked-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"asked-00001.*delete it"):
        box()[0].ledger.open(tmp_path)
    save_file({"keys": torch.zeros(2, dtype=torch.bfloat16)}, damaged)  # a type that NumPy does not know
    with pytest.raises(ArtifactError, match=r"asked-00001.*cannot be read.*"):
        box()[0].ledger.open(tmp_path)
    damaged.unlink()
    again, net = box()
    again.ledger.open(tmp_path)
    torch.testing.assert_close(again(images(450)), first)
    assert (net.seen, again.ledger.asked) == (200, 450)
    assert len({*again.ledger.files}) == 3, "no file of another is written over"


def test_a_budget_is_never_exceeded():
    asked, net = box(budget=10)
    asked(images(8))
    with pytest.raises(RunFailed, match="--queries 10: 8 are made, and 3 more"):
        asked(images(11))
    assert net.seen == 8
    asked(images(10))
    asked(images(10)[:1])
    assert net.seen == 10


def test_known_answers_cost_nothing():
    known = Ledger(budget=1)
    known.know(images(4), torch.arange(20.0).view(4, 5))
    assert torch.equal(known.answer(images(4)[2:], lambda _: pytest.fail("asked")), torch.arange(10.0, 20).view(2, 5))


# -- users' functions --------------------------------------------------------------------------------------------------


def function(returns) -> Function:
    return Function(lambda pixels: returns(pixels), "./api.py:ask", K)


def test_the_forms_in_which_functions_answer():
    p = oracles.softmax(np.random.default_rng(0).normal(size=(3, K)) * 2)
    order = np.argsort(-p, axis=1)
    best, likeliest = order[:, :2], np.take_along_axis(p, order[:, :2], axis=1)
    left = (1 - likeliest.sum(1, keepdims=True)) / (K - 2)
    filled = np.tile(left, (1, K))
    np.put_along_axis(filled, best, likeliest, axis=1)
    rounded = np.round(p, 2)
    for answer, expected in (
        (p, p),
        (torch.from_numpy(p), p),
        (p.tolist(), p),
        (rounded, np.maximum(rounded, np.finfo(np.float32).tiny)),
        ((best, likeliest), filled),
        ((best.astype(np.uint8), likeliest.astype(np.float16)), filled),
        (order[:, 0], 0.9 * np.eye(K)[order[:, 0]] + 0.1 / K),
        (list(map(int, order[:, 0])), 0.9 * np.eye(K)[order[:, 0]] + 0.1 / K),
    ):
        got = function(lambda _, answer=answer: answer)(images(3))
        np.testing.assert_allclose(got.double().exp().numpy(), expected, rtol=3e-3, atol=1e-7)


def test_a_function_sees_pixels_as_numpy():
    def check(pixels):
        assert isinstance(pixels, np.ndarray)
        assert (pixels.dtype, pixels.shape) == (np.float32, (3, *SIZE))
        np.testing.assert_array_equal(pixels, images(3).numpy())
        return np.zeros(3, dtype=int)

    function(check)(images(3))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.int8, np.int64])
def test_classes_are_integers_of_any_kind(kind):
    answer = function(lambda _: np.array([0, K - 1, 2], kind))(images(3))
    assert answer.argmax(1).tolist() == [0, K - 1, 2]


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (np.full((3, K), 0.5), r"float64 \[3, 5\] for 3 images"),
        (np.full((3, K), -1.0), "no probabilities: one image's are -1 to -1 and sum to -5 -- return probabilities"),
        (np.full((3, K), 20.0), "no probabilities: one image's are 20 to 20 and sum to 100"),
        (np.full((3, K), np.nan), "not all of them finite -- return probabilities"),
        (np.full((2, K), 1 / K), "for 3 images"),
        (np.array([0, 1, K]), rf"int64 \[3\] for 3 images, classes 0 to {K}: the first is 0, the last {K - 1}"),
        (np.array([1, 2, K], np.uint16), rf"classes 1 to {K}: the first is 0"),
        (np.array([0, 1, -1]), r"int64 \[3\]"),
        ((np.zeros((3, 2), int), np.full((3, 2), 0.9)), "and float64"),
        ((3, 0.9), r"int64 \[\] and float32 \[\] for 3 images"),
        (np.zeros((3, K), int), r"int64 \[3, 5\]"),
        (None, "failed: "),
        ("no", "failed: "),
    ],
)
def test_functions_that_answer_something_else(answer, word):
    with pytest.raises(RunFailed, match=word):
        function(lambda _: answer)(images(3))


def test_a_function_that_fails_says_so_in_one_line():
    def fail(pixels):
        raise ConnectionError("no route\nto host")

    with pytest.raises(RunFailed, match=r"ask failed: ConnectionError: no route to host -- what it has answered"):
        function(fail)(images(3))


# -- commands ----------------------------------------------------------------------------------------------------------

API = """
import hashlib, os
import numpy as np

def ask(pixels):
    with open("asked.txt", "a") as file:
        for image in pixels:
            print(hashlib.sha256(image.tobytes()).hexdigest(), file=file)
    if os.path.exists("kill") and len(open("asked.txt").readlines()) > 300:
        os.remove("kill")
        os.kill(os.getpid(), 9)
    return (pixels.mean((1, 2, 3)) * 97).astype(int) % 10

def strange(pixels):
    return pixels
"""
OF_API = ("--input-size", "1", "32", "32", "--num-classes", "10", "--answers", "label")
SHORT = ("--steps", "10", "--batch-size", "64", "--device", "cpu", "--student", "lenet5-half", "--holdout", "0",
         "--optimizer", "sgd", "--lr", "0.05")  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch, teacher) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").symlink_to(teacher)
    (tmp_path / "api.py").write_text(API)
    return tmp_path


def record(directory: str) -> dict:
    return json.loads(Path(directory, "run.json").read_text())


def test_a_function_is_asked_about_each_image_once_also_when_killed(here):
    pixels = np.random.default_rng(0).integers(256, size=(500, 32, 32), dtype=np.uint8)
    Path("folder").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(f"folder/{index}.png")
    command = ["distill", "--teacher", "./api.py:ask", *OF_API, "--transfer-set", "folder", *SHORT]
    finish([*command, "--out", "whole"], here)
    lines = Path("asked.txt").read_text().splitlines()
    assert len(lines) == len({*lines}) == 500
    run = record("whole")
    assert (run["metrics"]["queries"], run["data_free"]) == (500, False)
    Path("asked.txt").unlink()
    Path("kill").touch()
    killed = start([*command, "--out", "killed"], here)
    killed.communicate()
    assert killed.returncode == -9
    before = Path("asked.txt").read_text().splitlines()
    finish([*command, "--out", "killed", "--queries", "500"], here)
    after = Path("asked.txt").read_text().splitlines()[len(before) :]
    lost = 64  # the batch whose answers never came
    assert len(after) == 500 - len(before) + lost
    assert {*before[:-lost], *after} == {*lines}
    assert record("killed")["metrics"]["queries"] == 500
    assert sha256_file(Path("whole/model.safetensors")) == sha256_file(Path("killed/model.safetensors"))


def test_networks_as_black_boxes_and_their_stored_answers(here, cli):
    made = ("synthesize", "--method", "noise", "--num-images", "64", "--batch-size", "32", "--out", "shards")
    assert cli(*made)[0] == 0
    learn = ("distill", "--transfer-set", "shards", *SHORT, "--rotate", "0", "--scale", "0", "--translate", "0")
    for out, flags in {
        "network": (),
        "twice": ("--teacher", "teacher", "./teacher"),
        "asked": ("--answers", "probabilities", "--queries", "64"),
        "stored": ("--teacher", "shards"),
        "label": ("--answers", "label"),
    }.items():
        code, _, err = cli(*learn, *flags, "--out", out)
        assert code == 0, err
    queries = {out: record(out)["metrics"].get("queries") for out in ("network", "twice", "asked", "stored", "label")}
    assert queries == {"network": None, "twice": None, "asked": 64, "stored": 0, "label": 64}
    # Unchanged images, and answers from which softmax makes the same: the same training but for rounding.
    weights = {out: torch.cat([v.flatten() for v in load(out).values()]) for out in queries}
    far = (weights["label"] - weights["network"]).norm()
    assert (weights["asked"] - weights["network"]).norm() < 1e-4 * far
    assert (weights["stored"] - weights["twice"]).norm() < 1e-4 * far  # neither says how its pixels are normalised
    code, out, err = cli("compare", "asked", "stored", "label", "--out", "compared", "--json")
    assert code == 0, err
    rows = {row["runs"][0]["path"]: row["queries"] for row in json.loads(out)["sections"][0]["rows"]}
    assert {path: n for path, n in rows.items() if path in queries} == {"asked": 64, "stored": 0, "label": 64}
    assert "QUERIES" in Path("compared/table.md").read_text()
    code, _, err = cli("info", "stored")
    assert code == 0, err


def test_students_of_a_function_are_measured_against_it(here, cli):
    teacher = ("--teacher", "./api.py:ask", *OF_API)
    assert cli("distill", *teacher, "--transfer-set", "noise:100", *SHORT, "--out", "student")[0] == 0
    code, out, err = cli("evaluate", "student", *teacher, "--dataset", "digits", "--json")
    assert code == 0, err
    (result,) = json.loads(out)["results"]
    assert 0 <= result["agreement"] <= 1
    code, _, err = cli("compare", "student", *teacher, "--dataset", "digits", "--out", "compared")
    assert code == 0, err
    asked = Path("asked.txt").read_text().splitlines()
    assert len(asked) == 100 + 2 * result["count"], "about the test images once in each command, and not for its speed"
    code, _, err = cli("evaluate", "student", *teacher[:-2], "--dataset", "digits")
    assert (code, "--answers" in err) == (2, True), err


def load(directory: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(directory, "model.safetensors"))


FAR = ("--transfer-set", "noise:50", *SHORT, "--out", "out")


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--answers", "top0"), 2, "--answers top0: unknown"),
        (("--queries", "5"), 2, "only a black box counts"),
        (("--answers", "label", "--queries", "49"), 2, "--queries 49: 50 images are to be asked about"),
        (("--answers", "label", "--queries", "49", "--dry-run"), 2, "--queries 49: 50 images are to be asked about"),
        (("--answers", "label", "--objective", "at"), 2, "--objective at looks into the teacher"),
        (("--answers", "label", "--objective", "crd"), 2, "--objective crd looks into the teacher"),
        (("--answers", "label", "--method", "pseudo-examples"), 2, "pseudo-examples needs gradients"),
        (("--answers", "label", "--devices", "2"), 2, "a black box is asked by one process"),
        (("--method", "active-mixup"), 2, "active-mixup asks a black box"),
        (("--teacher", "./api.py:ask", *OF_API[:-2]), 2, "--answers"),
        (("--teacher", "./api.py:ask", "--answers", "label"), 2, "--input-size and --num-classes"),
        (("--teacher", "./api.py:ask", *OF_API, "--num-classes", "1"), 2, "of one class there is nothing to learn"),
        (("--teacher", "./api.py:nothing", *OF_API), 2, "./api.py:nothing: no function nothing in ./api.py"),
        (("--teacher", "./none.py:ask", *OF_API), 2, "no such file"),
        (("--teacher", "./api.py:strange", *OF_API), 4, "returned float32 [50, 1, 32, 32] for 50 images"),
    ],
)
def test_what_cannot_be_asked(flags, code, words, here, cli):
    got, _, err = cli("distill", *FAR, *flags)
    assert (got, words in err, err.count("\n")) == (code, True, 1), err


@pytest.mark.parametrize("method", ["kdcl", "supervised"])
def test_methods_without_a_teacher_ask_about_all_images_too(method, here, cli):
    code, _, err = cli("distill", *FAR, "--answers", "label", "--queries", "49", "--method", method)
    assert (code, "--queries 49: 50 images are to be asked" in err.splitlines()[-1]) == (2, True), err
    assert not Path("out/queries").exists()


def test_stored_answers_are_of_their_images_alone(here, cli):
    made = ("synthesize", "--method", "noise", "--num-images", "20", "--batch-size", "20", "--out", "shards")
    assert cli(*made)[0] == 0
    code, _, err = cli("distill", *FAR, "--teacher", "shards")
    assert (code, "no answer to this image is stored" in err) == (4, True), err
    code, _, err = cli("distill", *FAR, "--teacher", "shards", "--answers", "label")
    assert (code, "seen as they are stored" in err) == (2, True), err
    for command in (made[:-1], ("collect-metadata", "--dataset", "digits", "--out")):
        code, _, err = cli(*command, "other", "--teacher", "shards")
        assert (code, "only answers are seen" in err) == (2, True), err


def test_a_rehearsal_asks_about_few_images(here, cli):
    code, _, err = cli("distill", *FAR, "--teacher", "./api.py:ask", *OF_API, "--dry-run")
    assert code == 0, err
    assert len(Path("asked.txt").read_text().splitlines()) <= 2
    assert not Path("out").exists()
    shutil.rmtree("out", ignore_errors=True)
