"""Shard directories: what was written is what is read, and nothing else ever is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.shards import HASHES, MANIFEST, ShardReader, ShardWriter, shard_name
from dfkd_cli.errors import ArtifactError, RunFailed

SHAPE, CLASSES = (1, 2, 2), 3
HEAD = {
    "method": "test",
    "shape": list(SHAPE),
    "dtype": "float16",
    "num_classes": CLASSES,
    "teacher": {"sha256": "t", "spec": "lenet5"},
}


def tensors(index: int, count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return {
        "images": torch.randn(count, *SHAPE, generator=generator).half(),
        "logits": torch.randn(count, CLASSES, generator=generator),
        "targets": torch.rand(count, CLASSES, generator=generator).softmax(1),
    }


def write(directory: Path, count: int = 3, head: dict | None = None) -> None:
    """Make the shards that are missing, as a synthesis does."""
    writer = ShardWriter(directory, head or HEAD, count)
    for index in writer.missing():
        writer.write(index, tensors(index), {"loss": index + 0.5})
    writer.write_manifest()


@pytest.fixture
def directory(tmp_path) -> Path:
    write(tmp_path / "shards")
    return tmp_path / "shards"


def edit(directory: Path, change) -> None:
    """Change the manifest, by a function of it."""
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def refuse(directory: Path, message: str | None = None) -> None:
    """Opening and reading everything must fail as an artifact does."""
    with pytest.raises(ArtifactError, match=message) as caught:
        ShardReader(directory).verify()
    assert caught.value.exit_code == 3


# -- reading what was written ------------------------------------------------------------------------------------------


def test_round_trip(directory):
    reader = ShardReader(directory)
    assert (reader.sizes, reader.shape, reader.dtype) == ([4, 4, 4], SHAPE, torch.float16)
    assert (reader.num_classes, reader.teacher) == (CLASSES, "t")
    for index in range(3):
        read, written = reader.read(index), tensors(index)
        assert read.keys() == written.keys()
        assert all(torch.equal(read[name], written[name]) for name in written)
    assert sorted(path.name for path in directory.iterdir()) == [MANIFEST, *map(shard_name, range(3))]


def test_manifest_says_what_the_shards_hold(directory):
    manifest = json.loads((directory / MANIFEST).read_text())
    images = torch.cat([tensors(index)["images"] for index in range(3)]).float()
    classes = torch.cat([tensors(index)["logits"] for index in range(3)]).argmax(1)
    assert manifest["count"] == 12
    assert manifest["complete"] is True
    assert manifest["range"] == [images.min(), images.max()]
    assert manifest["class_histogram"] == [int((classes == k).sum()) for k in range(CLASSES)]
    assert [row["terms"] for row in manifest["shards"]] == [{"loss": 0.5}, {"loss": 1.5}, {"loss": 2.5}]
    assert manifest.items() >= HEAD.items()


def test_the_writer_knows_how_sure_the_teacher_is(directory):
    """As exactly as from the files, whether it wrote a shard or found it."""
    writers = ShardWriter(directory, HEAD, 3), ShardWriter(directory.parent / "again", HEAD, 3)
    for index in range(3):
        writers[1].write(index, tensors(index), {})
    for writer in writers:
        for index in range(3):
            assert writer.confidences[index] == float(tensors(index)["logits"].softmax(1).amax(1).sum())


def test_shards_of_different_sizes(tmp_path):
    writer = ShardWriter(tmp_path, HEAD, 2)
    writer.write(0, tensors(0, 4), {})
    writer.write(1, tensors(1, 1), {})
    writer.write_manifest()
    assert ShardReader(tmp_path).sizes == [4, 1]


def test_equal_work_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, count=24)
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_are_not_finite_are_no_result(tmp_path, value):
    made = tensors(0)
    made["logits"][1, 0] = value
    with pytest.raises(RunFailed, match="shard 0: the teacher's answers are not finite"):
        ShardWriter(tmp_path, HEAD, 1).write(0, made, {})
    assert not list(tmp_path.glob("shard-*"))


def test_the_order_of_the_work_does_not_show(tmp_path):
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        writer = ShardWriter(tmp_path / name, HEAD, 3)
        for index in order:
            writer.write(index, tensors(index), {})
            writer.write_manifest()
    rows = [json.loads((tmp_path / name / MANIFEST).read_text())["shards"] for name in ("a", "b")]
    assert [[row["file"] for row in part] for part in rows] == [[*map(shard_name, range(3))]] * 2


def test_shards_that_no_manifest_names_are_not_believed_when_damaged(tmp_path):
    """Another process continues: what was flipped in a whole file is remade, a cut line of hashes too."""
    writer = ShardWriter(tmp_path, HEAD, 4)
    for index in range(3):
        writer.write(index, tensors(index), {})
    path = tmp_path / shard_name(1)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # of the images: it is as whole a file as before
    path.write_bytes(data)
    assert ShardWriter(tmp_path, HEAD, 4).missing() == [1, 3]
    (hashes,) = tmp_path.glob(f"{HASHES}*")
    hashes.write_bytes(hashes.read_bytes()[:-3])
    continued = ShardWriter(tmp_path, HEAD, 4)
    assert continued.missing() == [1, 2, 3]
    for index in continued.missing():
        continued.write(index, tensors(index), {})
    assert len([*tmp_path.glob(f"{HASHES}*")]) == 2
    continued.write_manifest()
    assert not [*tmp_path.glob(f"{HASHES}*")]
    ShardReader(tmp_path).verify()


# -- reading what is damaged -------------------------------------------------------------------------------------------


def test_no_shard_directory(tmp_path):
    refuse(tmp_path, "no shard directory")
    refuse(tmp_path / "absent", "no shard directory")


@pytest.mark.parametrize("at", [0, 40, -1])
def test_a_flipped_bit(directory, at):
    flip(directory / shard_name(1), at)
    refuse(directory, "damaged")


@pytest.mark.parametrize("kept", [0, 7, 100])
def test_a_truncated_shard(directory, kept):
    path = directory / shard_name(2)
    path.write_bytes(path.read_bytes()[:kept])
    refuse(directory, "damaged")


def test_a_missing_shard(directory):
    (directory / shard_name(0)).unlink()
    refuse(directory, "missing")


def test_swapped_shards(directory):
    first, second = directory / shard_name(0), directory / shard_name(1)
    first.rename(directory / "x")
    second.rename(first)
    (directory / "x").rename(second)
    refuse(directory, "damaged")


def test_the_manifest_of_another_run(directory, tmp_path):
    write(tmp_path / "other", head=HEAD | {"method": "other"})
    shutil.copy(tmp_path / "other" / MANIFEST, directory)
    refuse(directory, "damaged")


def test_an_unfinished_set(tmp_path):
    writer = ShardWriter(tmp_path, HEAD, 2)
    writer.write(0, tensors(0), {})
    refuse(tmp_path, "no shard directory")  # as long as nothing says what is there
    writer.write_manifest()
    refuse(tmp_path, "not finished")
    writer.write(1, tensors(1), {})
    refuse(tmp_path, "not finished")
    writer.write_manifest()
    ShardReader(tmp_path).verify()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/shard.safetensors", "..", "."])
def test_a_manifest_cannot_name_files_elsewhere(directory, name):
    (directory / "sub").mkdir()
    for path in (directory.parent / "secret.safetensors", directory / "sub" / "shard.safetensors"):
        shutil.copy(directory / shard_name(0), path)
    edit(directory, lambda manifest: manifest["shards"][0].update(file=name))
    refuse(directory)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(schema=2),
        lambda m: m.update(kind="model"),
        lambda m: m.update(shape=[1, 4, 4]),
        lambda m: m.update(dtype="float32"),
        lambda m: m.update(dtype="no-such"),
        lambda m: m.pop("teacher"),
        lambda m: m.pop("num_classes"),
        lambda m: m.pop("shards"),
        lambda m: m.update(shards=3),
        lambda m: m.update(shards=[1]),
        lambda m: m["shards"][0].pop("file"),
        lambda m: m["shards"][0].update(count=3),
    ],
)
def test_a_manifest_that_does_not_hold(directory, change):
    edit(directory, change)
    refuse(directory)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["shards"][0].pop("sha256"),
        lambda m: m["shards"][0].update(file=3),
    ],
)
def test_a_manifest_row_that_does_not_hold(directory, change):
    edit(directory, change)
    refuse(directory)


def test_every_shard_says_what_it_has(tmp_path):
    writer = ShardWriter(tmp_path, HEAD, 2)
    whole = tensors(0)
    for index, fields in enumerate((["images", "logits", "targets"], ["images", "logits"])):
        writer.write(index, {name: whole[name] for name in fields}, {})
    writer.write_manifest()
    assert ShardReader(tmp_path).verify() == {"images", "logits"}


@pytest.mark.parametrize(
    "fields",
    [
        {"logits": torch.zeros(4, CLASSES)},
        {"images": torch.zeros(4, *SHAPE).half(), "logits": torch.zeros(4, CLASSES + 1)},
        {"images": torch.zeros(4, *SHAPE).half(), "logits": torch.zeros(4, CLASSES), "targets": torch.zeros(4)},
    ],
)
def test_a_shard_with_other_fields_than_the_manifest_says(directory, fields):
    data = safetensors.torch.save(fields)
    (directory / shard_name(0)).write_bytes(data)
    edit(directory, lambda m: m["shards"][0].update(sha256=sha256_file(directory / shard_name(0))))
    refuse(directory, "does not hold")


# -- continuing --------------------------------------------------------------------------------------------------------


def remade(directory: Path, count: int = 3) -> list[int]:
    """The shards that a new process would make; afterwards the set is whole again, with the right content."""
    missing = ShardWriter(directory, HEAD, count).missing()
    write(directory, count)
    reader = ShardReader(directory)
    for index in range(count):
        assert torch.equal(reader.read(index)["images"], tensors(index)["images"])
    return missing


def test_whole_shards_are_kept(directory):
    before = {path: path.stat().st_mtime_ns for path in directory.glob("*.safetensors")}
    assert remade(directory) == []
    assert {path: path.stat().st_mtime_ns for path in directory.glob("*.safetensors")} == before


def test_a_kill_between_shard_and_manifest(directory):
    edit(directory, lambda m: m.update(complete=False, count=8, shards=m["shards"][:2]))
    assert remade(directory) == []
    manifest = json.loads((directory / MANIFEST).read_text())
    assert [row["terms"] for row in manifest["shards"]] == [{"loss": 0.5}, {"loss": 1.5}, {"loss": 2.5}]


@pytest.mark.parametrize("recorded", [0, 1, 2])
def test_a_kill_before_the_manifest_names_the_latest_shards(directory, tmp_path, recorded):
    """Two of three shards are finished when the process dies, and so many of them recorded."""
    killed = tmp_path / "killed"
    writer = ShardWriter(killed, HEAD, 3)
    for index in range(2):
        writer.write(index, tensors(index), {"loss": index + 0.5})
        if index + 1 == recorded:
            writer.write_manifest()
    assert remade(killed) == [2]
    assert (killed / MANIFEST).read_bytes() == (directory / MANIFEST).read_bytes()


def test_a_folder_in_the_place_of_a_shard_is_none(directory):
    (directory / shard_name(1)).unlink()
    (directory / shard_name(1)).mkdir()
    assert ShardWriter(directory, HEAD, 3).missing() == [1]


def test_a_kill_in_the_middle_of_a_write(directory):
    """The next file is still under its temporary name: readers and the next process do not see it."""
    whole = (directory / shard_name(1)).read_bytes()
    (directory / shard_name(1)).unlink()
    (directory / f".{shard_name(1)}.abcd.tmp").write_bytes(whole[:100])
    refuse(directory, "missing")
    assert remade(directory) == [1]


@pytest.mark.parametrize("manifest", [None, b"", b"{", b"[]", b'{"shards": []}'])
def test_without_a_readable_manifest_the_shards_are_taken_over(directory, manifest):
    (directory / MANIFEST).unlink()
    if manifest is not None:
        (directory / MANIFEST).write_bytes(manifest)
    assert remade(directory) == []


@pytest.mark.parametrize("manifest", [b'{"shards": 3}', b'{"shards": [{}]}', b'{"shards": [{"file": "%s"}]}'])
def test_a_manifest_with_broken_rows_is_made_anew(directory, manifest):
    (directory / MANIFEST).write_bytes(manifest.replace(b"%s", shard_name(0).encode()))
    assert remade(directory) == []


def test_damaged_shards_are_remade(directory):
    flip(directory / shard_name(0))
    path = directory / shard_name(2)
    path.write_bytes(path.read_bytes()[:50])
    assert remade(directory) == [0, 2]


def test_a_damaged_shard_without_a_manifest_is_remade(directory):
    (directory / MANIFEST).unlink()
    path = directory / shard_name(2)
    path.write_bytes(path.read_bytes()[:-1])
    assert remade(directory) == [2]


def test_swapped_shards_without_a_manifest_are_remade(directory):
    (directory / MANIFEST).unlink()
    first, second = directory / shard_name(0), directory / shard_name(1)
    first.rename(directory / "x")
    second.rename(first)
    (directory / "x").rename(second)
    assert remade(directory) == [0, 1]


def test_shards_of_another_run_are_not_taken_over(directory):
    for _ in range(2):  # with their manifest, and without
        assert ShardWriter(directory, HEAD | {"seed": 1}, 3).missing() == [0, 1, 2]
        (directory / MANIFEST).unlink(missing_ok=True)


def test_shards_of_other_processes_are_collected(tmp_path):
    first, second = (ShardWriter(tmp_path, HEAD, 4) for _ in range(2))
    for index in range(4):
        (first, second)[index % 2].write(index, tensors(index), {})
    first.write_manifest()  # of its own shards
    refuse(tmp_path, "not finished")
    assert first.missing() == [1, 3]
    first.collect()
    assert first.missing() == []
    first.write_manifest()
    ShardReader(tmp_path).verify()
