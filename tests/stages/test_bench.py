"""`dfkd bench`: which settings are timed, what is said of the best, and what is left as it was."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from pipeline import finish

from dfkd_cli.artifacts.files import sha256_file

QUICK = ("--batch-size", 2, "--min-time", 0.001, "--device", "cpu")


@pytest.mark.parametrize(("threads", "counts"), [((), [1]), (("--threads", 1), [1]), (("--threads", 3), [1, 2, 3])])
def test_every_setting_is_timed(threads, counts, cli, make_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher, before = make_teacher("resnet8"), torch.get_num_threads()
    weights = sha256_file(teacher / "model.safetensors")
    try:
        code, out, err = cli("bench", teacher, *QUICK, *threads, "--json")
    finally:
        torch.set_num_threads(before)
    assert code == 0, err
    answer = json.loads(out)
    timed = [(result["threads"], result["precision"], result["layout"]) for result in answer["results"]]
    assert sorted(timed) == sorted(itertools.product(counts, ("32", "bf16"), ("contiguous", "channels last")))
    took = [result["seconds"] for result in answer["results"]]
    assert took == sorted(took) and took[0] > 0
    assert all(result["rate"] == pytest.approx(1 / result["seconds"]) for result in answer["results"])
    own = next(result for result in answer["results"] if result["layout"] == "channels last")  # it has BatchNorm
    assert answer["metrics"]["best"] == {"threads": own["threads"], "precision": own["precision"]}
    assert list(tmp_path.iterdir()) == []
    assert sha256_file(teacher / "model.safetensors") == weights


def test_it_says_what_to_type(cli, make_teacher):
    code, out, _ = cli("bench", make_teacher("lenet5"), *QUICK)
    assert code == 0
    *table, last = out.strip().splitlines()
    assert table[0].split()[:3] == ["THREADS", "PRECISION", "LAYOUT"] and len(table) == 5
    best = next(line for line in table if "contiguous" in line).split()  # without BatchNorm
    assert last == f"cpu: --threads 1 --precision {best[1]}"


def test_the_teacher_stands_in_a_file_too(cli, make_teacher, tmp_path):
    (tmp_path / "net.yaml").write_text(f"teacher: {make_teacher('lenet5')}\n")
    code, out, err = cli("bench", "--recipe", tmp_path / "net.yaml", *QUICK)
    assert code == 0 and out.strip().splitlines()[-1].startswith("cpu: --threads 1 "), err


def test_more_than_fits_is_one_line(cli, make_teacher):
    code, _, err = cli("bench", make_teacher("lenet5"), "--batch-size", 10**12, "--device", "cpu")
    assert code == 4 and "out of memory" in err and len(err.strip().splitlines()) == 1


def test_it_writes_nothing_where_it_is_called(make_teacher, tmp_path):
    """In a process of its own, which the kernel confines where it can: what lies there stays."""
    (tmp_path / ".scratch").write_text("mine")
    finish(["bench", str(make_teacher("lenet5")), *map(str, QUICK)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".scratch"]
    assert (tmp_path / ".scratch").read_text() == "mine"
