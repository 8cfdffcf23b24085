"""Assistants and generations: hops are distillations like any other, made once, found again after kills."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from forks import Fork
from pipeline import HANGS, edit, finish
from tiny_comparisons import results_in

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.regimes import takd
from dfkd_cli.stages.chain import Chain, Hop, who_teaches_whom

SETS = ("--transfer-set", "real:64")
SHORT = (*SETS, "--steps", "30", "--batch-size", "16", "--temperature", "4", "--device", "cpu")
TAKD = ("distill", "--method", "takd", "--student", "lenet5-half-dafl", "--assistants", "lenet5", "lenet5-half")


def weights(directory: Path) -> str:
    return sha256_file(directory / "model.safetensors")


def record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


def metrics(directory: Path) -> dict[str, float]:
    return record(directory)["metrics"]


def compared(directory: Path, cli) -> dict[str, Any]:
    """The only run of each row of a comparison of a chain, by its path relative to that of the chain's directory."""
    out = directory.with_name(f"{directory.name}-compared")
    code, _, err = cli("compare", directory, "--out", out)
    assert code == 0, err
    (section,) = results_in(out)["sections"]
    assert section["rows"][0]["runs"][0]["sha256"] == section["rows"][1]["runs"][0]["teacher"]
    return {
        Path(run["path"]).relative_to(directory).as_posix(): run for row in section["rows"][1:] for run in row["runs"]
    }


@pytest.fixture
def here(tmp_path, monkeypatch, teacher) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").symlink_to(teacher)
    return tmp_path


def test_hops_of_own_code_lie_where_nothing_is_hidden(here, cli):
    Path("net.py").write_text(
        "from torch import nn\n\ndef small(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))\n"
    )
    code, _, err = cli(*TAKD[:5], "--assistants", "./net.py:small", *SHORT, "--teacher", "teacher", "--out", "own")
    assert code == 0, err
    assert [path.name for path in Path("own", "assistants").iterdir()] == ["net.py_small"]


@pytest.mark.parametrize(
    ("assistants", "more", "word"),
    [
        (("lenet5", "resnet20x"), (), "resnet20x"),
        (("lenet5", "resnet8"), ("--objective", "response", "rkd", "--taps", "fc2"), "fc2"),
    ],
)
def test_what_no_hop_can_be_made_of_is_found_before_the_first(assistants, more, word, here, cli):
    code, _, err = cli(*TAKD[:6], *assistants, *SHORT, *more, "--out", "chain")
    assert (code, word in err, err.count("\n")) == (2, True, 1), err
    assert not Path("chain").exists()


@pytest.mark.parametrize(
    ("path", "pairs"),
    [
        ("dense", {(None, "a"), ("a", "b"), ("b", "s")}),
        ("auto", {(None, "a"), (None, "b"), (None, "s"), ("a", "s"), ("b", "s")}),
        ("best", {(None, "a"), (None, "b"), (None, "s"), ("a", "b"), ("a", "s"), ("b", "s")}),
    ],
)
def test_who_may_teach_whom(path, pairs):
    config = takd.Config(assistants=("a", "b"), path=path)
    assert set(who_teaches_whom(config, "s")) == pairs


def test_a_chain_is_its_hops_one_after_the_other(here, cli):
    code, out, err = cli(*TAKD, *SHORT, "--out", "chain")
    assert code == 0, err
    assert out.count("\n") == 1, "the hops are no answers"
    first, second = here / "chain" / "assistants" / "lenet5", here / "chain" / "assistants" / "lenet5--lenet5-half"
    line = json.loads((here / "chain" / "model.json").read_text())["provenance"]["line"]
    assert len(line) == 3  # the last assistant, the first, and the teacher
    # The last hop by itself: the same student of the same teacher.
    student = ("distill", "--teacher", second, "--student", "lenet5-half-dafl", *SHORT, "--out", "alone")
    assert cli(*student)[0] == 0
    assert weights(here / "alone") == weights(here / "chain")
    assert metrics(here / "alone")["agreement_on_transfer_set"] == pytest.approx(
        metrics(here / "chain")["agreement_with_last_teacher"]
    )
    code, _, err = cli("info", "chain")
    assert code == 0, err
    assert weights(first) != weights(second)
    before = {path: path.stat().st_mtime_ns for path in (here / "chain").rglob("*.safetensors")}
    code, _, err = cli(*TAKD, *SHORT, "--out", "chain")
    assert (code, "already complete" in err) == (0, True), err
    assert {path: path.stat().st_mtime_ns for path in (here / "chain").rglob("*.safetensors")} == before


