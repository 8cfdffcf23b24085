"""`dfkd evaluate`: a student's recorded teacher is found by its hash, where the record says or among what is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from digit_images import top1_of


@pytest.fixture(scope="module")
def taught(tmp_path_factory, dfkd) -> Path:
    """mentor/, shards/ of it with a student that was trained along, and pupil/, all as the commands leave them."""
    root = tmp_path_factory.mktemp("taught")
    tiny = ("--steps", "2", "--batch-size", "4")
    for command in (
        ["train-teacher", "--steps", "30", "--batch-size", "32", "--out", "mentor"],
        [
            "synthesize",
            "--method",
            "zskt",
            "--teacher",
            "mentor",
            "--student",
            "lenet5-half",
            "--num-images",
            "8",
            *tiny,
        ],
        ["distill", "--teacher", "mentor", "--transfer-set", "noise:8", *tiny, "--out", "pupil"],
    ):
        done = dfkd(*command, cwd=root)
        assert done.returncode == 0, done.stderr
    return root


def agreements(root: Path) -> dict[str, float]:
    """Of the students in the fixture with their teacher, without the code under test."""
    given = {name: top1_of(root / name)[1] for name in ("mentor", "pupil", "shards/student")}
    return {name: float((answers == given["mentor"]).mean()) for name, answers in given.items() if name != "mentor"}


def test_the_recorded_teacher_is_found_where_the_record_says(taught, tmp_path, monkeypatch, cli):
    expected = agreements(taught)
    assert len(set(expected.values())) == 2, "equal agreements would hide a mistake"
    for here, prefix in ((taught, ""), (tmp_path, f"{taught}/")):  # where the command ran, or elsewhere: beside them
        monkeypatch.chdir(here)
        code, out, err = cli("evaluate", *(f"{prefix}{name}" for name in (*expected, "shards")), "--json")
        assert code == 0, err
        *students, shards = json.loads(out)["results"]
        assert [student["agreement"] for student in students] == list(expected.values())
        assert shards["logits_ok"] is True
        assert "not compared" not in err
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_is_named_is_found_by_its_hash(taught, tmp_path, monkeypatch, cli):
    expected = agreements(taught)["pupil"]
    shutil.copytree(taught / "pupil", tmp_path / "far" / "pupil")
    shutil.copytree(taught / "mentor", tmp_path / "under" / "another-name")
    monkeypatch.chdir(tmp_path)
    for paths in (["far/pupil", "under/another-name"], ["under/another-name", "far/pupil"]):
        code, out, err = cli("evaluate", *paths, "--json")
        assert code == 0, err
        results = {result["path"]: result for result in json.loads(out)["results"]}
        assert list(results) == paths
        assert results["far/pupil"]["agreement"] == expected
    code, out, err = cli("evaluate", "far/pupil", "--json")
    assert json.loads(out)["results"][0]["agreement"] is None
    assert "far/pupil: not compared with the teacher, it is not here -- give --teacher" in err
    shutil.copytree(taught / "mentor", tmp_path / "teacher")
    code, out, err = cli("evaluate", "far/pupil", "--json")
    assert (json.loads(out)["results"][0]["agreement"], "not compared" in err) == (expected, False)


def test_a_typed_teacher_wins_over_the_recorded_one(taught, monkeypatch, cli):
    monkeypatch.chdir(taught)
    code, out, err = cli("evaluate", "pupil", "mentor", "--teacher", "shards/student", "--json")
    assert code == 0, err
    pupil, mentor = json.loads(out)["results"]
    given = {name: top1_of(taught / name)[1] for name in ("pupil", "mentor", "shards/student")}
    assert pupil["agreement"] == (given["pupil"] == given["shards/student"]).mean()
    assert mentor["agreement"] == agreements(taught)["shards/student"]


def test_a_recorded_teacher_that_changed_or_cannot_be_read_is_none(taught, tmp_path, monkeypatch, cli):
    """Nobody asked for it: the student is measured all the same."""
    for name in ("mentor", "pupil"):
        shutil.copytree(taught / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    weights, record = Path("mentor/model.safetensors"), Path("mentor/model.json")
    data, text = weights.read_bytes(), record.read_text()

    def evaluated() -> str:
        code, out, err = cli("evaluate", "pupil", "--json")
        assert (code, json.loads(out)["results"][0]["agreement"]) == (0, None), err
        return err

    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    unread = (
        "pupil: not compared with its teacher, which cannot be read: mentor/model.safetensors is damaged: its sha256"
    )
    assert unread in evaluated()
    weights.write_bytes(data)
    record.write_text(json.dumps({**json.loads(text), "mean": [0.9]}))
    assert "it is not here" in evaluated()
    for strange in ("{}", json.dumps({**json.loads(text), "weights": 3})):
        record.write_text(strange)
        assert "it is not here" in evaluated()
    shutil.copytree("mentor", "teacher")  # which nobody has named either
    assert "nothing is compared with teacher/, which cannot be read: teacher/model.json" in evaluated()
    for named in (("pupil", "--teacher", "teacher"), ("teacher/",), ()):
        code, _, err = cli("evaluate", *named)
        assert (code, "error: teacher/model.json is damaged: its sha256" in err) == (3, True), err
