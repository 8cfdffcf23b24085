"""Datasets in directories, and a network's own files, that change between commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline import edit
from tiny_comparisons import results_in

from dfkd_cli.artifacts.files import digest
from dfkd_cli.artifacts.integrity import read_run
from dfkd_cli.data.datasets import contents

STEP = ("--steps", "1", "--batch-size", "2")
RNG = np.random.default_rng(0)


def photo(path: str) -> None:
    """A random image in a format whose files are all of one size."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (32, 32), dtype=np.uint8)).save(path)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with photos/, a dataset."""
    monkeypatch.chdir(tmp_path)
    for place in ("train/a", "train/b", "test/a", "test/b"):
        photo(f"photos/{place}/0.bmp")
    return tmp_path


def test_students_of_other_real_images_are_no_repeats(here, cli):
    assert cli("train-teacher", "--dataset", "photos", *STEP)[0] == 0
    for seed in (0, 1, 2):
        if seed == 2:
            photo("photos/train/a/1.bmp")
        assert cli("distill", "--transfer-set", "real", *STEP, "--seed", seed, "--out", f"student{seed}")[0] == 0
    code, _, err = cli("compare", "student0", "student1", "student2")
    assert code == 0, err
    rows = results_in(here / "comparison")["sections"][0]["rows"]
    assert sorted(row["seeds"] for row in rows if row["role"] == "student") == [[0, 1], [2]]
    assert len({row["label"] for row in rows}) == 3


def test_images_under_a_known_name_count_too(here, cli):
    """Of a run of an earlier version, in which they did not, nobody knows what they were: it is as it was."""
    (here / "data").mkdir()
    (here / "photos").rename(here / "data" / "mnist")
    known = ("--dataset", "mnist", "--data-dir", "data", *STEP)
    assert cli("train-teacher", *known)[0] == 0
    assert cli("distill", "--transfer-set", "real", "--data-dir", "data", *STEP)[0] == 0
    before = json.loads((here / "teacher" / "run.json").read_text())
    assert "already complete" in cli("train-teacher", *known)[2]
    photo("data/mnist/train/a/1.bmp")
    for command, role in (
        (("train-teacher", *known), "dataset"),
        (("distill", "--transfer-set", "real", "--data-dir", "data", *STEP), "transfer-set"),
    ):
        code, _, err = cli(*command)
        assert (code, f"another {role}" in err) == (2, True), err
    identity = before["identity"] | {"parents": [p for p in before["identity"]["parents"] if p["role"] != "dataset"]}
    edit(here / "teacher" / "run.json", identity=identity | {"parents": [{"role": "model", "sha256": "0"}]})
    assert cli("train-teacher", *known)[0] == 2
    edit(here / "teacher" / "run.json", identity=identity)
    assert "already complete" in cli("train-teacher", *known)[2]


def seen() -> str:
    (parent,) = contents("photos")
    return parent["sha256"]


def test_only_what_is_read_counts_and_all_of_it(here):
    """Pixels, in files of the same size and behind links too; nothing that is hidden, or no image, or not labelled."""
    for place in ("elsewhere/0.bmp", "elsewhere/1.bmp"):
        photo(place)
    (here / "photos/train/b/more").symlink_to(here / "elsewhere")
    known = [seen()]
    photo("photos/train/a/.thumbnails/0.bmp")
    for place in (".DS_Store", "train/.DS_Store", "train/a/.0.bmp", "train/a/notes.txt", "train/0.bmp", "README"):
        (here / "photos" / place).write_bytes(b"not read")
    photo("photos/val/a/0.bmp")  # test/ is taken
    assert seen() == known[0]
    for place in ("train/a/0.bmp", "test/b/0.bmp", "train/b/more/1.bmp"):
        size = (here / "photos" / place).stat().st_size
        photo(f"photos/{place}")
        assert (here / "photos" / place).stat().st_size == size
        known.append(seen())
    (here / "photos/train/a/0.bmp").rename(here / "photos/train/a/1.bmp")
    known.append(seen())
    large = np.zeros((400, 400), dtype=np.uint8)
    for row in (0, 60, 200, 399):  # of a large file, whose format does not compress
        large[row] += 1
        Image.fromarray(large).save(here / "photos/test/a/0.bmp")
        known.append(seen())
    assert len(set(known)) == len(known)


def test_what_an_earlier_version_recorded_is_still_the_same(here, cli):
    """It had a hash of names and sizes."""
    (here / "photos" / "train" / "README").write_text("hidden files and others counted too")
    files = sorted(path for path in (here / "photos").rglob("*") if path.is_file())
    before = digest([[path.relative_to(here / "photos").as_posix(), path.stat().st_size] for path in files])
    runs = {
        "teacher": ("train-teacher", "--dataset", "photos", *STEP),
        "student": ("distill", "--transfer-set", "real", *STEP),
        "measured": ("evaluate", "student", "--out", "measured"),
    }
    for name, command in runs.items():
        assert cli(*command)[0] == 0
        record, now = read_run(here / name), seen()
        assert json.dumps(record).count(now) >= 2 and "formerly" not in json.dumps(record)
        record = json.loads(json.dumps(record).replace(now, before))
        edit(here / name / "run.json", **record)
        code, _, err = cli(*command)
        assert (code, "already complete" in err) == (0, True), err
    photo("photos/train/a/1.bmp")
    for command in runs.values():
        code, _, err = cli(*command)
        assert (code, "holds another run: another" in err) == (2, True), err


