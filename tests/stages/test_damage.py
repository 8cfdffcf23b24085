"""Damage of every file that a run reads or continues from: noticed in one line, or undone; never in the result."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipeline import edit

from dfkd_cli.artifacts.integrity import intact, on_record
from dfkd_cli.errors import ArtifactError

SYNTHESIZE = ["synthesize", "--method", "zskd", "--num-images", "16", "--batch-size", "8", "--iterations", "2"]
DISTILL = ["distill", "--steps", "201", "--batch-size", "2", "--snapshots", "2", "--transfer-set", "shards"]
COMPARE = ["compare", "student", "--out", "new"]
OF_RUN = ("run.json", ".lock", "last.ckpt")  # with times


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_teacher, session_cli) -> Path:
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(make_teacher("lenet5"), place / "teacher")
    for command in (SYNTHESIZE, DISTILL):
        assert session_cli(place, *command) == 0
    return place


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(place: Path) -> dict[Path, bytes]:
    files = [path for name in ("shards", "student") for path in (place / name).rglob("*")]
    return {path.relative_to(place): path.read_bytes() for path in files if path.is_file() and path.name not in OF_RUN}


def flip(file: str, at: int = -9) -> None:
    data = bytearray(Path(file).read_bytes())
    data[at] ^= 1
    Path(file).write_bytes(data)


def change_number() -> None:
    """Another digit in the second row of the curves."""
    text = Path("student/metrics.csv").read_text()
    at = text.rindex(".") + 2
    Path("student/metrics.csv").write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


def interrupt() -> None:
    edit(Path("student/run.json"), status="interrupted", artifacts=[])


SNAPSHOT, CURVES = "student/snapshots/round-00000.safetensors", "student/metrics.csv"
DAMAGE: dict[str, Callable[[], object]] = {
    "snapshot": lambda: flip(SNAPSHOT),
    "snapshot gone": lambda: Path(SNAPSHOT).unlink(),
    "curves": change_number,
    "curves gone": lambda: Path(CURVES).unlink(),
}


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_early_rounds_wrote_is_made_anew(damage, unfinished, here, finished, cli) -> None:
    if unfinished:
        interrupt()
    DAMAGE[damage]()
    code, _, err = cli(*DISTILL)
    assert (code, results(here)) == (0, results(finished))
    assert "damaged or gone; all rounds are done again" in err


@pytest.mark.parametrize("file", ["shards/manifest.json", "shards/metrics.csv", "shards/preview.png"])
def test_what_shards_tell_is_written_anew(file: str, here: Path, finished: Path, cli) -> None:
    flip(file, 40)
    assert cli(*SYNTHESIZE)[0] == 0
    assert results(here) == results(finished)


def refuse(cli, command: list[str], *words: str) -> None:
    code, out, err = cli(*command)
    assert (code, out) == (3, ""), err
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err


def test_shards_are_those_on_record_whatever_the_manifest_has_lost(here: Path, finished: Path, cli) -> None:
    flip("shards/shard-00001.safetensors")
    flip("shards/manifest.json", 0)
    code, _, err = cli(*SYNTHESIZE)
    assert code == 0, err
    assert results(here) == results(finished)


def test_what_is_on_record_is_known_from_inside_too(here: Path, monkeypatch) -> None:
    part = Path("student/snapshots")
    expected = {Path(path.name): sha256 for path, sha256 in on_record(part).items()}
    flip(str(part / min(expected)))
    monkeypatch.chdir(part)
    assert on_record(Path(".")) == expected and len(expected) > 1
    with pytest.raises(ArtifactError, match="damaged"):
        intact(min(expected))


def test_what_a_record_says_is_what_was_recorded(here: Path, cli) -> None:
    """A value of the declared type, but another one."""
    path = Path("student/run.json")
    record = json.loads(path.read_text())
    for name, value in (("seconds", 1e6), ("metrics", {"agreement_on_transfer_set": 1.0}), ("status", "failed")):
        path.write_text(json.dumps(record | {name: value}))
        refuse(cli, [*DISTILL, "-q"], "run.json is damaged: its sha256 is not the recorded one")
        refuse(cli, ["info", "student"], "run.json is damaged: its sha256 is not the recorded one")
    path.write_text(json.dumps({name: value for name, value in record.items() if name != "sha256"}))  # as once
    assert cli("info", "student")[0] == 0


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_comparison_reads_nothing_damaged(damage: str, here: Path, cli) -> None:
    DAMAGE[damage]()
    code, _, err = cli(*COMPARE, "-q")
    assert code == 3
    assert Path(CURVES if "curves" in damage else SNAPSHOT).name in err
    assert ("missing" if "gone" in damage else "its sha256 is not the recorded one") in err


def test_a_comparison_shows_no_damaged_preview(here: Path, cli) -> None:
    flip("shards/preview.png")
    refuse(cli, [*COMPARE, "-q"], "shards/preview.png is damaged: its sha256 is not the recorded one")


def test_every_flipped_bit_of_a_checkpoint_is_noticed(here: Path, cli) -> None:
    interrupt()
    checkpoint = Path("student/checkpoints/last.ckpt")
    whole = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as file:
        places = [whole.index(file.read(entry), entry.header_offset) for entry in file.infolist() if entry.file_size]
    for place in places[:: len(places) // 6]:
        flip(str(checkpoint), place)
        refuse(cli, [*DISTILL, "-q"], "last.ckpt: not a readable checkpoint", "--overwrite")
        checkpoint.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epoch": 10**12}, "of another run"),
        ({"epoch": "1"}, "not a readable checkpoint"),
        ({"dfkd": {"id": "another", "kept": {}, "curves": None}}, "of another run"),
        ({"dfkd": {}}, "not a readable checkpoint"),
        ({"dfkd": 3}, "not a readable checkpoint"),
    ],
)
def test_the_checkpoint_of_another_run(change: dict, words: str, here: Path, cli) -> None:
    interrupt()
    state = torch.load("student/checkpoints/last.ckpt", weights_only=True)
    torch.save({**state, **change}, "student/checkpoints/last.ckpt")
    refuse(cli, [*DISTILL, "-q"], words, "--overwrite")


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("student/model.json", {"mean": [0.9]}),
        ("shards/manifest.json", {"seed": 5}),
        ("student/run.json", {"schema": 2}),
        ("student/run.json", {"identity": True}),
        ("student/run.json", {"concerns": 5}),
        ("student/run.json", {"metrics": {}}),
    ],
)
def test_a_record_that_is_not_the_recorded_one(file: str, values: dict, here: Path, cli) -> None:
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | values))
    refuse(cli, [*DISTILL, "-q"] if "run.json" in file else ["info", file.partition("/")[0]], file.partition("/")[0])


@pytest.mark.parametrize("file", [SNAPSHOT, CURVES, "student/model.safetensors", "shards/shard-00001.safetensors"])
def test_info_looks_at_every_file(file: str, here: Path, cli) -> None:
    flip(file)
    refuse(cli, ["info", file.partition("/")[0]], f"{file} is damaged")


def test_rows_twice_or_in_another_order(here: Path, cli) -> None:
    manifest = Path("shards/manifest.json")
    rows = json.loads(manifest.read_text())["shards"]
    for others in (rows * 2, rows[::-1], rows[:1]):
        edit(manifest, shards=others)
        refuse(cli, ["distill", "--steps", "1", "--out", "x"], "does not name shard after shard")


def test_a_directory_that_has_lost_its_record_is_no_folder_of_images(here: Path, cli) -> None:
    Path("shards/manifest.json").unlink()
    for command in (["distill", "--steps", "1", "--out", "x"], ["evaluate", "shards"]):
        refuse(cli, command, "shards/manifest.json is missing")
    Path("shards/run.json").unlink()
    refuse(cli, ["distill", "--steps", "1", "--out", "x"], "shards was made by dfkd")


def test_an_unfinished_student_is_called_that(here: Path, cli) -> None:
    interrupt()
    Path("student/model.json").unlink()
    for command in (
        ["evaluate", "student"], COMPARE,
        ["distill", "--steps", "1", "--out", "x", "--transfer-set", "student"],
        ["distill", "--steps", "1", "--out", "x", "--teacher", "student", "--transfer-set", "noise:9"],
    ):  # fmt: skip
        refuse(cli, [*command, "-q"], "student: its distill is not finished", "same command again")
