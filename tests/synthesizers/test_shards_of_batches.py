"""Shards of several batches, and shards of bytes: the same images in other files, and what rounding them changes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from stand_ins import check_interruption, work
from tiny_synthesizers import METHODS, linear_teacher, synthesizer

from dfkd_cli.artifacts.shards import MANIFEST, as_pixels, as_stored
from dfkd_cli.config import build, hints
from dfkd_cli.errors import ConfigError, RunFailed
from dfkd_cli.synthesizers.base import AS_STORED, Impressions

ADAPTIVE = "adaptive-deepinversion"  # whose student learns after each shard
OPTIMISED = [name for name, entry in METHODS.items() if "shard_size" in hints(entry.config) and name != ADAPTIVE]


def fields(directory) -> dict[str, torch.Tensor]:
    """Everything in a directory's shards, one after the other."""
    parts = [safetensors.torch.load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def rows(directory) -> list[dict]:
    return json.loads((directory / MANIFEST).read_text())["shards"]


@pytest.mark.parametrize("name", OPTIMISED)
def test_what_is_in_shards_does_not_depend_on_how_large_they_are(name, tmp_path):
    vectors = {"attention": 0} if name == "zskt" else {}  # a linear teacher has no maps
    for directory, size in ((tmp_path / "small", 0), (tmp_path / "large", 4)):
        work(synthesizer(name, directory, num_images=11, batch_size=2, shard_size=size, **vectors), directory)
    small, large = rows(tmp_path / "small"), rows(tmp_path / "large")
    assert [row["count"] for row in small] == [2, 2, 2, 2, 2, 1]
    assert [row["count"] for row in large] == [4, 4, 3]
    one, other = fields(tmp_path / "small"), fields(tmp_path / "large")
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key
    for index, row in enumerate(large):  # terms are means over the images
        for term, value in row["terms"].items():
            pair = small[2 * index : 2 * index + 2]
            expected = np.average([part["terms"][term] for part in pair], weights=[part["count"] for part in pair])
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7, err_msg=term)


def test_shares_of_many_batches_are_shares(tmp_path):
    """Ten tenths in float32 are more than 1."""
    work(synthesizer("zskd", tmp_path, num_images=20, batch_size=2, shard_size=20, dtype="uint8", clamp=True), tmp_path)
    assert 0 < rows(tmp_path)[0]["terms"][AS_STORED] <= 1


def test_a_set_of_such_shards_can_be_interrupted(tmp_path):
    work(synthesizer("zskd", tmp_path / "whole", num_images=22, batch_size=2, shard_size=4), tmp_path / "whole")
    work(synthesizer("zskd", tmp_path / "stopped", num_images=22, batch_size=2, shard_size=4), tmp_path / "stopped")
    for index in (1, 3):
        (tmp_path / "stopped" / f"shard-0000{index}.safetensors").unlink()
    again = synthesizer("zskd", tmp_path / "stopped", num_images=22, batch_size=2, shard_size=4)
    assert again.todo == [1, 3]
    work(again, tmp_path / "stopped")
    for path in (tmp_path / "whole").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()


def test_generators_that_write_such_shards_last_can_be_interrupted(tmp_path):
    def run(directory, *callbacks):
        method = synthesizer("dafl", directory, num_images=22, batch_size=2, shard_size=4, steps=30)
        return work(method, directory, *callbacks)

    check_interruption(run, tmp_path)
    assert [row["count"] for row in rows(tmp_path / "stopped")] == [4, 4, 4, 4, 4, 2]


@pytest.mark.parametrize("size", [3, 5])
def test_a_shard_has_whole_batches(size):
    with pytest.raises(ConfigError, match="no multiple of the 2 images") as error:
        build(METHODS["zskd"].config, {"batch_size": 2, "shard_size": size})
    assert error.value.hint == f"give {size + 1}"


