"""Directories that were received: whatever links they hold, nothing outside of ``--out`` changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pipeline import edit
from tiny_comparisons import tree

TINY = ("--steps", "2", "--batch-size", "4", "--holdout", "0")
COMMANDS = {
    "train-teacher": ["train-teacher", *TINY, "--logger", "tensorboard", "--snapshots", "2"],
    "pooled": ["synthesize", "--method", "zskd", "--num-images", "8", "--batch-size", "4", "--iterations", "2"],
    "streaming": ["synthesize", "--method", "zskt", "--student", "lenet5-half", "--num-images", "4", *TINY[:4]],
    "distill": ["distill", "--transfer-set", "noise:8", *TINY, "--snapshots", "2"],
    "collect-metadata": ["collect-metadata", "--num-images", "20"],
    "evaluate": ["evaluate", "noise:4"],
    "compare": ["compare", "teacher"],
    "grid": ["compare", "--recipe", "grid.yaml"],
}
GRID = {
    "seeds": [0],
    "teacher": "teacher",
    "student": {"steps": 2, "batch_size": 4},
    "rows": {"noise": {"distill": {"transfer_set": ["noise:4"]}}},
}


@pytest.fixture(params=COMMANDS)
def unfinished(request, tmp_path, monkeypatch, teacher, cli) -> list[str]:
    """A command whose out/ is there but for the last file that it would write. It is run in a directory of its own."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "teacher").symlink_to(teacher)
    (work / "grid.yaml").write_text(json.dumps({"grid": GRID}))
    command = [*COMMANDS[request.param], "--out", "out"]
    code, _, err = cli(*command)
    assert code == 0, err
    for file in Path("out").rglob("run.json"):
        edit(file, status="interrupted", artifacts=[])
    return command


@pytest.fixture
def victim(tmp_path) -> Path:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / ".mine.tmp").write_text("precious")
    return tmp_path / "victim"


def move_away(path: Path, victim: Path) -> None:
    """Leave a link where the path was."""
    os.replace(path, victim / path.name)
    path.symlink_to(victim / path.name)


def test_directories_that_lead_out_are_refused_or_removed(unfinished, victim, cli):
    (Path("out") / "inside").symlink_to("../out")  # harmless
    for path in [path for path in Path("out").iterdir() if path.is_dir() and not path.is_symlink()]:
        (path / ".x.tmp").write_text("precious")
        move_away(path, victim)
    (Path("out") / "more").symlink_to(victim)
    before = tree(victim, ".")
    code, _, err = cli(*unfinished)
    assert (code, "is a link out of out" in err, err.count("\n")) == (3, True, 1), err
    assert tree(victim, ".") == before
    code, _, err = cli(*unfinished, "--overwrite")
    assert code == 0, err
    assert tree(victim, ".") == before


def test_files_are_replaced_where_they_are_links(unfinished, victim, cli):
    for path in [path for path in Path("out").rglob("*") if path.is_file() and path.name != ".lock"]:
        os.replace(path, place := victim / "-".join(path.parts))
        path.symlink_to(place)
    before = tree(victim, ".")
    code, _, err = cli(*unfinished)
    # The runs of a grid are sealed by the kernel where it can: it lets them read nothing that lies elsewhere.
    assert code == 0 or (unfinished[0] == "compare" and "run.json: not readable (Permission denied)" in err), err
    assert tree(victim, ".") == before
    assert not (Path("out") / "run.json").is_symlink()


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_the_lock_is_never_written(tmp_path, monkeypatch, teacher, victim, cli, overwrite):
    monkeypatch.chdir(tmp_path)
    command = ("evaluate", "noise:4", "--teacher", teacher, "--out", "out", *overwrite)
    for links in (Path.symlink_to, Path.hardlink_to):
        Path("out").mkdir(exist_ok=True)
        Path("out/.lock").unlink(missing_ok=True)
        links(Path("out/.lock"), victim / ".mine.tmp")
        code, _, err = cli(*command)
        assert (code, "is a link" in err) == ((3, True) if links is Path.symlink_to else (0, False)), err
        assert (victim / ".mine.tmp").read_text() == "precious"
    Path("out/.lock").unlink()
    Path("out/.lock").symlink_to("../nowhere")
    code, _, err = cli(*command, "--overwrite")
    assert (code, "is a link" in err) == (3, True), err
    assert not Path("nowhere").exists()


def test_the_users_own_directory_may_be_a_link(tmp_path, monkeypatch, teacher, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large-disk").mkdir()
    Path("out").symlink_to("large-disk")
    command = ("distill", "--teacher", teacher, "--transfer-set", "noise:8", *TINY, "--out", "out")
    assert cli(*command)[0] == 0
    assert cli(*command, "--overwrite")[0] == 0
    assert (tmp_path / "large-disk" / "model.json").is_file()
