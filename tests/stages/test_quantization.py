"""Students that are copies with few bits: ``distill --student w4a8:teacher/``."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from pipeline import finish, kill_after_saving
from safetensors.torch import load_file

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.data import landlock
from dfkd_cli.data.sources import NoiseSource
from dfkd_cli.models.directory import identity, load_model, read_record
from dfkd_cli.models.quantized import RoundingLayer, quantisers
from dfkd_cli.stages.quantization import calibration

COMMON = ("--batch-size", 16, "--rotate", 0, "--translate", 0, "--scale", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def residual(make_teacher):
    """A random ResNet-8 of digits."""
    return make_teacher("resnet8")


def distill(teacher, student, out, *args) -> list[str]:
    sets = [] if "--transfer-set" in args else ["--transfer-set", "noise:64"]
    return [
        str(a) for a in ("distill", "--teacher", teacher, *sets, "--student", student, "--out", out, *COMMON, *args)
    ]


def test_no_steps_calibrate_a_copy_that_stands_by_itself(cli, residual, tmp_path):
    out = tmp_path / "copy"
    code, said, err = cli(*distill(residual, f"w4a8:{residual}", out, "--steps", 0))
    assert code == 0, err
    assert "w4a8:resnet8: ranges from 64 images" in err
    record, teacher = read_record(out), load_file(residual / "model.safetensors")
    state = load_file(out / "model.safetensors")
    assert record["spec"] == "w4a8:resnet8"
    assert all(torch.equal(state[name], value) for name, value in teacher.items())
    assert {name.rpartition(".")[2] for name in state.keys() - teacher.keys()} == {"input_range", "output_range"}
    assert not (out / "metrics.csv").exists()
    parents = json.loads((out / "run.json").read_text())["parents"]
    assert {"role": "weights", "path": str(residual), "sha256": identity(read_record(residual))} in parents
    shutil.copytree(out, tmp_path / "elsewhere" / "copy")  # no teacher beside it
    copy, _ = load_model(tmp_path / "elsewhere" / "copy")
    assert all(module.calibrated for module in quantisers(copy.net))
    assert {m.weight_bits for m in quantisers(copy.net) if isinstance(m, RoundingLayer)} == {4, 8}
    code, said, err = cli("evaluate", out, "--teacher", residual, "--device", "cpu", "--json")
    assert code == 0, err
    (result,) = json.loads(said)["results"]
    assert (result["spec"], result["agreement"] > 0.5) == ("w4a8:resnet8", True)
    code, _, err = cli(*distill(residual, f"w4a8:{residual}", out, "--steps", 0))
    assert (code, "already complete" in err) == (0, True)
    code, said, err = cli(*distill(residual, f"w3a5:{out}", tmp_path / "again", "--steps", 0))
    assert (code, read_record(tmp_path / "again")["spec"]) == (0, "w3a5:resnet8"), err


def test_no_steps_leave_no_snapshots(cli, residual, tmp_path):
    code, _, err = cli(*distill(residual, "w8a8:", tmp_path / "copy", "--steps", 0, "--snapshots", 2))
    assert code == 0, err
    assert not (tmp_path / "copy" / "snapshots").exists()


def test_ranges_are_those_of_the_transfer_set_and_stay_in_training(cli, residual, tmp_path):
    student = f"w4a4:{residual}"
    for out, steps in (("calibrated", 0), ("trained", 2)):
        args = ["--transfer-set", "real:40", "--steps", steps, "--holdout", 0]
        assert cli(*distill(residual, student, tmp_path / out, *args))[0] == 0
    before, after = (load_file(tmp_path / out / "model.safetensors") for out in ("calibrated", "trained"))
    ranges = [name for name in before if name.endswith("range")]
    assert ranges and all(torch.equal(before[name], after[name]) for name in ranges)
    assert not torch.equal(before["stage2.0.conv1.weight"], after["stage2.0.conv1.weight"])
    made, _ = load_model(tmp_path / "trained")
    weight = made.net.stage2[0].conv1.weight.detach()
    assert max(len(channel.unique()) for channel in weight) <= 2**4 - 1


@pytest.mark.parametrize("mode,moves", [("free", True), ("frozen", False)])
def test_batch_norm_is_free_or_frozen(cli, residual, tmp_path, mode, moves):
    code, _, err = cli(
        *distill(residual, f"w8a8:{residual}", tmp_path / "s", "--steps", 2, "--batch-norm", mode, "--weight-decay", 0)
    )
    assert code == 0, err
    before, after = (load_file(place / "model.safetensors") for place in (residual, tmp_path / "s"))
    names = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert [torch.equal(before[name], after[name]) for name in names] == [not moves] * len(names)
    assert not torch.equal(before["stage1.0.bn1.weight"], after["stage1.0.bn1.weight"])


@pytest.mark.parametrize(
    "method",
    [
        ("pseudo-examples", "--pseudo-images", 4, "--iterations", 1),
        ("active-mixup", "--answers", "label", "--rounds", 1, "--mixups", 4, "--candidates", 4),
        ("kdcl", "--ensemble", "general", "--holdout", 0.1),
    ],
    ids=lambda method: method[0],
)
def test_batch_norm_stays_frozen_whatever_a_regime_does_between_its_steps(method, cli, residual, tmp_path):
    args = ("--transfer-set", "real:64", "--steps", 3, "--batch-norm", "frozen", "--method", *method)
    if method[0] == "kdcl":
        args = (*args, "--students", f"w8a8:{residual}", f"w8a8:{residual}")
    code, _, err = cli(*distill(residual, f"w8a8:{residual}", tmp_path / "s", *args))
    assert code == 0, err
    before, after = (load_file(place / "model.safetensors") for place in (residual, tmp_path / "s"))
    names = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert names and all(torch.equal(before[name], after[name]) for name in names)


def test_each_of_several_students_has_batch_norm_of_its_own(cli, tmp_path, monkeypatch):
    """A copy that the images are far from does not keep another student from learning its statistics."""
    monkeypatch.chdir(tmp_path)
    assert cli("train-teacher", "--model", "resnet8", "--steps", 60, "--batch-size", 32, "--device", "cpu")[0] == 0
    args = ("--transfer-set", "noise:64", "--steps", 2, "--method", "kdcl", "--students", "w8a8:teacher", "resnet8")
    code, _, err = cli(*distill("teacher", "w8a8:teacher", "s", *args))
    assert code == 0 and "BatchNorm is frozen" in err, err
    before, copy, other = (load_file(f"{place}/model.safetensors") for place in ("teacher", "s", "s/peer-1"))
    names = [name for name in before if name.endswith("running_mean")]
    assert names and all(torch.equal(before[name], copy[name]) for name in names)
    assert all(other[name].any() for name in names)


def test_batch_norm_is_frozen_where_images_are_not_its_own(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = ["--steps", 60, "--batch-size", 32, "--device", "cpu"]
    assert cli("train-teacher", "--model", "resnet8", *learn)[0] == 0
    for images, said in (("real:100", "BatchNorm is free"), ("noise:100", "BatchNorm is frozen")):
        args = distill("teacher", "w8a8:teacher", images[:4], "--transfer-set", images, "--steps", 2)
        code, _, err = cli(*args)
        assert (code, said in err) == (0, True), err


def test_a_killed_training_continues_with_the_same_ranges(teacher, tmp_path):
    command = distill(teacher, f"w4a4:{teacher}", "whole", "--steps", 220, "--batch-size", 2)
    finish(command, tmp_path)
    killed = ["killed" if word == "whole" else word for word in command]
    kill_after_saving(killed, tmp_path, tmp_path / "killed" / "checkpoints" / "last.ckpt")
    finish(killed, tmp_path)
    assert sha256_file(tmp_path / "killed/model.safetensors") == sha256_file(tmp_path / "whole/model.safetensors")


def test_a_confined_process_reads_what_it_copies(residual, tmp_path):
    shutil.copytree(residual, tmp_path / "other")
    finish(distill(residual, "w8a8:other", "out", "--steps", 0), tmp_path)
    sealed = json.loads((tmp_path / "out" / "run.json").read_text())["sealed"]
    assert sealed == ("landlock" if landlock.version() else "python")


def test_bits_alone_are_a_copy_of_the_teacher(cli, teacher, tmp_path):
    assert cli(*distill(teacher, "w4a8:", tmp_path / "s", "--steps", 0))[0] == 0
    state, own = (load_file(place / "model.safetensors") for place in (tmp_path / "s", teacher))
    assert all(torch.equal(state[name], value) for name, value in own.items())
    several = distill(teacher, "w4a8:", tmp_path / "t", "--steps", 0)
    several.insert(several.index("--teacher") + 2, str(teacher))
    code, _, err = cli(*several)
    assert (code, "a copy of the teacher, which has to be one network" in err) == (2, True), err


def test_a_copy_is_rehearsed_as_it_will_be_trained(cli, teacher, tmp_path):
    """Before its ranges are found it answers as the teacher does, so that no objective would teach it anything."""
    for mode in (["--dry-run"], []):
        code, _, err = cli(*distill(teacher, "w4a4:", tmp_path / "s", "--steps", 2), *mode)
        assert code == 0, err


def test_a_foreign_teacher_can_be_copied(cli, teacher, tmp_path):
    (tmp_path / "net.py").write_text(
        "from dfkd_cli.models.lenet import build\ndef net(): return build('lenet5', 10, (1, 32, 32))"
    )
    weights = teacher / "model.safetensors"
    foreign = ["--weights", weights, "--input-size", 1, 32, 32, "--num-classes", 10, "--mean", 0.3, "--std", 0.4]
    spec = f"{tmp_path}/net.py:net"
    code, _, err = cli(*distill(spec, "w4a8:", tmp_path / "s", "--steps", 0, *foreign))
    assert code == 0, err
    copy, record = load_model(tmp_path / "s", allow_code=True)
    own = load_model(teacher)[0].net.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in copy.net.state_dict().items() if name in own)
    assert (record["spec"], record["mean"]) == (f"w4a8:{spec}", [0.3])
    taught, *_, copied = json.loads((tmp_path / "s" / "run.json").read_text())["parents"]
    assert (copied["role"], copied["sha256"]) == ("weights", taught["sha256"])


def test_a_copy_in_the_loop_has_ranges_that_follow(cli, residual, tmp_path):
    args = ["--teacher", residual, "--student", "w4a4:", "--steps", 3, "--batch-size", 8, "--num-images", 8]
    code, _, err = cli("synthesize", "--method", "dfq", *args, "--width", 0.1, "--device", "cpu", "--out", tmp_path)
    assert code == 0, err
    student, record = load_model(tmp_path / "student")
    assert record["spec"] == "w4a4:resnet8" and all(module.calibrated for module in quantisers(student.net))
    weight = student.net.stage2[0].conv1.weight.detach()
    assert max(len(channel.unique()) for channel in weight) <= 2**4 - 1


def test_a_copy_in_the_loop_learns_alone(cli, residual, tmp_path):
    args = ["--teacher", residual, "--student", "w4a4:", "--students", 2, "--steps", 3, "--num-images", 8]
    code, _, err = cli("synthesize", "--method", "dfq", *args, "--device", "cpu", "--out", tmp_path / "s")
    assert (code, "a copy of the teacher learns alone: give --students 1" in err) == (2, True), err


def test_what_cannot_be_a_copy_is_refused(cli, teacher, residual, tmp_path):
    refused = {
        (teacher, "lenet5-half", "--steps", 0): "--steps 0: nothing is learned",
        (teacher, "w8a8:lenet5-half", "--steps", 0): "--steps 0: nothing is learned",  # it would stay random
        (teacher, "w1a8:lenet5", "--steps", 1): "w1a8 is not a pair of widths from 2 to 8",
        (teacher, f"w8a8:{tmp_path}", "--steps", 0): "no model.json in it",
        (teacher, "w8a8:absent", "--steps", 0): "absent: unknown model",
    }
    for (taught_by, student, *args), message in refused.items():
        code, _, err = cli(*distill(taught_by, student, tmp_path / "out", *args))
        assert code in (2, 3) and message in err and err.count("\n") == 1, err
    model = shutil.copytree(residual, tmp_path / "model")
    record = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(record | {"classes": list("abcdefghij")}))
    code, _, err = cli(*distill(residual, f"w8a8:{model}", tmp_path / "out", "--steps", 0))
    assert (code, "its classes is" in err) == (3, True), err


def test_calibration_takes_images_of_all_parts_of_a_set():
    images = calibration(NoiseSource(2000, (1, 4, 4), 0), 5)
    whole = NoiseSource(2000, (1, 4, 4), 0).all().pixels
    assert torch.equal(images.all().pixels, whole[[0, 500, 1000, 1499, 1999]])
    assert len(calibration(NoiseSource(3, (1, 4, 4), 0))) == 3