def test_a_shard_is_a_batch_where_a_student_learns_after_each():
    with pytest.raises(ConfigError, match="learns after each shard"):
        build(METHODS[ADAPTIVE].config, {"batch_size": 2, "shard_size": 4})


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_bytes_are_the_nearest_of_256_levels(tmp_path):
    method = synthesizer("zskd", tmp_path / "bytes", clamp=True, dtype="uint8")
    work(method, tmp_path / "bytes")
    work(synthesizer("zskd", tmp_path / "floats", clamp=True, dtype="float32"), tmp_path / "floats")
    stored, exact = fields(tmp_path / "bytes"), fields(tmp_path / "floats")
    levels = exact["images"].double().numpy() * 255
    assert stored["images"].dtype == torch.uint8
    assert np.abs(stored["images"].double().numpy() - levels).max() <= 0.5 + 1e-5
    with torch.no_grad():
        torch.testing.assert_close(stored["logits"], method.teacher(stored["images"].float() / 255))
    same = (stored["logits"].argmax(1) == exact["logits"].argmax(1)).double()
    for index, row in enumerate(rows(tmp_path / "bytes")):
        np.testing.assert_allclose(row["terms"][AS_STORED], same[2 * index : 2 * index + 2].mean())


def test_what_rounding_changes_is_counted(tmp_path):
    """A teacher whose classes change between two levels: of four images half fall on the other side."""
    teacher = linear_teacher(classes=2, size=(1, 1, 1))
    layer = teacher.head()
    threshold = (100.25 / 255 - 0.2) / 0.5  # as the network sees it
    layer.weight.data = torch.tensor([[-1.0], [1.0]])
    layer.bias.data = torch.tensor([threshold, -threshold])
    method = synthesizer("noise", tmp_path, teacher, num_images=4, batch_size=4, dtype="uint8")
    images = torch.tensor([100.1, 100.4, 100.45, 101.0]).view(4, 1, 1, 1) / 255
    method.make = lambda first, count: Impressions(images, None, {})
    terms = method.round(0)
    assert terms[AS_STORED] == 0.5  # 100.4 and 100.45 are on one side, 100 on the other


def test_bytes_are_read_back_as_they_were_seen():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_stored(as_pixels(levels), "uint8", 0), levels)
    nearly = torch.tensor([-0.4, 255.4]) / 255  # what clamped images are after they were normalised and back
    assert as_stored(nearly, "uint8", 0).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("pixel", "dtype", "message"),
    [
        (-0.003, "uint8", "leave"),
        (1.003, "uint8", "leave"),
        (float("nan"), "uint8", "not finite as uint8"),
        (float("inf"), "uint8", "not finite as uint8"),
        (7e4, "float16", "not finite as float16"),
        (float("nan"), "float32", "not finite as float32"),
    ],
)
def test_pixels_that_a_type_does_not_hold(pixel, dtype, message):
    with pytest.raises(RunFailed, match=f"shard 7: pixels .*{message}"):
        as_stored(torch.tensor([0.5, pixel]), dtype, 7)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("zskd", {}),
        ("deepinversion", {}),
        ("lopes", {}),
        ("gaussian", {}),
        ("dafl", {"end": "tanh"}),
        ("zskt", {"end": "normal"}),
    ],
)
def test_methods_whose_pixels_may_leave_the_range_refuse_bytes(name, values):
    with pytest.raises(ConfigError, match="pixels may leave"):
        build(METHODS[name].config, {"dtype": "uint8", **values})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("noise", {}),
        ("zskd", {"clamp": True}),
        ("zskd", {"range": "rescale"}),
        ("sre2l", {}),
        ("dafl", {"end": "sigmoid"}),
        ("nayer", {}),
        ("cmi", {}),
    ],
)
def test_methods_whose_pixels_stay_in_range_make_bytes(name, values, tmp_path):
    work(synthesizer(name, tmp_path, dtype="uint8", **values), tmp_path)
    assert fields(tmp_path)["images"].dtype == torch.uint8
    assert all(0 <= row["terms"][AS_STORED] <= 1 for row in rows(tmp_path))