def test_a_grid_notices_that_its_datasets_changed(here, cli):
    """Its own teacher's, before anything is written; that of ``--dataset`` is measured again."""
    shutil.copytree("photos", "others")
    rows = {"noise": {"distill": {"transfer_set": ["noise:4"], "steps": 1, "batch_size": 2}}}
    teacher = {"dataset": "photos", "steps": 1, "batch_size": 2}
    Path("grid.yaml").write_text(json.dumps({"grid": {"seeds": [0], "teacher": teacher, "rows": rows}}))
    command = ("compare", "--recipe", "grid.yaml", "--dataset", "others")
    results = here / "comparison" / "results.json"
    assert cli(*command)[0] == 0
    code, _, err = cli(*command)
    assert (code, "comparison is already complete" in err) == (0, True), err

    photo("others/test/a/1.bmp")
    code, _, err = cli(*command)
    assert (
        code,
        "comparison is already complete" in err,
        results_in(results.parent)["sections"][0]["test_images"],
    ) == (0, False, 3)
    written = results.read_bytes()
    photo("photos/train/a/0.bmp")
    for _ in range(2):
        code, _, err = cli(*command)
        assert (code, "teacher holds another run: another dataset" in err, results.read_bytes()) == (2, True, written)
    assert cli(*command, "--overwrite")[0] == 0
    Path("photos").rename("gone")
    code, _, err = cli(*command)
    assert (code, "comparison is already complete" in err) == (0, True), err


NETWORK = """
import json, pathlib
import torch
from parts import head

def build():
    width = json.loads((pathlib.Path(__file__).parent / "net.json").read_text())["width"]
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width), head(width))
"""


@pytest.mark.parametrize("spec", ["./net.py:build", "net:build"])
@pytest.mark.parametrize(("changed", "more"), [("net.json", " "), ("parts.py", "torch")])
def test_a_network_is_another_one_when_files_change_that_it_uses(spec, changed, more, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    Path("net.json").write_text('{"width": 3}')
    Path("parts.py").write_text("import torch\ndef head(width): return torch.nn.Linear(width, 2)\n")
    state = {
        "1.weight": torch.zeros(3, 64),
        "1.bias": torch.ones(3),
        "2.weight": torch.ones(2, 3),
        "2.bias": torch.ones(2),
    }
    torch.save(state, "w.pt")
    seen = ("--teacher", spec, "--weights", "w.pt", "--input-size", "1", "8", "8", "--num-classes", "2")
    command = ("synthesize", "--method", "noise", "--num-images", "4", "--device", "cpu", *seen)
    assert cli(*command)[0] == 0
    assert "already complete" in cli(*command)[2]
    Path(changed).write_text(Path(changed).read_text() + more)
    code, _, err = cli(*command)
    assert (code, "holds another run: another teacher" in err) == (2, True), err


OWN = """
import torch

MODELS = {}

def register(made):
    MODELS[made.__name__] = made
    return made

@register
class Small(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(1024, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

def build():
    return MODELS["Small"]()
"""


def test_a_model_whose_code_has_changed_counts_as_another(here, cli):
    """It has the same weights, and gives other answers: nothing goes on with it, and that is said."""
    Path("net.py").write_text(OWN)
    learn = (
        "train-teacher",
        "--dataset",
        "photos",
        *STEP,
        "--model",
        "./net.py:build",
        "--input-size",
        "1",
        "32",
        "32",
    )
    assert cli(*learn)[0] == 0
    made = ("synthesize", "--method", "noise", "--num-images", "4", "--device", "cpu", "--allow-code")
    pupil = ("distill", "--transfer-set", "noise:4", *STEP, "--student", "teacher", "--allow-code", "--device", "cpu")
    for command in (made, pupil):
        assert cli(*command)[0] == 0
        assert "already complete" in cli(*command)[2]
    Path("net.py").write_text(OWN + "\n\ndef other(): pass\n")
    for command in (made, pupil):
        assert "already complete" in cli(*command)[2]
    Path("net.py").write_text(OWN.replace("ReLU", "Tanh"))
    for command in (made, pupil):
        code, _, err = cli(*command)
        assert (code, "holds another run: another teacher" in err) == (2, True), err
    assert "another architecture" in err  # the student's too, which it has from there
    code, _, err = cli("evaluate", "teacher", "--allow-code", "--device", "cpu")
    assert (code, "teacher was made with other code than ./net.py:build has now" in err) == (0, True), err
