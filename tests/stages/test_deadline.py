"""A synthesis that ends at a deadline: a smaller set that is valid, and that the same command completes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pipeline import finish_on_two

from dfkd_cli.artifacts.files import digest, sha256_file
from dfkd_cli.artifacts.integrity import write_run
from dfkd_cli.artifacts.shards import ShardReader

SMALL = ("--num-images", 20, "--batch-size", 6, "--iterations", 2, "--device", "cpu")
STUDENT = ("--student", "resnet8", "--student-steps", 2, "--width", 0.1)
OF_SHARDS = ("schema", "kind", "complete", "count", "range", "class_histogram", "shards")  # of a manifest
METHODS = {"zskd": (), "sre2l": ("--no-view-flip",), "nayer": STUDENT, "cmi": STUDENT}


def made(directory: Path) -> dict[str, str]:
    """The hashes of all that is a result."""
    record = json.loads((directory / "run.json").read_text())
    assert record["status"] == "done"
    for item in record["artifacts"]:
        assert sha256_file(directory / item["path"]) == item["sha256"]
    return {item["path"]: item["sha256"] for item in record["artifacts"]}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_made_by_then_is_a_set_and_the_same_command_goes_on(method, cli, make_teacher, tmp_path):
    teacher = make_teacher("resnet8")
    command = ["synthesize", "--method", method, "--teacher", teacher, *SMALL, *METHODS[method]]
    code, _, err = cli(*command, "--out", tmp_path / "set", "--deadline", "0s")  # one round is done in any case
    assert code == 0, err
    assert "6 of 20 images" in err and "the same command goes on" in err
    assert ("student/ has learned nothing" in err) == (method == "nayer")  # its first round is of the warm-up
    assert ShardReader(tmp_path / "set").sizes == [6]
    record = json.loads((tmp_path / "set" / "run.json").read_text())
    assert record["metrics"]["count"] == sum(record["metrics"]["class_histogram"]) == 6
    assert record["cut_at"] == {"shards": 1, "of": 4}
    made(tmp_path / "set")

    taught = ["distill", "--teacher", teacher, "--transfer-set", tmp_path / "set", "--steps", 1, "--holdout", 0]
    assert cli(*taught, "--student", "resnet8", "--batch-size", 6, "--out", tmp_path / "student")[0] == 0

    code, _, err = cli(*command, "--out", tmp_path / "set", "--deadline", "0s")  # a second time of the same length
    assert code == 0 and "12 of 20 images" in err and "done again" not in err and "learned nothing" not in err
    assert ShardReader(tmp_path / "set").sizes == [6, 6]
    code, _, err = cli(*command, "--out", tmp_path / "set", "--deadline", "9d")
    assert code == 0 and "deadline" not in err and "done again" not in err
    assert "cut_at" not in json.loads((tmp_path / "set" / "run.json").read_text())
    assert cli(*command, "--out", tmp_path / "whole")[0] == 0
    assert made(tmp_path / "set") == made(tmp_path / "whole")
    assert "already complete" in cli(*command, "--out", tmp_path / "set")[2]


def test_processes_stop_together(make_teacher, tmp_path):
    command = ["synthesize", "--method", "zskd", "--teacher", make_teacher("lenet5"), *SMALL]
    finish_on_two([str(part) for part in (*command, "--deadline", "0s")], tmp_path)
    assert ShardReader(tmp_path / "shards").sizes == [6, 6]


def test_a_grid_has_none(cli, tmp_path):
    """Its students would be of a set that grows when the grid is continued."""
    rows = "rows: {noise: {synthesize: {method: noise, deadline: 1h}}}"
    (tmp_path / "grid.yaml").write_text(f"command: compare\ngrid: {{teacher: {{recipe: digits}}, {rows}}}\n")
    code, _, err = cli("compare", "--recipe", tmp_path / "grid.yaml", "--out", tmp_path / "out")
    assert code == 2 and "deadline: the grid itself decides this" in err


def test_of_shards_behind_a_gap_nothing_is_kept(cli, make_teacher, tmp_path):
    """A set is its shards in order: what lies behind a missing one waits for it."""
    command = ["synthesize", "--method", "zskd", "--teacher", make_teacher("lenet5"), *SMALL, "--out", tmp_path / "set"]
    assert cli(*command)[0] == 0
    whole = made(tmp_path / "set")
    for index in (1, 2):
        (tmp_path / "set" / f"shard-0000{index}.safetensors").write_bytes(b"damaged")
    code, _, err = cli(*command, "--deadline", "0s")
    assert code == 0 and "12 of 20 images" in err
    assert ShardReader(tmp_path / "set").sizes == [6, 6]
    assert cli(*command)[0] == 0
    assert made(tmp_path / "set") == whole


@pytest.mark.parametrize("text", ["30", "m", "-1s", "1w", "1e9s", "30 m", "soon"])
def test_a_time_has_a_number_and_a_unit(text, cli, tmp_path):
    code, _, err = cli("synthesize", "--method", "noise", f"--deadline={text}", "--out", tmp_path / "set")
    assert code == 2 and "30m" in err and len(err.strip().splitlines()) == 1


def test_methods_that_make_images_last_refuse_it(cli, make_teacher, tmp_path):
    command = ["synthesize", "--method", "zskt", "--teacher", make_teacher("resnet8"), "--student", "resnet8"]
    code, _, err = cli(*command, "--steps", 2, "--width", 0.1, "--deadline", "1h", "--out", tmp_path / "set")
    assert code == 2 and "at the very end" in err
    command = ["synthesize", "--method", "nayer", "--teacher", make_teacher("resnet8"), "--student", "resnet8"]
    code, _, err = cli(*command, "--snapshots", 2, "--deadline", "1h", "--out", tmp_path / "set")
    assert code == 2 and "--snapshots" in err


def test_a_set_that_an_older_version_began_is_gone_on_with(cli, make_teacher, tmp_path):
    """It knew fewer options, whose defaults change nothing: what it has made is not made again."""
    command = ["synthesize", "--method", "zskd", "--teacher", make_teacher("lenet5"), *SMALL]
    out, unknown = tmp_path / "set", ("jitter", "soften")
    assert cli(*command, "--out", out, "--deadline", "0s")[0] == 0
    record, manifest = (json.loads((out / name).read_text()) for name in ("run.json", "manifest.json"))
    for key in unknown:
        del record["identity"][key], manifest["config"][key]
    head = {key: value for key, value in manifest.items() if key not in OF_SHARDS}
    shard = out / "shard-00000.safetensors"
    with safetensors.safe_open(shard, framework="pt") as file:
        facts = json.loads(file.metadata()["dfkd"])
    older = safetensors.torch.save(
        safetensors.torch.load_file(shard), {"dfkd": json.dumps(facts | {"key": digest(head)})}
    )
    shard.write_bytes(older)
    manifest["shards"][0]["sha256"] = sha256_file(shard)
    (out / "manifest.json").write_text(json.dumps(manifest))
    for item in record["artifacts"]:
        item["sha256"] = sha256_file(out / item["path"])
    write_run(out, {key: value for key, value in record.items() if key != "sha256"})

    code, _, err = cli(*command, "--out", out)
    assert code == 0, err
    assert shard.read_bytes() == older, "made again"
    assert cli(*command, "--out", tmp_path / "whole")[0] == 0
    one, other = (ShardReader(path) for path in (out, tmp_path / "whole"))
    assert one.sizes == other.sizes == [6, 6, 6, 2]
    for index in range(4):
        assert torch.equal(one.read(index)["images"], other.read(index)["images"])
    assert "already complete" in cli(*command, "--out", out)[2]