def test_a_comparison_shows_the_hops_of_a_chain_beside_its_student(here, tmp_path_factory, monkeypatch, cli):
    assert cli(*TAKD, *SHORT, "--out", "chain")[0] == 0
    first, second = here / "chain" / "assistants" / "lenet5", here / "chain" / "assistants" / "lenet5--lenet5-half"
    rows = compared(here / "chain", cli)
    assert rows.keys() == {".", "assistants/lenet5", "assistants/lenet5--lenet5-half"}
    assert len({run["teacher"] for run in rows.values()}) == 1, "all are measured against the first teacher"
    for place, run in rows.items():
        code, out, err = cli("evaluate", here / "chain" / place, "--teacher", "teacher", "--json")
        assert code == 0, err
        assert {name: run["measures"][name] for name in ("top1", "agreement")} == {
            name: json.loads(out)["metrics"][name] for name in ("top1", "agreement")
        }
    code, out, _ = cli("evaluate", "chain", "--json")
    assert json.loads(out)["metrics"]["agreement"] == rows["."]["measures"]["agreement"]
    took = [record(place)["seconds"] for place in (first, second, here / "chain")]
    shown = {place: run["seconds"]["training"] for place, run in rows.items()}
    hops = {"assistants/lenet5": took[0], "assistants/lenet5--lenet5-half": took[0] + took[1]}
    assert shown == {".": pytest.approx(took[2]), **hops}
    assert took[0] + took[1] < took[2]
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for place in (first, second):
        code, out, err = cli("evaluate", place, "--json")
        assert json.loads(out)["results"][0]["agreement"] is not None, err
    assert compared(here / "chain", cli).keys() == rows.keys()
    monkeypatch.chdir(here)
    # Each counts once, and a hop that is named by itself is the same row.
    code, out, err = cli("compare", first, "chain", "--out", "both", "--json")
    assert code == 0, err
    (section,) = json.loads(out)["sections"]
    assert len(section["rows"]) == 4
    work = [run["work"] for row in section["rows"] for run in row["runs"]]
    assert sum({path: s for each in work for path, s in each.items()}.values()) == pytest.approx(took[2])


def test_a_killed_chain_goes_on_at_its_hops(here):
    command = [*TAKD, *SHORT, "--out"]
    finish([*command, "whole"], here)
    second = here / "killed" / "assistants" / "lenet5--lenet5-half"
    process = Fork([*command, "killed"], here, (second / "run.json", signal.SIGKILL))
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == -signal.SIGKILL, err
    first = here / "killed" / "assistants" / "lenet5" / "model.safetensors"
    stamp = first.stat().st_mtime_ns
    assert not (second / "model.json").exists()
    edit(first.parent / "run.json", seconds=1000.0)
    finish([*command, "killed"], here)
    took = record(here / "killed")["seconds"]
    assert 0 < took - 1000 - record(second)["seconds"] < 1000
    (here / "killed" / "model.safetensors").unlink()
    finish([*command, "killed"], here)
    assert took < record(here / "killed")["seconds"] < 2000, "what is done again counts, a hop that is not counts once"
    assert first.stat().st_mtime_ns == stamp
    files = sorted(path.relative_to(here / "whole") for path in (here / "whole").rglob("model.safetensors"))
    assert len(files) == 3
    for file in files:
        assert sha256_file(here / "whole" / file) == sha256_file(here / "killed" / file), file


@pytest.mark.parametrize("path", ["dense", "best"])
def test_how_long_a_teacher_teaches_holds_for_every_hop(path, here, cli):
    one = ("distill", "--method", "takd", "--student", "lenet5-half", "--assistants", "lenet5", "--path", path)
    assert cli(*one, *SHORT, "--teacher-epochs", "0", "--out", "out")[0] == 0
    curves = sorted((here / "out").rglob("metrics.csv"))
    assert len(curves) == {"dense": 2, "best": 4}[path]
    assert {curve.read_text().splitlines()[0] for curve in curves} == {"round,labels,agreement"}


def test_a_student_of_the_best_way_is_as_one_that_was_trained_in_its_place(here, cli):
    """With what it is warned of and its snapshots; a copy with few bits may learn nothing."""
    one = ("distill", "--method", "takd", "--student", "lenet5-half", "--assistants", "lenet5", "--path", "best", *SETS)
    code, _, err = cli(*one, "--steps", "1", "--batch-size", "2", "--snapshots", "1", "--out", "out", "--device", "cpu")
    assert code == 0, err
    hops = [place.parent for place in (here / "out" / "assistants").rglob("model.safetensors")]
    (of,) = {hop for hop in hops if weights(hop) == weights(here / "out")}
    assert record(of)["concerns"] == record(here / "out")["concerns"] != []
    assert f"warning: {record(of)['concerns'][0]}" in err
    names = [file["path"] for file in record(of)["artifacts"]]
    assert names == [file["path"] for file in record(here / "out")["artifacts"]]
    assert "snapshots/round-00000.safetensors" in names and (here / "out" / names[0]).is_file()
    copy = ("--student", "w8a8:teacher", "--assistants", "w8a8:teacher", "--path", "best", "--steps", "0", *SETS)
    code, _, err = cli("distill", "--method", "takd", *copy, "--batch-size", "2", "--out", "copy", "--device", "cpu")
    assert code == 0, err
    assert not (here / "copy" / "metrics.csv").exists()


