"""Metadata directories: read as they were written, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from dropout_network import TEMPERATURE, small_teacher
from stand_ins import statistics_of

from dfkd_cli.artifacts.metadata import read_metadata, write_metadata

FAST = ("--batch-size", "4", "--iterations", "2", "--num-images", "8")


def test_metadata_is_read_as_it_was_written(tmp_path):
    metadata = statistics_of(small_teacher(), covariance_units=8)
    write_metadata(tmp_path, metadata, {"teacher": {"sha256": "t"}})
    read, _ = read_metadata(tmp_path, "t")
    assert list(read.layers) == list(metadata.layers)
    assert (list(read.counts), read.temperature, read.joint) == (metadata.counts, TEMPERATURE, ("4", "6"))
    assert torch.equal(read.covariance, metadata.covariance)
    for name, layer in metadata.layers.items():
        assert (read.layers[name].shape, read.layers[name].joint) == (layer.shape, layer.joint)
        assert torch.equal(read.layers[name].mean, layer.mean)
        assert torch.equal(read.layers[name].std, layer.std)
    first = (tmp_path / "metadata.safetensors").read_bytes()
    write_metadata(tmp_path, metadata, {"teacher": {"sha256": "t"}})
    assert (tmp_path / "metadata.safetensors").read_bytes() == first


def change_record(path: Path, change) -> None:
    record = json.loads((path / "metadata.json").read_text())
    change(record)
    (path / "metadata.json").write_text(json.dumps(record))


def flip(path: Path) -> None:
    data = bytearray((path / "metadata.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "metadata.safetensors").write_bytes(data)


DAMAGE = {
    "flipped": (flip, "damaged"),
    "no tensors": (lambda path: (path / "metadata.safetensors").unlink(), "missing"),
    "no record": (lambda path: (path / "metadata.json").unlink(), "dfkd collect-metadata"),
    "not JSON": (lambda path: (path / "metadata.json").write_text("{"), "damaged"),
    "another kind": (
        lambda path: change_record(path, lambda r: r.update(kind="model")),
        "holds 'model', not 'metadata'",
    ),
    "newer": (lambda path: change_record(path, lambda r: r.update(schema=2)), "schema 1"),
    "no layers": (lambda path: change_record(path, lambda r: r.pop("layers")), "damaged"),
    "a layer too many": (lambda path: change_record(path, lambda r: r["layers"][0].update(name="x")), "damaged"),
    "another shape": (lambda path: change_record(path, lambda r: r["layers"][0].update(shape=[7])), "damaged"),
    "another teacher": (lambda path: change_record(path, lambda r: r["teacher"].update(sha256="0")), "--teacher"),
}


@pytest.mark.parametrize(("damage", "word"), DAMAGE.values(), ids=DAMAGE)
def test_metadata_that_does_not_fit_is_refused(damage, word, make_teacher, make_metadata, tmp_path, cli):
    shutil.copytree(make_metadata("lenet5"), tmp_path / "metadata")
    damage(tmp_path / "metadata")
    command = ("synthesize", "--method", "lopes", "--teacher", make_teacher("lenet5"), *FAST)
    code, out, err = cli(*command, "--metadata", tmp_path / "metadata", "--out", tmp_path / "s")
    assert (code, out) == (3, "")
    assert len(err.strip().splitlines()) == 1
    assert word in err
    assert not (tmp_path / "s").exists()