def test_hops_are_not_shared(here, cli):
    code, _, err = cli(*TAKD, *SHORT, "--devices", "2")
    assert (code, "trained by one process" in err) == (2, True), err


def test_generations_are_other_networks_of_one_architecture(here, cli):
    born = ("distill", "--method", "born-again", "--student", "lenet5-half", "--generations", "3", *SHORT)
    assert cli(*born, "--out", "generations")[0] == 0
    places = sorted(path.parent for path in (here / "generations").rglob("model.safetensors"))
    assert len(places) == 3
    assert len({*map(weights, places)}) == 3
    assert {json.loads((place / "model.json").read_text())["spec"] for place in places} == {"lenet5-half"}


@pytest.mark.parametrize("path", ["auto", "best"])
def test_a_path_is_chosen_by_agreement(path, here, cli):
    code, _, err = cli(*TAKD, *SHORT, "--out", path, "--path", path)
    assert code == 0, err
    hops = {place.name: metrics(place)["agreement_on_transfer_set"] for place in (here / path / "assistants").iterdir()}
    student = "lenet5-half-dafl"
    if path == "auto":
        assert hops.keys() == {"lenet5", "lenet5-half", student}
        middle = (1 + hops[student]) / 2
        chosen = min(("lenet5", "lenet5-half"), key=lambda name: abs(hops[name] - middle))
        assert err.count(" teaches ") == 3
    else:
        assert len(hops) == 6  # each once: 1 + 2 + 3
        half = max(("lenet5-half", "lenet5--lenet5-half"), key=hops.__getitem__)
        ends = {student: "", f"lenet5--{student}": "lenet5", f"{half}--{student}": half}
        best = max(ends, key=hops.__getitem__)
        assert weights(here / path / "assistants" / best) == weights(here / path)
        assert metrics(here / path) == metrics(here / path / "assistants" / best)
        rows = compared(here / path, cli)
        way = best.split("--")[:-1]
        assert rows.keys() == {".", *("assistants/" + "--".join(way[: n + 1]) for n in range(len(way)))}, "no copy"
        # Each hop that was tried counts, once.
        took = {str(place): record(place)["seconds"] for place in (here / path / "assistants").iterdir()}
        work = rows["."]["work"]
        assert took.items() <= work.items()
        assert work.keys() == {*took, str(here / path)}
        assert sum(work.values()) == pytest.approx(record(here / path)["seconds"])
        return
    alone = (
        "distill",
        "--teacher",
        here / path / "assistants" / chosen,
        "--student",
        student,
        *SHORT,
        "--out",
        "alone",
    )
    assert cli(*alone)[0] == 0
    assert weights(here / "alone") == weights(here / path)


def test_the_best_way_to_each_network_goes_on():
    """Against all ways, where what a hop gives depends on the pair alone."""
    gains = {
        ("", "a"): 0.1,
        ("", "b"): 0.3,
        ("a", "b"): 0.15,
        ("", "s"): 0.0,
        ("a", "s"): 0.5,
        ("b", "s"): 0.35,
        ("", "z"): 0.0,
    }

    class Tried(Chain):
        def __init__(self) -> None:
            self.start, self.made, self.snapshots = Hop((), None, 0.0), [], 1

        def hop(self, teacher: Hop, spec: str, role: str | None = None, snapshots: int = 0) -> Hop:
            assert snapshots == (spec == "s")
            self.made.append((*teacher.path, spec))
            return Hop(self.made[-1], None, teacher.agreement + gains[(teacher.path or ("",))[-1], spec])

    chain = Tried()
    assert chain.best(["a", "b"], "s").path == ("b", "s")  # 0.65; a, s: 0.6; a, b, s: 0.6
    assert len(chain.made) == len({*chain.made}) == 6
    assert chain.dense(["a", "b"]).path == ("a", "b")
    assert chain.midway(["a", "b"], "z").path == ("b",)  # 0.3 is nearer to (1 + 0) / 2 than 0.1


@pytest.mark.parametrize("path", ["auto", "best"])
def test_an_assistant_may_be_as_the_student_and_that_a_copy_of_the_teacher(path, here, cli):
    command = (*TAKD[: TAKD.index("--student")], *SHORT, "--path", path, "--snapshots", 1, "--device", "cpu")
    code, _, err = cli(*command, "--student", "w8a8:", "--assistants", "lenet5-half", "w8a8:", "--out", path)
    assert code == 0, err
    assert "device" in record(here / path)
